"""Whether some order of the calls explains all answers about a session: linearizability, session by session.

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
- what one call makes together with others, and does not make in the end, is taken back before the call is answered; a
  fail-over may lose that, and then it stays;
- at a fail-over exactly those writes are gone that the store says it lost (`Rollback`), and none in any other moment;
- where nobody can say what a fail-over lost (`Loss`), it is the last writes of a session, and none that were acknowledged
  before the new primary had them for sure. Until all servers ask the new primary some may still ask the old one: what is
  changed and read there follows what was there before, and is lost.

What only looks is settled as soon as it fits, so the search branches only where outcomes are unknown.
"""

from __future__ import annotations

import collections
import dataclasses
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Protocol

from support.checks.checker import Report, Sort, Violation
from support.checks.history import ANY, CHANGES, Floats, Op
from support.checks.register import Item, Loss, PermittedEvents, Rollback, State, Value
from support.checks.replay import are_states, bits, is_output

TOO_MANY = "too many orders to look at all of them"
_SHOWN = 20
"""Calls in the message of a violation."""


class Model(Protocol):
    """What steps and resets do, in code that is not the server's: as `replay.LstmDense`."""

    def initial(self, batch_size: int, states: Mapping[str, Floats] | None = None) -> State:
        """The state that a session begins with."""

    def step(self, state: State, x: Floats) -> tuple[Floats, State]:
        """Outputs of a step, and the state after it."""

    def reset(self, state: State, states: Mapping[str, Floats] | None, rows: Sequence[int] | None) -> State:
        """The state after a reset."""


def check(ops: Sequence[Op], model: Model, terms: PermittedEvents | None = None) -> Report:
    """Check the histories of all sessions, in the order of their calls."""
    terms, report = terms or PermittedEvents(), Report()
    of: dict[str, list[Op]] = collections.defaultdict(list)
    for op in ops:
        of[op.call.session].append(op)
        if op.call.kind == "fork":
            of[op.call.parent].append(op)
    lost: dict[str, list[Rollback]] = collections.defaultdict(list)
    for each in terms.rollbacks:
        lost[each.session].append(each)
    forked: dict[str, list[tuple[int, State]]] = collections.defaultdict(list)
    partial: set[str] = set()
    """Sessions of whose orders not all were looked at: nobody knows all states of what was forked from them."""
    for session, mine in of.items():  # a parent stands before what was forked from it
        search = _Search(session, mine, model, terms, lost[session], forked, report)
        is_partial = any(
            op.call.kind == "fork" and op.call.session == session and op.call.parent in partial for op in mine
        )
        try:
            search.run()
        except Violation as violation:
            if is_partial and violation.what != TOO_MANY:
                report.unjudged += 1  # a state that is not known may explain it
            else:
                report.violations.append(violation)
        if is_partial or search.has_too_many:
            partial.add(session)
    return report


