"""Steps awaited in the same turn of the event loop leave together, as few frames as possible."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Hashable, Sequence

from stepwell import _channel
from stepwell._flow import Retrier
from stepwell._in_flight import InFlightFrame, Link
from stepwell._steps import SHARED_BYTES, Gathering, Step, Stepped, abandon
from stepwell.errors import DeadlineExceededError


class WaitingStep:
    """A step that was handed over, and the task that awaits it."""

    __slots__ = ("answer", "step")

    def __init__(self, step: Step, answer: asyncio.Future[Stepped]) -> None:
        self.step = step
        self.answer = answer

    def settle(self, stepped: Stepped) -> None:
        # A caller that was cancelled has left; its neighbours have not.
        if not self.answer.done():
            self.answer.set_result(stepped)

    def fail(self, error: BaseException) -> None:
        if not self.answer.done():
            self.answer.set_exception(error)


Frame = InFlightFrame[WaitingStep]


class Coalescer:
    """Makes attempts of steps, together with those that are awaited at the same time. Of one event loop."""

    def __init__(
        self,
        link: Link,
        retrier: Retrier,
        unary: Callable[[Step], Awaitable[Stepped]],
        max_frame_bytes: int,
    ) -> None:
        self._link = link
        self._retrier = retrier
        self._unary = unary
        self._max_frame_bytes = max_frame_bytes
        self._waiting: Gathering[WaitingStep] = Gathering()
        self._in_flight: dict[Frame, asyncio.TimerHandle | None] = {}
        """Frames under way, with what calls when the next time limit of a member is up."""
        self._most: dict[Hashable, int] = {}
        """How many steps may leave together, by kind, where more had replies too large for one message."""

    def step(self, step: Step) -> Awaitable[Stepped]:
        """One attempt of a step.

        A large step gains nothing from company, and as a call of its own it ends on the server when it is
        cancelled here: a frame has no way to say so for one of its members.

        Raises:
            StepwellError: How it ended; its outcome is told as of a call of its own.
        """
        if step.input_bytes() > SHARED_BYTES:
            return self._unary(step)
        loop = asyncio.get_running_loop()
        if not self._waiting:
            loop.call_soon(self._send_all)
        member = WaitingStep(step, loop.create_future())
        self._waiting.add(member)
        return member.answer

    def _send_all(self) -> None:
        waiting, self._waiting = self._waiting, Gathering()
        now_s = asyncio.get_running_loop().time()
        for members in waiting.frames(self._max_frame_bytes, self._most):
            frame = Frame(self, members, now_s)
            self._in_flight[frame] = None
            frame.send(self._link, self._retrier)
            self._watch(frame)

    def _watch(self, frame: Frame) -> None:
        """Sees to the time limits of its members, if it is under way."""
        if frame in self._in_flight:
            waiting = [member.step.deadline for member in frame.members if not member.answer.done()]
            next_s = min([deadline.remaining_s() for deadline in waiting], default=0.0)
            if next_s <= 0:
                self.over(frame)  # every caller has left
            elif next_s < float("inf"):
                loop = asyncio.get_running_loop()
                self._in_flight[frame] = loop.call_later(next_s, self._time_is_up, frame)

    def _time_is_up(self, frame: Frame) -> None:
        late = [member for member in frame.members if member.step.deadline.remaining_s() <= 0]
        abandon(late, DeadlineExceededError("the time limit passed while a frame was unanswered"))
        self._watch(frame)

    def over(self, frame: Frame) -> None:
        """A frame is over: its callers have their answers, or have left."""
        frame.forget()
        timer = self._in_flight.pop(frame, None)
        if timer is not None:
            timer.cancel()

    def too_large(self, members: Sequence[WaitingStep]) -> None:
        """The replies to these, together, are over the limit of a message: fewer leave together from now on."""
        self._most[members[0].step.kind()] = max(1, len(members) // 2)

    def close(self) -> None:
        """Ends what waits and what is under way; the callers get `ClosedError`."""
        for members in self._waiting.frames(self._max_frame_bytes):
            abandon(members, _channel.closed())
        self._waiting = Gathering()
        for frame in list(self._in_flight):
            frame.end(_channel.closed())
