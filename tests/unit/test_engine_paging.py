"""More sessions than rows: they are paged out and back, and changes queue for rows; inputs and states are checked and cast."""

from __future__ import annotations

import asyncio
import dataclasses
import functools
from typing import Any

import numpy as np
import pytest

from stepwell_server.engine.change import Change
from stepwell_server.engine.intake.validation import check_inputs, check_state, finite_rows, require_finite
from stepwell_server.engine.state.arena import Arena
from stepwell_server.errors import (
    DeadlineExceeded,
    InvalidInput,
    Overloaded,
    SessionLost,
    SessionNotFound,
    Unavailable,
)
from stepwell_server.program import StateSpec, TensorSpec
from stepwell_server.store.base import Batch
from stepwell_server.store.memory import MemoryStore
from support.checks.model_of_sessions import ModelOfSessions, Reply, initial
from support.engine.fake_executor import PLAIN, RICH
from support.engine.harness import Answer, Answers, CallbackAnswers, Harness, fails, kinds, running, x
from support.stores.durable import start_task
from support.stores.fake_shared_store import RemoteStore


async def resident(at: Harness, names: str) -> str:
    return "".join([name for name in names if (await at.engine.session_info(name)).resident])


async def away(at: Harness) -> int:
    """How many sessions are only in the store."""
    infos, _ = await at.engine.list_sessions()
    return sum(not info.resident for info in infos)


def test_packed_rows_of_all_types_come_back_bit_for_bit() -> None:
    rng = np.random.default_rng(1)
    program = dataclasses.replace(
        RICH,
        state=(*RICH.state, StateSpec("flag", (3,), "bool"), StateSpec("half", (2, 2), "float16")),
        initial=(*RICH.initial, np.zeros(3, bool), np.zeros((2, 2), np.float16)),
    )
    arena, rows = Arena(program, 8), np.array([6, 1, 3], np.intp)
    for array in (*arena.states, *arena.outputs):
        array[...] = rng.integers(0, 2, array.shape)
        if array.dtype.kind == "f":
            array[...] = np.where(rng.random(array.shape) < 0.3, np.nan, -0.0)
    before = [array[rows].tobytes() for array in (*arena.states, *arena.outputs)]
    packed = arena.pack(rows)
    assert packed.shape == (3, program.state_row_bytes + 4 * (2 + 3))
    other = Arena(program, 4)
    other.unpack(np.array([2, 0, 3], np.intp), np.frombuffer(packed.tobytes(), np.uint8).reshape(3, -1))
    after = [array[[2, 0, 3]].tobytes() for array in (*other.states, *other.outputs)]
    assert after == before
    assert not any(array[1].any() for array in other.states), "no other row is touched"


def test_the_memory_store_replaces_finds_and_forgets() -> None:
    store = MemoryStore()
    store.commit(Batch(puts=[("a", b"1"), ("b", b"2")]))
    store.commit(Batch(puts=[("a", b"3")]))
    assert store.get("a") == b"3"
    store.commit(Batch(deletes=["a", "never there"]))
    assert store.get("a") is None
    assert store.count() == 1


@pytest.mark.engine(resident_rows=3)
async def test_the_least_recently_used_leaves_and_comes_back_as_it_was(at: Harness) -> None:
    model = ModelOfSessions(0)
    for name in "abc":
        at.clock.advance(1)
        await at.open(name)
        model.open(name, 1, None, 0)
    for name in "ab":
        at.clock.advance(1)
        await at.step(name, x(1))
        model.step(name, x(1), "ALL", None, 0, 0)
    await at.open("d")
    assert await resident(at, "abcd") == "abd"
    assert (await away(at)) == 1
    at.clock.advance(1)
    await at.state("c")
    assert await resident(at, "abcd") == "bcd", "reading is a use too"
    answer = await at.step("a", x(1, 2, seed=1))
    wanted = model.step("a", x(1, 2, seed=1), "ALL", None, 0, 0)
    assert isinstance(wanted, Reply)
    assert answer.outputs["y"].tobytes() == wanted.outputs["y"].tobytes()
    assert (answer.revision, answer.position) == (2, 3)
    for name in "abc":
        assert (await at.state(name))["sum"].tobytes() == model.sessions[name].state.tobytes()


