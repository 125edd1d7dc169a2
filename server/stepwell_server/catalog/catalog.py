"""Loads versions of models while the server serves, and unloads them: one after the other, each whole or not at all.

A load is compiled on threads (by a process of its own), made by the engine beside the traffic, and becomes the default
by one commit of the engine's. Until that commit it can be stopped, and what fails leaves nothing but its reason.
"""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from typing_extensions import override

from stepwell_server.catalog.control import (
    WARM_UP,
    LoadedVersion,
    LoadRequest,
    ModelControl,
    Progress,
    Upload,
    VersionState,
    VersionStatus,
)
from stepwell_server.catalog.files import paths
from stepwell_server.catalog.files.kept_programs import NOT_KEPT, KeptPrograms
from stepwell_server.catalog.files.uploads import Uploads
from stepwell_server.catalog.interfaces import Compile, Compiled, Engine, Observer, Quotas
from stepwell_server.catalog.load import Load
from stepwell_server.catalog.refusals import no_version, require_label, require_valid, upload_off
from stepwell_server.clock import Clock
from stepwell_server.compile.errors import ModelError
from stepwell_server.engine.api import DefaultChange, Moved, SessionPolicy, VersionInfo
from stepwell_server.errors import (
    InvalidInput,
    ModelInUse,
    ModelLoadFailed,
    ModelNotFound,
    ServerError,
    VersionExists,
    VersionNotFound,
)
from stepwell_server.logs import Log

_log = Log("models")
_LOOK_S = 1.0
"""Between two looks whether a version that drains has sessions."""
_AGAIN_S = 60.0
"""A version that had none in memory and could not be unloaded, since the store has some, is tried again after so long."""
MOST_FAILED = 64
"""Failed versions that are remembered, of all names together."""
_Key = tuple[str, int]


