"""The store on Valkey does what `base.Store` says, and the same as the store that tests of the engine use in its place."""

from __future__ import annotations

import asyncio
import dataclasses
import random
from collections.abc import Iterator

import numpy as np
import pytest

from stepwell_server.core.idle import IdleLimits
from stepwell_server.core.namespaces import SEPARATOR
from stepwell_server.engine.eager import Rest, finish, start
from stepwell_server.errors import StateCorrupt, Unavailable
from stepwell_server.store import counts
from stepwell_server.store.base import (
    ALL_KEPT,
    Batch,
    CommitResult,
    DocumentsCorrupt,
    End,
    Store,
    StoredSession,
    StoreError,
    Tombstone,
    new_stamp,
)
from stepwell_server.store.memory import MemoryStore
from stepwell_server.store.record import JoinedPuts, decode_header
from stepwell_server.store.valkey.commits import Part, outcome_of
from stepwell_server.store.valkey.connection.requests import Request
from stepwell_server.store.valkey.scripts import UNDONE_MS
from stepwell_server.store.valkey.store import ValkeyStore
from support import samples
from support.clock import ManualClock
from support.servers.valkey_servers import Valkey, paused, until
from support.stores.disk_store import record, template
from support.stores.fake_shared_store import RemoteStore
from support.stores.records import scan
from support.stores.valkey_store import end, fresh_prefix, opened, put, shared, stamps, time_limit

TENANT = f"acme{SEPARATOR}"


@pytest.fixture(scope="module")
def valkey() -> Iterator[Valkey]:
    with Valkey(append="") as server:
        yield server


def conflict(*session_ids: str) -> CommitResult:
    return CommitResult(conflicts=frozenset(session_ids))


async def test_a_session_begins_changes_and_ends(valkey: Valkey) -> None:
    async with shared(valkey.url(), 2) as (a, b):
        kept, first = await put(a, [("s", record("s"))], [0])
        assert kept is ALL_KEPT
        kept, second = await put(b, [("s", record("s", 1))], [first])
        assert kept is ALL_KEPT
        (found,) = await a.fetch(["s"])
        assert (bytes(found.record or b""), found.stamp, found.is_known) == (record("s", 1), second, False)
        assert 0 <= found.idle_s < 60
        (known,) = await a.fetch(["s"], [second])
        assert (known.record, known.stamp, known.is_known) == (None, second, True)
        assert (await a.fetch(["s"], [first]))[0].stamp == second
        stone = Tombstone("s", End.CLOSED, 12.5, (7,), 1)
        assert await end(a, [stone], [second]) is ALL_KEPT
        assert _plain(await b.fetch(["s", "never"])) == _plain(
            [StoredSession(tombstone=stone), StoredSession()]
        )
        assert await b.count() == await b.count_of("m") == 0


async def test_a_commit_needs_no_task_to_be_on_its_way(valkey: Valkey) -> None:
    async with shared(valkey.url(), 1) as (a,):
        _, first = await put(a, [("lone", record("lone"))], [0])
        follows, made = stamps(first), stamps(new_stamp())
        committing = a.apply(Batch(puts=[("lone", record("lone", 1))], follows=follows, stamps=made))
        # the event loop has had no turn yet
        until(lambda: _reads(valkey, "lone", int(made[0])), "it does not come", valkey.log)
        assert await committing is ALL_KEPT


def _reads(valkey: Valkey, session_id: str, stamp: int) -> bool:
    (key,) = valkey.ask("KEYS", f"*s:{session_id}")
    return bool(valkey.ask("GETRANGE", key, 1, 8) == stamp.to_bytes(8, "little"))