@pytest.mark.parametrize("threads", [False, True])
async def test_sessions_of_several_rows_share_few_rows(threads: bool) -> None:
    rng = np.random.default_rng(3)
    async with running(resident_rows=7, threads=threads, max_batch_rows=5) as at:
        model, sizes = ModelOfSessions(0), dict(zip("abcdefgh", [1, 3, 2, 4, 1, 2, 7, 3], strict=True))
        for name, size in sizes.items():
            await at.open(name, batch_size=size)
            model.open(name, size, None, 0)
        for i in range(120):
            name = "abcdefgh"[rng.integers(8)]
            at.clock.advance(1)
            value = x(sizes[name], *([int(rng.integers(1, 4))] if rng.random() < 0.5 else []), seed=i)
            answer = await at.step(name, value)
            wanted = model.step(name, value, "ALL", None, 0, 0)
            assert isinstance(wanted, Reply)
            assert answer.outputs["y"].tobytes() == wanted.outputs["y"].tobytes()
            assert (answer.revision, answer.position) == (wanted.revision, wanted.position)
        for name, session in model.sessions.items():
            assert (await at.state(name))["sum"].tobytes() == session.state.tobytes()


@pytest.mark.engine(resident_rows=2, threads=True)
async def test_a_session_with_something_under_way_keeps_its_rows(at: Harness) -> None:
    for name in "zabc":
        at.clock.advance(1)
        await at.open(name)
    assert await resident(at, "zabc") == "bc"
    busy = await at.begin_pass(["b", "c"], x(2))
    for refused in (at.state("z"), at.open("d"), at.engine.fork("z")):
        error = await fails(
            refused,
            Overloaded,
            "model 'plain' must have 1 free rows within resident_rows 2; active sessions use them",
        )
        assert error.retry_after_s > 0
    waiting = at.submit("a", x(1))
    at.hooks.open_gate()
    assert kinds(await busy.all()) == ["Answer", "Answer"]
    assert (await waiting.only()).revision == 1


@pytest.mark.stores("memory", "async", "sync")
@pytest.mark.engine(resident_rows=3)
async def test_a_session_whose_record_is_gone_is_lost_and_nobody_else_is(at: Harness) -> None:
    await at.open("a", "b", "c")
    await at.open("d", batch_size=3)
    at.store.commit(Batch(deletes=["b"]))
    answers = await at.submit(["a", "b", "c"], x(3)).all()
    assert kinds(answers) == ["Answer", "SessionLost", "Answer"]
    await fails(at.state("b"), SessionLost, "session 'b' was paged out and is not in the store")
    assert await at.engine.close_session("b") is False


@pytest.mark.engine(resident_rows=1, max_session_idle_s=10)
async def test_closing_and_expiring_reach_sessions_that_are_away(at: Harness) -> None:
    await at.open("a", "b", "c")
    assert (await away(at)) == 2
    await at.engine.close_session("a")
    at.clock.advance(11)
    await at.internals.expire_idle()
    assert (await away(at)) == 0


@pytest.mark.engine(resident_rows=2)
async def test_a_fork_of_a_session_that_is_away_brings_it_back(at: Harness) -> None:
    await at.open_and_step("a", x(1, 3))
    before = (await at.state("a"))["sum"].tobytes()
    await at.open("b", "c")
    await at.engine.fork("a", new_session_id="d")
    for name in "ad":
        assert (await at.state(name))["sum"].tobytes() == before


async def test_rows_of_the_first_sessions_are_theirs_while_these_are_made() -> None:
    """Before any session is there, rows that were taken for some are nobody's by the table; they are not free."""
    store = RemoteStore(MemoryStore())
    async with running(store=store, resident_rows=1) as at:
        store.commits_held = True
        first = await start_task(at.open("a"))
        await store.until("commit")
        await fails(at.open("b"), Overloaded)
        store.release()
        await first
        assert await resident(at, "a") == "a"


