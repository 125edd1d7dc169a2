"""Sessions with idle limits of their own end when nobody used them for that long, wherever they are kept, and only then."""

from __future__ import annotations

import asyncio
import math
from typing import Any

import pytest

from stepwell_server.errors import InvalidInput, SessionExpired, Unavailable
from stepwell_server.store.base import End
from support.engine.harness import Harness, fails, running, x
from support.stores.durable import Disk
from support.stores.records import decode

HOUR_S = 3600.0
OWN = pytest.mark.stores("memory", "async", "sync")
ON_DISK = pytest.mark.stores("async", "sync")


async def opened(at: Harness, max_idle_ms: int | None = None, name: str = "") -> str:
    """The id of a session that is opened; `name` is its id if the caller chooses it."""
    made = await at.engine.open_session("plain", session_id=name, max_idle_ms=max_idle_ms)
    return made.session.session_id


async def ids(at: Harness) -> set[str]:
    await at.settled()
    return {info.session_id for info in (await at.engine.list_sessions())[0]}


async def limit_s(at: Harness, name: str) -> float:
    """What everybody is told of a session's limit."""
    info = await at.engine.session_info(name)
    listed = (await at.engine.list_sessions(prefix=name))[0][0]
    assert listed.max_idle_s == info.max_idle_s
    return info.max_idle_s


async def refused(at: Harness, *names: str) -> None:
    for name in names:
        caught = await fails(at.state(name), SessionExpired, "idle for longer than its limit")
        assert caught.session_id == name


@pytest.mark.engine(unnamed_session_idle_s=HOUR_S)
async def test_each_opening_sets_the_limit_and_a_session_without_an_id_has_that_of_the_server(
    at: Harness,
) -> None:
    engine = at.engine
    unnamed, named = await opened(at), await opened(at, name="named")
    asked, never, short = await opened(at, 5000), await opened(at, 0), await opened(at, 90_000, "short")
    many = await engine.open_sessions("plain", count=2)
    some = await engine.open_sessions("plain", session_ids=["m1", "m2"], max_idle_ms=7000)
    forks = [
        (await engine.fork(short)).session.session_id,
        (await engine.fork(short, new_session_id="f")).session.session_id,
        (await engine.fork(short, max_idle_ms=8000)).session.session_id,
    ]
    forks += (await engine.fork_sessions([short, unnamed], max_idle_ms=9000)).session_ids
    wanted = {unnamed: HOUR_S, named: math.inf, asked: 5.0, never: math.inf, short: 90.0}
    wanted |= {**dict.fromkeys(many.session_ids, HOUR_S), **dict.fromkeys(some.session_ids, 7.0)}
    wanted |= dict(zip(forks, [HOUR_S, math.inf, 8.0, 9.0, 9.0], strict=True))
    assert {name: await limit_s(at, name) for name in wanted} == wanted
    await at.submit(list(wanted), x(len(wanted))).all()  # records of all kinds in one commit
    assert {name: await limit_s(at, name) for name in wanted} == wanted


@pytest.mark.engine(unnamed_session_idle_s=HOUR_S)
async def test_a_session_that_is_resumed_keeps_its_limit(at: Harness) -> None:
    name, unnamed = await opened(at, 5000, "a"), await opened(at)
    for asked in (None, 0, 9000):
        again = await at.engine.open_session("plain", session_id=name, max_idle_ms=asked)
        assert (again.resumed, again.session.max_idle_s) == (True, 5.0)
    await at.engine.open_sessions("plain", session_ids=[name, unnamed, "b"], resume=True, max_idle_ms=0)
    assert [await limit_s(at, each) for each in (name, unnamed, "b")] == [5.0, HOUR_S, math.inf]


@pytest.mark.engine(max_session_idle_s=60.0, unnamed_session_idle_s=HOUR_S)
async def test_the_limit_of_the_server_is_an_upper_bound(at: Harness) -> None:
    for asked, name, limit in (
        (0, "a", 60.0),
        (90_000, "b", 60.0),
        (30_000, "c", 30.0),
        (None, "", 60.0),
    ):
        assert await limit_s(at, await opened(at, asked, name)) == limit
    at.clock.advance(30.5)
    assert await at.internals.expire_idle() == 1
    await refused(at, "c")
    at.clock.advance(30.0)
    assert await at.internals.expire_idle() == 3
    assert await ids(at) == set()


async def test_a_request_that_comes_again_must_ask_for_the_same_limit(at: Harness) -> None:
    first = await at.engine.open_session("plain", request_id=5, max_idle_ms=6000)
    again = await at.engine.open_session("plain", request_id=5, max_idle_ms=6000)
    assert (again.replayed, again.session.session_id) == (True, first.session.session_id)
    for other in (None, 0, 7000):
        await fails(
            at.engine.open_session("plain", request_id=5, max_idle_ms=other),
            InvalidInput,
            "with other content",
        )


