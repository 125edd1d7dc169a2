"""Steps and resets of single sessions: order, exactly once, replies that are remembered."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from stepwell_server.engine.api import Select
from stepwell_server.errors import (
    DeadlineExceeded,
    InvalidInput,
    Overloaded,
    RevisionConflict,
    Unavailable,
)
from support.checks.model_of_sessions import initial, ran
from support.engine.fake_executor import BAD, PLAIN, RICH, advance
from support.engine.harness import BOTH_WAYS, Answer, Harness, fails, running


def x(*shape: int) -> np.ndarray:
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
        value = x(*given)
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
            "x": x(2, 5),
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
    {"x": x(2)},
    {"x": x(2, 1)},
    {"x": x(2, 5)},
    {"x": x(2), "select": Select.LAST},
    {"x": x(2, 1), "select": Select.LAST},
    {"x": x(2, 5), "select": Select.LAST},
    {"x": x(2, 5), "select": Select.NONE},
    {"reset": True},
    {"reset": True, "rows": [1]},
    {"reset": True, "state": {"": x(2)}},
]


@pytest.mark.parametrize("how", ["at once", "paged out", "in line"])
@pytest.mark.parametrize("change", CHANGES, ids=range(len(CHANGES)))
@pytest.mark.engine(resident_rows=2, threads=True)
async def test_a_retry_gets_the_first_answer(change: dict[str, Any], how: str, at: Harness) -> None:
    await at.open("a", batch_size=2)
    await at.step("a", x(2, 3), request_ids=5)  # a reply of another kind before it
    args: dict[str, Any] = {"sizes": [2], "expected": 1, "request_ids": 6, **change}
    first = at.submit("a", **args)
    if how == "in line":
        second = at.submit("a", **args)
        one, two = await first.only(), await second.only()
    else:
        one = await first.only()
        if how == "paged out":
            await at.open("b", "c")
            await at.step("b", x(1, 4))
            assert not (await at.engine.session_info("a")).resident
        two = await at.submit("a", **args).only()
    assert (one.replayed, two.replayed) == (False, True)
    same(one, two)
    assert (await at.engine.session_info("a")).revision == 2


async def test_a_remembered_answer_says_the_revision_it_had_even_if_the_next_change_follows_at_once(
    at: Harness,
) -> None:
    await at.open("a")
    one = await at.step("a", x(1), expected=0, request_ids=5)
    again = at.submit("a", x(1), expected=0, request_ids=5)
    following = at.submit("a", x(1), expected=1, request_ids=6)
    assert (await following.only()).revision == 2
    same(one, await again.only())


async def test_another_kind_of_answer_replaces_the_remembered_one(at: Harness) -> None:
    await at.open("a")
    for number, steps in enumerate([3, 1, 4, 2]):
        value = x(1, steps)
        first = await at.step("a", value, expected=number, request_ids=number + 1)
        same(first, await at.step("a", value, expected=number, request_ids=number + 1))


async def test_a_stale_revision_is_refused_and_says_which_one_it_is(at: Harness) -> None:
    await at.open("a")
    await at.step("a", x(1), request_ids=5)
    before = (await at.state("a"))["sum"].tobytes()
    for expected in (0, 2, 2**64 - 1):
        for change in ({"x": x(1)}, {"reset": True}):
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
        inputs = [x(1, n) if n else x(1) for n in np.random.default_rng(0).integers(0, 4, 60)]
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
    at.submit("a", x(1))
    reset = at.submit("a", reset=True)
    read = at.engine.get_state("a")
    value = x(1, 2)
    reading, last = await read, at.submit("a", value)
    assert (await reset.only()).position == 0
    assert reading.session.revision == 2
    assert reading.state["sum"].tolist() == [PLAIN.initial[0].tolist()]
    assert (await last.only()).outputs["y"].tobytes() == ran(initial(1), value)[0].tobytes()


async def test_a_reset_of_some_rows_leaves_the_others_and_the_position(at: Harness) -> None:
    await at.open("a", batch_size=4)
    await at.step("a", x(4, 3))
    before = (await at.state("a"))["sum"]
    answer = await at.submit("a", sizes=[4], reset=True, rows=[3, 0]).only()
    assert (answer.revision, answer.position) == (2, 3)
    start = PLAIN.initial[0]
    assert (await at.state("a"))["sum"].tobytes() == np.stack([start, *before[1:3], start]).tobytes()
    value = x(2)
    await at.submit("a", sizes=[4], reset=True, rows=[3, 0], state={"sum": value}).only()
    wanted = np.stack([value[1], *before[1:3], value[0]])
    assert (await at.state("a"))["sum"].tobytes() == wanted.tobytes()


async def test_a_whole_reset_sets_every_row_and_the_position(at: Harness) -> None:
    await at.open("a", batch_size=2)
    await at.step("a", x(2, 3))
    value = x(2).astype(np.float64)
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


async def test_what_the_program_refuses_changes_nothing_and_says_so(at: Harness) -> None:
    await at.open("a")
    before = (await at.state("a"))["sum"].tobytes()
    for value in ([[BAD, 0]], [[[0, 0], [0, 0], [0, 0], [BAD, 0], [0, 0]]]):
        error = await fails(at.step("a", value, request_ids=4), InvalidInput)
        assert error.message == (
            "inputs must be ones that the model can run; it failed with: x is out of range"
        )
    assert (await at.state("a"))["sum"].tobytes() == before
    assert (await at.engine.session_info("a")).revision == 0
    assert (await at.step("a", x(1), expected=0, request_ids=4)).replayed is False


async def blocked(at: Harness) -> Any:
    """A pass in flight with the session `busy`."""
    await at.open("busy")
    return await at.begin_pass("busy", x(1))


@pytest.mark.engine(threads=True)
async def test_a_deadline_that_passes_in_the_queue_or_in_line_drops_the_change(at: Harness) -> None:
    await at.open("a")
    running_one = await blocked(at)
    deadline = at.clock.monotonic() + 5
    in_queue = at.submit("a", x(1), deadline=deadline)
    in_line = at.submit("busy", x(1), deadline=deadline)
    reset_in_line = at.submit("busy", reset=True, deadline=deadline)
    in_time = at.submit("busy", x(1), deadline=deadline + 1, expected=1)
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
    late = await at.begin_pass("a", x(1, 5), deadline=at.clock.monotonic() + 5)
    at.clock.advance(6)
    at.hooks.open_gate()
    await fails(late.only(), DeadlineExceeded)
    assert (await at.state("a"))["sum"].tolist() == [PLAIN.initial[0].tolist()]
    assert at.hooks.rows == [1], "it ran one of its steps"


@pytest.mark.engine(threads=True, steps=1)
async def test_a_cancelled_long_request_leaves_nothing_and_gives_its_rows_back(at: Harness) -> None:
    await at.open("a", "b")
    long = await at.begin_pass(["a", "b"], x(2, 5))
    assert at.slots().working == 2
    at.cancel(long)
    following = at.submit("a", x(1))
    at.hooks.open_gate()
    assert [type(answer) for answer in await long.all()] == [Unavailable, Unavailable]
    assert (await following.only()).revision == 1
    await at.settled()
    assert at.slots().working == 0
    assert (await at.state("b"))["sum"].tolist() == [PLAIN.initial[0].tolist()]


@pytest.mark.engine(threads=True)
async def test_a_line_has_a_bound_and_the_rest_of_it_is_served(at: Harness) -> None:
    await blocked(at)
    in_line = [at.submit("busy", x(1)) for _ in range(256)]
    too_many = [at.submit("busy", x(1)), at.submit("busy", reset=True)]
    await fails(at.engine.get_state("busy"), Overloaded, "session 'busy' must stay within 256")
    for answers in too_many:
        error = await fails(answers.only(), Overloaded, "session 'busy' must stay within 256")
        assert error.retry_after_s > 0
    at.hooks.open_gate()
    assert [(await answers.only()).revision for answers in in_line] == list(range(2, 258))
