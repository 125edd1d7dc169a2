"""Wraps every call: parses the request, serialises the reply, converts errors, and writes the request log and metrics.

A behaviour of a servicer takes a message and returns one, or raises a `ServerError`. This module guarantees:

- Bytes that are not a message end a call with INVALID_ARGUMENT, not with INTERNAL and a stack trace.
- An unexpected exception becomes an opaque INTERNAL with an id, under which the log has the details.
- Every call ends with a status. gRPC sends none if `asyncio.CancelledError` leaves a handler, and the client would wait
  for ever. So only the front's own cancellation may pass, after which no client waits.
"""

from __future__ import annotations

import asyncio
import dataclasses
import time
from collections.abc import Awaitable, Callable, Collection, Coroutine, Mapping
from typing import Any, Protocol, TypeVar

import numpy as np
import numpy.typing as npt
from google.protobuf.message import DecodeError, Message

from stepwell_server.core.callers import ANYBODY
from stepwell_server.errors import (
    MessageTooLarge,
    ModelLoading,
    ServerError,
    release_frames,
)
from stepwell_server.logs import Log
from stepwell_server.rpc import tenancy
from stepwell_server.rpc.access import Access, access_of
from stepwell_server.rpc.audit import AUDITED, UNAUDITED, Auditor
from stepwell_server.rpc.fronts.base import Call, CallEnded, Durations
from stepwell_server.rpc.fronts.shape import not_a_message
from stepwell_server.rpc.guard import Guard, GuardedStream
from stepwell_server.rpc.status import ANY_CODE, Status, to_status
from stepwell_server.rpc.tracing import TRACES, Tracer

_log = Log("rpc")
_Message = TypeVar("_Message", bound=Message)

#: Methods that have done nothing if they fail because a model is not loaded. Others may fail after they have done a part.
_WHOLE = frozenset(
    {
        *("OpenSession", "OpenSessions", "Step", "ResetStates", "ForkSession", "ForkSessions"),
        *("GetSession", "GetState", "GetStates", "Predict", "GetModel"),
    }
)

UnaryBehaviour = Callable[[Any, Call], Awaitable[Message]]
StreamBehaviour = Callable[[Call], Awaitable[None]]
Serve = Callable[[Call], Coroutine[Any, Any, bytes]]


class RequestObserver(Protocol):
    """Counts calls and refusals."""

    def refused(self, reason: str, count: int, model: str = "") -> None:
        """``count`` calls, or changes of a frame, ended with an error of that reason; ``model`` if it is known."""

    def method_served(self, method: str, codes: Collection[str], *, streams: bool) -> None:
        """The server takes calls of ``method``, which end with one of ``codes``."""

    def request_done(self, method: str, code: str, seconds: float) -> None:
        """A unary call of ``method`` ended with ``code`` (``OK``, ``NOT_FOUND``, ...) after ``seconds``."""

    def requests_done(self, method: str, code: str, seconds: npt.NDArray[np.float64]) -> None:
        """Several calls of ``method`` ended with ``code``."""

    def stream_began(self, method: str) -> None:
        """A stream was opened."""

    def stream_done(self, method: str, code: str) -> None:
        """A stream ended with ``code``."""

    def messages_done(self, method: str, seconds: npt.NDArray[np.float64]) -> None:
        """Messages of streams were answered, in these times since their arrival."""

    def answered(self, method: str, stream_method: str, calls: Durations, messages: Durations) -> None:
        """Calls ended with ``OK``, and messages of streams were answered, in durations that a front has counted."""


def parse(message_type: type[_Message], raw: bytes) -> _Message:
    """Parse a message.

    Raises:
        InvalidInput: the bytes are not a message of this type.
    """
    try:
        return message_type.FromString(raw)
    except DecodeError as error:
        raise not_a_message(message_type.DESCRIPTOR.full_name, len(raw)) from error


