"""Two servers on one store: quotas hold over both, and an outage of the store changes nothing."""

from __future__ import annotations

import asyncio
import gc
from collections.abc import Awaitable, Callable
from typing import Any

import pytest

from stepwell_server.core.namespaces import SEPARATOR
from stepwell_server.core.quotas import Limits, QuotaTable
from stepwell_server.engine.api import SessionFilter
from stepwell_server.errors import (
    DeadlineExceeded,
    OutcomeUnknown,
    Overloaded,
    QuotaExceeded,
    ServerError,
    Unavailable,
)
from support.engine.fake_executor import WAIT_S
from support.engine.harness import Answer, Harness, fails, kinds, running, x
from support.engine.two_engines import Times, shared_by_two, two_in_time
from support.stores.durable import start_task
from support.stores.gates import Gated
from support.stores.kinds import SHARED

pytestmark = SHARED
ACME = f"acme{SEPARATOR}"
FIVE = QuotaTable(tenants={"acme": Limits(sessions=5, rows=12)})


async def make(at: Harness, count: int, rows: int = 1, name: str = ACME) -> list[str]:
    opened = await at.engine.open_sessions("plain", count=count, batch_size=rows, namespace=name)
    return list(opened.session_ids)


def known(at: Harness) -> tuple[int, int]:
    assert at.quotas is not None
    has = at.quotas.tenants()["acme"]
    return has.sessions, has.rows


@pytest.mark.engine(quotas=FIVE)
async def test_a_limit_counts_the_sessions_of_all_servers(
    first: Harness, second: Harness, times: Times
) -> None:
    names = await make(first, 3)
    times.advance(1.0)
    await fails(
        make(second, 3),
        QuotaExceeded,
        "sessions of tenant 'acme' must stay within 5; there are 3, and this call adds 3",
    )
    names += await make(second, 2)
    times.advance(1.0)
    for at in (first, second):
        await fails(make(at, 1), QuotaExceeded, "there are 5, and this call adds 1")
    await make(first, 8, name="other" + SEPARATOR)
    # those that one has closed may be made on the other, and at once where they were closed
    assert await first.engine.close_sessions(names[2:4]) == 2
    await make(first, 1)
    times.advance(1.0)
    await make(second, 1)
    assert known(second)[0] == 5
    await fails(make(first, 1), QuotaExceeded, "there are 5, and this call adds 1")


@pytest.mark.engine(quotas=FIVE)
async def test_rows_are_counted_by_the_store(first: Harness, second: Harness, times: Times) -> None:
    await make(first, 2, rows=5)
    times.advance(1.0)
    await fails(
        make(second, 2, rows=2),
        QuotaExceeded,
        "rows of tenant 'acme' must stay within 12; there are 10, and this call adds 4",
    )
    (name,) = await make(second, 1, rows=2)
    assert known(second) == (3, 12)
    await second.engine.close_session(name)
    assert known(second) == (2, 10)
    times.advance(1.0)
    await make(first, 1, rows=2)
    assert known(first) == (3, 12)


@pytest.mark.engine(quotas=FIVE, max_session_idle_s=100.0)
async def test_expired_sessions_no_longer_count_whichever_server_ends_them(
    first: Harness, second: Harness, times: Times
) -> None:
    await make(first, 5)
    times.advance(101.0)
    assert await second.internals.expire_idle() == 5
    await make(first, 5)


async def test_sessions_from_before_the_start_count_without_a_search_of_the_store() -> None:
    async with shared_by_two() as (store, other):
        async with running(store=store) as at:
            await make(at, 4)
        async with running(store=other, clock=at.clock, quotas=FIVE) as later:
            await fails(make(later, 2), QuotaExceeded, "there are 4, and this call adds 2")


