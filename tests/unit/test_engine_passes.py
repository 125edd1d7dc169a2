"""Passes: who shares one, whose fault it is when it fails, and what happens when it breaks."""

from __future__ import annotations

import asyncio
import dataclasses
import math
import threading
from typing import Any

import numpy as np
import pytest

from stepwell_server.core.cost import Cost
from stepwell_server.engine.api import ChangeResult, Select
from stepwell_server.engine.change import Awaited, Change
from stepwell_server.engine.commit.committer import Committer
from stepwell_server.engine.passes.loop import LARGE_INTAKE
from stepwell_server.engine.state.model import SHORT_PASS_S, Model
from stepwell_server.errors import Internal, InvalidInput, Overloaded, Unavailable
from stepwell_server.program import ONNX_MODEL
from support.checks.model_of_sessions import initial, ran
from support.engine.fake_executor import BAD, BROKEN, PLAIN
from support.engine.harness import BOTH_WAYS, Answer, FixedCost, Harness, fails, kinds, running, x
from support.stores.durable import until

START = PLAIN.initial[0].tobytes()


def outputs_of(value: np.ndarray) -> np.ndarray:
    return ran(initial(len(value)), value)[0]


async def open_all(at: Harness, count: int) -> list[str]:
    ids = [f"s{i:03}" for i in range(count)]
    await at.engine.open_sessions("plain", session_ids=ids)
    return ids


@BOTH_WAYS
@pytest.mark.parametrize("bad", [[0], [25], [50], [0, 1, 49, 50], list(range(51))])
@pytest.mark.parametrize("steps", [None, 1, 4])
async def test_only_the_sessions_at_fault_fail(threads: bool, bad: list[int], steps: int | None) -> None:
    async with running(threads=threads, compute_threads=3) as at:
        ids = await open_all(at, 51)
        value = x(51, *([] if steps is None else [steps]))
        good = value.copy()
        for place, member in enumerate(bad):  # at different time steps
            value[(member, 0) if steps is None else (member, place % steps, 0)] = BAD
        answers = await at.submit(ids, value).all()
        wanted, after = ran(initial(51), good)
        for member, answer in enumerate(answers):
            if member in bad:
                assert isinstance(answer, InvalidInput)
                assert "it failed with: x is out of range" in answer.message
                assert (await at.state(ids[member]))["sum"].tobytes() == START
                assert (await at.engine.session_info(ids[member])).revision == 0
            else:
                assert isinstance(answer, Answer)
                assert answer.outputs["y"].tobytes() == wanted[member].tobytes()
                assert answer.revision == 1
                assert (await at.state(ids[member]))["sum"].tobytes() == after[member].tobytes()


async def test_a_program_that_may_not_end_runs_on_threads_and_not_again() -> None:
    """A run that is terminated takes long: it is not repeated for its only session, and the event loop never waits."""
    program = dataclasses.replace(PLAIN, executor="onnxruntime", files={ONNX_MODEL: b"..Loop.."})
    async with running() as at:
        ids = await open_all(at, 1)
        at.engine.begin_with("loops", 1, program)
        await at.engine.open_sessions("loops", session_ids=["a", "b"])
        used, run = set[int](), at.hooks.run

        def noted(rows: int) -> None:
            used.add(threading.get_ident())
            run(rows)

        at.hooks.run = noted  # type: ignore[method-assign]
        for seed in range(20):
            assert kinds(await at.submit(["a", "b"], x(2, seed=seed)).all()) == ["Answer"] * 2
        at.hooks.rows.clear()
        value = x(1)
        value[0, 0] = BAD
        assert kinds(await at.submit(["a"], value).all()) == ["InvalidInput"]
        assert at.hooks.rows == [1]
        assert threading.get_ident() not in used
        assert kinds(await at.submit(ids, x(1)).all()) == ["Answer"]
        assert threading.get_ident() in used


