"""The store on disk answers as the one in memory does, whatever is in its segments when it is opened, killed or failing."""

from __future__ import annotations

import itertools
import os
import random
import shutil
import sys
import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from stepwell_server.store.base import Batch, End, Tombstone
from stepwell_server.store.disk.lmdb import Durability
from stepwell_server.store.memory import MemoryStore
from stepwell_server.store.record import JoinedPuts
from support.run_folder import memory_folder
from support.samples import examples
from support.stores.disk_store import (
    DURABILITIES,
    SEGMENT_BYTES,
    Watched,
    begin,
    crash_copy,
    end,
    fill_one,
    in_lmdb,
    killed,
    opened,
    put,
    record,
    revisions,
    template,
    wal_of,
)
from support.stores.records import decode, scan_local

# ------------------------------------------------------------------------------------------------ as the one in memory

KNOWN = ["a", "aa", "ab", "b", "ä", "é" * 256]
DEEDS = st.sampled_from(
    ["begin", "put", "put", "put", "beside", "beside", "end", "both", "name", "checkpoint", "reopen", "kill"]
)
SIZES = [0, 20, 20, 300, 900, 2500, 9000]


class Two:
    """The store on disk and the one in memory, to which the same is done."""

    def __init__(self, folder: Path, durability: Durability) -> None:
        self._durability: Durability = durability
        self._folder = folder / "data"
        self.disk = opened(self._folder, durability)
        self.memory = MemoryStore(tombstones=100)
        self._lives: dict[str, tuple[int, dict[str, Any]]] = {}
        """Revision of each session, and what tells it from others of its id."""
        self._numbers = itertools.count(1)

    def do(self, deed: str, chance: random.Random) -> None:
        if deed == "checkpoint":
            self.disk.checkpoint()
        elif deed == "kill":
            self.disk = killed(self.disk, self._durability)
        elif deed == "reopen":
            self.disk.close()
            self.disk = opened(self.disk.path, self._durability)
            assert wal_of(self.disk).is_empty
        elif deed == "beside":
            puts = self._part(chance)
            self.memory.commit(Batch(puts=puts))
            if puts and not self.disk.append(puts):  # there is no room
                self.disk.commit(Batch(puts=puts))
        else:
            self._commit(getattr(self, f"_{deed}")(chance))

    def _commit(self, batch: Batch) -> None:
        self.disk.commit(batch)
        self.memory.commit(batch)

    def _begin(self, chance: random.Random) -> Batch:
        """A session begins; one that has its id ends in the commit before."""
        session_id, number = chance.choice(KNOWN), next(self._numbers)
        if session_id in self._lives:
            self._commit(Batch(deletes=[session_id], counts=[("m", -1)]))
        # sessions of one id and one time differ by the call that opened them, and vice versa
        facts: dict[str, Any] = chance.choice(
            [{"created": float(number)}, {"opened_with": number}, {"created": number, "opened_with": 7}]
        )
        self._lives[session_id] = chance.choice([0, 0, 5]), facts
        stored = record(session_id, self._lives[session_id][0], content=number, **facts)
        return Batch(puts=[(session_id, stored)], forgets=[session_id], counts=[("m", 1)])

    def _put(self, chance: random.Random) -> Batch:
        parts = [part for _ in range(chance.choice([1, 1, 2, 3])) if (part := self._part(chance))]
        return Batch(puts=JoinedPuts(parts) if len(parts) > 1 else [put for part in parts for put in part])

    def _part(self, chance: random.Random) -> Any:
        some = [i for i in self._lives if chance.random() < 0.5]
        size, puts = chance.choice(SIZES), []
        for session_id in some + some[: chance.randrange(2)]:
            revision, facts = self._lives[session_id]
            self._lives[session_id] = revision + chance.choice([1, 1, 3]), facts
            puts.append((session_id, record(session_id, self._lives[session_id][0], size, **facts)))
        return puts

    def _end(self, chance: random.Random) -> Batch:
        gone = [i for i in self._lives if chance.random() < 0.3]
        for session_id in gone:
            del self._lives[session_id]
        stones = [Tombstone(i, chance.choice(list(End)), 2.0, (3,), 4) for i in gone]
        return Batch(deletes=gone, tombstones=stones, counts=[("m", -1)] * len(gone))

    def _both(self, chance: random.Random) -> Batch:
        ended = self._end(chance)
        return Batch(puts=self._part(chance), deletes=ended.deletes, counts=ended.counts)

    def _name(self, chance: random.Random) -> Batch:
        """Documents, with changes of sessions that may be in the log."""
        content = bytes([next(self._numbers) % 256]) * chance.choice([0, 20, 5000])
        documents = [
            ("model/a", content),
            (chance.choice(["model/a", "model/b", "z"]), chance.choice([content, None])),
        ]
        return Batch(puts=self._part(chance), documents=documents)

    def require_same(self) -> None:
        disk, memory = self.disk, self.memory
        assert disk.documents() == memory.documents()
        assert disk.documents("model/") == memory.documents("model/")
        assert disk.get_many(KNOWN) == memory.get_many(KNOWN) == [disk.get(i) for i in KNOWN]
        assert [disk.tombstones([i])[0] for i in KNOWN] == [memory.tombstones([i])[0] for i in KNOWN]
        assert disk.count() == memory.count() == disk.count_of("m") == memory.count_of("m")
        for after in ("", "a"):
            ours, theirs = disk.heads(after=after, limit=9), memory.heads(after=after, limit=9)
            assert (ours.keys, ours.heads.tobytes()) == (theirs.keys, theirs.heads.tobytes())
            assert [ours.models[i] for i in ours.model] == [theirs.models[i] for i in theirs.model]
            assert ours.fields == theirs.fields
        for options in ({}, {"prefix": "a"}, {"prefix": "a", "after": "a"}):
            assert scan_local(disk, limit=9, **options) == scan_local(memory, limit=9, **options)


