"""The checker of histories can fail: what a faulty server would have answered is caught, and nothing else is.

A register in numpy stands for the server; each test lets it break one rule, or forges the history of one that did.
"""

from __future__ import annotations

import dataclasses
import functools
import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from support.checks import checker, history
from support.checks.checker import Report, check
from support.checks.history import Call, End, Floats, Op
from support.checks.replay import LstmDense, LstmState
from support.samples import examples

UNITS, FEATURES, OUTPUTS = 4, 3, 2
Forge = Callable[["World"], None]


def _model() -> LstmDense:
    rng = np.random.default_rng(5)
    shapes = [(FEATURES, 4 * UNITS), (UNITS, 4 * UNITS), (4 * UNITS,), (UNITS, OUTPUTS), (OUTPUTS,)]
    return LstmDense(*(0.4 * rng.standard_normal(shape) for shape in shapes))


MODEL = _model()


def single(array: Floats) -> Floats:
    """As a server that computes in float32 has it."""
    return np.asarray(array, np.float32)


@dataclasses.dataclass
class Register:
    """A session of the faultless server."""

    state: LstmState
    revision: int = 0


class World:
    """Sessions, and the history of what they are asked."""

    def __init__(self, seed: int = 0) -> None:
        self.rng = np.random.default_rng(seed)
        self.ops: list[Op] = []
        self.sessions: dict[str, Register] = {}
        self._now = 0

    def at(self) -> int:
        self._now += 1
        return self._now

    def told(self, call: Call, end: End | None) -> Op:
        op = Op(f"0:{len(self.ops)}", self.at(), call)
        if end is not None:
            op.ends.append((self.at(), end))
        self.ops.append(op)
        return op

    def open(self, session: str, batch_size: int = 1) -> Op:
        self.sessions[session] = Register(MODEL.initial(batch_size))
        call = Call(kind="open", session=session, batch_size=batch_size)
        return self.told(call, End(outcome="acknowledged", revision=0, position=0))

    def x(self, session: str, steps: int = 0) -> Floats:
        rows = len(self.sessions[session].state.h)
        return single(self.rng.standard_normal((rows, steps, FEATURES) if steps else (rows, FEATURES)))

    def step(self, session: str, steps: int = 0, *, happens: bool = True, told: bool = True) -> Op:
        kept, x = self.sessions[session], self.x(session, steps)
        call = Call(kind="step", session=session, expected=kept.revision, x=x)
        y = None
        if happens:
            y, kept.state = MODEL.step(kept.state, x)
            kept.revision += 1
        return self.told(call, self.answer(session, y) if told else End(outcome="unknown"))

    def reset(self, session: str, *, happens: bool = True, told: bool = True) -> Op:
        kept = self.sessions[session]
        call = Call(kind="reset", session=session, expected=kept.revision)
        if happens:
            kept.state = MODEL.reset(kept.state, None, None)
            kept.revision += 1
        return self.told(call, self.answer(session) if told else End(outcome="unknown"))

    def answer(self, session: str, y: Floats | None = None) -> End:
        kept = self.sessions[session]
        return End(
            outcome="acknowledged",
            revision=kept.revision,
            position=kept.state.position,
            y=None if y is None else single(y),
        )

    def read(self, session: str) -> Op:
        states = {name: single(array) for name, array in self.sessions[session].state.named().items()}
        end = dataclasses.replace(self.answer(session), states=states)
        return self.told(Call(kind="read", session=session), end)

    def fork(self, session: str, child: str) -> Op:
        self.sessions[child] = dataclasses.replace(self.sessions[session])
        rows = len(self.sessions[session].state.h)
        return self.told(
            Call(kind="fork", session=child, parent=session, batch_size=rows), self.answer(session)
        )

    def check(self) -> Report:
        return check(self.ops, MODEL)


@pytest.fixture
def world() -> World:
    """Two sessions with a past."""
    world = World()
    for session in ("a", "b"):
        world.open(session)
        for steps in (0, 3, 1):
            world.step(session, steps)
    return world


