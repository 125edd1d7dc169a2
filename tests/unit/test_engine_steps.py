"""Steps and resets, one at a time or without a session: order, exactly once, remembered replies."""

from __future__ import annotations

import asyncio
from typing import Any

import numpy as np
import pytest

from stepwell_server.engine.api import Select
from stepwell_server.errors import (
    DeadlineExceeded,
    Internal,
    InvalidInput,
    Overloaded,
    RevisionConflict,
    SessionExpired,
    SessionNotFound,
    Unavailable,
)
from support.checks.model_of_sessions import initial, ran
from support.engine.fake_executor import BAD, BROKEN, PLAIN, RICH, WAIT_S, advance
from support.engine.harness import BOTH_WAYS, Answer, Harness, fails, running, x


def drawn(*shape: int) -> np.ndarray:
    return np.random.default_rng(sum(shape)).standard_normal((*shape, 2)).astype(np.float32)


def same(answer: Answer, other: Answer) -> None:
    assert (answer.revision, answer.position) == (other.revision, other.position)
    assert list(answer.outputs) == list(other.outputs)
    for name, array in answer.outputs.items():
        assert array.dtype == other.outputs[name].dtype
        assert array.shape == other.outputs[name].shape
        assert array.tobytes() == other.outputs[name].tobytes()


@BOTH_WAYS
@pytest.mark.parametrize("given", [(1,), (1, 1), (1, 6)], ids=["no axis", "T=1", "T=6"])
@pytest.mark.parametrize("select", Select)
async def test_outputs_have_the_shape_that_was_asked_for(
    threads: bool, given: tuple[int, ...], select: Select
) -> None:
    async with running(threads=threads) as at:
        await at.open("a")
        value = drawn(*given)
        answer = await at.step("a", value, select=select)
        whole, after = ran(initial(1), value if value.ndim == 3 else value[:, None])
        steps = whole.shape[1]
        wanted = whole if value.ndim == 3 else whole[:, 0]
        if select is Select.NONE:
            assert answer.outputs == {}
        else:
            assert answer.outputs["y"].tobytes() == (
                wanted.tobytes() if select is Select.ALL else whole[:, -1].tobytes()
            )
            assert answer.outputs["y"].shape == (wanted.shape if select is Select.ALL else (1, 2))
        assert (answer.revision, answer.position, answer.replayed) == (1, steps, False)
        assert (await at.state("a"))["sum"].tobytes() == after.tobytes()


@BOTH_WAYS
@pytest.mark.parametrize("cut", [1, 3, 100])
async def test_several_inputs_outputs_and_states(threads: bool, cut: int) -> None:
    async with running({"rich": RICH}, threads=threads, steps=cut) as at:
        await at.open("a", batch_size=2, model="rich")
        inputs = {
            "x": drawn(2, 5),
            "token": np.arange(10, dtype=np.int32).reshape(2, 5),
            "gain": np.array([2, 3], np.float32),
        }
        answer = await at.submit("a", sizes=[2], inputs=inputs).only()
        states = [np.stack([value, value]) for value in RICH.initial]
        seen = []
        for t in range(5):
            outputs, states = advance([inputs["x"][:, t], inputs["token"][:, t], inputs["gain"]], states)
            seen.append(outputs)
        assert answer.outputs["y"].tobytes() == np.stack([o[0] for o in seen], 1).tobytes()
        assert answer.outputs["head"].tobytes() == seen[-1][1].tobytes()
        read = await at.engine.get_state("a")
        assert list(read.state) == ["sum", "count"]
        assert [array.tobytes() for array in read.state.values()] == [s.tobytes() for s in states]
        assert read.state["count"].tolist() == [12, 12]
        assert read.session.position == 5


CHANGES: list[dict[str, Any]] = [
    {"x": drawn(2)},
    {"x": drawn(2, 1)},
    {"x": drawn(2, 5)},
    {"x": drawn(2), "select": Select.LAST},
    {"x": drawn(2, 1), "select": Select.LAST},
    {"x": drawn(2, 5), "select": Select.LAST},
    {"x": drawn(2, 5), "select": Select.NONE},
    {"reset": True},
    {"reset": True, "rows": [1]},
    {"reset": True, "state": {"": drawn(2)}},
]


