"""Lists in every order and by every filter, and closing what fits: as if all sessions were sorted and looked at."""

from __future__ import annotations

import asyncio
import itertools
import random
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest

from stepwell_server.core import namespaces
from stepwell_server.engine.api import Order, SessionFilter, SessionInfo
from stepwell_server.engine.sessions import catalogue, listing
from support.durable import Disk, begun
from support.engine import Harness, running, x
from support.fake_executor import PLAIN, RICH

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
    after = None
    while True:
        page, total = await at.engine.list_sessions(after=after, limit=limit, **query)
        assert len(page) <= limit
        found += page
        totals.add(total)
        if page.next is None:
            return found, totals
        after = page.next


def is_meant(session_id: str, wanted: SessionFilter) -> bool:
    if wanted.tenant is None:
        return session_id.startswith(wanted.prefix)
    return namespaces.tenant_of(session_id) == wanted.tenant and namespaces.own(session_id).startswith(
        wanted.prefix
    )


async def check_lists(
    at: Harness, limits: tuple[int, ...] = (1000, 7), filters: Sequence[dict[str, Any]] = FILTERS
) -> None:
    everyone, _ = await at.engine.list_sessions(limit=10_000)
    now = at.clock.now()
    for wanted, order, descending in itertools.product(filters, Order, (False, True)):
        chosen = SessionFilter(**wanted)
        fitting = [
            info
            for info in everyone
            if is_meant(info.session_id, chosen)
            and chosen.model in {"", info.model}
            and (chosen.idle_longer_s is None or now - info.last_used > chosen.idle_longer_s)
        ]
        key = {
            Order.ID: lambda info: (0.0, info.session_id),
            Order.LAST_USED: lambda info: (round(info.last_used, 3), info.session_id),
            Order.CREATED: lambda info: (info.created, info.session_id),
        }[order]
        fitting.sort(key=key, reverse=descending)
        for limit in limits:
            found, totals = await whole(at, limit, order=order, descending=descending, **wanted)
            assert [i.session_id for i in found] == [i.session_id for i in fitting], (wanted, order, limit)
            assert found == fitting
            assert totals == {len(fitting)}
    _, total = await at.engine.list_sessions(count=False)
    assert total == 0


