"""Sessions in one LMDB environment under the data directory.

    server.lock          names the server that uses the directory
    sessions/data.mdb    databases `sessions`, `changes`, `tombstones`, `tombstone_ages`, `meta`, `documents`; see
                         `file_length`
    sessions/lock.mdb    LMDB's own lock file; only used while the store is open
    sessions/reserve     room for ending sessions on a full disk; see `reserve`

What a commit survives, and why:

- `sync`: LMDB's default flags. LMDB writes changed pages to free places and flushes them (fdatasync), then writes the
  page that points to them through to the disk (O_DSYNC). `metasync=False` would skip the second wait, and a loss of power
  could undo the last acknowledged commit.
- `async`: `sync=False`. LMDB writes in the same order with pwrite, to the kernel's page cache, which outlives the process:
  `kill -9` loses nothing. Pages may reach the disk in any order, so a loss of power or a kernel crash can corrupt the
  whole file; `sync` narrows the window. `writemap=True` stays off for both: it writes through the map, where a stray
  pointer corrupts the file and a full disk kills the process with SIGBUS.
"""

from __future__ import annotations

import contextlib
import errno
import functools
import itertools
import logging
import os
import shutil
import threading
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, TypeVar

import lmdb
from typing_extensions import override

from stepwell_server.clock import Clock
from stepwell_server.errors import StateCorrupt, StoreGone, Unavailable
from stepwell_server.files import private_files
from stepwell_server.files.flush import flush_folders
from stepwell_server.store.base import TOMBSTONES, Batch, LocalStore, StoreError, StoreHealth, Tombstone
from stepwell_server.store.disk import documents as in_lmdb
from stepwell_server.store.disk import earlier, meta
from stepwell_server.store.disk.file_length import lengthen, require_whole_file, within_limit
from stepwell_server.store.disk.files import OpenFiles, explain, start_errors
from stepwell_server.store.disk.key_sums import BATCH_SIZE, Change, KeyCheck, UnexpectedKeys
from stepwell_server.store.disk.keys import is_gap, items, key_of, own, values
from stepwell_server.store.disk.lock import DirectoryLock
from stepwell_server.store.disk.reserve import Extent, NoSpace, Reserve
from stepwell_server.store.disk.tombstones import bury, next_age, tombstone
from stepwell_server.store.heads import Heads, heads_of
from stepwell_server.store.record import RecordBytes

Durability = Literal["sync", "async"]
T = TypeVar("T")
# py-lmdb's own types tell transactions that return bytes from those that return views; that is of no use here
_Environment = Any
_Transaction = Any

FIRST_MAP_BYTES = 2**20
"""Initial size of the map, and so of the data file. It doubles whenever it is full."""
GIVE_UP_S = 30.0
"""After a disk failure the store must be reopened; it gives up after this many seconds."""
RETRY_S = 0.5
"""Readers try to reopen at most once in this time; commits always try."""

#: Fewer keys than this are searched one by one.
_MIN_GAP = 4

_log = logging.getLogger(__name__)

_DAMAGE = (lmdb.CorruptedError, lmdb.PageNotFoundError)
_READABLE = "the store must be readable"
_KEEPS = "the store must be able to keep the change"
_FOLDER, _DATA = "sessions", "data.mdb"
COPY = "sessions.new"
"""A folder for data that will replace the sessions. A start removes one that was left behind."""