def caught(sort: str, session: str, revision: int, what: str) -> Callable[[Forge], Forge]:
    """Exactly this session is reported, for this, of the world that a test has forged."""

    def decorated(forged: Forge) -> Forge:
        @functools.wraps(forged)
        def checked(world: World) -> None:
            forged(world)
            found = world.check().violations
            assert [(one.sort, one.session, one.revision) for one in found] == [(sort, session, revision)]
            assert f"session {session!r}, revision {revision}" in str(found[0])
            assert what in str(found[0])

        return checked

    return decorated


def forge(op: Op, **changes: object) -> None:
    """Change what an operation was told."""
    at, end = op.ends[-1]
    op.ends[-1] = (at, dataclasses.replace(end, **changes))  # type: ignore[arg-type]  # names of its fields


# ---------------------------------------------------------------------------------------------------- what is caught


@caught("twice", "a", 5, "it is right if step 0:8 is applied twice")
def test_a_step_applied_twice(world: World) -> None:
    first = world.step("a")
    assert first.call.x is not None
    kept = world.sessions["a"]
    _, kept.state = MODEL.step(kept.state, first.call.x)
    kept.state = dataclasses.replace(kept.state, position=kept.state.position - 1)  # so that the value tells
    world.step("a")


@caught("twice", "a", 5, "expected revision 3")
def test_a_step_applied_twice_and_counted_twice(world: World) -> None:
    world.sessions["a"].revision += 1
    op = world.step("a")
    op.call = dataclasses.replace(op.call, expected=3)


@caught("twice", "a", 4, "no change that was asked for can have made it")
def test_a_change_that_nobody_asked_for(world: World) -> None:
    world.sessions["a"].revision += 1
    world.step("a")


@caught("lost", "a", 3, "told after revision 4 was")
def test_an_acknowledged_step_lost(world: World) -> None:
    before = dataclasses.replace(world.sessions["a"])
    world.step("a")
    world.sessions["a"] = before
    world.read("a")


@caught("lost", "a", 4, "both made it")
def test_an_acknowledged_step_lost_and_the_next_made_in_its_place(world: World) -> None:
    before = dataclasses.replace(world.sessions["a"])
    world.step("a")
    world.sessions["a"] = before
    world.step("a")


@caught("lost", "a", 5, "it is right if the change before it is left out")
def test_an_acknowledged_state_lost_and_the_revision_kept(world: World) -> None:
    before = world.sessions["a"].state
    world.step("a")
    world.sessions["a"].state = dataclasses.replace(before, position=before.position + 1)
    world.step("a")


def test_outputs_of_two_sessions_swapped(world: World) -> None:
    one, other = world.step("a"), world.step("b")
    mine, yours = one.ends[0][1].y, other.ends[0][1].y
    forge(one, y=yours)
    forge(other, y=mine)
    found = world.check().violations
    assert [(v.sort, v.session, v.revision) for v in found] == [("wrong", "a", 4), ("wrong", "b", 4)]


@caught("wrong", "a", 4, "step 0:8")
def test_the_output_of_another_input(world: World) -> None:
    op = world.step("a")
    op.call = dataclasses.replace(op.call, x=world.x("a"))


@caught("wrong", "wide", 1, "step")
def test_rows_that_change_places(world: World) -> None:
    world.open("wide", batch_size=2)
    op = world.step("wide", 2)
    y = op.ends[0][1].y
    assert y is not None
    forge(op, y=y[::-1])


@caught("lost", "a", 5, "position 6")
def test_a_reset_lost(world: World) -> None:
    world.reset("a", happens=False)
    world.sessions["a"].revision += 1
    world.ops.pop()
    before = Call(kind="reset", session="a", expected=3)
    world.told(before, End(outcome="acknowledged", revision=4, position=0))
    world.step("a")


@caught("wrong", "a", 4, "position 5")
def test_a_reset_acknowledged_at_a_wrong_position(world: World) -> None:
    forge(world.reset("a"), position=5)


@caught("wrong", "twin", 5, "step")
def test_a_fork_of_a_wrong_revision(world: World) -> None:
    old = dataclasses.replace(world.sessions["a"])
    world.step("a")
    world.fork("a", "twin")
    world.sessions["twin"].state = dataclasses.replace(old.state, position=old.state.position + 1)
    world.step("twin")


