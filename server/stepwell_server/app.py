"""The one module that wires everything: settings -> programs -> engine -> servers, and back down again."""

from __future__ import annotations

import asyncio
import gc
import math
import platform
import sys
import time
from collections.abc import Callable, Mapping
from importlib import metadata
from typing import TYPE_CHECKING

from stepwell_server import signals
from stepwell_server.addresses import Address, UnixAddress, bind_problem
from stepwell_server.auth.callers import Callers
from stepwell_server.auth.opening import open_callers
from stepwell_server.auth.watched import AuthFileError
from stepwell_server.clock import Clock, SystemClock
from stepwell_server.core.namespaces import own, tenant_of
from stepwell_server.engine.engine import Engine
from stepwell_server.engine.quotas import Quotas
from stepwell_server.errors import StoreGone
from stepwell_server.logs import Log, configure
from stepwell_server.metrics.observer import PrometheusObserver
from stepwell_server.metrics.server import MetricsServer
from stepwell_server.metrics.token import MetricsToken, TokenError
from stepwell_server.open_files import RESERVE, raise_limit
from stepwell_server.program import Program, ProofOptions
from stepwell_server.quota_file import QuotaFile, QuotaFileError
from stepwell_server.reach import ReachError, require_closed
from stepwell_server.rpc.fronts import unix_socket
from stepwell_server.rpc.fronts.base import BindError, Front
from stepwell_server.rpc.fronts.certificates import CertificateError, CertificateFiles
from stepwell_server.rpc.fronts.limits import FrontLimits
from stepwell_server.rpc.server import RpcServer
from stepwell_server.settings import DEFAULT_METRICS, Settings
from stepwell_server.store.base import KeyFileError, Store, StoreBusy, StoreError
from stepwell_server.store.opening import open_store
from stepwell_server.store.times import StoreTimes
from stepwell_server.tracing.starting import TracingError
from stepwell_server.tracing.starting import start as start_tracing

if TYPE_CHECKING:
    from stepwell_server.compile.limits import Limits
    from stepwell_server.rpc.fronts.native import NativeFront
    from stepwell_server.tracing.spans import Tracing

_log = Log("app")
_SWITCH_INTERVAL_S = 0.5e-3
STORE_CHECK_S = 2.0
"""Time between two looks after the store."""
_GONE_DRAIN_S = 5.0
"""Without a store nothing can be finished; this is for telling callers so."""


class StartError(Exception):
    """The server cannot start. The message is one line for people."""


class _Observer(PrometheusObserver):
    """Counts, and writes a line for each event of a session."""

    def session_event(self, event: str, model: str, session_id: str) -> None:
        super().session_event(event, model, session_id)
        tenant = tenant_of(session_id)
        whose = {"tenant": tenant} if tenant else {}
        _log.info(f"session {event}", model=model, **whose, session=own(session_id))

    def sessions_opened(self, model: str, count: int, event: str = "opened") -> None:
        super().sessions_opened(model, count, event)
        _log.info(f"sessions {event}", model=model, count=count)

    def session_events(self, event: str, model: str, count: int) -> None:
        super().session_events(event, model, count)
        _log.info(f"sessions {event}", model=model, count=count)


def serve(settings: Settings) -> int:
    """Serve until a signal says stop. Returns the exit code.

    Raises:
        StartError: it cannot start.
        KeyboardInterrupt: a signal came before it was ready.
    """
    configure(settings.log_level, settings.log_format)
    _require_free("--listen", settings.listen)
    if isinstance(settings.metrics_listen, Address):
        _require_free("--metrics-listen", settings.metrics_listen)
    metrics_token = _require_closed(settings)
    certificates = _certificates(settings)
    quota_file = _quota_file(settings)
    clock = SystemClock()
    callers = _callers(settings, clock)
    with signals.interrupting():
        observer = _Observer(_build(settings))
        store = _open_store(settings, clock, observer)
        programs = _compile(settings, observer)
    with asyncio.Runner(loop_factory=_new_event_loop) as runner:
        return runner.run(
            _run(
                settings,
                programs,
                store,
                clock,
                observer,
                certificates,
                callers,
                metrics_token,
                quota_file,
            )
        )


def _build(settings: Settings) -> dict[str, str]:
    """What this server is, for metrics; which front it has is added later."""
    kept = {"store": settings.store, "durability": settings.durability if settings.store == "disk" else ""}
    return {"version": metadata.version("stepwell"), "python": platform.python_version(), **kept}


def _certificates(settings: Settings) -> CertificateFiles | None:
    if settings.tls_cert is None or settings.tls_key is None:
        return None
    try:
        return CertificateFiles(settings.tls_cert, settings.tls_key, settings.tls_client_ca)
    except CertificateError as error:
        raise StartError(str(error)) from error