class Boundary:
    """Turns behaviours of servicers into functions that a front can serve. Lives on the event loop."""

    def __init__(
        self,
        observer: RequestObserver,
        max_message_bytes: int,
        guard: Guard | None = None,
        auditor: Auditor | None = None,
        tracer: Tracer | None = None,
    ) -> None:
        self._observer = observer
        self._guard = guard
        """None: callers are not authenticated."""
        self._auditor = auditor
        self._tracer = tracer
        """None: no tracing."""
        self._max_message_bytes = max_message_bytes
        self._running = 0
        self._idle = asyncio.Event()

    def unary(
        self,
        method: str,
        behaviour: UnaryBehaviour,
        request_type: type[Message],
        codes: Collection[str] = ANY_CODE,
    ) -> Serve:
        """Return the function that serves a unary method, whose calls may end with these status codes."""
        auditor, tracer = self._auditor, self._tracer

        async def answer(call: Call) -> bytes:
            if call.refusal is not None:
                raise call.refusal
            request = parse(request_type, call.request)
            if auditor is not None:
                auditor.parsed(method, request)
            if tracer is None and not _log.is_debug:  # otherwise the end of the call needs the bytes
                call.request = b""  # do not keep two copies of a large request
            try:
                message = await behaviour(request, call)
            except ServerError as error:
                error.model = error.model or _model_of(request)
                if auditor is not None:
                    auditor.failed(method, call, request, error)
                raise
            if auditor is not None:
                auditor.done(method, call, request, message)
            reply: bytes = message.SerializeToString()
            limit = self._max_message_bytes
            if len(reply) > limit:
                raise MessageTooLarge(f"the reply must be at most {limit} bytes; it would have {len(reply)}")
            return reply

        return self._around(answer, method, request_type, codes)

    def stream(
        self,
        method: str,
        behaviour: StreamBehaviour,
        codes: Collection[str] = ANY_CODE,
        *,
        endless: bool = False,
    ) -> Serve:
        """Return the function that serves a streaming method, whose behaviour reads and writes bytes itself.

        `endless`: only the client ends the stream, and a stopping server does not wait for it.
        """

        async def answer(call: Call) -> bytes:
            await behaviour(call)
            return b""

        return self._around(answer, method, None, codes, counts=not endless)

    def judging(self, method: str) -> Callable[[Call], None]:
        """Return a function that checks unary calls of a method by their metadata. It refuses them as `unary` would."""
        guard, access = self._guard, access_of(method)

        def judge(call: Call) -> None:
            if guard is None or access is Access.ANYONE:
                return
            try:
                tenancy.require_once(call.metadata_keys)
                guard.admit(call, method, access)
            except Exception as raised:
                status, reason = self._end_of(raised, None, method, call)
                assert status is not None, reason
                self._observer.request_done(method, status.code.name, 0.0)
                if _log.is_debug:
                    facts = _facts(None, call)
                    _log.debug("request", method=method, **facts, status=status.code.name, duration_ms=0.0)
                release_frames(raised)
                raise CallEnded(status) from None

        return judge

    async def wait_idle(self) -> None:
        """Return as soon as no call is running."""
        if self._running:
            self._idle.clear()
            await self._idle.wait()

    def _around(
        self,
        answer: Callable[[Call], Awaitable[bytes]],
        method: str,
        request_type: type[Message] | None,
        codes: Collection[str],
        *,
        counts: bool = True,
    ) -> Serve:
        observer, streams, access = self._observer, request_type is None, access_of(method)
        guard = None if access is Access.ANYONE else self._guard
        auditor = self._auditor
        assert method in AUDITED or method in UNAUDITED, (
            f"{method}: list it in AUDITED or UNAUDITED (audit.py)"
        )
        tracer = None if access is Access.ANYONE or not counts else self._tracer
        observer.method_served(method, codes, streams=streams)

        async def serve(call: Call) -> bytes:
            started, code, reason = time.perf_counter(), "OK", ""
            trace = None if tracer is None else tracer.of_call(method, call.metadata)
            if trace is not None:
                TRACES.set({0: trace})
            self._running += counts
            if streams:
                observer.stream_began(method)
            guarded: GuardedStream | None = None
            try:
                tenancy.require_once(call.metadata_keys)
                if guard is not None:
                    found = guard.admit(call, method, access)
                    guarded = guard.enter(found) if streams else None
                elif access is not Access.ANYONE:
                    tenancy.require_no_tenant(call.metadata)
                if auditor is not None:
                    auditor.started(method, call)
                return await answer(call)
            except (Exception, asyncio.CancelledError) as raised:
                status, reason = self._end_of(raised, guarded, method, call)
                if status is None:
                    code = reason
                    raise
                code = status.code.name
                release_frames(raised)
                raise CallEnded(status) from None
            finally:
                if guard is not None and guarded is not None:
                    guard.leave(guarded)
                    guarded = None  # it refers to the task, which refers to this frame
                seconds = time.perf_counter() - started
                self._running -= counts
                if self._running == 0:
                    self._idle.set()
                if streams:  # the lifetime of a stream is not the duration of any work
                    observer.stream_done(method, code)
                else:
                    observer.request_done(method, code, seconds)
                if trace is not None:
                    trace.end(code, reason, _traced(request_type, call))
                if _log.is_debug:
                    facts = _facts(request_type, call)
                    _log.debug("request", method=method, **facts, status=code, duration_ms=seconds * 1000)

        return serve

    def _end_of(
        self, raised: BaseException, guarded: GuardedStream | None, method: str, call: Call
    ) -> tuple[Status | None, str]:
        """Return the status and the reason of a call that ends with this exception.

        The status is None if the front itself cancelled the call. The reason is then the code for metrics.
        """
        error = raised if guarded is None else guarded.instead_of(raised)
        auditor = self._auditor
        if isinstance(error, asyncio.CancelledError) and _is_cancelled_by_front():
            code = "DEADLINE_EXCEEDED" if call.is_late else "CANCELLED"
            if auditor is not None:
                auditor.cancelled(method, call, code)
            return None, code
        known = error if isinstance(error, ServerError) else internal(error, method=method)
        status = to_status(known)
        if isinstance(known, ModelLoading) and method not in _WHOLE:
            status = dataclasses.replace(status, may_go_elsewhere=False)
        self._observer.refused(known.reason, 1, known.model)
        if auditor is not None:
            auditor.refused(method, call, known)
        return status, known.reason


