"""Whether what callers were told of a session is what some order of their calls gives: linearizability, session by session.

`checker` judges sessions of which one driver at a time asks, each change of which expects a revision. This one judges
any history of `history.Op`: several callers at the same time, through any replica, changes that expect nothing,
closings and openings anew, expiry, and stores that lose their last writes in a fail-over. Its verdicts and its report are
those of `checker`.

A session is a register. Its value is whether it is there, its revision, position and state, and who opened it. The search
(Wing and Gong, "Testing and verifying concurrent objects", 1993, with the memory of Lowe, 2017) looks for a moment within
each call at which it took effect:

- a call that was acknowledged took effect once, between its first sending and its first answer, and was told the truth of
  that moment;
- a call that was refused told the truth of a moment, and had no effect;
- a call whose outcome nobody knows took effect once, at any time after it was sent, or never;
- a session expires only when its last acknowledged change is longer ago than the limit;
- at a fail-over exactly those writes are gone that the store says it lost (`Rollback`), and none in any other moment.

What only looks is settled as soon as it fits, so the search branches only where outcomes are unknown.
"""

from __future__ import annotations

import collections
import dataclasses
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, Literal, Protocol, TypeAlias

import numpy as np

from support.checker import Report, Sort, Violation
from support.history import ANY, CHANGES, End, Floats, Op
from support.replay import TOLERANCE

Life = Literal["absent", "live", "closed", "expired"]
_MOST_NODES = 200_000
"""Of a search: more of them cannot be looked at."""
State: TypeAlias = Any
"""What a model computes with; it has a position."""


class Model(Protocol):
    """What steps and resets do, in code that is not the server's: as `replay.LstmDense`."""

    def initial(self, batch_size: int, states: Mapping[str, Floats] | None = None) -> State:
        """The state that a session begins with."""

    def step(self, state: State, x: Floats) -> tuple[Floats, State]:
        """Outputs of a step, and the state after it."""

    def reset(self, state: State, states: Mapping[str, Floats] | None, rows: Sequence[int] | None) -> State:
        """The state after a reset."""


@dataclasses.dataclass(frozen=True)
class Rollback:
    """A fail-over took the last writes of a session back."""

    at: int
    """When, on the clock of the history."""
    session: str
    writes: int
    """How many of the session's."""
    life: Life
    """What it is afterwards."""
    revision: int = 0
    """Of a session that is live afterwards."""


@dataclasses.dataclass(frozen=True)
class Terms:
    """What may happen to sessions besides what callers ask for."""

    idle_s: float = math.inf
    """After so many seconds without a change a session may expire."""
    time_of: Callable[[int], float] = float
    """Seconds, by the clock of the history."""
    rollbacks: Sequence[Rollback] = ()


def check(ops: Sequence[Op], model: Model, terms: Terms | None = None) -> Report:
    """Check the histories of all sessions, in the order of their calls."""
    terms, report = terms or Terms(), Report()
    of: dict[str, list[Op]] = collections.defaultdict(list)
    for op in ops:
        of[op.call.session].append(op)
        if op.call.kind == "fork":
            of[op.call.parent].append(op)
    lost: dict[str, list[Rollback]] = collections.defaultdict(list)
    for each in terms.rollbacks:
        lost[each.session].append(each)
    forked: dict[str, list[tuple[int, State]]] = collections.defaultdict(list)
    for session, mine in of.items():  # a parent stands before what was forked from it
        search = _Search(session, mine, model, terms, lost[session], forked, report)
        try:
            search.run()
        except Violation as violation:
            report.violations.append(violation)
    return report


@dataclasses.dataclass(slots=True, eq=False)
class _Value:
    """Of the register; `before` is what the last write replaced."""

    life: Life
    revision: int
    state: State
    opened_with: int
    used_at: float
    before: _Value | None
    trail: int
    """Tells which writes made it, in which order."""
    op: Op | None = None
    """That wrote it."""

    def write(self, item: int, life: Life, op: Op | None = None, **changed: Any) -> _Value:
        fields: dict[str, Any] = {
            "revision": self.revision,
            "state": self.state,
            "opened_with": self.opened_with,
            "used_at": self.used_at,
        }
        trail = hash((self.trail, item))
        return _Value(life=life, before=self, trail=trail, op=op, **(fields | changed))

    def has(self, op: Op) -> bool:
        """Whether an operation is among its writes."""
        at: _Value | None = self
        while at is not None:
            if at.op is op:
                return True
            at = at.before
        return False

    def __str__(self) -> str:
        return f"live at revision {self.revision}" if self.life == "live" else self.life


