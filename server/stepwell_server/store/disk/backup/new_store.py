"""New stores made of the sessions of others: restored, encrypted with another key, or repaired."""

from __future__ import annotations

import os
import secrets
import shutil
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

from stepwell_server.clock import Clock
from stepwell_server.store.base import Batch, StoreError, Tombstone
from stepwell_server.store.counts import of_tenants
from stepwell_server.store.disk.backup.snapshot import DATA, Snapshot, opened
from stepwell_server.store.disk.documents import Item
from stepwell_server.store.disk.files import flush, flush_folders
from stepwell_server.store.disk.lmdb import COPY, LmdbStore
from stepwell_server.store.disk.lock import DirectoryLock, try_write_lock
from stepwell_server.store.record import RecordBytes, header_or_none

#: Sessions in one transaction, and bytes of them.
_BATCH_SIZE, _BATCH_BYTES = 4096, 16 * 2**20

Pair = tuple[str, RecordBytes]


def make(
    folder: Path,
    clock: Clock,
    sessions: Iterable[Pair],
    stones: Iterable[Tombstone],
    documents: Callable[[], Iterable[Item]],
    about: Callable[[], dict[bytes, bytes]],
) -> int:
    """Make a store in a new folder, durably; how many sessions it has.

    `documents`, and what is `about` the store as a whole, are asked for when the sessions are there.
    """
    store = LmdbStore(folder, durability="async", clock=clock)
    try:
        count = _fill(store, sessions, stones)
        store.put_documents(documents())
        store.set_meta(about())
        store.sync()
    finally:
        store.close()
    return count


def _fill(store: LmdbStore, sessions: Iterable[Pair], stones: Iterable[Tombstone]) -> int:
    total = 0
    for part in _parts(sessions):
        models = [(i, h.model) for i, record in part if (h := header_or_none(i, record)) is not None]
        counts = Counter(model for _, model in models)
        store.commit(Batch(puts=part, counts=list(counts.items()), tenant_counts=of_tenants(models, 1)))
        total += len(part)
    some: list[Tombstone] = []
    for stone in stones:
        some.append(stone)
        if len(some) == _BATCH_SIZE:
            store.commit(Batch(tombstones=some))
            some = []
    if some:
        store.commit(Batch(tombstones=some))
    return total


def _parts(sessions: Iterable[Pair]) -> Iterator[list[Pair]]:
    part: list[Pair] = []
    size = 0
    for pair in sessions:
        part.append(pair)
        size += len(pair[1])
        if len(part) >= _BATCH_SIZE or size >= _BATCH_BYTES:
            yield part
            part, size = [], 0
    if part:
        yield part


@contextmanager
def new_folder(path: Path) -> Iterator[Path]:
    """A folder beside a path, to be made into a data directory: it takes the path's place when the body has ended.

    The path must not be there, or be an empty folder. Whenever this is interrupted, that is as it was.

    Raises:
        StoreError: it has something, or cannot be made.
    """
    problem = f"the data directory {path} must not be there yet, or be empty"
    aside = path.with_name(f".{path.name}.{secrets.token_hex(4)}.unfinished")
    try:
        if path.exists() and (not path.is_dir() or any(path.iterdir())):
            raise StoreError(problem)
        path.parent.mkdir(parents=True, exist_ok=True)
        aside.mkdir(mode=0o700)
        try:
            yield aside
            try:
                aside.rename(path)
            except OSError as error:
                raise StoreError(f"{problem}: {error.strerror}") from error
            flush_folders(path, path.parent)
        finally:
            shutil.rmtree(aside, ignore_errors=True)
    except OSError as error:
        raise StoreError(f"the data directory {path} must be writable: {error.strerror}") from error


def rebuild(
    path: Path,
    clock: Clock,
    sessions: Callable[[Snapshot], Iterable[Pair]],
    about: Callable[[dict[bytes, bytes]], dict[bytes, bytes]],
    stones: Callable[[Snapshot], Iterable[Tombstone]] = Snapshot.tombstones,
    documents: Callable[[Snapshot], Iterable[Item]] = Snapshot.all_documents,
) -> int:
    """Replace the store in a data directory by one of the given sessions; returns how many they are.

    No server may use it. The new data file takes the place of the old one in one step, when it is whole and on the disk:
    whenever this is interrupted, all is as it was. The write-ahead log is emptied and removed.

    Args:
        path: The data directory.
        clock: For the lock.
        sessions: Ids and records that the new store shall have.
        about: The facts about the new store as a whole, from those about the old one.
        stones: Its tombstones, the oldest first.
        documents: Its documents.

    Raises:
        StoreBusy: a server uses it.
        StoreError: it cannot be read or written.
    """
    aside = path / COPY
    lock = DirectoryLock(path, clock=clock)
    try:
        with opened(path) as found:
            shutil.rmtree(aside, ignore_errors=True)
            count = make(
                aside,
                clock,
                sessions(found),
                stones(found),
                lambda: documents(found),
                lambda: about(found.meta),
            )
        with try_write_lock(path) as may_replace:
            if not may_replace:
                raise StoreError(f"nobody may read the store in {path} now; another process does")
            flush(aside / DATA)
            os.replace(aside / DATA, path / DATA)
            flush(path / DATA.parent)
        shutil.rmtree(path / "wal", ignore_errors=True)
        flush(path)
    finally:
        shutil.rmtree(aside, ignore_errors=True)
        lock.release()
    return count
