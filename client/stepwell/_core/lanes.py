"""A change of many sessions: one frame, or one for each replica that has some of them, all at the same time.

The members of a failed replica go to the next replica in each member's order. The other members are not affected.
"""

from __future__ import annotations

import asyncio
import copy
import dataclasses
import functools
import math
import queue
import time
from collections.abc import Callable
from typing import Any, TypeAlias

import numpy as np

from stepwell._base.flow import Flow, Notify, Pause
from stepwell._batching.frames import Frame, Indexes, Part, maker
from stepwell._batching.in_flight import Link, unanswered
from stepwell._batching.sets import SessionSet
from stepwell._batching.steps import Step
from stepwell._core.retrier import Retrier
from stepwell._routing.lookup import Lookup
from stepwell._routing.ranking import Keys, keys_of
from stepwell._routing.replica import Replica
from stepwell._routing.router import Router
from stepwell._transport.call import Call, Endpoint
from stepwell._transport.retry import Attempts, Deadline
from stepwell._transport.stream import Answer
from stepwell.errors import StepwellError


class Lane:
    """A frame on its way to one replica, or to the one server."""

    __slots__ = (
        "_generation",
        "_was_down",
        "attempts",
        "error",
        "forget",
        "frame",
        "is_over",
        "members",
        "on_part",
        "to",
        "tried",
    )

    def __init__(
        self,
        to: Replica | None,
        frame: Frame,
        members: Indexes,
        on_part: Callable[[Part], None],
        attempts: Attempts,
        tried: tuple[Replica, ...],
    ) -> None:
        self._generation, self._was_down = (0, False) if to is None else (to.generation, to.is_down)
        self.to = to
        self.frame = frame
        self.members = members
        """Its members, as indexes of the whole frame."""
        self.on_part = on_part
        self.attempts = attempts
        """The earlier attempts."""
        self.tried = tried
        """The replicas that were asked before."""
        self.forget: Callable[[], None] | None = None
        """Unregisters it at its link; None: it is not sent yet."""
        self.is_over = False
        self.error: StepwellError | None = None
        """Why it failed, if it did."""

    def take(self, answer: Answer) -> None:
        """Handles a part of the reply, or the error that ended it."""
        if isinstance(answer, StepwellError):
            self.fail(answer)
            return
        try:
            part = self.frame.accept(answer)
        except StepwellError as error:
            self.fail(error)
            return
        self.on_part(part)
        if self.frame.round_over:
            self.is_over = True

    def fail(self, error: StepwellError) -> None:
        """Ends it with an error."""
        if not self.is_over:
            self.error, self.is_over = error, True

    def answered(self, router: Router) -> None:
        """Records that the replica has answered."""
        if self._was_down and self.to is not None:
            router.up(self.to)

    def tried_after(self, error: StepwellError, router: Router) -> tuple[Replica, ...]:
        """The replicas to skip next: includes this one if the attempt failed because of it."""
        if self.to is None or not router.failed(self.to, self._generation, error):
            return self.tried
        return (*self.tried, self.to)


@dataclasses.dataclass(slots=True)
class Exchange:
    """Send the lanes that are not sent yet, and wait until one is over, or for `wait_s`; the answer is None."""

    deadline: Deadline
    max_message_bytes: int
    lanes: list[Lane] = dataclasses.field(default_factory=list)
    wait_s: float = 0.0
    inbox: Any = None
    """Pairs of a lane and an answer that are not handled yet. The sender creates it."""

    @property
    def has_news(self) -> bool:
        """Whether a lane is over."""
        return True in [lane.is_over for lane in self.lanes]

    def post(
        self, link_to: Callable[[Endpoint | None], Link], put: Callable[[tuple[Lane, Answer]], None]
    ) -> None:
        """Sends the lanes that are not sent yet; `put` receives each lane's answers."""
        for lane in self.lanes:
            if lane.forget is None and not lane.is_over:
                make = maker(lane.frame, self.deadline, self.max_message_bytes)
                try:
                    lane.forget = link_to(lane.to).post(make, functools.partial(_put, put, lane))
                except StepwellError as error:
                    lane.fail(error)


