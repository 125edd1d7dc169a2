"""A change of many sessions that several replicas have: a frame for each, all at the same time. No I/O.

The members of a replica that fails go to the next replica in the order of each; the others take no notice.
"""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable
from typing import Any

import numpy as np

from stepwell._base.flow import Exchange, Flow, Pause, Retrier
from stepwell._batching.frames import Frame, Indexes, Part
from stepwell._batching.in_flight import Answer
from stepwell._routing.ranking import Keys
from stepwell._routing.replica import Replica
from stepwell._routing.router import Router
from stepwell._transport.retry import Attempts, Deadline
from stepwell.errors import DeadlineExceededError, StepwellError


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
        self._keys: Keys = frame.keys()
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
        yield Pause(max(0.0, wait_s), last.attempts.made, error, is_told=False)
        for rest in list(self._rests):
            try:
                rest.attempts.woke()
            except StepwellError as final:
                self._rests.remove(rest)
                self._give_up(rest.members, final)

    def _send(self, rest: _Rest) -> None:
        """Makes the lanes of some members: one for each replica that has some of them."""
        for to, members, frame in self._frame.split(self._router, self._keys, rest.members, rest.tried):
            attempts = rest.attempts if len(members) == len(rest.members) else copy.copy(rest.attempts)
            own = _Rest(members, attempts, rest.tried)
            ask = self._retrier.ask(frame, self._deadline, self._mapped(members))
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
                lane.fail(DeadlineExceededError("the time limit passed while a frame was unanswered"))
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