@DURABILITIES
@settings(max_examples=examples(60))
@example(deeds=["begin", "put", "begin", "kill", "put", "kill"], seed=1)
@example(deeds=["put", "beside", "kill", "put", "kill", "beside", "checkpoint", "put", "reopen"], seed=2)
@given(deeds=st.lists(DEEDS, min_size=5, max_size=60), seed=st.integers(0, 2**32))
def test_it_answers_as_the_store_in_memory_does(durability: Durability, deeds: list[str], seed: int) -> None:
    with tempfile.TemporaryDirectory(dir=memory_folder()) as folder:
        two, chance = Two(Path(folder), durability), random.Random(seed)
        try:
            for deed in ["begin", "begin", *deeds, "kill"]:
                two.do(deed, chance)
                two.require_same()
        finally:
            two.disk.close()


@pytest.mark.slow
@DURABILITIES
def test_journals_turn_a_hundred_times_and_nothing_is_lost(path: Path, durability: Durability) -> None:
    store, names = opened(path, durability), [f"s{i}" for i in range(20)]
    begin(store, *names)
    wanted, chance = dict.fromkeys(names, 0), random.Random(3)
    for revision in range(1, 1500):
        some = chance.sample(names, 3)
        put(store, *some, revision=revision)
        wanted |= dict.fromkeys(some, revision)
        for name in chance.sample(names, 2):  # into the other log, beside
            if wanted[name] < revision and store.append([(name, record(name, revision))]):
                wanted[name] = revision
        if chance.random() < 0.5:
            store.checkpoint()
        if revision % 50 == 0:
            assert revisions(store) == wanted
            store = killed(store, durability)
            assert revisions(store) == wanted


def test_a_template_is_kept_as_its_records_are(path: Path) -> None:
    store, names = opened(path), ["a", "b", "c"]
    begin(store, *names)
    puts = template(names, 1)
    store.commit(Batch(puts=JoinedPuts([puts, [("a", record("a", 2))]])))
    assert revisions(store) == {"a": 2, "b": 1, "c": 1}
    store = killed(store)
    assert revisions(store) == {"a": 2, "b": 1, "c": 1}


@pytest.fixture
def quick_switches() -> Iterator[None]:
    """Threads interrupt each other between any two operations."""
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    yield
    sys.setswitchinterval(before)


@pytest.mark.usefixtures("quick_switches")
def test_reads_never_go_back_while_segments_rotate(path: Path) -> None:
    store, done, problems = opened(path), threading.Event(), list[BaseException]()
    begin(store, "a", "b")

    def read() -> None:
        last = 0
        try:
            while not done.is_set():
                found = decode("a", store.get("a") or b"").revision
                ((_, header),) = scan_local(store, prefix="a", limit=1)
                assert header is not None
                assert last <= found <= header.revision
                last = header.revision
        except BaseException as error:
            problems.append(error)

    readers = [threading.Thread(target=read) for _ in range(2)]
    for reader in readers:
        reader.start()
    for revision in range(1, 2000):
        put(store, "a", *["b"] * (revision % 2), revision=revision)
        if revision % 3:
            store.checkpoint()
    done.set()
    for reader in readers:
        reader.join(timeout=200)
    store.close()
    assert not problems