async def test_every_order_and_filter(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(catalogue, "_AT_ONCE", 7)
    monkeypatch.setattr(catalogue, "_MOST_BESIDE", 10)
    monkeypatch.setattr(listing, "_AT_ONCE", 5)
    async with running(PROGRAMS, resident_rows=20) as at:
        await some_sessions(at, 60, seed=1)
        await check_lists(at)
        for number in range(5, 50):  # some go, some come, some are used: more than are looked up beside
            await at.engine.close_session(f"s{number}")
        await at.open(*[f"s1-{number}" for number in range(15)])
        at.clock.advance(3.0)
        await at.open(*[f"t{number}" for number in range(15)], model="rich")
        await use_some(at, ["s1", "s3", "s1-3", "s1-4", "t7"], random.Random(2))
        await check_lists(at)


async def test_every_order_and_filter_within_a_tenant(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(catalogue, "_AT_ONCE", 7)
    monkeypatch.setattr(catalogue, "_MOST_BESIDE", 10)
    async with running(PROGRAMS, resident_rows=20) as at:
        await some_sessions(at, 40, 3, TENANTS)
        await check_lists(at, filters=OF_TENANTS)
        await at.open(*[f"{tenant}\x1fs1-{number}" for tenant in ("s1", "acme") for number in range(3)])
        await check_lists(at, (7,), filters=OF_TENANTS)


@pytest.mark.stores("async")
async def test_a_tenants_sessions_are_counted_and_listed_without_looking_at_those_of_others(
    disk: Disk, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with disk.engine(PROGRAMS, resident_rows=20) as at:
        await some_sessions(at, 40, 3, TENANTS)
        await at.engine.close_sessions([f"acme\x1fs{number}" for number in range(0, 40, 2)])
    async with disk.engine(PROGRAMS, resident_rows=20) as at:
        everyone, _ = await at.engine.list_sessions(limit=10_000)
        await check_lists(at, (7,), filters=OF_TENANTS)

        def never(*_: object) -> None:
            raise AssertionError("all sessions are looked at")

        monkeypatch.setattr(catalogue.Catalogue, "choose", never)
        for tenant in ("s1", "acme", "nobody"):
            own = [info for info in everyone if namespaces.tenant_of(info.session_id) == tenant]
            assert await at.engine.list_sessions(tenant=tenant) == (own, len(own))
            plain = [info for info in own if info.model == "plain"]
            assert await at.engine.list_sessions(tenant=tenant, model="plain") == (plain, len(plain))


@pytest.mark.stores("async", "sync")
async def test_every_order_and_filter_after_a_restart(disk: Disk, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(catalogue, "_AT_ONCE", 7)
    async with disk.engine(PROGRAMS, resident_rows=20) as at:
        await some_sessions(at, 60, seed=3)
        await at.step("s7", x(1))  # in the log, not yet in LMDB
        disk.kill()
    async with disk.engine(PROGRAMS, resident_rows=20) as at:
        await check_lists(at)
        assert at.inside.loaded() == [], "a list is no use of a session"
        at.clock.advance(5.0)
        for number in range(20):  # from here on these are in the table too, or gone
            await at.engine.session_info(f"s{number}")
        await at.step("s7", x(1))
        await at.engine.close_session("s8")
        await at.open("s0-new")
        await check_lists(at)


async def test_what_comes_and_goes_between_pages_is_not_told_twice() -> None:
    async with running() as at:
        await at.open(*[f"s{number:02}" for number in range(30)])
        page, total = await at.engine.list_sessions(order=Order.LAST_USED, limit=10)
        assert ([info.session_id for info in page], total) == ([f"s{number:02}" for number in range(10)], 30)
        at.clock.advance(1.0)
        await at.state("s03")  # told already; behind all others now
        await at.engine.close_session("s12")
        await at.open("s11a")
        found = [info.session_id for info in page]
        while page.next is not None:
            page, _ = await at.engine.list_sessions(order=Order.LAST_USED, limit=10, after=page.next)
            found += [info.session_id for info in page]
        assert found == [
            *(f"s{number:02}" for number in range(30) if number != 12),
            *("s03", "s11a"),
        ]


async def test_the_event_loop_goes_on_while_many_are_listed() -> None:
    async with running(resident_rows=8) as at:
        ids = (await at.engine.open_sessions("plain", count=8000)).session_ids
        for order in (Order.LAST_USED, Order.ID):
            listed = await begun(at.engine.list_sessions(order=order, limit=len(ids)))
            turns = 0
            while not listed.done():
                await asyncio.sleep(0)
                turns += 1
            page, _ = listed.result()
            assert [info.session_id for info in page] == sorted(ids)
            assert turns > len(ids) // 500


@pytest.mark.stores("async", "awaited")
async def test_what_was_made_for_a_caller_who_gave_up_is_there_for_the_next(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(catalogue, "_AT_ONCE", 1)
    made: list[object] = []
    make = catalogue.Catalogue._make

    async def counted(self: catalogue.Catalogue) -> object:
        made.append(self)
        return await make(self)

    monkeypatch.setattr(catalogue.Catalogue, "_make", counted)
    async with running() as at:
        await at.open(*[f"s{number:02}" for number in range(40)])
        for _ in range(3):
            listed = await begun(at.engine.list_sessions(order=Order.CREATED))
            await asyncio.sleep(0)
            listed.cancel()
        page, _ = await at.engine.list_sessions(order=Order.CREATED)
        assert (len(page), len(made)) == (40, 1)


async def close_all(at: Harness, limit: int, **wanted: Any) -> int:
    closed, place = await at.engine.close_matching(SessionFilter(**wanted), limit=limit)
    while place is not None:
        more, place = await at.engine.close_matching(SessionFilter(**wanted), limit=limit, place=place)
        closed += more
    return closed


@pytest.mark.parametrize("wanted", FILTERS)
async def test_closing_what_fits(wanted: dict[str, Any]) -> None:
    async with running(PROGRAMS, resident_rows=20) as at:
        await some_sessions(at, 30, seed=4)
        fitting, _ = await whole(at, 1000, **wanted)
        everyone, _ = await whole(at, 1000)
        assert await close_all(at, 4, **wanted) == len(fitting)
        left, _ = await whole(at, 1000)
        gone = {info.session_id for info in fitting}
        assert left == [info for info in everyone if info.session_id not in gone]


async def test_what_is_new_or_used_since_the_first_page_stays() -> None:
    async with running() as at:
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


async def test_a_session_in_use_is_not_idle_and_is_closed_by_its_prefix_after_its_step() -> None:
    async with running(threads=True) as at:
        await at.open("a", "b")
        answer = await at.begin_pass("a", x(1))
        at.clock.advance(60.0)
        assert await close_all(at, 10, idle_longer_s=30.0) == 1
        closing = await begun(close_all(at, 10, prefix="a"))
        at.hooks.open_gate()
        assert (await answer.only()).revision == 1
        assert await closing == 1


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


def test_ids_are_sorted_as_text_is_however_long_they_are() -> None:
    chance = random.Random(5)
    keys = ["".join(chance.choices("ab", k=chance.randint(1, 5))) for _ in range(50)]
    keys += ["x" * 95 + "".join(chance.choices("abé", k=chance.randint(0, 9))) for _ in range(200)]
    keys = sorted(set(keys), key=lambda _: chance.random())
    order = catalogue._sorted_places([key.encode() for key in keys])
    assert [keys[place] for place in order] == sorted(keys)
    assert catalogue._sorted_places([]).dtype == np.intp
