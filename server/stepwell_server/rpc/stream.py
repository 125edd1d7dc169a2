"""StepStream: frames in, parts of their replies out.

Two coroutines serve a stream, none is made per message. The reader parses a frame and submits it; the
engine hands over the parts of its reply, some before `submit` returns; the writer sends them.
When parts are there right after a `submit`, the reader sends them itself and saves a turn of the loop.

What a stream holds is bounded: with too many frames, or too many bytes of requests and of replies to
come, not yet written to the client, reading stops until some are. A client that does not read its
replies therefore holds up itself.
"""

from __future__ import annotations

import asyncio
import dataclasses
from collections import deque
from typing import TYPE_CHECKING

import grpc.aio

from stepwell.v1 import sessions_pb2 as pb
from stepwell_server.engine.calls import Frame, Part, Single, StepReply
from stepwell_server.errors import InvalidInput, ServerError, Unavailable
from stepwell_server.logs import Log
from stepwell_server.rpc import frames
from stepwell_server.rpc.boundary import parse
from stepwell_server.rpc.fastlane import FastLane

if TYPE_CHECKING:
    from stepwell_server.clock import Clock
    from stepwell_server.engine.engine import Engine
    from stepwell_server.rpc.boundary import Context, RequestObserver
    from stepwell_server.rpc.sizes import ReplySizes

_log = Log("rpc.stream")


@dataclasses.dataclass(frozen=True, slots=True)
class StreamLimits:
    """What one stream may hold before reading stops."""

    frames: int
    """Frames whose last part is not written yet."""
    bytes: int
    """Bytes of their requests and of their whole replies."""


class _Pending:
    """A frame whose last part is not written yet. The engine answers to `on_part` or `settle`."""

    __slots__ = ("frame_id", "held_bytes", "request", "stream")

    def __init__(self, stream: FrameStream, frame_id: int, held_bytes: int) -> None:
        self.stream = stream
        self.frame_id = frame_id
        self.held_bytes = held_bytes
        self.request: Frame | Single | None = None

    @property
    def members(self) -> int:
        """Sessions of the frame; 1 if it could not be read, or names none."""
        return len(self.request.session_ids) or 1 if isinstance(self.request, Frame) else 1

    def on_part(self, part: Part) -> None:
        self.stream.on_part(self, part)

    def settle(self, answer: StepReply | ServerError) -> None:
        self.stream.on_answer(self, answer)


