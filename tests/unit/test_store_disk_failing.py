"""The store on disk when a segment, or LMDB behind it, is damaged, lost, full or failing."""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from stepwell_server.errors import Unavailable
from stepwell_server.store.base import Batch, End, StoreError, Tombstone
from stepwell_server.store.disk.lmdb import Durability, LmdbStore
from stepwell_server.store.disk.store import DiskStore
from support.stores.broken_disk import io_error, no_space
from support.stores.disk_store import (
    DURABILITIES,
    SEGMENT_BYTES,
    begin,
    crash_copy,
    fill_one,
    in_lmdb,
    killed,
    opened,
    place_of,
    put,
    record,
    revisions,
    warnings,
)

# ------------------------------------------------------------------------------------------------------- no segments


def test_where_a_segment_has_no_room_every_change_is_a_transaction(
    path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    usage = shutil.disk_usage(path.parent)
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=SEGMENT_BYTES * 64 - 1))
        store = opened(path)
        (warning,) = warnings(caplog)
        assert warning.startswith("there is no write-ahead log, every change is a transaction: ")
        assert warning.endswith(f"{64 * SEGMENT_BYTES} bytes of the disk must be free")
        begin(store, "a", "b")
        put(store, "a", revision=3)
        assert not store.needs_checkpoint
        store.checkpoint()
        assert revisions(store) == in_lmdb(store) == {"a": 3, "b": 0}
        store.close()
    store = opened(path)
    put(store, "b", revision=1)
    assert in_lmdb(store)["b"] == 0, "there is a segment now"


def test_a_segment_takes_no_more_than_its_share_of_the_room(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = shutil.disk_usage(path.parent)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=64 * 100_000))
    opened(path, "sync", segment_bytes=2**20)
    assert [(path / "wal" / name).stat().st_size for name in "01"] == [100_000] * 2


@pytest.mark.parametrize(
    "which",
    ["0", "1"],
)
def test_where_one_of_the_segments_cannot_be_preallocated_it_starts_without(
    path: Path, monkeypatch: pytest.MonkeyPatch, which: str
) -> None:
    """As on a disk with a quota, of which `disk_usage` knows nothing."""
    pwrite = os.pwrite

    def some(file: int, data: Any, at: int) -> int:
        is_it = os.readlink(f"/proc/self/fd/{file}").endswith(f"wal/{which}")
        return int(no_space() if is_it else pwrite(file, data, at))

    monkeypatch.setattr(os, "pwrite", some)
    for revision in range(3):
        store = opened(path, "sync")
        (put if revision else begin)(store, "a", revision=revision)
        assert revisions(store) == in_lmdb(store) == {"a": revision}
        store.close()


@pytest.mark.parametrize("gone", ["0", "1", "01"])
@DURABILITIES
def test_without_a_segment_that_was_deleted_sessions_are_as_lmdb_and_the_other_have_them(
    path: Path, durability: Durability, gone: str
) -> None:
    store = opened(path, durability)
    changed = fill_one(store)
    places = {i: place_of(store, i)[0] for i in changed}
    wanted = revisions(store) | {i: 0 for i in changed if places[i] in gone}
    copy = crash_copy(store)
    store.close()
    for name in gone:
        (copy / "wal" / name).unlink()
    if durability == "sync":
        for _ in range(2):
            with pytest.raises(StoreError, match=f"/{gone[0]} cannot be read: its first entry is missing"):
                opened(copy, "sync")
    opened(copy, "async").close()
    store = opened(copy, durability)
    assert revisions(store) == wanted
    for revision in range(2, 40):
        put(store, *changed[:5], revision=revision)
    wanted |= dict.fromkeys(changed[:5], 39)
    store = killed(store, durability)
    assert revisions(store) == wanted


