"""The two logs of a store: which record of a session counts, whichever it is in, for its server and for other processes."""

from __future__ import annotations

import random
import shutil
from pathlib import Path
from typing import Any

import pytest

from stepwell_server.store.base import StoreError
from stepwell_server.store.disk.backup import snapshot
from stepwell_server.store.disk.lmdb import Durability
from stepwell_server.store.disk.store import DiskStore
from stepwell_server.store.disk.wal import pair, reader
from support.processes import opened_below
from support.records import decode
from support.stored import (
    DURABILITIES,
    begin,
    beside_of,
    in_lmdb,
    killed,
    left_behind,
    logs_of,
    opened,
    place_of,
    put,
    record,
    revisions,
    wal_of,
)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "data"


def append(store: DiskStore, *session_ids: str, revision: int) -> bool:
    return store.append([(session_id, record(session_id, revision)) for session_id in session_ids])


def fill(store: DiskStore, session_id: str, revision: int) -> int:
    """Append changes of a session beside commits until both segments were begun anew; the last revision."""
    wal, begun = beside_of(store), 0
    active = wal._active
    while begun < 3:
        revision += 1
        while not append(store, session_id, revision=revision):
            store.checkpoint()
        if wal._active is not active:
            active, begun = wal._active, begun + 1
    return revision


@DURABILITIES
def test_the_last_change_counts_whichever_log_it_is_in(path: Path, durability: Durability) -> None:
    store = opened(path, durability)
    begin(store, "a", "b")
    for revision in range(1, 8):
        if revision % 2:
            put(store, "a", revision=revision)
        else:
            assert append(store, "a", revision=revision)
        assert revisions(store) == {"a": revision, "b": 0}
        assert place_of(store, "a")[0] in ("01" if revision % 2 or durability == "async" else "23")
        copy = opened(left_behind(store), durability)
        assert revisions(copy) == {"a": revision, "b": 0}
        assert durability == "async" or wal_of(copy).ids().isdisjoint(beside_of(copy).ids()), "it is in one"
        copy.close()
    store.close()


@DURABILITIES
@pytest.mark.parametrize("seed", range(3))
def test_sessions_that_move_between_the_logs_lose_nothing(
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
            with snapshot.opened(left_behind(store)) as found:
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
    store.close()


@pytest.mark.parametrize("back", [False, True], ids=["to commits", "and back"])
def test_a_snapshot_has_what_moves_to_the_log_that_was_read_before(
    path: Path, monkeypatch: pytest.MonkeyPatch, back: bool
) -> None:
    """The log of commits is read first. What is moved there then leaves the other only when LMDB has it."""
    store = opened(path, "sync")
    begin(store, "a", "b")
    put(store, "a", revision=1)
    assert append(store, "a", revision=2)
    real = reader.read_log

    def moving(folder: Path, names: tuple[str, str], owner: int) -> dict[str, bytes]:
        if names == pair.BESIDE:
            put(store, "a", revision=3)
            if back:
                assert append(store, "a", revision=4)
            fill(store, "b", 0)
        return real(folder, names, owner)

    monkeypatch.setattr(reader, "read_log", moving)
    log = reader.read_logs(store.path / "wal", logs_of(store).mark)
    kept = max(decode("a", log["a"]).revision if "a" in log else 0, in_lmdb(store)["a"])
    assert kept >= 2, "it had been acknowledged"
    store.close()


def test_who_misses_a_session_while_it_moves_looks_again(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = opened(path, "sync")
    begin(store, "a")
    assert append(store, "a", revision=1)
    find, is_first = beside_of(store).find, True

    def moving(session_id: str) -> Any:
        nonlocal is_first
        if is_first:  # the log of commits does not have it
            is_first = False
            put(store, "a", revision=2)
        return find(session_id)

    monkeypatch.setattr(beside_of(store), "find", moving)
    assert decode("a", store.get("a") or b"").revision == 2
    store.close()


def test_which_of_two_records_counts() -> None:
    old, new = record("a", 1), record("a", 2)
    damaged = bytes([*new[:-1], new[-1] ^ 1])
    assert pair.is_later("a", new, old)
    assert not pair.is_later("a", old, new)
    assert pair.is_later("a", damaged, old)
    assert not pair.is_later("a", old, damaged)
    assert not pair.is_later("a", new, bytes([*old[:-1], old[-1] ^ 1])), "nobody knows what it said"


def test_a_damaged_record_of_one_log_is_told_although_the_other_has_one(path: Path) -> None:
    store = opened(path, "sync")
    begin(store, "a", "b")
    put(store, "a", "b", revision=1)
    assert append(store, "a", revision=2)
    append(store, "b", revision=2)  # so that it is not the last write, which may be cut off
    name, at = place_of(store, "a")
    copy = left_behind(store)
    store.close()
    data = bytearray((copy / "wal" / name).read_bytes())
    data[at + len(record("a", 2)) - 1] ^= 1
    (copy / "wal" / name).write_bytes(data)
    store = opened(copy, "sync")
    assert decode("b", store.get("b") or b"").revision == 2
    with pytest.raises(Exception, match="checksum"):
        decode("a", store.get("a") or b"")
    store.close()


def test_a_mark_says_which_logs_there_are() -> None:
    assert pair.Mark.unpacked(pair.Mark(1, 2, 3).packed()) == pair.Mark(1, 2, 3)
    assert pair.Mark.unpacked(pair.Mark(1, 2, 0).packed()) == pair.Mark(1, 2, 0)
    with pytest.raises(StoreError, match="must have 20 bytes; it is damaged and has 12"):
        pair.Mark.unpacked(pair.Mark(1, 2, 0).packed()[:12])


@pytest.mark.parametrize("first", ["sync", "async"])
def test_another_durability_has_the_logs_that_it_needs(path: Path, first: Durability) -> None:
    then: Durability = "async" if first == "sync" else "sync"
    store = opened(path, first)
    begin(store, "a", "b")
    put(store, "a", revision=1)
    assert append(store, "b", revision=1)
    store = killed(store, then)
    assert revisions(store) == in_lmdb(store) == {"a": 1, "b": 1}
    assert (beside_of(store) is not wal_of(store)) == (then == "sync")
    put(store, "a", revision=2)
    assert append(store, "b", revision=2)
    store = killed(store, first)
    assert revisions(store) == {"a": 2, "b": 2}
    store.close()


@pytest.mark.parametrize("gone", ["2", "3", "23"])
def test_a_segment_of_the_other_log_that_was_deleted_is_damage(path: Path, gone: str) -> None:
    store = opened(path, "sync")
    begin(store, "a", "b")
    put(store, "a", revision=1)
    assert append(store, "b", revision=1)
    copy = left_behind(store)
    store.close()
    for name in gone:
        (copy / "wal" / name).unlink()
    with pytest.raises(StoreError, match=rf"/{gone[0]} cannot be read"):
        opened(copy, "sync")
    store = opened(copy, "async")
    assert revisions(store) == {"a": 1, "b": int(gone == "3")}
    store.close()


def test_logs_that_cannot_all_be_opened_leave_no_file_open(path: Path, tmp_path: Path) -> None:
    folder = tmp_path / "wal"
    folder.mkdir()
    (folder / "3").mkdir()
    with pytest.raises(IsADirectoryError):
        pair.WriteAheadLogs(
            folder, pair.Mark(1, 4096, 4096), flush=False, make=True, before_rotate=lambda: None
        )
    assert opened_below(folder) == []
    shutil.rmtree(folder)