class FrameStream:
    """One StepStream call. Lives on the event loop."""

    def __init__(
        self,
        engine: Engine,
        clock: Clock,
        sizes: ReplySizes,
        limits: StreamLimits,
        observer: RequestObserver,
        context: Context,
        lane: FastLane,
    ) -> None:
        self._engine = engine
        self._clock = clock
        self._sizes = sizes
        self._limits = limits
        self._observer = observer
        self._context = context
        self._source = context.peer()
        self._lane = lane
        self.deadline = float("inf")
        self._pending: dict[int, _Pending | None] = {}
        """Frames without their last part; None: a plain step, which the lane has."""
        self._broken: ServerError | None = None
        self._held_frames = 0
        self._held_bytes = 0
        self._replies: deque[tuple[int, bytes]] = deque()
        self._is_writing = False
        self._is_stopping = False
        self.is_over = False
        self._work = asyncio.Event()
        """For the writer: something may be there to write, or the stream may end."""
        self._room = asyncio.Event()
        """For the reader: something was written."""

    async def run(self, deadline: float) -> None:
        """Serve the stream to its end.

        Raises:
            InvalidInput: the client sent bytes that are no frame.
            Unavailable: the server is stopping, and all frames are answered.
        """
        self.deadline = deadline
        reader = asyncio.create_task(self._read())
        reader.add_done_callback(lambda _: self._work.set())
        try:
            await self._write(reader)
        finally:
            self.is_over = True
            reader.cancel()
            self._cancel_frames()
            # Its own error, if it has one, has either ended the stream or comes too late to matter.
            await asyncio.gather(reader, return_exceptions=True)

    def stop(self) -> None:
        """End the stream with UNAVAILABLE as soon as its frames are answered."""
        self._is_stopping = True
        self._work.set()

    async def _read(self) -> None:
        read, take = self._context.read, self._lane.take
        while (raw := await read()) is not grpc.aio.EOF:
            if not take(self, raw):
                self._accept(raw)
            if self._replies and not self._is_writing:
                await self._flush()
            while self._is_full():
                self._room.clear()
                await self._room.wait()

    async def _write(self, reader: asyncio.Task[None]) -> None:
        while True:
            if self._replies and not self._is_writing:
                await self._flush()
            if self._broken is not None:
                raise self._broken
            if reader.done() and not (self._pending and _ended_well(reader)):
                return reader.result()
            if self._is_stopping and not self._pending and not self._is_writing:
                raise Unavailable("the server is stopping")
            self._work.clear()
            await self._work.wait()

    async def _flush(self) -> None:
        self._is_writing = True
        try:
            while self._replies:
                held, reply = self._replies.popleft()
                await self._context.write(reply)
                if held >= 0:
                    self._release(held)
        finally:
            self._is_writing = False
            if self._is_stopping:
                self._work.set()

    def _accept(self, raw: bytes) -> None:
        request = parse(pb.StepStreamRequest, raw)
        frame_id = request.frame_id
        pending = _Pending(self, frame_id, len(raw))
        self._held_frames += 1
        self._held_bytes += len(raw)
        if frame_id in self._pending:
            error = InvalidInput(f"frame_id must not be that of an unanswered frame; got {frame_id}")
            return self._refuse(pending, error)
        self._pending[frame_id] = pending
        try:
            self._submit(request, pending)
        except ServerError as error:
            del self._pending[frame_id]
            self._refuse(pending, error)

    def _submit(self, request: pb.StepStreamRequest, pending: _Pending) -> None:
        body = frames.change_of(request)
        if isinstance(body, pb.StepFrame) and len(body.session_ids) == 1:
            single = pending.request = frames.to_single(body, pending.settle)
            single.source, single.deadline = self._source, self._deadline_of(body)
            self._hold(pending, self._sizes.step(body.session_ids, single.inputs, single.select))
            self._engine.submit_single(single)
        else:
            frame = pending.request = frames.to_frame(body, pending.on_part)
            frame.source, frame.deadline = self._source, self._deadline_of(body)
            if frame.inputs is not None:
                self._hold(pending, self._sizes.step(frame.session_ids, frame.inputs, frame.select))
            self._engine.submit(frame)

    def _deadline_of(self, body: frames.Change) -> float:
        if not body.timeout_ms:
            return self.deadline
        return min(self.deadline, self._clock.monotonic() + body.timeout_ms / 1000)

    def _hold(self, pending: _Pending, reply_bytes: int) -> None:
        pending.held_bytes += reply_bytes
        self._held_bytes += reply_bytes

    def begin_plain(self, frame_id: int, size: int) -> bool:
        """See `fastlane.Stream`."""
        if frame_id in self._pending:
            return False
        self._pending[frame_id] = None
        self._held_frames += 1
        self._held_bytes += size
        return True

    def reply_plain(self, frame_id: int, size: int, reply: bytes) -> None:
        """See `fastlane.Stream`."""
        if self.is_over:
            return
        del self._pending[frame_id]
        self._replies.append((size, reply))
        if not self._is_writing:
            self._work.set()

    def fail_plain(self, frame_id: int, size: int, error: ServerError) -> None:
        """See `fastlane.Stream`."""
        self._observer.refused(error.reason, 1)
        self.reply_plain(frame_id, size, frames.from_refusal(frame_id, error))

    def send_alone(self, frame_id: int, size: int, raw: bytes) -> None:
        """See `fastlane.Stream`."""
        if self.is_over:
            return
        del self._pending[frame_id]
        self._release(size)
        try:
            self._accept(raw)
        except InvalidInput as error:
            self._broken = error
            self._work.set()

    def on_part(self, pending: _Pending, part: Part) -> None:
        """The engine has a part of the frame's reply."""
        if self.is_over:
            return
        frame = pending.request
        assert isinstance(frame, Frame)
        if part.last:
            del self._pending[pending.frame_id]
        for failure in part.failures:
            members = frame.session_ids if failure.members is None else failure.members
            self._observer.refused(failure.error.reason, len(members))
        self._reply(pending, frames.from_part(pending.frame_id, frame, part), last=part.last)

    def on_answer(self, pending: _Pending, answer: StepReply | ServerError) -> None:
        """The engine has the answer to a frame of one session."""
        if self.is_over:
            return
        del self._pending[pending.frame_id]
        if isinstance(answer, ServerError):
            self._refuse(pending, answer)
        else:
            self._reply(pending, frames.from_answer(pending.frame_id, answer), last=True)

    def _refuse(self, pending: _Pending, error: ServerError) -> None:
        """Answer a frame of which nothing was done."""
        self._observer.refused(error.reason, pending.members)
        self._reply(pending, frames.from_refusal(pending.frame_id, error), last=True)

    def _reply(self, pending: _Pending, reply: bytes, *, last: bool) -> None:
        self._replies.append((pending.held_bytes if last else -1, reply))
        if not self._is_writing:
            self._work.set()
        if _log.is_debug:
            _log.debug("frame part", peer=self._source, frame=pending.frame_id, bytes=len(reply), last=last)

    def _release(self, held_bytes: int) -> None:
        self._held_frames -= 1
        self._held_bytes -= held_bytes
        self._room.set()

    def _is_full(self) -> bool:
        return self._held_frames >= self._limits.frames or self._held_bytes >= self._limits.bytes

    def _cancel_frames(self) -> None:
        for pending in list(self._pending.values()):
            if pending is not None and pending.request is not None:
                self._engine.cancel(pending.request)


def _ended_well(reader: asyncio.Task[None]) -> bool:
    return not reader.cancelled() and reader.exception() is None
