"""The one module that wires everything: settings -> programs -> engine -> servers, and back down again."""

from __future__ import annotations

import asyncio
import dataclasses
import gc
import math
import platform
import socket
import sys
from collections.abc import Collection, Iterator, Mapping, Sequence
from importlib import metadata
from typing import TYPE_CHECKING

from stepwell_server import start_files
from stepwell_server.addresses import Address, UnixAddress, bind_problem
from stepwell_server.auth.callers import Callers
from stepwell_server.auth.quota_file import QuotaFile
from stepwell_server.catalog.catalog import Catalog
from stepwell_server.catalog.factory import admin_refusal, compiler_of, end_idle, open_catalog
from stepwell_server.catalog.files.folder import ModelFolder
from stepwell_server.catalog.files.sources import Candidates, StoredModel, begin_with
from stepwell_server.catalog.known_files import KnownFiles
from stepwell_server.catalog.start import ModelLoader, absence, stored_models
from stepwell_server.clock import Clock, SystemClock
from stepwell_server.core.front_limits import FrontLimits
from stepwell_server.core.idle import IdleLimits
from stepwell_server.core.namespaces import own, tenant_of
from stepwell_server.engine.engine import Engine, EveryChange, PagedOutOnly
from stepwell_server.engine.quotas import Quotas
from stepwell_server.engine.state.resident import ResidentRows
from stepwell_server.engine.versions.document import DocumentError
from stepwell_server.engine.versions.record_upgrade import Migration
from stepwell_server.errors import StartError
from stepwell_server.exposure import require_closed
from stepwell_server.files.audit_log import AuditLog
from stepwell_server.logs import Log, configure
from stepwell_server.metrics import gauges
from stepwell_server.metrics.figures import Figures
from stepwell_server.metrics.observer import PrometheusObserver
from stepwell_server.metrics.replica_reports import ReplicaReports
from stepwell_server.metrics.series import StoreWrites
from stepwell_server.metrics.server import MetricsServer, Source
from stepwell_server.metrics.token import MetricsToken
from stepwell_server.process import signals
from stepwell_server.process.memory import memory_bytes
from stepwell_server.process.open_files import RESERVE, raise_limit
from stepwell_server.process.readiness import Readiness
from stepwell_server.process.replicas import Replica, ReplicaState
from stepwell_server.process.systemd import Notifier
from stepwell_server.rpc.audit import Auditor
from stepwell_server.rpc.fronts import unix_socket
from stepwell_server.rpc.fronts.base import BindError, Front
from stepwell_server.rpc.fronts.certificates import CertificateFiles
from stepwell_server.rpc.fronts.choice import HINT, choose
from stepwell_server.rpc.server import HttpOptions, RpcServer
from stepwell_server.settings import DEFAULT_METRICS, Settings
from stepwell_server.store.base import Store, StoreError
from stepwell_server.store_monitor import StoreMonitor
from stepwell_server.store_startup import (
    Abandoned,
    once_it_answers,
    open_own,
    open_shared,
    unless_stopped,
)
from stepwell_server.tracing.setup import start as start_tracing

if TYPE_CHECKING:
    from prometheus_client.metrics_core import Metric

    from stepwell_server.compile.host.compiler import WarmCompiler

_log = Log("app")
_SWITCH_INTERVAL_S = 0.1e-3
_GONE_DRAIN_S = 5.0
"""Without a store nothing can be finished; this is for telling callers so."""


