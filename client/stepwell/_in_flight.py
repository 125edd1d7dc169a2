"""A frame of many threads' steps on its way, and the callers that wait for it. See `_sender`."""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Sequence
from typing import Protocol

from stepwell._flow import Retrier
from stepwell._link import Answer, Link
from stepwell._steps import Step, Stepped, abandon, answer, framed, latest
from stepwell.errors import ReplyTooLargeError, StepwellError, UnavailableError


class Waiting:
    """A step in the line, and the caller that waits for it."""

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


class Owner(Protocol):
    """Who sent a frame, and is told what becomes of it."""

    def landed(self, frame: InFlightFrame) -> None:
        """The frame is over: all its callers have their answers, or have left."""

    def too_large(self, members: Sequence[Waiting]) -> None:
        """The replies to these, together, are over the limit of a message."""


class InFlightFrame:
    """A frame under way."""

    def __init__(self, owner: Owner, members: Sequence[Waiting], sent_s: float) -> None:
        self.sent_s = sent_s
        self.deadline = latest(members)
        self._owner = owner
        self._members = members
        self._frame = framed(members)
        self.forget: Callable[[], None] = _nothing

    def send(self, link: Link, retrier: Retrier) -> None:
        """Sends it. Whatever happens, no caller is left waiting."""
        try:
            ask = retrier.ask(self._frame, self.deadline, _nothing)
            self.forget = link.post(ask, self._take)
        except Exception as error:
            self._end(error)
        if self._frame.round_over:
            self.forget()  # the reply was here before the means to forget it

    def _take(self, answered: Answer) -> None:
        """Takes in a part of the reply, or why there is none. Never raises: it is the reader's thread."""
        try:
            if isinstance(answered, ReplyTooLargeError) and len(self._members) > 1:
                self._owner.too_large(self._members)
                answered = UnavailableError(f"the replies to {len(self._members)} steps at once: {answered}")
            if isinstance(answered, StepwellError):
                self._end(answered)
                return
            answer(self._members, self._frame.accept(answered))
            if self._frame.round_over:
                answer(self._members, self._frame.left())
                self._owner.landed(self)
        except Exception as defect:
            self._end(defect)

    def _end(self, error: Exception) -> None:
        abandon(self._members, error)
        self._owner.landed(self)


def _nothing(_: object = None) -> None:
    pass
