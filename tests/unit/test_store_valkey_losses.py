"""What a Valkey loses in silence is noticed: keys that are deleted or evicted, parts that are emptied; and keys of other types."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator, Iterator
from typing import Any

import pytest

from stepwell_server.clock import SystemClock
from stepwell_server.core.idle import IdleLimits
from stepwell_server.engine.sessions.transfer import ExistingPolicy, ImportOutcome, SessionRecord
from stepwell_server.errors import (
    ServerError,
    SessionLost,
    SessionNotFound,
    StateCorrupt,
    Unavailable,
)
from stepwell_server.store.base import ALL_KEPT, Batch, CommitResult, End, StoredSession, Tombstone
from stepwell_server.store.valkey.connection import url as urls
from stepwell_server.store.valkey.inspection import inspect
from stepwell_server.store.valkey.keys import LOST_STAMP
from stepwell_server.store.valkey.store import ValkeyStore
from support.engine.harness import Harness, running, x
from support.servers.valkey_servers import Valkey
from support.stores.changes import Windowed
from support.stores.disk_store import record
from support.stores.records import scan
from support.stores.valkey_store import end, opened, put, shared


@pytest.fixture(scope="module")
def valkey() -> Iterator[Valkey]:
    with Valkey() as server:
        yield server


def key(store: ValkeyStore, session_id: str) -> str:
    return store._keys.session(session_id).decode()


def mark(store: ValkeyStore, session_id: str) -> str:
    return store._keys.mark(store._keys.partition(session_id)).decode()


def part(store: ValkeyStore, session_id: str) -> list[str]:
    """All keys of the part that has a session."""
    prefix = key(store, session_id).partition("s:")[0]
    return [prefix + name for name in ("ids", "counts", "mark")]


def lost(session_id: str) -> StoredSession:
    return StoredSession(tombstone=Tombstone(session_id, End.LOST, 0.0), stamp=LOST_STAMP)


@pytest.mark.parametrize("known", [False, True])
async def test_a_session_that_is_listed_and_has_no_key_is_lost(valkey: Valkey, known: bool) -> None:
    async with shared(valkey.url(), 2) as (a, b):
        _, stamp = await put(a, [("s", record("s")), ("t", record("t"))], [0, 0])
        valkey.ask("DEL", key(a, "s"))
        found = await b.fetch(["s", "t", "never"], [stamp if known else 0, 0, 0])
        assert found[0] == lost("s")
        assert found[1].stamp == stamp
        assert found[2] == StoredSession()
        assert (await put(b, [("s", record("s"))], [0]))[0] == CommitResult(conflicts=frozenset({"s"}))
        assert (await b.fetch(["s"]))[0] == lost("s"), "it has not begun"
        health = await b.check()
        assert (health.lost_sessions, health.problem, b.damage) == (1, "", "")
        assert health.warning == "1 sessions were lost: their keys were deleted or evicted"
        assert (await a.check()).lost_sessions == 0, "it has not looked"
        assert [i for i, _ in await scan(a, limit=10)] == ["t"]


async def test_a_change_of_a_session_that_was_lost_is_a_conflict(valkey: Valkey) -> None:
    async with shared(valkey.url()) as (store,):
        _, stamp = await put(store, [("s", record("s"))], [0])
        valkey.ask("DEL", key(store, "s"))
        kept, _ = await put(store, [("s", record("s", 1))], [stamp])
        assert kept == CommitResult(conflicts=frozenset({"s"}))
        ended = await end(store, [Tombstone("s", End.CLOSED, 1.0)], [stamp])
        assert ended == CommitResult(conflicts=frozenset({"s"}))


async def test_an_id_that_was_lost_is_closed_or_put_back(valkey: Valkey) -> None:
    async with shared(valkey.url()) as (store,):
        await put(store, [("s", record("s")), ("t", record("t"))], [0, 0])
        for name in ("s", "t"):
            valkey.ask("DEL", key(store, name))
        kept, stamp = await put(store, [("t", record("t", 5))], [LOST_STAMP], anew=True)
        assert kept is ALL_KEPT
        assert (await store.fetch(["t"]))[0].stamp == stamp
        assert await store.apply(Batch(tombstones=[Tombstone("s", End.CLOSED, 2.0)])) is ALL_KEPT
        (found,) = await store.fetch(["s"])
        assert found.tombstone == Tombstone("s", End.CLOSED, 2.0)
        assert (await store.count(), await store.count_of("m")) == (1, 1)
        assert (await put(store, [("s", record("s"))], [found.stamp]))[0] is ALL_KEPT
        kept, _ = await put(store, [("u", record("u"))], [LOST_STAMP], anew=True)
        assert kept == CommitResult(conflicts=frozenset({"u"})), "it was not lost"


async def test_a_scan_of_the_store_finds_losses(valkey: Valkey) -> None:
    ids = [f"s{i}" for i in range(40)]
    async with shared(valkey.url("?tombstone_s=60"), 2) as (a, b):
        _, stamp = await put(a, [(i, record(i)) for i in ids], [0] * 40)
        await end(a, [Tombstone("s39", End.CLOSED, 1.0)], [stamp])
        for name in ids[:3]:
            valkey.ask("DEL", key(a, name))
        cursor, seen = "", list[str]()
        while True:
            page = await b.unused(cursor, limits=IdleLimits(1e-6), limit=500)
            seen += [each.decode() for each in page.heads.keys]
            if not (cursor := page.cursor):
                break
        assert sorted(seen) == sorted(ids[3:39])
        assert (await b.check()).lost_sessions == 3
        for each in await a.fetch(ids[:3]):
            assert each.tombstone is not None
            assert each.tombstone.end is End.LOST
        assert (await a.count(), await a.count_of("m")) == (36, 36)
        assert 0 < valkey.ask("PTTL", key(a, "s0")) <= 60_000, "that is forgotten some day too"
        valkey.ask("DEL", key(a, "s39"))  # its tombstone has run out
        assert (await a.fetch(["s39"]))[0] == StoredSession()
        assert (await put(a, [("s39", record("s39"))], [0]))[0] is ALL_KEPT


async def test_tenants_are_recounted_where_sessions_were_lost(valkey: Valkey) -> None:
    ids = [f"{tenant}\x1fs{i}" for tenant in ("a", "b") for i in range(30)]
    async with shared(valkey.url("?partitions=3"), 2) as (a, b):
        await put(a, [(i, record(i, batch_size=2)) for i in ids], [0] * 60)
        gone = ids[::7]
        for name in gone:
            valkey.ask("DEL", key(a, name))
        valkey.ask("RPUSH", key(a, gone[0]), "another type")
        for partition in range(3):
            await b.unused(f"{partition}:", limits=IdleLimits(1e-6), limit=500)
        left = {tenant: sum(i.startswith(tenant) for i in set(ids) - set(gone)) for tenant in ("a", "b")}
        for tenant, count in left.items():
            assert await a.count_of(f"{tenant}\x1f") == await a.count_of(f"{tenant}\x1fm") == count
            assert await a.count_of(f"\x1f\x1f{tenant}") == 2 * count
        assert await a.count_of("m") == await a.count_of("\x1f") == sum(left.values())


async def test_a_part_that_was_emptied_is_noticed_by_all(valkey: Valkey) -> None:
    async with shared(valkey.url("?partitions=4"), 2) as (a, b):
        ids = [f"s{i}" for i in range(20)]
        await put(a, [(i, record(i)) for i in ids], [0] * 20)
        gone = [i for i in ids if mark(a, i) == mark(a, "s0")]
        assert 0 < len(gone) < 20
        valkey.ask("DEL", *part(a, "s0"), *(key(a, i) for i in gone))
        for store in (a, b):
            health = await store.check()
            told = "1 of 4 partitions of the store were emptied: the sessions that they had are lost"
            assert (store.damage, health.warning, health.problem) == (told, told, "")
            assert [bool(store.damage_of(i)) for i in ids] == [i in gone for i in ids]
        late = await opened(valkey.url(f"?prefix={a._url.prefix}"))
        assert late.damage == "", "it was before"
        found = await inspect(urls.parse(valkey.url(f"?prefix={a._url.prefix}"), {}), "async")
        assert any("1 of the 4 partitions of the store were emptied" in w for w in found.findings.warnings)
        valkey.ask("DEL", *part(a, "s0"))
        again = await opened(valkey.url(f"?prefix={a._url.prefix}"))
        assert again.damage_of("s0"), "it was found just now"
        await late.close()
        await again.close()


async def test_no_session_begins_in_a_part_that_was_emptied_before_that_is_known(valkey: Valkey) -> None:
    async with shared(valkey.url()) as (store,):
        await put(store, [("s", record("s"))], [0])
        valkey.ask("DEL", *part(store, "s"), key(store, "s"))
        assert store.damage == ""
        assert (await put(store, [("s", record("s"))], [0]))[0] == CommitResult(conflicts=frozenset({"s"}))
        assert store.damage_of("s")
        assert (await put(store, [("s", record("s"))], [0]))[0] is ALL_KEPT, "whoever asks decides"


async def test_a_missing_session_of_an_emptied_part_is_lost(valkey: Valkey) -> None:
    async with shared(valkey.url()) as (store,):
        await put(store, [("s", record("s"))], [0])
        valkey.ask("DEL", *part(store, "s"), key(store, "s"))
        assert await store.fetch(["s"]) == [StoredSession()]
        assert store.damage_of("s")


async def test_a_mark_that_alone_is_gone_is_made_again(valkey: Valkey) -> None:
    async with shared(valkey.url(), 2) as (a, b):
        await put(a, [("s", record("s"))], [0])
        valkey.ask("DEL", mark(a, "s"))
        for store in (a, b):
            assert ((await store.check()).warning, store.damage) == ("", "")
        assert (await put(a, [("u", record("u"))], [0]))[0] is ALL_KEPT


async def test_a_store_whose_creation_was_interrupted_gets_its_marks(valkey: Valkey) -> None:
    async with shared(valkey.url()) as (a,):
        await put(a, [("s", record("s"))], [0])
        valkey.ask("HDEL", f"{a._url.prefix}{{meta}}store", "marked")
        for partition in range(64):
            valkey.ask("DEL", a._keys.mark(partition).decode())
        again = await opened(valkey.url(f"?prefix={a._url.prefix}"))
        assert again.damage == ""
        assert valkey.ask("EXISTS", mark(again, "s")) == 1
        assert (await put(again, [("t", record("t"))], [0]))[0] is ALL_KEPT
        await again.close()


# ---------------------------------------------------------------------------------------- the records before a change


async def with_changes(store: ValkeyStore, *session_ids: str) -> tuple[list[Windowed], int]:
    """Sessions whose last record is a change, and their stamp."""
    sessions = [Windowed(session_id) for session_id in session_ids]
    _, stamp = await put(store, [(each.session_id, each.whole) for each in sessions], [0] * len(sessions))
    for _ in range(2):
        puts = [(each.session_id, each.step()) for each in sessions]
        kept, stamp = await put(store, puts, [stamp] * len(sessions))
        assert kept is ALL_KEPT
    return sessions, stamp


async def test_a_session_whose_earlier_records_are_missing_is_lost(valkey: Valkey) -> None:
    async with shared(valkey.url(), 2) as (a, b):
        (s, t), stamp = await with_changes(a, "s", "t")
        valkey.ask("DEL", a._keys.earlier("s"))
        assert await b.fetch(["s"]) == [lost("s")]
        assert (await b.fetch(["t"]))[0].record == t.whole
        kept, _ = await put(a, [("s", s.step()), ("t", t.step())], [stamp] * 2)
        assert kept == CommitResult(conflicts=frozenset({"s"})), "nothing follows what is lost"
        assert (await a.fetch(["s", "t"]))[1].record == t.whole
        assert (await put(a, [("s", record("s"))], [0]))[0].conflicts == {"s"}, "nor does it begin again"
        assert [i for i, _ in await scan(a, limit=10)] == ["t"]
        assert (await b.check()).lost_sessions == 1


async def test_a_session_without_its_earlier_records_is_put_back_or_ends(valkey: Valkey) -> None:
    async with shared(valkey.url()) as (store,):
        (s, _, _, v), stamp = await with_changes(store, "s", "t", "u", "v")
        valkey.ask("DEL", *map(store._keys.earlier, "stuv"))
        assert await end(store, [Tombstone("t", End.CLOSED, 1.0)], [stamp]) == CommitResult(
            conflicts=frozenset({"t"})
        )
        assert await store.apply(Batch(tombstones=[Tombstone("t", End.CLOSED, 1.0)])) is ALL_KEPT
        assert (await store.fetch(["t"]))[0].tombstone == Tombstone("t", End.CLOSED, 1.0)
        kept, new = await put(store, [("s", s.replace())], [LOST_STAMP], anew=True)
        assert kept is ALL_KEPT
        assert (await put(store, [("s", s.step())], [new]))[0] is ALL_KEPT
        assert (await store.fetch(["s"]))[0].record == s.whole
        assert (await put(store, [("v", v.replace())], [stamp]))[0] is ALL_KEPT, "its server still had it"
        await store.unused(f"{store._keys.partition('u')}:", limits=IdleLimits(1e-6), limit=500)
        assert (await store.fetch(["u"]))[0].tombstone is not None


async def test_records_of_another_type_before_a_change_concern_one_session(valkey: Valkey) -> None:
    async with shared(valkey.url()) as (store,):
        (s, t), stamp = await with_changes(store, "s", "t")
        valkey.ask("SET", store._keys.earlier("t"), "x")
        kept, _ = await put(store, [("s", s.step()), ("t", t.step())], [stamp] * 2)
        assert kept == CommitResult(conflicts=frozenset({"t"}))
        assert [each.record for each in await store.fetch(["s", "t"])] == [s.whole, b""]


# ---------------------------------------------------------------------------------------------- keys of another type


async def test_a_key_of_another_type_is_a_damaged_session_and_nothing_more(
    valkey: Valkey, caplog: pytest.LogCaptureFixture
) -> None:
    async with shared(valkey.url()) as (store,):
        ids = [f"s{i}" for i in range(10)]
        _, stamp = await put(store, [(i, record(i)) for i in ids], [0] * 10)
        valkey.ask("DEL", key(store, "s3"))
        valkey.ask("RPUSH", key(store, "s3"), "x")
        found = await store.fetch(ids)
        assert [each.record == b"" for each in found] == [i == "s3" for i in ids]
        (line,) = caplog.records
        assert "has another type" in line.message
        assert line.__dict__["fields"] == {"key": key(store, "s3")}
        assert [i for i, header in await scan(store, limit=20) if header is None] == ["s3"]
        assert len((await store.heads(limit=20)).keys) == 10
        assert (await store.fetch(["s3"], [stamp]))[0].record == b""
        await store.touch(ids, [stamp] * 10)
        kept, second = await put(store, [(i, record(i, 1)) for i in ids], [stamp] * 10)
        assert kept == CommitResult(conflicts=frozenset({"s3"}))
        assert (await put(store, [("s3", record("s3"))], [0]))[0] == CommitResult(conflicts=frozenset({"s3"}))
        assert await store.count() == 10
        assert await end(store, [Tombstone(i, End.CLOSED, 1.0) for i in ids[2:4]], [second, 0]) is ALL_KEPT
        assert await store.count() == 8


@pytest.mark.parametrize("name", ["ids", "counts"])
async def test_a_list_or_count_of_another_type_concerns_one_part(valkey: Valkey, name: str) -> None:
    async with shared(valkey.url("?partitions=2")) as (store,):
        ids = [f"s{i}" for i in range(20)]
        _, stamp = await put(store, [(i, record(i)) for i in ids], [0] * 20)
        mine = [i for i in ids if mark(store, i) == mark(store, "s0")]
        wrong = mark(store, "s0").removesuffix("mark") + name
        valkey.ask("DEL", wrong)
        valkey.ask("SET", wrong, "x")
        left = len(ids) - len(mine)
        assert await store.count() == (left if name == "ids" else 20)
        assert await store.count_of("m") == (20 if name == "ids" else left)
        assert len(await scan(store, limit=50)) == (left if name == "ids" else 20)
        await store.unused("", limits=IdleLimits(1e-6), limit=100)
        kept, second = await put(store, [(i, record(i, 1)) for i in ids], [stamp] * 20)
        assert kept is ALL_KEPT
        assert await end(store, [Tombstone("s0", End.CLOSED, 1.0)], [second]) is ALL_KEPT
        new = next(f"n{i}" for i in range(99) if mark(store, f"n{i}") == mark(store, "s0"))
        if name == "counts":
            assert (await put(store, [(new, record(new))], [0]))[0] is ALL_KEPT
        else:
            with pytest.raises(Unavailable, match="it refuses: WRONGTYPE"):
                await put(store, [(new, record(new))], [0])
        assert (await store.fetch([new]))[0].record == (None if name == "ids" else record(new))


# ------------------------------------------------------------------------------------------------------- whole servers


@contextlib.asynccontextmanager
async def engines(valkey: Valkey) -> AsyncIterator[tuple[Harness, Harness]]:
    """Two servers on a new store."""
    clock: Any = SystemClock()
    async with (
        shared(valkey.url(), 2, clock=clock) as (a, b),
        running(store=a, clock=clock) as first,
        running(store=b, clock=clock) as second,
    ):
        yield first, second


CALLS: dict[str, Any] = {
    "step": lambda at: at.step("a", x(1)),
    "state": lambda at: at.state("a"),
    "info": lambda at: at.engine.session_info("a"),
    "open": lambda at: at.engine.open_session("plain", session_id="a"),
    "open many": lambda at: at.engine.open_sessions("plain", session_ids=["b", "a"]),
    "fork": lambda at: at.engine.fork("a"),
    "fork to": lambda at: at.engine.fork("other", new_session_id="a"),
}


@pytest.mark.parametrize("call", list(CALLS))
@pytest.mark.parametrize("where", ["first", "second"])
async def test_calls_on_a_lost_session_report_the_loss(valkey: Valkey, call: str, where: str) -> None:
    async with engines(valkey) as (first, second):
        await first.open("a", "other")
        await first.step("a", x(1))
        valkey.ask("DEL", key(first.store, "a"))
        at = first if where == "first" else second
        for _ in range(2):
            with pytest.raises(
                SessionLost, match="session 'a' was lost by the store: it was neither closed nor expired"
            ):
                await CALLS[call](at)
        assert (await second.step("other", x(1))).revision == 1


@pytest.mark.parametrize("many", [False, True])
@pytest.mark.parametrize("where", ["first", "second"])
async def test_an_id_that_was_lost_is_free_when_it_was_closed(valkey: Valkey, where: str, many: bool) -> None:
    async with engines(valkey) as (first, second):
        await first.open("a")
        await first.step("a", x(1))
        valkey.ask("DEL", key(first.store, "a"))
        at = first if where == "first" else second
        if many and where == "second":
            assert await at.engine.close_sessions(["a"]) == 1
        else:
            assert await at.engine.close_session("a", request_id=5) is False
            assert await at.engine.close_session("a", request_id=5) is True
        with pytest.raises(SessionNotFound, match="session 'a' was closed"):
            await second.step("a", x(1))
        assert not (await second.engine.open_session("plain", session_id="a")).resumed
        assert (await first.step("a", x(1), expected=1)).revision == 2


async def test_a_session_that_was_lost_is_brought_back_from_an_export(valkey: Valkey) -> None:
    async with engines(valkey) as (first, second):
        await first.open("a")
        await first.step("a", x(1))
        (saved,) = await first.engine.export_sessions(["a"], deadline=float("inf"))
        assert not isinstance(saved, ServerError)
        valkey.ask("DEL", key(first.store, "a"))
        (why,) = await second.engine.export_sessions(["a"], deadline=float("inf"))
        assert isinstance(why, SessionLost)
        arriving = [SessionRecord("a", "a", bytes(saved))]
        assert await second.engine.import_sessions(arriving, ExistingPolicy.REFUSE) == [
            ImportOutcome.IMPORTED
        ]
        assert (await first.step("a", x(1), expected=1)).revision == 2
        assert await first.store.count_of("plain") == 1


async def test_no_named_session_restarts_where_a_part_was_emptied(valkey: Valkey) -> None:
    async with engines(valkey) as (first, second):
        await first.open("a")
        await first.step("a", x(1))
        store: ValkeyStore = first.store
        valkey.ask("DEL", *part(store, "a"), key(store, "a"))
        with pytest.raises(StateCorrupt, match="the store, which has lost sessions: 1 of 64 partitions"):
            await second.engine.open_session("plain", session_id="a")
        with pytest.raises(StateCorrupt, match="so it is not opened again"):
            await second.step("a", x(1))
        elsewhere = next(f"n{i}" for i in range(999) if mark(store, f"n{i}") != mark(store, "a"))
        await second.open(elsewhere)
        made = await second.engine.open_session("plain")
        assert made.session.revision == 0, "whose id nobody had"
        await first.store.check()
        with pytest.raises(SessionLost):  # it had it in its table
            await first.step("a", x(1))


async def test_a_session_whose_key_is_of_another_type_can_be_closed(valkey: Valkey) -> None:
    async with engines(valkey) as (first, second):
        await first.open("a", "b")
        await first.step("a", x(1))
        valkey.ask("DEL", key(first.store, "a"))
        valkey.ask("SADD", key(first.store, "a"), "x")
        for at in (first, second):
            with pytest.raises(StateCorrupt, match="session 'a'"):
                await at.step("a", x(1))
        with pytest.raises(StateCorrupt):
            await second.engine.open_session("plain", session_id="a")
        answers = await first.submit(["a", "b"], x(2)).all()
        assert [type(each).__name__ for each in answers] == ["StateCorrupt", "Answer"]
        listed = {info.session_id for info in (await second.engine.list_sessions())[0]}
        assert "b" in listed
        assert await second.engine.close_session("a") is False
        assert not (await second.engine.open_session("plain", session_id="a")).resumed