@BOTH_WAYS
async def test_sessions_of_different_requests_do_not_notice_the_one_at_fault(threads: bool) -> None:
    async with running(threads=threads) as at:
        ids = await open_all(at, 12)
        value = x(12, 3)
        value[7, 2, 0] = BAD
        waiting = [at.submit(session_id, value[i : i + 1]) for i, session_id in enumerate(ids)]
        for i, answers in enumerate(waiting):
            (answer,) = await answers.all()
            if i == 7:
                assert isinstance(answer, InvalidInput)
            else:
                assert isinstance(answer, Answer)
                assert answer.outputs["y"].tobytes() == outputs_of(value[i : i + 1]).tobytes()


@BOTH_WAYS
async def test_a_session_with_a_row_at_fault_fails_whole_and_its_neighbours_do_not(threads: bool) -> None:
    async with running(threads=threads) as at:
        for session_id, size in (("a", 2), ("b", 3), ("c", 1)):
            await at.open(session_id, batch_size=size)
        value = x(6)
        value[3, 0] = BAD
        answers = await at.submit(["a", "b", "c"], value, sizes=[2, 3, 1]).all()
        assert kinds(answers) == ["Answer", "InvalidInput", "Answer"]
        assert (await at.state("b"))["sum"].tobytes() == START * 3
        for answer, low, high in ((answers[0], 0, 2), (answers[2], 5, 6)):
            assert isinstance(answer, Answer)
            assert answer.outputs["y"].tobytes() == outputs_of(value[low:high]).tobytes()


@BOTH_WAYS
async def test_a_pass_that_breaks_changes_nothing_and_the_loop_continues(
    threads: bool, caplog: pytest.LogCaptureFixture
) -> None:
    async with running(threads=threads) as at:
        ids = await open_all(at, 8)
        value = x(8)
        value[5, 0] = BROKEN
        broken = at.submit(ids, value)
        after = at.submit(ids, x(8, seed=1), expected=[0] * 8)
        answers = await broken.all()
        assert kinds(answers) == ["Internal"] * 8
        error = answers[0]
        assert isinstance(error, Internal)
        assert "secret" not in error.message
        (record,) = [r for r in caplog.records if error.error_id in str(getattr(r, "fields", {}))]
        assert "a secret detail" in (record.exc_text or "")
        for member, answer in enumerate(await after.all()):
            assert isinstance(answer, Answer)
            wanted = outputs_of(x(8, seed=1)[member : member + 1])
            assert answer.outputs["y"].tobytes() == wanted[0].tobytes()


@BOTH_WAYS
async def test_a_pass_that_breaks_while_it_is_narrowed_changes_nothing(threads: bool) -> None:
    async with running(threads=threads) as at:
        ids = await open_all(at, 8)
        value = x(8)
        value[3, 0] = (
            BAD  # the executor refuses the whole pass, so it runs in parts, the last of which breaks
        )
        value[7, 0] = BROKEN
        assert kinds(await at.submit(ids, value).all()) == ["Internal"] * 8
        for session_id in ids:
            assert (await at.state(session_id))["sum"].tobytes() == START
            assert (await at.engine.session_info(session_id)).revision == 0


@pytest.mark.parametrize("victim", range(6))
@pytest.mark.engine(threads=True)
async def test_cancelling_any_member_of_a_batch_harms_no_other(victim: int, at: Harness) -> None:
    ids = await open_all(at, 7)
    first = await at.begin_pass(ids[6], x(1))
    value = x(6)
    waiting = [at.submit(ids[i], value[i : i + 1]) for i in range(6)]
    at.cancel(waiting[victim])
    at.hooks.open_gate()
    assert (await first.only()).revision == 1
    for i, answers in enumerate(waiting):
        (answer,) = await answers.all()
        if i == victim:
            assert isinstance(answer, Unavailable)
            assert (await at.engine.session_info(ids[i])).revision == 0
        else:
            assert isinstance(answer, Answer)
            assert answer.outputs["y"].tobytes() == outputs_of(value[i : i + 1]).tobytes()


