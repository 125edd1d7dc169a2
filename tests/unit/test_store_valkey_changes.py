"""Changes (`store.changes`) in a shared store: the scripts keep the records before them, and return the whole."""

from __future__ import annotations

import asyncio
import contextlib
import random
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from stepwell_server.core.quotas import NOTHING
from stepwell_server.errors import Overloaded
from stepwell_server.store import backup, shared_backup
from stepwell_server.store.base import ALL_KEPT, Batch, End, Tombstone, new_stamp
from stepwell_server.store.counts import usage_of
from stepwell_server.store.encryption.keyring import Keyring
from stepwell_server.store.record import decode_header, header_or_none
from stepwell_server.store.valkey import meta
from stepwell_server.store.valkey.connection import url as urls
from support.clock import ManualClock
from support.servers.valkey_servers import Valkey
from support.stores.changes import Windowed
from support.stores.valkey_store import end, fresh_prefix, opened, put, shared, stamps

KEYS = Keyring({"k": bytes(range(32))})


@pytest.fixture(scope="module")
def valkey() -> Iterator[Valkey]:
    with Valkey(append="") as server:
        yield server


def lists(valkey: Valkey, session_id: str) -> list[int]:
    return [valkey.ask("LLEN", key) for key in valkey.ask("KEYS", f"*e:{session_id}")]


@pytest.mark.parametrize("keyring", [None, KEYS], ids=["plain", "encrypted"])
async def test_whatever_is_done_readers_get_whole_records(valkey: Valkey, keyring: Keyring | None) -> None:
    chance, prefix = random.Random(7), fresh_prefix()
    store = await opened(valkey.url(f"?prefix={prefix}"), keyring=keyring)
    try:
        sessions = {name: Windowed(name) for name in ("a", "b", "c{7}s:d")}
        held = dict.fromkeys(sessions, 0)
        for name, session in sessions.items():
            kept, held[name] = await put(store, [(name, session.whole)], [0])
            assert kept is ALL_KEPT
        for turn in range(80):
            some = chance.sample(sorted(sessions), chance.randint(1, 3))
            puts = [
                (
                    name,
                    sessions[name].step(chance.choice([1, 2, 30]))
                    if chance.random() < 0.8
                    else sessions[name].replace(),
                )
                for name in some
            ]
            if chance.random() < 0.3:  # the script that counts
                stamp = new_stamp()
                batch = Batch(
                    puts=puts,
                    follows=stamps(*(held[name] for name in some)),
                    stamps=stamps(*[stamp] * len(some)),
                    resized=some,
                )
                kept = await store.apply(batch)
            else:
                kept, stamp = await put(store, puts, [held[name] for name in some])
            assert kept is ALL_KEPT
            if chance.random() < 0.3:  # sent again
                assert (await put(store, puts, [held[name] for name in some], stamp))[0] is ALL_KEPT
            held |= dict.fromkeys(some, stamp)
            if chance.random() < 0.1:
                assert await end(store, [Tombstone(some[0], End.CLOSED, 0.0)], [stamp]) is ALL_KEPT
                sessions[some[0]] = session = Windowed(some[0], seed=turn)
                (stone,) = await store.fetch([some[0]])
                _, held[some[0]] = await put(store, [(some[0], session.whole)], [stone.stamp], anew=True)
            found = await store.fetch([*sessions])
            assert [each.record for each in found] == [each.whole for each in sessions.values()]
            usage = NOTHING
            for name, session in sessions.items():
                usage += usage_of(decode_header(name, session.whole))
            heads = await store.heads(limit=9)
            assert len(heads) == await store.count() == 3
            assert (await store.usage("")).bytes == usage.bytes == int(heads.byte_counts.sum())
        known = await store.fetch([*sessions], list(held.values()))
        assert all(each.is_known for each in known)
    finally:
        await store.close()