def _put(put: Callable[[tuple[Lane, Answer]], None], lane: Lane, answer: Answer) -> None:
    put((lane, answer))


Ask: TypeAlias = Call | Step | Pause | Exchange | Notify | Lookup
"""The asks of a client's flows."""


class _Rest:
    """Members without a final answer, and their attempts so far."""

    __slots__ = ("attempts", "due_s", "members", "tried")

    def __init__(
        self, members: Indexes, attempts: Attempts, tried: tuple[Replica, ...] = (), due_s: float = 0.0
    ) -> None:
        self.members = members
        self.attempts = attempts
        self.tried = tried
        self.due_s = due_s
        """When to send them, in seconds since the change began."""


class FrameExchange:
    """The exchange of one frame, with retries, until every member was applied or has failed for good."""

    def __init__(
        self,
        retrier: Retrier,
        frame: Frame,
        deadline: Deadline,
        on_part: Callable[[Part], None],
        max_message_bytes: int,
    ) -> None:
        self._retrier = retrier
        self._router = retrier.router
        self._frame = frame
        self._deadline = deadline
        self._on_part = on_part
        self._rests: list[_Rest] = []
        self._ask = Exchange(deadline, max_message_bytes)

    def run(self) -> Flow[None]:
        """The flow; `on_part` receives each part as it arrives."""
        router, ask = self._router, self._ask
        if router is not None and not router.replicas:
            yield from self._ready(router)
        self._rests.append(_Rest(np.arange(len(self._frame)), self._attempts()))
        try:
            while self._rests or ask.lanes:
                now_s = self._deadline.elapsed_s()
                due = [rest for rest in self._rests if rest.due_s <= now_s]
                self._rests = [rest for rest in self._rests if rest.due_s > now_s]
                for rest in due:
                    self._send(rest)
                if router is not None:
                    yield from router.notifications()
                wait_s = min([rest.due_s for rest in self._rests], default=math.inf) - now_s
                if ask.lanes:
                    ask.wait_s = min(max(0.0, wait_s), self._deadline.remaining_s())
                    yield ask
                    yield from self._look()
                elif self._rests:
                    last = min(self._rests, key=lambda rest: rest.due_s).attempts
                    assert last.last is not None
                    yield Pause(max(0.0, wait_s), last.made, last.last, is_reported=False)
        finally:
            for lane in ask.lanes:
                if lane.forget is not None:
                    lane.forget()

    def _attempts(self) -> Attempts:
        return self._retrier.attempts("StepStream", self._deadline, changes=True)

    def _ready(self, router: Router) -> Flow[None]:
        attempts = self._attempts()
        while not router.replicas:
            try:
                yield from router.ready()
            except StepwellError as error:
                yield Pause(attempts.failed(error), attempts.made, error)
                attempts.require_time()

    def _send(self, rest: _Rest) -> None:
        """Creates the lanes of some members, one for each of their replicas, if there is time."""
        try:
            rest.attempts.require_time()
        except StepwellError as final:
            self._give_up(rest.members, final)
            return
        frame = self._frame
        for to, members, named in self._divided(rest):
            attempts = rest.attempts if len(members) == len(rest.members) else copy.copy(rest.attempts)
            part, on_part = frame, self._on_part
            if len(members) < len(frame):
                part, on_part = frame.part(members, named), self._mapped(members)
            self._ask.lanes.append(Lane(to, part, members, on_part, attempts, rest.tried))

    def _divided(self, rest: _Rest) -> list[tuple[Replica | None, Indexes, SessionSet | None]]:
        """Some members by replica, with their set."""
        frame, router, members = self._frame, self._router, rest.members
        if router is None:
            return [(None, members, None)]
        keys = keys_of(frame.ids) if frame.named is None else keys_in(frame.named)
        if len(members) == len(frame) and not rest.tried:
            return [*divide(router, frame.named, keys)]
        return [(to, members[own], None) for to, own in router.split(keys[members], rest.tried)]

    def _mapped(self, members: Indexes) -> Callable[[Part], None]:
        def on_part(part: Part) -> None:
            failures = {int(members[i]): error for i, error in part.failures.items()}
            self._on_part(dataclasses.replace(part, applied=members[part.applied], failures=failures))

        return on_part

    def _look(self) -> Flow[None]:
        """Handles the lanes that are over, and the end of the time limit."""
        is_late = self._deadline.remaining_s() <= 0
        over = [lane for lane in self._ask.lanes if lane.is_over or is_late]
        self._ask.lanes = [lane for lane in self._ask.lanes if lane not in over]
        for lane in over:
            if lane.forget is not None:
                lane.forget()
            if not lane.is_over:
                lane.fail(unanswered())
            if lane.error is not None:
                yield from self._again(lane, lane.members[lane.frame.open_members()], lane.error)
                continue
            if self._router is not None:
                lane.answered(self._router)
            for error, places in lane.frame.unsettled():
                yield from self._again(lane, lane.members[places], error)

    def _again(self, lane: Lane, members: Indexes, error: StepwellError) -> Flow[None]:
        """Retries failed members, elsewhere or later, or fails them for good."""
        if not len(members):
            return
        router, tried, elsewhere = self._router, lane.tried, False
        if router is not None:
            tried = lane.tried_after(error, router)
            elsewhere = tried is not lane.tried and router.is_another_up(tried)
            if all(each in tried for each in router.replicas):
                tried = ()
        attempts = copy.copy(lane.attempts)
        try:
            delay_s = attempts.failed(error, elsewhere=elsewhere)
        except StepwellError as final:
            self._give_up(members, final)
            return
        self._rests.append(_Rest(members, attempts, tried, self._deadline.elapsed_s() + delay_s))
        yield Pause(delay_s, attempts.made, error, is_waited=False, to=lane.to)

    def _give_up(self, members: Indexes, error: StepwellError) -> None:
        none = np.zeros(0, np.uint64)
        failures = {int(member): copy.copy(error) for member in members.tolist()}
        self._on_part(Part(members[:0], none, none, {}, failures))