async def test_a_change_that_follows_another_record_is_a_conflict(valkey: Valkey) -> None:
    async with shared(valkey.url(), 2) as (a, b):
        _, first = await put(a, [("s", record("s")), ("t", record("t"))], [0, 0])
        _, second = await put(a, [("s", record("s", 1))], [first])
        lost, _ = await put(b, [("s", record("s", 1, content=9)), ("t", record("t", 1))], [first, first])
        assert lost == conflict("s")
        assert (await put(b, [("gone", record("gone", 1))], [first]))[0] == conflict("gone")
        assert (await put(b, [("s", record("s"))], [0]))[0] == conflict("s")
        assert bytes((await b.fetch(["s"]))[0].record or b"") == record("s", 1)
        assert await end(b, [Tombstone("s", End.CLOSED, 0.0)], [first]) == conflict("s")
        assert await end(b, [Tombstone("never", End.CLOSED, 0.0)], [0]) == conflict("never")
        assert await end(b, [Tombstone("s", End.CLOSED, 0.0)], [0]) is ALL_KEPT
        assert (await put(b, [("s", record("s", 2))], [second]))[0] == conflict("s")


async def test_a_batch_that_is_sent_again_was_kept(valkey: Valkey) -> None:
    async with shared(valkey.url(), 2) as (a, b):
        _, first = await put(a, [("s", record("s"))], [0])
        assert (await put(a, [("s", record("s"))], [0], first))[0] is ALL_KEPT
        _, second = await put(a, [("s", record("s", 1))], [first])
        assert (await put(a, [("s", record("s", 1))], [first], second))[0] is ALL_KEPT
        assert await a.count() == await a.count_of("m") == 1
        await put(b, [("s", record("s", 2))], [second])
        assert (await put(a, [("s", record("s", 1))], [first], second))[0] == conflict("s")


def test_a_conflict_behind_an_answer_that_was_lost_may_be_ones_own() -> None:
    """The first attempt may have been kept, and have been followed by another change since."""
    request = Request(0, ())
    request.reply, request.is_answered = [1], True
    assert outcome_of([Part(request, ["s"])], frozenset(), documents_kept=False) == conflict("s")
    request.is_sent = True
    unknown = CommitResult(unknown=frozenset({"s"}))
    assert outcome_of([Part(request, ["s"])], frozenset(), documents_kept=False) == unknown


async def test_an_id_can_be_reopened(valkey: Valkey) -> None:
    async with shared(valkey.url()) as (store,):
        _, first = await put(store, [("s", record("s"))], [0])
        await end(store, [Tombstone("s", End.EXPIRED, 1.0)], [first])
        (gone,) = await store.fetch(["s"])
        assert gone.stamp not in (0, first)
        # an opening that was sent before it ended, and comes now, does not bring it back
        assert (await put(store, [("s", record("s"))], [0]))[0] == conflict("s")
        assert (await put(store, [("s", record("s", 5))], [gone.stamp], anew=True))[0] is ALL_KEPT
        assert (await put(store, [("s", record("s", 5))], [gone.stamp], anew=True))[0] == conflict("s")
        (found,) = await store.fetch(["s"])
        assert found.tombstone is None
        assert await store.count() == 1
        # one that was only remembered is forgotten, one that is there is not
        await store.apply(Batch(tombstones=[Tombstone("old", End.EXPIRED, 2.0)]))
        assert (await store.fetch(["old"]))[0].tombstone == Tombstone("old", End.EXPIRED, 2.0)
        await store.apply(Batch(forgets=["old", "s"]))
        assert [(each.record is None, each.tombstone) for each in await store.fetch(["old", "s"])] == [
            (True, None),
            (False, None),
        ]


async def test_deleting_without_a_tombstone_leaves_nothing(valkey: Valkey) -> None:
    async with shared(valkey.url()) as (store,):
        _, stamp = await put(store, [("a", record("a")), ("b", record("b"))], [0, 0])
        assert await store.apply(Batch(deletes=["a", "no"], delete_follows=stamps(stamp, 0))) is ALL_KEPT
        assert await store.apply(Batch(deletes=["b"], delete_follows=stamps(stamp + 1))) == conflict("b")
        assert [each.record is None for each in await store.fetch(["a", "b"])] == [True, False]
        assert (await store.count(), [name for name, _ in await scan(store, limit=9)]) == (1, ["b"])