def served_at(
    path: str, serving: Mapping[str, Serve], otherwise: Serve
) -> Callable[[Call], Awaitable[bytes]]:
    """Return a function that serves each call of a path by the entry that `serving` has at that moment."""

    def serve(call: Call) -> Awaitable[bytes]:
        return serving.get(path, otherwise)(call)

    return serve


def _model_of(request: Message) -> str:
    """Return the model that a request of either protocol names; empty if it names none."""
    name: str = (
        getattr(request, "model", "") or getattr(request, "model_name", "") or getattr(request, "name", "")
    )
    return name.partition("@")[0].partition(":")[0]


def _facts(request_type: type[Message] | None, call: Call) -> dict[str, str]:
    """Return the facts about a request for the log."""
    facts = {"certificate": ",".join(names)} if (names := call.certificate_names) else {}
    if call.who is not ANYBODY:
        facts["who"] = str(call.who)
    if request_type is None:
        return facts
    try:
        message = request_type.FromString(call.request)
    except DecodeError:
        return facts
    return facts | {
        name: getattr(message, name) for name in ("session_id", "model") if hasattr(message, name)
    }


def _traced(request_type: type[Message] | None, call: Call) -> dict[str, str | int]:
    """Return the facts about a request for a trace."""
    facts = _facts(request_type, call)
    session, model = facts.get("session_id", ""), facts.get("model", "")
    return {"session.id": session, "model": model, "tenant": call.who.tenant, "caller": call.who.name}


def internal(error: BaseException, **facts: object) -> ServerError:
    """Log a bug with its details, and return the opaque error for the caller."""
    return _log.internal("internal error", error, **facts)


def _is_cancelled_by_front() -> bool:
    """Whether the task itself was cancelled: the client is gone, its deadline passed, or the server ends.

    Otherwise a future that the task awaited was cancelled, which is a defect like any other.
    """
    task = asyncio.current_task()
    return task is not None and task.cancelling() > 0