def exchange(ask: Exchange, link_to: Callable[[Endpoint | None], Link]) -> None:
    """Answers an `Exchange`."""
    inbox: queue.SimpleQueue[tuple[Lane, Answer]]
    inbox = ask.inbox = ask.inbox or queue.SimpleQueue()
    ask.post(link_to, inbox.put)
    until_s = time.monotonic() + ask.wait_s
    while not ask.has_news:
        remaining_s = until_s - time.monotonic()
        try:
            lane, answer = inbox.get(timeout=None if math.isinf(remaining_s) else max(0.0, remaining_s))
        except queue.Empty:
            return
        lane.take(answer)


async def exchange_async(ask: Exchange, link_to: Callable[[Endpoint | None], Link]) -> None:
    """Answers an `Exchange`."""
    inbox: asyncio.Queue[tuple[Lane, Answer]]
    inbox = ask.inbox = ask.inbox or asyncio.Queue()
    ask.post(link_to, inbox.put_nowait)
    try:
        async with asyncio.timeout(None if math.isinf(ask.wait_s) else ask.wait_s):
            while not ask.has_news:
                lane, answer = await inbox.get()
                lane.take(answer)
    except TimeoutError:
        return


def keys_in(sessions: SessionSet) -> Keys:
    """The keys of the sessions of a set."""
    if sessions.keys is None:
        sessions.keys = keys_of(sessions.ids)
    keys: Keys = sessions.keys
    return keys


def divide(
    router: Router, named: SessionSet | None, keys: Keys
) -> list[tuple[Replica, Indexes, SessionSet | None]]:
    """All members by replica; members of a set form the same sets each time."""
    if named is None:
        return [(to, own, None) for to, own in router.split(keys)]
    router.look()
    epoch = router.epoch
    known, divided = named.split
    if known != epoch:
        divided = [
            (to, own, SessionSet(tuple([named.ids[i] for i in own.tolist()]), named.rows[own]))
            for to, own in router.split(keys)
        ]
        named.split = epoch, divided
    return list(divided)