async def test_what_comes_late_of_an_opening_that_was_undone_begins_nothing(valkey: Valkey) -> None:
    """Whether its sessions were there when it was undone, or not yet, or where another one had ended."""
    async with shared(valkey.url(), 2) as (a, b):
        await _undone_before_it_comes(a, b)
    fake = RemoteStore(MemoryStore())
    await _undone_before_it_comes(fake, fake.replica())


async def _undone_before_it_comes(a: ValkeyStore | RemoteStore, b: ValkeyStore | RemoteStore) -> None:
    await put(a, [("old", record("old"))], [0])
    await end(a, [Tombstone("old", End.CLOSED, 1.0)], [0])
    (gone,) = await a.fetch(["old"])
    _, stamp = await put(a, [("there", record("there"))], [0])
    ids, follows = ["there", "late", "old"], [0, 0, gone.stamp]
    undoing = Batch(deletes=ids, undoes=ids, delete_follows=stamps(stamp, stamp, stamp))
    assert await a.apply(undoing) == conflict("late", "old")
    late = [(session_id, record(session_id)) for session_id in ids]
    assert (await put(a, late, follows, stamp, anew=True))[0] == conflict(*ids)
    assert [each.record for each in await b.fetch(ids)] == [None] * 3
    assert await b.count() == await b.count_of("m") == 0
    # others are not kept from it
    assert (await put(b, late, follows, anew=True))[0] is ALL_KEPT


async def test_what_is_known_of_an_opening_that_was_undone_goes_by_itself(valkey: Valkey) -> None:
    async with shared(valkey.url(), 1) as (a,):
        stamp = new_stamp()
        await a.apply(Batch(deletes=["s"], undoes=["s"], delete_follows=stamps(stamp)))
        (key,) = [key for key in valkey.ask("KEYS", "*u:*") if key.endswith(stamp.to_bytes(8, "little"))]
        assert 0 < valkey.ask("PTTL", key) <= UNDONE_MS


async def test_many_records_of_all_sizes(valkey: Valkey) -> None:
    async with shared(valkey.url()) as (store,):
        ids = [f"s{i}" for i in range(1500)]
        begun = JoinedPuts(
            [template(ids[:700]), [(i, record(i, size=n % 90)) for n, i in enumerate(ids[700:])]]
        )
        kept, first = await put(store, begun, [0] * 1500)
        assert kept is ALL_KEPT
        found = await store.fetch(ids)
        assert [bytes(each.record or b"") for each in found] == [bytes(stored) for _, stored in begun]
        # of one size, and laid out together; then of several
        some = template(ids[:300], revision=1)
        assert (await put(store, some, [first] * 300))[0] is ALL_KEPT
        mixed = JoinedPuts([template(ids[700:1400], 1), [(ids[1400], record(ids[1400], 1, size=61))]])
        kept, second = await put(store, mixed, [first] * 701)
        assert kept is ALL_KEPT
        found = await store.fetch(ids[700:1401], [second] * 701)
        assert all(each.is_known for each in found)
        found = await store.fetch(ids[:300] + ids[700:1401])
        assert [bytes(each.record or b"") for each in found] == [bytes(r) for _, r in [*some, *mixed]]


async def test_a_frame_of_large_records(valkey: Valkey) -> None:
    async with shared(valkey.url()) as (store,):
        ids = [f"s{i}" for i in range(40)]
        _, first = await put(store, template(ids, size=5000), [0] * 40)
        assert (await put(store, template(ids, 1, size=5000), [first] * 40))[0] is ALL_KEPT
        found = await store.fetch(ids)
        assert [bytes(each.record or b"") for each in found] == [
            bytes(r) for _, r in template(ids, 1, size=5000)
        ]
        # more than one script may have
        kept, _ = await put(store, [(i, record(i, 2, size=3_000_000)) for i in ids[:3]], [found[0].stamp] * 3)
        assert kept is ALL_KEPT
        assert {
            decode_header(i, each.record or b"").revision
            for i, each in zip(ids, await store.fetch(ids[:3]), strict=False)
        } == {2}