class _Observer(PrometheusObserver):
    """Counts, and writes a line for each event of a session."""

    def __init__(self, auditor: Auditor | None) -> None:
        super().__init__()
        self._auditor = auditor

    def _audit(self, event: str, model: str, count: int, *session_ids: str) -> None:
        if self._auditor is not None:
            self._auditor.session_event(event, model, session_ids, count)

    def session_event(self, event: str, model: str, session_id: str) -> None:
        super().session_event(event, model, session_id)
        tenant = tenant_of(session_id)
        whose = {"tenant": tenant} if tenant else {}
        _log.info(f"session {event}", model=model, **whose, session=own(session_id))
        self._audit(event, model, 1, session_id)

    def sessions_opened(self, model: str, count: int, event: str = "opened") -> None:
        super().sessions_opened(model, count, event)
        _log.info(f"sessions {event}", model=model, count=count)

    def session_events(self, event: str, model: str, count: int) -> None:
        super().session_events(event, model, count)
        _log.info(f"sessions {event}", model=model, count=count)
        self._audit(event, model, count)


@dataclasses.dataclass(frozen=True, slots=True)
class _Files:
    """The contents of the files that the settings name. They are read before anything is started."""

    certificates: CertificateFiles | None
    quotas: QuotaFile | None
    migrations: Mapping[str, Migration]
    callers: Callers | None
    audit: AuditLog | None
    metrics_token: MetricsToken | None


def serve(settings: Settings) -> int:
    """Serve until a signal says stop. Returns the exit code.

    Raises:
        StartError: it cannot start.
        KeyboardInterrupt: a signal came before it was ready.
    """
    configure(settings.log_level, settings.log_format)
    _require_free("--listen", settings.listen)
    if settings.http_listen is not None:
        _require_free("--http-listen", settings.http_listen)
    if isinstance(settings.metrics_listen, Address):
        _require_free("--metrics-listen", settings.metrics_listen)
    _require_closed(settings)
    clock, writes = SystemClock(), StoreWrites()
    files = _files(settings, clock)
    try:
        with signals.interrupting():
            own_store = open_own(settings, clock, writes)
        with asyncio.Runner(loop_factory=_new_event_loop) as runner:
            return runner.run(_run(settings, files, own_store, writes, clock))
    except Abandoned:
        raise KeyboardInterrupt from None


def _files(settings: Settings, clock: Clock) -> _Files:
    """Read the files.

    Raises:
        StartError: one of them cannot be used.
    """
    found = {name: read() for name, read in start_files.readers(settings, clock).items()}
    return _Files(audit=None if settings.audit_log is None else AuditLog(settings.audit_log), **found)


def _build(settings: Settings, *, front: str, server_id: str) -> dict[str, str]:
    """Describe this server for metrics."""
    durability = "" if settings.store == "memory" else settings.durability
    return {
        "version": metadata.version("stepwell"),
        "python": platform.python_version(),
        "store": settings.store_kind,
        "durability": durability,
        "front": front,
        "server_id": server_id,
    }


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


def _require_closed(settings: Settings) -> None:
    """Refuse to be open to others without a word."""
    front = choose(settings.front)
    require_closed(settings, front_problem=front.advice)
    if front.problem:
        _log.warning(f"the server uses the Python front, which is slower: {front.advice}")


def _new_event_loop() -> asyncio.AbstractEventLoop:
    import uvloop

    loop: asyncio.AbstractEventLoop = uvloop.new_event_loop()
    return loop


