"""Reads of the store on disk never go back, whatever moves a record between the log and LMDB meanwhile."""

from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from stepwell_server.store.base import Batch
from stepwell_server.store.disk.store import DiskStore
from stepwell_server.store.disk.wal import reader
from stepwell_server.store.disk.wal.log import Mark
from support.stores.disk_store import Watched, base_of, begin, fill_one, in_lmdb, opened, put, record, wal_of
from support.stores.records import decode

WAIT_S = 20.0


def by_get(store: DiskStore, session_id: str) -> int:
    return decode(session_id, store.get(session_id) or b"").revision


def by_get_many(store: DiskStore, session_id: str) -> int:
    return decode(session_id, store.get_many([session_id])[0] or b"").revision


def by_heads(store: DiskStore, session_id: str) -> int:
    heads = store.heads(prefix=session_id, limit=1)
    assert heads.keys == [session_id.encode()]
    return int(heads.heads["revision"][0])


READS = pytest.mark.parametrize("read", [by_get, by_get_many, by_heads])
Read = Callable[[DiskStore, str], int]


class Offsets(dict[str, int]):
    """The offsets of a segment; the first search, listing or removal of one triggers an action."""

    def __init__(self, offsets: dict[str, int], **actions: Callable[[], object]) -> None:
        super().__init__(offsets)
        self._actions = actions

    def _act(self, name: str) -> None:
        self._actions.pop(name, lambda: None)()

    def get(self, key: str, default: Any = None) -> Any:
        self._act("before_search")
        found = super().get(key, default)
        self._act("after_search")
        return found

    def __contains__(self, key: object) -> bool:
        self._act("before_search")
        found = super().__contains__(key)
        self._act("after_search")
        return found

    def __iter__(self) -> Any:
        self._act("before_list")
        return super().__iter__()

    def pop(self, key: str, *default: Any) -> Any:
        found = super().pop(key, *default)
        self._act("after_removal")
        return found


def full(store: DiskStore) -> str:
    """Fill the log so that a checkpoint is due; return a session that is in the sealed segment only, with revision 1."""
    changed = fill_one(store)
    while not store.needs_checkpoint:
        put(store, changed[-1], revision=2)
    return changed[0]


@READS
def test_an_append_and_a_checkpoint_between_two_searches(path: Path, read: Read) -> None:
    store = opened(path)
    name, wal = full(store), wal_of(store)
    has_begun, go_on = threading.Event(), threading.Event()

    def pause() -> None:
        has_begun.set()
        assert go_on.wait(WAIT_S)

    def move() -> None:
        assert store.append([(name, record(name, 2))])
        go_on.set()
        checkpoint.join(WAIT_S)
        assert not wal._sealed.offsets

    wal._sealed.places.last = Offsets(wal._sealed.offsets, before_list=pause)
    wal._active.places.last = Offsets(wal._active.offsets, after_search=move)
    checkpoint = threading.Thread(target=store.checkpoint)
    checkpoint.start()
    assert has_begun.wait(WAIT_S)
    assert read(store, name) >= 1
    assert read(store, name) == 2
    assert in_lmdb(store)[name] == 0


@READS
def test_a_rotation_during_a_search(path: Path, monkeypatch: pytest.MonkeyPatch, read: Read) -> None:
    store = opened(path)
    full(store)
    store.checkpoint()
    name, wal, is_due, waits = "s0", wal_of(store), threading.Event(), threading.Event()
    put(store, name, revision=3)
    assert not wal._sealed.offsets

    def rotate() -> None:
        assert is_due.wait(WAIT_S)
        wal.rotate()
        put(store, name, revision=4)
        while not store.needs_checkpoint:
            put(store, "s1", revision=5)
        store.checkpoint()
        assert not wal._sealed.offsets
        waits.set()

    def move() -> None:
        is_due.set()
        assert waits.wait(WAIT_S)

    writer = threading.Thread(target=rotate)
    writer.start()
    monkeypatch.setattr(wal, "_looking", Watched(wal._looking, waits))
    wal._active.places.last = Offsets(wal._active.offsets, before_search=move)
    assert read(store, name) >= 3
    writer.join(WAIT_S)
    assert read(store, name) == 4


@pytest.mark.parametrize("is_commit", [False, True])
def test_a_list_during_a_checkpoint_or_a_transaction(
    path: Path, monkeypatch: pytest.MonkeyPatch, is_commit: bool
) -> None:
    store = opened(path)
    name, values = full(store), base_of(store).values

    def slow(**options: Any) -> Any:
        found = values(**options)
        if is_commit:
            store.commit(Batch(puts=[(name, record(name, 2))], documents=[("z", b"")]))
        else:
            store.checkpoint()
        return found

    monkeypatch.setattr(base_of(store), "values", slow)
    assert by_heads(store, name) >= 1
    assert in_lmdb(store)[name] == 1 + is_commit


@READS
@pytest.mark.parametrize("rotations", [1, 2])
def test_a_transaction_removes_the_older_of_two_records_first(path: Path, read: Read, rotations: int) -> None:
    store, seen, name = opened(path), list[int](), "s0"
    begin(store, name)
    wal = wal_of(store)
    for _ in range(rotations - 1):
        assert wal.rotate()
    put(store, name, revision=1)
    assert wal.rotate()
    put(store, name, revision=2)

    def look() -> None:
        seen.append(read(store, name))

    for segment in (wal._active, wal._sealed):
        segment.places.last = Offsets(segment.offsets, after_removal=look)
    store.commit(Batch(puts=[(name, record(name, 3))], documents=[("z", b"")]))
    assert len(seen) == 2
    assert min(seen) >= 2
    assert read(store, name) == 3


def test_a_backup_reads_the_log_while_it_rotates_twice(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store, read = opened(path), reader._read
    begin(store, "s0", "s1")
    wal = wal_of(store)
    put(store, "s0", revision=1)

    def rotate() -> None:
        put(store, "s1", revision=1)
        assert wal.rotate()

    def rotate_again() -> None:
        put(store, "s0", revision=2)
        while not store.needs_checkpoint:
            put(store, "s1", revision=2)
        store.checkpoint()
        assert wal.rotate()

    actions = [rotate, rotate_again]

    def slow(file: Path) -> Any:
        found = read(file)
        if actions:
            actions.pop(0)()
        return found

    monkeypatch.setattr(reader, "_read", slow)
    found = reader.read_log(path / "wal", Mark.unpacked(base_of(store).wal_mark).owner)
    assert decode("s0", found["s0"][-1]).revision == 2
    assert not actions
    assert in_lmdb(store)["s0"] == 0