@pytest.mark.parametrize("how", ["at once", "paged out", "in line"])
@pytest.mark.parametrize("change", CHANGES, ids=range(len(CHANGES)))
@pytest.mark.engine(resident_rows=2, threads=True)
async def test_a_retry_gets_the_first_answer(change: dict[str, Any], how: str, at: Harness) -> None:
    await at.open("a", batch_size=2)
    await at.step("a", drawn(2, 3), request_ids=5)  # a reply of another kind before it
    args: dict[str, Any] = {"sizes": [2], "expected": 1, "request_ids": 6, **change}
    first = at.submit("a", **args)
    if how == "in line":
        second = at.submit("a", **args)
        one, two = await first.only(), await second.only()
    else:
        one = await first.only()
        if how == "paged out":
            await at.open("b", "c")
            await at.step("b", drawn(1, 4))
            assert not (await at.engine.session_info("a")).resident
        two = await at.submit("a", **args).only()
    assert (one.replayed, two.replayed) == (False, True)
    same(one, two)
    assert (await at.engine.session_info("a")).revision == 2


async def test_a_remembered_answer_says_the_revision_it_had_even_if_the_next_change_follows_at_once(
    at: Harness,
) -> None:
    one = await at.open_and_step("a", drawn(1), expected=0, request_ids=5)
    again = at.submit("a", drawn(1), expected=0, request_ids=5)
    following = at.submit("a", drawn(1), expected=1, request_ids=6)
    assert (await following.only()).revision == 2
    same(one, await again.only())


async def test_another_kind_of_answer_replaces_the_remembered_one(at: Harness) -> None:
    await at.open("a")
    for number, steps in enumerate([3, 1, 4, 2]):
        value = drawn(1, steps)
        first = await at.step("a", value, expected=number, request_ids=number + 1)
        same(first, await at.step("a", value, expected=number, request_ids=number + 1))


async def test_a_stale_revision_is_refused_and_says_which_one_it_is(at: Harness) -> None:
    await at.open_and_step("a", drawn(1), request_ids=5)
    before = (await at.state("a"))["sum"].tobytes()
    for expected in (0, 2, 2**64 - 1):
        for change in ({"x": drawn(1)}, {"reset": True}):
            with pytest.raises(RevisionConflict) as error:
                await at.submit("a", expected=expected, request_ids=6, **change).only()
            assert (error.value.expected, error.value.actual) == (expected, 1)
            assert (
                str(error.value) == f"expected_revision of session 'a' must be its revision 1; got {expected}"
            )
    assert (await at.state("a"))["sum"].tobytes() == before


@BOTH_WAYS
async def test_steps_of_one_session_are_applied_in_the_order_received(threads: bool) -> None:
    async with running(threads=threads) as at:
        await at.open("a")
        inputs = [drawn(1, n) if n else drawn(1) for n in np.random.default_rng(0).integers(0, 4, 60)]
        waiting = [at.submit("a", value, expected=n) for n, value in enumerate(inputs)]
        state, position = initial(1), 0
        for n, (value, answers) in enumerate(zip(inputs, waiting, strict=True)):
            whole, state = ran(state, value if value.ndim == 3 else value[:, None])
            position += whole.shape[1]
            answer = await answers.only()
            assert answer.outputs["y"].tobytes() == whole.tobytes()
            assert (answer.revision, answer.position) == (n + 1, position)


@pytest.mark.engine(threads=True)
async def test_resets_and_reads_keep_their_place_between_steps(at: Harness) -> None:
    await at.open("a")
    at.submit("a", drawn(1))
    reset = at.submit("a", reset=True)
    read = at.engine.get_state("a")
    value = drawn(1, 2)
    reading, last = await read, at.submit("a", value)
    assert (await reset.only()).position == 0
    assert reading.session.revision == 2
    assert reading.state["sum"].tolist() == [PLAIN.initial[0].tolist()]
    assert (await last.only()).outputs["y"].tobytes() == ran(initial(1), value)[0].tobytes()


