"""Two servers on one store: sessions and rows of a tenant are limited over both."""

from __future__ import annotations

import asyncio
import gc
from typing import Any

from stepwell_server.core.namespaces import SEPARATOR
from stepwell_server.core.quotas import Limits, QuotaTable
from stepwell_server.errors import OutcomeUnknown, QuotaExceeded, Unavailable
from support.engine.fake_executor import WAIT_S
from support.engine.harness import Harness, fails, running
from support.engine.two_engines import shared_by_two, two_in_time
from support.stores.durable import begun
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


async def test_a_limit_holds_for_what_all_servers_have_made() -> None:
    async with two_in_time(quotas=FIVE) as (first, second, times):
        names = await make(first, 3)
        times.advance(1.0)
        await fails(
            make(second, 3), QuotaExceeded, "sessions of tenant 'acme' must stay within 5; there are 3, and 3"
        )
        names += await make(second, 2)
        times.advance(1.0)
        for at in (first, second):
            await fails(make(at, 1), QuotaExceeded, "there are 5, and 1 came")
        await make(first, 8, name="other" + SEPARATOR)
        # those that one has closed may be made on the other, and at once where they were closed
        assert await first.engine.close_sessions(names[2:4]) == 2
        await make(first, 1)
        times.advance(1.0)
        await make(second, 1)
        assert known(second)[0] == 5
        await fails(make(first, 1), QuotaExceeded, "there are 5, and 1 came")


async def test_rows_are_counted_by_the_store() -> None:
    async with two_in_time(quotas=FIVE) as (first, second, times):
        await make(first, 2, rows=5)
        times.advance(1.0)
        await fails(
            make(second, 2, rows=2),
            QuotaExceeded,
            "rows of tenant 'acme' must stay within 12; there are 10, and 4 came",
        )
        (name,) = await make(second, 1, rows=2)
        assert known(second) == (3, 12)
        await second.engine.close_session(name)
        assert known(second) == (2, 10)
        times.advance(1.0)
        await make(first, 1, rows=2)
        assert known(first) == (3, 12)


async def test_sessions_that_expire_are_given_back_whoever_ends_them() -> None:
    async with two_in_time(quotas=FIVE, max_session_idle_s=100.0) as (first, second, times):
        await make(first, 5)
        times.advance(101.0)
        assert await second.internals.expire_idle() == 5
        await make(first, 5)


async def test_what_was_made_before_the_start_counts_and_nothing_is_looked_through() -> None:
    async with shared_by_two() as (store, other):
        async with running(store=store) as at:
            await make(at, 4)
        async with running(store=other, clock=at.clock, quotas=FIVE) as later:
            await fails(make(later, 2), QuotaExceeded, "there are 4, and 2 came")


async def test_the_store_is_asked_once_a_second_and_for_tenants_with_limits() -> None:
    async with two_in_time(quotas=FIVE) as (first, _, times):
        store: Gated = first.store
        before = len(store.asked("count"))
        for _ in range(3):
            await asyncio.gather(
                *[make(first, 1, name=ACME) for _ in range(1)], make(first, 5, name="b" + SEPARATOR)
            )
        assert len(store.asked("count")) - before <= 2
        times.advance(1.0)
        await asyncio.gather(*[make(first, 1) for _ in range(2)])
        assert len(store.asked("count")) - before <= 4


async def test_nobody_gets_more_while_the_store_cannot_be_asked() -> None:
    async with two_in_time(quotas=FIVE) as (first, _, times):
        times.advance(2.0)
        store: Gated = first.store
        store.read_error = Unavailable("away")
        await fails(make(first, 1), Unavailable, "away")
        store.read_error = None
        store.reads_held = True
        opening = [await begun(make(first, 1)) for _ in range(3)]
        store.let_go()
        await asyncio.gather(*opening)
        assert known(first)[0] == 3


async def test_what_is_being_made_counts_whatever_the_store_says_meanwhile() -> None:
    """It may say what it had before, as the sessions are on their way to it."""
    async with two_in_time(quotas=FIVE) as (first, _, times):
        store: Gated = first.store
        await make(first, 3)
        store.commits_held = True
        making = await begun(make(first, 2))
        await store.until("commit", 2)
        times.advance(1.0)
        await fails(asyncio.wait_for(make(first, 1), WAIT_S), QuotaExceeded, "there are 5, and 1 came")
        store.let_go()
        await making
        times.advance(1.0)
        await fails(make(first, 1), QuotaExceeded, "there are 5, and 1 came")


async def test_what_ends_while_the_store_is_asked_makes_room_once() -> None:
    async with two_in_time(quotas=FIVE) as (first, _, times):
        store: Gated = first.store
        names = await make(first, 5)
        store.answers_held = True
        closing = await begun(first.engine.close_sessions(names[:2]))
        await store.until("answer", 1)
        times.advance(1.0)
        store.answers_held = False
        await make(first, 1)  # the store says that there are three
        store.let_go()
        assert await closing == 2
        await make(first, 1)
        await fails(make(first, 1), QuotaExceeded, "there are 5, and 1 came")


async def test_sessions_that_were_not_made_do_not_count() -> None:
    async with two_in_time(quotas=FIVE) as (first, _, _):
        store: Gated = first.store
        store.commit_error = Unavailable("away")
        await fails(make(first, 4), Unavailable, "away")
        store.commit_error = None
        await make(first, 5)


async def test_a_session_that_may_be_in_the_store_counts_until_it_is_asked_again() -> None:
    async with two_in_time(quotas=FIVE) as (first, second, _):
        store: Gated = first.store
        await make(first, 4)
        store.commits_held = True
        unknown = await begun(first.open(ACME + "unknown"))
        await store.until("commit", 2)
        store.reads_held = True
        reads = len(store.asked("read"))
        # this one asks for no counts, as they are fresh; it waits for what the store has of its id
        late = await begun(first.open(ACME + "late"))
        await store.until("read", reads + 1)
        store.unknown[ACME + "unknown"] = True
        store.let_go_once("commit")
        await fails(unknown, OutcomeUnknown)
        store.let_go()
        await fails(late, QuotaExceeded, "there are 5, and 1 came")
        # the next one asks at once, and the session is counted once
        await second.engine.close_session(ACME + "unknown")
        await first.open(ACME + "late")
        assert known(first) == (5, 5)


async def test_who_gives_up_while_the_store_is_asked_leaves_no_error_behind() -> None:
    left: list[dict[str, Any]] = []
    asyncio.get_running_loop().set_exception_handler(lambda _, context: left.append(context))
    async with two_in_time(quotas=FIVE) as (first, _, times):
        times.advance(2.0)
        store: Gated = first.store
        store.reads_held = True
        making = await begun(make(first, 1))
        await store.until("count", 2)
        making.cancel()
        store.read_error = Unavailable("away")
        store.let_go()
        for _ in range(20):
            await asyncio.sleep(0)
        store.read_error = None
    del making
    gc.collect()
    assert left == []
