"""Flows: operations as generators that do no I/O, and the loops that drive them.

A flow yields an *ask* (make a call, attempt a step, pause, exchange a frame) and receives the answer, or has
the error thrown into it. The sync and the async client drive the same flows, each with its own way of waiting.

A `Step` as an ask means one attempt of it, in a frame with others or as a unary call; the answer is a
`Stepped`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Awaitable, Callable, Generator, Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, Protocol, TypeAlias, TypeVar

from google.protobuf.message import Message

from stepwell._base.metadata import Pairs
from stepwell._batching.frames import Frame, Part
from stepwell._batching.steps import Step, Stepped, read
from stepwell._routing.ranking import key_of, key_of_request
from stepwell._transport.connecting import ALREADY_MADE, ConnectError, Contact
from stepwell._transport.retry import Attempts, Deadline, RepliesTooLargeError, RetryPolicy
from stepwell.errors import InvalidInputError, StepwellError
from stepwell.v1 import sessions_pb2

if TYPE_CHECKING:
    from stepwell._batching.lanes import Exchanges
    from stepwell._routing.replica import Replica
    from stepwell._routing.router import Router

Requests: TypeAlias = Callable[[], Iterator[Message]]
"""Makes the requests of one attempt."""


@dataclasses.dataclass(frozen=True, slots=True)
class Call:
    """Make one attempt of a call; the answer is its response, or the last one."""

    rpc: str
    request: Message | Requests
    """The request, or what makes those of a call whose requests stream."""
    timeout_s: float | None
    metadata: Pairs = ()
    """Beside that of every call."""
    on_reply: Callable[[Any], object] | None = None
    """Where responses stream: called with each."""
    to: Replica | None = None
    """The replica to ask; None: the client has one server."""


@dataclasses.dataclass(frozen=True, slots=True)
class Pause:
    """Wait before the next attempt; the answer is None."""

    seconds: float
    attempt: int
    """The one that failed, from 1."""
    error: StepwellError
    """How."""
    is_waited: bool = True
    """False: hooks are told of it, and what else is under way goes on."""
    is_told: bool = True
    """False: hooks have been told of it."""
    to: Replica | None = None
    """The replica that was asked, where several are at the same time."""


@dataclasses.dataclass(frozen=True, slots=True)
class Lookup:
    """Look a name up; the answer is the list of its addresses, HOST:PORT each."""

    host: str
    port: int


@dataclasses.dataclass(frozen=True, slots=True)
class Notify:
    """Call event hooks, one after the other; the answer is None. What a hook raises goes to the caller."""

    hooks: Sequence[Callable[[Any], object]]
    event: object


@dataclasses.dataclass(frozen=True, slots=True)
class Exchange:
    """Send a frame on the stream and call `on_part` for each part of its reply; the answer is None."""

    frame: Frame
    deadline: Deadline
    on_part: Callable[[Part], None]
    max_message_bytes: int

    @property
    def to(self) -> Replica | None:
        """The replica to ask: there is one server, or whoever sends it knows."""
        return None

    def request(self, frame_id: int) -> sessions_pb2.StepStreamRequest:
        """The message to send.

        Raises:
            InvalidInputError: The message exceeds the limit.
        """
        message = self.frame.request(frame_id, self.deadline)
        check_size("a frame", message, self.max_message_bytes)
        return message


T = TypeVar("T")
Ask: TypeAlias = "Call | Step | Pause | Exchange | Exchanges | Notify | Lookup"
Flow: TypeAlias = Generator[Ask, Any, T]


def drive(flow: Flow[T], answer: Callable[[Ask], Any]) -> T:
    """Drives a flow to its result; `answer` blocks."""
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
        # If the flow was left unfinished (Ctrl-C, a cancelled task), GeneratorExit tells it so.
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
        # If the flow was left unfinished (Ctrl-C, a cancelled task), GeneratorExit tells it so.
        flow.close()


def each(flows: Iterable[Flow[T]]) -> Flow[list[T]]:
    """Runs one flow after the other; the result is the list of their results."""
    results = []
    for flow in flows:
        result = yield from flow
        results.append(result)
    return results


class Retrier:
    """Turns single attempts into flows that retry."""

    def __init__(
        self,
        policy: RetryPolicy,
        max_message_bytes: int,
        contact: Contact = ALREADY_MADE,
        *,
        renews_tokens: bool = False,
        router: Router | None = None,
    ) -> None:
        self.router = router
        """Chooses the replica of each attempt; None: there is one server."""
        self._renews_tokens = renews_tokens
        self._policy = policy
        self._max_message_bytes = max_message_bytes
        self._contact = contact

    def call(
        self,
        rpc: str,
        request: Message,
        deadline: Deadline,
        *,
        changes: bool = False,
        to: Replica | None = None,
    ) -> Flow[Any]:
        """Makes a unary call, with retries; the result is the response.

        Args:
            rpc: Name of the method.
            request: The same in every attempt.
            deadline: Covers all attempts.
            changes: The call changes something, so an error must say whether it was applied.
            to: The replica to ask, and no other; None: the one that the request's session has.
        """
        check_size(rpc, request, self._max_message_bytes)

        def ask(to: Replica | None) -> Call:
            return Call(rpc, request, deadline.grpc_timeout_s(), to=to)

        route = self._route(to) or self._route_of(request)
        return (yield from self._answered(ask, self.attempts(rpc, deadline, changes=changes), route))

    def streamed(
        self,
        rpc: str,
        request: Message,
        deadline: Deadline,
        on_reply: Callable[[Any], object],
        *,
        to: Replica | None = None,
    ) -> Flow[None]:
        """Makes a call whose responses stream; `on_reply` is called with each.

        It changes something, and is not tried again once the server may have received it.
        """
        check_size(rpc, request, self._max_message_bytes)

        def ask(to: Replica | None) -> Call:
            return Call(rpc, request, deadline.grpc_timeout_s(), on_reply=on_reply, to=to)

        attempts = self.attempts(rpc, deadline, changes=True)
        yield from self._answered(ask, attempts, self._route(to), once=True)

    def sent(
        self, rpc: str, requests: Requests, deadline: Deadline, *, to: Replica | None = None
    ) -> Flow[Any]:
        """Makes a call whose requests stream, with retries; the result is the response."""

        def ask(to: Replica | None) -> Call:
            return Call(rpc, requests, deadline.grpc_timeout_s(), to=to)

        return (yield from self._answered(ask, self.attempts(rpc, deadline), self._route(to)))

    def _route(self, to: Replica | None) -> Way | None:
        return None if to is None else Fixed(self.router, to)

    def _route_of(self, request: Message) -> Way | None:
        router = self.router
        return None if router is None else router.route(key_of_request(request, router.home))

    def attempts(self, rpc: str, deadline: Deadline, *, changes: bool = False) -> Attempts:
        """The attempts of a call."""
        return Attempts(
            rpc, self._policy, deadline, self._contact, changes=changes, renews_tokens=self._renews_tokens
        )

    def step(self, step: Step) -> Flow[Stepped]:
        """Makes a step, with retries. The client may send each attempt in a frame with other steps.

        A reply that is too large ends the stream for every frame on it. So if a frame of one step ended that
        way, another frame's reply may be the cause. The next attempt is a unary call, whose error, if any, is
        about this step.
        """
        route = None if self.router is None else self.router.route(key_of(step.session_id))
        attempts: Attempts | None = None
        by_itself = False
        while True:
            try:
                if route is not None:
                    step = step._replace(to=(yield from route.next()))
                stepped: Stepped = read((yield self.unary(step))) if by_itself else (yield step)
            except StepwellError as error:
                attempts = attempts or self.attempts("Step", step.deadline, changes=True)
                by_itself = isinstance(error, RepliesTooLargeError) and error.members == 1
                pause = yield from _pause(attempts, route, error)
            else:
                if route is not None:
                    route.answered()
                return stepped
            yield pause
            attempts.woke()

    def unary(self, step: Step) -> Call:
        """A step as a unary call.

        Raises:
            InvalidInputError: The message exceeds the limit.
        """
        request = step.request()
        check_size("Step", request, self._max_message_bytes)
        return Call("Step", request, step.deadline.grpc_timeout_s(), step.trace, to=step.to)

    def _answered(
        self,
        ask: Callable[[Replica | None], Ask],
        attempts: Attempts,
        route: Way | None,
        *,
        once: bool = False,
    ) -> Flow[Any]:
        """The answer of an attempt. `once`: one of unknown outcome is the last."""
        while True:
            try:
                to = None if route is None else (yield from route.next())
                answered = yield ask(to)
            except StepwellError as error:
                if once and getattr(error, "outcome", "not_applied") == "unknown":
                    raise
                pause = yield from _pause(attempts, route, error)
            else:
                if route is not None:
                    route.answered()
                self._contact.make()
                return answered
            yield pause
            attempts.woke()

    def ask(self, frame: Frame, deadline: Deadline, on_part: Callable[[Part], None]) -> Exchange:
        """The ask for one round of a frame."""
        return Exchange(frame, deadline, on_part, self._max_message_bytes)

    def exchange(self, frame: Frame, deadline: Deadline, on_part: Callable[[Part], None]) -> Flow[None]:
        """Sends a frame, with retries, until every member was applied or has failed for good; `on_part` hears of each at once."""
        ask = self.ask(frame, deadline, on_part)
        attempts = self.attempts("StepStream", deadline, changes=True)
        try:
            while (error := (yield from _round(ask))) is not None:
                yield Pause(attempts.failed(error), attempts.made, error)
                attempts.woke()
        except StepwellError as final:
            on_part(frame.give_up(final))


def _pause(attempts: Attempts, route: Way | None, error: StepwellError) -> Flow[Pause]:
    """What comes between a failed attempt and the next.

    Raises:
        StepwellError: There is no other; with the outcome of all attempts taken together.
    """
    elsewhere = False if route is None else (yield from route.failed(error))
    return Pause(attempts.failed(error, elsewhere=elsewhere), attempts.made, error)


class Way(Protocol):
    """Where the attempts of a call go; see `_routing.router.Route`."""

    def next(self) -> Flow[Replica]:
        """The replica for the next attempt."""

    def answered(self) -> None:
        """The attempt was answered."""

    def failed(self, error: StepwellError, /) -> Flow[bool]:
        """It has failed; whether another replica is to be asked at once."""


class Fixed:
    """The way of a call that is for one replica."""

    def __init__(self, router: Router | None, to: Replica) -> None:
        self._router = router
        self._to = to

    def next(self) -> Flow[Replica]:
        """That replica."""
        yield from ()
        return self._to

    def answered(self) -> None:
        """Nothing follows."""

    def failed(self, error: StepwellError) -> Flow[bool]:
        """No other one is asked.

        Raises:
            ConnectError: It cannot be reached. It is waited for by nobody.
        """
        yield from ()
        if self._router is not None:
            self._router.failed(self._to, self._to.generation, error)
        if isinstance(error, ConnectError):
            raise error
        return False


def check_size(what: str, request: Message, max_message_bytes: int) -> None:
    """Checks the size of a message. gRPC would refuse a large one with the status of an overload.

    Raises:
        InvalidInputError: The message exceeds the limit.
    """
    size = request.ByteSize()
    if size > max_message_bytes:
        raise InvalidInputError(
            f"the message of {what} must be at most max_message_bytes = {max_message_bytes}; got {size} bytes"
        )


def _round(ask: Exchange) -> Flow[StepwellError | None]:
    """Sends the unsettled members once. The result is None, or why some are still unsettled."""
    try:
        yield ask
    except StepwellError as error:
        return error
    return ask.frame.unsettled_error()