async def test_a_reset_of_some_rows_leaves_the_others_and_the_position(at: Harness) -> None:
    await at.open("a", batch_size=4)
    await at.step("a", drawn(4, 3))
    before = (await at.state("a"))["sum"]
    answer = await at.submit("a", sizes=[4], reset=True, rows=[3, 0]).only()
    assert (answer.revision, answer.position) == (2, 3)
    start = PLAIN.initial[0]
    assert (await at.state("a"))["sum"].tobytes() == np.stack([start, *before[1:3], start]).tobytes()
    value = drawn(2)
    await at.submit("a", sizes=[4], reset=True, rows=[3, 0], state={"sum": value}).only()
    wanted = np.stack([value[1], *before[1:3], value[0]])
    assert (await at.state("a"))["sum"].tobytes() == wanted.tobytes()


async def test_a_whole_reset_sets_every_row_and_the_position(at: Harness) -> None:
    await at.open("a", batch_size=2)
    await at.step("a", drawn(2, 3))
    value = drawn(2).astype(np.float64)
    answer = await at.submit("a", sizes=[2], reset=True, state={"sum": value}).only()
    assert (answer.revision, answer.position, answer.outputs) == (2, 0, {})
    assert (await at.state("a"))["sum"].tobytes() == value.astype(np.float32).tobytes()


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({}, "inputs must be given; got none"),
        ({"reset": True, "rows": [-1]}, "rows must be within 0 to 0; got -1"),
        ({"expected": [1, 2]}, "expected_revisions must be empty or one for each of 1 sessions; got 2"),
        ({"request_ids": [1, 2]}, "request_ids must be empty or one for each of 1 sessions; got 2"),
        ({"batch_sizes": [1, 2]}, "batch_sizes must be empty or one for each of 1 sessions; got 2"),
    ],
)
async def test_what_no_message_can_ask_for_is_refused_too(
    fields: dict[str, Any], message: str, at: Harness
) -> None:
    """All else that is refused is in `test_refusals`."""
    await at.open("a")
    with pytest.raises(InvalidInput, match=f"^{message}"):
        await at.submit("a", **fields).only()
    assert (await at.engine.session_info("a")).revision == 0


async def test_a_refusal_of_the_program_changes_nothing_and_is_reported(at: Harness) -> None:
    await at.open("a")
    before = (await at.state("a"))["sum"].tobytes()
    for value in ([[BAD, 0]], [[[0, 0], [0, 0], [0, 0], [BAD, 0], [0, 0]]]):
        error = await fails(at.step("a", value, request_ids=4), InvalidInput)
        assert error.message == (
            "inputs must be ones that the model can run; it failed with: x is out of range"
        )
    assert (await at.state("a"))["sum"].tobytes() == before
    assert (await at.engine.session_info("a")).revision == 0
    assert (await at.step("a", drawn(1), expected=0, request_ids=4)).replayed is False


async def pass_in_flight(at: Harness) -> Any:
    """A pass in flight with the session `busy`."""
    await at.open("busy")
    return await at.begin_pass("busy", drawn(1))


@pytest.mark.engine(threads=True)
async def test_a_deadline_that_passes_in_the_queue_or_in_line_drops_the_change(at: Harness) -> None:
    await at.open("a")
    running_one = await pass_in_flight(at)
    deadline = at.clock.monotonic() + 5
    in_queue = at.submit("a", drawn(1), deadline=deadline)
    in_line = at.submit("busy", drawn(1), deadline=deadline)
    reset_in_line = at.submit("busy", reset=True, deadline=deadline)
    in_time = at.submit("busy", drawn(1), deadline=deadline + 1, expected=1)
    at.clock.advance(5)
    at.hooks.open_gate()
    for late in (in_queue, in_line, reset_in_line):
        await fails(late.only(), DeadlineExceeded, "while it waited; it was not applied")
    assert (await running_one.only()).revision == 1, "once its pass runs, a change is applied"
    assert (await in_time.only()).revision == 2
    assert (await at.engine.session_info("a")).revision == 0


@pytest.mark.engine(threads=True, steps=1)
async def test_a_deadline_that_passes_half_way_in_a_long_request_leaves_nothing_of_it(at: Harness) -> None:
    await at.open("a")
    late = await at.begin_pass("a", drawn(1, 5), deadline=at.clock.monotonic() + 5)
    at.clock.advance(6)
    at.hooks.open_gate()
    await fails(late.only(), DeadlineExceeded)
    assert (await at.state("a"))["sum"].tolist() == [PLAIN.initial[0].tolist()]
    assert at.hooks.rows == [1], "it ran one of its steps"


