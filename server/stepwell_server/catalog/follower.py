"""Has the server serve what is in its folder of models, while others put versions there and take them away.

What the policy chooses is loaded; the highest of it becomes the default, unless somebody made another version the default;
what the policy does not choose any more is unloaded when its sessions have ended. A version that cannot be loaded makes
room for the next lower one, and nothing that works is given up before something else does.
"""

from __future__ import annotations

import asyncio
import dataclasses
import time
from collections.abc import Callable, Collection, Mapping

from stepwell_server.catalog.catalog import Catalog
from stepwell_server.catalog.control import LoadRequest, VersionState
from stepwell_server.catalog.files.folder import Look, ModelFolder, VersionFile
from stepwell_server.catalog.files.sources import tell_problems
from stepwell_server.clock import Clock
from stepwell_server.core.version_policy import VersionPolicy
from stepwell_server.engine.api import SessionPolicy
from stepwell_server.errors import Overloaded, ServerError, Unavailable, VersionExists
from stepwell_server.files.stamp import Stamp
from stepwell_server.logs import Log

_log = Log("models")
LOOK_S = 1.0
"""Between two looks at the folder, in seconds."""
_LEAST_SHARE = 100
"""Between two looks there is at least so many times what one takes of a processor."""
_AGAIN_S = 30.0
"""After so many seconds a load is tried again that failed for want of room, or of the store."""
_TRANSIENT = (Unavailable, Overloaded)


@dataclasses.dataclass(frozen=True, slots=True)
class FolderOptions:
    """What the operator says of the folder."""

    policy_of: Callable[[str], VersionPolicy]
    """Which versions of a name are served."""
    sessions: SessionPolicy = SessionPolicy.KEEP
    """What becomes of sessions that follow the default when it moves."""
    migration_of: Callable[[str], str] = lambda _name: ""
    """For `MIGRATE`: the function for a name."""
    but: Collection[str] = ()
    """Names that are served from elsewhere."""


@dataclasses.dataclass(slots=True)
class _Name:
    """What was done for a name."""

    loaded: dict[int, Stamp] = dataclasses.field(default_factory=dict)
    """Versions from the folder that are served, and what their files were."""
    failed: dict[int, Stamp] = dataclasses.field(default_factory=dict)
    """Files that cannot be served, until they change."""
    not_before: dict[int, float] = dataclasses.field(default_factory=dict)
    """When to try again what failed for another reason."""
    leaving: set[int] = dataclasses.field(default_factory=set)
    """Versions that are to be unloaded when they have no sessions."""
    default: int = 0
    """The version that was made the default here; another default is somebody else's wish."""
    former_default: int = 0
    """What the default was before the start, if that is not there any more: sessions that follow it have to be told."""
    refused: tuple[int, int] = (0, 0)
    """A move of the default, from and to, that could not be made."""
    told: set[str] = dataclasses.field(default_factory=set)
    """What was logged, so that it is logged once."""


class FolderFollower:
    """Lives on the event loop; `run` runs beside it."""

    def __init__(
        self,
        folder: ModelFolder | None,
        control: Catalog,
        options: FolderOptions,
        *,
        clock: Clock,
        warn: Callable[[str], None] = lambda _problem: None,
    ) -> None:
        """Wire it; `warn` is told what is left out of the folder, in a few words, or nothing if all is well."""
        self._folder = folder
        self._warn = warn
        self._control = control
        self._options = options
        self._clock = clock
        self._names: dict[str, _Name] = {}
        self._look_s = 0.0
        """What the last look took of a processor."""

    def begin_with(
        self,
        name: str,
        loaded: Mapping[int, VersionFile],
        failed: Mapping[int, VersionFile],
        *,
        default: int,
        former_default: int = 0,
    ) -> None:
        """Know what was loaded at the start.

        Args:
            name: of the model.
            loaded: versions that are.
            failed: those that could not be.
            default: the version that is the default because it is the highest; 0 if somebody had chosen it.
            former_default: the version that was, if it is not loaded any more; 0: it is.
        """
        self._names[name] = _Name(
            {version: file.stamp for version, file in loaded.items()},
            {version: file.stamp for version, file in failed.items()},
            default=default,
            former_default=former_default,
        )

    async def run(self) -> None:
        """Look again and again, until cancelled."""
        while True:
            await asyncio.sleep(max(LOOK_S, self._look_s * _LEAST_SHARE))
            try:
                await self.look()
            except Exception as error:
                _log.defect("the folder of models could not be followed; it is looked at again", error)

    async def settle(self) -> None:
        """Do what has to be done after the start: what was put there while no server ran is as new as what comes later."""
        for name, own in self._names.items():
            if name in self._options.but:
                await self._choose_default(name, own, own.loaded)
        if self._folder is not None:
            await self.look()

    async def look(self) -> None:
        """Look once, and do what has to be done. The timer does it by itself."""
        assert self._folder is not None
        look = await asyncio.to_thread(self._look, self._folder)
        tell_problems(look)
        parts = [f"{path} {why}" for path, why in sorted(look.problems.items())]
        more = f", and {len(parts) - 1} more" if len(parts) > 1 else ""
        self._warn(f"not served of --models: {parts[0]}{more}" if parts else "")
        for name in sorted(look.versions.keys() | self._names.keys()):
            if name not in self._options.but:
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
                self._tell(
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
            self._control.drain(name, version, drains=False)
        if not chosen & self._served(name).keys():
            return
        await self._choose_default(name, own, chosen)
        for version, is_default in self._served(name).items():
            if version in own.loaded and version not in chosen | own.leaving and not is_default:
                own.leaving.add(version)
                self._control.drain(name, version)
                _log.info(
                    "a version is not served any more when its sessions end", model=name, version=version
                )

    def _compare(self, name: str, own: _Name, files: Mapping[int, VersionFile]) -> None:
        """Forget what was said of files that are gone or have changed, and of versions that are not served any more."""
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
            if version not in served:  # somebody unloaded it, and wants it again
                del own.loaded[version]
            else:
                self._tell(
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
        """The lowest version that is to be loaded; what becomes the default is loaded last."""
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
            await self._control.load(request)
        except VersionExists as error:
            own.failed[version] = file.stamp  # somebody else loaded it, or sessions know it as another model
            self._tell(
                own,
                "a version in --models is not loaded",
                model=name,
                version=version,
                reason=error.message,
            )
        except _TRANSIENT:
            own.not_before[version] = self._clock.monotonic() + _AGAIN_S
        except ServerError:
            own.failed[version] = file.stamp  # the control has said why
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
        """The default, be it here or on another server alone."""
        here = (version for version, is_default in self._served(name).items() if is_default)
        return self._control.default_elsewhere(name) or next(here, 0)

    async def _choose_default(self, name: str, own: _Name, chosen: Collection[int]) -> None:
        """Make the highest version the default, unless somebody made another one that."""
        served, default = self._served(name), self._default(name)
        if default in chosen and default not in served:
            return  # another server has it, and it is to come here
        target = max((version for version in served if version in chosen), default=default)
        if default == target and not own.former_default:
            own.default = target
        elif default != own.default and not own.former_default:
            self._tell(
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
                await self._control.set_default(
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
            for each in self._control.status(name)
            if each.state in {VersionState.READY, VersionState.DRAINING}
        }

    @staticmethod
    def _tell(own: _Name, event: str, **fields: object) -> None:
        key = f"{event} {fields}"
        if key not in own.told:
            own.told.add(key)
            _log.warning(event, **fields)