def test_a_segment_is_not_truncated_while_someone_reads_in_it(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = opened(path)
    changed = fill_one(store)
    inside, go_on, found, pread = threading.Event(), threading.Event(), list[bytes](), os.pread

    def read(file: int, size: int, at: int) -> bytes:
        if threading.current_thread() is reader:
            inside.set()
            assert go_on.wait(100)
        return pread(file, size, at)

    monkeypatch.setattr(os, "pread", read)
    wal = wal_of(store)  # contention for its lock would show only by chance
    monkeypatch.setattr(wal, "_looking", Watched(wal._looking, go_on))
    reader = threading.Thread(target=lambda: found.append(bytes(store.get(changed[0]) or b"")))
    reader.start()
    assert inside.wait(100)
    for revision in range(2, 100):
        put(store, changed[-1], revision=revision)
    go_on.set()
    reader.join(100)
    assert found == [record(changed[0], 1)]


# -------------------------------------------------------------------------------------------------- ended, and reopened


@DURABILITIES
def test_ended_sessions_never_return(path: Path, durability: Durability) -> None:
    store = opened(path, durability)
    begin(store, "a", "b")
    put(store, "a", "b", revision=7)
    end(store, "a")
    for _ in range(2):
        assert store.get("a") is None
        assert store.get_many(["a", "b"]) == [None, record("b", 7)]
        assert revisions(store) == {"b": 7}
        assert store.count() == 1
        store = killed(store, durability)


@pytest.mark.parametrize("facts", [{"created": 8.0}, {"opened_with": 8}])
def test_a_session_that_is_opened_under_the_id_of_an_old_one_is_the_new_one(
    path: Path, facts: dict[str, Any]
) -> None:
    store = opened(path)
    begin(store, "a")
    put(store, "a", revision=7)
    end(store, "a")
    begin(store, "a", **facts)
    assert revisions(store) == {"a": 0}
    store = killed(store)
    assert store.get("a") == record("a", 0, **facts)
    put(store, "a", revision=1, **facts)
    store = killed(store)
    assert store.get("a") == record("a", 1, **facts)
    store.close()
    store = opened(store.path)
    assert store.get("a") == record("a", 1, **facts)


# ------------------------------------------------------------------------------------------------------- checkpoints


def test_the_later_journal_wins(path: Path) -> None:
    store = opened(path)
    changed = fill_one(store)
    put(store, changed[0], revision=2)
    wanted = dict.fromkeys(in_lmdb(store), 0) | dict.fromkeys(changed, 1) | {changed[0]: 2}
    assert in_lmdb(store)[changed[0]] == 0
    assert revisions(store) == wanted
    store = killed(store)
    assert revisions(store) == wanted
    store.close()
    store = opened(store.path)
    assert in_lmdb(store) == revisions(store) == wanted


def test_it_needs_a_checkpoint_until_all_is_checkpointed(path: Path) -> None:
    store = opened(path)
    changed = fill_one(store)
    hurry, revision = [store.needs_checkpoint], 1
    while not hurry[-1]:
        revision += 1
        put(store, changed[0], revision=revision)
        hurry.append(store.needs_checkpoint)
    assert len(hurry) > 5, "there is room for more"
    store.checkpoint()
    assert not store.needs_checkpoint
    assert [in_lmdb(store)[i] for i in changed] == [0, *[1] * (len(changed) - 2), 0], (
        "but what changed again is not"
    )
    assert revisions(store)[changed[0]] == revision


def test_closing_checkpoints_everything(path: Path) -> None:
    store = opened(path)
    changed = fill_one(store)
    wanted = revisions(store)
    store.close()
    store.close()
    store = opened(path)
    assert wal_of(store).is_empty
    assert in_lmdb(store) == wanted
    put(store, changed[0], revision=2)
    assert in_lmdb(store)[changed[0]] == 1, "segments are written again"
    store.close()
    shutil.rmtree(path / "wal")
    store = opened(path)
    assert revisions(store) == wanted | {changed[0]: 2}


@pytest.mark.parametrize("size", [SEGMENT_BYTES // 2 - 200, SEGMENT_BYTES - 200, 3 * SEGMENT_BYTES])
def test_changes_too_large_for_a_segment_are_kept(path: Path, size: int) -> None:
    store = opened(path)
    begin(store, "a", "b")
    wanted = {"a": 0, "b": 0}
    for revision in range(1, 12):
        name = "ab"[revision % 2]
        put(store, name, revision=revision, size=size if revision % 3 else 20)
        wanted[name] = revision
        assert revisions(store) == wanted
        again = opened(crash_copy(store))
        assert revisions(again) == wanted
        again.close()


@pytest.mark.parametrize("sizes", [(4096, 65536), (65536, 4096)])
@pytest.mark.parametrize("durabilities", [("sync", "async"), ("async", "sync")])
def test_a_segment_of_another_size_or_durability_is_read(
    path: Path, sizes: tuple[int, int], durabilities: tuple[Durability, Durability]
) -> None:
    store, names = opened(path, durabilities[0], segment_bytes=sizes[0]), [f"s{i}" for i in range(30)]
    begin(store, *names)
    for revision in range(1, 20):
        put(store, *names[:revision], revision=revision)
    wanted = revisions(store)
    store = killed(store, durabilities[1], segment_bytes=sizes[1])
    assert revisions(store) == wanted
    put(store, *names, revision=30)
    store = killed(store, durabilities[0])
    assert revisions(store) == dict.fromkeys(names, 30)