async def _run(
    settings: Settings, files: _Files, own_store: Store | None, writes: StoreWrites, clock: Clock
) -> int:
    certificates, audit = files.certificates, files.audit
    auditor = None if audit is None else Auditor(audit, settings.audit_when_full)
    observer = _Observer(auditor)
    tracing = start_tracing(settings.trace_endpoint, settings.trace_sample, clock)
    notifier = Notifier()

    def reload() -> None:
        notifier.reloading()
        _reload(audit, certificates, files.callers)

    stop = signals.stop_on_signals(clock, reload)
    open_files = raise_limit()
    store = own_store or await open_shared(settings, clock, stop)
    if settings.store_kind != "memory":
        where = {"data_dir": settings.data_dir} if settings.store == "disk" else {"store": settings.store}
        count = await once_it_answers(store.count, settings, clock, stop)
        _log.info("store opened", **where, sessions=count)
    readiness = Readiness()
    watch = StoreMonitor(store, readiness)
    quotas = await _quotas(files.quotas, settings, store, clock)
    rpc = RpcServer(
        _front(settings, clock, open_files),
        clock=clock,
        observer=observer,
        max_message_bytes=settings.max_message_bytes,
        authenticator=files.callers,
        auditor=auditor,
        tracer=tracing,
    )
    build = _build(settings, front=rpc.front.name, server_id=rpc.info.id)
    disk_writes = writes if settings.store == "disk" else None
    sources: list[Source] = [
        lambda: _counted(rpc, observer),
        lambda: gauges.of_build(build),
        lambda: gauges.of_readiness(readiness.report),
        lambda: gauges.of_front(rpc.front.counts(), rpc.front.limits.values),
        lambda: gauges.of_store(store.labels, watch.health, disk_writes, is_damaged=bool(store.damage)),
        lambda: gauges.of_spans({} if tracing is None else tracing.counts()),
        lambda: gauges.of_memory(memory_bytes()),
    ]
    if audit is not None:
        sources.append(lambda: gauges.of_audit(audit.written, audit.dropped))
    if certificates is not None:
        sources.append(lambda: gauges.of_certificates(certificates))
    if quotas is not None:
        sources.append(lambda: gauges.of_tenants(quotas.counts()))
    gone, metrics = False, None
    engine: Engine | None = None
    started = clock.now()
    replicas = ReplicaReports(store, readiness, clock, lambda: _replica(rpc, started, engine))
    catalog: Catalog | None = None
    looking: list[asyncio.Task[None]] = []
    compiler = compiler_of(settings, clock)
    ending_idle = asyncio.create_task(end_idle(compiler))
    try:
        notifier.start()
        readiness.listen(notifier.changed)
        # Probes are answered from here on, however long the models take.
        metrics = _serve_metrics(settings, sources, readiness, files.metrics_token)
        metrics_address = "" if metrics is None else str(metrics.address)
        address = await _listen(settings, rpc, certificates, metrics_address)
        readiness.listen(rpc.announce)
        looking.append(asyncio.create_task(replicas.run()))
        folder = None if settings.models_dir is None else ModelFolder(settings.models_dir)
        kept = await once_it_answers(lambda: _kept(store, settings), settings, clock, stop)
        wanted = await asyncio.to_thread(begin_with, settings, folder, kept)
        engine = _engine(settings, wanted, store, clock, observer, quotas, files.migrations, readiness)
        catalog = _catalog(settings, engine, compiler, clock, observer, quotas, readiness)
        work = ModelLoader(settings, wanted, kept, folder, engine, catalog, readiness, clock=clock)
        if settings.wait_for_models:
            await unless_stopped(work.load(), stop)
        stats = engine.stats
        sources.append(lambda: gauges.of_engine(stats()))
        watched = engine.watch_counts
        sources.append(lambda: gauges.of_watches(watched()))
        try:
            await once_it_answers(engine.start, settings, clock, stop)
        except DocumentError as error:  # other servers know a version by another file
            raise StartError(f"--store: {error}") from error
        if settings.wait_for_models:
            await unless_stopped(work.begin(), stop)
        statuses = catalog.statuses
        sources.append(lambda: gauges.of_versions(statuses(), observer.models))
        looking += [asyncio.create_task(each.run()) for each in (catalog, work)]
        rpc.serve(
            engine,
            catalog,
            admin_refusal(settings),
            known_files=KnownFiles(engine, settings.versions, settings.models_dir),
            figures=Figures(sources, readiness, clock, lambda: replicas.known),
        )
        readiness.problem("models", "")
        await _say_ready(settings, rpc, store, address, certificates, open_files)
        gone = await _until_stopped(stop, watch)
        readiness.problem("stopping", "the server stops")
        await _drain(min(_GONE_DRAIN_S if gone else math.inf, settings.drain_timeout_s), engine, rpc)
    finally:
        ending_idle.cancel()
        await rpc.close()
        if looking:
            await replicas.leave()
        for task in looking:
            task.cancel()
        if catalog is not None:
            await catalog.close()
        await asyncio.to_thread(compiler.close)
        if metrics is not None:
            await asyncio.to_thread(metrics.close)
        if tracing is not None:
            await asyncio.to_thread(tracing.close, settings.drain_timeout_s)
        if engine is None or await engine.close(settings.drain_timeout_s):
            await store.close()
        else:
            _log.warning("the store did not finish a commit in time; unacknowledged changes may be lost")
        if audit is not None:
            await asyncio.to_thread(audit.close)
        notifier.close()
    _log.info("stopped")
    return 1 if gone else 0


