"""Watches the folder of models: loads versions that appear in it, and unloads versions that the policy no longer selects.

The policy selects the versions to load. The highest of them becomes the default, unless a call chose another default. A
version that is no longer selected is unloaded when its sessions have ended. If a version cannot be loaded, the next
lower one is loaded instead, and a working version stays until another one works.
"""

from __future__ import annotations

import asyncio
import dataclasses
import time
from collections.abc import Callable, Collection, Mapping

from stepwell_server.catalog.catalog import Catalog
from stepwell_server.catalog.control import LoadRequest, VersionState
from stepwell_server.catalog.files.folder import Look, ModelFolder, VersionFile
from stepwell_server.catalog.files.sources import log_problems
from stepwell_server.clock import Clock
from stepwell_server.core.version_policy import VersionPolicy
from stepwell_server.engine.api import SessionPolicy
from stepwell_server.errors import Overloaded, ServerError, Unavailable, VersionExists
from stepwell_server.files.stamp import Stamp
from stepwell_server.logs import Log

_log = Log("models")
SCAN_INTERVAL_S = 1.0
"""The time between scans of the folder, in seconds."""
_MIN_IDLE_RATIO = 100
"""The time between scans is at least this many times the CPU time of one."""
_RETRY_INTERVAL_S = 30.0
"""The delay before a load that failed for lack of room or of the store is retried, in seconds."""
_TRANSIENT = (Unavailable, Overloaded)


@dataclasses.dataclass(frozen=True, slots=True)
class FolderOptions:
    """The operator's settings of the folder."""

    policy_of: Callable[[str], VersionPolicy]
    """Returns the policy of a name."""
    sessions: SessionPolicy = SessionPolicy.KEEP
    """What happens to sessions that follow the default when it changes."""
    migration_of: Callable[[str], str] = lambda _name: ""
    """For `MIGRATE`: returns the function of a name."""
    excluded: Collection[str] = ()
    """Names that are on the command line."""


@dataclasses.dataclass(slots=True)
class _Name:
    """The state of a name in the folder."""

    loaded: dict[int, Stamp] = dataclasses.field(default_factory=dict)
    """Served versions, with the stamps of their files."""
    failed: dict[int, Stamp] = dataclasses.field(default_factory=dict)
    """Versions that failed to load, with the stamps of their files: retried when a file changes."""
    not_before: dict[int, float] = dataclasses.field(default_factory=dict)
    """When to retry versions that failed for a transient reason."""
    leaving: set[int] = dataclasses.field(default_factory=set)
    """Draining versions."""
    default: int = 0
    """The default set from the folder. If the current default is another one, a call chose it."""
    former_default: int = 0
    """The default before the start, if it is no longer loaded: the sessions that follow it still have to move."""
    refused: tuple[int, int] = (0, 0)
    """A change of the default that failed: from and to."""
    logged: set[str] = dataclasses.field(default_factory=set)
    """The warnings logged so far: each is logged once."""


