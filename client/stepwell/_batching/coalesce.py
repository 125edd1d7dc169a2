"""Sends the steps that are awaited in the same iteration of the event loop as few frames."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Hashable, Sequence
from typing import NamedTuple

from stepwell._base.tuples import new_tuple
from stepwell._batching.in_flight import InFlightFrame, Link, unanswered
from stepwell._batching.steps import AT_S, FRAME_SHARE, Step, Stepped, abandon, in_frames
from stepwell._transport.channel import closed
from stepwell.errors import StepwellError


class WaitingStep(NamedTuple):
    """A queued or sent step, and the future that its task awaits."""

    step: Step
    answer: asyncio.Future[Stepped]

    def settle(self, stepped: Stepped) -> None:
        # The future is done if its task was cancelled; the other members are not affected.
        if not self.answer.done():
            self.answer.set_result(stepped)

    def fail(self, error: BaseException) -> None:
        if not self.answer.done():
            self.answer.set_exception(error)


Frame = InFlightFrame[WaitingStep]


class Coalescer:
    """Makes attempts of steps, in frames or as unary calls. Belongs to one event loop."""

    def __init__(
        self,
        link: Link,
        unary: Callable[[Step], Awaitable[Stepped]],
        max_message_bytes: int,
    ) -> None:
        self._link = link
        self._unary = unary
        self._max_message_bytes = max_message_bytes
        self._max_frame_bytes = max_message_bytes // FRAME_SHARE
        self._loop = asyncio.get_running_loop()
        self._waiting: list[WaitingStep] = []
        self._in_flight: dict[Frame, asyncio.TimerHandle | None] = {}
        """Frames in flight, each with the timer of its members' next time limit."""
        self._max_members: dict[Hashable, int] = {}
        """Largest number of steps per frame, by kind, for kinds whose replies were too large for one message."""
        self._were_several = True
        """Whether several steps were sent together the last time, or it is the first time."""

    def step(self, step: Step) -> Awaitable[Stepped]:
        """Makes one attempt of a step.

        A large step is a unary call: sharing a frame would gain nothing. Also, cancelling its task cancels a unary
        call on the server, but not a member of a frame. See also `Step.may_share`.

        Raises:
            StepwellError: The attempt failed; the error has the outcome that a unary call's would have.
        """
        if not step.may_share():
            return self._unary(step)
        answer, waiting = self._loop.create_future(), self._waiting
        waiting.append(new_tuple(WaitingStep, (step, answer)))
        if len(waiting) == 1:
            if self._were_several or self._in_flight:
                self._loop.call_soon(self._send_queued)
            else:  # no other step is in sight, so waiting for one would gain nothing
                self._send_queued()
        return answer

    def _send_queued(self) -> None:
        waiting, self._waiting = self._waiting, []
        self._were_several = len(waiting) > 1
        now_s = self._loop.time()
        for members in in_frames(waiting, self._max_frame_bytes, self._max_members):
            frame: Frame = InFlightFrame(self, members, now_s)
            self._in_flight[frame] = None
            frame.send(self._link, self._max_message_bytes)
            self._watch(frame)

    def _watch(self, frame: Frame) -> None:
        """Sets the timer for the next time limit of the frame's members, if it is in flight."""
        if frame in self._in_flight:
            waiting = [member.step.deadline for member in frame.members if not member.answer.done()]
            if not waiting:
                self.over(frame)  # no caller waits for it
                return
            # 0 if a limit has just passed: the timer ends its members, and the others keep waiting
            next_s = min(waiting, key=AT_S).remaining_s()
            if next_s < float("inf"):
                self._in_flight[frame] = self._loop.call_later(next_s, self._on_time_limit, frame)

    def _on_time_limit(self, frame: Frame) -> None:
        late = [member for member in frame.members if member.step.deadline.remaining_s() <= 0]
        abandon(late, unanswered())
        self._watch(frame)

    def over(self, frame: Frame) -> None:
        """A frame is over: every step has its answer, or nobody waits for it."""
        frame.forget()
        timer = self._in_flight.pop(frame, None)
        if timer is not None:
            timer.cancel()

    def too_large(self, members: Sequence[WaitingStep]) -> None:
        """The replies to these steps together exceed the message limit: later frames are smaller."""
        self._max_members[members[0].step.kind()] = max(1, len(members) // 2)

    def close(self, ended: Callable[[], StepwellError] = closed) -> None:
        """Fails queued steps and those in flight with these errors."""
        abandon(self._waiting, ended())
        self._waiting = []
        for frame in list(self._in_flight):
            frame.end(ended())