async def crowded(at: Harness, *waiting: str) -> object:
    """Sessions `a` and `b` have both rows and are under way; the others are there and have none."""
    await at.open(*waiting, "a", "b")
    return await at.begin_pass(["a", "b"], x(2))


@pytest.mark.parametrize("threads", [False, True])
@pytest.mark.parametrize("steps", [None, 3])
async def test_a_frame_of_more_sessions_than_rows_is_done_in_portions(
    threads: bool, steps: int | None
) -> None:
    async with running(resident_rows=4, threads=threads) as at:
        ids = [f"s{i}" for i in range(30)]
        await at.engine.open_sessions("plain", session_ids=ids)
        value = x(30) if steps is None else x(30, steps)
        answers = await at.submit(ids, value, expected=[0] * 30, request_ids=list(range(1, 31))).all()
        for i, answer in enumerate(answers):
            assert isinstance(answer, Answer)
            alone = await at.step(f"s{i}", value[i : i + 1], expected=0, request_ids=i + 1)
            assert alone.replayed
            assert answer.outputs["y"].tobytes() == alone.outputs["y"].tobytes()
        again = await at.submit(ids, value, expected=[1] * 30).all()
        assert all(isinstance(answer, Answer) and answer.revision == 2 for answer in again)


@pytest.mark.engine(resident_rows=4)
async def test_a_reset_of_more_sessions_than_rows_goes_through_too(at: Harness) -> None:
    ids = [f"s{i}" for i in range(30)]
    await at.engine.open_sessions("plain", session_ids=ids)
    await at.submit(ids, x(30)).all()
    assert all(isinstance(answer, Answer) for answer in await at.submit(ids, reset=True).all())
    for session_id in ids:
        assert (await at.state(session_id))["sum"].tobytes() == initial(1).tobytes()


@pytest.mark.engine(resident_rows=4, threads=True)
async def test_a_session_of_many_rows_is_not_passed_by_those_that_come_after_it(at: Harness) -> None:
    small = [f"s{i}" for i in range(10)]
    await at.open(*small)
    await at.open("big", batch_size=4)
    at.clock.advance(1)
    await at.open("a", "b")
    busy = await at.begin_pass(["a", "b"], x(2))
    order: list[str] = []
    waiting = {"big": at.submit("big", x(4), sizes=[4])} | {name: at.submit(name, x(1)) for name in small}
    for name, answers in waiting.items():
        answers.on_end(functools.partial(order.append, name))
    at.hooks.open_gate()
    for answers in (busy, *waiting.values()):
        assert all(isinstance(answer, Answer) for answer in await answers.all())
    assert order[0] == "big"


@pytest.mark.engine(resident_rows=2, threads=True)
async def test_a_request_that_waits_for_rows_is_dropped_when_it_is_late_or_cancelled(
    at: Harness,
) -> None:
    busy = await crowded(at, "late", "left", "stays")
    late = at.submit("late", x(1), deadline=at.clock.monotonic() + 5)
    left, stays = at.submit("left", x(1)), at.submit("stays", x(1))
    at.clock.advance(6)
    at.cancel(left)
    at.hooks.open_gate()
    await busy.all()  # type: ignore[attr-defined]
    await fails(late.only(), DeadlineExceeded)
    await fails(left.only(), Unavailable, "cancelled")
    assert (await stays.only()).revision == 1
    assert [(await at.engine.session_info(name)).revision for name in ("late", "left")] == [0, 0]


@pytest.mark.engine(resident_rows=2, threads=True)
async def test_the_line_of_a_session_that_waits_for_rows_keeps_its_order(at: Harness) -> None:
    await crowded(at, "c")
    steps = [at.submit("c", x(1, seed=i), expected=i) for i in range(3)]
    single = at.single("c", x(1, seed=3), expected=3)
    closing = at.engine.close_session("c")
    at.hooks.open_gate()
    assert [(await step.only()).revision for step in steps] == [1, 2, 3]
    assert (await single.only()).revision == 4
    assert await closing is False
    await fails(at.step("c", x(1)), SessionNotFound)