@pytest.mark.engine(quotas=FIVE)
async def test_the_store_is_asked_once_a_second_and_for_tenants_with_limits(
    first: Harness, times: Times
) -> None:
    before = len(first.store.asked("count"))
    for _ in range(3):
        await asyncio.gather(
            *[make(first, 1, name=ACME) for _ in range(1)], make(first, 5, name="b" + SEPARATOR)
        )
    assert len(first.store.asked("count")) - before <= 2
    times.advance(1.0)
    await asyncio.gather(*[make(first, 1) for _ in range(2)])
    assert len(first.store.asked("count")) - before <= 4


@pytest.mark.engine(quotas=FIVE)
async def test_nobody_gets_more_while_the_store_cannot_be_asked(first: Harness, times: Times) -> None:
    times.advance(2.0)
    first.store.read_error = Unavailable("away")
    await fails(make(first, 1), Unavailable, "away")
    first.store.read_error = None
    first.store.reads_held = True
    opening = [await start_task(make(first, 1)) for _ in range(3)]
    first.store.release()
    await asyncio.gather(*opening)
    assert known(first)[0] == 3


@pytest.mark.engine(quotas=FIVE)
async def test_what_is_being_made_counts_whatever_the_store_says_meanwhile(
    first: Harness, times: Times
) -> None:
    """It may say what it had before, as the sessions are on their way to it."""
    await make(first, 3)
    first.store.commits_held = True
    making = await start_task(make(first, 2))
    await first.store.until("commit", 2)
    times.advance(1.0)
    await fails(asyncio.wait_for(make(first, 1), WAIT_S), QuotaExceeded, "there are 5, and this call adds 1")
    first.store.release()
    await making
    times.advance(1.0)
    await fails(make(first, 1), QuotaExceeded, "there are 5, and this call adds 1")


@pytest.mark.engine(quotas=FIVE)
async def test_a_session_that_ends_during_a_query_of_the_store_makes_room_once(
    first: Harness, times: Times
) -> None:
    names = await make(first, 5)
    first.store.answers_held = True
    closing = await start_task(first.engine.close_sessions(names[:2]))
    await first.store.until("answer", 1)
    times.advance(1.0)
    first.store.answers_held = False
    await make(first, 1)  # the store says that there are three
    first.store.release()
    assert await closing == 2
    await make(first, 1)
    await fails(make(first, 1), QuotaExceeded, "there are 5, and this call adds 1")


@pytest.mark.engine(quotas=FIVE)
async def test_sessions_that_were_not_made_do_not_count(first: Harness) -> None:
    first.store.commit_error = Unavailable("away")
    await fails(make(first, 4), Unavailable, "away")
    first.store.commit_error = None
    await make(first, 5)


@pytest.mark.engine(quotas=FIVE)
async def test_a_session_that_may_be_in_the_store_counts_until_it_is_asked_again(
    first: Harness, second: Harness
) -> None:
    await make(first, 4)
    first.store.commits_held = True
    unknown = await start_task(first.open(ACME + "unknown"))
    await first.store.until("commit", 2)
    first.store.reads_held = True
    reads = len(first.store.asked("read"))
    # this one asks for no counts, as they are fresh; it waits for what the store has of its id
    late = await start_task(first.open(ACME + "late"))
    await first.store.until("read", reads + 1)
    first.store.unknown[ACME + "unknown"] = True
    first.store.release_once("commit")
    await fails(unknown, OutcomeUnknown)
    first.store.release()
    await fails(late, QuotaExceeded, "there are 5, and this call adds 1")
    # the next one asks at once, and the session is counted once
    await second.engine.close_session(ACME + "unknown")
    await first.open(ACME + "late")
    assert known(first) == (5, 5)