async def _step(at: Harness, change: Change, answer: Awaited) -> ChangeResult:
    at.engine.submit(change)
    return await answer.get()


@pytest.mark.parametrize("victim", range(4))
@pytest.mark.engine(threads=True)
async def test_cancelling_the_task_that_waits_for_a_change_harms_no_other(victim: int, at: Harness) -> None:
    ids = await open_all(at, 5)
    await at.begin_pass(ids[4], x(1))
    value = x(4)
    waiting = [(Awaited(), ids[i], value[i : i + 1]) for i in range(4)]
    tasks = [
        asyncio.create_task(_step(at, Change([name], answer, inputs={"": own}), answer))
        for answer, name, own in waiting
    ]
    await asyncio.sleep(0)
    tasks[victim].cancel()
    await asyncio.wait([tasks[victim]])
    at.hooks.open_gate()
    for i, task in enumerate(tasks):
        if i == victim:
            assert task.cancelled()
        else:
            assert (await task).outputs["y"].tobytes() == outputs_of(value[i : i + 1]).tobytes()
    assert (await at.engine.session_info(ids[victim])).revision == 0


@pytest.mark.engine(threads=True)
async def test_one_pass_runs_at_a_time_even_if_what_is_dropped_lets_others_in(at: Harness) -> None:
    await at.open("a", "b", "c")
    await at.begin_pass("a", x(1))
    dropped, in_line, other = at.submit("b", x(1)), at.submit("b", x(1)), at.submit("c", x(1))
    at.cancel(dropped)
    at.passes[0].on_end = at.hooks.close_gate  # the next pass waits until this test has looked
    at.hooks.inside.clear()
    at.hooks.open_gate()
    # the two that are left share a pass or not, by what comes first: the end of the first one, or its commit
    while True:
        await until(lambda: at.hooks.inside.is_set() or (in_line.ended and other.ended))
        for _ in range(20):
            await asyncio.sleep(0)
        assert at.passes[0].most == 1
        if in_line.ended and other.ended:
            break
        at.hooks.inside.clear()
        at.hooks.open_gate()
    assert (await in_line.only()).revision == 1
    assert (await other.only()).revision == 1


@pytest.mark.engine(threads=True)
async def test_a_change_cancelled_while_its_pass_runs_is_applied_and_a_retry_finds_it(at: Harness) -> None:
    await at.open("a")
    one = await at.begin_pass("a", x(1), expected=0, request_ids=3)
    at.cancel(one)
    at.hooks.open_gate()
    assert (await one.only()).revision == 1
    assert (await at.step("a", x(1), expected=0, request_ids=3)).replayed


@pytest.mark.engine(threads=True, max_batch_rows=8, compute_threads=1)
async def test_waiting_requests_run_together_up_to_max_batch_rows(at: Harness) -> None:
    ids = await open_all(at, 21)
    await at.begin_pass(ids[20], x(1))
    waiting = [at.submit(ids[i], x(1)) for i in range(20)]
    at.hooks.open_gate()
    for answers in waiting:
        await answers.only()
    assert at.events.passes == [(1, 1), (8, 1), (8, 1), (4, 1)]


@pytest.mark.engine(threads=True, max_batch_rows=4)
async def test_a_frame_of_more_rows_than_a_pass_is_answered_in_parts(at: Harness) -> None:
    ids = await open_all(at, 10)
    value = x(10)
    answers = at.submit(ids, value)
    wanted = outputs_of(value)
    for member, answer in enumerate(await answers.all()):
        assert isinstance(answer, Answer)
        assert answer.outputs["y"].tobytes() == wanted[member].tobytes()
    assert [rows for rows, _ in at.events.passes] == [4, 4, 2]


@pytest.mark.engine(max_batch_rows=4)
async def test_a_session_of_more_rows_than_a_pass_runs(at: Harness) -> None:
    await at.open("a", batch_size=9)
    value = x(9, 3)
    assert (await at.step("a", value)).outputs["y"].tobytes() == outputs_of(value).tobytes()