def _callers(settings: Settings, clock: Clock) -> Callers | None:
    try:
        return open_callers(
            clock,
            token_file=settings.auth_tokens,
            certificate_file=settings.auth_certificates,
            jwks_file=settings.auth_jwks,
            audience=settings.auth_jwt_audience,
            issuer=settings.auth_jwt_issuer,
            tenant_claim=settings.auth_jwt_tenant_claim,
            role_claim=settings.auth_jwt_role_claim,
        )
    except AuthFileError as error:
        raise StartError(str(error)) from error


def _require_free(option: str, address: Address | UnixAddress) -> None:
    """Find out before models are compiled that an address cannot be had."""
    if isinstance(address, UnixAddress):
        try:
            unix_socket.clear(address.path)
        except OSError as error:
            raise StartError(f"{option}: cannot listen on {address}: {error.strerror}") from error
        return
    if problem := bind_problem(address):
        raise StartError(f"{option}: cannot listen on {address}: {problem}")


def _require_closed(settings: Settings) -> MetricsToken | None:
    """Refuse to be open to others without a word; return what guards the metrics."""
    try:
        require_closed(settings, is_bounded=_native_front(settings) is not None)
        return None if settings.metrics_token_file is None else MetricsToken.of(settings.metrics_token_file)
    except (ReachError, TokenError) as error:
        raise StartError(str(error)) from error


def _compile(settings: Settings, observer: PrometheusObserver) -> dict[str, Program]:
    """The program of each model: compiled before, in the cache, or compiled now by a process of its own."""
    from stepwell_server.compile import data_file
    from stepwell_server.compile.errors import DataError, ModelError
    from stepwell_server.compile.limits import Limits
    from stepwell_server.loading import load_program
    from stepwell_server.program_file import is_program

    limits = Limits(settings.max_model_bytes, settings.max_compile_memory_bytes, settings.compile_timeout_s)
    programs: dict[str, Program] = {}
    for name, file in settings.check_with.items():  # All of them, before the first model takes its time.
        try:
            data_file.load(file)
        except DataError as error:
            raise StartError(f"model {name}: --check-with: {error}") from error
    for name, path in settings.models.items():
        started, stages = time.perf_counter(), list[str]()
        try:
            options = ProofOptions(settings.probe_steps.get(name), name in settings.trust_causality)
            report = _progress(name, stages)
            program = load_program(
                path,
                settings.cache_dir,
                settings.imports,
                report,
                options,
                limits,
                data=settings.check_with.get(name),
            )
            if name in settings.check_with:
                _check(settings, name, program, limits)
            programs[name] = program
        except DataError as error:
            raise StartError(f"model {name}: --check-with: {error}") from error
        except ModelError as error:
            if error.details:
                _log.warning("model refused", model=name, details=error.details)
            raise StartError(f"model {name}: {error}") from error
        except OSError as error:
            raise StartError(f"--cache-dir: {error}") from error
        seconds = time.perf_counter() - started
        source = "file" if is_program(path) else "compiled" if stages else "cache"
        observer.model_loaded(name, source, seconds)
        _log.info(
            "model loaded", model=name, executor=program.executor, proof=str(program.proof), seconds=seconds
        )
        if program.proof.unproven:
            _log.warning("model is trusted, not proven", model=name, unproven=program.proof.unproven)
    return programs


def _check(settings: Settings, name: str, program: Program, limits: Limits) -> None:
    """Hold a program against Keras on the user's own sequences."""
    from stepwell_server.compile.launch import compare_with_keras

    file = settings.check_with[name]
    report = compare_with_keras(settings.models[name], program, file, settings.imports, limits)
    for output in report.outputs:
        _log.info("compared with Keras", model=name, data=str(file), **output.fields())
    worst = report.worst
    if worst is not None and not worst.is_allowed:
        raise StartError(f"model {name}: --check-with {file}: {worst}")
    if not report.is_conclusive:
        raise StartError(
            f"model {name}: --check-with {file}: nothing can be said of an output: rounding alone moves Keras's own values "
            "too far"
        )


def _progress(model: str, stages: list[str]) -> Callable[[str], None]:
    def report(stage: str) -> None:
        stages.append(stage)
        _log.info("loading model", model=model, stage=stage)

    return report


def _new_event_loop() -> asyncio.AbstractEventLoop:
    import uvloop

    loop: asyncio.AbstractEventLoop = uvloop.new_event_loop()
    return loop