@pytest.mark.engine(threads=True, steps=1)
async def test_a_cancelled_long_request_leaves_nothing_and_gives_its_rows_back(at: Harness) -> None:
    await at.open("a", "b")
    long = await at.begin_pass(["a", "b"], drawn(2, 5))
    assert at.slots().working == 2
    at.cancel(long)
    following = at.submit("a", drawn(1))
    at.hooks.open_gate()
    assert [type(answer) for answer in await long.all()] == [Unavailable, Unavailable]
    assert (await following.only()).revision == 1
    await at.settled()
    assert at.slots().working == 0
    assert (await at.state("b"))["sum"].tolist() == [PLAIN.initial[0].tolist()]


@pytest.mark.engine(threads=True)
async def test_a_line_has_a_bound_and_the_rest_of_it_is_served(at: Harness) -> None:
    await pass_in_flight(at)
    in_line = [at.submit("busy", drawn(1)) for _ in range(256)]
    too_many = [at.submit("busy", drawn(1)), at.submit("busy", reset=True)]
    await fails(at.engine.get_state("busy"), Overloaded, "session 'busy' must stay within 256")
    for answers in too_many:
        error = await fails(answers.only(), Overloaded, "session 'busy' must stay within 256")
        assert error.retry_after_s > 0
    at.hooks.open_gate()
    assert [(await answers.only()).revision for answers in in_line] == list(range(2, 258))


@BOTH_WAYS
@pytest.mark.parametrize("company", [False, True])
async def test_an_executor_that_breaks_is_answered_and_the_next_step_runs(
    threads: bool, company: bool
) -> None:
    async with running(threads=threads) as at:
        await at.open("a", "b")
        broken = at.single("a", [[BROKEN, 0]])
        other = at.single("b", drawn(1)) if company else None
        await fails(broken.only(), Internal, r"^internal error [0-9a-f]{12}; ")
        if other is not None and threads:
            with pytest.raises(Internal):  # they shared a pass
                await other.only()
        elif other is not None:
            assert (await other.only()).revision == 1
        assert (await at.state("a"))["sum"].tobytes() == initial(1).tobytes()
        assert (await at.single("a", drawn(1), expected=0).only()).revision == 1


@pytest.mark.engine(threads=True)
async def test_each_single_step_has_a_deadline_of_its_own(at: Harness) -> None:
    await at.open("a", "b", "c")
    await at.begin_pass("c", x(1))
    now = at.clock.monotonic()
    late = [at.single("a", x(1), deadline=now + 1), at.single("c", x(1), deadline=now + 1)]
    in_time = at.single("b", x(1), deadline=now + 3)
    at.clock.advance(2)
    at.hooks.open_gate()
    for answer in late:
        await fails(answer.only(), DeadlineExceeded)
    assert (await in_time.only()).revision == 1


@pytest.mark.engine(threads=True)
async def test_a_session_closed_while_its_step_waits(at: Harness) -> None:
    await at.open("a", "b")
    await at.begin_pass("b", x(1))
    step = at.single("a", x(1))
    closing = asyncio.create_task(at.engine.close_session("a"))
    await asyncio.sleep(0)
    after = at.submit("b", x(1))
    at.hooks.open_gate()
    assert (await step.only()).revision == 1, "what was received before the closing is done before it"
    assert await closing is False
    assert (await after.only()).revision == 2
    with pytest.raises(SessionNotFound):
        await at.single("a", x(1)).only()


KINDS = ["plain", "long", "last", "frame", "reset", "get", "fork"]


@BOTH_WAYS
@pytest.mark.parametrize("seed", range(12))
async def test_requests_of_a_session_are_applied_in_the_order_received(threads: bool, seed: int) -> None:
    """Each change expects the revision after the one before: whichever is out of order is refused."""
    rng = np.random.default_rng(seed)
    async with running(threads=threads, compute_threads=1) as at:
        await at.open("a", "b", "busy")
        if threads:
            await at.begin_pass("busy", x(1))
        revision = 0
        changes: list[Any] = []
        reads: list[tuple[int, asyncio.Task[Any]]] = []
        for i, kind in enumerate(rng.choice(KINDS, 14)):
            at.single("b", x(1), select=[Select.LAST, Select.ALL][i % 2])  # company, in groups of other kinds
            if kind in ("get", "fork"):
                call = (
                    at.engine.get_state("a")
                    if kind == "get"
                    else at.engine.fork("a", new_session_id=f"fork{i}")
                )
                reads.append((revision, asyncio.create_task(call)))
                await asyncio.sleep(0)
                continue
            changes.append(change_of(at, kind, revision))
            revision += 1
        at.hooks.open_gate()
        for i, answers in enumerate(changes):
            assert (await answers.only()).revision == i + 1
        for wanted, task in reads:
            assert (await asyncio.wait_for(task, WAIT_S)).session.revision == wanted


