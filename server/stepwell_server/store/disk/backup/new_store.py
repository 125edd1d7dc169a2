"""Creates stores from the sessions of others, to restore, re-encrypt or repair them."""

from __future__ import annotations

import os
import secrets
import shutil
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

from stepwell_server.clock import Clock
from stepwell_server.files.flush import flush, flush_folders
from stepwell_server.store.base import Batch, StoreError, Tombstone
from stepwell_server.store.counts import of_tenants
from stepwell_server.store.disk.backup.snapshot import DATA, Snapshot, opened
from stepwell_server.store.disk.documents import Item
from stepwell_server.store.disk.lmdb import COPY, LmdbStore
from stepwell_server.store.disk.lock import DirectoryLock, try_write_lock
from stepwell_server.store.record import RecordBytes, header_or_none

#: Maximum of sessions and bytes in one transaction.
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
    """Create a store in a new folder, durably; return its number of sessions.

    `documents` and `about` (the facts about the store as a whole) are called after the sessions were written.
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
    """Yield a temporary folder for a new data directory, and move it to `path` when the block ends.

    The path must not exist, or must be an empty folder and not the current one. An interruption leaves it unchanged.

    Raises:
        StoreError: the path has content, or cannot be created.
    """
    problem = f"the data directory {path} must not exist yet, or must be empty"
    try:
        if path.exists():
            if not path.is_dir() or any(path.iterdir()):
                raise StoreError(problem)
            if path.samefile("."):  # the caller would stay in the old one, which is deleted
                raise StoreError(
                    f"the data directory {path} must not be the current folder: run this elsewhere"
                )
        aside = path.with_name(f".{path.name}.{secrets.token_hex(4)}.unfinished")
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
    """Replace the store in a data directory by a new one with the given sessions; return their number.

    No server may use it. The new data file replaces the old one in one step, when it is complete and on disk: an
    interruption leaves everything unchanged. The write-ahead log is removed.

    Args:
        path: The data directory.
        clock: For the lock.
        sessions: Returns ids and records of the new store.
        about: Converts the facts about the old store into those about the new one.
        stones: Returns its tombstones, oldest first.
        documents: Returns its documents.

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
                raise StoreError(f"the store in {path} must not be in use; another process reads it")
            flush(aside / DATA)
            os.replace(aside / DATA, path / DATA)
            flush(path / DATA.parent)
        shutil.rmtree(path / "wal", ignore_errors=True)
        flush(path)
    finally:
        shutil.rmtree(aside, ignore_errors=True)
        lock.release()
    return count
