"""Steps that a front passes as columns: one change if they fit together; otherwise each gets its own answer."""

from __future__ import annotations

import asyncio
import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest

from stepwell.v1 import errors_pb2
from stepwell_server.core.callers import ANYBODY, Caller, Role
from stepwell_server.engine.api import Select
from stepwell_server.engine.change import Change, Reply
from stepwell_server.engine.intake.validation import Refusals, Validation
from stepwell_server.engine.types import Members
from stepwell_server.errors import SessionNotFound
from stepwell_server.rpc.fronts.base import Ended, InputColumn, OutputColumn, Rest, StepColumns
from stepwell_server.rpc.status import Status
from stepwell_server.rpc.steps.columns import STEPWELL, ColumnSteps
from support.engine.fake_executor import PLAIN
from support.engine.harness import Answers, Harness, running, x
from support.rpc.fake_call import Requests
from support.stores.fake_shared_store import RemoteStore

pytestmark = pytest.mark.stores("memory", "async", "sync", "fake_shared")
FLOAT32, UINT8 = 1, 9
#: No message of a stream has ended.
_NO_TIMES = np.zeros(0)
LIMIT = 1 << 20
Row = tuple[int, int, list[float], bool]


class Batch:
    """A front's batch: what each session of it was answered. `ColumnReplies`."""

    def __init__(self, sizes: Sequence[int]) -> None:
        self._sizes = sizes
        self.applied_by_member: dict[int, Row] = {}
        self.errors: dict[int, errors_pb2.Error] = {}
        self.model_versions: dict[int, int] = {}
        self.gone_members: list[int] = []
        self.refusals = 0
        """Calls of `failed`."""

    def applied(
        self,
        members: Members | None,
        revisions: Any,
        positions: Any,
        outputs: Sequence[OutputColumn],
        *,
        replayed: bool,
        model_version: int,
    ) -> Ended:
        some = range(len(self._sizes)) if members is None else members.tolist()
        (output,) = outputs
        rows = np.frombuffer(output.data, np.float32).reshape(-1, *output.tail)
        assert len(rows) == sum(self._sizes[member] for member in some)
        start = 0
        for place, member in enumerate(some):
            assert member not in self.applied_by_member, "answered twice"
            self.model_versions[member] = model_version
            end = start + self._sizes[member]
            own = rows[start:end].ravel().tolist()
            self.applied_by_member[member] = (int(revisions[place]), int(positions[place]), own, replayed)
            start = end
        return Ended(np.zeros(len(some)), _NO_TIMES)

    def failed(self, members: Members | None, status: Status, error: bytes) -> Ended:
        some = range(len(self._sizes)) if members is None else members.tolist()
        self.refusals += 1
        for member in some:
            assert member not in self.errors, "answered twice"
            self.errors[member] = errors_pb2.Error.FromString(error)
            assert self.errors[member].message == status.message
        return Ended(np.zeros(len(some)), _NO_TIMES)

    def request(self, member: int) -> bytes:
        raise AssertionError("only Triton's are looked at so")

    def untraced(self) -> Sequence[int]:
        return ()

    def gone(self) -> Members:
        return np.array(self.gone_members, np.intp)


class Columns:
    """Hands batches of one-input steps to an engine under test."""

    def __init__(self, at: Harness, limit: int = LIMIT) -> None:
        self.at = at
        self.observer = Requests()
        self.steps = ColumnSteps(at.engine, at.clock, limit, self.observer, requests=STEPWELL)
        self.rest: Rest | None = None
        self.changes: list[Change] = []
        submit = at.engine.submit

        def counted(change: Change) -> Members:
            self.changes.append(change)
            return submit(change)

        at.engine.submit = counted

    def keep_busy(self, session_id: str) -> Answers:
        """Queue a step that returns its states, so that steps which are taken next wait for a turn of the model's loop."""
        return self.at.submit(session_id, np.ones((1, 2)), states=Select.LAST)

    def take(
        self,
        ids: Sequence[str],
        x: Any,
        *,
        sizes: Sequence[int] = (),
        counts: Sequence[int] = (),
        has_sizes: bool = False,
        dtype: int = FLOAT32,
        in_pieces: bool = False,
        **columns: Any,
    ) -> Batch:
        """Hand over a step of each session, each a message of its own unless `counts` say otherwise."""
        values = np.asarray(x, np.float32 if dtype == FLOAT32 else np.uint8)
        own = list(sizes) or [1] * len(ids)
        batch = Batch(own)
        deadlines = columns.pop("deadlines", [np.inf] * len(ids))
        rest = self.steps.take(
            StepColumns(
                list(ids),
                [f"caller of {session_id}" for session_id in ids],
                columns.pop("whos", [ANYBODY] * len(ids)),
                np.array(own, np.uint32),
                has_sizes,
                columns.get("expected"),
                columns.get("request_ids"),
                np.array(deadlines, np.float64),
                0,
                (),
                [InputColumn("", dtype, values.shape[1:], values.tobytes())],
                np.array(list(counts) or [1] * len(ids), np.uint32),
                batch,
            )
        )
        if in_pieces:
            self.rest = rest
            return batch
        while rest is not None and rest():
            pass
        return batch