def _counted(rpc: RpcServer, observer: PrometheusObserver) -> Iterator[Metric]:
    rpc.count_answered()
    return observer.families()


def _replica(rpc: RpcServer, started: float, engine: Engine | None) -> Replica:
    """Describe this server to the others that share its store."""
    return Replica(
        rpc.info.id,
        socket.gethostname(),
        rpc.info.address,
        rpc.info.http_address,
        metadata.version("stepwell"),
        started,
        ReplicaState.NOT_READY,
        0 if engine is None else sum(one.resident_sessions for one in engine.stats()),
    )


def _engine(
    settings: Settings,
    wanted: Sequence[Candidates],
    store: Store,
    clock: Clock,
    observer: PrometheusObserver,
    quotas: Quotas | None,
    migrations: Mapping[str, Migration],
    readiness: Readiness,
) -> Engine:
    return Engine(
        store=store,
        clock=clock,
        observer=observer,
        max_batch_rows=settings.max_batch_rows,
        resident_rows=_resident_rows(settings, [model.name for model in wanted if model.choice(())]),
        idle_limits=IdleLimits(settings.max_session_idle_s, settings.unnamed_session_idle_s),
        compute_threads=settings.compute_threads,
        quotas=quotas,
        migrations=migrations,
        policy=PagedOutOnly if settings.store_kind == "memory" else EveryChange,
        absent=absence(readiness, shows_reason=not settings.asks_callers),
    )


def _resident_rows(settings: Settings, names: Collection[str]) -> ResidentRows:
    own = {name: rows for name, rows in settings.resident_rows.items() if name}
    return ResidentRows(settings.resident_rows.get(""), own, len(set(names) - own.keys()))


async def _kept(store: Store, settings: Settings) -> Mapping[str, StoredModel]:
    try:
        return await stored_models(store, settings.models_dir)
    except (DocumentError, StoreError) as error:
        option = "--data-dir" if settings.shared_store is None else "--store"
        raise StartError(f"{option}: {error}") from error


def _catalog(
    settings: Settings,
    engine: Engine,
    compiler: WarmCompiler,
    clock: Clock,
    observer: PrometheusObserver,
    quotas: Quotas | None,
    readiness: Readiness,
) -> Catalog:
    try:
        return open_catalog(
            settings,
            engine,
            compiler,
            clock=clock,
            observer=observer,
            quotas=quotas,
            readiness=readiness,
        )
    except OSError as error:
        raise StartError(f"--allow-model-upload: there can be no folder for uploads: {error}") from error


async def _quotas(file: QuotaFile | None, settings: Settings, store: Store, clock: Clock) -> Quotas | None:
    """The quotas, with the sessions counted that are there."""
    if file is None:
        return None
    quotas = Quotas(file.table, clock, settings.metrics_tenants)
    await quotas.count(store)
    file.watch(quotas.use)
    return quotas


def _front(settings: Settings, clock: Clock, open_files: int) -> Front:
    limits = _limits(settings, open_files)
    choice = choose(settings.front)
    if choice.native is not None:
        return choice.native(clock, limits)
    # Here: it brings grpc, 8 MiB that the native front does not need.
    from stepwell_server.rpc.fronts.python import PythonFront

    return PythonFront(clock, limits)


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
        address_connections=settings.max_connections_per_address,
        budget_bytes=settings.max_held_bytes or 0,
        age_s=settings.max_connection_age_s,
        age_grace_s=settings.max_connection_age_grace_s,
    )