def _open_store(settings: Settings, clock: Clock, observer: PrometheusObserver) -> Store:
    times = StoreTimes()
    try:
        store = open_store(
            settings.store,
            data_dir=settings.data_dir,
            durability=settings.durability,
            clock=clock,
            times=times,
            key_file=settings.encryption_key_file,
        )
    except StoreBusy as error:
        raise StartError(
            f"--data-dir: {error}; give this server another folder, or --store memory"
        ) from error
    except KeyFileError as error:
        raise StartError(f"--encryption-key-file: {error}") from error
    except StoreError as error:
        raise StartError(f"--data-dir: {error}") from error
    if settings.store == "disk":
        observer.keeps_in(times)
    return store


async def _run(
    settings: Settings,
    programs: Mapping[str, Program],
    store: Store,
    clock: Clock,
    observer: PrometheusObserver,
    certificates: CertificateFiles | None,
    callers: Callers | None,
    metrics_token: MetricsToken | None,
    quota_file: QuotaFile | None,
) -> int:
    tracing = _start_tracing(settings, clock, observer)
    stop = signals.stop_on_signals(clock, lambda: _reload(certificates, callers))
    open_files = raise_limit()
    if settings.store == "disk":
        _log.info("store opened", data_dir=str(settings.data_dir), sessions=await store.count())
    quotas = await _quotas(quota_file, settings, store, clock, observer)
    try:
        engine = Engine(
            programs,
            store=store,
            clock=clock,
            observer=observer,
            max_batch_rows=settings.max_batch_rows,
            resident_rows=settings.resident_rows,
            max_session_idle_s=settings.max_session_idle_s,
            compute_threads=settings.compute_threads,
            quotas=quotas,
        )
    except MemoryError as error:
        await store.close()
        raise StartError(f"--resident-rows: {error}") from error
    await engine.start()
    try:
        rpc = RpcServer(
            engine,
            _front(settings, clock, open_files),
            clock=clock,
            observer=observer,
            max_message_bytes=settings.max_message_bytes,
            authenticator=callers,
            tracer=tracing,
        )
        if certificates is not None:
            observer.secured_by(certificates)
        observer.serves_by(rpc.front.name, rpc.front.limits.values, rpc.front.counts)
        metrics = _serve_metrics(settings, observer, engine, metrics_token)
        await _serve_calls(settings, rpc, store, certificates, open_files)
        gone = await _until_stopped(stop, store, rpc, observer)
        await _drain(min(_GONE_DRAIN_S if gone else math.inf, settings.drain_timeout_s), engine, rpc)
        if metrics is not None:
            await asyncio.to_thread(metrics.close)
    finally:
        if tracing is not None:
            await asyncio.to_thread(tracing.close, settings.drain_timeout_s)
        if await engine.close(settings.drain_timeout_s):
            await store.close()
        else:
            _log.warning("the store did not come back from a commit; what was not acknowledged may be lost")
    _log.info("stopped")
    return 1 if gone else 0


def _start_tracing(settings: Settings, clock: Clock, observer: PrometheusObserver) -> Tracing | None:
    try:
        return start_tracing(settings.trace_endpoint, settings.trace_sample, clock, observer)
    except TracingError as error:
        raise StartError(str(error)) from error


def _quota_file(settings: Settings) -> QuotaFile | None:
    try:
        return None if settings.quotas is None else QuotaFile(settings.quotas)
    except QuotaFileError as error:
        raise StartError(f"--quotas: {error}") from error


async def _quotas(
    file: QuotaFile | None, settings: Settings, store: Store, clock: Clock, observer: PrometheusObserver
) -> Quotas | None:
    """The quotas, with the sessions counted that are there."""
    if file is None:
        return None
    quotas = Quotas(file.table, clock, settings.metrics_tenants)
    await quotas.count(store)
    observer.knows_tenants(quotas.counts)
    file.watch(quotas.use)
    return quotas


def _front(settings: Settings, clock: Clock, open_files: int) -> Front:
    limits = _limits(settings, open_files)
    native = _native_front(settings)
    if native is not None:
        return native(clock, limits)
    # Here: it brings grpc, 8 MiB that the native front does not need.
    from stepwell_server.rpc.fronts.python import PythonFront

    return PythonFront(clock, limits)


def _native_front(settings: Settings) -> type[NativeFront] | None:
    """The native front, if it is to be used."""
    if settings.front == "python":
        return None
    try:
        from stepwell_server.rpc.fronts.native import VERSION, NativeFront
    except ImportError as error:
        if settings.front == "native":
            raise StartError(f"--front native: stepwell-front cannot be imported: {error}") from error
        return None
    own = metadata.version("stepwell")
    if own != VERSION:
        problem = f"stepwell-front must be of stepwell's version, {own}; {VERSION} is installed"
        if settings.front == "native":
            raise StartError(f"--front native: {problem}")
        _log.warning(f"the front in Python serves: {problem}")
        return None
    return NativeFront