class _Search:
    """Of one session."""

    def __init__(
        self,
        session: str,
        ops: Sequence[Op],
        model: Model,
        terms: PermittedEvents,
        lost: Sequence[Rollback],
        forked: dict[str, list[tuple[int, State]]],
        report: Report,
    ) -> None:
        self._session = session
        self._model = model
        self._terms = terms
        self._forked = forked
        self._report = report
        self.has_too_many = False
        """Whether there are more orders than it looked at."""
        self._forks = any(op.call.parent == session for op in ops)
        items = [item for op in ops for item in self._items(op)]
        losses = [(each.at, each.at) for each in lost] + [(each.low, each.high) for each in terms.losses]
        twins = list(_twins(items, losses))
        items += [Item("rollback", each.at, each.at, rollback=each) for each in lost]
        items += [Item("loss", each.low, each.high, loss=each, must=False) for each in terms.losses]
        if terms.may_end:
            twins += _openings_of_unused(items)
        self._may_repeat = {id(item.op) for item in twins}
        self._items_of: list[Item] = sorted([*items, *twins], key=lambda item: item.low)
        forks = [op for op in ops if op.call.parent == session]
        self._forks_told = [item for op in forks for item in self._looks_of_a_fork(op)]
        made = [dataclasses.replace(item, kind="effect") for item in self._forks_told]
        self._other_forks = [
            *(Item("effect", op.called_at, math.inf, op) for op in forks if not op.acknowledged),
            *_twins(made, losses),
        ]
        """What attempts of forks made whose answer nobody has, maybe at another primary."""
        self._backs = [
            (item.low, item.high, 1 << place)
            for place, item in enumerate(self._items_of)
            if item.kind in ("rollback", "loss")
        ]
        self._ops = ops
        self._computed: dict[tuple[int, int], tuple[Floats | None, State, State]] = {}
        """By change and state, which is kept so that no other gets its number."""

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

    def _items(self, op: Op) -> Iterator[Item]:
        call = op.call
        if call.kind == "fork" and call.parent == self._session:
            yield from self._looks_of_a_fork(op)
            return
        acknowledged = op.acknowledged
        if call.is_together:
            yield from self._attempts(op)
        if call.kind in ("read", "look"):
            for told_at, end in op.ends:
                if end.outcome in ("acknowledged", "gone"):
                    yield Item("look", op.called_at, told_at, op, end)
            return
        for told_at, end in op.ends:
            # what is gone may be the parent of a fork
            tells = (
                (end.outcome == "gone" and call.kind != "fork")
                or end.revision is not None
                or end.error.startswith("SessionExists")
            )
            if end.outcome != "acknowledged" and tells:
                yield Item("look", op.called_at, told_at, op, end)
        if acknowledged is not None:
            told_at = next(at for at, end in op.ends if end is acknowledged)
            if call.kind == "open" and acknowledged.found:
                yield Item("look", op.called_at, told_at, op, acknowledged)
                # it may be this very call that made it, in an attempt whose answer was lost
                yield Item("effect", op.called_at, told_at, op, None, must=False)
            else:
                yield Item("effect", op.called_at, told_at, op, acknowledged)
        elif _may_have_happened(op):
            yield Item("effect", op.called_at, math.inf, op, None, must=False)

    @staticmethod
    def _attempts(op: Op) -> Iterator[Item]:
        """What was made and taken back by attempts of a call that makes several sessions, before it was answered for good.

        What attempts made that were to come again may stay, though another one was refused for good.
        """
        is_open = op.acknowledged is None and (_may_have_happened(op) or len(op.ends) > 1)
        high = math.inf if is_open else max(at for at, _ in op.ends)
        if op.acknowledged is not None:
            high = next(at for at, end in op.ends if end is op.acknowledged)
        yield Item("effect", op.called_at, high, op, None, must=False, is_attempt=True)
        yield Item("undo", op.called_at, high, op, None, must=False)

    @staticmethod
    def _looks_of_a_fork(op: Op) -> Iterator[Item]:
        for told_at, end in op.ends:
            if end is op.acknowledged:
                yield Item("look", op.called_at, told_at, op, end)

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
                if (other.revision, other.position, bits(other.y)) != (
                    end.revision,
                    end.position,
                    bits(end.y),
                ):
                    what = f"{op.call.kind} {op.number} was answered again in another way"
                    raise Violation("twice", self._session, end.revision or 0, what)

    def _check_errors(self, op: Op) -> None:
        for _, end in op.ends:
            if end.outcome == "error":
                raise Violation("error", self._session, 0, f"{op.call.kind} {op.number}: {end.error}")

    # ------------------------------------------------------------------------------------------------------ the search

    def _look_for_an_order(self) -> None:
        start = Value("absent", 0, None, 0, -math.inf, None, 0)
        stack = [(0, start)]
        seen: set[tuple[int, int]] = set()
        best: tuple[int, int, Value] = (-1, 0, start)
        found = False
        while stack:
            done, value = stack.pop()
            done, progress = self._settle(done, value)
            if value.undone_by is not None and value.undone_by < self._now(done):
                continue
            if (done, value.trail) in seen:
                continue
            seen.add((done, value.trail))
            if len(seen) > self._terms.most_nodes:
                self.has_too_many = True
                if found:
                    return
                raise Violation("error", self._session, value.revision, TOO_MANY)
            candidates, left, _ = self._candidates(done)
            self._note_forks(done, left, value)
            if not left:
                if not found:
                    self._report.taken_back += self._taken_back_in(value)
                found = True
                if not self._forks:  # else all that it may have been when it was forked
                    self._report.filled += progress
                    return
                continue
            if progress > best[0]:
                best = (progress, done, value)
            bound = min(self._items_of[place].high for place in left)
            if self._may_expire(done, value, bound):
                stack.append((done, value.write(-1, "expired")))
            if self._is_too_late(done, left, value):
                continue
            # what was acknowledged is tried first: it mostly fits in one place only
            for place in sorted(candidates, key=lambda at: (self._items_of[at].must, -at)):
                stack += [(done | 1 << place, after) for after in self._after(place, value)]
        if not found:
            raise self._explain(*best[1:])

    def _note_forks(self, done: int, left: Sequence[int], value: Value) -> None:
        """A fork may be of each state that the session has in its time and whose revision it was told.

        It was settled by the first of them; a fail-over may bring another one with the same revision. An attempt that
        another primary answered may be of any state that the session has there.
        """
        now, bound = self._now(done), min((self._items_of[place].high for place in left), default=math.inf)
        for item in self._forks_told:
            if item.low <= bound and now <= item.high:
                self._sees(item, value)
        for item in self._other_forks:
            if item.low <= bound and now <= item.high:
                assert item.op is not None
                for each in (value, value.old_for(item)):
                    if each is not None and each.life == "live":
                        self._may_be_forked(item.op, each)

    def _taken_back_in(self, value: Value) -> int:
        """Acknowledged changes that are not among its writes."""
        changes = (op for op in self._ops if op.call.kind in CHANGES and op.acknowledged is not None)
        return sum(not value.has(op) for op in changes)

    def _may_expire(self, done: int, value: Value, bound: float) -> bool:
        terms, now = self._terms, self._now(done)
        if value.life != "live" or not terms.may_end:
            return False
        end_s = math.inf if bound == math.inf else terms.time_of(int(bound))
        now_s = -math.inf if now == -math.inf else terms.time_of(int(now))
        return terms.may_end_at(self._session, value.used_at, now_s) <= end_s

    def _now(self, done: int) -> float:
        """The latest moment that is certainly over. Items are in the order of their beginnings."""
        return self._items_of[done.bit_length() - 1].low if done else -math.inf

    def _settle(self, done: int, value: Value) -> tuple[int, int]:
        """Take what only looks and sees this value: it changes nothing, so it need not wait.

        Unless something that may still happen had to happen before it.
        """
        again = True
        while again:
            again = False
            candidates, _, horizon = self._candidates(done)
            for place in candidates:
                item = self._items_of[place]
                if item.kind == "look" and item.low <= horizon and self._sees(item, value):
                    done |= 1 << place
                    again = True
        return done, done.bit_count()

    def _candidates(self, done: int) -> tuple[list[int], list[int], float]:
        """What may be next: all that was sent before anything that is left was answered. And what must be there of it.

        And when the first is over of those that need not be.
        """
        bound, horizon, found, left = math.inf, math.inf, [], []
        now = self._now(done)
        for place, item in enumerate(self._items_of):
            if done >> place & 1 or item.high < now:
                continue
            if item.low > bound:
                break
            found.append(place)
            if item.must:
                left.append(place)
                bound = min(bound, item.high)
            else:
                horizon = min(horizon, item.high)
        return [place for place in found if self._items_of[place].low <= bound], left, horizon

    def _is_too_late(self, done: int, left: Sequence[int], value: Value) -> bool:
        """Whether an answer reported a past revision: only a fail-over brings one back."""
        now = self._now(done)
        back = min(
            (low for low, high, bit in self._backs if not done & bit and high >= now), default=math.inf
        )
        items = [self._items_of[place] for place in left if self._items_of[place].high < back]
        if value.old is not None:
            items = [item for item in items if item.low >= value.old_until]
        told = [
            item.end.revision + (item.kind == "look")
            for item in items
            if item.end is not None
            and item.end.revision is not None
            and item.op is not None
            and item.op.call.kind not in ("open", "fork")
        ]
        return bool(told) and min(told) <= value.revision

    def _sees(self, item: Item, value: Value) -> bool:
        return self._sees_it(item, value) or any(self._sees_it(item, each) for each in value.stale_for(item))

    def _sees_it(self, item: Item, value: Value) -> bool:
        assert item.op is not None
        assert item.end is not None
        call, end = item.op.call, item.end
        if end.outcome == "gone":
            return value.life == "expired" if end.error.startswith("SessionExpired") else value.life != "live"
        is_own = value.undone_by is not None and value.op is item.op and end.outcome == "acknowledged"
        if value.life != "live" or is_own:
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
        return end.states is None or are_states(end.states, value.state.named())

    def _may_be_forked(self, op: Op, value: Value) -> None:
        if not any(state is value.state for _, state in self._forked[op.number]):
            self._forked[op.number].append((value.revision, value.state))

    def _after(self, place: int, value: Value) -> Iterable[Value]:
        """The possible values of the register after a call took effect; none if it cannot take effect now."""
        item = self._items_of[place]
        if item.kind == "look":
            if self._sees(item, value):  # it was not settled, as it is later than what may still happen
                yield value
            return
        if item.loss is not None:
            for back in _all_before(value, item.loss):
                if back is not value or item.loss.low < item.loss.high:
                    for left in back.left_by_loss():
                        yield value.split(left, item.loss)
            return
        yield from self._after_it(place, value)
        old = value.old_for(item)
        if old is not None and item.kind in ("effect", "undo"):
            for after in self._after_it(place, old):
                yield value.with_old(after)

    def _after_it(self, place: int, value: Value) -> Iterable[Value]:
        item = self._items_of[place]
        if item.kind == "rollback":
            assert item.rollback is not None
            yield from _taken_back(item.rollback, value)
            return
        assert item.op is not None
        if item.kind == "undo":
            if value.undone_by is not None and value.op is item.op:
                yield value.write(place, "absent")
            return
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
                            undone_by=item.high if item.is_attempt else None,
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
                undone_by=item.high if item.is_attempt else None,
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
        if end is not None and not (
            end.position == state.position and is_output(item.op.call.outputs, end.y, y)
        ):
            return
        yield value.write(place, "live", item.op, revision=value.revision + 1, state=state, used_at=used_at)

    def _changed(self, op: Op, state: State) -> tuple[Floats | None, State]:
        known = self._computed.get((id(op), id(state)))
        if known is None:
            made: tuple[Floats | None, State]
            if op.call.kind == "reset":
                made = None, self._model.reset(state, op.call.states, op.call.rows)
            else:
                assert op.call.x is not None
                made = self._model.step(state, op.call.x)
            known = self._computed[id(op), id(state)] = (*made, state)
        return known[0], known[1]

    def _explain(self, done: int, value: Value) -> Violation:
        """Where the best order ends: for people, and a guess at what happened."""
        _, left, _ = self._candidates(done)
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
        what = f"{item} fits into no order; the longest one ends with the session {value}"
        others = "; ".join(str(self._items_of[at]) for at in left if at != place)
        before = [at for at, other in enumerate(self._items_of) if at != place and other.low <= item.high]
        for title, shown in (
            ("beside it", others),
            ("before it, with + in that order", "; ".join(self._shown(at, done) for at in before[-_SHOWN:])),
            ("states of its forks, by call", "; ".join(self._shown_forks())),
        ):
            what += f"\n  {title}: {shown}" if shown else ""
        return Violation(sort, self._session, revision or 0, what)

    def _shown(self, place: int, done: int) -> str:
        return f"{'+' if done >> place & 1 else '-'} {self._items_of[place]}"

    def _shown_forks(self) -> Iterator[str]:
        """The revisions that it can have begun with."""
        for op in self._ops:
            if op.call.kind == "fork" and op.call.session == self._session:
                revisions = sorted({revision for revision, _ in self._forked[op.number]})
                yield f"{op.number} of {op.call.parent} at revision {', '.join(map(str, revisions)) or 'none'}"