@OWN
async def test_each_session_ends_by_its_own_limit() -> None:
    """Of very different limits, in whichever order they end."""
    limits_s = [1.0, 1.5, 60.0, 61.0, 7200.0, 86_400.0, 3650 * 86_400.0]
    async with running() as at:
        names = [await opened(at, round(each * 1000)) for each in limits_s]
        stays = await opened(at, 0)
        passed = 0.0
        for name, limit in zip(names, limits_s, strict=True):
            at.clock.advance(limit - passed)
            passed = limit
            assert await at.internals.expire_idle() == 0, f"idle for {limit} s is not longer than that"
            at.clock.advance(0.25)
            passed += 0.25
            assert await at.internals.expire_idle() == 1
            await refused(at, name)
        assert await ids(at) == {stays}
        assert [event for event in at.events.sessions if event[0] == "expired"] == [
            ("expired", n) for n in names
        ]


@pytest.mark.engine(threads=True)
async def test_use_puts_the_end_off_and_a_look_at_the_session_does_not(at: Harness) -> None:
    names = {use: await opened(at, 60_000, use) for use in ("step", "read", "resume", "fork", "describe")}
    for turn in range(4):
        at.clock.advance(45.0)
        if turn == 0:
            await at.engine.session_info("describe")
            await at.engine.list_sessions()
        await at.step("step", x(1))
        await at.state("read")
        await at.engine.open_session("plain", session_id="resume")
        await at.engine.fork("fork", new_session_id=f"of {turn}")
        assert await at.internals.expire_idle() == int(turn == 1)
    assert await ids(at) == {*names, *(f"of {turn}" for turn in range(4))} - {"describe"}


@OWN
@pytest.mark.engine(threads=True)
async def test_what_has_something_under_way_is_used(at: Harness) -> None:
    name, other = await opened(at, 60_000), await opened(at, 60_000)
    await at.state(name)
    answer = await at.begin_pass(name, x(1))
    at.clock.advance(70.0)
    assert await at.internals.expire_idle() == 1
    at.hooks.open_gate()
    assert (await answer.only()).revision == 1
    await refused(at, other)
    at.clock.advance(60.0)
    assert await at.internals.expire_idle() == 0
    at.clock.advance(0.5)
    assert await at.internals.expire_idle() == 1


async def test_whoever_names_it_finds_it_expired_before_the_timer_comes(at: Harness) -> None:
    names = [await opened(at, 5000) for _ in range(3)]
    at.clock.advance(5.5)
    answers = await at.submit(names[:2], x(2)).all()
    assert [type(answer) for answer in answers] == [SessionExpired] * 2
    with pytest.raises(SessionExpired):
        await at.single(names[2], x(1)).only()
    again = await at.engine.open_session("plain", session_id="n", max_idle_ms=5000)
    at.clock.advance(5.5)
    anew = await at.engine.open_session("plain", session_id="n")
    assert (anew.resumed, anew.session.max_idle_s) == (False, math.inf)
    assert anew.session.uid != again.session.uid


@ON_DISK
async def test_limits_outlive_a_restart_whose_time_ends_nothing(disk: Disk) -> None:
    async with disk.engine(resident_rows=4, unnamed_session_idle_s=60.0) as at:
        group = list((await at.engine.open_sessions("plain", count=20)).session_ids)
        others = list((await at.engine.open_sessions("plain", count=20, max_idle_ms=600_000)).session_ids)
        named = [f"n{number}" for number in range(20)]
        await at.open(*named)
        for revision in range(3):  # those with a limit and those without share a pass, in a template and not
            answers = await at.submit([*group, *others, *named], x(60)).all()
            assert [getattr(answer, "revision", None) for answer in answers] == [revision + 1] * 60
        await at.submit(group[:1], x(1, 4)).all()
        at.clock.advance(59.0)
        disk.kill(away_s=1000.0)
    stored = {
        name: decode(name, disk.store.get(name)).max_idle_ms for name in (group[0], others[0], named[0])
    }
    assert list(stored.values()) == [60_000, 600_000, 0]
    # a server with other settings: what is stored counts
    async with disk.engine(unnamed_session_idle_s=5.0) as at:
        assert await ids(at) == {*group, *others, *named}
        await at.expire()
        await at.step(group[3], x(1))  # in the table from here on
        at.clock.advance(59.0)
        await at.expire()
        assert await ids(at) == {*group, *others, *named}
        await at.state(group[4])
        at.clock.advance(1.5)
        await at.expire()
        assert await ids(at) == {group[4], *others, *named}, "the others, in the table and not"
        await refused(at, group[0], group[3])
        assert [await limit_s(at, each) for each in (group[4], others[0], named[0])] == [
            60.0,
            600.0,
            math.inf,
        ]
        stone = disk.store.tombstones(group[:1])[0]
        assert (stone.end, stone.revision) == (End.EXPIRED, 4)
        at.clock.advance(545.0)
        await at.expire()
        assert await ids(at) == {*named}
        disk.kill()
    async with disk.engine() as at:
        await refused(at, group[0], others[0])