@pytest.fixture
async def columns(store_kind: str) -> Any:
    async with running() as at:
        yield Columns(at)


async def expected_of(at: Harness, x: Any) -> list[float]:
    """What a new session's step with this row answers."""
    async with _one(at) as session_id:
        answer = await at.step(session_id, [x])
    return next(iter(answer.outputs.values())).ravel().tolist()


class _one:  # noqa: N801
    def __init__(self, at: Harness) -> None:
        self._at = at

    async def __aenter__(self) -> str:
        await self._at.open("reference")
        return "reference"

    async def __aexit__(self, *_: object) -> None:
        await self._at.engine.close_session("reference")


async def test_concurrent_steps_are_one_change_and_each_gets_its_own_row(columns: Columns) -> None:
    ids = [f"s{index}" for index in range(12)]
    await columns.at.open(*ids)
    x = np.random.default_rng(0).standard_normal((12, 2))
    batch = columns.take(ids, x)
    await columns.at.settled()
    assert [change.size for change in columns.changes] == [12]
    for index in range(12):
        revision, position, outputs, replayed = batch.applied_by_member[index]
        assert (revision, position, replayed) == (1, 1, False)
        assert outputs == await expected_of(columns.at, x[index])
    assert columns.observer.done == [("Step", "OK")] * 12


async def test_steps_on_several_versions_are_answered_separately(columns: Columns) -> None:
    """The engine tells of each version by itself, and the front is told of it."""

    def submit(change: Change) -> Members:
        for members, version in (([0, 2], 7), ([1], 8)):
            numbers, rows = np.ones(len(members), np.uint64), np.zeros((len(members), 2), np.float32)
            replies: Any = change.replies
            replies.applied(np.array(members), Reply(numbers, numbers, {"y": rows}, {}, version=version))
        return np.zeros(0, np.intp)

    columns.at.engine.submit = submit
    batch = columns.take(["a", "b", "c"], np.ones((3, 2)))
    assert batch.model_versions == {0: 7, 1: 8, 2: 7}


@pytest.mark.stores("memory")
async def test_steps_run_as_soon_as_they_are_taken(columns: Columns) -> None:
    await columns.at.open("a", "b", "c", "d", "e", "f")
    first = columns.take(["a", "b", "c"], np.ones((3, 2)))
    assert sorted(first.applied_by_member) == [0, 1, 2]  # the event loop has had no turn
    second = columns.take(["d", "e", "f"], np.ones((3, 2)), expected=np.zeros(3, np.uint64))
    assert sorted(second.applied_by_member) == [0, 1, 2]
    assert columns.at.events.passes == [(3, 1), (3, 1)]


@pytest.mark.stores("memory")
async def test_steps_taken_behind_others_run_together_once_all_have_arrived(columns: Columns) -> None:
    await columns.at.open("a", "b", "c", "d", "e", "f", "busy")
    busy = columns.keep_busy("busy")
    first = columns.take(["a", "b", "c"], np.ones((3, 2)))
    second = columns.take(["d", "e", "f"], np.ones((3, 2)), expected=np.zeros(3, np.uint64))
    assert not first.applied_by_member
    columns.steps.go()  # the event loop has had no turn
    assert sorted(first.applied_by_member) == sorted(second.applied_by_member) == [0, 1, 2]
    assert columns.at.events.passes == [(7, 1)]
    await busy.only()


TWO_MODELS = {"plain": PLAIN, "other": dataclasses.replace(PLAIN, fingerprint="other")}


