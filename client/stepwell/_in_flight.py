"""A frame of many callers' steps while it is under way. Both clients send steps so.

What is shared is one attempt of each step: trying again is each step's own flow (see `_flow.Retrier.step`),
which makes a broken stream no special case.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Generic, Protocol, TypeAlias

from stepwell._flow import Exchange, Retrier
from stepwell._retry import Deadline, RepliesTooLargeError
from stepwell._steps import M, abandon, answer, framed
from stepwell.errors import ReplyTooLargeError, StepwellError
from stepwell.v1 import sessions_pb2

Answer: TypeAlias = sessions_pb2.StepStreamResponse | StepwellError
"""A part of the reply to a frame, or why no more of it will come."""
Sink: TypeAlias = Callable[[Answer], None]


class Link(Protocol):
    """A stream as a frame needs it."""

    def post(self, ask: Exchange, sink: Sink, /) -> Callable[[], None]:
        """Sends a frame without waiting for its reply.

        Args:
            ask: The frame; taking in its reply is the sink's affair.
            sink: Called with each part of the reply, or with why no more will come, until it is forgotten:
                by whoever reads the stream, so it must neither block nor raise.

        Returns:
            What ends the sink's job. It must be called when the round is over.

        Raises:
            StepwellError: Nothing was sent, and the sink is not called.
        """


class Owner(Protocol[M]):
    """Who sent a frame, and is told what becomes of it."""

    def over(self, frame: InFlightFrame[M], /) -> None:
        """All callers of the frame have their answers, or have left."""

    def too_large(self, members: Sequence[M], /) -> None:
        """The replies to these, together, are over the limit of a message."""


class InFlightFrame(Generic[M]):
    """A frame under way."""

    __slots__ = ("_frame", "_owner", "deadline", "forget", "members", "sent_s")

    def __init__(self, owner: Owner[M], members: Sequence[M], sent_s: float) -> None:
        self.sent_s = sent_s
        self.members = members
        # None of the members may be cut short.
        self.deadline: Deadline = max([member.step.deadline for member in members], key=Deadline.at_s)
        self._owner = owner
        self._frame = framed(members)
        self.forget: Callable[[], None] = _nothing

    def send(self, link: Link, retrier: Retrier) -> None:
        """Sends it. Whatever happens, no caller is left waiting."""
        try:
            ask = retrier.ask(self._frame, self.deadline, _nothing)
            self.forget = link.post(ask, self._take)
        except Exception as error:
            self.end(error)
        if self._frame.round_over:
            self.forget()  # the reply was here before the means to forget it

    def _take(self, answered: Answer) -> None:
        """Takes in a part of the reply, or why there is none. Never raises: it is called by the reader."""
        try:
            if isinstance(answered, ReplyTooLargeError):
                answered = self._too_large(answered)
            if isinstance(answered, StepwellError):
                self.end(answered)
                return
            answer(self.members, self._frame.accept(answered))
            if self._frame.round_over:
                answer(self.members, self._frame.left())
                self._owner.over(self)
        except Exception as defect:
            self.end(defect)

    def _too_large(self, error: ReplyTooLargeError) -> RepliesTooLargeError:
        if len(self.members) > 1:
            self._owner.too_large(self.members)
        return RepliesTooLargeError.of(len(self.members), error)

    def end(self, error: Exception) -> None:
        """Fails whoever still waits."""
        abandon(self.members, error)
        self._owner.over(self)


def _nothing(_: object = None) -> None:
    pass