@pytest.mark.engine(resident_rows=2, max_batch_rows=1, threads=True)
async def test_no_more_waits_for_rows_than_may_wait_at_all(at: Harness) -> None:
    names = [f"s{i}" for i in range(80)]
    await crowded(at, *names)
    waiting, refused = [], 0
    for name in names:
        try:
            waiting.append(at.submit(name, x(1)))
        except Overloaded as error:
            assert "rows waiting for model" in error.message  # noqa: PT017  most are not refused
            refused += 1
    assert refused == len(names) - len(waiting)
    assert 60 <= len(waiting) <= 64
    at.hooks.open_gate()
    for answers in waiting:
        assert (await answers.only()).revision == 1


@pytest.mark.engine(resident_rows=2, threads=True)
async def test_a_stopping_server_finishes_requests_that_wait_for_rows(at: Harness) -> None:
    await crowded(at, "c", "d")
    waiting = at.submit(["c", "d"], x(2))
    at.engine.stop_accepting()
    at.hooks.open_gate()
    await at.settled()
    assert waiting.ended


@pytest.mark.stores("memory")  # a commit on the store's thread would let others in before it has ended
@pytest.mark.engine(resident_rows=2)
async def test_an_admitted_request_that_did_not_fit_keeps_its_place(at: Harness) -> None:
    for name in ("first", "second", "third", "fourth", "a", "b"):
        at.clock.advance(1)
        await at.open(name)
    turns, table = at.internals.turns, at.internals.table
    claims = {name: table.find_all([name]) for name in ("a", "b", "first")}
    turns.claim(np.concatenate([claims["a"], claims["b"]]))
    order: list[str] = []
    first = CallbackAnswers(lambda _answer: turns.claim(claims["b"]))
    at.engine.submit(Change(["first"], first, reset=True))
    at.internals.drain_inboxes()
    holding = asyncio.create_task(turns.hold(int(claims["first"][0]), float("inf")))
    await asyncio.sleep(0)
    waiting = {name: at.submit(name, x(1)) for name in ("second", "third", "fourth")}
    for name, answers in waiting.items():
        answers.on_end(functools.partial(order.append, name))
    turns.release(np.concatenate([claims["a"], claims["b"]]))
    await holding
    for _ in range(10):
        await asyncio.sleep(0)
    assert not order, "all rows are in use again"
    turns.release(claims["b"])
    for answers in waiting.values():
        assert (await answers.only()).revision == 1
    assert order == ["second", "third", "fourth"]
    turns.release(claims["first"])


@pytest.mark.stores("memory", "async")
@pytest.mark.engine({"a": PLAIN, "b": PLAIN}, resident_rows=1)
async def test_another_model_may_begin_to_wait_while_one_is_let_in(at: Harness) -> None:
    for name in ("a2", "a1", "b2", "b1"):
        at.clock.advance(1)
        await at.open(name, model=name[0])
    turns, table = at.internals.turns, at.internals.table
    busy = {name: np.array([table.find(name)], np.intp) for name in ("a1", "b1")}
    for handles in busy.values():
        turns.claim(handles)
    submitted: asyncio.Future[Answers] = asyncio.get_running_loop().create_future()
    reset = CallbackAnswers(lambda _answer: submitted.set_result(at.submit("b2", x(1))))
    at.engine.submit(Change(["a2"], reset, reset=True))
    await asyncio.sleep(0)
    assert not submitted.done(), "it waits for the row"
    broken: list[object] = []
    asyncio.get_running_loop().set_exception_handler(lambda _loop, context: broken.append(context))
    turns.release(busy["a1"])
    step = await asyncio.wait_for(submitted, 100)
    for _ in range(10):
        await asyncio.sleep(0)
    assert not step.ended
    assert not broken
    turns.release(busy["b1"])
    assert (await step.only()).revision == 1


INT8 = dataclasses.replace(PLAIN, inputs=(TensorSpec("n", (), "int8", temporal=True),))
FLAG = dataclasses.replace(PLAIN, inputs=(TensorSpec("flag", (), "bool", temporal=True),))


def f32(*shape: int) -> np.ndarray:
    return np.zeros(shape, np.float32)


