"""Whether a history is one that sessions kept exactly once, and durably, can have.

The rule. A session is a sequential register whose value is (revision, position, state). It begins at its opening with
revision 0 and the state it is opened with, or at its fork with what its parent has at the revision that the fork answers.

1. Own: a change (step, reset) that expects revision r - 1 makes revision r and no other. No two acknowledged
   changes of a session have the same revision.
2. None missing: each revision r up to the highest one that anybody was told was made by one change: by the
   acknowledged one, or else by one of unknown outcome that expects r - 1. By the first sentence such a change fills one
   gap at most. A change that failed as "not applied" fills none.
3. Time: what is told after r was told is r or more (a change: more). The change that made r was called before
   anybody was told r.
4. Values: replaying the changes in the order of their revisions in `replay.LstmDense` gives every output, every
   position and every state that was read. Where a gap has several candidates, one choice must fit all that follows.
   Answers to one change, and reads of one revision, are the same bits.
5. There: nobody is told that a session is gone before somebody has asked to close it; after somebody was told so, or
   that it is closed, nothing more is told of it. No call ends with an error that the faults at hand cannot cause.
6. Again: a change that made revision r is not refused because the session is at r: its first answer is given again.

Rules 1 to 3 and 5 make a session linearizable: the numbers of the revisions are the one order in which its changes happened,
and nobody, whichever replica answers, is told of a moment before one that anybody was told of when the call was made.

Histories in which sessions are opened anew, expire, or change without an expected revision, and those of stores that lose
their last writes, are judged by `linearizability`.

The lines of a history are in the order of time. So rule 3 needs each session to be in one history only, in which any
number of drivers may write, after one another or at the same time.
"""

from __future__ import annotations

import collections
import dataclasses
from collections.abc import Iterable, Iterator, Sequence
from typing import Literal

from support.checks.history import CHANGES, End, Floats, Op
from support.checks.replay import LstmDense, LstmState, are_states, bits, is_output

Sort = Literal["lost", "twice", "wrong", "gone", "error"]
_MAX_BRANCHES = 1024
_SHOWN = 10


@dataclasses.dataclass(eq=False)
class Violation(Exception):
    """What cannot be, and where."""

    sort: Sort
    session: str
    revision: int
    what: str

    def __str__(self) -> str:
        return f"{self.sort}: session {self.session!r}, revision {self.revision}: {self.what}"


@dataclasses.dataclass
class Report:
    """What was checked, and the first fault of each session; later ones follow from it."""

    sessions: int = 0
    acknowledged: int = 0
    """Changes."""
    unknown: int = 0
    """Changes that may have happened."""
    filled: int = 0
    """Of these, those that did."""
    reads: int = 0
    forks: int = 0
    answered_again: int = 0
    """Changes with more than one answer, the same in all bits."""
    taken_back: int = 0
    """Acknowledged changes that the store has lost, as it may: see `linearizability`."""
    unjudged: int = 0
    """Sessions with too many orders to look at, and forks of such sessions that may be wrong."""
    violations: list[Violation] = dataclasses.field(default_factory=list)

    def count(self, sort: Sort) -> int:
        """Violations of a sort."""
        return sum(found.sort == sort for found in self.violations)

    def require_clean(self) -> Report:
        """Itself, if nothing is wrong.

        Raises:
            AssertionError: something is; the message has the first of it.
        """
        shown = "\n".join(str(found) for found in self.violations[:_SHOWN])
        assert not self.violations, f"{len(self.violations)} sessions are wrong:\n{shown}"
        return self

    def __str__(self) -> str:
        return (
            f"{self.acknowledged} changes of {self.sessions} sessions acknowledged ({self.answered_again} again),"
            f" {self.unknown} of unknown outcome ({self.filled} of them happened), {self.reads} reads,"
            f" {self.forks} forks; lost {self.count('lost') + self.count('gone')}, twice {self.count('twice')},"
            f" wrong {self.count('wrong') + self.count('error')}"
        )


def check(ops: Sequence[Op], model: LstmDense) -> Report:
    """Check the histories of all sessions in a list of operations, in the order of their calls."""
    report, of = Report(), collections.defaultdict(list)
    for op in ops:
        of[op.call.session].append(op)
        if op.call.kind == "fork":
            of[op.call.parent].append(op)
    snapshots: dict[tuple[str, int], list[LstmState]] = {}
    for session, mine in of.items():  # a parent stands before what was forked from it
        register = _Register(session, mine, model, snapshots, report)
        try:
            register.check()
        except Violation as violation:
            report.violations.append(violation)
    return report


@dataclasses.dataclass(frozen=True)
class _Observation:
    """An answer that reported a revision."""

    revision: int
    called_at: int
    told_at: int
    is_change: bool
    end: End