@dataclasses.dataclass(slots=True, eq=False)
class _Item:
    """What the order must have."""

    kind: Literal["effect", "look", "rollback"]
    low: int
    high: float
    op: Op | None = None
    end: End | None = None
    rollback: Rollback | None = None
    must: bool = True

    def __str__(self) -> str:
        if self.op is None:
            return f"fail-over {self.rollback}"
        call, end = self.op.call, self.end
        told = "" if end is None else f" told {end.outcome} revision {end.revision} {end.error}"
        return f"{call.kind} {self.op.number} ({self.low}, {self.high}) expected {call.expected}{told}"


class _Search:
    """Of one session."""

    def __init__(
        self,
        session: str,
        ops: Sequence[Op],
        model: Model,
        terms: Terms,
        lost: Sequence[Rollback],
        forked: dict[str, list[tuple[int, State]]],
        report: Report,
    ) -> None:
        self._session = session
        self._model = model
        self._terms = terms
        self._forked = forked
        self._report = report
        self._forks = any(op.call.parent == session for op in ops)
        self._lost_forks = [op for op in ops if op.call.parent == session and op.acknowledged is None]
        items = [item for op in ops for item in self._items(op)]
        items += [_Item("rollback", each.at, each.at, rollback=each) for each in lost]
        twins = list(_twins(items, lost))
        if terms.idle_s < math.inf:
            twins += _openings_of_unused(items)
        self._may_repeat = {id(item.op) for item in twins}
        self._items_of: list[_Item] = sorted([*items, *twins], key=lambda item: item.low)
        self._backs = [
            (item.low, 1 << place) for place, item in enumerate(self._items_of) if item.kind == "rollback"
        ]
        self._ops = ops

    def run(self) -> None:
        """Find an order.

        Raises:
            Violation: there is none.
        """
        own = [op for op in self._ops if op.call.session == self._session]
        if not any(
            end.outcome in ("acknowledged", "gone") or end.revision is not None
            for op in own
            for _, end in op.ends
        ):
            return
        self._report.sessions += 1
        for op in own:
            self._count(op)
            self._check_errors(op)
        self._look_for_an_order()

    # ------------------------------------------------------------------------------------------------- what there is

    def _items(self, op: Op) -> Iterator[_Item]:
        call = op.call
        if call.kind == "fork" and call.parent == self._session:
            yield from self._looks_of_a_fork(op)
            return
        acknowledged = op.acknowledged
        if call.kind in ("read", "look"):
            for told_at, end in op.ends:
                if end.outcome in ("acknowledged", "gone"):
                    yield _Item("look", op.called_at, told_at, op, end)
            return
        for told_at, end in op.ends:
            tells = end.outcome == "gone" or end.revision is not None or end.error.startswith("SessionExists")
            if end.outcome != "acknowledged" and tells:
                yield _Item("look", op.called_at, told_at, op, end)
        if acknowledged is not None:
            told_at = next(at for at, end in op.ends if end is acknowledged)
            if call.kind == "open" and acknowledged.found:
                yield _Item("look", op.called_at, told_at, op, acknowledged)
                # it may be this very call that made it, in an attempt whose answer was lost
                yield _Item("effect", op.called_at, told_at, op, None, must=False)
            else:
                yield _Item("effect", op.called_at, told_at, op, acknowledged)
        elif _may_have_happened(op):
            yield _Item("effect", op.called_at, math.inf, op, None, must=False)

    @staticmethod
    def _looks_of_a_fork(op: Op) -> Iterator[_Item]:
        for told_at, end in op.ends:
            if end is op.acknowledged:
                yield _Item("look", op.called_at, told_at, op, end)

    def _count(self, op: Op) -> None:
        report, end = self._report, op.acknowledged
        if op.call.kind in CHANGES:
            report.acknowledged += end is not None
            report.unknown += end is None and _may_have_happened(op)
        elif end is not None:
            report.reads += op.call.kind == "read"
            report.forks += op.call.kind == "fork"
        again = [other for _, other in op.ends if other.outcome == "acknowledged" and other is not end]
        if op.call.kind in CHANGES and end is not None:
            report.answered_again += bool(again)
            for other in again:
                if (other.revision, other.position, _bits(other.y)) != (
                    end.revision,
                    end.position,
                    _bits(end.y),
                ):
                    what = f"{op.call.kind} {op.number} was answered again in another way"
                    raise Violation("twice", self._session, end.revision or 0, what)

    def _check_errors(self, op: Op) -> None:
        for _, end in op.ends:
            if end.outcome == "error":
                raise Violation("error", self._session, 0, f"{op.call.kind} {op.number}: {end.error}")

    # ------------------------------------------------------------------------------------------------------ the search

    def _look_for_an_order(self) -> None:
        start = _Value("absent", 0, None, 0, -math.inf, None, 0)
        stack = [(0, start)]
        seen: set[tuple[int, int]] = set()
        best: tuple[int, int, _Value] = (-1, 0, start)
        found = False
        while stack:
            done, value = stack.pop()
            done, progress = self._settle(done, value)
            if (done, value.trail) in seen:
                continue
            seen.add((done, value.trail))
            if len(seen) > _MOST_NODES:
                if found:
                    return
                raise Violation(
                    "error", self._session, value.revision, "too many orders to look at all of them"
                )
            for op in self._lost_forks if value.life == "live" else ():
                self._may_be_forked(op, value)
            candidates, left = self._candidates(done)
            if not left:
                found = True
                if not self._forks:  # else all that it may have been when it was forked
                    self._report.filled += progress
                    return
                continue
            if progress > best[0]:
                best = (progress, done, value)
            bound = min(self._items_of[place].high for place in left)
            if value.life == "live" and self._terms.time_of(int(bound)) - value.used_at >= self._terms.idle_s:
                stack.append((done, value.write(-1, "expired")))
            if self._is_too_late(done, left, value):
                continue
            # what was acknowledged is tried first: it mostly fits in one place only
            for place in sorted(candidates, key=lambda at: (self._items_of[at].must, -at)):
                stack += [(done | 1 << place, after) for after in self._after(place, value)]
        if not found:
            raise self._explain(*best[1:])

    def _settle(self, done: int, value: _Value) -> tuple[int, int]:
        """Take what only looks and sees this value: it changes nothing, so it need not wait."""
        again = True
        while again:
            again = False
            for place in self._candidates(done)[0]:
                item = self._items_of[place]
                if item.kind == "look" and self._sees(item, value):
                    done |= 1 << place
                    again = True
        return done, done.bit_count()

    def _candidates(self, done: int) -> tuple[list[int], list[int]]:
        """What may be next: all that was sent before anything that is left was answered. And what must be there of it."""
        bound, found, left = math.inf, [], []
        for place, item in enumerate(self._items_of):
            if done >> place & 1:
                continue
            if item.low > bound:
                break
            found.append(place)
            if item.must:
                left.append(place)
                bound = min(bound, item.high)
        return [place for place in found if self._items_of[place].low <= bound], left

    def _is_too_late(self, done: int, left: Sequence[int], value: _Value) -> bool:
        """Whether something told a revision that is over: nothing but a fail-over brings one back."""
        back = min((at for at, bit in self._backs if not done & bit), default=math.inf)
        items = [self._items_of[place] for place in left if self._items_of[place].high < back]
        told = [
            item.end.revision + (item.kind == "look")
            for item in items
            if item.end is not None
            and item.end.revision is not None
            and item.op is not None
            and item.op.call.kind not in ("open", "fork")
        ]
        return bool(told) and min(told) <= value.revision

    def _sees(self, item: _Item, value: _Value) -> bool:
        assert item.op is not None
        assert item.end is not None
        call, end = item.op.call, item.end
        if end.outcome == "gone":
            return value.life == "expired" if end.error.startswith("SessionExpired") else value.life != "live"
        if value.life != "live":
            return False
        if end.revision is not None and end.revision != value.revision:
            return False
        if end.outcome != "acknowledged":
            return True
        if call.kind == "open" and call.must_be_new and value.opened_with != call.request_id:
            return False
        if end.position is not None and end.position != value.state.position:
            return False
        if call.kind == "fork":
            self._may_be_forked(item.op, value)
            return True
        return end.states is None or _all_close(end.states, value.state.named())

    def _may_be_forked(self, op: Op, value: _Value) -> None:
        if not any(state is value.state for _, state in self._forked[op.number]):
            self._forked[op.number].append((value.revision, value.state))

    def _after(self, place: int, value: _Value) -> Iterable[_Value]:
        """What the register may be when something has taken effect; nothing if it cannot at this moment."""
        item = self._items_of[place]
        if item.kind == "look":
            return
        if item.kind == "rollback":
            assert item.rollback is not None
            yield from _taken_back(item.rollback, value)
            return
        assert item.op is not None
        if id(item.op) in self._may_repeat and value.has(item.op) and value.life != "expired":
            return
        call, end, used_at = item.op.call, item.end, self._terms.time_of(item.low)
        if call.kind in ("open", "fork"):
            if value.life == "live":
                return
            revision = 0 if value.life == "absent" else value.revision + 1
            if call.kind == "fork":
                for at, (its_revision, state) in enumerate(self._forked[item.op.number]):
                    if end is None or end.revision == max(revision, its_revision):
                        yield value.write(
                            place + at * len(self._items_of),
                            "live",
                            item.op,
                            revision=max(revision, its_revision),
                            state=state,
                            opened_with=call.request_id,
                            used_at=used_at,
                        )
                return
            state = self._model.initial(call.batch_size, call.states)
            if end is not None and (end.revision, end.position) != (revision, state.position):
                return
            yield value.write(
                place,
                "live",
                item.op,
                revision=revision,
                state=state,
                opened_with=call.request_id,
                used_at=used_at,
            )
            return
        if value.life != "live":
            return
        if call.kind == "close":
            yield value.write(place, "closed", item.op)
            return
        if call.expected not in (ANY, value.revision):
            return
        if end is not None and end.revision != value.revision + 1:
            return
        y, state = self._changed(item.op, value.state)
        if end is not None and not (end.position == state.position and _is_output(item.op, end.y, y)):
            return
        yield value.write(place, "live", item.op, revision=value.revision + 1, state=state, used_at=used_at)

    def _changed(self, op: Op, state: State) -> tuple[Floats | None, State]:
        if op.call.kind == "reset":
            return None, self._model.reset(state, op.call.states, op.call.rows)
        assert op.call.x is not None
        return self._model.step(state, op.call.x)

    def _explain(self, done: int, value: _Value) -> Violation:
        """Where the best order ends: for people, and a guess at what happened."""
        _, left = self._candidates(done)
        place = min(left, key=lambda at: self._items_of[at].high)
        item = self._items_of[place]
        revision = None if item.end is None else item.end.revision
        sort: Sort = "wrong"
        if item.end is not None and item.end.outcome == "gone":
            sort = "gone"
        elif revision is not None and revision > value.revision + (item.kind == "effect"):
            sort = "twice"
        elif revision is not None and revision < value.revision + (item.kind == "effect"):
            sort = "lost"
        others = "; ".join(str(self._items_of[at]) for at in left if at != place)
        what = f"{item} fits into no order; the longest one ends with the session {value}"
        return Violation(
            sort, self._session, revision or 0, what + (f"; beside it: {others}" if others else "")
        )


