"""Serves all services on one front: ours, Triton's, health and reflection."""

from __future__ import annotations

import asyncio
import dataclasses
import re
import secrets
from collections.abc import Callable, Collection
from importlib import metadata
from typing import TYPE_CHECKING, Protocol

from google.protobuf import empty_pb2, message_factory
from google.protobuf.descriptor import MethodDescriptor, ServiceDescriptor

from stepwell.v1 import models_pb2, sessions_pb2, watch_pb2
from stepwell_server.addresses import Address, UnixAddress
from stepwell_server.errors import Starting, Unauthenticated
from stepwell_server.process.readiness import Report
from stepwell_server.rpc.access import Access, access_of
from stepwell_server.rpc.audit import Auditor
from stepwell_server.rpc.boundary import Boundary, RequestObserver, Serve, served_at
from stepwell_server.rpc.fronts.base import Call, CallEnded, Front, HttpListener, Method
from stepwell_server.rpc.fronts.certificates import CertificateFiles, Unusable, follow
from stepwell_server.rpc.fronts.shape import Shape
from stepwell_server.rpc.guard import Authenticator, Guard
from stepwell_server.rpc.http.door import Door
from stepwell_server.rpc.http.origin import OriginRules
from stepwell_server.rpc.services import health, reflection
from stepwell_server.rpc.services.model_admin import ModelAdminServicer
from stepwell_server.rpc.services.models import ModelServicer, SlowSteps
from stepwell_server.rpc.services.sessions import SessionServicer
from stepwell_server.rpc.services.watches import Figures, WatchServicer
from stepwell_server.rpc.status import ADMIN_CODES, ANY_CODE, NAMING_CODES, UPLOAD_CODES, to_status
from stepwell_server.rpc.steps.columns import STEPWELL, ColumnSteps
from stepwell_server.rpc.steps.refusals import EarlySteps
from stepwell_server.rpc.steps.stream import StreamLimits
from stepwell_server.rpc.triton.repository import KnownFiles, Repository
from stepwell_server.rpc.triton.servicer import SERVICE as _TRITON
from stepwell_server.rpc.triton.servicer import Liveness, TritonServicer, unsupported_methods
from stepwell_server.rpc.triton.statistics import PassObserver

if TYPE_CHECKING:
    from stepwell_server.catalog.catalog import Catalog
    from stepwell_server.clock import Clock
    from stepwell_server.engine.engine import Engine
    from stepwell_server.rpc.tracing import Tracer

_SESSIONS = sessions_pb2.DESCRIPTOR.services_by_name["SessionService"]
_MODELS = models_pb2.DESCRIPTOR.services_by_name["ModelService"]
_MODEL_ADMIN = models_pb2.DESCRIPTOR.services_by_name["ModelAdminService"]
_WATCHES = watch_pb2.DESCRIPTOR.services_by_name["WatchService"]
_STREAM_FRAMES = 1024
# Watches and reflection streams end only when they are cut off. Our own calls have ended by then.
_GRACE_S = 0.2
_STARTING_RETRY_S = 1.0
_OF_ENGINE = (_SESSIONS, _MODELS, _MODEL_ADMIN, _WATCHES, _TRITON)
_TAKING_UPLOADS = frozenset({"LoadModel", "UploadModel"})
#: Methods whose calls only their clients end.
_ENDLESS = frozenset({"Watch", "WatchSessions", "WatchServer", "ServerReflectionInfo"})


#: The services with paths for JSON over HTTP.
_OVER_HTTP = (_SESSIONS, _MODELS, _MODEL_ADMIN, _WATCHES)

#: The service of each method, for traces.
SERVICES = {method.name: service.full_name for service in _OF_ENGINE for method in service.methods}


@dataclasses.dataclass(frozen=True, slots=True)
class HttpOptions:
    """Where to serve JSON over HTTP, and for which pages of browsers."""

    address: Address
    cors_origins: Collection[str] = ()
    """Origins whose pages may call; `*`: all."""
    has_console: bool = True


class ServerObserver(RequestObserver, PassObserver, Protocol):
    """Counts calls and passes."""

    @property
    def slow_steps(self) -> SlowSteps:
        """Sessions with slow steps."""


