"""The Python front: the only module that uses grpc.aio's types."""

from __future__ import annotations

import asyncio
import collections
import logging
import math
import os
import types
from collections.abc import Collection, Mapping, Sequence
from typing import Any

# gRPC reads this when it is imported. Its messages below errors contain text from peers, including newlines.
os.environ.setdefault("GRPC_VERBOSITY", "ERROR")

import grpc
import grpc.aio

from stepwell_server.addresses import Address, UnixAddress
from stepwell_server.clock import Clock
from stepwell_server.core.callers import ANYBODY, Caller, Credential
from stepwell_server.core.front_limits import FrontLimits
from stepwell_server.errors import ServerError
from stepwell_server.logs import Log
from stepwell_server.rpc.fronts import unix_socket
from stepwell_server.rpc.fronts.base import (
    BindError,
    CallEnded,
    FrontCounts,
    HttpListener,
    JsonCodec,
    Method,
    Steps,
)
from stepwell_server.rpc.fronts.certificates import Certificates
from stepwell_server.rpc.fronts.shape import Shape
from stepwell_server.rpc.fronts.shape_check import check_shape
from stepwell_server.rpc.status import GO_ELSEWHERE

_CODES: dict[int, grpc.StatusCode] = {code.value[0]: code for code in grpc.StatusCode}
#: gRPC's names for the names in a client certificate.
_ALTERNATIVE_NAMES, _COMMON_NAME = "x509_subject_alternative_name", "x509_common_name"
#: gRPC's replacement for names that are neither DNS, email, URI nor IP.
_OTHER_NAME = b"other types of SAN"
_Context = grpc.aio.ServicerContext[Any, Any]
#: Limit of gRPC servers that have stopped by themselves and still have calls.
_MAX_STOPPED = 8
_BIND_RETRY_S = 0.02
_GONE_S = 30.0
_log = Log("rpc.front")


def _is_of_use(record: logging.LogRecord) -> bool:
    """Drop gRPC's messages that clients can cause at will: headers that are not UTF-8, and replies to clients that left."""
    error = record.exc_info[1] if record.exc_info else None
    unread = UnicodeDecodeError | grpc.aio.InternalError
    return not isinstance(error, unread) and not isinstance(record.msg, unread)


logging.getLogger("grpc._cython.cygrpc").addFilter(_is_of_use)


class _Call:
    """A call from grpc.aio. Implements `base.Call`."""

    __slots__ = ("_context", "_shape", "caller", "deadline", "is_answered", "refusal", "request", "who")

    def __init__(self, request: bytes, context: _Context, clock: Clock, shape: Shape | None) -> None:
        self._context = context
        self._shape = shape
        self.refusal: ServerError | None = None if shape is None else check_shape(shape, request)
        self.request = request if self.refusal is None else b""
        self.who = ANYBODY
        self.is_answered = False
        """Whether a reply was sent, and so the headers."""
        self.caller = context.peer()
        remaining: float | None = context.time_remaining()  # its type omits None
        self.deadline = math.inf if remaining is None else clock.monotonic() + remaining

    @property
    def certificate_names(self) -> Sequence[str]:
        known = self._context.auth_context()
        names = [name for name in known.get(_ALTERNATIVE_NAMES, ()) if name != _OTHER_NAME]
        return [name.decode(errors="replace") for name in names or known.get(_COMMON_NAME, ())]

    @property
    def is_late(self) -> bool:
        return self._context.time_remaining() == 0

    @property
    def metadata(self) -> Mapping[str, str | bytes]:
        return dict(self._context.invocation_metadata() or ())

    @property
    def metadata_keys(self) -> Sequence[str]:
        return [key for key, _ in self._context.invocation_metadata() or ()]

    async def read(self) -> bytes | None:
        request: Any = await self._context.read()
        if request is grpc.aio.EOF:
            return None
        error = None if self._shape is None else check_shape(self._shape, request)
        if error is not None:
            raise error
        return bytes(request)

    async def write(self, reply: bytes) -> None:
        self.is_answered = True
        try:
            await self._context.write(reply)
        except grpc.aio.InternalError:
            await asyncio.sleep(_GONE_S)  # the client has left: gRPC is about to cancel the call's task
            raise