async def _until_stopped(stop: asyncio.Event, watch: StoreMonitor) -> bool:
    """Return when the server is to end; True if that is because the store is gone."""
    stopped, watching = asyncio.create_task(stop.wait()), asyncio.create_task(watch.run())
    await asyncio.wait((stopped, watching), return_when=asyncio.FIRST_COMPLETED)
    for task in (stopped, watching):
        task.cancel()
    await asyncio.gather(stopped, watching, return_exceptions=True)
    return not watching.cancelled()


def _reload(audit: AuditLog | None, *files: CertificateFiles | Callers | None) -> None:
    """What SIGHUP asks for."""
    if audit is not None:
        audit.reopen()
    known = [one for one in files if one is not None]
    for one in known:
        one.asked.set()
    if not known and audit is None:
        _log.info("nothing to reload: the server has no certificates and does not authenticate callers")


def _serve_metrics(
    settings: Settings,
    sources: Sequence[Source],
    readiness: Readiness,
    token: MetricsToken | None = None,
) -> MetricsServer | None:
    if settings.metrics_listen == "off":
        return None
    address = settings.metrics_listen or DEFAULT_METRICS
    data_dir = settings.data_dir if settings.store == "disk" else None
    try:
        metrics = MetricsServer(sources, address, readiness, data_dir, token)
    except OSError as error:
        if settings.metrics_listen is None:
            # nobody asked for this address: another server of this machine has it, say
            _log.warning(
                "metrics are not served: give another address with --metrics-listen, or off",
                address=str(address),
                reason=error.strerror,
            )
            return None
        raise StartError(f"--metrics-listen: cannot listen on {address}: {error.strerror}") from error
    _log.info("metrics", address=str(metrics.address))
    return metrics


async def _listen(
    settings: Settings, rpc: RpcServer, certificates: CertificateFiles | None, metrics_address: str
) -> Address | UnixAddress:
    http = None
    if settings.http_listen is not None:
        http = HttpOptions(settings.http_listen, settings.cors_origin, not settings.no_console)
    try:
        address = await rpc.start(settings.listen, certificates, metrics_address, http)
    except BindError as error:
        raise StartError(f"{error.option}: {error}") from error
    _log.info("listening, not ready yet", address=str(address), **_http_address(rpc))
    return address


def _http_address(rpc: RpcServer) -> dict[str, str]:
    """Return the address of HTTP for the log, if there is one."""
    address = rpc.front.http_address
    return {} if address is None else {"http": str(address)}


async def _say_ready(
    settings: Settings,
    rpc: RpcServer,
    store: Store,
    address: Address | UnixAddress,
    certificates: CertificateFiles | None,
    open_files: int,
) -> None:
    tls = "off" if certificates is None else "mutual" if certificates.are_mutual else "on"
    _log.info(
        "serving",
        front=rpc.front.name,
        address=str(address),
        **_http_address(rpc),
        tls=tls,
        callers="known" if settings.asks_callers else "anybody",
        max_connections=rpc.front.limits.connections,
        open_files=open_files,
    )
    # The event loop and the threads of the store and of long passes take turns with Python's lock. At the default of
    # 5 ms a commit that the disk has kept for long would wait for confirmation.
    sys.setswitchinterval(_SWITCH_INTERVAL_S)
    # What is there now stays: the garbage collector need not look at it again and again.
    gc.collect()
    gc.freeze()
    await store.announce(str(address))
    hint = f" ({HINT})" if choose(settings.front).problem else ""
    scheme = "http" if certificates is None else "https"
    http = "".join(f", HTTP on {scheme}://{one}" for one in _http_address(rpc).values())
    sys.stdout.write(f"stepwell: {rpc.front.name} front{hint}{http}, listening on {address}\n")
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