class FolderFollower:
    """Watches the folder. Used on the event loop; `run` is its background task."""

    def __init__(
        self,
        folder: ModelFolder | None,
        catalog: Catalog,
        options: FolderOptions,
        *,
        clock: Clock,
        warn: Callable[[str], None] = lambda _problem: None,
    ) -> None:
        """Initialize it; `warn` is called with what is not served from the folder, or with an empty text."""
        self._folder = folder
        self._warn = warn
        self._catalog = catalog
        self._options = options
        self._clock = clock
        self._names: dict[str, _Name] = {}
        self._look_s = 0.0
        """The CPU time of the last scan, in seconds."""

    def begin_with(
        self,
        name: str,
        loaded: Mapping[int, VersionFile],
        failed: Mapping[int, VersionFile],
        *,
        default: int,
        former_default: int = 0,
    ) -> None:
        """Set the state of a name as it was loaded at the start.

        Args:
            name: the model's name.
            loaded: the loaded versions.
            failed: the versions that failed to load.
            default: the default, if it is the default because it is the highest; 0 if a call chose it.
            former_default: the default before the start if it is no longer loaded; else 0.
        """
        self._names[name] = _Name(
            {version: file.stamp for version, file in loaded.items()},
            {version: file.stamp for version, file in failed.items()},
            default=default,
            former_default=former_default,
        )

    async def run(self) -> None:
        """Scan the folder at intervals, until cancelled."""
        while True:
            await asyncio.sleep(max(SCAN_INTERVAL_S, self._look_s * _MIN_IDLE_RATIO))
            try:
                await self.look()
            except Exception as error:
                _log.defect("the folder of models could not be scanned; the scan is repeated", error)

    async def settle(self) -> None:
        """Make the changes that are due after the start: versions that appeared while no server ran count as new."""
        for name, own in self._names.items():
            if name in self._options.excluded:
                await self._choose_default(name, own, own.loaded)
        if self._folder is not None:
            await self.look()

    async def look(self) -> None:
        """Scan once, and make the changes that are due. `run` calls this at intervals."""
        assert self._folder is not None
        look = await asyncio.to_thread(self._look, self._folder)
        log_problems(look)
        parts = [f"{path} {why}" for path, why in sorted(look.problems.items())]
        more = f", and {len(parts) - 1} more" if len(parts) > 1 else ""
        self._warn(f"not served of --models: {parts[0]}{more}" if parts else "")
        for name in sorted(look.versions.keys() | self._names.keys()):
            if name not in self._options.excluded:
                await self._follow(name, look.versions.get(name, {}))

    def _look(self, folder: ModelFolder) -> Look:
        began = time.thread_time()
        look = folder.look()
        self._look_s = time.thread_time() - began
        return look

    async def _follow(self, name: str, files: Mapping[int, VersionFile]) -> None:
        own = self._names.setdefault(name, _Name())
        self._compare(name, own, files)
        if not files:
            if own.loaded.keys() & self._served(name).keys():
                self._warn_once(
                    own,
                    "a model is gone from --models and is still served; stepwell models unload removes it",
                    model=name,
                )
            elif not own.former_default:
                del self._names[name]
            return
        while (version := self._next(name, own, files)) is not None:
            await self._load(name, own, version, files)
        chosen = self._chosen(name, own, files)
        for version in sorted(chosen & own.leaving):
            own.leaving.discard(version)
            self._catalog.drain(name, version, drains=False)
        if not chosen & self._served(name).keys():
            return
        await self._choose_default(name, own, chosen)
        for version, is_default in self._served(name).items():
            if version in own.loaded and version not in chosen | own.leaving and not is_default:
                own.leaving.add(version)
                self._catalog.drain(name, version)
                _log.info(
                    "a version is unloaded when its last session ends, because its file is gone or the policy excludes it",
                    model=name,
                    version=version,
                )

    def _compare(self, name: str, own: _Name, files: Mapping[int, VersionFile]) -> None:
        """Forget files that are gone or have changed, and versions that are no longer served."""
        served = self._served(name)
        left = own.leaving - served.keys()
        for version in own.loaded.keys() - served.keys():
            if version in left or version not in files:
                del own.loaded[version]
        own.leaving -= left
        for version, stamp in list(own.failed.items()):
            file = files.get(version)
            if file is None or file.stamp != stamp:
                del own.failed[version]
        for version, stamp in list(own.loaded.items()):
            file = files.get(version)
            if file is None or file.stamp == stamp:
                continue
            if version not in served:  # a call unloaded it, and the new file is loaded
                del own.loaded[version]
            else:
                self._warn_once(
                    own,
                    "the file of a version, or the declaration beside it, has changed, and the old content is still served; give "
                    "the new file the next version number",
                    model=name,
                    version=version,
                    path=file.path,
                )

    def _chosen(self, name: str, own: _Name, files: Mapping[int, VersionFile]) -> set[int]:
        return self._options.policy_of(name).choose([each for each in files if each not in own.failed])

    def _next(self, name: str, own: _Name, files: Mapping[int, VersionFile]) -> int | None:
        """Return the lowest version to load, so that the new default is loaded last."""
        now = self._clock.monotonic()
        missing = self._chosen(name, own, files) - own.loaded.keys()
        return min((each for each in missing if now >= own.not_before.get(each, 0.0)), default=None)

    async def _load(self, name: str, own: _Name, version: int, files: Mapping[int, VersionFile]) -> None:
        file, is_first = files[version], not self._served(name)
        moves = version == max(self._chosen(name, own, files)) and self._is_ours(name, own)
        policy = self._options.sessions if moves else SessionPolicy.KEEP
        request = LoadRequest(
            name=name,
            version=version,
            path=file.path,
            keep_default=not moves,
            policy=policy,
            migration=self._options.migration_of(name) if policy is SessionPolicy.MIGRATE else "",
            keep_previous=moves,
            is_charged=False,
        )
        try:
            await self._catalog.load(request)
        except VersionExists as error:
            own.failed[version] = file.stamp  # a call loaded it, or sessions know it as another model
            self._warn_once(
                own,
                "a version in --models is not loaded",
                model=name,
                version=version,
                reason=error.message,
            )
        except _TRANSIENT:
            own.not_before[version] = self._clock.monotonic() + _RETRY_INTERVAL_S
        except ServerError:
            own.failed[version] = file.stamp  # the catalog has logged it
        else:
            own.loaded[version] = file.stamp
            if moves or is_first:
                own.default = version
            if moves and not is_first:
                own.former_default = 0

    def _is_ours(self, name: str, own: _Name) -> bool:
        """Whether the default follows the folder."""
        return self._default(name) in (0, own.default)

    def _default(self, name: str) -> int:
        """Return the default, even if only another server has it loaded."""
        here = (version for version, is_default in self._served(name).items() if is_default)
        return self._catalog.default_elsewhere(name) or next(here, 0)

    async def _choose_default(self, name: str, own: _Name, chosen: Collection[int]) -> None:
        """Make the highest version the default, unless a call chose another default."""
        served, default = self._served(name), self._default(name)
        if default in chosen and default not in served:
            return  # another server has it, and this one will load it
        target = max((version for version in served if version in chosen), default=default)
        if default == target and not own.former_default:
            own.default = target
        elif default != own.default and not own.former_default:
            self._warn_once(
                own,
                "a model keeps the default version that was chosen for it; stepwell models default changes that",
                model=name,
                version=default,
            )
        elif target and own.refused != (default, target):
            migration = (
                self._options.migration_of(name) if self._options.sessions is SessionPolicy.MIGRATE else ""
            )
            try:
                await self._catalog.set_default(
                    name, target, self._options.sessions, migration, keep_previous=True
                )
            except _TRANSIENT as error:
                _log.warning(
                    "the default version of a model cannot be changed now",
                    model=name,
                    version=target,
                    reason=error.message,
                )
            except ServerError as error:
                own.refused = default, target
                _log.error(
                    "the default version of a model cannot be changed",
                    model=name,
                    version=target,
                    reason=error.message,
                )
            else:
                own.default, own.former_default = target, 0

    def _served(self, name: str) -> dict[int, bool]:
        """Return the served versions of a name, and whether each is the default."""
        return {
            each.version: each.is_default
            for each in self._catalog.status(name)
            if each.state in {VersionState.READY, VersionState.DRAINING}
        }

    @staticmethod
    def _warn_once(own: _Name, event: str, **fields: object) -> None:
        key = f"{event} {fields}"
        if key not in own.logged:
            own.logged.add(key)
            _log.warning(event, **fields)