@pytest.mark.stores("memory")
@pytest.mark.parametrize("which", [1, 2])
async def test_after_a_defect_each_call_is_answered_once(which: int, monkeypatch: pytest.MonkeyPatch) -> None:
    async with running(TWO_MODELS) as at:
        columns = Columns(at)
        await at.open("a", "b", model="plain")
        await at.open("c", model="other")
        check, sizes = Validation.check, list[int]()

        def broken(self: Validation, change: Change) -> tuple[Refusals, bool]:
            sizes.append(change.size)
            if len(sizes) == which:  # one of the parts of a change of two models
                raise RuntimeError("a defect")
            return check(self, change)

        monkeypatch.setattr(Validation, "check", broken)
        batch = columns.take(["a", "b", "c"], np.ones((3, 2)))
        await at.settled()
        applied, failed = set(batch.applied_by_member), set(batch.errors)
        assert {frozenset(applied), frozenset(failed)} == {frozenset({0, 1}), frozenset({2})}
        assert {error.code for error in batch.errors.values()} == {13}, "INTERNAL"


@pytest.mark.stores("memory")
async def test_steps_of_a_model_run_together_and_a_frame_of_two_models_alone() -> None:
    async with running(TWO_MODELS) as at:
        columns = Columns(at)
        await at.open("a", "b", "c", "d")
        await at.open("x", "y", "z", "w", model="other")
        batch = columns.take(["a", "x", "b", "y", "c", "z", "d", "w"], np.ones((8, 2)), counts=[1] * 6 + [2])
        await at.settled()
        assert sorted(batch.applied_by_member) == [0, 1, 2, 3, 4, 5]
        assert {batch.errors[6].message, batch.errors[7].message} == {
            "session_ids must be sessions of one model; got sessions of several"
        }
        assert [change.size for change in columns.changes] == [8, 2]  # all, and the frame of two alone


@pytest.mark.stores("memory")
async def test_repeated_steps_of_a_session_keep_their_order_with_another_model() -> None:
    async with running(TWO_MODELS) as at:
        columns = Columns(at)
        await at.open("a", "b")
        await at.open("x", model="other")
        batch = columns.take(["a", "x", "a", "x", "b"], np.random.default_rng(4).standard_normal((5, 2)))
        await at.settled()
        assert [batch.applied_by_member[member][0] for member in range(5)] == [1, 1, 2, 2, 1]
        assert [change.size for change in columns.changes] == [5]


@pytest.mark.stores("memory")
async def test_a_failing_model_does_not_affect_other_models() -> None:
    async with running(TWO_MODELS) as at:
        columns = Columns(at)
        await at.open("a")
        await at.open("x", model="other")
        first, _ = at.internals.models

        def broken() -> bool:
            raise ZeroDivisionError

        turn = at.internals.turn_of(first)
        first.work.listen(broken)
        batch = columns.take(["a"] if first.name == "plain" else ["x"], np.ones((1, 2)))
        other = columns.take(["x"] if first.name == "plain" else ["a"], np.ones((1, 2)))
        columns.steps.go()
        await asyncio.sleep(0)
        assert list(other.applied_by_member) == [0]
        first.work.listen(turn)
        first.work.ring()
        await at.settled()
        assert list(batch.applied_by_member) == [0]


async def test_repeated_steps_of_a_session_run_in_order(columns: Columns) -> None:
    await columns.at.open("a", "b")
    x = np.random.default_rng(1).standard_normal((3, 2))
    batch = columns.take(["a", "b", "a"], x)
    await columns.at.settled()
    assert [batch.applied_by_member[member][:2] for member in range(3)] == [(1, 1), (1, 1), (2, 2)]
    await columns.at.open("c")
    await columns.at.step("c", x[0:1])
    answer = await columns.at.step("c", x[2:3])
    assert batch.applied_by_member[2][2] == next(iter(answer.outputs.values())).ravel().tolist()


async def test_a_missing_session_does_not_affect_other_steps(columns: Columns) -> None:
    await columns.at.open("a", "b")
    batch = columns.take(["a", "nobody", "b"], np.ones((3, 2)))
    await columns.at.settled()
    assert sorted(batch.applied_by_member) == [0, 2]
    assert batch.errors[1].reason == "SESSION_NOT_FOUND"
    assert "'nobody'" in batch.errors[1].message
    assert columns.observer.refusals == {"SESSION_NOT_FOUND": 1}
    if not isinstance(columns.at.store, RemoteStore):
        assert [change.size for change in columns.changes] == [3, 1]
        assert columns.at.events.passes == [(2, 1)], "the others stay together"


async def test_a_later_step_of_a_session_does_not_overtake_one_that_runs_alone(columns: Columns) -> None:
    await columns.at.open("a", "b")
    x = np.random.default_rng(4).standard_normal((5, 2))
    counts = [1, 2, 1, 1]
    batch = columns.take(["a", "b", "nobody", "b", "a"], x, counts=counts)
    await columns.at.settled()
    assert sorted(batch.errors) == [2]
    assert {member: batch.applied_by_member[member][0] for member in (0, 1, 3, 4)} == {0: 1, 1: 1, 3: 2, 4: 2}


