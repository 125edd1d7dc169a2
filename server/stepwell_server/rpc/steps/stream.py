"""StepStream: reads frames and writes the parts of their replies.

One task per stream reads, and no task is created per message. It parses a frame and submits it. The engine hands over the
parts of the reply, some before `submit` returns, and each part is written at once: see `write_queue`.

The memory of a stream is bounded: reading pauses while too many frames, or too many bytes of requests and expected replies,
are not yet written to the client. So a client that does not read its replies delays only itself.
"""

from __future__ import annotations

import asyncio
import dataclasses
from collections.abc import Sequence
from typing import TYPE_CHECKING, Protocol

import numpy as np

from stepwell.v1 import sessions_pb2 as pb
from stepwell_server.engine.types import Members
from stepwell_server.errors import ServerError, Stopping
from stepwell_server.logs import Log
from stepwell_server.rpc.audit import step_actions
from stepwell_server.rpc.boundary import parse
from stepwell_server.rpc.status import code_of
from stepwell_server.rpc.steps import messages
from stepwell_server.rpc.steps.write_queue import WriteQueue

if TYPE_CHECKING:
    from stepwell_server.clock import Clock
    from stepwell_server.engine.change import Change, Reply
    from stepwell_server.engine.engine import Engine
    from stepwell_server.rpc.audit import Auditor
    from stepwell_server.rpc.boundary import RequestObserver
    from stepwell_server.rpc.fronts.base import Call
    from stepwell_server.rpc.tracing import CallTrace, Tracer

_log = Log("rpc.stream")
#: Instead of the bytes that a frame holds, for a part that is not its last.
_NOT_LAST = -1


@dataclasses.dataclass(frozen=True, slots=True)
class StreamLimits:
    """Limits of a stream, at which reading pauses."""

    frames: int
    """Number of frames whose last part is not written yet."""
    bytes: int
    """Bytes of their requests and of their complete replies."""


class Stream(Protocol):
    """A call with a stream of changes."""

    async def run(self) -> None:
        """Read, submit and answer until the client has ended."""

    def stop(self) -> None:
        """End with UNAVAILABLE once everything is answered."""


class Streams:
    """The running streams of a servicer. Lives on the event loop."""

    def __init__(self) -> None:
        self._running: set[Stream] = set()
        self._is_stopping = False

    async def run(self, stream: Stream) -> None:
        """Serve a stream to its end."""
        self._running.add(stream)
        if self._is_stopping:
            stream.stop()
        try:
            await stream.run()
        finally:
            self._running.discard(stream)

    def refuse(self) -> None:
        """End every new stream with UNAVAILABLE, before anything is read from it."""
        self._is_stopping = True

    def stop(self) -> None:
        """Refuse new streams, and end running ones once their frames are answered."""
        self.refuse()
        for stream in self._running:
            stream.stop()