async def test_more_than_one_answer_may_have(valkey: Valkey) -> None:
    async with shared(valkey.url()) as (store,):
        ids = [f"s{i}" for i in range(12)]
        stored = [(i, record(i, size=2_000_000 if n % 3 else 9)) for n, i in enumerate(ids)]
        _, stamp = await put(store, stored, [0] * 12)
        found = await store.fetch([*ids, "never"], [stamp if n == 4 else 0 for n in range(13)])
        wanted: list[bytes | None] = [stored for _, stored in stored]
        wanted[4] = None
        assert [each.record for each in found] == [*wanted, None]
        assert found[4].is_known


async def test_a_frame_in_which_some_conflict(valkey: Valkey) -> None:
    async with shared(valkey.url(), 2) as (a, b):
        ids = [f"s{i}" for i in range(256)]
        _, first = await put(a, template(ids), [0] * 256)
        _, other = await put(b, [(i, record(i, 1)) for i in ids[::3]], [first] * len(ids[::3]))
        lost, _ = await put(a, template(ids, 1), [first] * 256)
        assert lost == conflict(*ids[::3])
        assert {each.stamp for each in (await b.fetch(ids))[::3]} == {other}


async def test_what_a_template_is_filled_with_later_does_not_matter(valkey: Valkey) -> None:
    async with shared(valkey.url()) as (store,):
        ids = ["a", "b"]
        _, first = await put(store, template(ids), [0, 0])
        puts = template(ids, 1)
        wanted = [bytes(stored) for _, stored in puts]
        task = asyncio.ensure_future(put(store, puts, [first, first]))
        await asyncio.sleep(0)
        puts.together[:] = bytes(len(puts.together))
        assert (await task)[0] is ALL_KEPT
        assert [bytes(each.record or b"") for each in await store.fetch(ids)] == wanted


async def test_a_batch_must_say_its_stamps(valkey: Valkey) -> None:
    async with shared(valkey.url()) as (store,):
        with pytest.raises(ValueError, match="follows must have one stamp for each of 1 puts; it has 0"):
            await store.apply(Batch(puts=[("a", record("a"))]))
        assert (await store.fetch(["a"]))[0].record is None


async def test_sessions_in_the_order_of_their_ids(valkey: Valkey) -> None:
    clock = ManualClock()
    url = valkey.url(f"?prefix={fresh_prefix()}")
    store = await opened(url, clock=clock)
    try:
        ids = sorted(
            [
                f"{chance.choice('abc')}{i}é\U0001f600"[: chance.randint(2, 9)] + str(i)
                for chance in [random.Random(5)]
                for i in range(700)
            ]
        )
        for at in range(0, len(ids), 400):
            some = ids[at : at + 400]
            await put(store, [(i, record(i)) for i in some], [0] * len(some))
        for after, prefix, limit in [
            ("", "", 9),
            ("", "", 2000),
            ("b", "", 50),
            ("", "b1", 2000),
            ("b1", "b", 300),
            ("a", "b", 7),
            ("z", "", 3),
            ("c", "b", 3),
        ]:
            wanted = [i for i in ids if i > after and i.startswith(prefix)][:limit]
            found = await scan(store, after=after, prefix=prefix, limit=limit)
            assert [name for name, _ in found] == wanted
            if not prefix:
                assert (await store.heads(after=after, limit=limit)).keys == [i.encode() for i in wanted]
        assert await store.count() == 700
        found = await scan(store, limit=1)
        assert found[0][1] is not None
        assert clock.now() - 60 < found[0][1].last_used <= clock.now()
    finally:
        await store.close()