async def test_a_call_cancelled_during_a_query_of_the_store_leaves_no_error() -> None:
    left: list[dict[str, Any]] = []
    asyncio.get_running_loop().set_exception_handler(lambda _, context: left.append(context))
    async with two_in_time(quotas=FIVE) as (first, _, times):
        times.advance(2.0)
        first.store.reads_held = True
        making = await start_task(make(first, 1))
        await first.store.until("count", 2)
        making.cancel()
        first.store.read_error = Unavailable("away")
        first.store.release()
        for _ in range(20):
            await asyncio.sleep(0)
        first.store.read_error = None
    del making
    gc.collect()
    assert left == []


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
@pytest.mark.engine(max_session_idle_s=IDLE_S)
async def test_a_call_waits_for_a_slow_store_and_harms_nobody_when_it_is_given_up(
    call: str, first: Harness, second: Harness
) -> None:
    store = await prepared(first, second)
    store.reads_held = store.commits_held = True
    given_up = await start_task(CALLS[call](second))
    waits = await start_task(CALLS[call](second))
    for _ in range(30):
        await asyncio.sleep(0)
    assert not waits.done()
    given_up.cancel()
    store.release()
    await asyncio.gather(given_up, waits, return_exceptions=True)
    await second.settled()
    await asyncio.wait_for(second.engine.predict("plain", {"": x(1)}), WAIT_S)
    assert (await second.step("moves", x(1))).revision == 3


async def test_few_calls_wait_for_a_store_that_does_not_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("stepwell_server.engine.sessions.lookup.MAX_WAITING", 5)
    async with two_in_time() as (first, second, _):
        store = await prepared(first, second)
        store.reads_held = True
        waiting = [await start_task(second.state("away")) for _ in range(5)]
        for _ in range(3):
            refused = await fails(
                second.state("here"), Overloaded, "calls that wait for the store must stay within 5; 5 wait"
            )
            assert refused.retry_after_s > 0
        store.release()
        await asyncio.wait_for(asyncio.gather(*waiting), WAIT_S)
        assert (await second.state("here"))["sum"].shape


async def test_few_changes_wait_for_a_store_that_does_not_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("stepwell_server.engine.submission.MAX_LOADING_ROWS", 4)
    async with two_in_time() as (first, second, _):
        names = [f"s{number}" for number in range(8)]
        await first.open(*names)
        second.store.reads_held = True
        waiting = [second.submit(name, x(1)) for name in names[:4]]
        with pytest.raises(Overloaded, match="rows waiting for their sessions to be loaded"):
            second.submit(names[4], x(1))
        second.store.release()
        assert [(await answers.only()).revision for answers in waiting] == [1] * 4
        assert (await second.step(names[4], x(1))).revision == 1


async def test_a_request_past_its_deadline_when_the_store_answers_is_not_applied(
    first: Harness, second: Harness, times: Times
) -> None:
    store = await prepared(first, second)
    store.reads_held = True
    deadline = times.second.monotonic() + 5.0
    late = second.submit("away", x(1), deadline=deadline)
    in_time = second.submit("moves", x(1))
    await store.until("read")
    times.advance(6.0)
    store.release()
    await fails(late.only(), DeadlineExceeded)
    assert (await in_time.only()).revision == 3
    assert (await second.step("away", x(1))).revision == 2


@pytest.mark.engine(max_session_idle_s=IDLE_S)
async def test_steps_continue_after_a_long_outage_of_the_store(
    first: Harness, second: Harness, times: Times
) -> None:
    await second.open(*NAMES)
    revision = 0
    for _ in range(3):
        second.store.commit_error = second.store.read_error = ERRORS["away"]
        for _ in range(20):
            answers = await second.submit(NAMES, x(5), expected=[revision] * 5).all()
            assert all(isinstance(each, Unavailable) for each in answers)
            times.advance(1.0)
        second.store.commit_error = second.store.read_error = None
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
    store.release()
    assert kinds(await lost.all()) == ["Unavailable"]
    store.reads_held = True
    second = at.submit("a", x(1))
    await store.until("read")
    at.hooks.open_gate()
    await other.require_all_applied()
    store.release()
    assert [(await answers.only()).revision for answers in (first, second)] == [1, 2]
