"""Steps that many threads of a sync client make at the same time leave together, as few frames as possible.

A step that finds nobody else under way is a call of its own, at once. The others wait in a line, and one
thread, started when it is first needed, sends all that wait as frames whenever no young frame is under way:
while one is, the next gathers. That thread only hands over; the answers come from the thread that reads the
stream. What is coalesced is one attempt: trying again is the affair of each step's own flow, which makes a
broken stream no special case.

A member of the line belongs to whoever takes it out: the thread that sends it, its own caller whose time is
up or who was interrupted, or `close`. So no caller's end touches another's step.
"""

from __future__ import annotations

import atexit
import collections
import math
import os
import queue
import threading
import time
import weakref
from collections.abc import Callable, Hashable, Sequence

from stepwell import _channel
from stepwell._flow import Retrier
from stepwell._in_flight import InFlightFrame, Link
from stepwell._retry import Clock
from stepwell._steps import SHARED_BYTES, Gathering, Step, Stepped, abandon
from stepwell.errors import DeadlineExceededError

#: A frame older than this does not hold up the next: one slow session must not slow down the rest.
_YOUNG_S = 0.01

Wake = queue.SimpleQueue[None]

_senders: weakref.WeakSet[Sender] = weakref.WeakSet()
# The thread of a parent is not a forked child's to end.
os.register_at_fork(after_in_child=_senders.clear)


class WaitingStep:
    """A step in the line, and the thread that waits for it."""

    __slots__ = ("_error", "_ready", "_stepped", "step")

    def __init__(self, step: Step) -> None:
        self.step = step
        self._stepped: Stepped | None = None
        self._error: BaseException | None = None
        # Held until there is an answer; the cheapest thing a thread can wait for.
        self._ready = threading.Lock()
        self._ready.acquire()

    def settle(self, stepped: Stepped) -> None:
        if self._stepped is None and self._error is None:
            self._stepped = stepped
            self._ready.release()

    def fail(self, error: BaseException) -> None:
        if self._stepped is None and self._error is None:
            self._error = error
            self._ready.release()

    def wait(self, timeout_s: float) -> bool:
        """Waits for the answer, but not longer; says whether it is there."""
        return self._ready.acquire(timeout=-1 if math.isinf(timeout_s) else timeout_s)

    def result(self) -> Stepped:
        """The answer."""
        if self._stepped is None:
            raise self._error or AssertionError("a member is asked for its answer before it has one")
        return self._stepped


Frame = InFlightFrame[WaitingStep]


