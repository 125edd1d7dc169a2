"""The one place where calls end: parsing, serialising, errors, request log and request metrics.

A behaviour of a servicer takes a message and returns one, or raises a `ServerError`. Around it, this
module makes sure of three things that a front would do otherwise:

- Bytes that are no message end a call with INVALID_ARGUMENT, not with INTERNAL and a stack trace.
- An unforeseen exception becomes an opaque INTERNAL with an id under which the log has the details.
- Each call ends with a status. gRPC sends none when `asyncio.CancelledError` leaves a handler, and the
  client waits for ever; so only the front's own cancellation, after which no one waits, may pass.
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
from stepwell_server.rpc.fronts.base import Call, CallEnded
from stepwell_server.rpc.fronts.shape import not_a_message
from stepwell_server.rpc.guard import Guard, Guarded
from stepwell_server.rpc.status import ANY_CODE, Status, to_status
from stepwell_server.rpc.tracing import TRACES, Tracer

_log = Log("rpc")
_Message = TypeVar("_Message", bound=Message)

#: Calls of which nothing is done where they end because a model is not loaded here. In others it may come up when a part is.
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
    """Who wants to know of calls and of what is refused."""

    def refused(self, reason: str, count: int, model: str = "") -> None:
        """``count`` calls, or changes of a frame, ended with an error of that reason; ``model`` if it is known."""

    def method_served(self, method: str, codes: Collection[str], *, streams: bool) -> None:
        """Calls of ``method`` may come, and end with ``codes``."""

    def request_done(self, method: str, code: str, seconds: float) -> None:
        """A call of ``method`` that is no stream ended with ``code`` (``OK``, ``NOT_FOUND``, ...) after ``seconds``."""

    def requests_done(self, method: str, code: str, seconds: npt.NDArray[np.float64]) -> None:
        """Several calls of ``method`` ended with ``code``."""

    def stream_began(self, method: str) -> None:
        """A stream was opened."""

    def stream_done(self, method: str, code: str) -> None:
        """A stream ended with ``code``."""

    def messages_done(self, method: str, seconds: npt.NDArray[np.float64]) -> None:
        """Messages of streams were answered, so many seconds after they had come."""


def parse(message_type: type[_Message], raw: bytes) -> _Message:
    """The message that ``raw`` is.

    Raises:
        InvalidInput: it is none.
    """
    try:
        return message_type.FromString(raw)
    except DecodeError as error:
        raise not_a_message(message_type.DESCRIPTOR.full_name, len(raw)) from error


class Boundary:
    """Makes of behaviours what a front serves. Lives on the event loop."""

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
        """None: nobody is asked."""
        self._auditor = auditor
        self._tracer = tracer
        """None: nothing is traced."""
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
        """Serves a method of one request and one reply, which may end with these status codes."""
        auditor, tracer = self._auditor, self._tracer

        async def answer(call: Call) -> bytes:
            if call.refusal is not None:
                raise call.refusal
            request = parse(request_type, call.request)
            if auditor is not None:
                auditor.parsed(method, request)
            if tracer is None and not _log.is_debug:  # else the end of the call looks at the bytes
                call.request = b""  # one copy of a large request is enough
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
                raise MessageTooLarge(f"the reply must be at most {limit} bytes; it would be {len(reply)}")
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
        """Serves a method of streams, whose behaviour reads and writes bytes by itself.

        `endless`: only the client ends it, and nobody waits for it when the server stops.
        """

        async def answer(call: Call) -> bytes:
            await behaviour(call)
            return b""

        return self._around(answer, method, None, codes, counts=not endless)

    def judging(self, method: str) -> Callable[[Call], None]:
        """Judges unary calls of a method by their metadata. What it refuses ends as it would where it is served."""
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
            guarded: Guarded | None = None
            try:
                tenancy.require_once(call.metadata_keys)
                if guard is not None:
                    found = guard.admit(call, method, access)
                    guarded = guard.enter(found) if streams else None
                elif access is not Access.ANYONE:
                    tenancy.require_no_tenant(call.metadata)
                if auditor is not None:
                    auditor.begins(method, call)
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
                    guarded = None  # it holds the task, and so its end and this frame
                seconds = time.perf_counter() - started
                self._running -= counts
                if self._running == 0:
                    self._idle.set()
                if streams:  # how long it was open says nothing of how long anything took
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
        self, raised: BaseException, guarded: Guarded | None, method: str, call: Call
    ) -> tuple[Status | None, str]:
        """The status and the reason with which a call ends that raised this.

        Without a status the front itself has cancelled the call; the reason is then the code for metrics.
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
    """What has each call of a path served by what stands in `serving` when it comes."""

    def serve(call: Call) -> Awaitable[bytes]:
        return serving.get(path, otherwise)(call)

    return serve


def _model_of(request: Message) -> str:
    """The model that a request names, by this protocol or Triton's; empty if it names none."""
    name: str = (
        getattr(request, "model", "") or getattr(request, "model_name", "") or getattr(request, "name", "")
    )
    return name.partition("@")[0].partition(":")[0]


def _facts(request_type: type[Message] | None, call: Call) -> dict[str, str]:
    """What of a request is worth a place in the log."""
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
    """What of a request is worth a place in a trace."""
    facts = _facts(request_type, call)
    session, model = facts.get("session_id", ""), facts.get("model", "")
    return {"session.id": session, "model": model, "tenant": call.who.tenant, "caller": call.who.name}


def internal(error: BaseException, **facts: object) -> ServerError:
    """The opaque error that stands for a defect, whose details go to the log."""
    return _log.internal("internal error", error, **facts)


def _is_cancelled_by_front() -> bool:
    """Whether the task itself was cancelled: the client is gone, its deadline passed, or the server ends.

    Otherwise a future that the task awaited was cancelled, which is a defect like any other.
    """
    task = asyncio.current_task()
    return task is not None and task.cancelling() > 0
