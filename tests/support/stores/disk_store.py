"""Stores on disk with segments that are full all the time, and records for them.

A `Store` does not tell in which of its two places a record is. Tests of how records move between log and LMDB ask
here; the private attributes of a `DiskStore` are named in this module alone.
"""

from __future__ import annotations

import asyncio
import itertools
import os
import shutil
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from stepwell_server.errors import ServerError, StateCorrupt
from stepwell_server.store.base import Answer, Batch, CommitResult, End, LocalStore, Store, Tombstone, Write
from stepwell_server.store.disk.lmdb import Durability, LmdbStore
from stepwell_server.store.disk.store import DiskStore
from stepwell_server.store.disk.wal.log import WriteAheadLog
from stepwell_server.store.record import Puts, RecordBytes, RecordTemplate, Texts
from support.clock import ManualClock
from support.stores.records import Record, decode, scan_local

SEGMENT_BYTES = 4096
_OPENED: list[DiskStore | LmdbStore] = []


DURABILITIES = pytest.mark.parametrize("durability", ["sync", "async"])


async def committed(store: Store, batch: Batch) -> CommitResult:
    """Have a store keep a batch, and return what became of it, or raise why nothing of it was kept."""
    later: asyncio.Future[Answer] = asyncio.get_running_loop().create_future()
    answer = store.commit(Write(lambda: batch, len(batch.puts), later.set_result)) or await later
    if isinstance(answer, ServerError):
        raise answer
    return answer


def record(
    session_id: str,
    revision: int = 0,
    size: int = 20,
    *,
    created: float = 0.0,
    opened_with: int = 0,
    content: int | None = None,
    batch_size: int = 1,
) -> bytes:
    """A record of a session; rows of another `content` than the revision tell it from one that is as late."""
    return Record(
        fingerprint="f" * 8,
        model="m",
        batch_size=batch_size,
        revision=revision,
        position=revision,
        request_id=0,
        opened_with=opened_with,
        created=created,
        last_used=0.0,
        reply=0,
        rows=bytes([(revision if content is None else content) % 256]) * size,
    ).encode(session_id)


def template(session_ids: Sequence[str], revision: int = 0, size: int = 20) -> Puts:
    """The same records, laid out one after the other."""
    made = RecordTemplate(session_ids, Texts("f" * 8, "m"), (1, size), opened_with=0, created=0.0)
    made.rows[:] = np.uint8(revision % 256)
    return made.fill(revisions=revision, positions=revision, request_ids=0, last_used=0.0, replies=0)


def is_damaged(session_id: str, stored: RecordBytes) -> bool:
    """Whether reading a record reports that it was changed after it was written."""
    try:
        decode(session_id, stored)
    except StateCorrupt:
        return True
    return False


def put_all(parts: Sequence[Any]) -> dict[str, bytes]:
    """What is there when the records of some parts were put one after the other."""
    return {session_id: bytes(stored) for part in parts for session_id, stored in part}


def opened(path: Path, durability: Durability = "async", **options: Any) -> DiskStore:
    """A store, which the unit tests close after each test."""
    options = {"segment_bytes": SEGMENT_BYTES, **options}
    store = DiskStore(path, durability=durability, clock=ManualClock(), **options)
    _OPENED.append(store)
    return store


def opened_base(path: Path, durability: Durability = "async", **options: Any) -> LmdbStore:
    """The part in LMDB alone, which the unit tests close, too."""
    store = LmdbStore(path, durability=durability, clock=ManualClock(), **options)
    _OPENED.append(store)
    return store


def close_all() -> None:
    """Close the stores of a test, whatever it has closed itself."""
    while _OPENED:
        _OPENED.pop().close()


def crash_copy(store: DiskStore) -> Path:
    """A copy of the files that the next process finds if this one is killed now."""
    numbers = itertools.count()
    copy = next(at for n in numbers if not (at := store.path.with_name(f"{store.path.name}-{n}")).exists())
    copy_files(store, copy)
    return copy


