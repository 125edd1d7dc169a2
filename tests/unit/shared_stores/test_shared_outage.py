"""A shared store that is slow, gone or full: every call says so and changes nothing, and all goes on when it is back."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any

import pytest

from stepwell_server.core.quotas import Limits, QuotaTable
from stepwell_server.engine.api import SessionFilter
from stepwell_server.errors import DeadlineExceeded, Overloaded, ServerError, Unavailable
from support.engine.fake_executor import WAIT_S
from support.engine.harness import Answer, Harness, fails, kinds, x
from support.engine.two_engines import two_in_time
from support.stores.durable import begun
from support.stores.gates import Gated
from support.stores.kinds import SHARED

pytestmark = SHARED
IDLE_S = 1000.0
FOREVER = float("inf")
NAMES = ["here", "away", "ends", "leaves", "moves"]


async def step(at: Harness, name: str) -> Any:
    return await at.step(name, x(1))


async def reset(at: Harness) -> Any:
    return await at.submit("here", reset=True).only()


async def read_many(at: Harness) -> Any:
    found = await at.engine.get_states(["here", "away"])
    for _, error in found.errors:
        raise error
    return found


async def close_matching(at: Harness) -> Any:
    return await at.engine.close_matching(SessionFilter(prefix="leaves"), limit=10)


async def export(at: Harness) -> Any:
    (found,) = await at.engine.export_sessions(["moves"], deadline=FOREVER)
    if isinstance(found, ServerError):
        raise found
    return found


#: Those that ask the store whatever the server knows.
CALLS: dict[str, Callable[[Harness], Awaitable[Any]]] = {
    "step": lambda at: step(at, "here"),
    "step of a session that is paged out": lambda at: step(at, "away"),
    "reset": reset,
    "open": lambda at: at.engine.open_session("plain"),
    "open one with an id": lambda at: at.engine.open_session("plain", session_id="new"),
    "resume": lambda at: at.engine.open_session("plain", session_id="away"),
    "open many": lambda at: at.engine.open_sessions("plain", count=3),
    "fork": lambda at: at.engine.fork("here"),
    "fork many": lambda at: at.engine.fork_sessions(["here", "away"]),
    "read": lambda at: at.engine.get_state("away"),
    "read many": read_many,
    "describe": lambda at: at.engine.session_info("away"),
    "list": lambda at: at.engine.list_sessions(),
    "list by idleness": lambda at: at.engine.list_sessions(idle_longer_s=0.0),
    "close": lambda at: at.engine.close_session("ends"),
    "close many": lambda at: at.engine.close_sessions(["leaves", "here"]),
    "close by a filter": close_matching,
    "export": export,
    "end what is idle": lambda at: at.internals.expire_idle(),
}
ERRORS = {
    "away": Unavailable("the store is away"),
    "full": Overloaded("the store has no memory", retry_after_s=1.5),
}


async def prepared(first: Harness, second: Harness) -> Gated:
    """Sessions that the second server knows, two of them paged out."""
    await second.open(*NAMES)
    await second.submit(NAMES, x(len(NAMES))).all()
    second.internals.page_out("away", "moves")
    await first.step("moves", x(1))
    store: Gated = second.store
    return store


@pytest.mark.parametrize("why", ERRORS)
@pytest.mark.parametrize("call", CALLS)
async def test_a_call_says_that_the_store_is_not_there_and_works_when_it_is_back(call: str, why: str) -> None:
    limits = QuotaTable(default=Limits(sessions=1000))
    async with two_in_time(max_session_idle_s=IDLE_S, quotas=limits) as (first, second, times):
        store = await prepared(first, second)
        before = await store.ids()
        times.advance(1.5)
        store.read_error = store.commit_error = store.told_error = ERRORS[why]
        if call != "describe":  # nothing is under way, so that what the server knows is an answer
            refused = await fails(asyncio.wait_for(CALLS[call](second), WAIT_S), type(ERRORS[why]))
            assert getattr(refused, "retry_after_s", None) == (1.5 if why == "full" else None)
        await second.settled()
        second.check_books()
        assert await store.ids() == before
        store.read_error = store.commit_error = store.told_error = None
        await asyncio.wait_for(CALLS[call](second), WAIT_S)


@pytest.mark.parametrize("call", CALLS)
async def test_a_call_waits_for_a_slow_store_and_harms_nobody_when_it_is_given_up(call: str) -> None:
    async with two_in_time(max_session_idle_s=IDLE_S) as (first, second, _):
        store = await prepared(first, second)
        store.reads_held = store.commits_held = True
        given_up = await begun(CALLS[call](second))
        waits = await begun(CALLS[call](second))
        for _ in range(30):
            await asyncio.sleep(0)
        assert not waits.done()
        given_up.cancel()
        store.let_go()
        await asyncio.gather(given_up, waits, return_exceptions=True)
        await second.settled()
        await asyncio.wait_for(second.engine.predict("plain", {"": x(1)}), WAIT_S)
        assert (await second.step("moves", x(1))).revision == 3


async def test_few_calls_wait_for_a_store_that_does_not_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("stepwell_server.engine.sessions.lookup.MAX_WAITING", 5)
    async with two_in_time() as (first, second, _):
        store = await prepared(first, second)
        store.reads_held = True
        waiting = [await begun(second.state("away")) for _ in range(5)]
        for _ in range(3):
            refused = await fails(
                second.state("here"), Overloaded, "calls that wait for the store must stay within 5; 5 wait"
            )
            assert refused.retry_after_s > 0
        store.let_go()
        await asyncio.wait_for(asyncio.gather(*waiting), WAIT_S)
        assert (await second.state("here"))["sum"].shape


async def test_few_changes_wait_for_a_store_that_does_not_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("stepwell_server.engine.submission.MAX_LOADING_ROWS", 4)
    async with two_in_time() as (first, second, _):
        names = [f"s{number}" for number in range(8)]
        await first.open(*names)
        store: Gated = second.store
        store.reads_held = True
        waiting = [second.submit(name, x(1)) for name in names[:4]]
        with pytest.raises(Overloaded, match="rows waiting for their sessions to be loaded"):
            second.submit(names[4], x(1))
        store.let_go()
        assert [(await answers.only()).revision for answers in waiting] == [1] * 4
        assert (await second.step(names[4], x(1))).revision == 1


async def test_what_is_late_when_the_store_answers_is_not_applied() -> None:
    async with two_in_time() as (first, second, times):
        store = await prepared(first, second)
        store.reads_held = True
        deadline = times.second.monotonic() + 5.0
        late = second.submit("away", x(1), deadline=deadline)
        in_time = second.submit("moves", x(1))
        await store.until("read")
        times.advance(6.0)
        store.let_go()
        await fails(late.only(), DeadlineExceeded)
        assert (await in_time.only()).revision == 3
        assert (await second.step("away", x(1))).revision == 2


async def test_steps_go_on_after_a_store_that_was_away_for_long() -> None:
    async with two_in_time(max_session_idle_s=IDLE_S) as (first, second, times):
        await second.open(*NAMES)
        store: Gated = second.store
        revision = 0
        for _ in range(3):
            store.commit_error = store.read_error = ERRORS["away"]
            for _ in range(20):
                answers = await second.submit(NAMES, x(5), expected=[revision] * 5).all()
                assert all(isinstance(each, Unavailable) for each in answers)
                times.advance(1.0)
            store.commit_error = store.read_error = None
            answers = await second.submit(NAMES, x(5), expected=[revision] * 5).all()
            revision += 1
            assert [each.revision for each in answers if isinstance(each, Answer)] == [revision] * 5
        found = await first.submit(NAMES, x(5), expected=[revision] * 5).all()
        assert [each.revision for each in found if isinstance(each, Answer)] == [revision + 1] * 5


@pytest.mark.engine(threads=True)
async def test_steps_keep_their_order_when_their_session_leaves_the_table_between_them(at: Harness) -> None:
    await at.open("a", "other")
    store: Gated = at.store
    store.fail(Unavailable("away"))
    store.stall()
    lost = at.submit("a", x(1))
    await store.stalled()
    other = await at.begin_pass("other", x(1))
    first = at.submit("a", x(1))  # waits in the inbox until the pass has ended
    store.go_on()
    assert kinds(await lost.all()) == ["Unavailable"]
    store.reads_held = True
    second = at.submit("a", x(1))
    await store.until("read")
    at.hooks.open_gate()
    await other.require_all_applied()
    store.let_go()
    assert [(await answers.only()).revision for answers in (first, second)] == [1, 2]