async def test_conflicts_of_many_callers_have_an_error_each(columns: Columns) -> None:
    ids = [f"s{index}" for index in range(40)]
    await columns.at.open(*ids)
    batch = columns.take(ids, np.ones((40, 2)), expected=np.full(40, 5, np.uint64))
    await columns.at.settled()
    assert not batch.applied_by_member
    for index, session_id in enumerate(ids):
        assert repr(session_id) in batch.errors[index].message
        assert "others" not in batch.errors[index].message, "who else was refused is nobody's business"


@pytest.mark.stores("memory")  # the others would find them in the store again
async def test_many_sessions_that_end_while_their_steps_wait_have_an_error_each(columns: Columns) -> None:
    ids = [f"s{index}" for index in range(40)]
    await columns.at.open(*ids, "busy")
    internals = columns.at.internals
    columns.keep_busy("busy")
    batch = columns.take(ids, np.ones((40, 2)))
    for session_id in ids:  # before the loop's turn
        internals.turns.forget(int(internals.handle(session_id)[0]), SessionNotFound(session_id, "gone"))
    await columns.at.settled()
    assert not batch.applied_by_member
    for index, session_id in enumerate(ids):
        assert repr(session_id) in batch.errors[index].message
        assert "others" not in batch.errors[index].message


async def test_nan_fails_only_the_step_of_its_sender(columns: Columns) -> None:
    await columns.at.open("a", "b")
    batch = columns.take(["a", "b"], [[1, np.nan], [1, 1]])
    await columns.at.settled()
    assert "index [0, 1]" in batch.errors[0].message
    assert sorted(batch.applied_by_member) == [1]


@pytest.mark.parametrize(("shape", "dtype"), [((2, 3), FLOAT32), ((2,), FLOAT32), ((2, 1, 1, 2), FLOAT32)])
async def test_each_caller_gets_the_error_for_inputs_that_the_model_rejects(
    columns: Columns, shape: Any, dtype: int
) -> None:
    await columns.at.open("a", "b")
    batch = columns.take(["a", "b"], np.ones(shape), dtype=dtype)
    await columns.at.settled()
    own = (1, *shape[1:])
    for member in range(2):
        assert f"got {own}" in batch.errors[member].message, "as if it had come alone"


async def test_integers_are_converted_to_the_models_floats(columns: Columns) -> None:
    await columns.at.open("a", "b")
    batch = columns.take(["a", "b"], np.ones((2, 2)), dtype=UINT8)
    await columns.at.settled()
    assert batch.applied_by_member[0][2] == await expected_of(columns.at, [1.0, 1.0])


async def test_wrong_rows_of_two_messages_are_not_swapped(columns: Columns) -> None:
    """One has a row too many and one a row too few: together they would fit."""
    await columns.at.open("two", batch_size=2)
    await columns.at.open("one")
    batch = columns.take(["two", "one"], np.ones((3, 2)), sizes=[1, 2])
    await columns.at.settled()
    assert not batch.applied_by_member
    assert "(2, 2)" in batch.errors[0].message
    assert "(1, 2)" in batch.errors[1].message


async def test_batch_sizes_in_a_frame_must_match_the_sessions(columns: Columns) -> None:
    await columns.at.open("a", "b")
    counts = [1, 1]
    batch = columns.take(["a", "b"], np.ones((3, 2)), sizes=[2, 1], has_sizes=True, counts=counts)
    await columns.at.settled()
    assert "batch_sizes must be the sessions' own" in batch.errors[0].message
    assert sorted(batch.applied_by_member) == [1]


async def test_a_deadline_applies_to_its_message_only(columns: Columns) -> None:
    await columns.at.open("a", "b")
    now = columns.at.clock.monotonic()
    batch = columns.take(["a", "b"], np.ones((2, 2)), deadlines=[now, np.inf])
    await columns.at.settled()
    assert batch.errors[0].reason == "DEADLINE_EXCEEDED"
    assert sorted(batch.applied_by_member) == [1]


