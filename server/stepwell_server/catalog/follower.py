"""Follows the folder of models: versions that are put there are loaded, versions that leave the policy are unloaded.

The policy chooses the versions to load. The highest of them becomes the default, unless a call made another version the
default. A version that the policy no longer chooses is unloaded when its sessions have ended. If a version cannot be
loaded, the next lower one is, and a version that works stays until another one does.
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
"""Between two scans of the folder, in seconds."""
_MIN_IDLE_RATIO = 100
"""The time between two scans is at least this many times the processor time of one."""
_RETRY_INTERVAL_S = 30.0
"""After this time a load is tried again that failed as there was no room, or no answer of the store, in seconds."""
_TRANSIENT = (Unavailable, Overloaded)


@dataclasses.dataclass(frozen=True, slots=True)
class FolderOptions:
    """The operator's settings of the folder."""

    policy_of: Callable[[str], VersionPolicy]
    """Which versions of a name are served."""
    sessions: SessionPolicy = SessionPolicy.KEEP
    """What becomes of sessions that follow the default when it moves."""
    migration_of: Callable[[str], str] = lambda _name: ""
    """For `MIGRATE`: the function for a name."""
    excluded: Collection[str] = ()
    """Names that the command line serves."""


@dataclasses.dataclass(slots=True)
class _Name:
    """The versions of a name that come from the folder."""

    loaded: dict[int, Stamp] = dataclasses.field(default_factory=dict)
    """Versions that are served, and the stamps of their files."""
    failed: dict[int, Stamp] = dataclasses.field(default_factory=dict)
    """Versions that cannot be served, until their files change."""
    not_before: dict[int, float] = dataclasses.field(default_factory=dict)
    """When to load again versions that failed for another reason."""
    leaving: set[int] = dataclasses.field(default_factory=set)
    """Versions that are unloaded when they have no sessions."""
    default: int = 0
    """The version that became the default here. Another default was chosen by a call."""
    former_default: int = 0
    """The default before the start, if that is not loaded any more: sessions that follow it still have to move."""
    refused: tuple[int, int] = (0, 0)
    """A move of the default that failed: from which version to which."""
    logged: set[str] = dataclasses.field(default_factory=set)
    """Warnings that were logged: each is logged once."""


class FolderFollower:
    """Lives on the event loop; `run` runs beside it."""

    def __init__(
        self,
        folder: ModelFolder | None,
        catalog: Catalog,
        options: FolderOptions,
        *,
        clock: Clock,
        warn: Callable[[str], None] = lambda _problem: None,
    ) -> None:
        """Wire it; `warn` gets what of the folder is not served, in a few words; an empty text if all is."""
        self._folder = folder
        self._warn = warn
        self._catalog = catalog
        self._options = options
        self._clock = clock
        self._names: dict[str, _Name] = {}
        self._look_s = 0.0
        """Processor time of the last scan, in seconds."""

    def begin_with(
        self,
        name: str,
        loaded: Mapping[int, VersionFile],
        failed: Mapping[int, VersionFile],
        *,
        default: int,
        former_default: int = 0,
    ) -> None:
        """Follow a name from what was loaded at the start.

        Args:
            name: of the model.
            loaded: versions that are.
            failed: those that could not be.
            default: the version that is the default because it is the highest; 0 if a call chose it.
            former_default: the version that was, if it is not loaded any more; 0: it is.
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
                _log.defect("the folder of models could not be followed; it is looked at again", error)

    async def settle(self) -> None:
        """Make the changes that are due after the start: versions that came while no server ran are new, too."""
        for name, own in self._names.items():
            if name in self._options.excluded:
                await self._choose_default(name, own, own.loaded)
        if self._folder is not None:
            await self.look()

    async def look(self) -> None:
        """Scan once, and make the changes that are due. `run` does it at intervals."""
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
                    "a model is gone from --models and is served on; stepwell models unload ends it",
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
                    "a version is not served any more when its sessions end", model=name, version=version
                )

    def _compare(self, name: str, own: _Name, files: Mapping[int, VersionFile]) -> None:
        """Forget files that are gone or have changed, and versions that are not served any more."""
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
                    "the file of a version has changed; the version is served as it was: versions do not change, give the new "
                    "one the next number",
                    model=name,
                    version=version,
                    path=file.path,
                )

    def _chosen(self, name: str, own: _Name, files: Mapping[int, VersionFile]) -> set[int]:
        return self._options.policy_of(name).choose([each for each in files if each not in own.failed])

    def _next(self, name: str, own: _Name, files: Mapping[int, VersionFile]) -> int | None:
        """The lowest version to load: the one that becomes the default is loaded last."""
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
        """Whether the default moves with what is in the folder."""
        return self._default(name) in (0, own.default)

    def _default(self, name: str) -> int:
        """The default, even if only another server has it loaded."""
        here = (version for version, is_default in self._served(name).items() if is_default)
        return self._catalog.default_elsewhere(name) or next(here, 0)

    async def _choose_default(self, name: str, own: _Name, chosen: Collection[int]) -> None:
        """Make the highest version the default, unless a call chose another one."""
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
        """The versions of a name that are served, and whether each is the default."""
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