def rich(rows: int = 2, t: tuple[int, ...] = (), **other: Any) -> dict[str, Any]:
    given = {"x": f32(rows, *t, 2), "token": np.zeros((rows, *t), np.int32), "gain": f32(rows)}
    return {name: array for name, array in (given | other).items() if array is not None}


def test_one_time_step_may_leave_out_its_axis_and_the_reply_has_what_was_given() -> None:
    without = check_inputs(PLAIN, {"": f32(2, 2)}, 2)
    assert (without.steps, without.with_time, without.arrays[0].shape) == (1, False, (2, 2))
    single = check_inputs(PLAIN, {"x": f32(2, 1, 2)}, 2)
    assert (single.steps, single.with_time, single.arrays[0].shape) == (1, True, (2, 2))
    three = check_inputs(RICH, rich(t=(3,)), 2)
    assert (three.steps, three.with_time) == (3, True)
    assert [array.shape for array in three.arrays] == [(2, 3, 2), (2, 3), (2,)]


@pytest.mark.parametrize("dtype", ["float64", "float16", "int64", "uint8", "int32", ">f4"])
def test_numbers_are_cast_to_the_models_type(dtype: str) -> None:
    (array,) = check_inputs(PLAIN, {"x": np.array([[1, 2]], dtype)}, 1).arrays
    assert array.dtype == np.dtype("float32")
    assert array.tolist() == [[1, 2]]


def test_integers_are_cast_within_their_range() -> None:
    (array,) = check_inputs(INT8, {"": np.array([[-128, 127]], np.int64)}, 1).arrays
    assert (array.dtype.name, array.tolist()) == ("int8", [[-128, 127]])
    with pytest.raises(InvalidInput, match="within int8's range, -128 to 127; got 128"):
        check_inputs(INT8, {"": np.array([[0, 128]], np.int64)}, 1)


def test_only_a_bool_is_a_bool() -> None:
    assert check_inputs(FLAG, {"": np.array([True])}, 1).arrays[0].dtype == bool
    with pytest.raises(InvalidInput, match="input 'flag' must have a dtype that fits bool; got int64"):
        check_inputs(FLAG, {"": np.array([1])}, 1)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_a_number_that_is_not_finite_is_found_with_its_place(value: float) -> None:
    array = f32(4, 3, 2)
    array[2, 1, 0] = value
    checked = check_inputs(PLAIN, {"": array}, 4)
    finite = finite_rows(checked.arrays)
    assert finite is not None
    assert finite.tolist() == [True, True, False, True]
    with pytest.raises(InvalidInput) as error:
        require_finite("input", checked.arrays, ["x"])
    assert error.value.message == (
        f"input 'x' must hold finite numbers within float32's range; got {value} at index [2, 1, 0]"
    )


@pytest.mark.parametrize("shape", [(1, 2), (1, 1, 2), (1, 3, 2)])
def test_a_float64_that_float32_cannot_hold_is_named_as_it_came(shape: tuple[int, ...]) -> None:
    given = np.zeros(shape)
    given[..., 1] = -1e39
    for inputs in ({"": given}, {"x": given}):
        checked = check_inputs(PLAIN, inputs, 1)
        where = [0, 1] if shape[1] < 3 else [0, 0, 1]
        with pytest.raises(InvalidInput) as error:
            require_finite("input", checked.arrays, ["x"], inputs)
        assert error.value.message == f"input 'x' must fit float32; got -1e+39 at index {where}"


def test_finite_numbers_and_integers_pass() -> None:
    assert finite_rows(check_inputs(RICH, rich(), 2).arrays) is None
    require_finite("input", check_inputs(RICH, rich(), 2).arrays, ["x", "token", "gain"])


def test_a_state_comes_in_the_models_order_and_type() -> None:
    given = {"count": np.array([1, 2], np.int64), "sum": np.ones((2, 2))}
    total, count = check_state(RICH, given, 2)
    assert (total.dtype.name, count.dtype.name) == ("float32", "int32")
    assert count.tolist() == [1, 2]
    assert check_state(PLAIN, {"": f32(1, 2)}, 1)[0].shape == (1, 2)
