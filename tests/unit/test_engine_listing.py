"""Lists and closes by every filter, resumes of many sessions, and generated ids."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest

from stepwell_server.core import namespaces
from stepwell_server.core.scheduler import LoopQueue
from stepwell_server.engine.api import OpenManyResult, SessionFilter, SessionInfo
from stepwell_server.engine.sessions import read
from stepwell_server.engine.sessions.directory import MAX_ID_LENGTH, IdMaker, require_session_id, shown
from stepwell_server.engine.threads import Pieces
from stepwell_server.errors import InvalidInput, ModelNotFound, SessionExists
from stepwell_server.store.heads import Heads
from stepwell_server.store.in_process import InProcessStore
from stepwell_server.store.memory import MemoryStore
from support.engine.fake_executor import PLAIN, RICH
from support.engine.harness import Harness, fails, running, x
from support.engine.versions import serving, weights
from support.stores.durable import Disk, start_task
from support.stores.fake_shared_store import RemoteStore
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
    async with disk.engine(PROGRAMS, resident_rows=20, is_killed=True) as at:
        await some_sessions(at, 60, seed=3)
        await at.step("s7", x(1))  # in the log, not yet in LMDB
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
async def test_the_event_loop_runs_while_many_sessions_are_listed(at: Harness) -> None:
    ids = (await at.engine.open_sessions("plain", count=8000)).session_ids
    listed = await start_task(at.engine.list_sessions(limit=len(ids)))
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
async def test_closing_by_a_filter_closes_matching_sessions(wanted: dict[str, Any], at: Harness) -> None:
    await some_sessions(at, 30, seed=4)
    fitting, _ = await whole(at, 1000, **wanted)
    everyone, _ = await whole(at, 1000)
    assert await close_all(at, 4, **wanted) == len(fitting)
    left, _ = await whole(at, 1000)
    gone = {info.session_id for info in fitting}
    assert left == [info for info in everyone if info.session_id not in gone]


async def test_sessions_that_are_new_or_used_since_the_first_page_stay(at: Harness) -> None:
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
    closing = await start_task(close_all(at, 10, prefix="a"))
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


async def test_lists_by_version_or_label() -> None:
    programs = {"plain@1": weights(1), "plain@2": weights(2)}
    async with serving(programs, resident_rows=2) as at:
        await at.engine.set_label("plain", "old", 1)
        await at.open("a", "c", "e", model="plain@1")
        await at.open("b", "d", "f", model="plain")  # these follow the default
        for wanted, expected in (("plain@1", "ace"), ("plain:old", "ace"), ("plain@2", "bdf")):
            for limit in (1, 2, 100):
                found, totals = await whole(at, limit, model=wanted)
                assert ("".join(info.session_id for info in found), totals) == (expected, {3})
        assert [info.session_id for info in (await whole(at, 1, model="plain@2", prefix="d"))[0]] == ["d"]
        for unknown in ("plain@9", "plain:new", "other@1"):
            with pytest.raises(ModelNotFound):
                await at.engine.list_sessions(model=unknown)
        with pytest.raises(InvalidInput, match="model must be"):
            await at.engine.list_sessions(model="plain@first")
        await at.engine.unload_version("plain", 1, force=True)
        assert [info.session_id for info in (await whole(at, 2, model="plain@1"))[0]] == [*"ace"]
        assert await close_all(at, 2, model="plain@1") == 3
        found, totals = await whole(at, 2)
        assert ([info.session_id for info in found], totals) == ([*"bdf"], {3})


@IN_PROCESS  # Valkey is looked through in parts
async def test_sessions_that_end_together_are_reported_together() -> None:
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


async def resume(at: Harness, ids: Sequence[str], **fields: Any) -> OpenManyResult:
    return await at.engine.open_sessions("plain", session_ids=ids, resume=True, **fields)


async def test_live_sessions_are_taken_up_where_they_are_and_the_others_opened(at: Harness) -> None:
    await at.open("a", "b")
    await at.step("a", x(1))
    await at.step("a", x(1))
    await at.step("b", x(1))
    opened = await resume(at, ["b", "new", "a"])
    assert list(opened.session_ids) == ["b", "new", "a"]
    assert opened.revisions.tolist() == opened.positions.tolist() == [1, 0, 2]
    assert opened.resumed is not None
    assert opened.resumed.tolist() == [True, False, True]
    assert opened.versions is None
    assert (await at.step("a", x(1))).revision == 3
    assert (await at.step("new", x(1))).revision == 1


async def test_all_of_them_may_be_new_or_live(at: Harness) -> None:
    assert (await resume(at, ["a", "b"])).resumed is None
    again = await resume(at, ["a", "b"])
    assert again.resumed is not None
    assert again.resumed.all()


async def test_the_same_request_again_says_what_it_opened(at: Harness) -> None:
    """An answer was lost: what this very request opened was not there before."""
    await at.open("a")
    first = await resume(at, ["a", "b"], request_id=7)
    again = await resume(at, ["a", "b"], request_id=7)
    assert first.resumed is not None
    assert again.resumed is not None
    assert first.resumed.tolist() == again.resumed.tolist() == [True, False]
    assert (await at.engine.list_sessions())[1] == 2


@pytest.mark.engine({"plain": PLAIN, "rich": RICH})
async def test_sessions_that_cannot_be_resumed_are_named_and_nothing_is_opened(at: Harness) -> None:
    await at.open("a")
    await at.engine.open_session("rich", session_id="b")
    await at.engine.open_session("plain", session_id="c", batch_size=3)
    caught = await fails(resume(at, ["a", "new", "b", "c"]), SessionExists)
    assert str(caught) == (
        "session_ids must name new sessions, or live ones to resume of model 'plain' with batch_size 1;"
        " session 'b' (index 2) has model 'rich', version 1, and batch_size 1;"
        " session 'c' (index 3) has model 'plain', version 1, and batch_size 3"
    )
    assert (await at.engine.list_sessions())[1] == 3


async def test_without_ids_there_is_nothing_to_resume(at: Harness) -> None:
    await fails(
        at.engine.open_sessions("plain", count=2, resume=True),
        InvalidInput,
        r"^resume must come with session_ids; got none",
    )


async def test_an_ended_session_reopens_with_a_revision_of_its_own(at: Harness) -> None:
    await at.open("a", "b")
    await at.step("a", x(1))
    await at.engine.close_session("a")
    opened = await resume(at, ["a", "b"])
    assert opened.resumed is not None
    assert opened.resumed.tolist() == [False, True]
    assert opened.positions.tolist() == [0, 0]
    assert opened.revisions[0] > 1, "no handle of the closed one can step it"


@pytest.mark.stores("fake_shared")
async def test_what_another_server_changed_is_taken_up_as_it_is_there(
    first: Harness, second: Harness
) -> None:
    await first.open("a", "b")
    await first.step("a", x(1))
    assert (await second.step("a", x(1))).revision == 2
    opened = await resume(first, ["b", "a", "c"])
    assert opened.revisions.tolist() == [0, 2, 0]
    assert (await second.step("c", x(1))).revision == 1


@pytest.mark.stores("fake_shared")
async def test_one_that_another_server_opens_meanwhile_is_resumed(first: Harness, second: Harness) -> None:
    second.store.commits_held = True
    slow = await start_task(resume(second, ["x", "a", "y"]))
    await second.store.until("commit")
    await first.open_and_step("a", x(1))
    second.store.release()
    opened = await slow
    assert opened.resumed is not None
    assert opened.resumed.tolist() == [False, True, False]
    assert opened.revisions.tolist() == [0, 1, 0]


async def test_calls_at_the_same_time_open_each_session_once(at: Harness) -> None:
    ids = [f"s{number}" for number in range(40)]
    every = await asyncio.gather(*(resume(at, ids[start:]) for start in range(0, 40, 10)))
    made = np.zeros(40, np.intp)
    for start, opened in zip(range(0, 40, 10), every, strict=True):
        made[start:] += 1 if opened.resumed is None else ~opened.resumed
    assert made.tolist() == [1] * 40


NAMESPACES = ["", "acme\x1f"]
FOREIGN = "s-00000000-" + "A" * 22


@pytest.fixture
def ids() -> IdMaker:
    return IdMaker(RemoteStore(MemoryStore()))


@pytest.mark.parametrize("namespace", NAMESPACES)
@pytest.mark.parametrize("request_id", [0, 5])
async def test_ids_of_one_call_lie_together_and_tell_nothing_of_each_other(
    ids: IdMaker, namespace: str, request_id: int
) -> None:
    made = await ids.make_many(
        request_id, 4096, Pieces(LoopQueue(asyncio.get_running_loop().call_soon)), namespace=namespace
    )
    assert made == sorted(set(made))
    (common,) = {one[:-22] for one in made}
    assert common.startswith(f"{namespace}s-")
    parts = [one[-22:] for one in made]
    # Of 4,096 random numbers of 128 bits no two are alike in their first 66 bits, or in their last 62: an
    # exception is to be expected once in 100,000 million runs.
    assert len({part[:11] for part in parts}) == len({part[-11:] for part in parts}) == 4096
    assert all(ids.is_generated(one) and not ids.is_from_elsewhere(one) for one in made)
    assert all(len(one) <= MAX_ID_LENGTH for one in made)


@pytest.mark.parametrize("namespace", NAMESPACES)
async def test_ids_follow_from_the_request_the_namespace_and_the_sources(
    ids: IdMaker, namespace: str
) -> None:
    pieces = Pieces(LoopQueue(asyncio.get_running_loop().call_soon))

    async def made(
        maker: IdMaker = ids,
        request_id: int = 5,
        count: int = 3,
        sources: Sequence[str] = (),
        whose: str = namespace,
    ) -> set[str]:
        one = maker.make(request_id, " ".join(sources), namespace=whose)
        return {one, *await maker.make_many(request_id, count, pieces, sources, namespace=whose)}

    first = await made()
    assert await made() == first
    assert first < await made(count=9)
    others = [
        await made(request_id=6),
        await made(whose="zeta\x1f"),
        await made(whose="5\x1f"),
        await made(sources=["a"]),
        await made(sources=["a", "b"]),
        await made(IdMaker(RemoteStore(MemoryStore()))),
        await made(request_id=0),
        await made(request_id=0),
    ]
    assert len(set().union(first, *others)) == 4 * (1 + len(others))


@pytest.mark.parametrize("namespace", NAMESPACES)
def test_ids_of_earlier_releases_are_known(ids: IdMaker, namespace: str) -> None:
    for made in (FOREIGN, f"{FOREIGN}-00ff", f"{FOREIGN}abcd"):
        assert ids.is_generated(namespace + made)
        assert ids.is_from_elsewhere(namespace + made)
    for chosen in (
        "s-00000000-short",
        f"{FOREIGN}abc",
        f"{FOREIGN}-00fg",
        "user",
        f"acme\x1f{namespace}{FOREIGN}x",
    ):
        assert not ids.is_generated(namespace + chosen)


@pytest.mark.parametrize("namespace", NAMESPACES)
def test_the_limits_are_those_of_what_the_caller_says(namespace: str) -> None:
    require_session_id("session_id", namespace + "x" * MAX_ID_LENGTH)
    for bad in ("", " a", "a ", "a\nb", "x" * (MAX_ID_LENGTH + 1), "a\x1fb"):
        if not namespace and "\x1f" in bad:
            continue  # what a caller without a tenant says so is in nobody's namespace: `namespaces.inner`
        with pytest.raises(InvalidInput, match=r"^session_id must be 1 to 256 printable"):
            require_session_id("session_id", namespace + bad)
    assert shown(namespace + "x" * 300) == f"300 characters, {'x' * 32!r}..."
