"""A change of many sessions that several replicas have: a frame for each, all at the same time.

The members of a replica that fails go to the next replica in the order of each; the others take no notice.
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
from stepwell._batching.exchange import Exchange, Link, unanswered
from stepwell._batching.frames import Frame, Indexes, Part
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
from stepwell.errors import ClosedError, StepwellError


class Lane:
    """A frame on its way to one replica."""

    __slots__ = (
        "_generation",
        "_router",
        "_was_down",
        "ask",
        "error",
        "forget",
        "is_over",
        "members",
        "rest",
        "to",
    )

    def __init__(self, router: Router, to: Replica, members: Indexes, ask: Exchange, rest: _Rest) -> None:
        self._router = router
        self._generation, self._was_down = to.generation, to.is_down
        self.to = to
        self.members = members
        """Its members, as indexes of the whole frame."""
        self.ask = ask
        self.rest = rest
        self.forget: Callable[[], None] | None = None
        """Unregisters it at its link; None: it is not sent yet."""
        self.is_over = False
        self.error: StepwellError | None = None
        """How it failed, if it is over and did."""

    def take(self, answer: Answer) -> None:
        """Handles a part of the reply, or the error that ended it."""
        if isinstance(answer, StepwellError):
            self.fail(answer)
            return
        try:
            part = self.ask.frame.accept(answer)
        except StepwellError as error:
            self.fail(error)
            return
        self.ask.on_part(part)
        if self.ask.frame.round_over:
            self.is_over = True

    def fail(self, error: StepwellError) -> None:
        """It is over."""
        if not self.is_over:
            self.error, self.is_over = error, True

    def answered(self) -> None:
        """The replica has answered."""
        if self._was_down:
            self._router.up(self.to)

    def failed(self, error: StepwellError) -> bool:
        """Whether it was because of the replica."""
        return self._router.failed(self.to, self._generation, error)


@dataclasses.dataclass(slots=True)
class Exchanges:
    """Send the lanes that are not sent yet, and wait until one is over, or for `wait_s`; the answer is None."""

    lanes: list[Lane] = dataclasses.field(default_factory=list)
    wait_s: float = 0.0
    inbox: Any = None
    """What has come and is not handled yet: pairs of a lane and an answer. Made by whoever sends."""

    @property
    def has_news(self) -> bool:
        """Whether one is over."""
        return any(lane.is_over for lane in self.lanes)


Ask: TypeAlias = Call | Step | Pause | Exchange | Exchanges | Notify | Lookup
"""What the flows of a client ask for."""


class _Rest:
    """Members that are not settled, and what was tried for them."""

    __slots__ = ("attempts", "due_s", "members", "tried")

    def __init__(
        self, members: Indexes, attempts: Attempts, tried: tuple[Replica, ...] = (), due_s: float = 0.0
    ) -> None:
        self.members = members
        self.attempts = attempts
        self.tried = tried
        self.due_s = due_s


class Exchanging:
    """The exchange of one frame."""

    def __init__(
        self,
        retrier: Retrier,
        router: Router,
        frame: Frame,
        deadline: Deadline,
        on_part: Callable[[Part], None],
    ) -> None:
        self._retrier = retrier
        self._router = router
        self._frame = frame
        self._keys: Keys = keys_of(frame.ids) if frame.named is None else keys_in(frame.named)
        self._deadline = deadline
        self._on_part = on_part
        self._rests: list[_Rest] = []
        self._ask = Exchanges()

    def run(self) -> Flow[None]:
        """Exchanges it, with retries, until every member was applied or has failed for good."""
        if not self._router.replicas:
            yield from self._ready()
        attempts = self._attempts()
        self._rests.append(_Rest(np.arange(len(self._frame)), attempts))
        ask = self._ask
        try:
            while self._rests or ask.lanes:
                now_s = self._router.now_s()
                due = [rest for rest in self._rests if rest.due_s <= now_s]
                self._rests = [rest for rest in self._rests if rest.due_s > now_s]
                for rest in due:
                    self._send(rest)
                yield from self._router.told()
                wait_s = min([rest.due_s for rest in self._rests], default=float("inf")) - now_s
                if not ask.lanes:
                    yield from self._wait(wait_s)
                    continue
                ask.wait_s = min(max(0.0, wait_s), self._deadline.remaining_s())
                yield ask
                yield from self._look()
        finally:
            for lane in ask.lanes:
                if lane.forget is not None:
                    lane.forget()

    def _attempts(self) -> Attempts:
        return self._retrier.attempts("StepStream", self._deadline, changes=True)

    def _ready(self) -> Flow[None]:
        attempts = self._attempts()
        while not self._router.replicas:
            try:
                yield from self._router.ready()
            except StepwellError as error:
                yield Pause(attempts.failed(error), attempts.made, error)
                attempts.woke()

    def _wait(self, wait_s: float) -> Flow[None]:
        """Nothing is under way: waits for what is due next."""
        last = min(self._rests, key=lambda rest: rest.due_s)
        error = last.attempts.last
        assert error is not None
        yield Pause(max(0.0, wait_s), last.attempts.made, error, is_reported=False)
        for rest in list(self._rests):
            try:
                rest.attempts.woke()
            except StepwellError as final:
                self._rests.remove(rest)
                self._give_up(rest.members, final)

    def _send(self, rest: _Rest) -> None:
        """Makes the lanes of some members: one for each replica that has some of them."""
        frame = self._frame
        if len(rest.members) == len(frame) and not rest.tried:
            divided = divide(self._router, frame.named, self._keys)
        else:
            parts = self._router.split(self._keys[rest.members], rest.tried)
            divided = [(to, rest.members[own], None) for to, own in parts]
        for to, members, named in divided:
            attempts = rest.attempts if len(members) == len(rest.members) else copy.copy(rest.attempts)
            own = _Rest(members, attempts, rest.tried)
            ask = self._retrier.ask(frame.part(members, named), self._deadline, self._mapped(members))
            self._ask.lanes.append(Lane(self._router, to, members, ask, own))

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
            if lane.error is None:
                lane.answered()
                for error, places in lane.ask.frame.unsettled():
                    yield from self._again(lane, lane.members[places], error)
            else:
                yield from self._again(lane, lane.members[lane.ask.frame.open_members()], lane.error)

    def _again(self, lane: Lane, members: Indexes, error: StepwellError) -> Flow[None]:
        """Some members have failed: they are tried again, elsewhere or later, or have failed for good."""
        if not len(members):
            return
        rest = lane.rest
        tried, elsewhere = rest.tried, False
        if lane.failed(error):
            tried = (*tried, lane.to)
            elsewhere = self._router.is_another_up(tried)
            if all(each in tried for each in self._router.replicas):
                tried = ()
        attempts = copy.copy(rest.attempts)
        try:
            delay_s = attempts.failed(error, elsewhere=elsewhere)
        except StepwellError as final:
            self._give_up(members, final)
            return
        self._rests.append(_Rest(members, attempts, tried, self._router.now_s() + delay_s))
        yield Pause(delay_s, attempts.made, error, is_waited=False, to=lane.to)

    def _give_up(self, members: Indexes, error: StepwellError) -> None:
        none = np.zeros(0, np.uint64)
        failures = {int(member): copy.copy(error) for member in members.tolist()}
        self._on_part(Part(members[:0], none, none, {}, failures))


def exchange_some(ask: Exchanges, link_to: Callable[[Endpoint], Link]) -> None:
    """Sends the lanes of a frame that are not sent yet, and waits until one is over, for `wait_s` at most."""
    inbox: queue.SimpleQueue[tuple[Lane, Answer]]
    inbox = ask.inbox = ask.inbox or queue.SimpleQueue()
    _post(ask, link_to, inbox.put)
    until_s = time.monotonic() + ask.wait_s
    while not ask.has_news:
        remaining_s = until_s - time.monotonic()
        try:
            lane, answer = inbox.get(timeout=None if math.isinf(remaining_s) else max(0.0, remaining_s))
        except queue.Empty:
            return
        lane.take(answer)


async def exchange_some_async(ask: Exchanges, link_to: Callable[[Endpoint], Link]) -> None:
    """As `exchange_some`."""
    inbox: asyncio.Queue[tuple[Lane, Answer]]
    inbox = ask.inbox = ask.inbox or asyncio.Queue()
    _post(ask, link_to, inbox.put_nowait)
    try:
        async with asyncio.timeout(None if math.isinf(ask.wait_s) else ask.wait_s):
            while not ask.has_news:
                lane, answer = await inbox.get()
                lane.take(answer)
    except TimeoutError:
        return


def _post(
    ask: Exchanges, link_to: Callable[[Endpoint], Link], put: Callable[[tuple[Lane, Answer]], None]
) -> None:
    for lane in ask.lanes:
        if lane.forget is None and not lane.is_over:
            try:
                lane.forget = link_to(lane.to).post(lane.ask.request, functools.partial(_put, put, lane))
            except ClosedError:
                raise
            except StepwellError as error:
                lane.fail(error)


def _put(put: Callable[[tuple[Lane, Answer]], None], lane: Lane, answer: Answer) -> None:
    put((lane, answer))


def keys_in(sessions: SessionSet) -> Keys:
    """The keys of the sessions of a set."""
    if sessions.keys is None:
        sessions.keys = keys_of(sessions.ids)
    keys: Keys = sessions.keys
    return keys


def divide(
    router: Router, named: SessionSet | None, keys: Keys
) -> list[tuple[Replica, Indexes, SessionSet | None]]:
    """All members by replica; those of a set are sets of their own, the same ones each time."""
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
