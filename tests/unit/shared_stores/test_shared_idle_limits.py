"""Two servers on one store: a session with a limit of its own ends by the store's clock, and only if nobody uses it."""

from __future__ import annotations

import asyncio
import math

import pytest

from stepwell_server.core.namespaces import SEPARATOR
from stepwell_server.errors import SessionExpired
from stepwell_server.store.base import End
from support.durable import begun
from support.engine import Harness, x
from support.fake_executor import WAIT_S
from support.gates import Gated
from support.kinds import SHARED
from support.replicas import sweeping, tombstone, two_in_time

pytestmark = SHARED


async def turns(count: int = 20) -> None:
    for _ in range(count):
        await asyncio.sleep(0)


async def opened(at: Harness, max_idle_ms: int | None = 60_000, name: str = "") -> str:
    made = await at.engine.open_session("plain", session_id=name, max_idle_ms=max_idle_ms)
    return made.session.session_id


async def ended(*servers: Harness) -> int:
    """How many sessions ended by what the timers of servers do."""
    return sum([await at.inside.expire_idle() for at in servers])


async def test_sessions_of_several_limits_end_whoever_opened_them() -> None:
    async with two_in_time(unnamed_session_idle_s=90.0) as (first, second, times):
        gone = [
            await opened(first),
            *(await second.engine.open_sessions("plain", count=3, max_idle_ms=59_500)).session_ids,
        ]
        stays = [await opened(first, None), await opened(second, 30_000_000), await opened(second, 0)]
        await first.open("named")
        times.advance(59.0)
        assert await ended(first, second) == 0
        times.advance(2.0)
        assert await ended(first, second) == 4, "in one look"
        for at in (first, second):
            with pytest.raises(SessionExpired, match="idle for longer than its limit"):
                await at.state(gone[0])
        assert {info.session_id for info in (await second.engine.list_sessions())[0]} == {*stays, "named"}
        assert [(await second.engine.session_info(name)).max_idle_s for name in (*stays, "named")] == [
            90.0, 30_000.0, math.inf, math.inf,
        ]  # fmt: skip
        assert (await tombstone(first, gone[-1])).end is End.EXPIRED
        times.advance(30.0)
        assert await ended(first, second) == 1


@pytest.mark.parametrize("use", ["step", "read", "resume"])
async def test_a_session_that_another_server_uses_stays(use: str) -> None:
    async with two_in_time() as (first, second, times):
        name = await opened(first)
        await opened(first)  # nobody uses this one
        for turn in range(4):
            times.advance(40.0)
            if use == "step":
                await second.step(name, x(1))
            elif use == "read":
                await second.state(name)
            else:
                await second.engine.open_session("plain", session_id=name)
            await turns()
            assert await ended(first, second) == int(turn == 1)
        times.advance(61.0)
        assert await ended(first) == 1


@pytest.mark.parametrize("pause_s", [4.0, 6.0, 9000.0])
async def test_a_server_that_was_held_up_ends_nothing_by_what_it_knew(pause_s: float) -> None:
    async with two_in_time() as (first, second, times):
        await opened(first)
        used = await opened(second)
        times.advance(61.0)
        store: Gated = first.store
        sweep = await sweeping(store, first.inside.expire_idle())
        times.advance(pause_s)
        # the second server takes the session for one that is used: its clock says so as well
        second.inside.table.used[second.inside.handle(used)] = times.second.monotonic()
        assert (await second.step(used, x(1))).revision == 1
        store.let_go()
        assert await asyncio.wait_for(sweep, WAIT_S) == int(pause_s < 5.0)
        assert await ended(first) == int(pause_s > 5.0), "it is judged again"
        assert (await first.step(used, x(1))).revision == 2


@pytest.mark.parametrize("who", ["opened", "has seen it", "has not"])
async def test_whoever_names_it_finds_it_expired_before_the_look(who: str) -> None:
    async with two_in_time() as (first, second, times):
        name = await opened(first, 5000)
        if who == "has seen it":
            await second.state(name)
        times.advance(5.5)
        at = first if who == "opened" else second
        answers = await at.submit(name, x(1)).all()
        assert type(answers[0]) is SessionExpired
        assert (await tombstone(first, name)).end is End.EXPIRED
        assert (await first.engine.list_sessions())[0] == []


async def test_a_session_of_the_table_that_ended_by_its_limit_is_not_listed_or_exported() -> None:
    async with two_in_time() as (first, second, times):
        name = await opened(first, 5000, "a")
        await second.state(name)
        times.advance(5.5)
        assert (await second.engine.list_sessions())[0] == []
        (found,) = await second.engine.export_sessions([name], deadline=math.inf)
        assert type(found) is SessionExpired


async def test_what_has_something_under_way_for_longer_than_its_limit_counts_as_used() -> None:
    async with two_in_time(threads=True) as (first, second, times):
        name = await opened(first, 10_000)
        await second.state(name)
        answers = await second.begin_pass(name, x(1), sizes=[1])
        for _ in range(4):
            times.advance(4.0)
            second.inside.uses.look()
            await turns()
            assert await ended(first) == 0
        second.hooks.open_gate()
        assert (await answers.only()).revision == 1


async def test_the_store_hears_of_use_at_most_every_tenth_of_the_limit() -> None:
    async with two_in_time() as (first, _, times):
        name = await opened(first, 60_000)
        store: Gated = first.store
        for _ in range(60):
            times.advance(1.0)
            await first.state(name)
            await turns()
        assert 9 <= len(store.asked("touch")) <= 10


async def test_time_in_which_nobody_could_use_it_ends_no_session() -> None:
    async with two_in_time() as (first, second, times):
        name = await opened(first)
        first.store.service.is_constant = False
        assert await ended(first, second) == 0
        times.advance(5000.0)  # the store is away, or no server runs
        for _ in range(5):
            assert await ended(first, second) == 0
            times.advance(14.0)
        assert await ended(first, second) == 1
        with pytest.raises(SessionExpired):
            await first.state(name)


async def test_a_tenants_sessions_end_as_others_do() -> None:
    async with two_in_time() as (first, second, times):
        names = (
            await first.engine.open_sessions(
                "plain", count=2, max_idle_ms=60_000, namespace=f"acme{SEPARATOR}"
            )
        ).session_ids
        times.advance(61.0)
        assert await ended(second) == 2
        assert (await tombstone(first, names[0])).session_id.startswith("acme")
        assert await first.store.count_of(f"acme{SEPARATOR}") == 0


@pytest.mark.parametrize("by", ["step", "read", "describe"])
async def test_a_session_that_begins_anew_elsewhere_has_the_limit_of_its_new_opening(by: str) -> None:
    async with two_in_time() as (first, second, times):
        await opened(first, 100_000, "a")
        await first.state("a")
        await second.engine.close_session("a")
        await opened(second, 600_000, "a")
        if by == "step":
            await first.step("a", x(1))
        elif by == "read":
            await first.state("a")
        else:
            await first.engine.session_info("a")
        await first.step("a", x(1))
        assert [(await at.engine.session_info("a")).max_idle_s for at in (second, first)] == [600.0, 600.0]
        times.advance(300.0)
        assert await ended(first, second) == 0
        times.advance(301.0)
        assert await ended(first, second) == 1


async def test_a_session_that_is_over_and_is_asked_for_by_many_ends_once() -> None:
    async with two_in_time() as (first, second, times):
        name = await opened(first)
        await second.state(name)
        times.advance(61.0)
        asked = [await begun(at.state(name)) for at in (first, second, first, second)]
        found = await asyncio.gather(*asked, return_exceptions=True)
        assert [type(each) for each in found] == [SessionExpired] * 4
