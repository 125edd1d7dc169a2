"""Unary Step: bytes in, bytes out. Plain steps take the fast lane, the others the general way."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

from stepwell.v1 import sessions_pb2 as pb
from stepwell_server.engine.calls import Single, StepReply
from stepwell_server.errors import ServerError
from stepwell_server.rpc import steps
from stepwell_server.rpc.boundary import deadline_of, parse

if TYPE_CHECKING:
    from stepwell_server.clock import Clock
    from stepwell_server.engine.engine import Engine
    from stepwell_server.rpc.boundary import Context
    from stepwell_server.rpc.fastlane import FastLane
    from stepwell_server.rpc.sizes import ReplySizes


class StepCalls:
    """Serves unary steps. Lives on the event loop."""

    def __init__(self, engine: Engine, clock: Clock, sizes: ReplySizes, lane: FastLane) -> None:
        self._engine = engine
        self._clock = clock
        self._sizes = sizes
        self._lane = lane

    async def serve(self, raw: bytes, context: Context) -> bytes:
        """The reply to a request.

        Cancelling the waiting task cancels the step.

        Raises:
            ServerError: the step failed; nothing changed.
        """
        call = _StepCall(self, context, deadline_of(context, self._clock))
        if not self._lane.take_call(call, raw):
            self.submit(call, raw)
        answer = call.answer
        if answer is None:
            answer = await call.wait()
        if isinstance(answer, bytes):
            return answer
        if isinstance(answer, ServerError):
            raise answer
        return steps.from_answer(answer)

    def submit(self, call: _StepCall, raw: bytes) -> None:
        """Send a step the general way.

        Raises:
            ServerError: it is refused, and not answered.
        """
        single = steps.to_single(parse(pb.StepRequest, raw), call.settle)
        self._sizes.step((single.session_id,), single.inputs, single.select)
        single.source, single.deadline = call.context.peer(), call.deadline
        call.single = single
        self._engine.submit_single(single)

    def cancel(self, call: _StepCall) -> None:
        """Drop the step unapplied if it still waits."""
        call.is_over = True
        if call.single is not None:
            self._engine.cancel(call.single)


class _StepCall:
    """A unary Step on its way. A `modellane.Caller`."""

    __slots__ = ("_calls", "_waiter", "answer", "context", "deadline", "is_over", "single")

    def __init__(self, calls: StepCalls, context: Context, deadline: float) -> None:
        self._calls = calls
        self.context = context
        self.deadline = deadline
        self.is_over = False
        self.answer: bytes | StepReply | ServerError | None = None
        self.single: Single | None = None
        """The step, where it went the general way."""
        self._waiter: asyncio.Future[None] | None = None

    async def wait(self) -> bytes | StepReply | ServerError:
        """The answer, which is not there yet."""
        self._waiter = asyncio.get_running_loop().create_future()
        try:
            await self._waiter
        except asyncio.CancelledError:
            self._calls.cancel(self)
            raise
        assert self.answer is not None
        return self.answer

    def settle(self, answer: bytes | StepReply | ServerError) -> None:
        """The step has its answer."""
        self.answer = answer
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)

    def begin_plain(self, _frame_id: int, _size: int) -> bool:
        """See `modellane.Caller`."""
        return True

    def reply_plain(self, _frame_id: int, _size: int, reply: bytes) -> None:
        """See `modellane.Caller`."""
        self.settle(reply)

    def fail_plain(self, _frame_id: int, _size: int, error: ServerError) -> None:
        """See `modellane.Caller`."""
        self.settle(error)

    def send_alone(self, _frame_id: int, _size: int, raw: bytes) -> None:
        """See `modellane.Caller`."""
        if self.is_over:
            return
        try:
            self._calls.submit(self, raw)
        except ServerError as error:
            self.settle(error)
