"""Runs without a session."""

from __future__ import annotations

import asyncio

import numpy as np
import pytest

from stepwell_server.errors import (
    DeadlineExceeded,
    Internal,
    InvalidInput,
    Overloaded,
    Unavailable,
)
from support.checks.model_of_sessions import initial, ran
from support.engine.fake_executor import BAD, BROKEN, RICH, WAIT_S
from support.engine.harness import BOTH_WAYS, Harness, fails, running, x


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
async def test_several_inputs_outputs_and_states(at: Harness) -> None:
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
        at.engine.predict("plain", {"": x(5)}), Overloaded, "must stay within 64; 60 wait and 5 came"
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
            "input bytes waiting must stay within 100; 80 wait and 24 came",
        )
        at.hooks.open_gate()
        await first
        assert (await at.engine.predict("plain", {"": x(3)})).outputs["y"].shape == (3, 2)


@pytest.mark.engine(threads=True, resident_rows=4, max_batch_rows=4, steps=1)
async def test_who_waits_for_rows_to_work_in_gets_those_of_a_request_that_is_cancelled(at: Harness) -> None:
    await at.open("a", batch_size=2)
    long = await at.begin_pass("a", np.zeros((2, 5, 2), np.float32), sizes=[2])
    predict = asyncio.create_task(at.engine.predict("plain", {"": np.zeros((3, 2), np.float32)}))
    await asyncio.sleep(0)
    at.cancel(long)
    at.hooks.open_gate()
    await asyncio.wait_for(predict, WAIT_S)
    assert isinstance((await long.all())[0], Unavailable)