async def test_heads_are_those_of_the_records(valkey: Valkey) -> None:
    async with shared(valkey.url()) as (store,):
        stored = {f"s{i}": record(f"s{i}", i, size=7 * i) for i in range(40)}
        await put(store, list(stored.items()), [0] * 40)
        heads = await store.heads(limit=99)
        assert [key.decode() for key in heads.keys] == sorted(stored)
        headers = [decode_header(i, stored[i]) for i in sorted(stored)]
        assert heads.heads["revision"].tolist() == [header.revision for header in headers]
        assert [heads.models[i] for i in heads.model] == [header.model for header in headers]
        assert np.isfinite(heads.heads["last_used"]).all()


async def test_counts_of_models_and_tenants(valkey: Valkey) -> None:
    async with shared(valkey.url(), 2) as (a, b):
        _, stamp = await put(a, [(i, record(i)) for i in ["x", f"{TENANT}x", f"{TENANT}y"]], [0, 0, 0])
        assert await b.count() == await b.count_of("m") == 3
        assert await counts.count(b, "acme", "") == await counts.count(b, "acme", "m") == 2
        assert await counts.count(b, "", "m") == await counts.count(b, "", "") == 1
        await end(b, [Tombstone(f"{TENANT}x", End.CLOSED, 0.0)], [stamp])
        assert await counts.count(a, "acme", "m") == await counts.count(a, "", "") == 1
        assert await a.count_of("m") == 2
        assert await a.count_of("other") == 0


async def test_only_unused_sessions_expire(valkey: Valkey) -> None:
    async with shared(valkey.url(), 2) as (a, b):
        _, stamp = await put(a, [("s", record("s"))], [0])
        stone = Tombstone("s", End.EXPIRED, 0.0)
        assert await end(b, [stone], [stamp], idle_s=1000.0) == conflict("s")
        # as if it had been written long ago
        packed = stamp.to_bytes(8, "little")
        keys = [key for key in valkey.ask("KEYS", "*s:s") if valkey.ask("GETRANGE", key, 1, 8) == packed]
        (key,) = keys
        valkey.ask("SETRANGE", key, 9, bytes(8))
        assert (await b.fetch(["s"]))[0].idle_s > 1e9
        await a.touch(["s", "no"], [stamp + 1, stamp])
        assert (await b.fetch(["s"]))[0].idle_s > 1e9
        await a.touch(["s"], [stamp])
        assert (await b.fetch(["s"]))[0].idle_s < 60
        assert await end(b, [stone], [stamp], idle_s=1000.0) == conflict("s")
        valkey.ask("SETRANGE", key, 9, bytes(8))
        assert await end(b, [stone], [stamp], idle_s=1000.0) is ALL_KEPT
        assert 0 < valkey.ask("PTTL", key) <= 7 * 24 * 3600 * 1000


async def test_a_task_is_for_one_at_a_time(valkey: Valkey) -> None:
    async with shared(valkey.url(), 2) as (a, b):
        assert await a.claim("sweep", "a", 1000.0) == 0.0
        assert await b.claim("sweep", "b", 1000.0) is None
        assert await b.claim("other", "b", 1000.0) == 0.0
        while not await a.claim("sweep", "a", 1000.0):
            pass
        assert 0.0 < (await a.claim("sweep", "a", 0.001) or 0.0) < 60.0  # from now on
        while await b.claim("sweep", "b", 1000.0) is None:
            pass
        assert await a.claim("sweep", "a", 1000.0) is None