class FrameStream:
    """One StepStream call. Lives on the event loop."""

    def __init__(
        self,
        engine: Engine,
        clock: Clock,
        max_reply_bytes: int,
        limits: StreamLimits,
        observer: RequestObserver,
        call: Call,
        tracer: Tracer | None = None,
        auditor: Auditor | None = None,
    ) -> None:
        self._engine = engine
        self._auditor = auditor
        self._tracer = tracer
        self._clock = clock
        self._max_reply_bytes = max_reply_bytes
        self._limits = limits
        self._observer = observer
        self._call = call
        self._caller = call.caller
        self._pending: dict[int, _Frame] = {}
        """Frames whose last part is not sent."""
        self._held_frames = 0
        self._held_bytes = 0
        self._replies = WriteQueue(call.write, self._release, self._progressed)
        self._is_stopping = False
        self._is_ending = False
        """Stopping, or read to the end: the next reply may be the last one."""
        self.is_over = False
        self._reader: asyncio.Task[None] | None = None
        self._end: asyncio.Future[BaseException | None] = asyncio.get_running_loop().create_future()
        self._room: asyncio.Future[None] | None = None
        """The future of a reader that waits for a write."""

    async def run(self) -> None:
        """Serve the stream to its end.

        Raises:
            InvalidInput: the client sent bytes that are not a frame.
            Stopping: the server is stopping, and all frames are answered.
        """
        self._reader = asyncio.create_task(self._read())
        self._reader.add_done_callback(lambda _: self._begin_end())
        try:
            error = await self._end
            if error is not None:
                raise error
        finally:
            self.is_over = True
            self._reader.cancel()
            self._replies.close()
            # The reader's own error has either ended the stream or comes too late to matter.
            await asyncio.gather(self._reader, return_exceptions=True)
            self._reader = None  # breaks a cycle: its exception refers to frames, which refer to this stream

    def stop(self) -> None:
        """End the stream with UNAVAILABLE once its frames are answered."""
        self._is_stopping = True
        self._begin_end()

    async def _read(self) -> None:
        read, limits = self._call.read, self._limits
        while (raw := await read()) is not None:
            self._accept(raw)
            if self._held_frames >= limits.frames or self._held_bytes >= limits.bytes:
                await self._wait_for_room()

    async def _wait_for_room(self) -> None:
        self._replies.look()
        while self._held_frames >= self._limits.frames or self._held_bytes >= self._limits.bytes:
            self._replies.watch()
            self._room = asyncio.get_running_loop().create_future()
            await self._room

    def _begin_end(self) -> None:
        self._is_ending = True
        self._end_if_due()

    def _end_if_due(self) -> None:
        """End the stream if it should end and all replies are written."""
        if self._end.done():
            return
        if not self._replies.look():
            self._replies.watch()
            return
        reader = self._reader
        if self._replies.error is not None:
            self._end.set_result(self._replies.error)
        elif reader is not None and reader.done() and not (self._pending and _ended_well(reader)):
            self._end.set_result(_error_of(reader))
        elif self._is_stopping and not self._pending:
            self._end.set_result(Stopping("the server is stopping"))

    def _progressed(self) -> None:
        """A watched write has ended or failed: see `write_queue`."""
        if self._replies.error is not None:
            self._is_ending = True
        if self._is_ending:
            self._end_if_due()

    def _accept(self, raw: bytes) -> None:
        request = parse(pb.StepStreamRequest, raw)
        frame = _Frame(self, request.frame_id, len(raw), self._clock.monotonic())
        self._held_frames += 1
        self._held_bytes += len(raw)
        if frame.frame_id in self._pending:
            return self._refuse(frame, messages.same_frame_id(frame.frame_id))
        self._pending[frame.frame_id] = frame
        try:
            self._submit(request, frame)
        except ServerError as error:
            del self._pending[frame.frame_id]
            self._refuse(frame, error)

    def _submit(self, request: pb.StepStreamRequest, frame: _Frame) -> None:
        body = messages.body_of(request)
        change = messages.of_frame(body, frame, self._call.who)
        frame.size = frame.left = change.size
        frame.is_short = messages.has_short_reply(body)
        change.connection, change.deadline = self._caller, self._deadline_of(body)
        messages.limit_reply(change, self._max_reply_bytes)
        if self._tracer is not None:
            frame.trace = self._tracer.of_frame("StepStream", body.traceparent)
            if frame.trace is not None:
                change.traces = {0: frame.trace}
        if self._auditor is not None:
            frame.actions = _actions(change, body)
            if frame.actions:
                self._auditor.require_room()
                frame.audited = change.session_ids
        frame.change = change
        self._engine.submit(change)
        self._hold(frame)

    def _deadline_of(self, body: messages.FrameBody) -> float:
        if not body.timeout_ms:
            return self._call.deadline
        return min(self._call.deadline, self._clock.monotonic() + body.timeout_ms / 1000)

    def _hold(self, frame: _Frame) -> None:
        """Count the bytes of the expected reply, once the engine has computed them."""
        if frame.change is not None:
            frame.held_bytes += frame.change.reply_bytes
            self._held_bytes += frame.change.reply_bytes
            frame.change = None

    def answer(self, frame: _Frame, reply: bytes, *, last: bool) -> None:
        """Send a part of a frame's reply."""
        self._hold(frame)
        if last:
            del self._pending[frame.frame_id]
        self._reply(frame, reply, last=last)

    def refused(self, error: ServerError, count: int) -> None:
        """Members of a frame failed."""
        self._observer.refused(error.reason, count, error.model)

    def ended(self, frame: _Frame) -> None:
        """A frame was completed or refused. Frames that reset or read states go to the audit log."""
        if self._auditor is not None:
            reason = "" if frame.error is None else frame.error.reason
            for action in frame.actions:
                self._auditor.frame_ended(self._call, action, frame.audited, frame.failures, reason)

    def _refuse(self, frame: _Frame, error: ServerError) -> None:
        """Answer a frame that was refused as a whole."""
        frame.error, frame.failures, frame.change = error, frame.size, None  # the change refers to the frame
        self.refused(error, frame.size or 1)
        self.ended(frame)
        part = messages.failed_part(frame.frame_id, None, error, last=True)
        self._reply(frame, part, last=True)

    def _reply(self, frame: _Frame, reply: bytes, *, last: bool) -> None:
        if last:
            if frame.trace is not None:
                _end_trace(frame.trace, frame.error, frame.size)
            took = self._clock.monotonic() - frame.came
            self._observer.messages_done("StepStream", np.array([took]))
        self._replies.put(reply, frame.held_bytes if last else _NOT_LAST)
        if self._is_ending or self._replies.error is not None:
            self._begin_end()
        if _log.is_debug:
            _log.debug("frame part", peer=self._caller, frame=frame.frame_id, bytes=len(reply), last=last)

    def _release(self, held_bytes: int) -> None:
        if held_bytes == _NOT_LAST:
            return
        self._held_frames -= 1
        self._held_bytes -= held_bytes
        if self._room is not None:
            if not self._room.done():
                self._room.set_result(None)
            self._room = None


