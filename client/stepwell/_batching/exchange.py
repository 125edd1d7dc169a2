"""One round of a frame: the message is sent on a stream, and the parts of its reply are handled."""

from __future__ import annotations

import asyncio
import dataclasses
import math
import queue
from collections.abc import Callable
from typing import Protocol

from stepwell._batching.frames import Frame, Part
from stepwell._transport.call import check_size
from stepwell._transport.retry import Deadline
from stepwell._transport.stream import Answer, MakeRequest, Sink
from stepwell.errors import DeadlineExceededError, StepwellError
from stepwell.v1 import sessions_pb2


class Link(Protocol):
    """The stream that a frame is sent on."""

    def post(self, make: MakeRequest, sink: Sink, /) -> Callable[[], None]:
        """See `Link.post` of `_transport.stream`."""


@dataclasses.dataclass(frozen=True, slots=True)
class Exchange:
    """Send a frame on the stream and call `on_part` for each part of its reply; the answer is None."""

    frame: Frame
    deadline: Deadline
    on_part: Callable[[Part], None]
    max_message_bytes: int

    def request(self, frame_id: int) -> sessions_pb2.StepStreamRequest:
        """The message to send.

        Raises:
            InvalidInputError: The message exceeds the limit.
        """
        message = self.frame.request(frame_id, self.deadline)
        check_size("a frame", message, self.max_message_bytes)
        return message

    def take(self, answer: Answer) -> None:
        """Handles a part of the reply, or raises the error that ended it."""
        if isinstance(answer, StepwellError):
            raise answer
        self.on_part(self.frame.accept(answer))


def exchange(link: Link, ask: Exchange) -> None:
    """Sends a frame and calls its `on_part` for each part of the reply.

    Raises:
        StepwellError: The stream broke or the time limit passed; unanswered members have an unknown outcome.
    """
    inbox: queue.SimpleQueue[Answer] = queue.SimpleQueue()
    forget = link.post(ask.request, inbox.put)
    try:
        while not ask.frame.round_over:
            remaining_s = ask.deadline.remaining_s()
            ask.take(inbox.get(timeout=None if math.isinf(remaining_s) else remaining_s))
    except queue.Empty:
        raise unanswered() from None
    finally:
        forget()


async def exchange_async(link: Link, ask: Exchange) -> None:
    """As `exchange`."""
    inbox: asyncio.Queue[Answer] = asyncio.Queue()
    forget = link.post(ask.request, inbox.put_nowait)
    try:
        async with asyncio.timeout(ask.deadline.grpc_timeout_s()):
            while not ask.frame.round_over:
                ask.take(await inbox.get())
    except TimeoutError:
        raise unanswered() from None
    finally:
        forget()


def unanswered() -> DeadlineExceededError:
    """The error of a frame whose time limit passed before all of its members were answered."""
    return DeadlineExceededError("the time limit passed while a frame was unanswered")