async def test_a_conflict_moves_nothing_and_an_end_leaves_nothing(valkey: Valkey) -> None:
    async with shared(valkey.url(), 2) as (a, b):
        session, other = Windowed("lone"), Windowed("lone")
        _, first = await put(a, [("lone", session.whole)], [0])
        change = session.step()
        kept, second = await put(a, [("lone", change)], [first])
        assert kept is ALL_KEPT
        assert lists(valkey, "lone") == [1]
        assert (await put(b, [("lone", other.step())], [first]))[0].conflicts == {"lone"}
        assert lists(valkey, "lone") == [1]
        kept, third = await put(b, [("lone", session.step())], [second])
        assert kept is ALL_KEPT
        assert lists(valkey, "lone") == [2]
        assert (await a.fetch(["lone"]))[0].record == session.whole
        kept, fourth = await put(a, [("lone", session.replace())], [third])
        await put(a, [("lone", session.step())], [fourth])
        assert lists(valkey, "lone") == [1]
        await end(b, [Tombstone("lone", End.EXPIRED, 0.0)], [0])
        assert lists(valkey, "lone") == []


@pytest.mark.parametrize("order", [("whole", "change"), ("change", "whole")], ids=" ".join)
async def test_a_full_store_keeps_all_changes_of_a_script_or_none(
    valkey: Valkey, order: tuple[str, str]
) -> None:
    """What a script frees first, before a change of whole rows, makes the server accept the rest."""
    async with shared(valkey.url()) as (store,):
        sessions = {name: Windowed(name) for name in order}
        _, stamp = await put(store, [(i, each.whole) for i, each in sessions.items()], [0, 0])
        _, after = await put(store, [("change", sessions["change"].step())], [stamp])
        held = [after if name == "change" else stamp for name in order]
        before = [each.whole for each in sessions.values()]
        steps = [(name, each.step()) for name, each in sessions.items()]
        valkey.ask("CONFIG", "SET", "maxmemory", 1)
        try:
            with contextlib.nullcontext() if order[0] == "whole" else pytest.raises(Overloaded):
                kept, stamp = await put(store, steps, held)
                assert kept is ALL_KEPT
                held, before = [stamp] * 2, [each.whole for each in sessions.values()]
        finally:
            valkey.ask("CONFIG", "SET", "maxmemory", 0)
        assert [each.record for each in await store.fetch(order)] == before
        if order[0] == "change":
            assert (await put(store, steps, held))[0] is ALL_KEPT
            assert [each.record for each in await store.fetch(order)] == [
                each.whole for each in sessions.values()
            ]


@pytest.mark.parametrize("stone", [End.LOST, End.CLOSED], ids=lambda end: end.name.lower())
async def test_a_tombstone_of_a_lost_session_leaves_no_earlier_records(valkey: Valkey, stone: End) -> None:
    prefix = fresh_prefix()
    store = await opened(valkey.url(f"?prefix={prefix}"))
    try:
        session = Windowed("gone")
        _, stamp = await put(store, [("gone", session.whole)], [0])
        await put(store, [("gone", session.step())], [stamp])
        (key,) = valkey.ask("KEYS", f"{prefix}*s:gone")
        valkey.ask("DEL", key)
        await store.apply(Batch(tombstones=[Tombstone("gone", stone, 0.0)]))
        assert valkey.ask("KEYS", f"{prefix}*e:gone") == []
    finally:
        await store.close()