async def test_pages_have_the_sessions_that_are_unused(valkey: Valkey) -> None:
    async with shared(valkey.url(), 2) as (a, b):
        ids = [f"{chance}{number}" for number in range(300) for chance in ("", TENANT)]
        _, stamp = await put(a, [(i, record(i, 3, batch_size=2)) for i in ids], [0] * len(ids))
        for limit in (7, 100, 10_000):
            found: list[str] = []
            cursor, pages = "", 0
            while cursor or not pages:
                page = await b.unused(cursor, limits=IdleLimits(1e-6), limit=limit)
                cursor, pages = page.cursor, pages + 1
                found += [key.decode() for key in page.heads.keys]
                assert page.stamps.tolist() == [stamp] * len(page.heads)
                assert page.heads.heads["revision"].tolist() == [3] * len(page.heads)
                assert (page.idle_s >= 0).all()
                assert (page.idle_s < 60).all()
            assert sorted(found) == sorted(ids)
        cursor, pages = "", 0
        while cursor or not pages:
            page = await b.unused(cursor, limits=IdleLimits(1000.0), limit=500)
            cursor, pages = page.cursor, pages + 1
            assert (page.idle_s > 1.0).all(), "only what was not used for seconds, on a slow machine"


async def test_sessions_used_since_the_check_do_not_expire(valkey: Valkey) -> None:
    async with shared(valkey.url(), 1) as (a,):
        _, stamp = await put(a, [(i, record(i)) for i in "ab"], [0, 0])
        while (await a.fetch(["a"]))[0].idle_s < 0.002:
            pass
        batch = Batch(
            deletes=["a", "b"],
            tombstones=[Tombstone(i, End.EXPIRED, 0.0) for i in "ab"],
            delete_follows=stamps(stamp, stamp),
            max_idle_s=np.array([0.001, 1000.0]),
        )
        assert await a.apply(batch) == conflict("a")
        found = await a.fetch(["a", "b"])
        assert (found[0].record is None, found[1].record is None) == (False, True)


async def test_documents(valkey: Valkey) -> None:
    async with shared(valkey.url(), 2) as (a, b):
        assert await a.apply(Batch(documents=[("m/1", b"x"), ("m/2", b"y"), ("n", b"")])) is ALL_KEPT
        assert await b.documents("m/") == {"m/1": b"x", "m/2": b"y"}
        batch = Batch(
            documents=[("m/1", b"new"), ("m/2", None), ("m/3", b"z")],
            documents_follow={"m/1": b"other", "m/2": b"y", "m/3": None},
        )
        assert await b.apply(batch) == CommitResult(stale=frozenset({"m/1"}))
        assert await a.documents() == {"m/1": b"x", "m/3": b"z", "n": b""}
        # sent again: what is as it is to be was written before
        assert await b.apply(batch) == CommitResult(stale=frozenset({"m/1"}))
        again = Batch(documents=[("m/3", b"q")], documents_follow={"m/3": None})
        assert await a.apply(again) == CommitResult(stale=frozenset({"m/3"}))


async def test_a_request_without_a_task_finds_its_server(valkey: Valkey) -> None:
    async with shared(valkey.url(), 1) as (store,):
        await store.apply(Batch(documents=[("d", b"x")]))
        store._topology.doubt()
        began: asyncio.Future[object] = asyncio.get_running_loop().create_future()
        began.get_loop().call_soon(lambda: began.set_result(start(store.documents())))
        rest = await began
        assert isinstance(rest, Rest)
        assert await rest == {"d": b"x"}


async def test_a_request_without_a_task_cancels_no_caller_when_it_is_late(valkey: Valkey) -> None:
    async with shared(valkey.url(), 1) as (store,):
        await store.documents()
        store._topology.call_itself("anew")  # its server is known, and there is no connection to it
        with paused(valkey), time_limit(store, 0.4):
            rest = start(store.documents())
            assert isinstance(rest, Rest)
            request = asyncio.create_task(finish(rest))
            await asyncio.wait([request])
        assert isinstance(request.exception(), Unavailable)