class Sender:
    """Makes attempts of steps, alone or in company. Thread-safe."""

    def __init__(
        self,
        link: Link,
        retrier: Retrier,
        unary: Callable[[Step], Stepped],
        max_frame_bytes: int,
        clock: Clock = time.monotonic,
    ) -> None:
        self._link = link
        self._retrier = retrier
        self._unary = unary
        self._max_frame_bytes = max_frame_bytes
        self._clock = clock
        self._alone = threading.Lock()
        """Held by the step that is under way as a call of its own because it found nobody else."""
        self._waiting: collections.deque[WaitingStep] = collections.deque()
        self._in_flight: list[Frame] = []
        self._most: dict[Hashable, int] = {}
        """How many steps may leave together, by kind, where more had replies too large for one message."""
        self._wake = Wake()
        self._idle = False
        """The thread has found the line empty and room for a frame: whoever comes next must wake it."""
        self._closed = False
        self._thread: threading.Thread | None = None
        self._starting = threading.Lock()
        _senders.add(self)

    def step(self, step: Step) -> Stepped:
        """One attempt of a step.

        Raises:
            StepwellError: How it ended; its outcome is told as of a call of its own.
        """
        if step.input_bytes() > SHARED_BYTES:
            return self._unary(step)
        if not self._waiting and not self._in_flight and self._alone.acquire(blocking=False):
            try:
                return self._unary(step)
            finally:
                self._alone.release()
        return self._in_company(step)

    def _in_company(self, step: Step) -> Stepped:
        member = WaitingStep(step)
        try:
            self._waiting.append(member)
            self._come()
            answered = member.wait(step.deadline.remaining_s())
        except BaseException:
            # Ctrl-C: what has not left does not leave any more.
            self._withdraw(member)
            raise
        if not answered:
            self._time_is_up(member)
        return member.result()

    def _come(self) -> None:
        """Sees to it that the thread looks at the line, in its time."""
        if self._thread is None:
            self._start()
        if self._closed:
            # Too late for `close` to see what was put in the line: empty it as `close` does.
            self._refuse_all()
        elif self._idle or not self._in_flight:
            self._call()

    def _start(self) -> None:
        with self._starting:
            if self._thread is None and not self._closed:
                # The thread holds no reference to this object while it sleeps, so that a client which
                # nobody closed can still be collected; its end then wakes the thread, which ends.
                weakref.finalize(self, self._wake.put, None).atexit = False
                thread = threading.Thread(
                    target=_run, args=(weakref.ref(self), self._wake), name="stepwell-sender", daemon=True
                )
                thread.start()
                self._thread = thread

    def _call(self) -> None:
        # What lies there was not taken yet, so the thread has still to look. (No flag of our own instead:
        # Ctrl-C could come between setting it and waking the thread.)
        if self._wake.empty():
            self._wake.put(None)

    def _withdraw(self, member: WaitingStep) -> bool:
        """Takes a member out of the line; says whether it was still there."""
        try:
            self._waiting.remove(member)
        except ValueError:
            return False
        return True

    def _time_is_up(self, member: WaitingStep) -> None:
        if self._withdraw(member):
            raise DeadlineExceededError(
                "the time limit passed while the step waited to be sent", outcome="not_applied"
            )
        if not member.wait(0.0):  # else it was answered at the last moment
            raise DeadlineExceededError("the time limit passed while the step was unanswered")

    def turn(self) -> float | None:
        """Sends what waits if there is room. The thread's affair.

        Returns:
            Seconds until the next turn is due; None if it is when the thread is woken.
        """
        while not self._closed:
            wait_s = self._wait_s()
            if wait_s > 0:
                self._idle = False
                return wait_s
            if not self._waiting:
                self._idle = True
                # Whoever came before this was set did not wake the thread.
                if not self._waiting:
                    return None
            self._idle = False
            self._send_all()
        return None

    def _wait_s(self) -> float:
        """Seconds until there is room for a frame: no young one under way."""
        now_s = self._clock()
        for frame in list(self._in_flight):
            if frame.deadline.remaining_s() <= 0:
                self.over(frame)  # every caller has left
            elif now_s < frame.sent_s + _YOUNG_S:
                return frame.sent_s + _YOUNG_S - now_s
        return 0.0

    def _send_all(self) -> None:
        gathering: Gathering[WaitingStep] = Gathering()
        for member in self._take_all():
            gathering.add(member)
        for members in gathering.frames(self._max_frame_bytes, self._most):
            frame = Frame(self, members, self._clock())
            self._in_flight.append(frame)
            frame.send(self._link, self._retrier)

    def _take_all(self) -> list[WaitingStep]:
        members = []
        while True:
            try:
                members.append(self._waiting.popleft())
            except IndexError:
                return members

    def over(self, frame: Frame) -> None:
        """A frame is over. Its callers have their answers by now, so that they can share the next."""
        frame.forget()
        try:
            self._in_flight.remove(frame)
        except ValueError:
            return
        if self._waiting:
            self._call()

    def too_large(self, members: Sequence[WaitingStep]) -> None:
        """The replies to these, together, are over the limit of a message: fewer leave together from now on."""
        self._most[members[0].step.kind()] = max(1, len(members) // 2)

    def _refuse_all(self) -> None:
        abandon(self._take_all(), _channel.closed())

    def close(self) -> None:
        """Ends the thread; whoever waits to be sent gets `ClosedError`. What has left is the link's affair."""
        with self._starting:
            self._closed = True
        self._refuse_all()
        if self._thread is not None:
            self._wake.put(None)
            self._thread.join()

    @property
    def is_closed(self) -> bool:
        """No step is taken any more."""
        return self._closed


def _run(sender: weakref.ref[Sender], wake: Wake) -> None:
    while (timeout_s := _turn(sender)) != _END:
        try:
            wake.get(timeout=timeout_s)
        except queue.Empty:
            continue
    # Should Ctrl-C have come while the thread was being started, there may be a second: it ends too.
    wake.put(None)


_END = -1.0


def _turn(sender: weakref.ref[Sender]) -> float | None:
    # In a function of its own, so that nothing refers to the sender while the thread sleeps.
    alive = sender()
    return _END if alive is None or alive.is_closed else alive.turn()


@atexit.register
def _close_senders() -> None:
    for sender in list(_senders):
        sender.close()
