"""Sends the steps that many threads of a sync client make at the same time as few frames.

If no other step is in flight, a step is sent immediately, as a unary call. Otherwise it waits in a queue. One thread,
started when it is first needed, sends all queued steps as frames whenever no recent frame is in flight; meanwhile,
further steps queue up. That thread only sends: the thread that reads the stream distributes the replies. A frame is
one attempt of each of its steps; each step's own flow decides about the next one.

A queued step belongs to whichever code removes it from the queue: the thread that sends it, the caller whose time
limit passed, or `close`. So one caller's failure never affects another's step.
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

from stepwell._batching.in_flight import InFlightFrame, Link
from stepwell._batching.steps import FRAME_SHARE, Member, Step, Stepped, abandon, facts, in_frames
from stepwell._transport.channel import closed
from stepwell._transport.retry import Clock
from stepwell.errors import DeadlineExceededError, StepwellError

#: A frame that was sent longer ago does not hold up the next: one slow session must not slow down the rest.
_RECENT_S = 0.01

Wake = queue.SimpleQueue[None]

_senders: weakref.WeakSet[Sender] = weakref.WeakSet()
# A forked child must not try to stop its parent's threads.
os.register_at_fork(after_in_child=_senders.clear)


class WaitingStep(Member):
    """A queued or sent step, for which a thread waits."""

    __slots__ = ("_error", "_ready", "_stepped")

    def __init__(self, step: Step) -> None:
        super().__init__(*facts(step))
        self._stepped: Stepped | None = None
        self._error: BaseException | None = None
        # Held until there is an answer. A lock is the cheapest thing that a thread can wait for.
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
        """Waits for the answer up to the timeout. Returns whether there is one."""
        return self._ready.acquire(timeout=-1 if math.isinf(timeout_s) else timeout_s)

    def result(self) -> Stepped:
        """The answer."""
        if self._stepped is None:
            raise self._error or AssertionError("the step has no answer yet")
        return self._stepped


Frame = InFlightFrame[WaitingStep]


class Sender:
    """Makes attempts of steps, as unary calls or in frames. Thread-safe."""

    def __init__(
        self,
        link: Link,
        unary: Callable[[Step], Stepped],
        max_message_bytes: int,
        clock: Clock = time.monotonic,
    ) -> None:
        self._link = link
        self._unary = unary
        self._max_message_bytes = max_message_bytes
        self._max_frame_bytes = max_message_bytes // FRAME_SHARE
        self._clock = clock
        self._alone = threading.Lock()
        """Held by a step that is a unary call because no other step was in flight."""
        self._waiting: collections.deque[WaitingStep] = collections.deque()
        self._in_flight: list[Frame] = []
        self._max_members: dict[Hashable, int] = {}
        """Largest number of steps per frame, by kind, for kinds whose replies were too large for one message."""
        self._wake = Wake()
        self._idle = False
        """Whether the thread sleeps because the queue was empty, so that the next step must wake it."""
        self._ended: Callable[[], StepwellError] | None = None
        self._thread: threading.Thread | None = None
        self._starting = threading.Lock()
        _senders.add(self)

    def step(self, step: Step) -> Stepped:
        """Makes one attempt of a step.

        Raises:
            StepwellError: The attempt failed; the error has the outcome that a unary call's would have.
        """
        if not step.may_share():
            return self._unary(step)
        if self._waiting or self._in_flight:
            return self._shared(step)
        if not self._alone.acquire(blocking=False):
            return self._shared(step)
        try:
            return self._unary(step)
        finally:
            self._alone.release()

    def _shared(self, step: Step) -> Stepped:
        member = WaitingStep(step)
        self._waiting.append(member)
        self._notify()
        answered = member.wait(step.deadline.remaining_s())
        if not answered:
            self._time_is_up(member)
        return member.result()

    def _notify(self) -> None:
        """Makes sure that the thread will look at the queue."""
        if self._thread is None:
            self._start()
        if self._ended is not None:
            # `close` may have emptied the queue before this step was in it: empty it again.
            self._fail_queued(self._ended())
        elif self._idle or not self._in_flight:
            self._wake_up()

    def _start(self) -> None:
        with self._starting:
            if self._thread is None and self._ended is None:
                # The thread holds no reference to this object while it sleeps, so that a client which
                # was not closed can still be collected. The finalizer then wakes the thread, which ends.
                weakref.finalize(self, self._wake.put, None).atexit = False
                thread = threading.Thread(
                    target=_run, args=(weakref.ref(self), self._wake), name="stepwell-sender", daemon=True
                )
                thread.start()
                self._thread = thread

    def _wake_up(self) -> None:
        # If the wake-up queue is not empty the thread has yet to look.
        if self._wake.empty():
            self._wake.put(None)

    def _dequeue(self, member: WaitingStep) -> bool:
        """Removes a step from the queue. Returns whether it was still there."""
        try:
            self._waiting.remove(member)
        except ValueError:
            return False
        return True

    def _time_is_up(self, member: WaitingStep) -> None:
        if self._dequeue(member):
            raise DeadlineExceededError(
                "the time limit passed while the step waited to be sent", outcome="not_applied"
            )
        if not member.wait(0.0):  # it may have been answered at the last moment
            raise DeadlineExceededError("the time limit passed before the step was answered")

    def run_once(self) -> float | None:
        """Sends the queued steps if a frame may be sent now. Called by the thread.

        Returns:
            Seconds until it must be called again; None to wait until the thread is woken.
        """
        while self._ended is None:
            wait_s = self._wait_s()
            if wait_s > 0:
                self._idle = False
                return wait_s
            if not self._waiting:
                self._idle = True
                # A step that was queued before the flag was set did not wake the thread.
                if not self._waiting:
                    return None
            self._idle = False
            self._send_queued()
        return None

    def _wait_s(self) -> float:
        """Seconds until a frame may be sent, that is, until no recent one is in flight."""
        now_s = self._clock()
        for frame in list(self._in_flight):
            if frame.deadline.remaining_s() <= 0:
                self.over(frame)  # no caller waits for it
            elif now_s < frame.sent_s + _RECENT_S:
                return frame.sent_s + _RECENT_S - now_s
        return 0.0

    def _send_queued(self) -> None:
        for members in in_frames(self._dequeue_all(), self._max_frame_bytes, self._max_members):
            frame: Frame = InFlightFrame(self, members, self._clock())
            self._in_flight.append(frame)
            frame.send(self._link, self._max_message_bytes)

    def _dequeue_all(self) -> list[WaitingStep]:
        members = []
        while True:
            try:
                members.append(self._waiting.popleft())
            except IndexError:
                return members

    def over(self, frame: Frame) -> None:
        """A frame is over. Its callers have their answers by now, so their next steps can share a frame."""
        frame.forget()
        try:
            self._in_flight.remove(frame)
        except ValueError:
            return
        if self._waiting:
            self._wake_up()

    def too_large(self, members: Sequence[WaitingStep]) -> None:
        """The replies to these steps together exceed the message limit: later frames are smaller."""
        self._max_members[members[0].kind()] = max(1, len(members) // 2)

    def _fail_queued(self, error: StepwellError) -> None:
        abandon(self._dequeue_all(), error)

    def close(self, ended: Callable[[], StepwellError] = closed) -> None:
        """Ends the thread; queued steps fail with these errors. Frames in flight end when the link is closed."""
        with self._starting:
            self._ended = ended
        self._fail_queued(ended())
        if self._thread is not None:
            self._wake.put(None)
            self._thread.join()

    @property
    def is_closed(self) -> bool:
        """Whether it is closed."""
        return self._ended is not None


def _run(sender: weakref.ref[Sender], wake: Wake) -> None:
    while (timeout_s := _run_once(sender)) != _END:
        try:
            wake.get(timeout=timeout_s)
        except queue.Empty:
            continue


_END = -1.0


def _run_once(sender: weakref.ref[Sender]) -> float | None:
    # A separate function, so that nothing refers to the sender while the thread sleeps.
    alive = sender()
    return _END if alive is None or alive.is_closed else alive.run_once()


@atexit.register
def _close_senders() -> None:
    for sender in list(_senders):
        sender.close()