async def test_a_damaged_document_is_named(valkey: Valkey) -> None:
    prefix = fresh_prefix()
    store = await opened(valkey.url(f"?prefix={prefix}"))
    await store.apply(Batch(documents=[("a", b"x"), ("b", b"y")]))
    valkey.ask("HSET", f"{prefix}{{meta}}documents", "a", b"nonsense")
    with pytest.raises(DocumentsCorrupt, match="document 'a' must be intact") as caught:
        await store.documents()
    assert caught.value.sound == {"b": b"y"}
    await store.close()


async def test_damaged_records_are_found_and_can_be_ended(valkey: Valkey) -> None:
    prefix = fresh_prefix()
    store = await opened(valkey.url(f"?prefix={prefix}&partitions=1"))
    ids = ["byte", "kind", "short", "sound", "stone"]
    _, stamp = await put(store, [(i, record(i)) for i in ids], [0] * len(ids))
    await end(store, [Tombstone("stone", End.CLOSED, 0.0)], [stamp])
    key = prefix + "{0}s:"
    valkey.ask("SETRANGE", f"{key}byte", 90, b"\xff\xff\xff")
    valkey.ask("SETRANGE", f"{key}kind", 0, b"\x09")
    valkey.ask("SET", f"{key}short", b"\x01")
    valkey.ask("SETRANGE", f"{key}stone", 30, b"\xff\xff")
    found = await store.fetch(ids)
    for name, each in zip(ids[:3], found, strict=False):
        assert each.record is not None
        with pytest.raises(StateCorrupt):
            decode_header(name, each.record)
    assert (found[4].record, found[4].tombstone) == (None, None)
    listed = dict(await scan(store, limit=9))
    assert [name for name, header in listed.items() if header is None] == ids[:3]
    assert listed["sound"] is not None
    assert len(await store.heads(limit=9)) >= 2
    stones = [Tombstone(name, End.CLOSED, 0.0) for name in ids[:3]]
    assert await end(store, stones, [0, 0, 0]) is ALL_KEPT
    assert await store.count() == 1
    await store.close()


async def test_two_servers_have_one_store(valkey: Valkey) -> None:
    async with shared(valkey.url(), 2) as (a, b):
        assert (a.secret, a.incarnation, a.first_revision) == (b.secret, b.incarnation, 0)
        assert (len(a.secret), len(a.incarnation)) == (32, 8)
        async with shared(valkey.url()) as (other,):
            assert other.secret != a.secret
            await put(a, [("s", record("s"))], [0])
            assert await other.count() == 0


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("layout", "2", "the layout of the store with prefix .* must be 6; it is 2: another release"),
        ("layout", "0", "the layout of the store with prefix .* must be 6; it is 0: another release"),
        ("layout", "", "layout in key '.*{meta}store' must be intact; it is corrupt"),
        ("partitions", "0", "partitions in key .* it is corrupt"),
        ("secret", "x", "secret in key .* it is corrupt"),
        ("incarnation", "x", "incarnation in key .* it is corrupt"),
    ],
)
async def test_a_store_that_is_not_ours_is_refused(
    valkey: Valkey, field: str, value: str, message: str
) -> None:
    prefix = fresh_prefix()
    url = valkey.url(f"?prefix={prefix}")
    await (await opened(url)).close()
    valkey.ask("HSET", f"{prefix}{{meta}}store", field, value)
    with pytest.raises(StoreError, match=message):
        await opened(url)


async def test_the_number_of_partitions_stays(valkey: Valkey) -> None:
    url = valkey.url(f"?prefix={fresh_prefix()}")
    await (await opened(f"{url}&partitions=8")).close()
    store = await opened(url)
    _, _ = await put(store, [(f"s{i}", record(f"s{i}")) for i in range(50)], [0] * 50)
    assert len(await scan(store, limit=99)) == 50
    await store.close()
    with pytest.raises(StoreError, match=r"partitions must be 8, as in the store .*; got 9"):
        await opened(f"{url}&partitions=9")