@pytest.mark.engine(threads=True, steps=100, max_batch_rows=2, compute_threads=1)
async def test_a_long_request_gives_way_to_short_ones_after_each_step(at: Harness) -> None:
    ids = await open_all(at, 4)
    long = await at.begin_pass(ids[0], x(1, 40))
    short = [at.submit(ids[i], x(1)) for i in range(1, 4)]
    after = at.submit(ids[1], x(1))
    at.hooks.open_gate()
    for answers in [*short, after]:
        await answers.only()
    assert (await long.only()).outputs["y"].tobytes() == outputs_of(x(1, 40)).tobytes()
    assert at.events.passes[0] == (1, 40), "alone, it runs many steps in one pass"


@pytest.mark.engine(threads=True, steps=100, max_batch_rows=2, compute_threads=1)
async def test_while_others_wait_a_long_request_runs_one_step_a_pass(at: Harness) -> None:
    ids = await open_all(at, 4)
    first = await at.begin_pass(ids[0], x(1))
    long = at.submit(ids[1], x(1, 4))
    short = [at.submit(ids[i], x(1)) for i in (2, 3)]
    at.hooks.open_gate()
    for answers in [first, *short]:
        await answers.only()
    assert at.events.passes[:3] == [(1, 1), (2, 1), (2, 1)]
    await long.only()
    assert sum(steps for _, steps in at.events.passes) == 1 + 4


class TenThousandASecond(FixedCost):
    """A time step takes a tenth of a millisecond, whatever the rows."""

    def times_within(self, items: int, seconds: float) -> int:
        return round(seconds * 1e4)


async def test_slices_run_on_threads_and_are_short_while_others_come_and_go(at: Harness) -> None:
    for model in at.internals.models:
        model.cost = TenThousandASecond(0.0, 0)
    await at.open("a", "b")
    long = await at.begin_pass("a", x(1, 60))
    short = at.submit("b", x(1), states=Select.LAST)  # which runs in a pass
    at.hooks.open_gate()
    await short.only()
    assert (await long.only()).outputs["y"].tobytes() == outputs_of(x(1, 60)).tobytes()
    assert at.events.passes == [(1, 20), (2, 1), *[(1, 2)] * 19, (1, 1)]
    at.clock.advance(1.0)
    del at.events.passes[:]
    await at.submit("a", x(1, 60)).only()
    assert at.events.passes == [(1, 20)] * 3, "alone again"


@pytest.mark.engine(threads=True, max_batch_rows=1)
async def test_steps_overtake_passes_that_wait_but_not_those_of_their_own_session(at: Harness) -> None:
    model = next(iter(at.internals.models))
    model.cost = FixedCost(1.0, 1)
    model.cost.one_s = 0.0  # of a step without a pass; passes run on a thread
    await at.open("a", "b", "c")
    at.hooks.close_gate()
    running_one = at.submit("a", x(1), states=Select.LAST)
    waiting = at.submit("b", x(1), states=Select.LAST)
    await at.in_flight()
    assert model.ready.rows_waiting == 1
    assert (await at.submit("c", x(1)).only()).revision == 1
    own = at.submit("b", x(1))
    assert [one.by_member for one in (running_one, waiting, own)] == [{}, {}, {}]
    at.hooks.open_gate()
    assert [(await one.only()).revision for one in (running_one, waiting, own)] == [1, 1, 2]


async def test_steps_run_at_once_while_a_slice_of_another_request_runs(at: Harness) -> None:
    for model in at.internals.models:
        model.cost = TenThousandASecond(0.0, 0)
    await at.open("a", "b")
    long = await at.begin_pass("a", x(1, 60))
    value = x(1, seed=3)
    for turn in range(3):
        answer = await at.submit("b", value, expected=turn).only()
        assert isinstance(answer, Answer)
        assert answer.revision == turn + 1
    assert not long.by_member
    at.hooks.open_gate()
    assert (await long.only()).outputs["y"].tobytes() == outputs_of(x(1, 60)).tobytes()
    assert at.events.passes == [*[(1, 1)] * 3, (1, 20), *[(1, 2)] * 20], (
        "and the slices are short from then on"
    )


