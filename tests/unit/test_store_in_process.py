"""A local store that is awaited answers as it does in place; and the settings' store is made in one place."""

from __future__ import annotations

import asyncio
import threading
from pathlib import Path

import pytest

from stepwell_server.errors import Unavailable
from stepwell_server.store.base import (
    ALL_KEPT,
    SOLE,
    Batch,
    CommitResult,
    End,
    Outcome,
    Store,
    StoreBusy,
    StoredSession,
    Tombstone,
)
from stepwell_server.store.disk.store import DiskStore
from stepwell_server.store.factory import Kind, open_store
from stepwell_server.store.in_process import InProcessStore
from stepwell_server.store.memory import MemoryStore
from support.clock import ManualClock
from support.stores.disk_store import committed, record

NAMES = ["a", "b", "c"]
KINDS = pytest.mark.parametrize("kind", ["memory", "sync", "async"])


def opened(kind: str, path: Path) -> Store:
    where: Kind = "memory" if kind == "memory" else "disk"
    return open_store(
        where, data_dir=path, durability="sync" if kind == "sync" else "async", clock=ManualClock()
    )


@KINDS
async def test_it_answers_as_in_place(tmp_path: Path, kind: str) -> None:
    store = opened(kind, tmp_path / "data")
    assert store.local is not None
    puts = [(name, record(name)) for name in NAMES]
    assert await committed(store, Batch(puts=puts, counts=[("m", 3)])) is ALL_KEPT
    stone = Tombstone("a", End.CLOSED, 1.0)
    assert await committed(store, Batch(deletes=["a"], tombstones=[stone], counts=[("m", -1)])) is ALL_KEPT
    local = store.local
    assert [each.record for each in await store.fetch(["b"])] == [local.get("b")] == [record("b")]
    found = await store.fetch(NAMES)
    assert [each.record for each in found] == local.get_many(NAMES) == [None, record("b"), record("c")]
    assert {each.stamp for each in found} == {SOLE} == {store.new_stamp()}
    assert [each.is_known for each in await store.fetch([*NAMES, "d"], [0, SOLE, 0, SOLE])] == [
        False,
        True,
        False,
        True,
    ], "nobody else changes it"
    assert await store.fetch(["d"]) == [StoredSession()]
    assert (await store.count(), await store.count_of("m")) == (2, 2)
    assert (await store.heads(after="b", limit=9)).keys == local.heads(after="b", limit=9).keys == [b"c"]
    assert [each.tombstone for each in found] == local.tombstones(NAMES) == [stone, None, None]
    await store.touch(["b"], [0])
    assert await store.check() == local.check()
    assert (store.incarnation, store.secret) == (local.incarnation, local.secret)
    await store.announce("here:1")
    await store.close()
    await store.close()


async def test_commits_that_wait_for_the_disk_wait_on_a_thread_one_at_a_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = opened("sync", tmp_path / "data")
    inside, threads = 0, set[int]()
    commit = DiskStore.commit

    def slow(local: DiskStore, batch: Batch) -> None:
        nonlocal inside
        inside += 1
        assert inside == 1
        threads.add(threading.get_ident())
        commit(local, batch)
        inside -= 1

    monkeypatch.setattr(DiskStore, "commit", slow)
    batches = [Batch(puts=[(name, record(name))], counts=[("m", 1)]) for name in NAMES]
    await asyncio.gather(*(committed(store, batch) for batch in batches))
    assert threading.get_ident() not in threads
    assert await store.count() == 3
    await store.close()


async def test_refusals_in_place_equal_awaited_refusals(tmp_path: Path) -> None:
    store = opened("sync", tmp_path / "data")
    await store.close()
    with pytest.raises(Unavailable, match="it is closed"):
        await committed(store, Batch(deletes=["a"]))
    with pytest.raises(Unavailable, match="it is closed"):
        await store.count()


def test_the_outcome_of_each_member_is_reported() -> None:
    result = CommitResult(conflicts=frozenset({"a"}), unknown=frozenset({"b"}))
    assert [result.of(name) for name in NAMES] == [Outcome.CONFLICT, Outcome.UNKNOWN, Outcome.KEPT]
    assert ALL_KEPT.of("a") is Outcome.KEPT


def test_the_kinds_of_stores(tmp_path: Path) -> None:
    memory, disk = opened("memory", tmp_path / "none"), opened("async", tmp_path / "data")
    assert isinstance(memory, InProcessStore)
    assert isinstance(memory.local, MemoryStore)
    assert not (tmp_path / "none").exists()
    disk.local.announce("here:1")  # type: ignore[union-attr]
    with pytest.raises(StoreBusy, match="listening at here:1"):
        opened("sync", tmp_path / "data")
    disk.local.close()  # type: ignore[union-attr]