def change_of(at: Harness, kind: str, expected: int) -> Any:
    if kind == "plain":
        return at.single("a", x(1), expected=expected)
    if kind == "long":
        return at.single("a", x(1, 3), expected=expected)
    if kind == "last":
        return at.single("a", x(1), expected=expected, select=Select.LAST)
    if kind == "frame":
        return at.submit("a", x(1), expected=expected)
    return at.submit("a", reset=True, expected=expected)


@pytest.mark.engine(threads=True, max_session_idle_s=10)
async def test_a_step_whose_session_expired_while_it_waited_fails_with_that_error(at: Harness) -> None:
    await at.open("a", "busy")
    at.clock.advance(6)
    await at.begin_pass("busy", x(1))
    step, frame = at.single("a", x(1)), at.submit(["a"], x(1, 3))
    assert await at.expired_after(5) == 1, "nobody else has its handle now"
    at.hooks.open_gate()
    for answers in (step, frame):
        await fails(answers.only(), SessionExpired)


@BOTH_WAYS
@pytest.mark.parametrize("rows", [1, 3, 4, 5, 23])
@pytest.mark.parametrize("steps", [None, 1, 6])
@pytest.mark.parametrize("with_state", [False, True])
async def test_any_number_of_rows_and_steps(
    threads: bool, rows: int, steps: int | None, with_state: bool
) -> None:
    async with running(threads=threads, max_batch_rows=4, resident_rows=5, steps=2) as at:
        value = x(rows, *([] if steps is None else [steps]))
        state = x(rows, seed=1) if with_state else None
        predicted = await at.engine.predict("plain", {"x": value}, None if state is None else {"sum": state})
        outputs, after = ran(initial(rows) if state is None else state, value)
        assert predicted.outputs["y"].tobytes() == outputs.tobytes()
        assert predicted.outputs["y"].shape == value.shape
        assert predicted.state["sum"].tobytes() == after.tobytes()
        again = await at.engine.predict("plain", {"": value}, None if state is None else {"": state})
        assert again.outputs["y"].tobytes() == predicted.outputs["y"].tobytes()
        assert ("predict", 1, rows * (steps or 1)) in at.events.changes


@pytest.mark.engine({"rich": RICH}, max_batch_rows=2)
async def test_several_inputs_outputs_and_states_without_a_session(at: Harness) -> None:
    inputs = {"x": x(3, 4), "token": np.ones((3, 4), np.int32), "gain": np.ones(3, np.float32)}
    predicted = await at.engine.predict("rich", inputs)
    shapes = {name: array.shape for name, array in predicted.outputs.items()}
    assert shapes == {"y": (3, 4, 2), "head": (3, 3)}
    assert predicted.state["count"].tolist() == [11, 11, 11]


@BOTH_WAYS
async def test_predictions_and_sessions_share_passes_and_do_not_notice(threads: bool) -> None:
    async with running(threads=threads, steps=1) as at:
        await at.open("a")
        step = at.submit("a", x(1, 5))
        predicted = await at.engine.predict("plain", {"": x(3, 5)})
        answer = await step.only()
        assert predicted.outputs["y"].tobytes() == ran(initial(3), x(3, 5))[0].tobytes()
        assert answer.outputs["y"].tobytes() == ran(initial(1), x(1, 5))[0].tobytes()
        assert max(rows for rows, _ in at.events.passes) == 4


@BOTH_WAYS
@pytest.mark.parametrize("row", [0, 3, 9])
@pytest.mark.parametrize("time", [0, 2])
async def test_one_row_at_fault_fails_the_run_and_nobody_else(threads: bool, row: int, time: int) -> None:
    async with running(threads=threads, max_batch_rows=4, steps=1) as at:
        await at.open("a")
        value = x(10, 3)
        value[row, time, 0] = BAD
        step = at.submit("a", x(1, 3))
        await fails(
            at.engine.predict("plain", {"": value}), InvalidInput, "it failed with: x is out of range"
        )
        assert (await step.only()).revision == 1
        await at.settled()
        assert at.slots().working == 0


