"""Sends the steps that are awaited in the same iteration of the event loop as few frames."""

from __future__ import annotations

import asyncio
import contextvars
from collections.abc import Awaitable, Callable, Collection, Generator, Hashable, Sequence

from stepwell._batching.in_flight import InFlightFrame, Link, unanswered
from stepwell._batching.steps import FRAME_SHARE, Member, Step, Stepped, abandon, earliest, facts, in_frames
from stepwell._transport.channel import closed
from stepwell._transport.retry import Deadline
from stepwell.errors import StepwellError

_RAISED = asyncio.InvalidStateError("the error of the step was raised before")


class WaitingStep(Member):
    """A step that is awaited by one task, once it is queued.

    It has what asyncio asks of the future that a task awaits. Its task is woken with those of the other steps that were
    answered at the same time (`Waker`). A future of asyncio would be another object, and take a callback of its own.
    """

    __slots__ = ("_asyncio_future_blocking", "_loop", "_waker", "context", "outcome", "wakeup")

    def queued(self, waker: Waker) -> None:
        """It is about to be queued. Called once."""
        self._waker = waker
        self._loop = waker.loop
        self.outcome: Stepped | BaseException | None = None
        """None: its task waits for it."""
        self.wakeup: Callable[[WaitingStep], object] | None = None
        """Wakes the task, in its context; None: it does not wait yet."""
        self._asyncio_future_blocking = False

    def settle(self, stepped: Stepped) -> None:
        if self.outcome is None:
            self.outcome = stepped
            self._waker.add(self)

    def fail(self, error: BaseException) -> None:
        if self.outcome is None:
            self.outcome = error
            self._waker.add(self)

    def __await__(self) -> Generator[WaitingStep, None, Stepped]:
        if self.outcome is None:
            self._asyncio_future_blocking = True
            yield self
        outcome = self.outcome
        if type(outcome) is tuple:
            return outcome
        del outcome  # as in `result`
        return self.result()

    def result(self) -> Stepped:
        """The answer. The task calls this when it wakes up, so that an error is raised where it waits."""
        outcome = self.outcome
        if type(outcome) is tuple:
            return outcome
        assert isinstance(outcome, BaseException)
        # A step that failed stays with its session, but its error refers to the caller's frames.
        self.outcome = _RAISED
        try:
            raise outcome
        finally:
            del self, outcome  # otherwise the error would refer to itself by its traceback

    def add_done_callback(
        self, wakeup: Callable[[WaitingStep], object], *, context: contextvars.Context
    ) -> None:
        """Remembers what wakes the task, which begins to wait."""
        self.wakeup = wakeup
        self.context = context

    def cancel(self, msg: object = None) -> bool:
        """The task is cancelled while it waits. Returns False if there is an answer, so the task has to wake up anyway."""
        if self.outcome is not None:
            return False
        self.fail(asyncio.CancelledError() if msg is None else asyncio.CancelledError(msg))
        return True


class Waker:
    """Wakes the tasks of all steps that are answered in one iteration of an event loop by one callback."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self.loop = loop
        self._answered: list[WaitingStep] = []

    def add(self, step: WaitingStep) -> None:
        """A step is answered."""
        if not self._answered:
            self.loop.call_soon(self._wake)
        self._answered.append(step)

    def _wake(self) -> None:
        answered, self._answered = self._answered, []
        steps = iter(answered)
        try:
            for step in steps:
                wakeup = step.wakeup
                if wakeup is not None:
                    context = step.context
                    # Other steps of its frame may wait for long, and keep it in memory.
                    step.wakeup = None
                    del step.context
                    context.run(wakeup, step)
        finally:  # after SystemExit or KeyboardInterrupt, which end the loop: it may run again
            for step in steps:
                self.add(step)


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
        self._waker = Waker(self._loop)
        self._waiting: list[WaitingStep] = []
        self._in_flight: dict[Frame, asyncio.TimerHandle | None] = {}
        """Frames in flight, each with the timer of its members' next time limit."""
        self._max_members: dict[Hashable, int] = {}
        """Largest number of steps per frame, by kind, for kinds whose replies were too large for one message."""
        self._were_several = True
        """Whether several steps were sent together the last time, or it is the first time."""

    def step(self, step: Step) -> Awaitable[Stepped]:
        """Makes one attempt of a step; see `attempt`."""
        return self.attempt(WaitingStep(*facts(step)))

    def attempt(self, step: WaitingStep) -> Awaitable[Stepped]:
        """Makes the only attempt of this object. Another attempt of its step needs another object.

        A large step is a unary call: sharing a frame would gain nothing. Also, cancelling its task cancels a unary
        call on the server, but not a member of a frame. See also `Step.may_share`.

        Raises:
            StepwellError: The attempt failed; the error has the outcome that a unary call's would have.
        """
        if (step.data is None or step.is_alone) and not step.may_share():
            return self._unary(step)
        step.queued(self._waker)
        waiting = self._waiting
        waiting.append(step)
        if len(waiting) == 1:
            if self._were_several or self._in_flight:
                self._loop.call_soon(self._send_queued)
            else:  # no other step is in sight, so waiting for one would gain nothing
                self._send_queued()
        return step

    def _send_queued(self) -> None:
        waiting, self._waiting = self._waiting, []
        self._were_several = len(waiting) > 1
        now_s = self._loop.time()
        for members in in_frames(waiting, self._max_frame_bytes, self._max_members):
            frame: Frame = InFlightFrame(self, members, now_s)
            self._in_flight[frame] = None
            frame.send(self._link, self._max_message_bytes)
            self._watch(frame, frame.deadlines)

    def _watch(self, frame: Frame, deadlines: Collection[Deadline]) -> None:
        """Sets the timer for the next of these time limits of the frame's members, if it is in flight."""
        if frame in self._in_flight:
            if not deadlines:
                self.over(frame)  # no caller waits for it
                return
            # 0 if a limit has just passed: the timer ends its members, and the others keep waiting
            next_s = earliest(deadlines).remaining_s()
            if next_s < float("inf"):
                self._in_flight[frame] = self._loop.call_later(next_s, self._on_time_limit, frame)

    def _on_time_limit(self, frame: Frame) -> None:
        late = [member for member in frame.members if member.deadline.remaining_s() <= 0]
        abandon(late, unanswered())
        self._watch(frame, {member.deadline for member in frame.members if member.outcome is None})

    def over(self, frame: Frame) -> None:
        """A frame is over: every step has its answer, or nobody waits for it."""
        frame.forget()
        timer = self._in_flight.pop(frame, None)
        if timer is not None:
            timer.cancel()

    def too_large(self, members: Sequence[WaitingStep]) -> None:
        """The replies to these steps together exceed the message limit: later frames are smaller."""
        self._max_members[members[0].kind()] = max(1, len(members) // 2)

    def close(self, ended: Callable[[], StepwellError] = closed) -> None:
        """Fails queued steps and those in flight with these errors."""
        abandon(self._waiting, ended())
        self._waiting = []
        for frame in list(self._in_flight):
            frame.end(ended())
