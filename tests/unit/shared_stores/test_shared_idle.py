"""Two servers on one store: a session expires when nobody used it for its limit on any of them, by the store's clock."""

from __future__ import annotations

import asyncio
import math
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from typing import Any

import pytest

from stepwell_server.core.namespaces import SEPARATOR
from stepwell_server.errors import ServerError, SessionExpired, Unavailable
from stepwell_server.store.base import End
from support.engine.fake_executor import WAIT_S
from support.engine.harness import Harness, fails, kinds, x
from support.engine.two_engines import Times, ended, ended_later, sweeping, tombstone, two_in_time
from support.stores.durable import start_task
from support.stores.kinds import SHARED

pytestmark = SHARED
IDLE_S = 100.0


async def turns(count: int = 20) -> None:
    for _ in range(count):
        await asyncio.sleep(0)


Limited = Callable[..., AbstractAsyncContextManager[tuple[Harness, Harness, Times]]]


@pytest.fixture(params=[False, True], ids=["of all sessions", "its own"])
def limited(request: pytest.FixtureRequest) -> Limited:
    """Two servers, and sessions that both know, at revision 1: each may be idle for `IDLE_S`."""

    @asynccontextmanager
    async def run(*names: str, **options: Any) -> AsyncIterator[tuple[Harness, Harness, Times]]:
        is_own = request.param
        own_ms = round(1000 * IDLE_S) if is_own else None
        async with two_in_time(max_session_idle_s=0 if is_own else IDLE_S, **options) as (
            first,
            second,
            times,
        ):
            for name in names:
                await first.engine.open_session("plain", session_id=name, max_idle_ms=own_ms)
            if names:
                await first.submit(list(names), x(len(names))).all()
            for name in names:
                await second.state(name)
            yield first, second, times

    return run


async def read(at: Harness) -> Any:
    return await at.engine.get_state("a")


async def read_many(at: Harness) -> Any:
    return await at.engine.get_states(["a"], with_state=False)


async def resume(at: Harness) -> Any:
    return await at.engine.open_session("plain", session_id="a")


async def fork(at: Harness) -> Any:
    return await at.engine.fork("a")


async def step(at: Harness) -> Any:
    return await at.step("a", x(1))


USES = [read, read_many, resume, fork, step]


async def test_an_unused_session_ends_once_by_the_clock_of_the_store(limited: Limited) -> None:
    async with limited("a", "b") as (first, second, times):
        times.advance(99.0)
        await second.step("b", x(1))
        assert await ended(first, second) == 0
        assert await ended_later(times, 2.0, first, second) == 1
        for at in (first, second):
            await fails(at.state("a"), SessionExpired, "idle for longer than its limit")
            assert (await at.step("b", x(1))).revision
        events = [event for at in (first, second) for event in at.events.sessions if event[0] == "expired"]
        assert events == [("expired", "a")], "one of them has ended it"
        stone = await tombstone(first, "a")
        assert (stone.end, stone.revision) == (End.EXPIRED, 1)


@pytest.mark.parametrize("use", USES)
async def test_a_session_that_is_used_on_one_server_ends_on_none(
    limited: Limited,
    use: Callable[[Harness], Awaitable[Any]],
) -> None:
    async with limited("a", "other") as (first, second, times):
        for _ in range(5):
            times.advance(60.0)
            await use(second)
            await turns()
            await ended(first, second)
        assert "other" not in await first.store.ids()
        assert (await first.store.found("a"))[0].tombstone is None
        assert (await first.step("a", x(1))).revision > 1
        times.advance(101.0)
        assert "a" in await first.store.ids()
        await ended(first)
        assert "a" not in await first.store.ids()


async def test_reads_are_reported_to_the_store_at_most_every_tenth_of_the_limit(limited: Limited) -> None:
    async with limited("a", "b") as (_, second, times):
        for _ in range(50):
            times.advance(1.0)
            await second.state("a")
            await turns()
        assert len(second.store.asked("touch")) == 5
        times.advance(20.0)
        await asyncio.gather(second.state("a"), second.state("b"))
        await turns()
        assert sorted(second.store.asked("touch")[-1]) == ["a", "b"], "together"


@pytest.mark.parametrize("use", USES)
async def test_a_session_that_is_over_is_refused_before_anybody_has_looked_for_it(
    limited: Limited,
    use: Callable[[Harness], Awaitable[Any]],
) -> None:
    async with limited("a") as (first, second, times):
        times.advance(101.0)
        if use is resume:  # of one that has ended another one is made
            info = (await use(second)).session
            assert (info.revision, info.position) == (2, 0)
            assert (await first.step("a", x(1))).revision == 3
            return
        if use is read_many:
            ((_, error),) = (await use(second)).errors
            assert isinstance(error, SessionExpired)
        else:
            await fails(use(second), SessionExpired)
        assert (await tombstone(second, "a")).end is End.EXPIRED
        await fails(first.state("a"), SessionExpired)