@BOTH_WAYS
async def test_a_run_that_breaks(threads: bool) -> None:
    async with running(threads=threads, max_batch_rows=4) as at:
        value = x(10)
        value[7, 0] = BROKEN
        await fails(at.engine.predict("plain", {"": value}), Internal)
        assert (await at.engine.predict("plain", {"": x(10)})).outputs["y"].shape == (10, 2)


@pytest.mark.engine(threads=True, max_batch_rows=2, steps=1)
async def test_a_deadline_that_passes_while_it_waits(at: Harness) -> None:
    at.hooks.close_gate()
    late = asyncio.create_task(at.engine.predict("plain", {"": x(5, 3)}, deadline=at.clock.monotonic() + 5))
    await at.in_flight()
    at.clock.advance(5)
    at.hooks.open_gate()
    await fails(late, DeadlineExceeded)


@pytest.mark.engine(threads=True, max_batch_rows=2, steps=1)
async def test_a_run_that_is_cancelled_half_way_gives_its_rows_back(at: Harness) -> None:
    await at.open("a")
    at.hooks.close_gate()
    run_away = asyncio.create_task(at.engine.predict("plain", {"": x(5, 3)}))
    await at.in_flight()
    assert at.slots().working == 2
    run_away.cancel()
    await asyncio.wait([run_away])
    following = at.submit("a", x(1))
    at.hooks.open_gate()
    assert (await following.only()).revision == 1
    await at.settled()
    assert at.slots().working == 0
    assert len(at.hooks.rows) <= 3, "what was not running yet never ran"


@pytest.mark.engine(threads=True, resident_rows=4, max_batch_rows=4, steps=1)
async def test_working_rows_that_are_taken_are_waited_for(at: Harness) -> None:
    values = [x(3, 4, seed=i) for i in range(4)]
    runs = [asyncio.create_task(at.engine.predict("plain", {"": value})) for value in values]
    for value, task in zip(values, runs, strict=True):
        assert (await task).outputs["y"].tobytes() == ran(initial(3), value)[0].tobytes()


@pytest.mark.engine(threads=True, max_batch_rows=1)
async def test_too_much_waiting_is_refused(at: Harness) -> None:
    at.hooks.close_gate()
    first = asyncio.create_task(at.engine.predict("plain", {"": x(61)}))
    await at.in_flight()
    error = await fails(
        at.engine.predict("plain", {"": x(5)}),
        Overloaded,
        "must stay within 64; 60 wait, and this call adds 5",
    )
    assert error.retry_after_s > 0
    at.hooks.open_gate()
    assert (await first).outputs["y"].shape == (61, 2)
    assert (await at.engine.predict("plain", {"": x(5)})).outputs["y"].shape == (5, 2)


async def test_too_many_bytes_waiting_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("stepwell_server.engine.intake.queues.MAX_WAITING_BYTES", 100)
    async with running(threads=True) as at:
        at.hooks.close_gate()
        first = asyncio.create_task(at.engine.predict("plain", {"": x(1, 10)}))
        await at.in_flight()
        await fails(
            at.engine.predict("plain", {"": x(3)}),
            Overloaded,
            "input bytes waiting must stay within 100; 80 wait, and this call adds 24",
        )
        at.hooks.open_gate()
        await first
        assert (await at.engine.predict("plain", {"": x(3)})).outputs["y"].shape == (3, 2)


@pytest.mark.engine(threads=True, resident_rows=4, max_batch_rows=4, steps=1)
async def test_a_request_that_waits_for_rows_gets_those_of_a_cancelled_one(at: Harness) -> None:
    await at.open("a", batch_size=2)
    long = await at.begin_pass("a", np.zeros((2, 5, 2), np.float32), sizes=[2])
    predict = asyncio.create_task(at.engine.predict("plain", {"": np.zeros((3, 2), np.float32)}))
    await asyncio.sleep(0)
    at.cancel(long)
    at.hooks.open_gate()
    await asyncio.wait_for(predict, WAIT_S)
    assert isinstance((await long.all())[0], Unavailable)