@ON_DISK
async def test_the_records_are_looked_through_in_pages_when_a_limit_ends_and_then_no_more(disk: Disk) -> None:
    async with disk.engine(resident_rows=4096) as at:
        long = (await at.engine.open_sessions("plain", count=1200, max_idle_ms=50_000)).session_ids
        await at.engine.open_sessions("plain", count=300, max_idle_ms=90_000)
        await at.engine.open_sessions("plain", session_ids=["named"])
        disk.kill()
    async with disk.engine() as at:
        await at.state(long[0])
        at.clock.advance(5.5)
        heads, searches = at.store.heads, []

        def counted(*, after: str, **more: Any) -> Any:
            searches.append(after)
            return heads(after=after, **more)

        at.store.heads = counted
        await at.expire()
        assert len(searches) == 5, "four pages, and the end"
        at.clock.advance(44.0)
        await at.expire()
        assert len(searches) == 5, "no limit has ended"
        await at.state(long[1])
        at.clock.advance(1.0)
        await at.expire()
        assert at.internals.loaded() == [long[1]], "to expire sessions loads none"
        assert len(await ids(at)) == 302
        at.clock.advance(40.0)
        await at.expire()
        assert await ids(at) == {long[1], "named"}
        at.clock.advance(1e6)
        searches.clear()
        await at.expire()
        assert not searches, "all others are in the table"


@ON_DISK
async def test_a_store_that_cannot_be_read_ends_nothing_and_is_asked_again(disk: Disk) -> None:
    async with disk.engine() as at:
        await opened(at, 50_000)
        disk.kill()
    async with disk.engine() as at:
        at.clock.advance(51.0)
        disk.store.read_error = Unavailable("away")
        await fails(at.expire(), Unavailable)
        disk.store.read_error = None
        assert disk.store.count() == 1
        at.clock.advance(2.0)
        await at.expire()
        assert await ids(at) == set()


@ON_DISK
async def test_a_session_that_is_paged_out_or_dropped_ends_by_its_last_use(disk: Disk) -> None:
    async with disk.engine(resident_rows=1) as at:
        names = [await opened(at, 50_000) for _ in range(3)]
        at.clock.advance(40.0)
        await at.state(names[0])
        disk.store.fail(Unavailable("away"))
        assert [type(answer) for answer in await at.submit(names[:1], x(1)).all()] == [Unavailable]
        await at.settled()
        assert names[0] not in at.internals.loaded()
        at.clock.advance(20.0)
        await at.expire()
        assert await ids(at) == {names[0]}
        assert (await at.step(names[0], x(1))).revision == 1
        at.clock.advance(50.5)
        await at.expire()
        assert await ids(at) == set()


@OWN
async def test_the_timer_ends_what_is_due(monkeypatch: pytest.MonkeyPatch) -> None:
    """It wakes by itself, whatever the limits are."""
    pauses: list[float] = []
    sleep = asyncio.sleep

    async def passing(seconds: float, *rest: Any) -> None:
        pauses.append(seconds)
        at.clock.advance(seconds)
        await sleep(0, *rest)

    async with running() as at:
        await opened(at, 1_800_000)
        name, used = await opened(at, 2000), await opened(at, 2000)
        monkeypatch.setattr("stepwell_server.engine.sessions.end.asyncio.sleep", passing)
        timer = asyncio.create_task(at.internals.sweep.run())
        began = at.clock.monotonic()
        while name in at.internals.loaded():
            await at.state(used)
            await sleep(0)
        assert 2.0 < at.clock.monotonic() - began < 2.5
        timer.cancel()
        assert len(await ids(at)) == 2
        assert max(pauses) == 0.5
        assert len(pauses) < 20


@ON_DISK
async def test_a_session_whose_version_was_unloaded_ends_by_its_last_use(disk: Disk) -> None:
    async with disk.engine() as at:
        used, unused = await opened(at, 50_000, "used"), await opened(at, 50_000, "unused")
        disk.kill()
    async with disk.engine() as at:
        at.clock.advance(40.0)
        await at.state(used)
        await at.engine.unload_version("plain", 1, force=True)
        assert at.internals.loaded() == []
        at.clock.advance(11.0)
        await at.expire()
        assert disk.store.get(used) is not None
        assert disk.store.tombstones([unused])[0].end is End.EXPIRED
        at.clock.advance(40.0)
        await at.expire()
        assert disk.store.tombstones([used])[0].end is End.EXPIRED


@ON_DISK
async def test_many_sessions_of_an_unloaded_version_end_in_pieces(disk: Disk) -> None:
    async with disk.engine(resident_rows=4096) as at:
        made = (await at.engine.open_sessions("plain", count=1100, max_idle_ms=50_000)).session_ids
        await at.engine.open_sessions("plain", count=300, max_idle_ms=90_000)
        await at.engine.unload_version("plain", 1, force=True)
        at.clock.advance(51.0)
        assert [await at.internals.sweep.page() for _ in range(3)] == [500, 500, 100]
        assert await at.internals.expire_idle() == 0
        await at.settled()
        assert disk.store.count() == 300
        assert disk.store.tombstones(made[:1])[0].end is End.EXPIRED
        at.clock.advance(40.0)
        assert await at.internals.expire_idle() == 300
