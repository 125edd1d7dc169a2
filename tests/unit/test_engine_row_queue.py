"""More sessions at the same moment than rows: the changes take turns, and none is refused."""

from __future__ import annotations

import asyncio
import functools

import numpy as np
import pytest

from stepwell_server.engine.change import Change
from stepwell_server.errors import DeadlineExceeded, Overloaded, SessionNotFound, Unavailable
from support.checks.model_of_sessions import initial
from support.engine.fake_executor import PLAIN
from support.engine.harness import Answer, Answers, CallbackAnswers, Harness, fails, running, x


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
async def test_what_waits_for_rows_is_dropped_when_its_time_is_over_or_its_caller_has_left(
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
async def test_a_server_that_stops_finishes_what_waits_for_rows(at: Harness) -> None:
    await crowded(at, "c", "d")
    waiting = at.submit(["c", "d"], x(2))
    at.engine.stop_accepting()
    at.hooks.open_gate()
    await at.settled()
    assert waiting.ended


@pytest.mark.stores("memory")  # a commit on the store's thread would let others in before it has ended
@pytest.mark.engine(resident_rows=2)
async def test_who_was_let_in_and_did_not_fit_keeps_its_place(at: Harness) -> None:
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