def _limits(settings: Settings, open_files: int) -> FrontLimits:
    room = max(1, open_files - RESERVE)
    connections = settings.max_connections or min(FrontLimits.connections, room)
    if connections > room:
        _log.warning(
            "more connections are allowed than files may be open (ulimit -n)",
            max_connections=connections,
            open_files=open_files,
        )
    return FrontLimits(
        settings.max_message_bytes,
        settings.max_calls_per_connection,
        connections=connections,
        budget_bytes=settings.max_held_bytes or 0,
        age_s=settings.max_connection_age_s,
        age_grace_s=settings.max_connection_age_grace_s,
    )


async def _until_stopped(
    stop: asyncio.Event, store: Store, rpc: RpcServer, observer: PrometheusObserver
) -> bool:
    """Return when the server is to end; True if that is because the store is gone."""
    stopped = asyncio.create_task(stop.wait())
    watch = asyncio.create_task(_look_after(store, rpc, observer))
    await asyncio.wait((stopped, watch), return_when=asyncio.FIRST_COMPLETED)
    for task in (stopped, watch):
        task.cancel()
    await asyncio.gather(stopped, watch, return_exceptions=True)
    return not watch.cancelled()


async def _look_after(store: Store, rpc: RpcServer, observer: PrometheusObserver) -> None:
    """Check the store from time to time and tell health checkers, log and metrics; return when it is gone."""
    was_ready = True
    while True:
        await asyncio.sleep(STORE_CHECK_S)
        try:
            health = await store.check()
        except StoreGone as error:
            _log.error("the store is gone, the server ends", reason=error.message)
            return
        except Exception as error:
            _log.defect("the store could not be checked", error)
            continue
        is_ready = not health.problem
        observer.store_checked(is_ready=is_ready, reopened=health.reopened, is_damaged=bool(store.damage))
        if is_ready is not was_ready:
            if is_ready:
                _log.info("the store can be used again")
            else:
                _log.warning("the store cannot be used", reason=health.problem)
            rpc.announce_ready(is_ready=is_ready)
        was_ready = is_ready


def _reload(*files: CertificateFiles | Callers | None) -> None:
    """What SIGHUP asks for."""
    known = [one for one in files if one is not None]
    for one in known:
        one.asked.set()
    if not known:
        _log.info("there is nothing to read anew: the server has no certificates, and asks nobody who calls")


def _serve_metrics(
    settings: Settings, observer: PrometheusObserver, engine: Engine, token: MetricsToken | None = None
) -> MetricsServer | None:
    if settings.metrics_listen == "off":
        return None
    address = settings.metrics_listen or DEFAULT_METRICS
    data_dir = settings.data_dir if settings.store == "disk" else None
    try:
        metrics = MetricsServer(observer, engine.stats, address, data_dir, token)
    except OSError as error:
        if settings.metrics_listen is None:
            # nobody asked for this address: another server of this machine has it, say
            _log.warning(
                "metrics are not served: --metrics-listen gives them another address, or off",
                address=str(address),
                reason=error.strerror,
            )
            return None
        raise StartError(f"--metrics-listen: cannot listen on {address}: {error.strerror}") from error
    _log.info("metrics", address=str(address._replace(port=metrics.port)))
    return metrics


async def _serve_calls(
    settings: Settings, rpc: RpcServer, store: Store, certificates: CertificateFiles | None, open_files: int
) -> None:
    try:
        address = await rpc.start(settings.listen, certificates)
    except BindError as error:
        raise StartError(f"--listen: {error}") from error
    except CertificateError as error:
        raise StartError(str(error)) from error
    tls = "off" if certificates is None else "mutual" if certificates.are_mutual else "on"
    _log.info(
        "serving",
        front=rpc.front.name,
        address=str(address),
        tls=tls,
        callers="known" if settings.asks_callers else "anybody",
        max_connections=rpc.front.limits.connections,
        open_files=open_files,
    )
    # The event loop and the threads of the store and of long passes take turns with Python's lock. At the default of
    # 5 ms a commit that the disk has kept for long would wait to be told.
    sys.setswitchinterval(_SWITCH_INTERVAL_S)
    # What is there now stays: the garbage collector need not look at it again and again.
    gc.collect()
    gc.freeze()
    await store.announce(str(address))
    sys.stdout.write(f"stepwell: {rpc.front.name} front, listening on {address}\n")
    sys.stdout.flush()


async def _drain(timeout_s: float, engine: Engine, rpc: RpcServer) -> None:
    """Refuse new work, finish what is queued, answer it, and close."""
    await rpc.announce_stop()
    engine.stop_accepting()
    try:
        async with asyncio.timeout(timeout_s):
            await engine.drain()
            await rpc.finish()
    except TimeoutError:
        _log.warning("some work was not finished in time", drain_timeout_s=timeout_s)
    await rpc.close()