@pytest.mark.engine(threads=True, max_batch_rows=1, resident_rows=200)
async def test_too_many_rows_waiting_are_refused_and_nothing_changes(at: Harness) -> None:
    ids = await open_all(at, 70)
    first = await at.begin_pass(ids[0], x(1))
    waiting = at.submit(ids[1:61], x(60))
    with pytest.raises(
        Overloaded, match="rows waiting for model 'plain' must stay within 64; 60 wait, and this call adds 5"
    ) as error:
        at.submit(ids[61:66], x(5))
    assert error.value.retry_after_s > 0
    fits = at.submit(ids[61:65], x(4))
    with pytest.raises(Overloaded, match="64 wait, and this call adds 1"):
        at.submit(ids[66], x(1))
    at.hooks.open_gate()
    await first.only()
    await waiting.all()
    await fits.all()
    assert (await at.engine.session_info(ids[65])).revision == 0
    assert (await at.step(ids[65], x(1), expected=0)).revision == 1


async def test_too_many_bytes_waiting_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("stepwell_server.engine.intake.queues.MAX_WAITING_BYTES", 100)
    async with running(threads=True) as at:
        ids = await open_all(at, 3)
        at.hooks.close_gate()
        first = at.submit(ids[0], x(1, 50))  # 400 bytes, but nothing waits yet
        await at.in_flight()
        with pytest.raises(
            Overloaded, match="input bytes waiting must stay within 100; 400 wait, and this call adds 8"
        ):
            at.submit(ids[1], x(1))
        assert at.engine.stats()[0].queued_bytes == 400
        at.hooks.open_gate()
        await first.only()
        assert (await at.step(ids[1], x(1))).revision == 1


@pytest.mark.engine(threads=True)
async def test_stopping_refuses_new_requests_and_finishes_earlier_ones(at: Harness) -> None:
    await at.open("a", "b")
    first = await at.begin_pass("a", x(1))
    in_queue, in_line = at.submit("b", x(1, 3)), at.submit("a", x(1))
    at.engine.stop_accepting()
    for change in ({"x": x(1)}, {"reset": True}):
        with pytest.raises(Unavailable, match="the server is stopping"):
            at.submit("a", **change)
    for call in (
        at.engine.open_session("plain"),
        at.engine.open_sessions("plain", count=1),
        at.engine.fork("a"),
        at.engine.predict("plain", {"": x(1)}),
    ):
        await fails(call, Unavailable, "the server is stopping")
    draining = asyncio.create_task(at.engine.drain())
    await asyncio.sleep(0)
    assert not draining.done()
    at.hooks.open_gate()
    await asyncio.wait_for(draining, 60)
    assert all(answers.ended for answers in (first, in_queue, in_line))
    assert (await in_line.only()).revision == 2
    assert (await at.engine.get_state("b")).session.position == 3


@pytest.mark.engine(threads=True)
async def test_draining_ends_if_all_that_waits_was_cancelled(at: Harness) -> None:
    await at.open("a", "b")
    await at.begin_pass("a", x(1))
    cancelled = at.submit("b", x(1))
    at.cancel(cancelled)
    draining = asyncio.create_task(at.engine.drain())
    await asyncio.sleep(0)
    at.hooks.open_gate()
    await asyncio.wait_for(draining, 60)
    assert kinds(await cancelled.all()) == ["Unavailable"]


@pytest.mark.engine(max_batch_rows=100)
async def test_warming_up_writes_to_nobodys_rows(at: Harness) -> None:
    await at.open("a")
    before = (await at.state("a"))["sum"].tobytes()
    await at.engine.start()
    assert (await at.state("a"))["sum"].tobytes() == before
    assert set(at.hooks.rows) == {1, 8, 64}, "no size beyond max_batch_rows"


