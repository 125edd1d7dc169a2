"""Loads and unloads versions of models while the server is running: one at a time, each completely or not at all.

A model is compiled in a separate process, which a thread waits for. The engine then builds the version while it serves
calls, and makes it the default in one commit. Until that commit a load can be stopped. A failed load leaves only its
reason.
"""

from __future__ import annotations

import asyncio
import dataclasses
import os
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

from stepwell_server.catalog.control import (
    WARM_UP,
    LoadedVersion,
    LoadRequest,
    Progress,
    VersionState,
    VersionStatus,
    no_version,
    require_label,
)
from stepwell_server.catalog.files.model_files import ModelFiles
from stepwell_server.catalog.files.program_store import NOT_KEPT
from stepwell_server.catalog.files.uploads import Upload
from stepwell_server.catalog.interfaces import Compile, CompileResult, Engine, Observer, Quotas
from stepwell_server.catalog.load import Load
from stepwell_server.clock import Clock
from stepwell_server.compile.errors import ModelError
from stepwell_server.engine.api import DefaultChange, DefaultMove, SessionPolicy, VersionInfo
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
from stepwell_server.process.readiness import LOADED, Readiness
from stepwell_server.program import FINGERPRINT_DIGITS, Program

_log = Log("models")
_DRAIN_CHECK_INTERVAL_S = 1.0
"""The time between checks of whether draining versions still have sessions, in seconds."""
_RETRY_INTERVAL_S = 60.0
"""The delay before unloading is tried again for a version that only has sessions in the store, in seconds."""
MAX_FAILED = 64
"""The maximum number of failed versions that are remembered, over all names."""
_Key = tuple[str, int]


@dataclasses.dataclass(slots=True)
class _Version:
    """What the catalog knows about a version, beyond what the engine knows."""

    load: Load | None = None
    """Its load, running or waiting."""
    failed: str = ""
    """Why the last load failed; empty if it did not."""
    path: str = ""
    """The file, if the load failed."""
    owner: str | None = None
    """The tenant whose admin loaded it with a call."""
    is_unkept: bool = False
    """Its file was uploaded or is temporary and no program is stored: it is gone when this server stops."""
    drains: bool = False
    """`drain` was called: it is unloaded once it has no sessions and no labels."""
    not_before: float = 0.0
    """When to try again to unload it."""

    def state(self, info: VersionInfo | None) -> tuple[VersionState, str]:
        """Return its state and the reason; `info` comes from the engine and is None if the version is not loaded."""
        if self.load is not None:
            return VersionState.LOADING, self.load.stage
        if info is None:
            return VersionState.FAILED, self.failed
        reason = NOT_KEPT if self.is_unkept else ""
        is_draining = (info.is_draining or self.drains) and not info.labels
        return VersionState.DRAINING if is_draining else VersionState.READY, reason