class _Register:
    """One session."""

    def __init__(
        self,
        session: str,
        ops: Sequence[Op],
        model: LstmDense,
        snapshots: dict[tuple[str, int], list[LstmState]],
        report: Report,
    ) -> None:
        self._session = session
        self._ops = ops
        self._model = model
        self._snapshots = snapshots
        self._report = report
        self._changes = [op for op in ops if op.call.kind in CHANGES]
        self._sights = sorted(self._seen(), key=lambda sight: sight.told_at)
        self._forked = {s.revision for s, op in self._sights_of_forks()}
        self._before: list[LstmState] = []

    def check(self) -> None:
        """Apply the rules.

        Raises:
            Violation: one is broken.
        """
        self._check_errors()
        start = self._start()
        if start is None:
            return  # it was never acknowledged, or hangs on a parent that is wrong itself
        revision, branches = start
        self._report.sessions += 1
        made = self._own()
        self._check_time(revision)
        self._check_end()
        top = max((sight.revision for sight in self._sights), default=revision)
        branches = self._check_reads(revision, branches)
        while revision < top:
            revision += 1
            branches, self._before = self._make(revision, made.get(revision), branches), branches
            branches = self._check_reads(revision, branches)

    # ------------------------------------------------------------------------------------------------- what there is

    def _seen(self) -> Iterator[_Observation]:
        for op in self._ops:
            is_change = op.call.kind in CHANGES
            for at, end in op.ends:
                if end.revision is not None:
                    made = is_change and end.outcome == "acknowledged"
                    yield _Observation(end.revision, op.called_at, at, made, end)

    def _sights_of_forks(self) -> Iterator[tuple[_Observation, Op]]:
        by_end = {id(sight.end): sight for sight in self._sights}
        for op in self._ops:
            if op.call.parent == self._session and op.acknowledged is not None:
                yield by_end[id(op.acknowledged)], op

    def _start(self) -> tuple[int, list[LstmState]] | None:
        """The revision it begins with, and what its state may be then."""
        openings: list[LstmState] = []
        for op in self._ops:
            end = op.acknowledged
            if op.call.session != self._session:
                continue
            if op.call.kind == "fork" and end is not None:
                assert end.revision is not None
                self._report.forks += 1
                found = self._snapshots.get((op.call.parent, end.revision))
                return None if found is None else (end.revision, found)
            if op.call.kind == "open" and (end is not None or op.may_have_happened):
                openings.append(self._model.initial(op.call.batch_size, op.call.states))
                if end is not None:
                    return 0, openings
        return None

    # ------------------------------------------------------------------------------------------------------ the rules

    def _check_errors(self) -> None:
        known = 0
        asked_at = min((op.called_at for op in self._of_itself("close")), default=None)
        for op in self._ops:
            for at, end in op.ends:
                known = max(known, end.revision or 0)
                blamed = op.call.parent or op.call.session
                if blamed != self._session or end.outcome not in ("gone", "error"):
                    continue
                if end.outcome == "error" or asked_at is None or at < asked_at:
                    sort: Sort = "gone" if end.outcome == "gone" else "error"
                    raise Violation(sort, self._session, known, f"{op.call.kind} {op.number}: {end.error}")

    def _check_end(self) -> None:
        """Rule 5: answers after the end."""
        ends = [at for op in self._of_itself("close") for at, end in op.ends if end.outcome == "acknowledged"]
        told = ((op, at, end) for op in self._ops for at, end in op.ends if end.outcome == "gone")
        ends += [at for op, at, _ in told if (op.call.parent or op.call.session) == self._session]
        for sight in self._sights:
            if ends and sight.called_at > min(ends):
                what = "told after somebody was told that the session is closed or gone"
                raise Violation("wrong", self._session, sight.revision, what)

    def _of_itself(self, kind: str) -> Iterator[Op]:
        return (op for op in self._ops if op.call.kind == kind and op.call.session == self._session)

    def _own(self) -> dict[int, Op]:
        """Rule 1: acknowledged changes by the revisions they made."""
        made: dict[int, Op] = {}
        for op in self._changes:
            end = op.acknowledged
            self._report.unknown += op.may_have_happened
            if end is None:
                continue
            assert end.revision is not None
            self._report.acknowledged += 1
            self._check_answers(op, end)
            self._check_refusals(op, end)
            if end.revision != op.call.expected + 1:
                sort: Sort = "twice" if end.revision > op.call.expected else "lost"
                what = f"{_name(op)} expected revision {op.call.expected}; it must make the next one"
                raise Violation(sort, self._session, end.revision, what)
            if end.revision in made:
                what = f"{_name(op)} and {_name(made[end.revision])} both made it, so one of them is lost"
                raise Violation("lost", self._session, end.revision, what)
            made[end.revision] = op
        return made

    def _check_answers(self, op: Op, first: End) -> None:
        """All answers to one change are the same."""
        again = [end for _, end in op.ends if end.outcome == "acknowledged" and end is not first]
        self._report.answered_again += bool(again)
        for end in again:
            same = (end.revision, end.position, bits(end.y)) == (
                first.revision,
                first.position,
                bits(first.y),
            )
            if not same:
                what = f"{_name(op)} was answered again in another way, at revision {end.revision}"
                raise Violation("twice", self._session, first.revision or 0, what)

    def _check_refusals(self, op: Op, first: End) -> None:
        """Rule 6."""
        if any(end.outcome == "not_applied" and end.revision == first.revision for _, end in op.ends):
            what = f"{_name(op)} made it, and was refused when it was sent again"
            raise Violation("wrong", self._session, first.revision or 0, what)

    def _check_time(self, start: int) -> None:
        """Rule 3: reported revisions never decrease."""
        highest, told = start, iter(self._sights)
        pending = next(told, None)
        for sight in sorted(self._sights, key=lambda sight: sight.called_at):
            while pending is not None and pending.told_at < sight.called_at:
                highest, pending = max(highest, pending.revision), next(told, None)
            if sight.revision < highest + sight.is_change:
                what = f"told after revision {highest} was; that one is lost"
                raise Violation("lost", self._session, sight.revision, what)

    def _make(self, revision: int, op: Op | None, branches: list[LstmState]) -> list[LstmState]:
        """Rules 2 to 4: the states that the session can have at a revision, by those it can have before."""
        told_at = next(sight.told_at for sight in self._sights if sight.revision >= revision)
        if op is not None:
            if op.called_at > told_at:
                what = f"{_name(op)} made it, but was called after it had been told"
                raise Violation("wrong", self._session, revision, what)
            return self._answered(revision, op, branches)
        candidates = [
            op
            for op in self._changes
            if op.may_have_happened and op.call.expected == revision - 1 and op.called_at < told_at
        ]
        if not candidates:
            raise Violation("twice", self._session, revision, self._nobody(revision))
        self._report.filled += 1
        return self._few(revision, [self._apply(op, state)[1] for op in candidates for state in branches])

    def _nobody(self, revision: int) -> str:
        refused = [op for op in self._changes if op.call.expected == revision - 1 and op.ends]
        hint = "".join(f"; {_name(op)} had failed as {op.ends[-1][1].outcome}" for op in refused)
        return f"no change that was asked for can have made it{hint}"

    def _answered(self, revision: int, op: Op, branches: list[LstmState]) -> list[LstmState]:
        end = op.acknowledged
        assert end is not None
        after: list[LstmState] = []
        for state in branches:
            y, new = self._apply(op, state)
            if end.position == new.position and is_output(op.call.outputs, end.y, y):
                after.append(new)
        if not after:
            sort, how = self._explain(op, end)
            what = (
                f"{_name(op)} was answered what no order of the changes gives (position {end.position}){how}"
            )
            raise Violation(sort, self._session, revision, what)
        return after

    def _check_reads(self, revision: int, branches: list[LstmState]) -> list[LstmState]:
        """Rule 4 for what was read at a revision."""
        answers: set[bytes] = set()
        for end in {
            id(s.end): s.end for s in self._sights if s.revision == revision and not s.is_change
        }.values():
            left = [state for state in branches if _is_state(end, state)]
            if not left:
                what = f"position {end.position} and the state were read; no order of the changes gives them"
                raise Violation("wrong", self._session, revision, what)
            branches = left
            if end.states is not None:
                self._report.reads += 1
                answers.add(b"".join(bits(end.states[name]) for name in sorted(end.states)))
        if len(answers) > 1:
            raise Violation("wrong", self._session, revision, "the state was read twice with different bits")
        if revision in self._forked:
            self._snapshots[self._session, revision] = branches
        return branches

    def _apply(self, op: Op, state: LstmState) -> tuple[Floats | None, LstmState]:
        if op.call.kind == "reset":
            return None, self._model.reset(state, op.call.states, op.call.rows)
        assert op.call.x is not None
        return self._model.step(state, op.call.x)

    def _few(self, revision: int, branches: list[LstmState]) -> list[LstmState]:
        if len(branches) > _MAX_BRANCHES:
            raise Violation(
                "error", self._session, revision, "too many unknown outcomes in a row to be checked"
            )
        return branches

    def _explain(self, op: Op, end: End) -> tuple[Sort, str]:
        """A guess at what happened instead: for people, the verdict does not hang on it."""
        if op.call.kind == "step":
            for state in self._before:
                if is_output(op.call.outputs, end.y, self._apply(op, state)[0]):
                    return "lost", "; it is right if the change before it is left out"
            for before in self._changes:
                if before.call.expected == op.call.expected - 1:
                    for state in self._before:
                        twice = self._apply(before, self._apply(before, state)[1])[1]
                        if is_output(op.call.outputs, end.y, self._apply(op, twice)[0]):
                            return "twice", f"; it is right if {_name(before)} is applied twice"
        return "wrong", ""


def _name(op: Op) -> str:
    return f"{op.call.kind} {op.number}"


def _is_state(end: End, state: LstmState) -> bool:
    if end.position is not None and end.position != state.position:
        return False
    return end.states is None or are_states(end.states, state.named())


def clean(ops: Iterable[Op], model: LstmDense) -> Report:
    """Check, and fail if anything is wrong."""
    return check(list(ops), model).require_clean()