def test_a_folder_of_the_log_that_is_none_is_done_without(
    path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path.mkdir(mode=0o700)
    (path / "wal").touch(mode=0o600)
    store = opened(path)
    assert warnings(caplog)[0].startswith("there is no write-ahead log, every change is a transaction: ")
    begin(store, "a")


@DURABILITIES
def test_a_segment_that_cannot_be_read_stops_the_start(
    path: Path, monkeypatch: pytest.MonkeyPatch, durability: Durability
) -> None:
    store = opened(path, durability)
    begin(store, "a")
    put(store, "a", revision=1)
    copy = crash_copy(store)
    store.close()
    monkeypatch.setattr(os, "pread", io_error)
    with pytest.raises(StoreError, match=f"the write-ahead log in {copy / 'wal'} must be readable: "):
        opened(copy, durability)
    monkeypatch.undo()
    store = opened(copy, durability)
    assert revisions(store) == {"a": 1}


@DURABILITIES
def test_after_a_clean_stop_the_log_is_not_needed(path: Path, durability: Durability) -> None:
    store = opened(path, durability)
    begin(store, "a")
    put(store, "a", revision=1)
    store.close()
    shutil.rmtree(path / "wal")
    store = opened(path, durability)
    assert revisions(store) == {"a": 1}


def test_the_log_of_another_store_is_refused(path: Path) -> None:
    copies = []
    for name in ("one", "other"):
        store = opened(path / name, "sync")
        begin(store, "a")
        put(store, "a", revision=1 if name == "one" else 7)
        copies.append(crash_copy(store))
        store.close()
    one, other = copies
    shutil.rmtree(one / "wal")
    shutil.copytree(other / "wal", one / "wal")
    with pytest.raises(StoreError, match="does not belong to this store"):
        opened(one, "sync")


# --------------------------------------------------------------------------------------------- writes and reads that fail


def test_changes_that_a_segment_refuses_go_to_lmdb(
    path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    store = opened(path)
    begin(store, "a", "b")
    put(store, "a", "b", revision=1)
    with monkeypatch.context() as patch:
        patch.setattr(os, "pwritev", io_error)
        put(store, "a", revision=2)
        put(store, "a", revision=3)
    (warning,) = warnings(caplog)
    assert warning.startswith(
        "a change could not be written to the write-ahead log; it is written to data.mdb instead: "
    )
    assert revisions(store) == {"a": 3, "b": 1}
    assert in_lmdb(store) == {"a": 3, "b": 0}
    put(store, "b", revision=2)
    assert in_lmdb(store)["b"] == 0, "the segment is used again"
    store = killed(store)
    assert revisions(store) == {"a": 3, "b": 2}


def test_where_lmdb_fails_too_nothing_changes(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = opened(path)
    begin(store, "a", "b")
    put(store, "a", revision=1)
    with monkeypatch.context() as patch:
        patch.setattr(os, "pwritev", io_error)
        patch.setattr(LmdbStore, "_commit", no_space)
        for change in (
            Batch(puts=[("a", record("a", 2)), ("b", record("b", 2))]),
            Batch(deletes=["a"], tombstones=[Tombstone("a", End.CLOSED, 1.0)]),
            Batch(puts=[("c", record("c"))], counts=[("m", 1)]),
        ):
            with pytest.raises(Unavailable, match=r"must be able to keep the change; got .*No space left"):
                store.commit(change)
            assert revisions(store) == {"a": 1, "b": 0}
        again = opened_well(crash_copy(store), monkeypatch)
        assert revisions(again) == {"a": 1, "b": 0}
        again.close()
    put(store, "a", revision=2)
    assert revisions(store) == {"a": 2, "b": 0}


def opened_well(path: Path, monkeypatch: pytest.MonkeyPatch) -> DiskStore:
    monkeypatch.undo()
    return opened(path)


def test_while_lmdb_takes_nothing_changes_are_kept_as_long_as_the_log_has_room(
    path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    store = opened(path)
    fill_one(store)
    names, kept = list(revisions(store)), revisions(store)
    with monkeypatch.context() as patch:
        patch.setattr(LmdbStore, "_commit", no_space)
        for number in range(100):
            store.checkpoint()
            try:
                put(store, names[-1 - number], revision=5)
            except Unavailable:
                break
            kept[names[-1 - number]] = 5
        assert 10 < number < 60
        assert revisions(store) == kept
        with pytest.raises(Unavailable):
            put(store, names[0], revision=9)
        assert store.needs_checkpoint
    assert len(warnings(caplog)) == 1, "it is said once"
    again = opened(crash_copy(store))
    assert revisions(again) == kept
    again.close()
    put(store, names[0], revision=9)
    assert revisions(store) == kept | {names[0]: 9}


def test_changes_not_checkpointed_at_the_end_are_there_at_the_next_start(
    path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    store = opened(path)
    fill_one(store)
    wanted = revisions(store)
    with monkeypatch.context() as patch:
        patch.setattr(LmdbStore, "_commit", no_space)
        store.close()
    assert warnings(caplog)[0].startswith("the write-ahead log keeps what could not be checkpointed: ")
    store = opened(path)
    assert revisions(store) == wanted


def test_a_segment_that_cannot_be_read_is_unavailable(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = opened(path)
    begin(store, "a")
    put(store, "a", revision=1)
    with monkeypatch.context() as patch:
        patch.setattr(os, "pread", io_error)
        for read in (
            lambda: store.get("a"),
            lambda: store.get_many(["a"]),
            lambda: store.heads(limit=1),
        ):
            with pytest.raises(Unavailable, match="the write-ahead log must be readable; got "):
                read()
    assert revisions(store) == {"a": 1}


@DURABILITIES
def test_a_change_waits_for_the_disk_only_if_it_must(
    path: Path, monkeypatch: pytest.MonkeyPatch, durability: Durability
) -> None:
    flags: list[int] = []
    pwritev = os.pwritev

    def write(file: int, buffers: Sequence[bytes], at: int, its_flags: int = 0) -> int:
        flags.append(its_flags)
        return pwritev(file, buffers, at, its_flags)

    store = opened(path, durability)
    begin(store, "a", "b")
    monkeypatch.setattr(os, "pwritev", write)
    put(store, "a", revision=1)
    put(store, "a", "b", revision=2)
    assert flags == [os.RWF_DSYNC if durability == "sync" else 0] * 2


def test_a_closed_store_refuses_calls(path: Path) -> None:
    store = opened(path)
    begin(store, "a")
    store.close()
    store.checkpoint()
    for use in (store.count, lambda: store.get("a"), lambda: put(store, "a", revision=1)):
        with pytest.raises(Unavailable):
            use()


def test_a_closed_store_writes_to_no_file(path: Path) -> None:
    store = opened(path)
    begin(store, "a")
    store.close()
    others = [path / f"other-{i}" for i in range(20)]
    with contextlib.ExitStack() as files:
        for other in others:
            files.enter_context(other.open("wb"))
        with pytest.raises(Unavailable, match="it is closed"):
            put(store, "a", revision=1)
    assert [other.stat().st_size for other in others] == [0] * 20
