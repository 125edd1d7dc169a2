"""What the core asks of its shells: one call, one step, one pause, one exchange of a frame.

A `Step` asks for one attempt of itself, as a call of its own or in company; the answer is a `Stepped`.

Every operation is a generator that yields such an ask and receives its answer, or has the error thrown
into it. The sync and the async client drive the same generators, each with its own way of waiting.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Awaitable, Callable, Generator, Iterable
from typing import Any, TypeAlias, TypeVar

from google.protobuf.message import Message

from stepwell._frames import Frame, Part
from stepwell._retry import Attempts, Deadline, RepliesTooLargeError, RetryPolicy
from stepwell._steps import Step, Stepped, read
from stepwell.errors import InvalidInputError, StepwellError
from stepwell.v1 import sessions_pb2


@dataclasses.dataclass(frozen=True, slots=True)
class Call:
    """Make one attempt of a unary call; the answer is its response."""

    rpc: str
    request: Message
    timeout_s: float | None


@dataclasses.dataclass(frozen=True, slots=True)
class Pause:
    """Wait; the answer is None."""

    seconds: float


@dataclasses.dataclass(frozen=True, slots=True)
class Exchange:
    """Send a frame on the stream and pass on the parts of its reply until the last; the answer is None."""

    frame: Frame
    deadline: Deadline
    on_part: Callable[[Part], None]
    max_message_bytes: int

    def request(self, frame_id: int) -> sessions_pb2.StepStreamRequest:
        """The message to send.

        Raises:
            InvalidInputError: It is over the limit.
        """
        message = self.frame.request(frame_id, self.deadline)
        check_size("a frame", message, self.max_message_bytes)
        return message


T = TypeVar("T")
Ask: TypeAlias = Call | Step | Pause | Exchange
Flow: TypeAlias = Generator[Ask, Any, T]


def drive(flow: Flow[T], answer: Callable[[Ask], Any]) -> T:
    """Drives a flow to its result; `answer` waits by blocking."""
    try:
        ask = next(flow)
        while True:
            try:
                answered = answer(ask)
            except StepwellError as error:
                ask = flow.throw(error)
            else:
                ask = flow.send(answered)
    except StopIteration as stop:
        result: T = stop.value
        return result
    finally:
        # A flow that was left in the middle (Ctrl-C, a cancelled task) learns of it here.
        flow.close()


async def drive_async(flow: Flow[T], answer: Callable[[Ask], Awaitable[Any]]) -> T:
    """Drives a flow to its result; `answer` is awaited."""
    try:
        ask = next(flow)
        while True:
            try:
                answered = await answer(ask)
            except StepwellError as error:
                ask = flow.throw(error)
            else:
                ask = flow.send(answered)
    except StopIteration as stop:
        result: T = stop.value
        return result
    finally:
        # A flow that was left in the middle (Ctrl-C, a cancelled task) learns of it here.
        flow.close()


def each(flows: Iterable[Flow[T]]) -> Flow[list[T]]:
    """One flow after the other; the result is theirs."""
    results = []
    for flow in flows:
        result = yield from flow
        results.append(result)
    return results


class Retrier:
    """Makes flows of single attempts into flows that try again."""

    def __init__(self, policy: RetryPolicy, max_message_bytes: int) -> None:
        self._policy = policy
        self._max_message_bytes = max_message_bytes

    def call(self, rpc: str, request: Message, deadline: Deadline, *, changes: bool = False) -> Flow[Any]:
        """A unary call with its retries; the result is its response.

        Args:
            rpc: Name of the method.
            request: The same in every attempt.
            deadline: Covers all attempts.
            changes: The call changes something, so that an error must tell its outcome.
        """
        check_size(rpc, request, self._max_message_bytes)

        def ask() -> Call:
            return Call(rpc, request, deadline.grpc_timeout_s())

        return (yield from self._answered(ask, Attempts(self._policy, deadline, changes=changes)))

    def step(self, step: Step) -> Flow[Stepped]:
        """A step with its retries, in company with others where the shell sends steps together.

        Where a reply was too large though the step had left alone, another's reply may have been to blame: as
        a call of its own it gets an answer that is about itself.
        """
        attempts: Attempts | None = None
        by_itself = False
        while True:
            try:
                if by_itself:
                    return read((yield self.unary(step)))
                stepped: Stepped = yield step
                return stepped
            except StepwellError as error:
                attempts = attempts or Attempts(self._policy, step.deadline, changes=True)
                by_itself = isinstance(error, RepliesTooLargeError) and error.members == 1
                delay_s = attempts.failed(error)
            yield Pause(delay_s)
            attempts.woke()

    def unary(self, step: Step) -> Call:
        """A step as a call of its own.

        Raises:
            InvalidInputError: It is over the limit.
        """
        request = step.request()
        check_size("Step", request, self._max_message_bytes)
        return Call("Step", request, step.deadline.grpc_timeout_s())

    def _answered(self, ask: Callable[[], Ask], attempts: Attempts) -> Flow[Any]:
        while True:
            try:
                return (yield ask())
            except StepwellError as error:
                delay_s = attempts.failed(error)
            yield Pause(delay_s)
            attempts.woke()

    def ask(self, frame: Frame, deadline: Deadline, on_part: Callable[[Part], None]) -> Exchange:
        """One round of a frame, to be asked."""
        return Exchange(frame, deadline, on_part, self._max_message_bytes)

    def exchange(self, frame: Frame, deadline: Deadline, on_part: Callable[[Part], None]) -> Flow[None]:
        """A frame with its retries, until every member of it is applied or failed for good.

        Args:
            frame: The frame.
            deadline: Covers all attempts.
            on_part: Gets what is settled.
        """
        ask = self.ask(frame, deadline, on_part)
        attempts = Attempts(self._policy, deadline, changes=True)
        try:
            while (error := (yield from _round(ask))) is not None:
                yield Pause(attempts.failed(error))
                attempts.woke()
        except StepwellError as final:
            on_part(frame.give_up(final))


def check_size(what: str, request: Message, max_message_bytes: int) -> None:
    """Refuses a message that gRPC would refuse with a status that reads like an overload.

    Raises:
        InvalidInputError: The message is over the limit.
    """
    size = request.ByteSize()
    if size > max_message_bytes:
        raise InvalidInputError(
            f"the message of {what} must be at most max_message_bytes = {max_message_bytes}; got {size} bytes"
        )


def _round(ask: Exchange) -> Flow[StepwellError | None]:
    """Sends what is unsettled once; the result is why something still is."""
    try:
        yield ask
    except StepwellError as error:
        return error
    return ask.frame.unsettled_error()