class RpcServer:
    """Listens, and serves an engine once there is one. Lives on the event loop; started and stopped once."""

    def __init__(
        self,
        front: Front,
        *,
        clock: Clock,
        observer: ServerObserver,
        max_message_bytes: int,
        authenticator: Authenticator | None = None,
        auditor: Auditor | None = None,
        tracer: Tracer | None = None,
    ) -> None:
        self._front = front
        self.info = models_pb2.Server(front=front.name, id=secrets.token_hex(8))
        """The description of the server for admins."""
        self._authenticator = authenticator
        self._following: list[asyncio.Task[None]] = []
        self.guard = None if authenticator is None else Guard(authenticator, front, clock)
        """Admits callers; None: callers are not authenticated."""
        self._boundary = Boundary(observer, max_message_bytes, self.guard, auditor, tracer)
        self._tracer = tracer
        self._auditor = auditor
        self._clock = clock
        self._observer = observer
        self._max_message_bytes = max_message_bytes
        self._sessions: SessionServicer | None = None
        self._triton: TritonServicer | None = None
        self._watches: WatchServicer | None = None
        self._steps = EarlySteps(max_message_bytes, observer, traces=tracer is not None)
        self.starting = "the models are being loaded"
        """The reason for refusals until there is an engine."""
        ours = [service.full_name for service in _OF_ENGINE]
        self._health = health.HealthServicer(ours, lists_models=authenticator is None)
        self._report = Report({}, {}, {})
        shown = reflection.ReflectionServicer((*_OF_ENGINE, health.SERVICE))
        self._serving: dict[str, Serve] = {}
        """The function that currently serves each method, by path."""
        self._methods = [
            Method(
                service.full_name,
                method.name,
                served_at(path, self._serving, self._refusing(method.name)),
                Shape(method.input_type),
                streams=_streams(method),
                is_open=access_of(method.name) is Access.ANYONE,
                judge=None if self.guard is None else self._judging(path, method.name),
            )
            for service in (*_OF_ENGINE, health.SERVICE, *shown.services)
            for method in service.methods
            for path in [f"/{service.full_name}/{method.name}"]
        ]
        self._serve_by(health.SERVICE, self._health)
        for service in shown.services:
            self._serve_by(service, shown)
        self._serve_by(_TRITON, Liveness(self._health.is_serving), only={"ServerLive", "ServerReady"})
        for name, serve in unsupported_methods(self._boundary).items():
            judge = None if self.guard is None else self._boundary.judging(name)
            shape = Shape(empty_pb2.Empty.DESCRIPTOR)
            self._methods.append(Method(_TRITON.full_name, name, serve, shape, judge=judge))

    async def start(
        self,
        address: Address | UnixAddress,
        files: CertificateFiles | None = None,
        metrics_address: str = "",
        http: HttpOptions | None = None,
    ) -> Address | UnixAddress:
        """Listen. Until `serve`, answer health checks and refuse other calls.

        Returns the address with the port, which the system chooses if it is 0.

        Args:
            address: Address to listen on.
            files: Certificate files for TLS, which are reloaded when they change; None: no TLS.
            metrics_address: Address of the server's metrics, for admins; empty: no metrics.
            http: Where to serve JSON over HTTP; None: nowhere.

        Raises:
            BindError: the address is in use, or not an address of this machine.
            StartError: the front does not support the certificates.
        """
        self.info.metrics_address = metrics_address
        certificates = None if files is None else files.at_start
        if self.guard is not None:
            self._front.ask_callers()
        try:
            bound = await self._front.start(
                address,
                self._methods,
                self._steps,
                certificates,
                None if http is None else self._http_listener(http, has_tls=files is not None),
            )
        except Unusable as error:
            assert files is not None
            raise files.refused(error) from error
        self.info.address = str(bound)
        if (listens := self._front.http_address) is not None:
            self.info.http_address = f"{'http' if files is None else 'https'}://{listens}"
        if files is not None:
            self._following.append(asyncio.create_task(follow(files, self._front.secure)))
        if self.guard is not None:
            self._following.append(asyncio.create_task(self.guard.follow()))
        return bound

    def _http_listener(self, http: HttpOptions, *, has_tls: bool) -> HttpListener:
        rules = OriginRules(
            http.address.host,
            http.cors_origins,
            is_open=self._authenticator is None,
            scheme="https" if has_tls else "http",
        )
        codec = self._front.json
        assert codec is not None, "the settings refuse HTTP without the native front"
        door = Door(
            _OVER_HTTP,
            self._methods,
            rules,
            refused=lambda reason: self._observer.refused(reason, 1),
            max_message_bytes=self._max_message_bytes,
            version=metadata.version("stepwell"),
            codec=codec,
        )
        door.has_console = http.has_console
        return HttpListener(http.address, door)

    def serve(
        self,
        engine: Engine,
        control: Catalog,
        admin_refusal: str = "",
        *,
        known_files: KnownFiles,
        figures: Figures,
    ) -> None:
        """Serve an engine from now on, and announce it.

        Args:
            engine: The engine.
            control: Loads and unloads models.
            admin_refusal: Reason why no call may load models; empty: admins may.
            known_files: The files that Triton's calls may load.
            figures: Computes the figures of the server.
        """
        clock, observer, limit = self._clock, self._observer, self._max_message_bytes
        limits = StreamLimits(_STREAM_FRAMES, limit)
        self._sessions = SessionServicer(engine, clock, limit, limits, observer, self._tracer, self._auditor)
        self._triton = TritonServicer(
            engine,
            clock,
            limit,
            limits,
            observer,
            observer,
            Repository(control, known_files, admin_refusal),
            self._health.is_serving,
        )
        self._serve_by(_SESSIONS, self._sessions)
        models = ModelServicer(engine, self.info, limit, observer.slow_steps, clock, control)
        self._serve_by(_MODELS, models)
        self._serve_by(_MODEL_ADMIN, ModelAdminServicer(control, models, self._auditor, admin_refusal))
        self._watches = WatchServicer(engine, control, models, figures, limit, self._auditor)
        self._serve_by(_WATCHES, self._watches)
        self._serve_by(_TRITON, self._triton)
        self._steps.go_to(ColumnSteps(engine, clock, limit, observer, self._triton.wire, self._tracer))
        self._front.set_fast_path(enabled=True)
        self.announce(self._report)

    @property
    def front(self) -> Front:
        """The network front."""
        return self._front

    def announce(self, report: Report) -> None:
        """Report the server's state to health checkers and, while there is no engine, to callers. Calls are accepted anyway."""
        self._report = report
        self.starting = report.problems.get("models", self.starting)
        has_engine = self._sessions is not None
        # a loaded model does not wait for the others
        are_answered = has_engine and not report.problems.keys() - {"models"}
        models = {name: are_answered and report.is_loaded(name) for name in report.versions}
        for name, versions in report.versions.items():
            for version in versions:
                models[f"{name}@{version}"] = are_answered and report.is_loaded(name, version)
        self._health.announce(is_serving=has_engine and report.is_ready, models=models)

    async def announce_stop(self) -> None:
        """Report to health checkers that the server stops, and continue to serve running calls.

        New streams end before their first reply, so that proxies may send them to another server.
        """
        self._front.set_fast_path(enabled=False)  # steps as columns would bypass this
        for servicer in self._streaming:
            servicer.refuse_streams()
        self._health.stop()

    async def finish(self) -> None:
        """Return when the running calls have ended and their replies are on their way. Streams end once their frames are answered."""
        for servicer in self._streaming:
            servicer.stop()
        await self._boundary.wait_idle()
        if self._triton is not None:
            await self._triton.wait_idle()
        await self._front.flush()

    @property
    def _streaming(self) -> list[SessionServicer | TritonServicer | WatchServicer]:
        return [each for each in (self._sessions, self._triton, self._watches) if each is not None]

    def count_answered(self) -> None:
        """Count the steps that were answered since the last call. Call it before the metrics are read."""
        self._steps.settle()  # a thread of the store may have answered some, which nobody has counted
        if (durations := self._front.take_durations()) is not None:
            self._observer.answered(STEPWELL.method, STEPWELL.stream_method, *durations)

    async def close(self) -> None:
        """Stop listening and cut off the calls that still run."""
        for task in self._following:
            task.cancel()
        await self._front.stop(_GRACE_S)

    def _serve_by(
        self, service: ServiceDescriptor, servicer: object, only: Collection[str] | None = None
    ) -> None:
        """Serve a service, or `only` these of its methods, by the methods of a servicer, each wrapped by the boundary."""
        for method in service.methods:
            if only is not None and method.name not in only:
                continue
            behaviour = getattr(servicer, _snake_case(method.name))
            codes = _codes(service, method)
            if _streams(method):
                endless = method.name in _ENDLESS
                serve = self._boundary.stream(method.name, behaviour, codes, endless=endless)
            else:
                request_type = message_factory.GetMessageClass(method.input_type)
                serve = self._boundary.unary(method.name, behaviour, request_type, codes)
            self._serving[f"/{service.full_name}/{method.name}"] = serve

    def _not_yet(self) -> Starting:
        return Starting(f"the server is starting: {self.starting}", _STARTING_RETRY_S)

    def _refusing(self, method: str) -> Serve:
        async def refuse(call: Call) -> bytes:
            self._require_known(method, call)
            error = self._not_yet()
            self._observer.refused(error.reason, 1)
            raise CallEnded(to_status(error))

        return refuse

    def _judging(self, path: str, method: str) -> Callable[[Call], None]:
        judge = self._boundary.judging(method)

        def judge_or_wait(call: Call) -> None:
            if path in self._serving:
                judge(call)
            else:
                self._require_known(method, call)

        return judge_or_wait

    def _require_known(self, method: str, call: Call) -> None:
        """Refuse unknown callers while the server starts, because the reason names models."""
        try:
            if self._authenticator is not None:
                self._authenticator.identify(call)
        except Unauthenticated as error:
            if self._auditor is not None:
                self._auditor.refused(method, call, error)
            self._observer.refused(error.reason, 1)
            raise CallEnded(to_status(error)) from None


def _codes(service: ServiceDescriptor, method: MethodDescriptor) -> Collection[str]:
    """Return the status codes that a call may end with."""
    if service is _MODEL_ADMIN:
        return UPLOAD_CODES if method.name in _TAKING_UPLOADS else ADMIN_CODES
    if method.name.startswith("Repository"):
        return UPLOAD_CODES
    return ANY_CODE if service in (_SESSIONS, _WATCHES, _TRITON) else NAMING_CODES


def _streams(method: MethodDescriptor) -> bool:
    return bool(method.client_streaming or method.server_streaming)


def _snake_case(name: str) -> str:
    return re.sub(r"(?<!^)(?=[A-Z])", "_", name).lower()