class PythonFront:
    """Serves methods with grpc.aio, every message as a call. Implements `base.Front`."""

    name = "python"
    http_address: Address | None = None
    json: JsonCodec | None = None

    def __init__(self, clock: Clock, limits: FrontLimits) -> None:
        self.limits = limits
        self._clock = clock
        self._server = grpc.aio.server(options=_options(limits))
        self._healing: asyncio.Task[None] | None = None
        self._handlers: list[grpc.GenericRpcHandler] = []
        self._stopped: collections.deque[grpc.aio.Server] = collections.deque(maxlen=_MAX_STOPPED)
        """Servers that have stopped by themselves, and may still have calls."""
        self._calls = 0
        self._certificates: Certificates | None = None
        self._used: Certificates | None = None
        """The certificates that gRPC uses for new connections."""

    async def start(
        self,
        address: Address | UnixAddress,
        methods: Sequence[Method],
        steps: Steps,  # noqa: ARG002
        certificates: Certificates | None,
        http: HttpListener | None = None,
    ) -> Address | UnixAddress:
        """See `base.Front`."""
        assert http is None, "the settings refuse HTTP without the native front"
        services: dict[str, dict[str, Any]] = {}
        for method in methods:
            services.setdefault(method.service, {})[method.name] = self._handler(method)
        self._handlers = [
            grpc.method_handlers_generic_handler(name, handlers) for name, handlers in services.items()
        ]
        self._server.add_generic_rpc_handlers(self._handlers)
        bound = self._listen(address, certificates)
        self._healing = asyncio.create_task(self._heal(bound, await self._begin()))
        return bound

    async def _begin(self) -> set[asyncio.Task[Any]]:
        """Start gRPC's server. Returns its task, whose end is the only immediate sign of the server's end."""
        before = asyncio.all_tasks()
        await self._server.start()
        serving = _of_grpc() - before
        for task in serving:
            task.add_done_callback(_quieten)
        return serving

    async def _heal(self, address: Address | UnixAddress, serving: set[asyncio.Task[Any]]) -> None:
        """Restart gRPC's server if it stops by itself: a call whose path is not UTF-8 ends it.

        Running calls continue on the stopped server.
        """
        while serving:
            done, serving = await asyncio.wait(serving, return_when=asyncio.FIRST_COMPLETED)
            error = next((task.exception() for task in done if not task.cancelled()), None)
            if error is None:
                continue
            _log.warning("gRPC has stopped and is restarted", reason=f"{type(error).__name__}: {error}")
            self._stopped.append(self._server)
            self._server = grpc.aio.server(options=_options(self.limits))
            self._server.add_generic_rpc_handlers(self._handlers)
            while True:
                try:
                    self._listen(address, self._certificates)
                    break
                except BindError:  # gRPC releases the address later
                    await asyncio.sleep(_BIND_RETRY_S)
            serving = await self._begin()

    def _listen(
        self, address: Address | UnixAddress, certificates: Certificates | None
    ) -> Address | UnixAddress:
        try:
            if isinstance(address, Address):
                return address._replace(port=self._add_port(str(address), certificates))
            unix_socket.clear(address.path)
            with unix_socket.private():
                self._add_port(str(address), certificates)
        except RuntimeError as error:
            raise BindError(
                f"cannot listen on {address}: it is in use or not an address of this machine"
            ) from error
        except OSError as error:
            raise BindError(f"cannot listen on {address}: {error.strerror}") from error
        return address

    def _add_port(self, address: str, certificates: Certificates | None) -> int:
        if certificates is None:
            port: int = self._server.add_insecure_port(address)
            return port
        self._certificates = self._used = certificates
        credentials = grpc.dynamic_ssl_server_credentials(
            _as_grpc(certificates),
            self._changed,  # type: ignore[arg-type]  # its type omits None, for no change
            require_client_authentication=certificates.client_ca is not None,
        )
        secure_port: int = self._server.add_secure_port(address, credentials)
        return secure_port

    def _changed(self) -> grpc.ServerCertificateConfiguration | None:
        """Return changed certificates for the next connection, else None. gRPC's threads call it before each handshake."""
        current = self._certificates
        if current is self._used or current is None:
            return None
        self._used = current
        return _as_grpc(current)

    def set_fast_path(self, *, enabled: bool) -> None:
        """See `base.Front`. This front hands over every message as a call."""

    def ask_callers(self) -> None:
        """See `base.Front`. This front hands over every message as a call."""

    def know(self, credential: Credential, caller: Caller, until: float) -> None:
        """See `base.Front`."""

    def forget(self, credentials: Collection[Credential]) -> None:
        """See `base.Front`."""

    def secure(self, certificates: Certificates) -> None:
        """See `base.Front`."""
        self._certificates = certificates

    def counts(self) -> FrontCounts:
        """See `base.Front`. gRPC does not report its connections and refusals."""
        return FrontCounts({"calls": self._calls}, {})

    def take_durations(self) -> None:
        """See `base.Front`."""

    async def flush(self) -> None:
        """See `base.Front`. A call ends only after its replies are on their way."""

    async def stop(self, grace_s: float) -> None:
        """See `base.Front`."""
        if self._healing is not None:
            self._healing.cancel()
        await self._server.stop(grace_s)

    def _handler(self, method: Method) -> Any:
        async def handle(raw: Any, context: _Context) -> bytes | None:
            self._calls += 1
            call = _Call(b"" if method.streams else raw, context, self._clock, method.shape)
            del raw
            try:
                reply = await method.serve(call)
                return None if method.streams else reply
            except CallEnded as ended:
                status = ended.status
                trailers: list[tuple[str, str | bytes]] = [*status.trailers]
                if status.may_go_elsewhere and not call.is_answered:
                    trailers.append(GO_ELSEWHERE)  # without a reply, trailers are sent as headers
                call.request = b""  # gRPC keeps the exception of `abort`, whose traceback keeps this frame
                await context.abort(_CODES[status.code], status.message, tuple(trailers))
                raise  # not reached: abort raises
            finally:
                self._calls -= 1

        if method.streams:
            return grpc.stream_stream_rpc_method_handler(handle)
        return grpc.unary_unary_rpc_method_handler(handle)