@pytest.mark.parametrize("many", [False, True])
async def test_ids_of_sessions_that_are_over_may_be_used_again(limited: Limited, many: bool) -> None:
    async with limited("a", "b") as (first, second, times):
        times.advance(101.0)
        if many:
            opened = await second.engine.open_sessions("plain", session_ids=["a", "b"])
            assert list(opened.session_ids) == ["a", "b"]
        else:
            assert not (await second.engine.open_session("plain", session_id="a", must_be_new=True)).resumed
        answer = await first.step("a", x(1), expected=2)
        assert (answer.revision, answer.position) == (3, 1)


async def test_a_session_that_was_used_while_it_was_judged_does_not_end(limited: Limited) -> None:
    async with limited("a", "b") as (first, second, times):
        times.advance(99.0)
        await second.step("b", x(1))
        times.advance(2.0)
        sweep = await sweeping(first.store, first.internals.expire_idle())
        assert first.store.asked("commit")[-1] == ("a",)
        # the second server takes the session for one that is used: its clock says so as well
        second.internals.table.used[second.internals.handle("a")] = times.second.monotonic()
        assert (await second.step("a", x(1))).revision == 2
        first.store.release()
        assert await asyncio.wait_for(sweep, WAIT_S) == 0
        assert (await first.step("a", x(1), expected=2)).revision == 3


@pytest.mark.parametrize("pause_s", [4.0, 6.0, 9000.0])
async def test_a_server_that_was_held_up_ends_nothing_by_outdated_knowledge(
    limited: Limited, pause_s: float
) -> None:
    async with limited("a", "used") as (first, second, times):
        times.advance(101.0)
        sweep = await sweeping(first.store, first.internals.expire_idle())
        times.advance(pause_s)
        # the second server takes the session for one that is used: its clock says so as well
        second.internals.table.used[second.internals.handle("used")] = times.second.monotonic()
        assert (await second.step("used", x(1))).revision == 2
        first.store.release()
        assert await asyncio.wait_for(sweep, WAIT_S) == int(pause_s < 5.0)
        assert await ended(first) == int(pause_s > 5.0), "it is judged again"
        assert (await first.step("used", x(1))).revision == 3


@pytest.mark.engine(max_session_idle_s=IDLE_S)
async def test_one_server_at_a_time_looks_through_the_store(
    first: Harness, second: Harness, times: Times
) -> None:
    await first.open(*[f"s{number}" for number in range(3)])
    assert await ended(first, second) == 0
    assert first.store.asked("unused")
    assert not second.store.asked("unused")
    times.advance(80.0)
    assert await ended(second) == 0
    assert second.store.asked("unused") == [], "the first one has the task still"
    times.advance(21.0)
    assert await ended(second) == 3, "it has not said so for too long"
    assert await ended(first) == 0


@pytest.mark.engine(max_session_idle_s=IDLE_S, resident_rows=4096)
async def test_the_store_is_searched_by_pages_while_other_requests_run(
    first: Harness, second: Harness, times: Times
) -> None:
    await second.engine.open_sessions("plain", count=1700)
    await second.open("a")
    times.advance(101.0)
    sweep = asyncio.create_task(first.internals.expire_idle())
    await first.store.until("unused")
    await first.open("b")
    assert await asyncio.wait_for(sweep, WAIT_S) == 1701
    assert len(first.store.asked("unused")) >= 4
    assert len(await first.store.ids()) == 1


async def test_a_session_with_a_long_running_request_counts_as_used(limited: Limited) -> None:
    async with limited("a", threads=True) as (first, second, times):
        answers = await second.begin_pass("a", x(1), sizes=[1])
        for _ in range(4):
            times.advance(40.0)
            second.internals.uses.look()
            await turns()
            assert await ended(first) == 0
        second.hooks.open_gate()
        assert (await answers.only()).revision == 2


async def test_only_a_use_is_lost_when_it_cannot_be_reported_to_the_store(limited: Limited) -> None:
    async with limited("a") as (first, second, times):
        second.store.told_error = Unavailable("away")
        times.advance(50.0)
        await second.state("a")
        await turns()
        second.store.told_error = None
        times.advance(40.0)
        await second.state("a")
        await turns()
        assert await ended_later(times, 90.0, first, second) == 0
        assert await ended_later(times, 20.0, first, second) == 1


@pytest.mark.parametrize("where", ["claim", "page", "deletion"])
async def test_a_store_that_is_away_ends_nothing_and_the_next_look_does(limited: Limited, where: str) -> None:
    async with limited("a") as (first, second, times):
        times.advance(101.0)
        error = Unavailable("away")
        if where == "claim":
            first.store.told_error = error
        elif where == "page":
            first.store.read_error = error
        else:
            first.store.commit_error = error
        await fails(first.internals.expire_idle(), ServerError, "away")
        if where == "deletion":  # who names it is not told that it has expired: nobody knows
            answers = await first.submit("a", x(1)).all()
            assert kinds(answers) == ["Unavailable"]
        first.store.told_error = first.store.read_error = first.store.commit_error = None
        assert await ended(first, second) == 1


