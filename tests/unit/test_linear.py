"""What the search for an order says of histories that are made by hand."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest

from support.checks.checker import Report
from support.checks.history import ANY, Call, End, Floats, Op
from support.checks.linearizability import check
from support.checks.register import Loss, PermittedEvents, Rollback
from support.sim.plain_model import PlainModel, PlainState

MODEL = PlainModel()


def x(value: float) -> Floats:
    return np.full((1, 2), value, np.float32)


class Told:
    """A history: each call has the moments when it was made and told."""

    def __init__(self) -> None:
        self.ops: list[Op] = []
        self.states: list[PlainState] = [MODEL.initial(1)]
        """By revision, of the session that all changes were made to in their order."""
        self.outputs: list[Floats | None] = [None]

    def op(self, low: int, high: int | None, call: Call, *ends: End) -> Op:
        op = Op(str(len(self.ops)), low, call, [] if high is None else [(high, end) for end in ends])
        self.ops.append(op)
        return op

    def open(self, low: int, high: int | None, **fields: Any) -> Op:
        end = End(outcome="acknowledged", revision=fields.pop("revision", 0), position=0, **_found(fields))
        return self.op(low, high, Call(kind="open", session="a", batch_size=1, **fields), end)

    def after(self, value: float) -> None:
        """The next revision is a step with this."""
        y, state = MODEL.step(self.states[-1], x(value))
        self.states.append(state)
        self.outputs.append(y)

    def step(self, low: int, high: int | None, value: float, revision: int, *, expected: int = ANY) -> Op:
        """A step that made a revision, or one that is not told (`high` is None)."""
        call = Call(kind="step", session="a", expected=expected, x=x(value))
        return self.op(low, high, call, self.changed(revision))

    def changed(self, revision: int) -> End:
        state = self.states[revision]
        return End(
            outcome="acknowledged", revision=revision, position=state.position, y=self.outputs[revision]
        )

    def read(self, low: int, high: int, revision: int) -> Op:
        state = self.states[revision]
        end = End(outcome="acknowledged", revision=revision, position=state.position, states=state.named())
        return self.op(low, high, Call(kind="read", session="a"), end)

    def gone(self, low: int, high: int, error: str = "SessionNotFound: was closed") -> Op:
        return self.op(low, high, Call(kind="read", session="a"), End(outcome="gone", error=error))

    def close(self, low: int, high: int | None) -> Op:
        return self.op(low, high, Call(kind="close", session="a"), End(outcome="acknowledged"))

    def check(
        self,
        rollbacks: Sequence[Rollback] = (),
        idle_s: float = float("inf"),
        losses: Sequence[Loss] = (),
        ends_after: Callable[[str, float, float], float] | None = None,
        most_nodes: int = 10_000,
    ) -> Report:
        terms = PermittedEvents(idle_s, float, rollbacks, losses, most_nodes, ends_after)
        return check(sorted(self.ops, key=lambda op: op.called_at), MODEL, terms)


def _found(fields: dict[str, Any]) -> dict[str, Any]:
    return {"found": fields.pop("found")} if "found" in fields else {}


def two_steps() -> Told:
    told = Told()
    told.open(0, 1)
    told.after(1)
    told.after(2)
    return told


def sorts(report: Report) -> list[str]:
    return [violation.sort for violation in report.violations]


def test_calls_at_the_same_time_may_be_in_any_order() -> None:
    told = two_steps()
    told.step(2, 9, 2, 2)
    told.step(3, 8, 1, 1)
    told.read(4, 7, 0)
    report = told.check()
    assert sorts(report) == []
    assert (report.acknowledged, report.reads) == (2, 1)


@pytest.mark.parametrize("revision", [0, 1])
def test_a_stale_read_is_found(revision: int) -> None:
    told = two_steps()
    told.step(2, 3, 1, 1)
    told.step(4, 5, 2, 2)
    told.read(6, 7, 2)
    told.read(8, 9, revision)
    assert sorts(told.check()) == ["lost"]


def test_a_step_that_was_lost_is_found() -> None:
    told = two_steps()
    told.step(2, 3, 1, 1)
    other = Told()
    other.after(2)
    told.op(4, 5, Call(kind="step", session="a", expected=ANY, x=x(2)), other.changed(1))
    assert sorts(told.check()) == ["lost"]


def test_a_step_that_was_applied_twice_is_found() -> None:
    told = two_steps()
    told.step(2, 3, 1, 1)
    told.read(4, 5, 2)  # nobody made it
    assert sorts(told.check()) == ["twice"]


def test_an_output_of_another_order_is_found() -> None:
    told = two_steps()
    told.step(2, 3, 2, 1)
    assert sorts(told.check()) == ["wrong"]


@pytest.mark.parametrize("happened", [True, False])
def test_what_nobody_knows_may_have_happened_or_not(happened: bool) -> None:
    told = two_steps()
    told.step(2, None, 1, 1)
    if happened:
        told.step(4, 5, 2, 2)
    else:
        other = Told()
        other.after(2)
        told.op(4, 5, Call(kind="step", session="a", expected=ANY, x=x(2)), other.changed(1))
    assert sorts(told.check()) == []


def test_what_nobody_knows_happens_once() -> None:
    told = two_steps()
    told.after(1)
    told.step(2, None, 1, 1)
    told.step(4, 5, 2, 2)
    told.read(6, 7, 3)
    assert sorts(told.check()) == ["twice"]


def test_a_refusal_must_be_true() -> None:
    told = two_steps()
    told.step(2, 3, 1, 1)
    end = End(outcome="not_applied", revision=0, error="RevisionConflict: ")
    told.op(4, 5, Call(kind="step", session="a", expected=7, x=x(1)), end)
    assert sorts(told.check()) == ["lost"]


def test_closed_stays_closed_until_it_is_opened() -> None:
    told = two_steps()
    told.step(2, 3, 1, 1)
    told.close(4, 5)
    told.gone(6, 7)
    assert sorts(told.check()) == []
    told.read(8, 9, 1)
    assert sorts(told.check()) == ["wrong"]


def test_it_begins_anew_behind_the_revision_at_which_it_ended() -> None:
    told = two_steps()
    told.step(2, 3, 1, 1)
    told.close(4, 5)
    told.open(6, 7, revision=2)
    assert sorts(told.check()) == []
    told.ops[-1] = Op("x", 6, told.ops[-1].call, [(7, End(outcome="acknowledged", revision=0, position=0))])
    assert sorts(told.check()) == ["lost"]


def test_only_one_of_two_makes_a_session() -> None:
    told = Told()
    told.open(0, 3, must_be_new=True, request_id=1)
    told.open(1, 2, must_be_new=True, request_id=2)
    assert sorts(told.check()) == ["lost"]


def test_who_is_told_that_it_made_a_session_before_did() -> None:
    told = Told()
    told.open(0, 1, must_be_new=True, request_id=1)
    told.open(2, 3, must_be_new=True, request_id=2, found=True)
    assert sorts(told.check()) == ["wrong"]


def test_a_session_that_vanishes_is_found() -> None:
    told = two_steps()
    told.gone(2, 3)
    assert sorts(told.check()) == ["gone"]


@pytest.mark.parametrize(("at", "wrong"), [(30, []), (20, ["gone"])])
def test_it_expires_after_its_limit_and_no_sooner(at: int, wrong: list[str]) -> None:
    told = two_steps()
    told.step(14, 15, 1, 1)
    told.gone(at, at + 1, "SessionExpired: ")
    assert sorts(told.check(idle_s=10.0)) == wrong


def test_a_fail_over_takes_back_what_the_store_says_and_no_more() -> None:
    told = two_steps()
    told.step(2, 3, 1, 1)
    told.step(4, 5, 2, 2)
    told.read(8, 9, 1)
    assert sorts(told.check([Rollback(6, "a", 1, "live", 1)])) == []
    assert sorts(told.check([Rollback(6, "a", 2, "live", 0)])) == ["twice"], "that was not lost"
    assert sorts(told.check()) == ["lost"]


def test_what_a_fail_over_took_back_may_be_had_again_by_another_attempt() -> None:
    told = two_steps()
    told.step(2, 9, 1, 1)
    told.read(3, 4, 1)
    told.read(10, 11, 1)
    assert sorts(told.check([Rollback(6, "a", 1, "live", 0)])) == []


def test_what_a_fail_over_took_back_may_come_again_by_an_attempt_that_is_late() -> None:
    told = two_steps()
    op = told.step(2, 5, 1, 1)
    told.read(8, 9, 0)
    told.read(10, 11, 1)
    rollback = Rollback(6, "a", 1, "live", 0)
    assert sorts(told.check([rollback])) == ["twice"], "there was one attempt, which is over"
    op.ends.insert(0, (3, End(outcome="unknown")))
    assert sorts(told.check([rollback])) == []
    assert sorts(told.check(losses=lost_at(6))) == []


def test_a_fork_has_the_state_of_its_parent_at_its_moment() -> None:
    told = two_steps()
    told.step(2, 3, 1, 1)
    end = End(outcome="acknowledged", revision=1, position=1)
    told.op(4, 5, Call(kind="fork", session="b", parent="a"), end)
    told.step(6, 7, 2, 2)
    right, wrong = told.states[1].named(), told.states[2].named()
    ask = Call(kind="read", session="b")
    told.op(8, 9, ask, End(outcome="acknowledged", revision=1, position=1, states=right))
    assert sorts(told.check()) == []
    told.op(10, 11, ask, End(outcome="acknowledged", revision=1, position=1, states=wrong))
    assert sorts(told.check()) == ["wrong"]


def test_a_fork_has_any_of_the_states_that_a_fail_over_gave_its_parent_in_its_time() -> None:
    told = two_steps()
    told.step(2, 3, 1, 1)
    end = End(outcome="acknowledged", revision=1, position=1)
    told.op(4, 9, Call(kind="fork", session="b", parent="a"), end)
    before = told.states[1].named()
    y, other = MODEL.step(told.states[0], x(5))
    again = End(outcome="acknowledged", revision=1, position=1, y=y)
    told.op(7, 8, Call(kind="step", session="a", expected=ANY, x=x(5)), again)
    rollback = [Rollback(6, "a", 1, "live", 0)]
    ask = Call(kind="read", session="b")
    for states in (before, other.named()):
        own = copy.deepcopy(told)
        own.op(10, 11, ask, End(outcome="acknowledged", revision=1, position=1, states=states))
        assert sorts(own.check(rollback)) == []
    told.op(12, 13, Call(kind="step", session="a", expected=ANY, x=x(6)), End(outcome="unknown"))
    wrong = MODEL.step(told.states[0], x(6))[1].named()
    told.op(14, 15, ask, End(outcome="acknowledged", revision=1, position=1, states=wrong))
    assert sorts(told.check(rollback)) == ["wrong"]


def forked_at_1(low: int, high: int) -> tuple[Told, Op]:
    """A session whose fork is reported at revision 1 and read at revision 2, and the call that forked it."""
    told = two_steps()
    told.step(2, 3, 1, 1)
    end = End(outcome="acknowledged", revision=1, position=1)
    fork = told.op(low, high, Call(kind="fork", session="b", parent="a"), end)
    told.step(12, 13, 2, 2, expected=1)
    told.op(22, 23, Call(kind="read", session="b"), told.read(24, 25, 2).ends[0][1])
    return told, fork


def test_a_fork_may_be_made_at_both_primaries_of_a_fail_over() -> None:
    told, _ = forked_at_1(14, 16)  # the old primary has revision 1, the new one revision 2
    assert sorts(told.check(losses=lost_at(10, 5, 20))) == []


def test_a_fork_may_be_made_again_by_an_attempt_that_is_late() -> None:
    told, fork = forked_at_1(6, 8)
    (found,) = told.check(losses=lost_at(10, 5, 20)).violations
    assert found.sort == "twice"
    assert "+ fork 2 (6, 8) expected 0 told acknowledged revision 1" in found.what
    assert "2 of a at revision 1" in found.what
    fork.ends.insert(0, (7, End(outcome="unknown")))
    assert sorts(told.check(losses=lost_at(10, 5, 20))) == []
    assert sorts(told.check()) == ["twice"], "nothing was lost"


def test_no_fork_is_found_wrong_unless_all_states_of_its_parent_are_known() -> None:
    told = two_steps()
    for value in range(4):
        told.op(2, 3, Call(kind="step", session="a", expected=ANY, x=x(value)), End(outcome="unknown"))
    end = End(outcome="acknowledged", revision=2, position=2)
    told.op(4, 5, Call(kind="fork", session="b", parent="a"), end)
    unjudged = 0
    for first, second in itertools.permutations(range(4), 2):
        state = MODEL.step(MODEL.step(told.states[0], x(first))[1], x(second))[1]
        own = copy.deepcopy(told)
        ask = Call(kind="read", session="b")
        own.op(8, 9, ask, End(outcome="acknowledged", revision=2, position=2, states=state.named()))
        assert sorts(own.check()) == []
        report = own.check(most_nodes=10)
        assert sorts(report) == []
        unjudged += report.unjudged
    assert unjudged > 0


def test_an_answer_again_is_the_same() -> None:
    told = two_steps()
    op = told.step(2, 3, 1, 1)
    op.ends.append((4, told.changed(1)))
    assert sorts(told.check()) == []
    op.ends.append((5, End(outcome="acknowledged", revision=2, position=1, y=told.outputs[1])))
    assert sorts(told.check()) == ["twice"]


def test_an_error_that_nothing_can_cause_is_found() -> None:
    told = two_steps()
    told.op(2, 3, Call(kind="read", session="a"), End(outcome="error", error="Internal: "))
    assert sorts(told.check()) == ["error"]


# ------------------------------------------------------------------ what a fail-over may lose that nobody can tell of


def lost_at(at: int, since: int = 0, until: int | None = None) -> list[Loss]:
    return [Loss(since, at, at if until is None else until)]


def three_steps() -> Told:
    told = two_steps()
    told.after(3)
    told.step(2, 3, 1, 1)
    told.step(4, 5, 2, 2)
    told.step(6, 7, 3, 3)
    return told


@pytest.mark.parametrize("left", [0, 1, 2, 3])
def test_any_number_of_last_changes_may_be_lost(left: int) -> None:
    told = three_steps()
    told.read(12, 13, left)
    report = told.check(losses=lost_at(10))
    assert sorts(report) == []
    assert report.taken_back == 3 - left
    assert sorts(told.check()) == ([] if left == 3 else ["lost"])


def test_a_hole_is_found() -> None:
    told = three_steps()
    without_the_second = Told()
    without_the_second.after(1)
    without_the_second.after(3)
    state = without_the_second.states[2]
    end = End(outcome="acknowledged", revision=2, position=2, states=state.named())
    told.op(12, 13, Call(kind="read", session="a"), end)
    assert sorts(told.check(losses=lost_at(10))) != []


def test_a_mix_of_two_moments_is_found() -> None:
    told = three_steps()
    end = End(outcome="acknowledged", revision=2, position=2, states=told.states[1].named())
    told.op(12, 13, Call(kind="read", session="a"), end)
    assert sorts(told.check(losses=lost_at(10))) != []


def test_the_state_of_another_session_is_found() -> None:
    told = three_steps()
    other = Told()
    for value in (7, 8):
        other.after(value)
    end = End(outcome="acknowledged", revision=2, position=2, states=other.states[2].named())
    told.op(12, 13, Call(kind="read", session="a"), end)
    assert sorts(told.check(losses=lost_at(10))) != []


@pytest.mark.parametrize(("since", "wrong"), [(5, []), (6, ["lost"])])
def test_what_the_new_primary_had_for_sure_is_not_lost(since: int, wrong: list[str]) -> None:
    """The second step was told at 5."""
    told = three_steps()
    told.read(12, 13, 1)
    assert sorts(told.check(losses=lost_at(10, since))) == wrong


def test_nothing_is_lost_at_another_time() -> None:
    told = three_steps()
    told.read(12, 13, 3)
    told.read(14, 15, 2)
    assert sorts(told.check(losses=lost_at(10))) == ["lost"]


def test_it_is_lost_once_and_does_not_come_back() -> None:
    told = three_steps()
    told.read(12, 13, 1)
    assert sorts(told.check(losses=lost_at(10))) == []
    told.read(14, 15, 3)
    assert sorts(told.check(losses=lost_at(10))) == ["twice"]


def test_who_expects_what_is_lost_is_told_so() -> None:
    told = three_steps()
    told.after(4)
    told.op(
        12,
        13,
        Call(kind="step", session="a", expected=3, x=x(4)),
        End(outcome="not_applied", revision=1, error="RevisionConflict: "),
    )
    assert sorts(told.check(losses=lost_at(10))) == []
    told.ops[-1] = Op("x", 12, told.ops[-1].call, [(13, told.changed(4))])
    told.read(14, 15, 1)
    assert sorts(told.check(losses=lost_at(10))) == ["lost"], "it was applied to what is lost"


def test_the_old_primary_goes_on_for_a_while_and_all_of_that_is_lost() -> None:
    told = three_steps()  # the third step is made at the old primary, the other one at the new
    other = Told()
    for value in (1, 2, 9):
        other.after(value)
    told.op(5, 6, Call(kind="step", session="a", expected=2, x=x(9)), other.changed(3))
    told.read(7, 8, 3)
    end = End(outcome="acknowledged", revision=3, position=3, states=other.states[3].named())
    told.op(22, 23, Call(kind="read", session="a"), end)
    assert sorts(told.check(losses=lost_at(5, 0, 20))) == []
    assert sorts(told.check(losses=lost_at(5, 0, 6))) != [], "it was read when nobody asked it any more"


def test_an_opening_and_an_end_may_be_lost() -> None:
    told = two_steps()
    told.close(2, 3)
    told.read(12, 13, 0)
    assert sorts(told.check(losses=lost_at(10))) == []
    told.ops[-1] = Op("x", 12, told.ops[-1].call, [(13, End(outcome="gone", error="SessionNotFound: "))])
    assert sorts(told.check(losses=lost_at(10))) == []


@pytest.mark.parametrize(("unheard", "revision", "wrong"), [(2, 2, []), (2, 1, []), (1, 2, ["twice"])])
def test_each_attempt_of_an_opening_may_expire_before_the_next(
    unheard: int, revision: int, wrong: list[str]
) -> None:
    """Each begins the session anew, one revision further."""
    told = Told()
    ends = [(10 * (n + 1), End(outcome="unknown", error="Lost: ")) for n in range(unheard)]
    call = Call(kind="open", session="a", request_id=1, batch_size=1)
    opened = End(outcome="acknowledged", revision=revision, position=0)
    told.ops.append(Op("o", 0, call, [*ends, (30, opened)]))
    told.op(32, 33, Call(kind="look", session="a"), opened)
    assert sorts(told.check(idle_s=6.0)) == wrong
    assert told.check().violations, "nothing expires"


# ----------------------------------------------------------------------------------------------- all of them or none


def opening(told: Told, low: int, *ends: tuple[int, End]) -> None:
    call = Call(kind="open", session="a", request_id=1, must_be_new=True, batch_size=1, is_together=True)
    told.ops.append(Op("o", low, call, list(ends)))


REFUSED = End(outcome="not_applied", error="with others: SessionExists: ")


def test_what_was_made_with_others_may_be_taken_back_before_the_call_is_answered() -> None:
    told = Told()
    opening(told, 0, (9, REFUSED))
    told.read(2, 3, 0)
    told.gone(4, 5, "SessionNotFound: ")
    assert sorts(told.check()) == []
    told.read(12, 13, 0)
    assert sorts(told.check()) == ["wrong"]


def test_what_was_made_with_others_is_not_taken_back_once_somebody_was_told_of_it() -> None:
    told = Told()
    opening(told, 0, (9, End(outcome="acknowledged", revision=0, position=0)))
    told.gone(2, 3, "SessionNotFound: ")
    assert sorts(told.check()) == []
    told.gone(12, 13, "SessionNotFound: ")
    assert sorts(told.check()) == ["gone"]


def test_that_it_was_taken_back_may_be_lost_and_then_it_stays() -> None:
    told = Told()
    opening(told, 0, (9, REFUSED))
    told.read(22, 23, 0)
    told.read(32, 33, 0)
    assert sorts(told.check([Rollback(20, "a", 1, "live", 0)])) == []
    assert sorts(told.check(losses=lost_at(20))) == []
    assert sorts(told.check(losses=lost_at(5, 0, 20))) == [], "it was taken back at the old primary alone"
    told.read(12, 13, 0)
    assert sorts(told.check([Rollback(20, "a", 1, "live", 0)])) == ["wrong"], "nothing was lost yet"
    assert sorts(told.check(losses=lost_at(20))) == ["wrong"]


def test_what_was_changed_is_not_taken_back() -> None:
    told = two_steps()
    told.ops.clear()
    opening(told, 0, (9, REFUSED))
    told.step(2, 3, 1, 1)
    told.gone(4, 5, "SessionNotFound: ")
    assert sorts(told.check()) == ["gone"]


@pytest.mark.parametrize(("at", "wrong"), [(30, []), (20, ["gone"])])
def test_it_ends_by_itself_no_sooner_than_it_may(at: int, wrong: list[str]) -> None:
    told = two_steps()
    told.step(14, 15, 1, 1)
    told.gone(at, at + 1, "SessionExpired: its client had been gone")
    assert sorts(told.check(ends_after=lambda _session, used, _now: used + 12)) == wrong
