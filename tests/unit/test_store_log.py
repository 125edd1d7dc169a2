"""The log of a store: which record of a session counts, however it was written, for its server and for other processes."""

from __future__ import annotations

import random
import shutil
from pathlib import Path

import pytest

from stepwell_server.store.base import StoreError
from stepwell_server.store.disk.backup import snapshot
from stepwell_server.store.disk.lmdb import Durability
from stepwell_server.store.disk.store import DiskStore
from stepwell_server.store.disk.wal import log
from support.processes import opened_below
from support.stores.disk_store import (
    DURABILITIES,
    begin,
    crash_copy,
    in_lmdb,
    killed,
    opened,
    place_of,
    put,
    record,
    revisions,
)
from support.stores.records import decode


def append(store: DiskStore, *session_ids: str, revision: int) -> bool:
    return store.append([(session_id, record(session_id, revision)) for session_id in session_ids])


@DURABILITIES
@pytest.mark.parametrize("seed", range(3))
def test_sessions_changed_during_and_by_commits_lose_nothing(
    path: Path, durability: Durability, seed: int
) -> None:
    chance, names = random.Random(seed), [f"s{number}" for number in range(12)]
    store = opened(path, durability)
    begin(store, *names)
    wanted = dict.fromkeys(names, 0)
    for revision in range(1, 400):
        some = chance.sample(names, chance.choice([1, 1, 2, 6]))
        if chance.random() < 0.5 or not append(store, *some, revision=revision):
            put(store, *some, revision=revision)
        wanted |= dict.fromkeys(some, revision)
        if chance.random() < 0.2:
            store.checkpoint(briefly=chance.random() < 0.5)
        if chance.random() < 0.05:
            with snapshot.opened(crash_copy(store)) as found:
                there = {
                    entry.session_id: decode(entry.session_id, entry.record) for entry in found.sessions()
                }
            assert {session_id: facts.revision for session_id, facts in there.items()} == wanted
        if chance.random() < 0.03:
            store = killed(store, durability)
            assert revisions(store) == wanted
    store.close()
    store = opened(store.path, durability)
    assert revisions(store) == in_lmdb(store) == wanted


def test_a_damaged_record_is_reported_although_an_earlier_one_is_there(path: Path) -> None:
    store = opened(path, "sync")
    begin(store, "a", "b")
    put(store, "a", "b", revision=1)
    assert append(store, "a", revision=2)
    append(store, "b", revision=2)  # so that it is not the last write, which may be cut off
    name, at = place_of(store, "a")
    copy = crash_copy(store)
    store.close()
    data = bytearray((copy / "wal" / name).read_bytes())
    data[at + len(record("a", 2)) - 1] ^= 1
    (copy / "wal" / name).write_bytes(data)
    store = opened(copy, "sync")
    assert decode("b", store.get("b") or b"").revision == 2
    with pytest.raises(Exception, match="checksum"):
        decode("a", store.get("a") or b"")


def test_a_mark_is_read_as_it_was_written() -> None:
    assert log.Mark.unpacked(log.Mark(1, 2).packed()) == log.Mark(1, 2)
    with pytest.raises(StoreError, match="must have 12 bytes; it is damaged and has 8"):
        log.Mark.unpacked(log.Mark(1, 2).packed()[:8])


@pytest.mark.parametrize("first", ["sync", "async"])
def test_another_durability_continues_the_existing_log(path: Path, first: Durability) -> None:
    then: Durability = "async" if first == "sync" else "sync"
    store = opened(path, first)
    begin(store, "a", "b")
    put(store, "a", revision=1)
    assert append(store, "b", revision=1)
    store = killed(store, then)
    assert revisions(store) == {"a": 1, "b": 1}
    assert in_lmdb(store) == {"a": 0, "b": 0}
    put(store, "a", revision=2)
    assert append(store, "b", revision=2)
    store = killed(store, first)
    assert revisions(store) == {"a": 2, "b": 2}


def test_a_log_that_cannot_be_opened_leaves_no_file_open(path: Path, tmp_path: Path) -> None:
    folder = tmp_path / "wal"
    folder.mkdir()
    (folder / "1").mkdir()
    with pytest.raises(IsADirectoryError):
        log.WriteAheadLog(folder, log.Mark(1, 4096), flush=False, make=True, before_rotate=lambda: None)
    assert opened_below(folder) == []
    shutil.rmtree(folder)
