"""LMDB abandons its environment when the last write of a transaction fails: the next call reopens it."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import lmdb
import pytest

from stepwell_server.errors import StoreGone, Unavailable
from stepwell_server.store.base import Batch, End, Tombstone
from stepwell_server.store.disk.lmdb import GIVE_UP_S, RETRY_S, LmdbStore
from stepwell_server.store.disk.store import DiskStore
from support.clock import ManualClock
from support.stores.broken_disk import break_last_writes, failing
from support.stores.disk_store import base_of, begin, end, put, revisions

CLOCK = ManualClock()


@pytest.fixture
def store(path: Path) -> Iterator[DiskStore]:
    """One that has a session, and of which a transaction has just failed for good."""
    found = DiskStore(path, durability="sync", clock=CLOCK, segment_bytes=64 * 1024)
    begin(found, "a", "b")
    put(found, "a", revision=1)
    fail_once(found, path)
    yield found
    found.close()


def fail_once(store: DiskStore, path: Path) -> None:
    break_last_writes(path)
    with pytest.raises(Unavailable, match=r"must be able to keep the change; .*is full.*No space left"):
        begin(store, "refused")


READS: dict[str, Callable[[DiskStore], object]] = {
    "get": lambda store: store.get("b"),
    "get_many": lambda store: store.get_many(["a", "b", "c"]),
    "count": lambda store: store.count(),
    "count_of": lambda store: store.count_of("m"),
    "heads": lambda store: store.heads(limit=9).keys,
    "tombstone": lambda store: store.tombstones(["a"])[0],
    "check": lambda store: store.check().problem,
}
WRITES: dict[str, Callable[[DiskStore], object]] = {
    "open": lambda store: begin(store, "c"),
    "close": lambda store: end(store, "b"),
    "sync": lambda store: base_of(store).sync(),
    "mark": lambda store: base_of(store).set_wal_mark(base_of(store).wal_mark),
}


@pytest.mark.parametrize("use", [*READS, *WRITES])
def test_the_next_call_reopens_the_environment(store: DiskStore, use: str) -> None:
    (READS | WRITES)[use](store)
    assert store.check().reopened == 1
    found = revisions(store)
    # whether what could not be acknowledged is there is open; all else is not
    assert {name: found[name] for name in found if name not in ("refused", "c")} == {
        "a": 1,
        **({} if use == "close" else {"b": 0}),
    }
    put(store, "a", revision=2)
    begin(store, "d")
    assert revisions(store)["a"] == 2
    assert store.check().reopened == 1


def test_an_open_with_little_room_reopens_the_environment(
    store: DiskStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The room is looked at before anything is written, and that must not fail for ever."""
    monkeypatch.setattr(type(base_of(store)._reserve), "is_short", True)
    begin(store, "c")


@pytest.mark.parametrize("kind", [lmdb.DiskError, lmdb.Error, OSError])
def test_calls_are_refused_with_the_reason_while_it_cannot_be_opened(
    store: DiskStore, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, kind: type[Exception]
) -> None:
    tries = 0

    def refuse(*_: Any, **__: Any) -> None:
        nonlocal tries
        tries += 1
        raise kind("the disk is away")

    with monkeypatch.context() as patch:
        patch.setattr(lmdb, "open", refuse)
        assert "must be readable; got the disk is away" in store.check().problem
        with pytest.raises(Unavailable, match="must be able to keep the change; got the disk is away"):
            begin(store, "c")
        for _ in range(50):  # many readers do not make many attempts
            with pytest.raises(Unavailable, match="it could not be reopened a moment ago"):
                store.get("b")
        assert tries == 2
        CLOCK.advance(RETRY_S)
        with pytest.raises(Unavailable, match="the disk is away"):
            store.count()
        assert tries == 3
        put(store, "a", revision=3)
        assert store.get("a") is not None, "the segment has it"
    CLOCK.advance(RETRY_S)
    assert store.check().problem == ""
    assert store.check().reopened == 1
    assert revisions(store)["a"] == 3
    begin(store, "c")
    said = [entry.getMessage() for entry in caplog.records if "reopened" in entry.getMessage()]
    assert [line.partition(":")[0] for line in said] == [
        "the store must be reopened, and cannot be reopened yet",
        "the store was reopened",
    ]