def test_a_fork_behind_what_was_acknowledged(world: World) -> None:
    world.step("a")
    world.sessions["a"].revision -= 1
    world.fork("a", "twin")
    found = world.check().violations
    assert [(v.sort, v.session, v.revision) for v in found] == [("lost", "a", 3)]


@caught("wrong", "a", 3, "the state were read")
def test_a_state_read_that_the_session_never_had(world: World) -> None:
    states = world.read("a").ends[0][1].states
    assert states is not None
    forge(world.ops[-1], states={name: array + np.float32(1e-3) for name, array in states.items()})


@caught("wrong", "a", 3, "different bits")
def test_two_reads_that_differ_in_a_bit(world: World) -> None:
    world.read("a")
    states = world.read("a").ends[0][1].states
    assert states is not None
    forge(world.ops[-1], states={name: np.nextafter(array, np.float32(9)) for name, array in states.items()})


@caught("twice", "a", 4, "was answered again in another way")
def test_another_answer_to_a_change_sent_again(world: World) -> None:
    op = world.step("a")
    at, end = op.ends[0]
    assert end.y is not None
    op.ends.append((at + 1, dataclasses.replace(end, y=np.nextafter(end.y, np.float32(9)))))


@caught("twice", "a", 4, "step 0:8 had failed as not_applied")
def test_a_change_that_failed_as_not_applied_and_was(world: World) -> None:
    forge(world.step("a"), outcome="not_applied", revision=None, position=None, y=None)
    world.read("a")


@caught("twice", "a", 5, "no change that was asked for")
def test_an_unknown_change_fills_one_gap_only(world: World) -> None:
    world.step("a", told=False)
    world.sessions["a"].revision += 1
    world.read("a")


@caught("lost", "a", 4, "told after revision 4 was")
def test_a_revision_told_before_anything_can_have_made_it(world: World) -> None:
    world.sessions["a"].revision += 1
    early = world.told(Call(kind="look", session="a"), End(outcome="acknowledged", revision=4))
    world.sessions["a"].revision -= 1
    world.step("a")
    assert early.ends[0][0] < world.ops[-1].called_at


@caught("gone", "a", 3, "SessionNotFoundError")
def test_a_session_that_is_gone(world: World) -> None:
    world.told(Call(kind="read", session="a"), End(outcome="gone", error="SessionNotFoundError: a"))


@caught("gone", "b", 3, "SessionLostError")
def test_a_fork_whose_parent_is_gone(world: World) -> None:
    world.told(
        Call(kind="fork", session="twin", parent="b"), End(outcome="gone", error="SessionLostError: b")
    )


@caught("error", "b", 3, "InternalError: 77")
def test_an_error_that_nothing_can_cause(world: World) -> None:
    forge(world.step("b", happens=False), outcome="error", revision=None, error="InternalError: 77")


# ----------------------------------------------------------------------------------- what is caught of several replicas


def begin(world: World, call: Call) -> Op:
    """A call that is under way."""
    return world.told(call, None)


def finish(world: World, op: Op, end: End) -> None:
    op.ends.append((world.at(), end))


def look(session: str) -> Call:
    return Call(kind="look", session=session)


@caught("lost", "a", 3, "told after revision 4 was")
def test_a_replica_that_reads_what_it_remembers(world: World) -> None:
    """Its copy is right, but older than what another replica had acknowledged before it was asked."""
    stale = world.answer("a")
    world.step("a")
    begin_late = begin(world, look("a"))
    finish(world, begin_late, stale)


def test_a_read_under_way_may_show_either_side_of_a_change(world: World) -> None:
    """It began before the change was acknowledged: both answers are linearizable."""
    before = world.answer("a")
    early, late = begin(world, look("a")), begin(world, look("a"))
    world.step("a")
    finish(world, early, before)
    finish(world, late, world.answer("a"))
    world.check().require_clean()