def _twins(items: Sequence[_Item], lost: Sequence[Rollback]) -> Iterator[_Item]:
    """Effects that a fail-over took back while their calls were under way: they may be had again, by another attempt."""
    for item in items:
        for each in lost:
            if item.kind == "effect" and item.low < each.at < item.high:
                yield _Item("effect", item.low, each.at, item.op, must=False)


def _openings_of_unused(items: Sequence[_Item]) -> Iterator[_Item]:
    """Openings whose first attempt nobody heard of, so that what it had made expired before another one."""
    for item in items:
        if (
            item.kind == "effect"
            and item.op is not None
            and item.op.call.kind == "open"
            and _has_unknown(item.op)
        ):
            yield _Item("effect", item.low, item.high, item.op, must=False)


def _may_have_happened(op: Op) -> bool:
    return not op.ends or _has_unknown(op)


def _has_unknown(op: Op) -> bool:
    return any(end.outcome == "unknown" for _, end in op.ends)


def _taken_back(rollback: Rollback, value: _Value) -> Iterator[_Value]:
    there: _Value | None = value
    for _ in range(rollback.writes):
        there = None if there is None else there.before
    if there is None or there.life != rollback.life:
        return
    if there.life == "live" and there.revision != rollback.revision:
        return
    yield dataclasses.replace(there, trail=hash((there.trail, rollback.at)))


def _bits(array: Floats | None) -> bytes:
    return b"" if array is None else array.tobytes()


def _is_output(op: Op, seen: Floats | None, y: Floats | None) -> bool:
    if y is None:
        return seen is None
    return seen is not None and _close(seen, y)


def _all_close(seen: Mapping[str, Floats], right: Mapping[str, Floats]) -> bool:
    return set(seen) == set(right) and all(_close(seen[name], right[name]) for name in right)


def _close(seen: Floats, right: Floats) -> bool:
    return seen.shape == right.shape and bool((np.abs(seen - right) <= TOLERANCE * (1 + np.abs(right))).all())