class Catalog:
    """The models of a server and their versions: loads them, unloads them, and reports their states.

    Lives on the event loop; `run` must run beside it.
    """

    def __init__(
        self,
        engine: Engine,
        compile_model: Compile,
        files: ModelFiles,
        *,
        clock: Clock,
        observer: Observer,
        readiness: Readiness,
        quotas: Quotas | None = None,
    ) -> None:
        """Initialize the catalog.

        Args:
            engine: serves the versions.
            compile_model: compiles files into programs.
            files: finds and stores the files of models.
            clock: for retries.
            observer: counts loads.
            readiness: is given the progress of each version, and the defaults that only other servers have
                loaded.
            quotas: limit how many versions a tenant may load.
        """
        self._engine = engine
        self.compile = compile_model
        """Compiles files into programs."""
        self.files = files
        """The files of models."""
        self._clock = clock
        self._observer = observer
        self._quotas = quotas
        self._readiness = readiness
        self._versions: dict[_Key, _Version] = {}
        """Holds a loaded version only if there is something to know about it."""
        self._turn = asyncio.Lock()
        """Held by the load that compiles, and by every change of a name."""
        self._tasks: set[asyncio.Task[LoadedVersion]] = set()

    # ----------------------------------------------------------------------------------------------------------- loads

    async def load(self, request: LoadRequest, progress: Progress | None = None) -> LoadedVersion:
        """Load a version while the server serves calls, and make it the default if requested.

        If the calling task is cancelled, the load stops, unless the switch has begun: then it is completed.

        Raises:
            InvalidInput: a value breaks a rule.
            VersionExists: the version exists or is being loaded.
            QuotaExceeded: the tenant has too many versions loaded.
            ModelLoadFailed: the file cannot be served.
            SpecsDiffer, MigrationFailed: the sessions cannot be moved to it.
            Unavailable: the store did not save the change.
        """
        request.require_valid()
        path = Path(request.path)
        if request.path and request.is_charged:
            path = await self.files.named(request.path, is_found=request.is_found)
        version = self._number(request)
        if request.upload:
            path = self.files.sent(request.upload, request.tenant)

        def at(stage: str) -> None:
            self._readiness.version(request.name, version, f"loading: {stage}")
            if progress is not None and not load.abandoned.is_set():
                progress(stage)

        load = Load(request, version, path, at)
        own = self._own(request.name, version)
        own.load = load
        if request.version:
            own.failed = ""
        task = asyncio.create_task(self._run(load))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        try:
            return await asyncio.shield(task)
        except asyncio.CancelledError:
            load.stop()
            task.add_done_callback(_look_at)  # so that its error counts as retrieved
            raise

    def _number(self, request: LoadRequest) -> int:
        """Return the version number of a request, choosing an unused one if it names none.

        Raises:
            VersionExists: the version exists or is being loaded.
            QuotaExceeded: the tenant has too many versions.
        """
        name, version = request.name, request.version
        if not version:
            under_way = [load.version for load in self._loads(name)]
            version = max(self._engine.next_version(name), *(number + 1 for number in under_way), 1)
        for load in self._loads(name, version):
            raise VersionExists(
                f"version {version} of model {name!r} must not be loaded twice: it is being loaded ({load.stage})",
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
            has = sum(each.owner == request.tenant for each in self._versions.values())
            loads = [load.request for load in self._loads() if load.request.is_charged]
            has += sum(other.tenant == request.tenant for other in loads)
            default = self._versions.get((name, self._default(name)))
            if request.unload_previous and default is not None and default.owner == request.tenant:
                has -= 1
            self._quotas.require_model(request.tenant, has)
        return version

    async def _run(self, load: Load) -> LoadedVersion:
        request, started = load.request, time.perf_counter()
        name, version = request.name, load.version
        try:
            await load.turn(self._turn)
            try:
                return await self._load(load, started)
            finally:
                self._turn.release()
        except ServerError as error:
            if load.abandoned.is_set():
                self._readiness.version(name, version, "")
            else:
                self._fail(load, error.message)
            raise
        except Exception as error:
            opaque = _log.internal("a load raised", error, model=name, version=version)
            self._fail(load, opaque.message)
            raise opaque from error
        finally:
            self._own(name, version).load = None
            self._tidy(name, version)
            if request.upload:
                await self.files.delete_upload(request.upload)

    def _fail(self, load: Load, why: str) -> None:
        name, version = load.request.name, load.version
        served = self._served(name)
        # names that callers send must not create metric series
        self._observer.model_failed("" if load.request.is_charged and not served else name)
        if not load.request.is_fatal:
            _log.error("a model cannot be loaded", model=name, version=version, reason=why)
        if version in served:
            return
        if load.request.version:
            self._remember_failure(load, why)
        else:
            # The caller named no version: the next load gets the number. One that did may have failed with it before.
            before = self._own(name, version).failed
            self._readiness.version(name, version, before and f"failed: {before}")

    def _remember_failure(self, load: Load, why: str) -> None:
        """Remember the failure of a version until it is loaded or unloaded."""
        name, version = load.request.name, load.version
        own = self._versions.pop((name, version), _Version())
        own.failed, own.path = why, str(load.path)
        self._versions[name, version] = own  # the last one that failed
        self._readiness.version(name, version, f"failed: {why}")
        keys = [key for key, each in self._versions.items() if each.failed]
        for key in keys[: max(0, len(keys) - MAX_FAILED)]:
            self._forgive(*key)

    def _forgive(self, name: str, version: int) -> None:
        """Forget that a version failed."""
        self._own(name, version).failed = ""
        self._tidy(name, version)
        self._readiness.version(name, version, "")

    async def _load(self, load: Load, started: float) -> LoadedVersion:
        name, version = load.request.name, load.version
        compiled = await self._compiled(load)
        load.require_wanted()
        try:
            if load.request.is_before_start:
                # Nothing is checked or written: at its start the engine reads the stored documents of
                # all loaded models.
                self._engine.begin_with(name, version, compiled.program)
                moved = DefaultMove(0, 0)
            else:
                moved = await self._serve(load, compiled.program)
        except MemoryError as error:
            raise _failure(load, str(error)) from error
        if moved.previous:
            self._moved(name, version, load.request.policy, moved)
        self._own(name, version).failed = ""
        seconds = time.perf_counter() - started
        self._observer.model_loaded(name, compiled.origin, seconds)
        self._readiness.version(name, version, LOADED)
        program = compiled.program
        _log.info(
            "model loaded",
            model=name,
            version=version,
            executor=program.executor,
            proof=str(program.proof),
            path=str(load.path),
            seconds=seconds,
        )
        if program.proof.unproven:
            unproven = program.proof.unproven
            _log.warning(
                f"the model is served without a proof, as --trust-{'rows' if program.proof.rows else 'causality'} asks",
                model=name,
                version=version,
                unproven=unproven,
            )
        await self.look()
        return LoadedVersion(version, moved.previous, moved.sessions)

    async def _compiled(self, load: Load) -> CompileResult:
        request = load.request
        try:
            compiled = await self.compile(request, load.path, load.report, load.abandoned)
            found, wanted = (
                each[:FINGERPRINT_DIGITS] for each in (compiled.program.fingerprint, request.fingerprint)
            )
            if wanted and compiled.program.fingerprint != request.fingerprint:
                raise ModelError(
                    f"{load.path} must hold the same model as when it was first loaded; its fingerprint is {found}, "
                    f"and was {wanted}"
                )
            return compiled
        except (ModelError, OSError) as error:
            load.require_wanted()
            why = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
            details = getattr(error, "details", "")
            if details:
                _log.warning("model refused", model=request.name, version=load.version, details=details)
            raise _failure(load, why) from error

    async def _serve(self, load: Load, program: Program) -> DefaultMove:
        """Load a version into the engine beside the traffic."""
        request, name, version = load.request, load.request.name, load.version
        is_first = not self._served(name)
        if not is_first:
            await self._engine.require_possible(name, version, program, request.policy, request.migration)
        load.report(WARM_UP)
        source, own = request.path, self._own(name, version)
        if not request.fingerprint:
            source = await asyncio.to_thread(os.path.realpath, load.path)
        if request.upload or request.is_temporary:
            source = await self.files.keep(name, version, program)
            own.is_unkept = not source
        becomes = None
        if not (is_first or request.keep_default):
            leaves = _leaves(request.policy, request.keep_previous) or request.unload_previous
            becomes = DefaultChange(version, request.policy, request.migration, leaves)
        try:
            moved = await self._engine.load_version(
                name,
                version,
                program,
                source=source,
                tenant=request.tenant,
                labels=request.labels,
                becomes=becomes,
                begin=load.begin,
            )
        except BaseException:
            await self._forget(name, version, "" if request.fingerprint else source)
            raise
        if request.is_charged or request.tenant:
            own.owner = request.tenant
        return moved

    async def _forget(self, name: str, version: int, source: str) -> None:
        """Nothing stands for a version any more, but its load if one is under way, and why that failed."""
        own = self._own(name, version)
        self._versions[name, version] = _Version(own.load, own.failed, own.path)
        self._tidy(name, version)
        await self.files.drop(source)

    # ---------------------------------------------------------------------------------------------- what else is asked

    async def unload(self, name: str, version: int, *, force: bool) -> None:
        """Unload a version (0: all versions of the name), stop loading it, or forget that it failed.

        Raises:
            ModelNotFound, VersionNotFound: it does not exist.
            ModelInUse: it is the default, or has sessions, and `force` is not given.
        """
        if not version and not force:
            await self._require_unused(name)
        under_way = self._loads(name, version)
        for load in under_way:
            load.stop("it was unloaded meanwhile")
        failed = [key for key, each in self._of(name, version).items() if each.failed]
        for key in failed:
            self._forgive(*key)
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
            if not force:
                await self._require_unused(name)
            for number in sorted(served, key=lambda one: (served[one].is_default, one)):
                await self._unload(name, number, force=True)

    async def _require_unused(self, name: str) -> None:
        if not (served := self._served(name)):
            return
        found = await self._engine.sessions_by_version(name)  # most of them may be in the store alone
        busy = {version: count for version, count in found.items() if version in served}
        if busy:
            raise ModelInUse(
                f"model {name!r} must have no sessions to be unloaded, unless force is given; it has"
                f" {sum(busy.values())} on versions {sorted(busy)}",
                model=name,
            )

    async def _unload(self, name: str, version: int, *, force: bool) -> None:
        info = self._served(name).get(version)
        if info is None:
            return  # it was unloaded meanwhile
        await self._engine.unload_version(name, version, force=force)
        await self._forget(name, version, info.source)
        self._readiness.version(name, version, "")
        _log.info("model unloaded", model=name, version=version)

    async def set_default(
        self,
        name: str,
        version: int,
        policy: SessionPolicy,
        migration: str = "",
        *,
        keep_previous: bool = False,
    ) -> LoadedVersion:
        """Make a loaded version the default. The previous default is unloaded once no sessions are left on it.

        Args:
            name: the model's name.
            version: the new default.
            policy: what happens to the sessions that follow the default.
            migration: see `LoadRequest`.
            keep_previous: keep the previous default loaded.

        Raises:
            ModelNotFound, VersionNotFound: the version does not exist.
            SpecsDiffer, MigrationFailed: the sessions cannot be moved to it.
        """
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

    def _moved(self, name: str, version: int, policy: SessionPolicy, moved: DefaultMove) -> None:
        """Log and count a change of the default."""
        self.drain(name, version, drains=False)
        self._observer.sessions_moved(name, policy.value, moved.sessions)
        _log.info(
            "the default version of a model has changed",
            model=name,
            version=version,
            previous=moved.previous,
            sessions=policy.value,
            moved=moved.sessions,
        )

    async def set_label(self, name: str, label: str, version: int) -> None:
        """Set a label on a loaded version; 0 removes the label.

        Raises:
            InvalidInput: it is not a valid label.
            ModelNotFound, VersionNotFound: the version does not exist, or the label to remove does not.
        """
        require_label(label)
        known = self._known(name)
        if version and version not in known:
            raise no_version(name, version, known)
        if not version and not any(label in info.labels for info in known.values()):
            raise VersionNotFound(
                f"label to remove must be one that model {name!r} has; got {label!r}", model=name
            )
        async with self._turn:
            await self._engine.set_label(name, label, version)
        self.drain(name, version, drains=False)
        _log.info("a label of a model has moved to another version", model=name, label=label, version=version)

    def drain(self, name: str, version: int, *, drains: bool = True) -> None:
        """Unload a version once it has no sessions and no label and is not the default, or cancel that."""
        self._own(name, version).drains = drains
        self._tidy(name, version)

    async def begin_upload(self, filename: str, tenant: str) -> Upload:
        """Begin to receive a file.

        Raises:
            UploadOff: the server accepts no uploads.
            InvalidInput: the file name is not that of a model.
            Overloaded: there are too many uploads.
        """
        return await self.files.begin_upload(filename, tenant)

    # -------------------------------------------------------------------------------------------------------- states

    def default_elsewhere(self, name: str) -> int:
        """Return the default of a name if only other servers on the store have it loaded; else 0."""
        return self._engine.defaults_elsewhere().get(name, 0)

    def statuses(self) -> Mapping[str, Sequence[VersionStatus]]:
        """Return the versions of each name in order, including those that are loading or have failed."""
        names = {info.name for info in self._engine.models()}
        names |= {name for (name, _), each in self._versions.items() if each.load or each.failed}
        return {name: self.status(name) for name in sorted(names)}

    def status(self, name: str) -> Sequence[VersionStatus]:
        """Return the versions of one name; empty if there are none."""
        served, own = self._served(name), {key[1]: each for key, each in self._of(name).items()}
        there = served.keys() | {version for version, each in own.items() if each.load or each.failed}
        return [self._status(v, served.get(v), own.get(v) or _Version()) for v in sorted(there)]

    def _status(self, version: int, info: VersionInfo | None, own: _Version) -> VersionStatus:
        state, reason = own.state(info)
        if info is None:
            path = own.path if own.load is None else str(own.load.path)
            return VersionStatus(version, state, reason, path=path)
        return VersionStatus(
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

    def owned_before(self, name: str, version: int, tenant: str) -> None:
        """Record which tenant's admin had loaded a version before the restart."""
        self._own(name, version).owner = tenant

    # -------------------------------------------------------------------------------------------------------- draining

    async def run(self) -> None:
        """Unload versions as their last sessions end, until cancelled."""
        while True:
            await asyncio.sleep(_DRAIN_CHECK_INTERVAL_S)
            try:
                if not self._turn.locked():
                    async with self._turn:
                        await self.look()
                await self.files.expire()
            except Exception as error:
                _log.defect("draining versions could not be checked; the timer continues", error)

    async def look(self) -> int:
        """Unload draining versions without sessions; return how many. `run` calls this at intervals."""
        self._readiness.defaults_elsewhere(self._engine.defaults_elsewhere())
        now, count = self._clock.monotonic(), 0
        for info in self._engine.models():
            for each in info.versions:
                own = self._versions.get((info.name, each.version)) or _Version()
                drains = own.state(each)[0] is VersionState.DRAINING and not each.is_default
                if not drains or each.sessions or now < own.not_before:
                    continue
                try:
                    await self._unload(info.name, each.version, force=False)
                    count += 1
                except ServerError as error:
                    self._own(info.name, each.version).not_before = now + _RETRY_INTERVAL_S
                    _log.info(
                        "a version cannot be unloaded yet, because the store has sessions of it",
                        model=info.name,
                        version=each.version,
                        reason=error.message,
                    )
        return count

    async def close(self) -> None:
        """Stop all loads, wait for them to end, and delete uploads."""
        for load in self._loads():
            load.stop("the server stops")
        await asyncio.gather(*self._tasks, return_exceptions=True)
        await self.files.close()

    # --------------------------------------------------------------------------------------------------------- helpers

    def _own(self, name: str, version: int) -> _Version:
        """Return the record of a version, creating it if needed."""
        return self._versions.setdefault((name, version), _Version())

    def _tidy(self, name: str, version: int) -> None:
        """Remove the record of a version if it holds nothing."""
        if self._own(name, version) == _Version():
            del self._versions[name, version]

    def _of(self, name: str, version: int = 0) -> dict[_Key, _Version]:
        """Return the record of a version; 0: those of all versions of the name."""
        return {
            key: each for key, each in self._versions.items() if key[0] == name and version in (0, key[1])
        }

    def _loads(self, name: str = "", version: int = 0) -> list[Load]:
        """Return the running loads of a version, of a name, or all."""
        known = self._of(name, version) if name else self._versions
        return [each.load for each in known.values() if each.load is not None]

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
    """Whether the previous default is unloaded when its last session ends."""
    return policy is SessionPolicy.KEEP and not keep_previous


def _failure(load: Load, why: str) -> ModelLoadFailed:
    request = load.request
    which = f"version {load.version}" if request.version else "a new version"
    again = " again" if request.fingerprint else ""
    return ModelLoadFailed(
        f"{which} of model {request.name!r} cannot be loaded{again}: {why}",
        model=request.name,
        version=str(load.version),
    )


def _look_at(task: asyncio.Task[LoadedVersion]) -> None:
    if not task.cancelled():
        task.exception()