def _of_grpc() -> set[asyncio.Task[Any]]:
    """Return gRPC's own tasks, whose compiled coroutines are not Python coroutines."""
    return {task for task in asyncio.all_tasks() if not isinstance(task.get_coro(), types.CoroutineType)}


def _quieten(_: asyncio.Task[Any]) -> None:
    """Retrieve the exception of gRPC's last task, which fails for the same reason and which nobody awaits."""
    for task in _of_grpc():
        task.add_done_callback(lambda ended: ended.cancelled() or ended.exception())


def _as_grpc(certificates: Certificates) -> grpc.ServerCertificateConfiguration:
    return grpc.ssl_server_certificate_configuration(
        [(certificates.key, certificates.chain)], certificates.client_ca
    )


def _options(limits: FrontLimits) -> list[tuple[str, int]]:
    options = [
        ("grpc.max_receive_message_length", limits.message_bytes),
        ("grpc.max_send_message_length", limits.message_bytes),
        ("grpc.max_concurrent_streams", limits.streams),
        ("grpc.max_metadata_size", limits.header_bytes),
        ("grpc.absolute_max_metadata_size", limits.header_bytes),
        # no compression: gRPC would inflate a message before its size can be refused
        ("grpc.compression_enabled_algorithms_bitset", 1),
        ("grpc.so_reuseport", 0),  # a second server on the port must fail, not share it
        # Clients on quiet streams may ping every second (Envoy does every three), and the server notices within a minute
        # that a client's machine has disappeared.
        ("grpc.http2.min_ping_interval_without_data_ms", 1_000),
        ("grpc.keepalive_permit_without_calls", 1),
        ("grpc.keepalive_time_ms", _milliseconds(limits.keepalive_s)),
        ("grpc.keepalive_timeout_ms", _milliseconds(limits.keepalive_timeout_s)),
        ("grpc.server_handshake_timeout_ms", _milliseconds(limits.handshake_s)),
    ]
    if limits.age_s:
        options += [
            ("grpc.max_connection_age_ms", _milliseconds(limits.age_s)),
            ("grpc.max_connection_age_grace_ms", _milliseconds(limits.age_grace_s)),
        ]
    return options


def _milliseconds(seconds: float) -> int:
    """Return milliseconds for gRPC. Its maximum, 25 days, stands for ever."""
    return math.ceil(min(seconds * 1000, 2**31 - 1))