@pytest.mark.engine(threads=False)
async def test_passes_are_shorter_beside_others_where_what_follows_them_takes_long(
    monkeypatch: pytest.MonkeyPatch, at: Harness
) -> None:
    ids = await open_all(at, 40)
    model = at.internals.models[0]
    before = model.rows_of_a_short_pass
    commit = Committer.commit

    def slow(*given: Any) -> None:
        at.clock.advance(5e-3)
        commit(*given)

    monkeypatch.setattr(Committer, "commit", slow)
    for _ in range(40):
        await at.submit(ids, x(40)).all()
    assert model.rows_of_a_short_pass < before
    assert model.rows_within(SHORT_PASS_S) >= before, "the passes themselves are no longer"


@pytest.mark.parametrize(
    ("each_s", "rows"),
    [
        pytest.param(1e-6, 72, id="in a tenth of a millisecond"),
        pytest.param(50e-6, 16, id="enough to be worth a pass"),
        pytest.param(200e-6, 9, id="in two milliseconds"),
        pytest.param(5e-3, 1, id="one, however long it takes"),
    ],
)
@pytest.mark.engine(threads=False)
async def test_the_rows_of_a_pass_beside_others(at: Harness, each_s: float, rows: int) -> None:
    model = at.internals.models[0]
    model.cost = Cost(28e-6, each_s)
    model.iteration_cost = Cost(1e-6, 1e-6)
    assert model.rows_of_a_short_pass == rows


@pytest.mark.stores("memory")
@pytest.mark.engine(threads=False, max_batch_rows=64, resident_rows=400)
async def test_one_short_pass_of_sixteen_measures_what_a_pass_costs_regardless_of_its_rows(
    monkeypatch: pytest.MonkeyPatch, at: Harness
) -> None:
    monkeypatch.setattr(Model, "rows_of_a_short_pass", 20)
    ids = await open_all(at, 400)
    ready = at.internals.models[0].ready
    ready.alone_until, ready.alone_by = math.inf, "other"
    answers = await at.submit(ids, x(400), connection="flood").all()
    assert kinds(answers) == ["Answer"] * 400
    assert [rows for rows, _ in at.events.passes] == [*[20] * 15, 8, *[20] * 4, 12]


@pytest.mark.stores("memory")
async def test_steps_that_overtake_passes_do_not_count_as_passes(at: Harness) -> None:
    learned: list[int] = []

    class Recorded(Cost):
        def learn(self, items: int, seconds: float, times: int = 1) -> None:
            learned.append(items)

    await at.open("a", "b")
    model = at.internals.models[0]
    model.iteration_cost, model.ready.contended_until = Recorded(), at.clock.monotonic() + 1.0
    await at.submit(["a", "b"], x(2)).all()
    assert not learned
    at.clock.advance(2.0)
    await at.submit(["a", "b"], x(2)).all()
    assert learned == [2]


@pytest.mark.parametrize("rows", [LARGE_INTAKE, LARGE_INTAKE + 1])
@pytest.mark.parametrize("steps", [1, 2], ids=["without a pass", "in a pass"])
@pytest.mark.stores("memory")
@pytest.mark.engine(resident_rows=2 * LARGE_INTAKE)
async def test_a_large_intake_beside_another_source_is_an_iteration_of_its_own(
    rows: int, steps: int, at: Harness
) -> None:
    names = await open_all(at, rows)
    await at.open("quiet", "silent")
    await at.submit(["quiet", "silent"][:steps], x(steps), connection="quiet").require_all_applied()
    (model,) = at.internals.models
    iterate = at.internals.turn_of(model)
    large = at.submit(names, x(rows), connection="large")
    assert iterate() is (rows > LARGE_INTAKE), "else its pass runs at once"
    assert model.ready.rows_waiting == (rows if rows > LARGE_INTAKE else 0)
    quiet = at.submit("quiet", x(1), connection="quiet")
    assert (await quiet.only()).revision == 2
    await large.require_all_applied()