async def test_an_end_that_the_store_does_not_confirm_is_not_reported(limited: Limited) -> None:
    async with limited("a") as (first, _, times):
        times.advance(101.0)
        first.store.unknown["a"] = True
        await fails(first.state("a"), Unavailable)
        await fails(first.state("a"), SessionExpired)


async def test_a_session_that_is_over_and_is_asked_for_by_many_ends_once(limited: Limited) -> None:
    async with limited("a") as (first, second, times):
        times.advance(101.0)
        asked = [await start_task(at.state("a")) for at in (first, second, first, second)]
        found = await asyncio.gather(*asked, return_exceptions=True)
        assert [type(each) for each in found] == [SessionExpired] * 4


@pytest.mark.parametrize("named", [False, True])
async def test_time_in_which_nobody_could_use_it_ends_no_session(limited: Limited, named: bool) -> None:
    async with limited("a") as (first, second, times):
        first.store.service.is_constant = False
        assert await ended(first, second) == 0
        for _ in range(6):  # they run, and say so
            assert await ended_later(times, 15.0, first, second) == 0
        times.advance(5000.0)  # the store is away, or no server runs
        if named:
            assert (await second.state("a"))["sum"].shape
        assert await ended(first, second) == 0
        for _ in range(6):
            assert await ended_later(times, 15.0, first, second) == 0
        assert await ended_later(times, 12.0, first, second) == 1
        await fails(first.state("a"), SessionExpired)


async def opened(at: Harness, max_idle_ms: int | None = 60_000, name: str = "") -> str:
    made = await at.engine.open_session("plain", session_id=name, max_idle_ms=max_idle_ms)
    return made.session.session_id


@pytest.mark.engine(unnamed_session_idle_s=90.0)
async def test_sessions_with_different_limits_end_on_any_server(
    first: Harness, second: Harness, times: Times
) -> None:
    gone = [
        await opened(first),
        *(await second.engine.open_sessions("plain", count=3, max_idle_ms=59_500)).session_ids,
    ]
    stays = [await opened(first, None), await opened(second, 30_000_000), await opened(second, 0)]
    await first.open("named")
    assert await ended_later(times, 59.0, first, second) == 0
    assert await ended_later(times, 2.0, first, second) == 4, "in one look"
    for at in (first, second):
        await fails(at.state(gone[0]), SessionExpired, "idle for longer than its limit")
    assert {info.session_id for info in (await second.engine.list_sessions())[0]} == {*stays, "named"}
    assert [(await second.engine.session_info(name)).max_idle_s for name in (*stays, "named")] == [
        90.0, 30_000.0, math.inf, math.inf,
    ]  # fmt: skip
    assert (await tombstone(first, gone[-1])).end is End.EXPIRED
    assert await ended_later(times, 30.0, first, second) == 1


@pytest.mark.parametrize("who", ["opened", "has seen it", "has not"])
async def test_a_call_finds_a_session_expired_before_the_sweep(
    who: str, first: Harness, second: Harness, times: Times
) -> None:
    name = await opened(first, 5000)
    if who == "has seen it":
        await second.state(name)
    times.advance(5.5)
    at = first if who == "opened" else second
    answers = await at.submit(name, x(1)).all()
    assert type(answers[0]) is SessionExpired
    assert (await tombstone(first, name)).end is End.EXPIRED
    assert (await first.engine.list_sessions())[0] == []


async def test_a_session_of_the_table_that_ended_by_its_limit_is_not_listed_or_exported(
    first: Harness, second: Harness, times: Times
) -> None:
    name = await opened(first, 5000, "a")
    await second.state(name)
    times.advance(5.5)
    assert (await second.engine.list_sessions())[0] == []
    (found,) = await second.engine.export_sessions([name], deadline=math.inf)
    assert type(found) is SessionExpired


async def test_a_tenants_sessions_end_as_others_do(first: Harness, second: Harness, times: Times) -> None:
    names = (
        await first.engine.open_sessions("plain", count=2, max_idle_ms=60_000, namespace=f"acme{SEPARATOR}")
    ).session_ids
    times.advance(61.0)
    assert await ended(second) == 2
    assert (await tombstone(first, names[0])).session_id.startswith("acme")
    assert await first.store.count_of(f"acme{SEPARATOR}") == 0


@pytest.mark.parametrize("by", ["step", "read", "describe"])
async def test_a_session_reopened_elsewhere_has_the_limit_of_its_new_opening(
    by: str, first: Harness, second: Harness, times: Times
) -> None:
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
    assert await ended_later(times, 300.0, first, second) == 0
    assert await ended_later(times, 301.0, first, second) == 1
