"""Lists by every filter, and closing what fits: as if all sessions were sorted and looked at."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Sequence
from typing import Any

import pytest

from stepwell_server.core import namespaces
from stepwell_server.engine.api import SessionFilter, SessionInfo
from stepwell_server.engine.sessions import read
from stepwell_server.store.heads import Heads
from stepwell_server.store.in_process import InProcessStore
from support.engine.fake_executor import PLAIN, RICH
from support.engine.harness import Harness, running, x
from support.engine.versions import serving, weights
from support.stores.durable import Disk, begun
from support.stores.kinds import IN_PROCESS

PROGRAMS = {"plain": PLAIN, "rich": RICH}
FILTERS: list[dict[str, Any]] = [
    {},
    {"prefix": "s1"},
    {"model": "plain"},
    {"model": "rich"},
    {"idle_longer_s": 20.0},
    {"idle_longer_s": 30.0, "model": "plain", "prefix": "s"},
    {"prefix": "nobody"},
]
#: Those of no tenant among them: ids of one begin as the names of others do.
TENANTS = ["", "s1", "acme", "é"]
OF_TENANTS: list[dict[str, Any]] = [
    {"tenant": tenant, **wanted} for tenant in (None, "", "s1", "acme", "nobody") for wanted in FILTERS
]


async def some_sessions(at: Harness, count: int, seed: int, tenants: Sequence[str] = ("",)) -> None:
    """Sessions of two models, opened and used at different times; some have very long ids that are nearly alike."""
    chance = random.Random(seed)
    names = [f"s{number}" for number in range(count)]
    names += ["é" * 200 + str(number) for number in range(4)]
    names = [namespaces.prefix_of(chance.choice(tenants)) + name for name in names]
    chance.shuffle(names)
    for name in names:
        await at.open(name, model="rich" if chance.random() < 0.1 else "plain")
        at.clock.advance(chance.choice((0.0, 0.5)))
    await use_some(at, names, chance)


async def use_some(at: Harness, names: list[str], chance: random.Random) -> None:
    for name in chance.sample(names, len(names) // 3):
        await at.state(name)
        at.clock.advance(chance.choice((0.0, 1.0)))


async def whole(at: Harness, limit: int, **query: Any) -> tuple[list[SessionInfo], set[int]]:
    """All pages of a list, and what they say of its length."""
    found: list[SessionInfo] = []
    totals = set()
    after = ""
    while True:
        page, total = await at.engine.list_sessions(after=after, limit=limit, **query)
        assert len(page) <= limit
        found += page
        totals.add(total)
        if page.next is None:
            return found, totals
        after = page.next  # the caller's token says it: it must not name a session of another tenant
        assert query.get("tenant") is None or namespaces.tenant_of(after) == query["tenant"]


def is_meant(session_id: str, wanted: SessionFilter) -> bool:
    if wanted.tenant is None:
        return session_id.startswith(wanted.prefix)
    return namespaces.tenant_of(session_id) == wanted.tenant and namespaces.own(session_id).startswith(
        wanted.prefix
    )


async def check_lists(
    at: Harness, limits: tuple[int, ...] = (1000, 7), filters: Sequence[dict[str, Any]] = FILTERS
) -> None:
    everyone, _ = await whole(at, 1000)
    now = at.clock.now()
    for wanted in filters:
        chosen = SessionFilter(**wanted)
        fitting = [
            info
            for info in everyone
            if is_meant(info.session_id, chosen)
            and chosen.model in {"", info.model}
            and (chosen.idle_longer_s is None or now - info.last_used > chosen.idle_longer_s)
        ]
        fitting.sort(key=lambda info: info.session_id)
        for limit in limits:
            found, totals = await whole(at, limit, **wanted)
            assert [i.session_id for i in found] == [i.session_id for i in fitting], (wanted, limit)
            assert found == fitting
            assert totals == {len(fitting)}
    _, total = await at.engine.list_sessions(count=False)
    assert total == 0


@pytest.fixture
def small_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(read, "_HEADS_BATCH_SIZE", 5)
    monkeypatch.setattr(read, "_MAX_HEADS", 5)


@pytest.mark.usefixtures("small_pieces")
@pytest.mark.engine(PROGRAMS, resident_rows=20)
async def test_every_filter(at: Harness) -> None:
    await some_sessions(at, 60, seed=1)
    await check_lists(at)
    for number in range(5, 50):  # some go, some come, some are used
        await at.engine.close_session(f"s{number}")
    await at.open(*[f"s1-{number}" for number in range(15)])
    at.clock.advance(3.0)
    await at.open(*[f"t{number}" for number in range(15)], model="rich")
    await use_some(at, ["s1", "s3", "s1-3", "s1-4", "t7"], random.Random(2))
    await check_lists(at)


@pytest.mark.usefixtures("small_pieces")
@pytest.mark.engine(PROGRAMS, resident_rows=20)
async def test_every_filter_within_a_tenant(at: Harness) -> None:
    await some_sessions(at, 40, 3, TENANTS)
    await check_lists(at, filters=OF_TENANTS)
    await at.open(*[f"{tenant}\x1fs1-{number}" for tenant in ("s1", "acme") for number in range(3)])
    await check_lists(at, (7,), filters=OF_TENANTS)


@pytest.mark.stores("async")
async def test_a_tenants_sessions_are_counted_and_listed_without_reading_those_of_others(
    disk: Disk, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with disk.engine(PROGRAMS, resident_rows=20) as at:
        await some_sessions(at, 40, 3, TENANTS)
        await at.engine.close_sessions([f"acme\x1fs{number}" for number in range(0, 40, 2)])
    async with disk.engine(PROGRAMS, resident_rows=20) as at:
        everyone, _ = await whole(at, 1000)
        await check_lists(at, (7,), filters=OF_TENANTS)
        seen: list[bytes] = []
        heads = InProcessStore.heads

        async def noted(self: InProcessStore, **wanted: Any) -> Heads:
            found = await heads(self, **wanted)
            seen.extend(found.keys)
            return found

        monkeypatch.setattr(InProcessStore, "heads", noted)
        for tenant in ("s1", "acme", "nobody"):
            own = [info for info in everyone if namespaces.tenant_of(info.session_id) == tenant]
            assert await at.engine.list_sessions(tenant=tenant) == (own, len(own))
            plain = [info for info in own if info.model == "plain"]
            assert await at.engine.list_sessions(tenant=tenant, model="plain") == (plain, len(plain))
        assert {namespaces.tenant_of(key.decode()) for key in seen} == {"s1", "acme"}


@pytest.mark.usefixtures("small_pieces")
@pytest.mark.stores("async", "sync")
async def test_every_filter_after_a_restart(disk: Disk) -> None:
    async with disk.engine(PROGRAMS, resident_rows=20) as at:
        await some_sessions(at, 60, seed=3)
        await at.step("s7", x(1))  # in the log, not yet in LMDB
        disk.kill()
    async with disk.engine(PROGRAMS, resident_rows=20) as at:
        await check_lists(at)
        assert at.internals.loaded() == [], "a list is no use of a session"
        at.clock.advance(5.0)
        for number in range(20):  # from here on these are in the table too, or gone
            await at.engine.session_info(f"s{number}")
        await at.step("s7", x(1))
        await at.engine.close_session("s8")
        await at.open("s0-new")
        await check_lists(at)


async def test_a_session_that_is_there_all_the_time_is_listed_once() -> None:
    chance = random.Random(6)
    async with running(resident_rows=20) as at:
        names = [f"s{number:03}" for number in range(200)]
        await at.open(*names[:150])
        found: list[str] = []
        after: str | None = ""
        while after is not None:
            page, _ = await at.engine.list_sessions(after=after, limit=10)
            after, found = page.next, found + [info.session_id for info in page]
            await at.engine.close_sessions(chance.sample(names[1::2], 10))
            await at.open(*chance.sample(names[1::2], 10))
            await use_some(at, names[:150:2], chance)
        assert found == sorted(set(found))
        assert {*names[:150:2]} <= {*found}


@IN_PROCESS  # Valkey itself takes seconds to make so many
@pytest.mark.engine(resident_rows=8)
async def test_the_event_loop_goes_on_while_many_are_listed(at: Harness) -> None:
    ids = (await at.engine.open_sessions("plain", count=8000)).session_ids
    listed = await begun(at.engine.list_sessions(limit=len(ids)))
    turns = 0
    while not listed.done():
        await asyncio.sleep(0)
        turns += 1
    page, _ = listed.result()
    assert [info.session_id for info in page] == sorted(ids)
    assert turns > len(ids) // 500


async def close_all(at: Harness, limit: int, **wanted: Any) -> int:
    closed, place = await at.engine.close_matching(SessionFilter(**wanted), limit=limit)
    while place is not None:
        more, place = await at.engine.close_matching(SessionFilter(**wanted), limit=limit, place=place)
        closed += more
    return closed


@pytest.mark.parametrize("wanted", FILTERS)
@pytest.mark.engine(PROGRAMS, resident_rows=20)
async def test_closing_what_fits(wanted: dict[str, Any], at: Harness) -> None:
    await some_sessions(at, 30, seed=4)
    fitting, _ = await whole(at, 1000, **wanted)
    everyone, _ = await whole(at, 1000)
    assert await close_all(at, 4, **wanted) == len(fitting)
    left, _ = await whole(at, 1000)
    gone = {info.session_id for info in fitting}
    assert left == [info for info in everyone if info.session_id not in gone]


async def test_what_is_new_or_used_since_the_first_page_stays(at: Harness) -> None:
    await at.open(*"abcdef")
    at.clock.advance(60.0)
    closed, place = await at.engine.close_matching(SessionFilter(idle_longer_s=30.0), limit=2)
    assert closed == 2
    assert place is not None
    await at.open("d1")
    await at.state("e")
    at.clock.advance(31.0)  # "e" and "d1" have been idle for long enough now, but were not when it began
    while place is not None:
        _, place = await at.engine.close_matching(SessionFilter(idle_longer_s=30.0), limit=2, place=place)
    assert [info.session_id for info in (await at.engine.list_sessions())[0]] == ["d1", "e"]


@pytest.mark.engine(threads=True)
async def test_a_session_in_use_is_not_idle_and_is_closed_by_its_prefix_after_its_step(at: Harness) -> None:
    await at.open("a", "b")
    answer = await at.begin_pass("a", x(1))
    at.clock.advance(60.0)
    assert await close_all(at, 10, idle_longer_s=30.0) == 1
    closing = await begun(close_all(at, 10, prefix="a"))
    at.hooks.open_gate()
    assert (await answer.only()).revision == 1
    assert await closing == 1


async def test_sessions_of_an_unloaded_version_are_listed_and_closed_by_a_filter() -> None:
    programs = {"plain@1": weights(1), "plain@2": weights(2)}
    async with serving(programs, resident_rows=2) as at:
        await at.open("a", "c", "e", model="plain@1")
        await at.open("b", "d", "f", model="plain@2")
        await at.engine.unload_version("plain", 1, force=True)
        at.clock.advance(2.0)
        for wanted in ({}, {"model": "plain"}, {"idle_longer_s": 1.0}):
            found, totals = await whole(at, 2, **wanted)
            assert [(info.session_id, info.version) for info in found] == [
                *zip("abcdef", [1, 2] * 3, strict=True)
            ]
            assert totals == {6}
        assert [info.session_id for info in (await whole(at, 1, prefix="c"))[0]] == ["c"]
        assert await close_all(at, 2, model="plain") == 6
        assert await whole(at, 2) == ([], {0})


@IN_PROCESS  # Valkey is looked through in parts
async def test_many_that_end_together_are_told_together() -> None:
    told: list[tuple[str, str, int]] = []
    async with running(PROGRAMS, max_session_idle_s=60.0) as at:
        at.events.session_events = lambda *event: told.append(event)  # type: ignore[method-assign]
        ids = (await at.engine.open_sessions("plain", count=1100)).session_ids
        await at.open("one", model="rich")
        at.events.sessions.clear()
        assert await at.engine.close_sessions([*ids, "one"]) == 1101
        assert (sorted(told), at.events.sessions) == ([("closed", "plain", 1100), ("closed", "rich", 1)], [])
        await at.engine.open_sessions("plain", count=20)
        at.clock.advance(61.0)
        told.clear()
        await at.expire()
        assert (told, at.events.sessions) == ([("expired", "plain", 20)], [])
        await at.open("two")
        at.events.sessions.clear()
        assert await at.engine.close_sessions(["two"]) == 1
        await at.open("three")
        await at.engine.close_session("three")
        ends = [event for event in at.events.sessions if event[0] == "closed"]
        assert ends == [("closed", "two"), ("closed", "three")]