def test_what_cannot_be_opened_for_long_is_given_up(
    store: DiskStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lmdb, "open", failing(lmdb.DiskError("the disk is away")))
    since = CLOCK.monotonic()
    while CLOCK.monotonic() + 1 < since + GIVE_UP_S:
        assert store.check().problem
        CLOCK.advance(1.0)
    CLOCK.advance(1.0)
    with pytest.raises(
        StoreGone, match=r"/sessions must hold a usable store again within 30 s; .*the disk is away"
    ):
        store.check()
    monkeypatch.undo()
    with pytest.raises(StoreGone):
        put(store, "a", revision=4)
    with pytest.raises(StoreGone):
        store.count()


def test_what_will_never_open_again_is_given_up_at_once(store: DiskStore, path: Path) -> None:
    data = path / "sessions" / "data.mdb"
    with data.open("r+b") as file:
        file.write(b"not LMDB" * 2000)
    with pytest.raises(
        StoreGone, match=r"/sessions must hold a store that can be opened again: .*not an LMDB"
    ):
        store.count()
    with pytest.raises(StoreGone):
        store.check()
    with pytest.raises(StoreGone):
        put(store, "a", revision=4)


def test_no_other_file_is_made_in_place_of_one_that_is_gone(store: DiskStore, path: Path) -> None:
    data = path / "sessions" / "data.mdb"
    data.unlink()
    with pytest.raises(StoreGone, match=str(data)):
        store.get("b")
    assert not data.exists()


def test_a_reader_does_not_wait_for_writers(store: DiskStore) -> None:
    """A commit may take as long as a disk that stalls, and reopens the environment itself."""
    writing = base_of(store)._writing  # as a commit holds it for as long as the disk stalls
    with writing, pytest.raises(Unavailable, match="a running change reopens it"):
        store.get("b")
    assert store.get("b") is not None


def test_many_readers_and_a_writer_meet_one_that_gave_up(path: Path) -> None:
    store = DiskStore(path, durability="sync", clock=CLOCK, segment_bytes=64 * 1024)
    names = [f"s{i}" for i in range(50)]
    begin(store, *names)

    def read() -> None:
        # so often, and not until they are told: where the threads have one core, the writer would hardly get it
        for _ in range(200):
            try:
                assert None not in store.get_many(names)
                store._base.check()  # the store's own tries a write after a failure, and would meet the next one
            except Unavailable as error:
                if not any(reason in error.message for reason in ("reopens it", "MDB_PANIC")):
                    raise

    with ThreadPoolExecutor(4) as readers:
        for turn in range(10):
            reading = [readers.submit(read) for _ in range(4)]
            break_last_writes(path)
            with pytest.raises(Unavailable):
                begin(store, f"t{turn}")
            store.commit(Batch(tombstones=[Tombstone(f"u{turn}", End.CLOSED, 0.0)]))
            for one in reading:
                one.result(timeout=200)
    assert store.check().reopened == 10
    assert all(store.tombstones([f"u{turn}"])[0] for turn in range(10))
    store.close()
    assert os.path.exists(path)


def test_a_closed_environment_is_not_reopened(store: DiskStore) -> None:
    store.close()
    with pytest.raises(Unavailable, match="it is closed"):
        store.count()


def test_lmdb_alone_does_the_same(path: Path) -> None:
    store = LmdbStore(path, durability="sync", clock=CLOCK)
    break_last_writes(path)
    with pytest.raises(Unavailable):
        begin(store, "a")
    assert store.count() <= 1
    store.close()