class LmdbStore(LocalStore):
    """Sessions in LMDB. Holds the lock of the data directory from creation to `close`. Must not be used after a fork."""

    for_one_thread = False
    needs_checkpoint = False

    def __init__(
        self,
        path: Path,
        *,
        durability: Durability,
        clock: Clock,
        tombstones: int = TOMBSTONES,
        first_map_bytes: int = FIRST_MAP_BYTES,
    ) -> None:
        """Open the store in a data directory, which is created if missing.

        Raises:
            StoreBusy: another server uses the directory.
            StoreError: it cannot be used.
        """
        self._folder = path / _FOLDER
        self._durability = durability
        self.waits_for_disk = durability == "sync"
        self._max_tombstones = tombstones
        self._first_map_bytes = first_map_bytes
        # No thread may have an open transaction while the map is replaced. Writers hold the first lock and readers
        # the second.
        # To reopen the environment, a thread holds both, in this order.
        self._writing, self._remap = threading.Lock(), threading.Lock()
        self._must_reopen = False
        self._reopened = 0
        self._failing_since: float | None = None
        self._retry_at = 0.0
        self._closed = False
        self._clock = clock
        self._data_file = -1
        self._check = KeyCheck()
        self.files = OpenFiles()
        """The files that must stay in their places."""
        with start_errors(path, self._folder, lmdb.Error):
            private_files.make_folder(path, private_files.OF_DATA)
            self.lock = DirectoryLock(path, clock=clock)
        try:
            with start_errors(path, self._folder, lmdb.Error):
                self._start(path)
                self._reserve = Reserve(self._folder, clock)
        except BaseException:
            self._release()
            raise
        self._check.start(self._check_keys)

    @property
    @override
    def damage(self) -> str:
        return self._check.damage

    @property
    def wal_mark(self) -> bytes:
        """The mark that `set_wal_mark` stored last."""
        return self._mark

    def set_wal_mark(self, mark: bytes) -> None:
        """Store which write-ahead log belongs to the store.

        Raises:
            Unavailable: it could not be stored.
        """
        self.set_meta({meta.MARK: mark})
        self._mark: bytes = mark

    @property
    def key_checks(self) -> dict[str, bytes]:
        """Checks of the keys that may encrypt records, see `Keyring.checks`."""
        found = self._read("", lambda transaction: transaction.get(meta.KEYS, b"{}", db=self._meta))
        return meta.unpack_keys(found)

    def set_key_checks(self, checks: Mapping[str, bytes]) -> None:
        """Store the checks of keys durably, before a record is encrypted with one.

        Raises:
            Unavailable: it could not be kept.
        """
        self.set_meta({meta.KEYS: meta.pack_keys(checks)})
        self.sync()

    def set_meta(self, values: Mapping[bytes, bytes]) -> None:
        """Store facts about the store as a whole; some are only read when the store is opened.

        Raises:
            Unavailable: it could not be kept.
        """

        def put() -> None:
            with self._environment.begin(db=self._meta, write=True) as transaction:
                for name, value in values.items():
                    transaction.put(name, value)

        self._write_with(_KEEPS, put)

    @override
    def commit(self, batch: Batch) -> None:
        self._write_with(_KEEPS, lambda: self._reserve.commit(batch, self._commit, self._extent))

    @override
    def checkpoint(self, *, briefly: bool = False) -> None:
        """Nothing to do."""

    @override
    def get(self, session_id: str) -> RecordBytes | None:
        key = key_of(session_id)

        def read(transaction: _Transaction) -> RecordBytes | None:
            record = own(session_id, key, transaction.get(key, db=self._sessions))
            return earlier.completed(transaction, self._earlier, session_id, record)

        return self._read(session_id, read)

    @override
    def get_many(self, session_ids: Sequence[str]) -> list[RecordBytes | None]:
        keys = [key_of(session_id) for session_id in session_ids]

        def read(transaction: _Transaction) -> list[RecordBytes | None]:
            get, sessions = transaction.get, self._sessions
            # new sessions of one call are neighbours
            if len(keys) >= _MIN_GAP and is_gap(transaction.cursor(sessions), keys):
                return [None] * len(keys)
            found = [
                own(session_id, key, get(key, db=sessions))
                for session_id, key in zip(session_ids, keys, strict=True)
            ]
            return earlier.all_completed(transaction, self._earlier, session_ids, found)

        try:
            return self._read("", read)
        except StateCorrupt:
            return [self._get_or_empty(session_id) for session_id in session_ids]

    @override
    def heads(self, *, after: str = "", prefix: str = "", limit: int) -> Heads:
        return heads_of(*self.values(after=after, prefix=prefix, limit=limit))

    def values(self, *, after: str, prefix: str = "", limit: int) -> tuple[list[bytes], list[RecordBytes]]:
        """Return ids, as UTF-8, and records, in the order of the ids."""
        return self._read(
            "", lambda transaction: values(transaction.cursor(self._sessions), after, prefix, limit)
        )

    @override
    def count(self) -> int:
        return int(self._read("", lambda transaction: transaction.stat(self._sessions)["entries"]))

    @override
    def count_of(self, model: str) -> int:
        key = meta.count_key(model)
        return int(self._read("", lambda transaction: transaction.get(key, b"0", db=self._meta)))

    @override
    def tombstones(self, session_ids: Sequence[str]) -> list[Tombstone | None]:
        keys = [key_of(session_id) for session_id in session_ids]

        def read(transaction: _Transaction) -> list[bytes | None]:
            get, tombstones = transaction.get, self._tombstones
            if len(keys) >= _MIN_GAP and is_gap(transaction.cursor(tombstones), keys):
                return [None] * len(keys)
            return [get(key, db=tombstones) for key in keys]

        found = self._read(session_ids[0] if len(session_ids) == 1 else "", read) if keys else []
        return [
            None if stored is None else tombstone(session_id, stored)
            for session_id, stored in zip(session_ids, found, strict=True)
        ]

    @override
    def documents(self, prefix: str = "") -> dict[str, bytes]:
        found = self._read("", lambda transaction: in_lmdb.read(transaction, self._documents, self._meta))
        return found.required(prefix)

    def put_documents(self, items: Iterable[in_lmdb.Item]) -> None:
        """Put documents one by one, exactly as another store had them, including corrupt ones.

        Raises:
            Unavailable: one could not be kept.
        """
        for item in items:
            self._write_with(_KEEPS, functools.partial(self._commit, Batch(), [item]))

    @override
    def announce(self, listen: str) -> None:
        self.lock.set_listen(listen)

    @override
    def check(self) -> StoreHealth:
        self.files.check()
        problem = ""
        try:
            self._forget_dead_readers()
            self.count()  # reopens the environment if necessary
        except StoreGone:
            raise
        except Unavailable as error:
            problem = error.message
        except StateCorrupt:
            pass  # each session reports it
        since = self._failing_since
        if since is not None and self._clock.monotonic() - since >= GIVE_UP_S:
            self.files.give_up(
                f"{self._folder} must hold a usable store again within {GIVE_UP_S:g} s; {problem}"
            )
            self.files.require()
        return StoreHealth(problem, self._reopened)

    def keep_nothing(self) -> None:
        """Commit an empty change, to test whether commits work.

        Raises:
            Unavailable: they do not.
        """
        self._write_with(_KEEPS, lambda: self._commit(Batch(counts=[("", 0)])))

    def _forget_dead_readers(self) -> None:
        """Release the pages that a killed reader, such as a backup, still holds."""
        with self._remap:
            if not self._closed and not self._must_reopen:
                with contextlib.suppress(lmdb.Error):  # the next use reports the problem
                    self._environment.reader_check()

    def sync(self) -> None:
        """Flush, so that everything committed survives a loss of power.

        Raises:
            Unavailable: the disk refused.
        """
        self._write_with("the store must be able to flush to disk", lambda: self._environment.sync(True))

    @override
    def close(self) -> None:
        if self._closed:
            return
        self._check.stop()
        with self._remap:
            self._closed = True
            try:
                self._environment.sync(True)
            except lmdb.Error as error:
                _log.warning("the store could not be flushed when it was closed: %s", error)
            self._environment.close()
        self._release()

    # ------------------------------------------------------------------------------------------------------ opening

    def _start(self, path: Path) -> None:
        shutil.rmtree(path / COPY, ignore_errors=True)
        is_new = not (self._folder / _DATA).exists()
        self._folder.mkdir(mode=0o700, exist_ok=True)
        self._open()
        self._read_meta()
        self._data_file = os.open(self._folder / _DATA, os.O_RDONLY | os.O_CLOEXEC)
        for place, descriptor in (*self.lock.descriptors(), (self._folder / _DATA, self._data_file)):
            self.files.add(place, descriptor)
        if is_new:
            # a new file survives a loss of power only if its folder was flushed too
            flush_folders(self._folder, path, path.parent)

    def _release(self) -> None:
        """Release the lock, and the files outside the environment."""
        self.files.forget()
        if self._data_file >= 0:
            os.close(self._data_file)
            self._data_file = -1
        self.lock.release()

    def _open(self) -> None:
        """Open the environment and its databases."""
        self._environment: _Environment = lmdb.open(
            os.fsencode(self._folder),
            map_size=within_limit(self._first_map_bytes),  # LMDB takes more if the data needs more
            mode=private_files.FILE_MODE,
            sync=self._durability == "sync",
            metasync=True,
            readahead=False,  # sessions are read in random order
            max_dbs=6,
            max_spare_txns=2,
        )
        try:
            self._open_databases()
        except BaseException:
            self._environment.close()
            raise

    def _open_databases(self) -> None:
        environment = self._environment
        self._map_bytes = environment.info()["map_size"]
        require_whole_file(environment, self._folder / _DATA)
        self._require_schema()
        lengthen(self._folder / _DATA, self._map_bytes, durably=self.waits_for_disk)
        with environment.begin(write=True) as transaction:
            names = (b"sessions", b"tombstones", b"tombstone_ages", b"meta", b"documents", earlier.NAME)
            found = [environment.open_db(name, txn=transaction) for name in names]
            self._sessions, self._tombstones, self._ages, self._meta, self._documents, self._earlier = found
            meta.begin(transaction, self._meta, self._folder)
            self._next_age = next_age(transaction, self._ages)
            self._check.begin(transaction, self._meta)

    def _require_schema(self) -> None:
        """Refuse a store with another schema version before writing anything."""
        with self._environment.begin() as transaction, contextlib.suppress(lmdb.NotFoundError):
            found = self._environment.open_db(b"meta", txn=transaction, create=False)
            meta.require_schema(transaction.get(meta.SCHEMA, b"", db=found), self._folder)

    def _read_meta(self) -> None:
        with self._environment.begin(db=self._meta) as transaction:
            self.incarnation = transaction.get(meta.INCARNATION).decode()
            self.secret = transaction.get(meta.SECRET)
            self._mark = transaction.get(meta.MARK, b"")
            self.first_revision = int(transaction.get(meta.FIRST_REVISION, b"0"))

    def _live_bytes(self) -> int:
        with self._environment.begin() as transaction:
            databases = (
                None,
                self._sessions,
                self._earlier,
                self._tombstones,
                self._ages,
                self._meta,
                self._documents,
            )
            stats = [transaction.stat(db) if db else transaction.stat() for db in databases]
        pages = sum(stat["branch_pages"] + stat["leaf_pages"] + stat["overflow_pages"] for stat in stats)
        return int(pages * stats[0]["psize"])

    # ------------------------------------------------------------------------------------------------------ writing

    def _write_with(self, rule: str, action: Callable[[], object]) -> None:
        """Run an action as the only writer. If the environment is unusable, reopen it and retry once.

        Raises:
            StoreGone: the store cannot be used any more.
            Unavailable: the store cannot be used now, or the action failed.
        """
        self._require_open()
        self.files.require()
        with self._writing:
            try:
                if self._must_reopen:
                    self._reopen()
                try:
                    action()
                except lmdb.PanicError:
                    self._reopen()
                    action()
            except (lmdb.Error, OSError, StoreError) as error:
                raise self._unavailable(rule, error) from error

    def _extent(self) -> Extent:
        pages = self._environment.info()["last_pgno"] + 1
        return Extent(pages * self._environment.stat()["psize"], self._live_bytes())

    def _commit(self, batch: Batch, documents: Iterable[in_lmdb.Item] = ()) -> None:
        documents = [*itertools.starmap(in_lmdb.item, dict(batch.documents).items()), *documents]
        reopened = False
        begin: int | None = sum(change for _, change in batch.counts)
        while True:
            age, change = self._next_age, Change()
            try:
                with self._environment.begin(write=True) as transaction:
                    self._write(transaction, batch, change, begin)
                    if documents:
                        in_lmdb.write(transaction, self._documents, self._meta, documents)
                self._check.committed(change)
                return
            except UnexpectedKeys:
                begin = None
            except lmdb.MapFullError:
                self._next_age = age
                self._grow()
            except lmdb.PanicError:
                # the disk failed in the last write of a commit; only reopening helps
                if reopened:
                    raise
                reopened = True
                self._reopen()
            except BaseException:
                self._next_age = age
                raise

    def _write(self, transaction: _Transaction, batch: Batch, change: Change, begin: int | None) -> None:
        puts, changes = earlier.split(batch.puts)
        if puts:
            change.put(transaction, self._sessions, items(puts), begin)
        if changes:
            change.added += earlier.put(transaction, self._sessions, self._earlier, changes)
        if batch.deletes and transaction.stat(self._earlier)["entries"]:
            for session_id in batch.deletes:
                earlier.delete(transaction, self._earlier, session_id)
        for session_id in batch.deletes:
            if transaction.delete(key := key_of(session_id), db=self._sessions):
                change.removed.append(key)
        for session_id in batch.forgets:
            transaction.delete(key_of(session_id), db=self._tombstones)
        if batch.tombstones:
            stones, age = batch.tombstones, self._next_age
            self._next_age = bury(
                transaction, self._tombstones, self._ages, stones, age, limit=self._max_tombstones
            )
        meta.count(transaction, self._meta, (*batch.counts, *batch.tenant_counts))
        self._check.write(transaction, self._meta, change)

    def _grow(self) -> None:
        with self._remap:
            wanted = within_limit(2 * self._map_bytes)
            if wanted <= self._map_bytes:
                raise OSError(errno.EFBIG, os.strerror(errno.EFBIG))
            lengthen(self._folder / _DATA, wanted, durably=self.waits_for_disk)
            try:
                self._environment.set_mapsize(wanted)
                self._map_bytes = wanted
            except lmdb.Error:
                # py-lmdb makes the environment unusable if the map cannot be replaced
                self._reopen_locked()
                raise

    def _reopen(self) -> None:
        with self._remap:
            self._require_open()
            self._reopen_locked()

    def _reopen_locked(self) -> None:
        """Reopen the environment, with the same files only."""
        now = self._clock.monotonic()
        self._must_reopen, self._retry_at = True, now + RETRY_S
        self.files.check()
        self._environment.close()
        try:
            self._open()
        except (lmdb.InvalidError, lmdb.VersionMismatchError, lmdb.CorruptedError, StoreError) as error:
            self.files.give_up(f"{self._folder} must hold a store that can be opened again: {error}")
            self.files.require()
        except (lmdb.Error, OSError) as error:
            if self._failing_since is None:
                self._failing_since = now
                _log.warning("the store must be reopened, and cannot be reopened yet: %s", error)
            raise
        self.files.check()
        self._must_reopen, self._failing_since = False, None
        self._reopened += 1
        _log.warning("the store was reopened: its disk had failed, or was too full for the store to grow")

    # ------------------------------------------------------------------------------------------------------ reading

    def _check_keys(self) -> bool:
        """Check the next keys; return True if none are left."""
        with self._writing, self._remap:
            if self._closed:
                return True
            if self._must_reopen:
                return False
            try:
                with self._environment.begin(buffers=True) as transaction:
                    return self._check.check_next(transaction, self._sessions, BATCH_SIZE)
            except (*_DAMAGE, lmdb.BadValsizeError) as error:  # the latter: no key can have this size
                self._check.give_up(f"a page of {self._folder / _DATA} cannot be read ({error})")
            except lmdb.Error as error:
                _log.warning("the keys of the store could not be checked: %s", error)
            return True

    def _require_open(self) -> None:
        if self._closed:
            raise Unavailable("the store must be open; it is closed")

    def _read(self, session_id: str, read: Callable[[_Transaction], T], *, buffers: bool = False) -> T:
        for is_last in (False, True):
            if self._must_reopen:
                self._reopen_for_reader()
            with self._remap:
                self._require_open()
                try:
                    with self._environment.begin(buffers=buffers) as transaction:
                        return read(transaction)
                except _DAMAGE as error:
                    raise StateCorrupt(
                        f"the page that holds session {session_id!r} must be intact: {error}",
                        session_id=session_id,
                    ) from error
                except (lmdb.Error, OSError) as error:
                    # after this error the environment must be reopened
                    is_unusable = isinstance(error, lmdb.PanicError)
                    self._must_reopen = self._must_reopen or is_unusable
                    if is_last or not is_unusable:
                        raise self._unavailable(_READABLE, error) from error
        raise AssertionError("one of the two attempts returns or raises")

    def _reopen_for_reader(self) -> None:
        """Reopen the environment for a reader, without waiting for a writer.

        Raises:
            StoreGone: the store cannot be reopened any more.
            Unavailable: it cannot be reopened yet.
        """
        self._require_open()
        self.files.require()
        if not self._writing.acquire(blocking=False):
            raise Unavailable(f"{_READABLE}; a running change reopens it")
        try:
            if self._must_reopen:
                if self._failing_since is not None and self._clock.monotonic() < self._retry_at:
                    raise Unavailable(f"{_READABLE}; it could not be reopened a moment ago")
                self._reopen()
        except (lmdb.Error, OSError) as error:
            raise self._unavailable(_READABLE, error) from error
        finally:
            self._writing.release()

    def _unavailable(self, rule: str, error: Exception) -> Unavailable:
        text = str(error) if isinstance(error, NoSpace) else explain(error, self._folder)
        return Unavailable(f"{rule}; got {text}")

    def _get_or_empty(self, session_id: str) -> RecordBytes | None:
        try:
            return self.get(session_id)
        except StateCorrupt:
            return b""
