"""A frame in flight that carries the steps of many callers. Used by both clients.

A frame is one attempt of each of its steps. Each step's own flow retries it (`_core.retrier.Retrier.step`), so that a
broken stream is no special case.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Generic, Protocol

from stepwell._batching.frames import Frame, maker
from stepwell._batching.one_step import OneStep
from stepwell._batching.steps import M, abandon, answer, framed, latest
from stepwell._transport.retry import RepliesTooLargeError
from stepwell._transport.stream import Answer, MakeRequest, Sink
from stepwell.errors import DeadlineExceededError, ReplyTooLargeError, StepwellError


class Link(Protocol):
    """The stream that a frame is sent on."""

    def post(self, make: MakeRequest, sink: Sink, /) -> Callable[[], None]:
        """See `Link.post` of `_transport.stream`."""


class Owner(Protocol[M]):
    """The sender of frames; learns how they end."""

    def over(self, frame: InFlightFrame[M], /) -> None:
        """Every step of the frame has its answer, or nobody waits for it."""

    def too_large(self, members: Sequence[M], /) -> None:
        """The replies to these steps together exceed the message limit."""


class InFlightFrame(Generic[M]):
    """A frame that was sent and is not completely answered."""

    __slots__ = ("_frame", "_owner", "deadline", "deadlines", "forget", "members", "sent_s")

    def __init__(self, owner: Owner[M], members: Sequence[M], sent_s: float) -> None:
        self.sent_s = sent_s
        self.members = members
        self._owner = owner
        self._frame: Frame | OneStep
        if len(members) == 1:
            only = members[0]
            self.deadlines, self.deadline = {only.deadline}, only.deadline
            self._frame = OneStep(only, functools.partial(framed, members))
        else:
            self.deadlines = {member.deadline for member in members}
            self.deadline = latest(self.deadlines)  # no member may be cut short
            self._frame = framed(members)
        self.forget: Callable[[], None] = _nothing

    def send(self, link: Link, max_message_bytes: int) -> None:
        """Sends it. If that fails, every caller gets the error."""
        try:
            self.forget = link.post(maker(self._frame, self.deadline, max_message_bytes), self._receive)
        except Exception as error:
            self.end(error)
        if self._frame.round_over:
            self.forget()  # the reply was complete before `forget` was set

    def _receive(self, answered: Answer) -> None:
        """Handles a part of the reply, or the error that ended it. Never raises, as sinks must not."""
        try:
            if isinstance(answered, ReplyTooLargeError):
                answered = self._too_large(answered)
            if isinstance(answered, StepwellError):
                self.end(answered)
                return
            answer(self.members, self._frame.accept(answered))
            if self._frame.round_over:
                answer(self.members, self._frame.fail_retryable())
                self._owner.over(self)
        except Exception as defect:
            self.end(defect)

    def _too_large(self, error: ReplyTooLargeError) -> RepliesTooLargeError:
        if len(self.members) > 1:
            self._owner.too_large(self.members)
        return RepliesTooLargeError.of(len(self.members), error)

    def end(self, error: Exception) -> None:
        """Fails every step that has no answer yet."""
        abandon(self.members, error)
        self._owner.over(self)


def unanswered() -> DeadlineExceededError:
    """The error of a frame whose time limit passed before all of its members were answered."""
    return DeadlineExceededError("the time limit passed before the step was answered")


def _nothing(_: object = None) -> None:
    pass
