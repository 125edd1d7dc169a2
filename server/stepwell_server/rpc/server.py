"""The gRPC server: our services, Triton's, health and reflection on one port."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Protocol

import grpc
import grpc.aio
from google.protobuf import message_factory
from google.protobuf.descriptor import ServiceDescriptor
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_health.v1.health import SERVICE_NAME as HEALTH
from grpc_health.v1.health import aio as health
from grpc_reflection.v1alpha import reflection

from stepwell.v1 import models_pb2, sessions_pb2
from stepwell_server.rpc.boundary import Boundary, RequestObserver
from stepwell_server.rpc.models import ModelServicer
from stepwell_server.rpc.sessions import SessionServicer
from stepwell_server.rpc.sizes import ReplySizes
from stepwell_server.rpc.stream import StreamLimits
from stepwell_server.rpc.triton.pool import BothPools
from stepwell_server.rpc.triton.servicer import SERVICE as _TRITON
from stepwell_server.rpc.triton.servicer import TritonServicer
from stepwell_server.rpc.triton.statistics import PassObserver
from stepwell_server.rpc.triton.unsupported import unsupported_handlers

if TYPE_CHECKING:
    from stepwell_server.clock import Clock
    from stepwell_server.engine.engine import Engine

_SESSIONS = sessions_pb2.DESCRIPTOR.services_by_name["SessionService"]
_MODELS = models_pb2.DESCRIPTOR.services_by_name["ModelService"]
_STREAM_FRAMES = 1024
# Health watches and reflection streams end only when they are cut off; our own calls are done by then.
_GRACE_S = 0.2


_SERVICES = (_SESSIONS, _MODELS, _TRITON)


class ServerObserver(RequestObserver, PassObserver, Protocol):
    """Who wants to know of calls, and knows of passes."""


class BindError(Exception):
    """The server cannot listen where it was told to."""


class RpcServer:
    """Serves an engine over gRPC. Lives on the event loop; started and stopped once."""

    def __init__(
        self, engine: Engine, *, clock: Clock, observer: ServerObserver, max_message_bytes: int
    ) -> None:
        self._boundary = Boundary(observer, max_message_bytes)
        self._health = health.HealthServicer()
        self._server = grpc.aio.server(options=_options(max_message_bytes))
        sizes = ReplySizes(engine, max_message_bytes)
        limits = StreamLimits(_STREAM_FRAMES, max_message_bytes)
        self._sessions = SessionServicer(engine, clock, sizes, limits, observer)
        self._add(_SESSIONS, self._sessions)
        self._triton = TritonServicer(engine, clock, sizes, limits, observer, observer)
        self._add(_MODELS, ModelServicer(engine, clock, sizes))
        self._add(_TRITON, self._triton, unsupported_handlers(self._boundary))
        health_pb2_grpc.add_HealthServicer_to_server(self._health, self._server)
        names = (*(service.full_name for service in _SERVICES), HEALTH, reflection.SERVICE_NAME)
        reflection.enable_server_reflection(names, self._server, pool=BothPools())

    async def start(self, host: str, port: int) -> int:
        """Listen and serve. Returns the port, which the system chooses if ``port`` is 0.

        Raises:
            BindError: the address is taken, or not one of this machine's.
        """
        address = f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
        try:
            bound: int = self._server.add_insecure_port(address)
        except RuntimeError as error:
            raise BindError(
                f"cannot listen on {address}: it is in use or not an address of this machine"
            ) from error
        await self._server.start()
        await self.announce_ready(is_ready=True)
        return bound

    async def announce_ready(self, *, is_ready: bool) -> None:
        """Tell health checkers whether calls can be answered now; they are taken all the same."""
        self._triton.announce_ready(is_ready=is_ready)
        answer = health_pb2.HealthCheckResponse
        status = answer.SERVING if is_ready else answer.NOT_SERVING
        for name in ("", *(service.full_name for service in _SERVICES)):
            await self._health.set(name, status)

    async def announce_stop(self) -> None:
        """Tell health checkers that the server is going away; serve on."""
        self._triton.announce_stop()
        await self._health.enter_graceful_shutdown()

    async def finish(self) -> None:
        """Return when the running calls are done. Streams end as soon as their frames are answered."""
        self._sessions.stop()
        self._triton.stop()
        await self._boundary.wait_idle()

    async def close(self) -> None:
        """Stop listening and cut off what still runs."""
        await self._server.stop(_GRACE_S)

    def _add(
        self, service: ServiceDescriptor, servicer: object, others: Mapping[str, Any] | None = None
    ) -> None:
        """Register a servicer's calls with the boundary around each; `others` are handlers already."""
        handlers: dict[str, Any] = dict(others or {})
        for method in service.methods:
            behaviour = getattr(servicer, _snake_case(method.name))
            request_type = message_factory.GetMessageClass(method.input_type)
            if method.client_streaming:
                handlers[method.name] = self._boundary.stream(method.name, behaviour)
            elif method.name in getattr(servicer, "in_bytes", ()):
                handlers[method.name] = self._boundary.in_bytes(method.name, behaviour, request_type)
            else:
                handlers[method.name] = self._boundary.unary(method.name, behaviour, request_type)
        generic = grpc.method_handlers_generic_handler(service.full_name, handlers)
        self._server.add_generic_rpc_handlers((generic,))


def _snake_case(name: str) -> str:
    return re.sub(r"(?<!^)(?=[A-Z])", "_", name).lower()


def _options(max_message_bytes: int) -> list[tuple[str, int]]:
    return [
        ("grpc.max_receive_message_length", max_message_bytes),
        ("grpc.max_send_message_length", max_message_bytes),
        ("grpc.so_reuseport", 0),  # a second server on the port must fail, not share it
        # Clients on quiet streams may ask every ten seconds whether the server is there, and the server
        # finds out within a minute that a client's machine has vanished.
        ("grpc.http2.min_recv_ping_interval_without_data_ms", 10_000),
        ("grpc.keepalive_permit_without_calls", 1),
        ("grpc.keepalive_time_ms", 40_000),
        ("grpc.keepalive_timeout_ms", 20_000),
    ]