class _Frame:
    """A frame whose last part is not written yet: the replies to its change."""

    __slots__ = (
        *("_stream", "actions", "audited", "came", "change", "error", "failures"),
        *("frame_id", "held_bytes", "is_short", "left", "size", "trace"),
    )

    def __init__(self, stream: FrameStream, frame_id: int, held_bytes: int, came: float) -> None:
        self._stream = stream
        self.came = came
        """On the clock's monotonic time."""
        self.frame_id = frame_id
        self.held_bytes = held_bytes
        self.change: Change | None = None
        """The submitted change, until the bytes of the reply are counted."""
        self.size = 0
        """Number of its sessions; 0 if it could not be parsed."""
        self.left = 0
        """Number of unanswered sessions."""
        self.is_short = False
        """Whether its sender accepts a single number for all sessions."""
        self.trace: CallTrace | None = None
        self.error: ServerError | None = None
        """The latest error of a member."""
        self.failures = 0
        """Number of members that failed."""
        self.actions: Sequence[str] = ()
        """Its actions in the audit log, one per line."""
        self.audited: Sequence[str] = ()
        """The sessions in those lines."""

    def applied(self, members: Members, reply: Reply) -> None:
        last = self._is_last(len(members))
        if last:
            self._stream.ended(self)
        if not self._stream.is_over:
            part = messages.applied_part(
                self.frame_id,
                self._named(members),
                reply,
                last=last,
                is_short=self.is_short,
            )
            self._stream.answer(self, part, last=last)

    def failed(self, members: Members, error: ServerError) -> None:
        last = self._is_last(len(members))
        self.error = error
        self.failures += len(members)
        if last:
            self._stream.ended(self)
        if not self._stream.is_over:
            self._stream.refused(error, len(members))
            part = messages.failed_part(self.frame_id, self._named(members), error, last=last)
            self._stream.answer(self, part, last=last)

    def cancelled(self, members: Members) -> Members:
        return members if self._stream.is_over else members[:0]

    def _is_last(self, answered: int) -> bool:
        self.left -= answered
        return self.left == 0

    def _named(self, members: Members) -> Members | None:
        return None if len(members) == self.size else members


def _actions(change: Change, body: messages.FrameBody) -> Sequence[str]:
    """Return the audited actions of a frame."""
    if change.reset:
        return ("reset",)
    if not isinstance(body, pb.StepFrame):
        return ()
    resets = change.reset_rows is not None and bool(change.reset_rows.any())
    return step_actions(reset=resets, states=body.states)


def _end_trace(trace: CallTrace, error: ServerError | None, sessions: int) -> None:
    facts = {"sessions": sessions}
    if error is None:
        trace.end("OK", "", facts)
    else:
        trace.end(code_of(error).name, error.reason, facts)


def _ended_well(reader: asyncio.Task[None]) -> bool:
    return not reader.cancelled() and reader.exception() is None


def _error_of(reader: asyncio.Task[None]) -> BaseException | None:
    return asyncio.CancelledError() if reader.cancelled() else reader.exception()