class LiveModels(ModelControl):
    """`control.ModelControl`. Lives on the event loop; `run` must run beside it."""

    def __init__(
        self,
        engine: Engine,
        compile_model: Compile,
        *,
        clock: Clock,
        observer: Observer,
        root: Path | None = None,
        kept: KeptPrograms | None = None,
        uploads: Uploads | None = None,
        quotas: Quotas | None = None,
        tell: Callable[[str, int, str], None] = lambda _name, _version, _how: None,
        tell_elsewhere: Callable[[Mapping[str, int]], None] = lambda _defaults: None,
    ) -> None:
        """Wire it.

        Args:
            engine: serves them.
            compile_model: makes programs of files.
            clock: says when to look again.
            observer: is told of loads.
            root: `--models`: paths that calls name must lie in it.
            kept: keeps programs of uploads for a restart; None: nothing outlives the server.
            uploads: takes files; None: none are taken.
            quotas: how many versions tenants may load.
            tell: is told how far a version of a name is: `loading: STAGE`, `loaded`, `failed: WHY`; empty: it is gone.
            tell_elsewhere: is told each second which defaults are not loaded here, but maybe on other servers.
        """
        self._engine = engine
        self.compile = compile_model
        """Makes programs of files."""
        self._clock = clock
        self._observer = observer
        self._root = root
        self.kept = kept
        """Programs of uploads; None: nothing outlives the server."""
        self._uploads = uploads
        self._quotas = quotas
        self._tell = tell
        self._tell_elsewhere = tell_elsewhere
        self._loads: dict[_Key, Load] = {}
        """Under way, those that wait among them."""
        self._failed: dict[_Key, VersionStatus] = {}
        self._leaving: set[_Key] = set()
        """Versions that `drain` was called for: to be unloaded when they have no sessions and no labels."""
        self._not_before: dict[_Key, float] = {}
        """When to try again to unload a version."""
        self._owners: dict[_Key, str] = {}
        """The tenants whose admins loaded versions."""
        self._unkept: set[_Key] = set()
        """Versions of files that nobody keeps."""
        self._turn = asyncio.Lock()
        """One load at a time compiles, and one change of a name at a time is made."""
        self._tasks: set[asyncio.Task[LoadedVersion]] = set()

    # ----------------------------------------------------------------------------------------------------------- loads

    @override
    async def load(self, request: LoadRequest, progress: Progress | None = None) -> LoadedVersion:
        require_valid(request)
        root = self._root if request.is_charged and not request.is_found else None
        path = await asyncio.to_thread(paths.checked, request.path, root) if request.path else None
        version = self._number(request)
        path = path or self._upload(request)

        def at(stage: str) -> None:
            self._tell(request.name, version, f"loading: {stage}")
            if progress is not None and not load.abandoned.is_set():
                progress(stage)

        load = Load(request, version, at)
        load.path = str(path)
        key = request.name, load.version
        self._loads[key] = load
        if request.version:
            self._failed.pop(key, None)
        task = asyncio.create_task(self._run(load, path))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        try:
            return await asyncio.shield(task)
        except asyncio.CancelledError:
            load.stop()
            task.add_done_callback(_look_at)  # nobody else does
            raise

    def _upload(self, request: LoadRequest) -> Path:
        if self._uploads is None:
            raise upload_off()
        return self._uploads.take(request.upload, request.tenant)

    def _number(self, request: LoadRequest) -> int:
        """Its version, which nothing else has.

        Raises:
            VersionExists: something else has it.
            QuotaExceeded: the tenant has too many.
        """
        name, version = request.name, request.version
        if not version:
            under_way = [number for other, number in self._loads if other == name]
            version = max(self._engine.next_version(name), *(number + 1 for number in under_way), 1)
        key = name, version
        if key in self._loads:
            raise VersionExists(
                f"version {version} of model {name!r} must not be loaded twice: it is being loaded"
                f" ({self._loads[key].stage})",
                model=name,
                version=str(version),
            )
        if version in self._served(name):
            raise VersionExists(
                f"version must be one that model {name!r} does not have; it has {version}: load it as another one,"
                " or unload that one first",
                model=name,
                version=str(version),
            )
        if self._quotas is not None and request.is_charged:
            has = Counter(self._owners.values())[request.tenant]
            has += sum(
                load.request.tenant == request.tenant
                for load in self._loads.values()
                if load.request.is_charged
            )
            if request.unload_previous and self._owners.get((name, self._default(name))) == request.tenant:
                has -= 1
            self._quotas.require_model(request.tenant, has)
        return version

    async def _run(self, load: Load, path: Path) -> LoadedVersion:
        request, key = load.request, (load.request.name, load.version)
        started = time.perf_counter()
        try:
            await load.turn(self._turn)
            try:
                return await self._load(load, path, started)
            finally:
                self._turn.release()
        except ServerError as error:
            if load.abandoned.is_set():
                self._tell(*key, "")
            else:
                self._fail(key, load, error.message)
            raise
        except Exception as error:
            opaque = _log.internal("a load raised", error, model=request.name, version=load.version)
            self._fail(key, load, opaque.message)
            raise opaque from error
        finally:
            del self._loads[key]
            if self._uploads is not None and request.upload:
                await self._uploads.delete(request.upload)

    def _fail(self, key: _Key, load: Load, why: str) -> None:
        name, version = key
        served = self._served(name)
        # what callers send makes no series
        self._observer.model_failed("" if load.request.is_charged and not served else name)
        _log.error("a model cannot be loaded", model=name, version=version, reason=why)
        if not load.request.version and version not in served:
            # The caller named no version: the next load gets the number. One that did may have failed with it before.
            before = self._failed.get(key)
            self._tell(name, version, "" if before is None else f"failed: {before.reason}")
        elif version not in served:
            self._tell(name, version, f"failed: {why}")
            self._failed[key] = VersionStatus(version, VersionState.FAILED, why, path=load.path)
            while len(self._failed) > MOST_FAILED:
                oldest = next(iter(self._failed))
                del self._failed[oldest]
                self._tell(*oldest, "")

    async def _load(self, load: Load, path: Path, started: float) -> LoadedVersion:
        request, name, version = load.request, load.request.name, load.version
        compiled = await self._compiled(load, path)
        load.require_wanted()
        is_first = not self._served(name)
        if not is_first:
            await self._engine.require_possible(
                name, version, compiled.program, request.policy, request.migration
            )
        load.tell(WARM_UP)
        source = str(path)
        if request.upload or request.is_temporary:
            kept = None if self.kept is None else await self.kept.keep(name, version, compiled.program)
            source = "" if kept is None else str(kept)
            if kept is None:
                self._unkept.add((name, version))
        becomes = None
        if not (is_first or request.keep_default):
            leaves = _leaves(request.policy, request.keep_previous) or request.unload_previous
            becomes = DefaultChange(version, request.policy, request.migration, leaves)
        try:
            moved = await self._engine.load_version(
                name,
                version,
                compiled.program,
                source=source,
                tenant=request.tenant,
                labels=request.labels,
                becomes=becomes,
                begin=load.begin,
            )
        except BaseException:
            await self._forget(name, version, source)
            raise
        if request.is_charged:
            self._owners[name, version] = request.tenant
        if moved.previous:
            self._moved(name, version, request.policy, moved)
        self._failed.pop((name, version), None)
        seconds = time.perf_counter() - started
        self._observer.model_loaded(name, compiled.origin, seconds)
        self._tell(name, version, "loaded")
        _log.info("model loaded", model=name, version=version, path=load.path, seconds=seconds)
        await self.look()
        return LoadedVersion(version, moved.previous, moved.sessions)

    async def _compiled(self, load: Load, path: Path) -> Compiled:
        try:
            return await self.compile(load.request.name, path, load.tell, load.abandoned)
        except (ModelError, OSError) as error:
            load.require_wanted()
            why = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
            details = getattr(error, "details", "")
            if details:
                _log.warning("model refused", model=load.request.name, version=load.version, details=details)
            which = f"version {load.version}" if load.request.version else "a new version"
            raise ModelLoadFailed(
                f"{which} of model {load.request.name!r} cannot be loaded: {why}",
                model=load.request.name,
                version=str(load.version),
            ) from error

    async def _forget(self, name: str, version: int, source: str) -> None:
        """Nothing stands for a version any more."""
        key = name, version
        self._owners.pop(key, None)
        self._unkept.discard(key)
        self._leaving.discard(key)
        self._not_before.pop(key, None)
        if self.kept is not None and source:
            await self.kept.drop(Path(source))

    # ---------------------------------------------------------------------------------------------- what else is asked

    @override
    async def unload(self, name: str, version: int, *, force: bool) -> None:
        under_way = [load for (other, number), load in self._loads.items() if other == name]
        if version:
            under_way = [load for load in under_way if load.version == version]
        failed = [key for key in self._failed if key[0] == name and version in (0, key[1])]
        for load in under_way:
            load.stop("it was unloaded meanwhile")
        for key in failed:
            del self._failed[key]
            self._tell(*key, "")
        is_done = bool(under_way or failed)
        known = self._served(name) if is_done else self._known(name)
        if not known or (version and version not in known):
            if is_done:
                return
            raise no_version(name, version, known)
        async with self._turn:
            served = self._served(name)
            if version:
                await self._unload(name, version, force=force)
                return
            busy = {number: info.sessions for number, info in served.items() if info.sessions}
            if busy and not force:
                raise ModelInUse(
                    f"model {name!r} must have no sessions to be unloaded, unless force is given; it has"
                    f" {sum(busy.values())} on versions {sorted(busy)}",
                    model=name,
                )
            for number in sorted(served, key=lambda one: (served[one].is_default, one)):
                await self._unload(name, number, force=True)

    async def _unload(self, name: str, version: int, *, force: bool) -> None:
        info = self._served(name).get(version)
        if info is None:
            return  # somebody else did
        await self._engine.unload_version(name, version, force=force)
        await self._forget(name, version, info.source)
        self._tell(name, version, "")
        _log.info("model unloaded", model=name, version=version)

    @override
    async def set_default(
        self,
        name: str,
        version: int,
        policy: SessionPolicy,
        migration: str = "",
        *,
        keep_previous: bool = False,
    ) -> LoadedVersion:
        if migration and policy is not SessionPolicy.MIGRATE:
            raise InvalidInput(
                f"migration must be left out unless sessions is migrate; got {migration[:160]!r}"
            )
        known = self._known(name)
        if version not in known:
            raise no_version(name, version, known)
        async with self._turn:
            moved = await self._engine.set_default(
                name, version, policy, migration, leaves=_leaves(policy, keep_previous)
            )
        self._moved(name, version, policy, moved)
        return LoadedVersion(version, moved.previous, moved.sessions)

    def _moved(self, name: str, version: int, policy: SessionPolicy, moved: Moved) -> None:
        """Report a default that is another version."""
        self._leaving.discard((name, version))
        self._observer.sessions_moved(name, policy.value, moved.sessions)
        _log.info(
            "the default of a model is another version",
            model=name,
            version=version,
            previous=moved.previous,
            sessions=policy.value,
            moved=moved.sessions,
        )

    @override
    async def set_label(self, name: str, label: str, version: int) -> None:
        require_label(label)
        known = self._known(name)
        if version and version not in known:
            raise no_version(name, version, known)
        if not version and not any(label in info.labels for info in known.values()):
            raise VersionNotFound(
                f"label must be one that model {name!r} has, to be taken away; got {label!r}", model=name
            )
        async with self._turn:
            await self._engine.set_label(name, label, version)
        self._leaving.discard((name, version))
        _log.info("a label of a model is that of another version", model=name, label=label, version=version)

    @override
    def drain(self, name: str, version: int, *, drains: bool = True) -> None:
        if drains:
            self._leaving.add((name, version))
        else:
            self._leaving.discard((name, version))

    @override
    async def begin_upload(self, filename: str, tenant: str) -> Upload:
        if self._uploads is None:
            raise upload_off()
        return await self._uploads.begin(filename, tenant)

    # ------------------------------------------------------------------------------------------------------ how it is

    @override
    def default_elsewhere(self, name: str) -> int:
        return self._engine.defaults_elsewhere().get(name, 0)

    @override
    def statuses(self) -> Mapping[str, Sequence[VersionStatus]]:
        names = {info.name for info in self._engine.models()}
        names |= {name for name, _ in self._loads} | {name for name, _ in self._failed}
        return {name: self.status(name) for name in sorted(names)}

    @override
    def status(self, name: str) -> Sequence[VersionStatus]:
        found = {key[1]: status for key, status in self._failed.items() if key[0] == name}
        for (other, version), load in self._loads.items():
            if other == name:
                found[version] = VersionStatus(
                    version, VersionState.LOADING, load.stage, path=load.path or load.request.upload
                )
        for version, info in self._served(name).items():
            loading = self._loads.get((name, version))
            state, reason = VersionState.READY, ""
            if (name, version) in self._unkept:
                reason = NOT_KEPT
            if (info.is_draining or (name, version) in self._leaving) and not info.labels:
                state = VersionState.DRAINING
            if loading is not None:
                state, reason = VersionState.LOADING, loading.stage
            found[version] = VersionStatus(
                version,
                state,
                reason,
                info.fingerprint,
                info.is_default,
                info.labels,
                info.sessions,
                info.source,
                info.loaded,
            )
        return [found[version] for version in sorted(found)]

    def failed_before(self, name: str, version: int, why: str, path: str = "") -> None:
        """The server could not load it when it started."""
        self._failed[name, version] = VersionStatus(version, VersionState.FAILED, why, path=path)

    def failed_at_start(self, failed: Mapping[str, Mapping[int, str]]) -> None:
        """The server could not load these when it started: versions by name, and why."""
        for name, versions in failed.items():
            for version, why in versions.items():
                self.failed_before(name, version, why)

    def owned_before(self, name: str, version: int, tenant: str) -> None:
        """A tenant's admin loaded it before the server was started again."""
        self._owners[name, version] = tenant

    # -------------------------------------------------------------------------------------------------------- draining

    async def run(self) -> None:
        """Unload versions as their last sessions end, until cancelled."""
        while True:
            await asyncio.sleep(_LOOK_S)
            try:
                if not self._turn.locked():
                    async with self._turn:
                        await self.look()
                if self._uploads is not None:
                    await self._uploads.expire()
            except Exception as error:
                _log.defect("models could not be looked after; the timer goes on", error)

    async def look(self) -> int:
        """Unload those that drain and have no sessions; return how many. The timer does it by itself."""
        self._tell_elsewhere(self._engine.defaults_elsewhere())
        now, count = self._clock.monotonic(), 0
        for info in self._engine.models():
            for each in info.versions:
                key = info.name, each.version
                leaves = each.is_draining or key in self._leaving
                is_leaving = leaves and not each.is_default and not each.labels
                if not is_leaving or each.sessions or now < self._not_before.get(key, 0.0):
                    continue
                try:
                    await self._unload(info.name, each.version, force=False)
                    count += 1
                except ServerError as error:
                    self._not_before[key] = now + _AGAIN_S
                    _log.info(
                        "a version stays for its sessions in the store",
                        model=info.name,
                        version=each.version,
                        reason=error.message,
                    )
        return count

    async def close(self) -> None:
        """Stop the loads, wait for their ends, and delete uploads."""
        for load in self._loads.values():
            load.stop("the server stops")
        await asyncio.gather(*self._tasks, return_exceptions=True)
        if self._uploads is not None:
            await self._uploads.close()

    # --------------------------------------------------------------------------------------------------------- helpers

    def _served(self, name: str) -> dict[int, VersionInfo]:
        for info in self._engine.models():
            if info.name == name:
                return {each.version: each for each in info.versions}
        return {}

    def _default(self, name: str) -> int:
        return next((version for version, info in self._served(name).items() if info.is_default), 0)

    def _known(self, name: str) -> dict[int, VersionInfo]:
        served = self._served(name)
        if not served:
            names = [info.name for info in self._engine.models()]
            raise ModelNotFound(f"name must be one of {names}; got {name[:160]!r}", model=name)
        return served


def _leaves(policy: SessionPolicy, keep_previous: bool) -> bool:
    """Whether the version that was the default is unloaded with its last session."""
    return policy is SessionPolicy.KEEP and not keep_previous


def _look_at(task: asyncio.Task[LoadedVersion]) -> None:
    if not task.cancelled():
        task.exception()