def copy_files(store: DiskStore, to: Path) -> None:
    """Copy the files of a store as they are now to a new directory."""
    to.mkdir(mode=0o700)  # what the store makes is its user's alone, and it warns of what is not
    (to / "sessions").mkdir(mode=0o700)
    # The segment first: what is checkpointed meanwhile is then in both, and not in neither.
    shutil.copytree(store.path / "wal", to / "wal")
    # what a transaction that is under way has written so far is not part of it
    store._base._environment.copy(os.fspath(to / "sessions"))
    (to / "sessions" / "data.mdb").chmod(0o600)


def killed(store: DiskStore, durability: Durability = "async", **options: Any) -> DiskStore:
    """The next process's store."""
    copy = crash_copy(store)
    store.close()
    return opened(copy, durability, **options)


def begin(store: LocalStore, *session_ids: str, **facts: Any) -> None:
    """Open sessions: as all do, by a transaction."""
    puts = [(i, record(i, **facts)) for i in session_ids]
    store.commit(Batch(puts=puts, forgets=session_ids, counts=[("m", 1)] * len(puts)))


def put(store: LocalStore, *session_ids: str, revision: int = 0, **facts: Any) -> None:
    store.commit(Batch(puts=[(i, record(i, revision, **facts)) for i in session_ids]))


def end(store: LocalStore, *session_ids: str) -> None:
    stones = [Tombstone(i, End.CLOSED, 1.0) for i in session_ids]
    store.commit(Batch(deletes=session_ids, tombstones=stones, counts=[("m", -1)] * len(stones)))


def revisions(store: LocalStore) -> dict[str, int]:
    """Of all sessions, from `heads`; those of `get` and `get_many` are the same."""
    some = scan_local(store, limit=10_000)
    for (session_id, header), found in zip(some, store.get_many([i for i, _ in some]), strict=True):
        assert header is not None
        assert found is not None
        assert decode(session_id, found).revision == header.revision
        assert store.get(session_id) == found
    return {session_id: header.revision for session_id, header in some if header is not None}


def base_of(store: DiskStore) -> LmdbStore:
    return store._base


def wal_of(store: DiskStore) -> WriteAheadLog:
    """The write-ahead log of a store that has one: where the platform can."""
    assert store._wal is not None
    return store._wal


def in_lmdb(store: DiskStore) -> dict[str, int]:
    return revisions(base_of(store))


class Watched:
    """A lock that says when someone must wait for it."""

    def __init__(self, lock: threading.Lock, waits: threading.Event) -> None:
        self._lock, self._waits = lock, waits

    def __enter__(self) -> None:
        if not self._lock.acquire(blocking=False):
            self._waits.set()
            self._lock.acquire()

    def __exit__(self, *_: object) -> None:
        self._lock.release()


def fill_one(store: DiskStore, revision: int = 1) -> list[str]:
    """Change sessions until one segment is full and the other is begun; which ones have changed."""
    wal = wal_of(store)
    names = [f"s{i}" for i in range(100)]
    begin(store, *names)
    for place, name in enumerate(names):
        put(store, name, revision=revision)
        if wal._sealed.offsets:
            return names[: place + 1]
    raise AssertionError("the segment is never full")


def place_of(store: DiskStore, session_id: str) -> tuple[str, int]:
    """In which file a session's record is, and where there."""
    for segment in (wal_of(store)._active, wal_of(store)._sealed):
        if session_id in segment.offsets:
            return segment.path.name, segment.offsets[session_id]
    raise AssertionError(f"{session_id} is in no segment")


def warnings(caplog: pytest.LogCaptureFixture) -> list[str]:
    found = [entry.getMessage() for entry in caplog.records if entry.levelname == "WARNING"]
    caplog.clear()
    return found


def flip_in_lmdb(path: Path, content: bytes, at: int, bit: int = 1) -> None:
    """Flip a bit of the data file at an offset from every place where it has these bytes."""
    file = path / "sessions" / "data.mdb"
    data = bytearray(file.read_bytes())
    found = [place for place in range(len(data)) if data.startswith(content, place)]
    assert found
    for place in found:
        data[place + at] ^= 1 << bit
    file.write_bytes(data)
