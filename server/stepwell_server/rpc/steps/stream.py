"""StepStream: frames in, parts of their replies out.

One task reads; none is made per message. It parses a frame and submits it; the engine hands over the parts
of its reply, some before `submit` returns, and each is written from there: see `outbox`.

What a stream holds is bounded: with too many frames, or too many bytes of requests and of replies to
come, not yet written to the client, reading stops until some are. A client that does not read its
replies therefore holds up itself.
"""

from __future__ import annotations

import asyncio
import dataclasses
from typing import TYPE_CHECKING

import grpc.aio

from stepwell.v1 import sessions_pb2 as pb
from stepwell_server.engine.api import Frame, Part, StepReply
from stepwell_server.errors import InvalidInput, ServerError, Unavailable
from stepwell_server.logs import Log
from stepwell_server.rpc.boundary import parse
from stepwell_server.rpc.steps import messages as frames
from stepwell_server.rpc.steps.pending import Pending
from stepwell_server.rpc.steps.write_queue import Outbox

if TYPE_CHECKING:
    from stepwell_server.clock import Clock
    from stepwell_server.engine.engine import Engine
    from stepwell_server.rpc.boundary import Context, RequestObserver
    from stepwell_server.rpc.sizes import ReplySizes

_log = Log("rpc.stream")
#: In place of what a frame holds, with a part that is not its last.
_NOT_LAST = -1


@dataclasses.dataclass(frozen=True, slots=True)
class StreamLimits:
    """What one stream may hold before reading stops."""

    frames: int
    """Frames whose last part is not written yet."""
    bytes: int
    """Bytes of their requests and of their whole replies."""


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
    ) -> None:
        self._engine = engine
        self._clock = clock
        self._sizes = sizes
        self._limits = limits
        self._observer = observer
        self._context = context
        self._source = context.peer()
        self.deadline = float("inf")
        self._pending: dict[int, Pending] = {}
        """Frames without their last part."""
        self._held_frames = 0
        self._held_bytes = 0
        self._outbox = Outbox(context.write, self._release, self._progressed)
        self._is_stopping = False
        self._is_ending = False
        """Stopping, or read to the end: what is answered now may be the last."""
        self.is_over = False
        self._reader: asyncio.Task[None] | None = None
        self._end: asyncio.Future[BaseException | None] = asyncio.get_running_loop().create_future()
        self._room: asyncio.Future[None] | None = None
        """The reader waits for something to be written."""

    async def run(self, deadline: float) -> None:
        """Serve the stream to its end.

        Raises:
            InvalidInput: the client sent bytes that are no frame.
            Unavailable: the server is stopping, and all frames are answered.
        """
        self.deadline = deadline
        self._reader = asyncio.create_task(self._read())
        self._reader.add_done_callback(lambda _: self._begin_end())
        try:
            error = await self._end
            if error is not None:
                raise error
        finally:
            self.is_over = True
            self._reader.cancel()
            self._cancel_frames()
            self._outbox.close()
            # Its own error, if it has one, has either ended the stream or comes too late to matter.
            await asyncio.gather(self._reader, return_exceptions=True)

    def stop(self) -> None:
        """End the stream with UNAVAILABLE as soon as its frames are answered."""
        self._is_stopping = True
        self._begin_end()

    async def _read(self) -> None:
        read, limits = self._context.read, self._limits
        while (raw := await read()) is not grpc.aio.EOF:
            self._accept(raw)
            if self._held_frames >= limits.frames or self._held_bytes >= limits.bytes:
                await self._wait_for_room()

    async def _wait_for_room(self) -> None:
        self._outbox.look()
        while self._held_frames >= self._limits.frames or self._held_bytes >= self._limits.bytes:
            self._outbox.watch()
            self._room = asyncio.get_running_loop().create_future()
            await self._room

    def _begin_end(self) -> None:
        self._is_ending = True
        self._end_if_due()

    def _end_if_due(self) -> None:
        """End the stream if it should and everything that was answered is written."""
        if self._end.done():
            return
        if not self._outbox.look():
            self._outbox.watch()
            return
        reader = self._reader
        if self._outbox.error is not None:
            self._end.set_result(self._outbox.error)
        elif reader is not None and reader.done() and not (self._pending and _ended_well(reader)):
            self._end.set_result(_error_of(reader))
        elif self._is_stopping and not self._pending:
            self._end.set_result(Unavailable("the server is stopping"))

    def _progressed(self) -> None:
        """Something was written, or cannot be: see `outbox`."""
        if self._outbox.error is not None:
            self._is_ending = True
        if self._is_ending:
            self._end_if_due()

    def _accept(self, raw: bytes) -> None:
        request = parse(pb.StepStreamRequest, raw)
        frame_id = request.frame_id
        pending = Pending(self, frame_id, len(raw))
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

    def _submit(self, request: pb.StepStreamRequest, pending: Pending) -> None:
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

    def _hold(self, pending: Pending, reply_bytes: int) -> None:
        pending.held_bytes += reply_bytes
        self._held_bytes += reply_bytes

    def on_part(self, pending: Pending, part: Part) -> None:
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

    def on_answer(self, pending: Pending, answer: StepReply | ServerError) -> None:
        """The engine has the answer to a frame of one session."""
        if self.is_over:
            return
        del self._pending[pending.frame_id]
        if isinstance(answer, ServerError):
            self._refuse(pending, answer)
        else:
            self._reply(pending, frames.from_answer(pending.frame_id, answer), last=True)

    def _refuse(self, pending: Pending, error: ServerError) -> None:
        """Answer a frame of which nothing was done."""
        self._observer.refused(error.reason, pending.members)
        self._reply(pending, frames.from_refusal(pending.frame_id, error), last=True)

    def _reply(self, pending: Pending, reply: bytes, *, last: bool) -> None:
        self._put(reply, pending.held_bytes if last else _NOT_LAST)
        if _log.is_debug:
            _log.debug("frame part", peer=self._source, frame=pending.frame_id, bytes=len(reply), last=last)

    def _put(self, reply: bytes, held_bytes: int) -> None:
        self._outbox.put(reply, held_bytes)
        if self._is_ending or self._outbox.error is not None:
            self._begin_end()

    def _release(self, held_bytes: int) -> None:
        if held_bytes == _NOT_LAST:
            return
        self._held_frames -= 1
        self._held_bytes -= held_bytes
        if self._room is not None:
            if not self._room.done():
                self._room.set_result(None)
            self._room = None

    def _cancel_frames(self) -> None:
        for pending in list(self._pending.values()):
            if pending.request is not None:
                self._engine.cancel(pending.request)


def _ended_well(reader: asyncio.Task[None]) -> bool:
    return not reader.cancelled() and reader.exception() is None


def _error_of(reader: asyncio.Task[None]) -> BaseException | None:
    return asyncio.CancelledError() if reader.cancelled() else reader.exception()