async def test_many_late_steps_are_refused_together(columns: Columns) -> None:
    """One by one, each behind the one before it of the same session, they would hold up the steps of others."""
    await columns.at.open("a", "b")
    count, now = 200, columns.at.clock.monotonic()
    late = columns.take(["a"] * count, np.ones((count, 2)), deadlines=[now] * count)
    assert not columns.changes, "none reaches the engine"
    some = columns.take([*["a"] * count, "b"], np.ones((count + 1, 2)), deadlines=[*[now] * count, np.inf])
    assert [change.session_ids for change in columns.changes] == [["b"]]
    await columns.at.settled()
    assert (late.refusals, some.refusals) == (1, 1)
    for batch in (late, some):
        assert sorted(batch.errors) == list(range(count))
        assert {error.reason for error in batch.errors.values()} == {"DEADLINE_EXCEEDED"}
    assert list(some.applied_by_member) == [count]
    assert (await columns.at.engine.session_info("a")).revision == 0


async def test_steps_of_gone_clients_are_not_applied(columns: Columns) -> None:
    await columns.at.open("a", "b", "c", "busy")
    columns.keep_busy("busy")
    batch = columns.take(["a", "b", "c"], np.ones((3, 2)))
    batch.gone_members = [1]
    await columns.at.settled()
    assert sorted(batch.applied_by_member) == [0, 2]
    assert (await columns.at.engine.session_info("b")).revision == 0


async def test_a_retry_among_others_gets_the_first_answer(columns: Columns) -> None:
    await columns.at.open("a", "b")
    first = np.array([[1.0, 2.0], [3.0, 4.0]])
    asked: dict[str, Any] = {"expected": np.zeros(2, np.uint64), "request_ids": np.array([7, 8], np.uint64)}
    before = columns.take(["a", "b"], first, **asked)
    await columns.at.settled()
    again = columns.take(["a", "b"], first, **asked)
    await columns.at.settled()
    for member in range(2):
        assert again.applied_by_member[member] == (*before.applied_by_member[member][:3], True)


async def test_the_size_limit_applies_to_each_reply(columns: Columns) -> None:
    """What all replies would have together is nobody's limit."""
    await columns.at.open("a", "b")
    limit = 1 << 12
    steps = limit * 6 // 10 // len(await expected_of(columns.at, [1.0, 1.0])) // 4
    columns = Columns(columns.at, limit)
    batch = columns.take(["a", "b"], np.ones((2, steps, 2)))
    await columns.at.settled()
    assert [batch.applied_by_member[member][:2] for member in range(2)] == [(1, steps), (1, steps)]
    over = columns.take(["a", "b"], np.ones((2, 2 * steps, 2)))
    await columns.at.settled()
    assert [over.errors[member].reason for member in range(2)] == ["MESSAGE_TOO_LARGE"] * 2


async def test_after_a_defect_no_call_waits(columns: Columns, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(_change: Change) -> Members:
        raise RuntimeError("a defect")

    monkeypatch.setattr(columns.at.engine, "submit", broken)
    batch = columns.take(["a", "b"], np.ones((2, 2)))
    assert {error.reason for error in batch.errors.values()} == {"INTERNAL"}
    assert sorted(batch.errors) == [0, 1]


@pytest.mark.stores("memory")
async def test_each_change_has_its_caller(columns: Columns) -> None:
    ann, bob = Caller("ann", "acme", Role.USER), Caller("bob", "zeta", Role.USER)
    await columns.at.open("a", "b")
    columns.take(["a", "b"], x(2), whos=[ann, bob])
    columns.take(["a", "b"], x(2), counts=[2], whos=[bob])
    columns.take(["a", "gone", "b"], x(3), whos=[ann, ann, bob])
    columns.take(["a", "b"], x(2), whos=[ann])
    await columns.at.settled()
    assert [(change.caller, change.callers) for change in columns.changes if len(change.session_ids) > 1] == [
        (ANYBODY, [ann, bob]),
        (bob, None),
        (ANYBODY, [ann, ann, bob]),
        (ann, None),
    ]
    assert [change.caller for change in columns.changes if change.session_ids == ["gone"]] == [ann]


@pytest.mark.stores("memory", "async", "sync")
async def test_many_messages_that_run_one_by_one_let_others_run_between(columns: Columns) -> None:
    """In their order, and each is answered once."""
    count = 100
    ids = [f"unknown-{number}" for number in range(count)]
    batch = columns.take(ids, np.zeros((count, 2), np.float32), in_pieces=True)
    assert columns.rest is not None
    seen = [len(batch.errors)]
    while columns.rest():
        seen.append(len(batch.errors))
    assert len(seen) >= 3
    assert max(np.diff(seen)) <= 32
    assert list(batch.errors) == list(range(count))
    assert not columns.rest()
