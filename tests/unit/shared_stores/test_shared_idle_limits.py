"""Two servers on one store: a session with a limit of its own ends by the store's clock, and only if nobody uses it."""

from __future__ import annotations

import math

import pytest

from stepwell_server.core.namespaces import SEPARATOR
from stepwell_server.errors import SessionExpired
from stepwell_server.store.base import End
from support.engine.harness import Harness, fails, x
from support.engine.two_engines import ended, tombstone, two_in_time
from support.stores.kinds import SHARED

pytestmark = SHARED


async def opened(at: Harness, max_idle_ms: int | None = 60_000, name: str = "") -> str:
    made = await at.engine.open_session("plain", session_id=name, max_idle_ms=max_idle_ms)
    return made.session.session_id


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
            await fails(at.state(gone[0]), SessionExpired, "idle for longer than its limit")
        assert {info.session_id for info in (await second.engine.list_sessions())[0]} == {*stays, "named"}
        assert [(await second.engine.session_info(name)).max_idle_s for name in (*stays, "named")] == [
            90.0, 30_000.0, math.inf, math.inf,
        ]  # fmt: skip
        assert (await tombstone(first, gone[-1])).end is End.EXPIRED
        times.advance(30.0)
        assert await ended(first, second) == 1


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
