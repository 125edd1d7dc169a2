"""The calls of all services on one front: ours, Triton's, health and reflection."""

from __future__ import annotations

import asyncio
import re
from collections.abc import Mapping
from typing import TYPE_CHECKING, Protocol

from google.protobuf import message_factory
from google.protobuf.descriptor import ServiceDescriptor

from stepwell.v1 import models_pb2, sessions_pb2
from stepwell_server.addresses import Address, UnixAddress
from stepwell_server.rpc import health, reflection
from stepwell_server.rpc.boundary import Boundary, RequestObserver, Serve
from stepwell_server.rpc.fronts.base import Front, Method
from stepwell_server.rpc.fronts.certificates import CertificateFiles, Unusable, follow
from stepwell_server.rpc.guard import Authenticator, Guard
from stepwell_server.rpc.models import ModelServicer
from stepwell_server.rpc.sessions import SessionServicer
from stepwell_server.rpc.status import ANY_CODE, NAMING_CODES
from stepwell_server.rpc.steps.columns import ColumnSteps
from stepwell_server.rpc.steps.stream import StreamLimits
from stepwell_server.rpc.triton.servicer import SERVICE as _TRITON
from stepwell_server.rpc.triton.servicer import TritonServicer, unsupported_methods
from stepwell_server.rpc.triton.statistics import PassObserver

if TYPE_CHECKING:
    from stepwell_server.clock import Clock
    from stepwell_server.engine.engine import Engine
    from stepwell_server.rpc.tracing import Tracer
    from stepwell_server.slowest import Slowest

_SESSIONS = sessions_pb2.DESCRIPTOR.services_by_name["SessionService"]
_MODELS = models_pb2.DESCRIPTOR.services_by_name["ModelService"]
_STREAM_FRAMES = 1024
# Health watches and reflection streams end only when they are cut off; our own calls are done by then.
_GRACE_S = 0.2
#: Those whose calls may end with any status.
_OF_SESSIONS = (_SESSIONS, _TRITON)
#: Only their clients end these.
_ENDLESS = frozenset({"Watch", "ServerReflectionInfo"})


#: The service of each method, for traces.
SERVICES = {
    method.name: service.full_name for service in (_SESSIONS, _MODELS, _TRITON) for method in service.methods
}


class ServerObserver(RequestObserver, PassObserver, Protocol):
    """Who wants to know of calls, and knows of passes."""

    slowest: Slowest
    """Sessions with slow steps."""


class RpcServer:
    """Serves an engine. Lives on the event loop; started and stopped once."""

    def __init__(
        self,
        engine: Engine,
        front: Front,
        *,
        clock: Clock,
        observer: ServerObserver,
        max_message_bytes: int,
        authenticator: Authenticator | None = None,
        tracer: Tracer | None = None,
    ) -> None:
        self._front = front
        self._following: list[asyncio.Task[None]] = []
        self.guard = None if authenticator is None else Guard(authenticator, front, clock)
        """Lets callers in; None: nobody is asked."""
        self._boundary = Boundary(observer, max_message_bytes, self.guard, tracer)
        limits = StreamLimits(_STREAM_FRAMES, max_message_bytes)
        self._sessions = SessionServicer(engine, clock, max_message_bytes, limits, observer, tracer)
        self._triton = TritonServicer(engine, clock, max_message_bytes, limits, observer, observer)
        self._steps = ColumnSteps(engine, clock, max_message_bytes, observer, self._triton.form_of, tracer)
        ours = [service.full_name for service in (_SESSIONS, _MODELS, _TRITON)]
        self._health = health.HealthServicer(ours)
        shown = reflection.ReflectionServicer((_SESSIONS, _MODELS, _TRITON, health.SERVICE))
        self._methods = [
            *self._methods_of(_SESSIONS, self._sessions),
            *self._methods_of(
                _MODELS, ModelServicer(engine, front.name, max_message_bytes, observer.slowest, clock)
            ),
            *self._methods_of(_TRITON, self._triton, unsupported_methods(self._boundary)),
            *self._methods_of(health.SERVICE, self._health),
            *(method for service in shown.services for method in self._methods_of(service, shown)),
        ]

    async def start(
        self, address: Address | UnixAddress, files: CertificateFiles | None = None
    ) -> Address | UnixAddress:
        """Listen and serve. Returns the address with the port, which the system chooses if it is 0.

        Args:
            address: Where to listen.
            files: With TLS, and with what is put into these files as long as the server runs; None: without.

        Raises:
            BindError: the address is taken, or not one of this machine's.
            CertificateError: the files hold what this front cannot use.
        """
        certificates = None if files is None else files.at_start
        if self.guard is not None:
            self._front.ask_callers()
        try:
            bound = await self._front.start(address, self._methods, self._steps, certificates)
        except Unusable as error:
            assert files is not None
            raise files.refused(error) from error
        if files is not None:
            self._following.append(asyncio.create_task(follow(files, self._front.secure)))
        if self.guard is not None:
            self._following.append(asyncio.create_task(self.guard.follow()))
        return bound

    @property
    def front(self) -> Front:
        """What speaks to the network."""
        return self._front

    def announce_ready(self, *, is_ready: bool) -> None:
        """Tell health checkers whether calls can be answered now; they are taken all the same."""
        self._triton.announce_ready(is_ready=is_ready)
        self._health.announce(is_serving=is_ready)

    async def announce_stop(self) -> None:
        """Tell health checkers that the server is going away; serve on."""
        self._triton.announce_stop()
        self._health.stop()

    async def finish(self) -> None:
        """Return when the running calls are done and their replies on their way. Streams end as soon as their frames are answered."""
        self._sessions.stop()
        self._triton.stop()
        await self._boundary.wait_idle()
        await self._front.flush()

    async def close(self) -> None:
        """Stop listening and cut off what still runs."""
        for task in self._following:
            task.cancel()
        await self._front.stop(_GRACE_S)

    def _methods_of(
        self, service: ServiceDescriptor, servicer: object, others: Mapping[str, Serve] | None = None
    ) -> list[Method]:
        """A servicer's calls with the boundary around each; `others` have it already."""
        found = [Method(service.full_name, name, serve) for name, serve in (others or {}).items()]
        codes = ANY_CODE if service in _OF_SESSIONS else NAMING_CODES
        for method in service.methods:
            if others is not None and method.name in others:
                continue
            behaviour = getattr(servicer, _snake_case(method.name))
            streams = method.client_streaming or method.server_streaming
            if streams:
                serve = self._boundary.stream(method.name, behaviour, codes, endless=method.name in _ENDLESS)
            else:
                request_type = message_factory.GetMessageClass(method.input_type)
                serve = self._boundary.unary(method.name, behaviour, request_type, codes)
            found.append(Method(service.full_name, method.name, serve, streams=streams))
        return found


def _snake_case(name: str) -> str:
    return re.sub(r"(?<!^)(?=[A-Z])", "_", name).lower()