@pytest.mark.parametrize("seed", samples.one_in(6, range(6)))
async def test_it_does_what_the_store_of_the_tests_does(valkey: Valkey, seed: int) -> None:
    """Two servers each, and the same random programs: whatever the one answers, the other must."""
    chance = random.Random(seed)
    async with shared(valkey.url(), 2) as real:
        first = RemoteStore(MemoryStore())
        fake: list[ValkeyStore | RemoteStore] = [first, first.replica()]
        pairs = list(zip(real, fake, strict=True))
        ids = [f"{chance.choice(['', TENANT])}s{i}" for i in range(9)]
        known: dict[str, list[int]] = {i: [0] for i in ids}
        sent: list[Batch] = []
        for _ in range(150):
            ours, theirs = chance.choice(pairs)
            batch = chance.choice(sent) if sent and chance.random() < 0.1 else _drawn(chance, ids, known)
            if not batch.deletes:  # of a deletion it is not known by whom it was
                sent.append(batch)
            opens_anew = chance.random() < 0.7
            told = [
                await store.apply(await _after_the_end(store, batch) if opens_anew else batch)
                for store in (ours, theirs)
            ]
            assert told[0] == told[1]
            asked = [chance.choice(known[i]) for i in ids]
            assert _plain(await ours.fetch(ids, asked)) == _plain(await theirs.fetch(ids, asked))
            for store in (ours, theirs):
                assert [name for name, _ in await scan(store, limit=99)] == sorted(
                    i for i, each in zip(ids, await theirs.fetch(ids), strict=True) if each.record
                )
            rows = [counts.rows_of(""), counts.rows_of("acme")]
            for name in ("m", SEPARATOR, f"{SEPARATOR}m", TENANT, f"{TENANT}m", *rows):
                assert await ours.count_of(name) == await theirs.count_of(name)
            assert await ours.count() == await theirs.count()
            assert await ours.documents() == await theirs.documents()


def _drawn(chance: random.Random, ids: list[str], known: dict[str, list[int]]) -> Batch:
    stamp = new_stamp()
    named = chance.sample(ids, chance.randint(1, 5))
    cut = chance.randint(0, len(named))
    puts = [(i, record(i, chance.randint(0, 9), batch_size=1 + ids.index(i))) for i in named[:cut]]
    follows = [known[i][-1] if chance.random() < 0.7 else chance.choice(known[i]) for i, _ in puts]
    deletes = named[cut:]
    ends = [known[i][-1] if chance.random() < 0.7 else chance.choice(known[i]) for i in deletes]
    buried = [Tombstone(i, End.CLOSED, 1.0, (2,), 3) for i in deletes if chance.random() < 0.7]
    for i, _ in puts:
        known[i].append(stamp)
    for i in deletes:
        known[i].append(0)
    documents = (
        [(f"d{chance.randint(0, 2)}", chance.choice([None, b"x", b"y"]))] if chance.random() < 0.2 else []
    )
    return Batch(
        puts=puts,
        deletes=deletes,
        forgets=[i for (i, _), each in zip(puts, follows, strict=True) if not each],
        tombstones=buried,
        follows=stamps(*follows),
        stamps=stamps(*[stamp] * len(puts)),
        delete_follows=stamps(*ends),
        documents=documents,
    )


async def _after_the_end(store: Store, batch: Batch) -> Batch:
    """The same batch, whose sessions that begin follow the tombstones that there are."""
    follows = batch.follows.copy()
    found = await store.fetch([session_id for session_id, _ in batch.puts])
    for place, each in enumerate(found):
        if each.tombstone is not None and not follows[place]:
            follows[place] = each.stamp
    return dataclasses.replace(batch, follows=follows)


def _plain(found: list[StoredSession]) -> list[StoredSession]:
    """With records as bytes, and without what time says, and chance."""
    return [
        dataclasses.replace(
            each,
            record=None if each.record is None else bytes(each.record),
            idle_s=0.0,
            stamp=0 if each.tombstone is not None else each.stamp,
        )
        for each in found
    ]