@caught("lost", "a", 3, "told after revision 4 was")
def test_two_reads_one_after_the_other_that_go_back(world: World) -> None:
    """The change is not acknowledged; but who reads after somebody has seen it must see it too."""
    before = world.answer("a")
    world.step("a", told=False)
    finish(world, begin(world, look("a")), world.answer("a"))
    finish(world, begin(world, look("a")), before)


@caught("lost", "a", 3, "told after revision 4 was")
def test_a_conflict_told_from_an_old_copy(world: World) -> None:
    old = world.sessions["a"].revision
    world.step("a")
    late = Call(kind="step", session="a", expected=old + 1, x=world.x("a"))
    world.told(late, End(outcome="not_applied", revision=old))


@caught("lost", "a", 4, "both made it")
def test_two_owners_whose_changes_are_both_acknowledged(world: World) -> None:
    """Each replica made its own revision 4."""
    state = world.sessions["a"].state
    calls = [Call(kind="step", session="a", expected=3, x=world.x("a")) for _ in range(2)]
    under_way = [begin(world, call) for call in calls]
    for op in under_way:
        assert op.call.x is not None
        y, after = MODEL.step(state, op.call.x)
        finish(world, op, End(outcome="acknowledged", revision=4, position=after.position, y=single(y)))


def test_rivals_of_whom_one_wins(world: World) -> None:
    loser = begin(world, Call(kind="step", session="a", expected=3, x=world.x("a")))
    world.step("a")
    finish(world, loser, End(outcome="not_applied", revision=4))
    world.step("a")
    world.check().require_clean()


@caught("lost", "a", 5, "it is right if the change before it is left out")
def test_the_output_of_a_state_that_another_replica_had_moved_on(world: World) -> None:
    """The loser computed from its old copy, and was acknowledged at the right revision all the same."""
    old = world.sessions["a"].state
    world.step("a")
    position = world.sessions["a"].state.position
    world.sessions["a"].state = dataclasses.replace(old, position=position)
    world.step("a")


def test_a_change_sent_to_two_and_answered_by_both(world: World) -> None:
    op = world.step("a")
    finish(world, op, dataclasses.replace(op.ends[0][1]))
    assert world.check().require_clean().answered_again == 1


@caught("wrong", "a", 4, "was refused when it was sent again")
def test_a_change_refused_by_the_replica_that_did_not_make_it(world: World) -> None:
    """It knows the revision, and not that this very change has made it."""
    op = world.step("a")
    finish(world, op, End(outcome="not_applied", revision=4))


def test_a_change_sent_again_when_others_have_followed(world: World) -> None:
    """Only the answer to the last change is remembered."""
    op = world.step("a")
    world.step("a")
    finish(world, op, End(outcome="not_applied", revision=5))
    world.check().require_clean()


def close(world: World, session: str) -> Op:
    return world.told(Call(kind="close", session=session), End(outcome="acknowledged"))


@caught("wrong", "a", 3, "closed or gone")
def test_a_closed_session_that_a_replica_still_serves(world: World) -> None:
    kept = world.answer("a")
    close(world, "a")
    finish(world, begin(world, look("a")), kept)


@caught("wrong", "a", 3, "closed or gone")
def test_a_session_that_is_gone_for_one_replica_only(world: World) -> None:
    """Nobody knows whether it was closed, but when one says so it was."""
    world.told(Call(kind="close", session="a"), End(outcome="unknown"))
    world.told(look("a"), End(outcome="gone", error="SessionNotFoundError: a"))
    world.read("a")


@caught("gone", "a", 3, "SessionNotFoundError")
def test_a_session_that_is_gone_before_anybody_closes_it(world: World) -> None:
    world.told(look("a"), End(outcome="gone", error="SessionNotFoundError: a"))
    close(world, "a")


def test_what_is_told_while_a_session_is_closed(world: World) -> None:
    kept = world.answer("a")
    early, late = begin(world, look("a")), begin(world, look("a"))
    close(world, "a")
    finish(world, early, kept)
    finish(world, late, End(outcome="gone", error="SessionNotFoundError: a"))
    world.told(look("a"), End(outcome="gone", error="SessionNotFoundError: a"))
    world.check().require_clean()