def _twins(items: Sequence[Item], lost: Sequence[tuple[float, float]]) -> Iterator[Item]:
    """Effects that a fail-over took back: they may be had again, by another attempt that is still under way."""
    for item in items:
        for low, high in lost:
            if item.kind != "effect" or item.low >= high:
                continue
            if item.high > low:
                yield Item("effect", item.low, high, item.op, must=False)
            assert item.op is not None
            if item.must and _has_unknown(item.op):  # it was sent more than once
                yield Item("effect", item.low, math.inf, item.op, must=False)


def _all_before(value: Value, loss: Loss) -> Iterator[Value]:
    """What a session may be when last writes are gone: none first, then more and more of those that may be lost."""
    there: Value | None = value
    while there is not None:
        yield there
        if there.op is not None and any(
            at < loss.since for at, end in there.op.ends if end.outcome == "acknowledged"
        ):
            return
        there = there.before


def _openings_of_unused(items: Sequence[Item]) -> Iterator[Item]:
    """What attempts of openings and forks made of which nobody heard, so that it expired before the next one made it anew.

    One of the attempts of each is among the items already.
    """
    for item in items:
        op = item.op
        if item.kind != "effect" or item.is_attempt or op is None or op.call.kind not in ("open", "fork"):
            continue
        unheard = sum(end.outcome == "unknown" for _, end in op.ends)
        for _ in range(unheard if item.must else unheard - 1):
            yield Item("effect", item.low, item.high, op, must=False)


def _may_have_happened(op: Op) -> bool:
    return not op.ends or _has_unknown(op)


def _has_unknown(op: Op) -> bool:
    return any(end.outcome == "unknown" for _, end in op.ends)


def _taken_back(rollback: Rollback, value: Value) -> Iterator[Value]:
    there: Value | None = value
    for _ in range(rollback.writes):
        there = None if there is None else there.before
    if there is None or there.life != rollback.life:
        return
    if there.life == "live" and there.revision != rollback.revision:
        return
    for left in there.left_by_loss():
        yield dataclasses.replace(left, trail=hash((left.trail, rollback.at)))
