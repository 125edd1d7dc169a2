"""The front in Python: grpc.aio. The only module that sees its types."""

from __future__ import annotations

import math
from collections.abc import Coroutine, Mapping, Sequence
from typing import Any

import grpc
import grpc.aio

from stepwell_server.clock import Clock
from stepwell_server.rpc.fronts.base import BindError, CallEnded, Method, Steps

_CODES: dict[int, grpc.StatusCode] = {code.value[0]: code for code in grpc.StatusCode}
_Context = grpc.aio.ServicerContext[Any, Any]


class _Call:
    """A call as grpc.aio hands it over. `base.Call`."""

    __slots__ = ("_context", "caller", "deadline", "request")

    def __init__(self, request: bytes, context: _Context, clock: Clock) -> None:
        self._context = context
        self.request = request
        self.caller = context.peer()
        remaining: float | None = context.time_remaining()  # its type forgets that there may be none
        self.deadline = math.inf if remaining is None else clock.monotonic() + remaining

    @property
    def is_late(self) -> bool:
        return self._context.time_remaining() == 0

    @property
    def metadata(self) -> Mapping[str, str | bytes]:
        return dict(self._context.invocation_metadata() or ())

    async def read(self) -> bytes | None:
        request: Any = await self._context.read()
        return None if request is grpc.aio.EOF else request

    def write(self, reply: bytes) -> Coroutine[Any, Any, None]:
        return self._context.write(reply)


class PythonFront:
    """Serves methods by grpc.aio, every message as a call. `base.Front`."""

    name = "python"

    def __init__(self, clock: Clock, max_message_bytes: int) -> None:
        self._clock = clock
        self._server = grpc.aio.server(options=_options(max_message_bytes))

    async def start(self, host: str, port: int, methods: Sequence[Method], steps: Steps) -> int:  # noqa: ARG002
        """See `base.Front`."""
        services: dict[str, dict[str, Any]] = {}
        for method in methods:
            services.setdefault(method.service, {})[method.name] = self._handler(method)
        self._server.add_generic_rpc_handlers(
            [grpc.method_handlers_generic_handler(name, handlers) for name, handlers in services.items()]
        )
        address = f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
        try:
            bound: int = self._server.add_insecure_port(address)
        except RuntimeError as error:
            raise BindError(
                f"cannot listen on {address}: it is in use or not an address of this machine"
            ) from error
        await self._server.start()
        return bound

    async def flush(self) -> None:
        """See `base.Front`. A call has not ended before its replies are on their way."""

    async def stop(self, grace_s: float) -> None:
        """See `base.Front`."""
        await self._server.stop(grace_s)

    def _handler(self, method: Method) -> Any:
        async def handle(raw: Any, context: _Context) -> bytes | None:
            try:
                reply = await method.serve(_Call(b"" if method.streams else raw, context, self._clock))
                return None if method.streams else reply
            except CallEnded as ended:
                status = ended.status
                await context.abort(_CODES[status.code], status.message, status.trailers)
                raise  # not reached: abort raises

        if method.streams:
            return grpc.stream_stream_rpc_method_handler(handle)
        return grpc.unary_unary_rpc_method_handler(handle)


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