@pytest.mark.parametrize("keyring", [None, KEYS], ids=["plain", "encrypted"])
@pytest.mark.parametrize("is_moved", [False, True])
def test_backups_have_the_changes(
    valkey: Valkey, tmp_path: Path, keyring: Keyring | None, is_moved: bool
) -> None:
    sessions = [Windowed(name) for name in "abcd"]
    url = urls.parse(valkey.url(f"?prefix={fresh_prefix()}"), {})
    to = urls.parse(valkey.url(f"?prefix={fresh_prefix()}"), {})

    async def fill() -> None:
        store = await opened(str(url), keyring=keyring)
        for count, session in enumerate(sessions):
            _, stamp = await put(store, [(session.session_id, session.whole)], [0])
            for _ in range(count):
                _, stamp = await put(store, [(session.session_id, session.step())], [stamp])
        await store.close()

    async def read() -> list[bytes]:
        store = await opened(str(to), keyring=keyring)
        found = await store.fetch([each.session_id for each in sessions])
        await store.close()
        return [bytes(each.record or b"") for each in found]

    asyncio.run(fill())
    clock, file = ManualClock(), tmp_path / "backup"
    assert shared_backup.verify(url, keyring, clock).problems == []
    assert shared_backup.back_up(url, file, clock).damaged == 0
    given = None if is_moved and keyring is not None else keyring
    restored = shared_backup.restore(file, to, clock, given, moved=is_moved)
    assert (restored.sessions, restored.damaged) == (4, 0)
    assert shared_backup.verify(to, keyring, clock).problems == []
    for session in sessions:
        session.revision += restored.first_revision
    revisions = [
        decode_header(each.session_id, found).revision
        for each, found in zip(sessions, asyncio.run(read()), strict=True)
    ]
    assert revisions == [session.revision for session in sessions]
    if is_moved:
        assert asyncio.run(read()) == [session.whole for session in sessions]
    assert backup.restore(file, tmp_path / "disk", clock, given, moved=is_moved).sessions == 4


DAMAGE: dict[str, Callable[[Valkey, str, bytes, int], object]] = {
    "flipped": lambda valkey, key, record, at: valkey.ask("LSET", key, at, flipped(record, 8)),
    "seems a change": lambda valkey, key, record, at: valkey.ask("LSET", key, at, flipped(record, 4)),
    "cut off": lambda valkey, key, record, at: valkey.ask("LSET", key, at, record[:50]),
    "missing": lambda valkey, key, record, at: valkey.ask("LREM", key, 1, record),
}


def flipped(record: bytes, at: int) -> bytes:
    return record[:at] + bytes([record[at] ^ 1]) + record[at + 1 :]


@pytest.mark.parametrize(
    ("how", "at"), [("flipped", 1), ("seems a change", 0), ("cut off", 0), ("missing", 0), ("missing", 1)]
)
def test_a_corrupt_earlier_record_concerns_its_session_in_a_backup_too(
    valkey: Valkey, tmp_path: Path, how: str, at: int
) -> None:
    sessions, clock = [Windowed("a"), Windowed("b")], ManualClock()
    url, to = (urls.parse(valkey.url(f"?prefix={fresh_prefix()}"), {}) for _ in range(2))

    async def fill() -> None:
        store = await opened(str(url))
        _, stamp = await put(store, [(each.session_id, each.whole) for each in sessions], [0, 0])
        for _ in range(3):
            _, stamp = await put(store, [(each.session_id, each.step()) for each in sessions], [stamp] * 2)
        key = store._keys.earlier("a").decode()
        DAMAGE[how](valkey, key, valkey.ask("LINDEX", key, at), at)
        await store.close()

    async def require(at: urls.StoreUrl) -> None:
        store = await opened(str(at))
        a, b = await store.fetch(["a", "b"])
        assert b.record == sessions[1].whole
        assert a.tombstone is not None if a.record is None else header_or_none("a", a.record) is None
        await store.close()

    asyncio.run(fill())
    asyncio.run(require(url))
    assert shared_backup.verify(url, None, clock).damaged == ["a"]
    assert shared_backup.back_up(url, tmp_path / "backup", clock).damaged == 1
    restored = shared_backup.restore(tmp_path / "backup", to, clock, None, moved=True)
    assert (restored.sessions, restored.damaged) == (2, 1)
    asyncio.run(require(to))


async def test_a_store_of_the_last_layout_is_taken_over(valkey: Valkey) -> None:
    url = valkey.url(f"?prefix={fresh_prefix()}")
    store = await opened(url)
    await store.close()
    (key,) = valkey.ask("KEYS", f"{urls.parse(url, {}).prefix}{{meta}}store")
    valkey.ask("HSET", key, "layout", meta.OLDEST_LAYOUT)
    await (await opened(url)).close()
    assert int(valkey.ask("HGET", key, "layout")) == meta.LAYOUT
