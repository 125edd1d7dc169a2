"""The one place where calls end: parsing, serialising, errors, request log and request metrics.

A behaviour of a servicer takes a message and returns one, or raises a `ServerError`. Around it, this
module makes sure of three things that gRPC would do otherwise:

- Bytes that are no message end a call with INVALID_ARGUMENT, not with INTERNAL and a stack trace.
- An unforeseen exception becomes an opaque INTERNAL with an id under which the log has the details.
- Each call ends with a status. gRPC sends none when `asyncio.CancelledError` leaves a handler, and the
  client waits for ever; so only gRPC's own cancellation, after which no one waits, may pass.
"""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import Awaitable, Callable
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

import grpc
import grpc.aio
from google.protobuf.message import DecodeError, Message

from stepwell_server.errors import Internal, InvalidInput, MessageTooLarge, ServerError
from stepwell_server.logs import Log
from stepwell_server.rpc.status import to_status

if TYPE_CHECKING:
    from stepwell_server.clock import Clock

_log = Log("rpc")
_Message = TypeVar("_Message", bound=Message)

#: The type of a request, and its bytes.
_Request = tuple[type[Message], bytes]
#: A call as gRPC hands it over: requests and replies are bytes, this module turns them into messages.
Context = grpc.aio.ServicerContext[Any, Any]
UnaryBehaviour = Callable[[Any, Context], Awaitable[Message]]
StreamBehaviour = Callable[[Context], Awaitable[None]]


class RequestObserver(Protocol):
    """Who wants to know of calls and of what is refused."""

    def refused(self, reason: str, count: int) -> None:
        """``count`` calls, or changes of a frame, ended with an error of that reason."""

    def request_done(self, method: str, code: str, seconds: float) -> None:
        """A call of ``method`` ended with ``code`` (``OK``, ``NOT_FOUND``, ...) after ``seconds``."""


def parse(message_type: type[_Message], raw: bytes) -> _Message:
    """The message that ``raw`` is.

    Raises:
        InvalidInput: it is none.
    """
    try:
        return message_type.FromString(raw)
    except DecodeError as error:
        name = message_type.DESCRIPTOR.full_name
        raise InvalidInput(f"request must be a {name}; got {len(raw)} bytes that are none") from error


class Boundary:
    """Makes gRPC handlers of behaviours. Lives on the event loop."""

    def __init__(self, observer: RequestObserver, max_message_bytes: int) -> None:
        self._observer = observer
        self._max_message_bytes = max_message_bytes
        self._running = 0
        self._idle: asyncio.Future[None] | None = None
        """Someone waits until no call is running."""

    def unary(self, method: str, behaviour: UnaryBehaviour, request_type: type[Message]) -> Any:
        """A handler for one request and one reply."""

        async def handle(raw: bytes, context: Context) -> bytes:
            started = self._begin()
            try:
                reply = (await behaviour(parse(request_type, raw), context)).SerializeToString()
                if len(reply) > self._max_message_bytes:
                    raise self._too_large(reply)
            except (Exception, asyncio.CancelledError) as error:
                await self._fail(error, context, method, (request_type, raw), started)
                raise  # not reached: _fail always raises
            self._end(method, "OK", started, (request_type, raw))
            return reply

        return grpc.unary_unary_rpc_method_handler(handle)

    def stream(self, method: str, behaviour: StreamBehaviour) -> Any:
        """A handler for streams both ways, whose behaviour reads and writes bytes by itself."""

        async def handle(_requests: object, context: Context) -> None:
            started = self._begin()
            try:
                await behaviour(context)
            except (Exception, asyncio.CancelledError) as error:
                await self._fail(error, context, method, None, started)
            self._end(method, "OK", started, None)

        return grpc.stream_stream_rpc_method_handler(handle)

    async def wait_idle(self) -> None:
        """Return as soon as no call is running."""
        if self._running:
            self._idle = self._idle or asyncio.get_running_loop().create_future()
            await asyncio.shield(self._idle)

    def _too_large(self, reply: bytes) -> MessageTooLarge:
        limit = self._max_message_bytes
        return MessageTooLarge(f"the reply must be at most {limit} bytes; it would be {len(reply)}")

    async def _fail(
        self,
        error: BaseException,
        context: Context,
        method: str,
        request: _Request | None,
        started: float,
    ) -> None:
        """End the call with the status of ``error``, and this coroutine with an exception."""
        if isinstance(error, asyncio.CancelledError) and _is_cancelled_by_grpc():
            code = "DEADLINE_EXCEEDED" if context.time_remaining() == 0 else "CANCELLED"
            self._end(method, code, started, request)
            raise error
        known = error if isinstance(error, ServerError) else internal(error, method=method)
        status = to_status(known)
        self._observer.refused(known.reason, 1)
        self._end(method, status.code.name, started, request)
        await context.abort(status.code, status.message, status.trailers)

    def _begin(self) -> float:
        self._running += 1
        return time.perf_counter()

    def _end(self, method: str, code: str, started: float, request: _Request | None) -> None:
        seconds = time.perf_counter() - started
        self._running -= 1
        if self._running == 0 and self._idle is not None:
            self._idle.set_result(None)
            self._idle = None
        self._observer.request_done(method, code, seconds)
        if _log.is_debug:
            _log.debug("request", method=method, **_facts(request), status=code, duration_ms=seconds * 1000)


def deadline_of(context: Context, clock: Clock) -> float:
    """The call's deadline on the clock's monotonic time; infinity if it has none."""
    remaining: float | None = context.time_remaining()  # its type forgets that there may be none
    return math.inf if remaining is None else clock.monotonic() + remaining


def _facts(request: _Request | None) -> dict[str, str]:
    """What of a request is worth a place in the log."""
    if request is None:
        return {}
    request_type, raw = request
    try:
        message = request_type.FromString(raw)
    except DecodeError:
        return {}
    return {name: getattr(message, name) for name in ("session_id", "model") if hasattr(message, name)}


def internal(error: BaseException, **facts: object) -> Internal:
    """The opaque error that stands for a defect, whose details go to the log."""
    return _log.internal("internal error", error, **facts)


def _is_cancelled_by_grpc() -> bool:
    """Whether the task itself was cancelled: the client is gone, its deadline passed, or the server ends.

    Otherwise a future that the task awaited was cancelled, which is a defect like any other.
    """
    task = asyncio.current_task()
    return task is not None and task.cancelling() > 0