# ----------------------------------------------------------------------------------------------------- what is right

Choice = Callable[[World, str], object]
MOVES: dict[str, Choice] = {
    "step": lambda world, session: world.step(session),
    "steps": lambda world, session: world.step(session, 3),
    "reset": lambda world, session: world.reset(session),
    "step, untold": lambda world, session: world.step(session, told=False),
    "step, undone": lambda world, session: world.step(session, told=False, happens=False),
    "reset, untold": lambda world, session: world.reset(session, told=False),
    "reset, undone": lambda world, session: world.reset(session, told=False, happens=False),
    "read": lambda world, session: world.read(session),
    "fork": lambda world, session: world.fork(session, f"{session}.{len(world.ops)}"),
}


@settings(max_examples=examples(150))
@given(
    st.lists(st.tuples(st.sampled_from(sorted(MOVES)), st.integers(0, 99)), max_size=40), st.integers(0, 9)
)
def test_right_histories_pass(moves: list[tuple[str, int]], seed: int) -> None:
    """Whatever is asked, told or not, done or not."""
    world = World(seed)
    world.open("a", batch_size=2)
    world.open("b")
    for move, pick in moves:
        sessions = sorted(world.sessions)
        MOVES[move](world, sessions[pick % len(sessions)])
    for session in sorted(world.sessions):
        world.read(session)
    report = world.check().require_clean()
    assert report.sessions == len(world.sessions)
    assert report.forks == sum(move == "fork" for move, _ in moves)


@settings(max_examples=examples(100))
@given(st.lists(st.sampled_from(sorted(MOVES)), min_size=1, max_size=20), st.data())
def test_a_forged_output_never_passes(moves: list[str], data: st.DataObject) -> None:
    world = World()
    world.open("a")
    for move in moves:
        MOVES[move](world, "a")
    outputs = [op for op in world.ops if op.acknowledged is not None and op.acknowledged.y is not None]
    if not outputs:
        return
    op = data.draw(st.sampled_from(outputs))
    assert op.ends[0][1].y is not None
    forge(op, y=op.ends[0][1].y + np.float32(1e-3))
    assert [v.session for v in world.check().violations] == ["a"]


def test_either_of_two_unknown_changes_may_have_happened(world: World) -> None:
    """Both expect the same revision: which of them made it the next output tells."""
    for first in (True, False):
        world.step("a", told=False, happens=first)
        other = world.step("a", told=False, happens=not first)
        if first:  # it expected what the first one had found
            other.call = dataclasses.replace(other.call, expected=other.call.expected - 1)
        world.step("a")
    report = world.check().require_clean()
    assert (report.unknown, report.filled) == (4, 2)


def test_several_processes_write_one_history(tmp_path: Path) -> None:
    path = tmp_path / "history"
    logs = [history.Log(path, seed=1) for _ in range(2)]
    logs[1].life = logs[0].life  # as if they had begun at the same time, in two processes
    world = World()
    world.open("a")
    world.step("a")
    for op in world.ops:
        number = logs[0].call(op.call)
        logs[0].end(number, op.ends[0][1])
    opened, stepped = history.load([path])
    assert 0 < opened.called_s <= opened.acknowledged_s <= stepped.called_s <= stepped.acknowledged_s
    assert str(os.getpid()) in stepped.number
    for log in logs:
        log.close()


def test_a_history_in_a_file_is_the_same(world: World, tmp_path: Path) -> None:
    world.reset("a")
    world.fork("a", "twin")
    world.read("twin")
    world.step("b", told=False)
    path = tmp_path / "history"
    for op in world.ops:
        log = history.Log(path, seed=1)  # a life for each, as if every driver were killed
        number = log.call(op.call)
        for _, end in op.ends:
            log.end(number, end)
        log.close()
    loaded = history.load([path])
    assert str(checker.clean(loaded, MODEL)) == str(world.check().require_clean())
    assert history.live(loaded) == {"a": 1, "b": 1, "twin": 1}
    assert sum(op.may_have_happened for op in loaded) == 1
