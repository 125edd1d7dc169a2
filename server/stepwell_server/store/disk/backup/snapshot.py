"""A consistent view of a whole store, whether or not its server is running, for checks and backups.

The log is read first, then LMDB in one transaction. A change acknowledged before is in one of the two, because a
checkpoint removes it from the log only when LMDB has it. Of each session the later record is valid, as at a server
start.
So each session has a revision that it had at some moment while the snapshot was opened.

While a snapshot is open LMDB does not reuse pages, so the data file grows with each change.
"""

from __future__ import annotations

import contextlib
import errno
import os
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import lmdb

from stepwell_server.files import private_files
from stepwell_server.store.base import StoreError, Tombstone
from stepwell_server.store.changes import merged
from stepwell_server.store.disk import documents as in_lmdb
from stepwell_server.store.disk import earlier, key_sums, meta
from stepwell_server.store.disk.file_length import require_whole_file
from stepwell_server.store.disk.key_sums import Sums
from stepwell_server.store.disk.keys import all_entries, is_digest, named
from stepwell_server.store.disk.lock import read_lock
from stepwell_server.store.disk.tombstones import age_of, tombstone
from stepwell_server.store.disk.wal.log import Mark
from stepwell_server.store.disk.wal.reader import LogReplaced, read_log
from stepwell_server.store.record import RecordBytes, is_change, is_sound, supersedes, value_of

DATA = Path("sessions") / "data.mdb"
_LOG = "wal"
_MAX_TRIES = 5
_DAMAGE = (lmdb.CorruptedError, lmdb.PageNotFoundError)


class StoreChanged(StoreError):
    """A server has changed the store meanwhile."""


class Entry(NamedTuple):
    """A session as stored."""

    key: bytes
    session_id: str
    record: RecordBytes
    """Its stored value: see `record`."""
    is_found: bool
    """Whether a search for its key finds it."""


class Snapshot:
    """See the module. Created by `opened`. For one thread, in a process that has not opened the store in another way."""

    def __init__(self, path: Path, environment: Any, log: dict[str, list[RecordBytes]]) -> None:
        self.path = path
        self._environment = environment
        self.log = log
        """The last record of each session in the write-ahead log, and those there that it needs."""
        self._sessions, self._tombstones, self._meta = (
            environment.open_db(name, create=False) for name in (b"sessions", b"tombstones", b"meta")
        )
        self._documents = self._earlier = None
        with contextlib.suppress(lmdb.NotFoundError):  # an earlier release made it
            self._earlier = environment.open_db(earlier.NAME, create=False)
        with contextlib.suppress(lmdb.NotFoundError):  # it may be missing in a corrupt store
            self._documents = environment.open_db(b"documents", create=False)
        # only transactions that begin afterwards can use the databases
        self._transaction = environment.begin()
        self._second = self._again()
        """Of the same data, for earlier records: a corrupt page of them makes it unusable, and not the first one."""
        self.meta: dict[bytes, bytes] = dict(self._transaction.cursor(self._meta).iternext())
        """The facts about the store as a whole, see `meta`."""

    def again(self) -> Snapshot:
        """Open a new snapshot of a store that no server uses: after a corrupt page, this one is unusable."""
        return Snapshot(self.path, self._environment, self.log)

    def _again(self) -> Any:
        """Begin another transaction of the same data.

        Raises:
            StoreChanged: a server has changed the data.
        """
        second = self._environment.begin()
        if second.id() != self._transaction.id():
            raise StoreChanged(f"the store in {self.path} must not change while a page of it cannot be read")
        return second

    @property
    def key_checks(self) -> dict[str, bytes]:
        """Checks of the keys that may encrypt records."""
        return meta.unpack_keys(self.meta.get(meta.KEYS, b"{}"))

    @property
    def expected(self) -> Sums:
        """The sums that the keys must have."""
        return key_sums.unpack(self.meta.get(key_sums.NAME))

    @property
    def counts(self) -> dict[str, int]:
        """The stored counts without zeros, see `store.counts`."""
        return meta.counts(self.meta)

    def sessions(self) -> Iterator[Entry]:
        """Iterate over all sessions, in the order of their keys.

        Raises:
            StoreError: a page cannot be read; its successors are unknown.
        """
        try:
            for key, value in all_entries(self._transaction.cursor(self._sessions)):
                session_id, record = named(key, value)
                yield Entry(key, session_id, self.valid(session_id, record), self._finds(key))
        except lmdb.Error as error:
            raise StoreError(f"a page of {self.path / DATA} cannot be read: {error}") from error

    def require_all(self, found: Sums) -> None:
        """Raise if sessions are missing; `found` has the sums of all existing keys.

        Raises:
            StoreError: some are missing.
        """
        if self.expected != found:
            raise StoreError(
                f"the store in {self.path} must have all its sessions; keys or pages are corrupt, and some are missing:"
                " stepwell store verify gives details, stepwell store repair repairs it"
            )

    def tombstones(self) -> list[Tombstone]:
        """Return all readable tombstones, oldest first.

        Raises:
            StoreError: a page cannot be read.
        """
        found: list[tuple[int, Tombstone]] = []
        try:
            for key, value in self._transaction.cursor(self._tombstones).iternext():
                if not is_digest(key):  # for a long id only a digest is stored
                    with contextlib.suppress(struct.error, ValueError):
                        found.append((age_of(value), tombstone(str(key, "utf-8"), value)))
        except lmdb.Error as error:
            raise StoreError(f"a page of {self.path / DATA} cannot be read: {error}") from error
        return [stone for _, stone in sorted(found, key=lambda each: each[0])]

    def documents(self) -> in_lmdb.DocumentSet:
        """Return all documents, and what is known about corrupt or missing ones.

        Raises:
            StoreError: they cannot be read.
        """
        try:
            return in_lmdb.read(self._transaction, self._documents, self._meta)
        except lmdb.Error as error:
            raise StoreError(f"a page of {self.path / DATA} cannot be read: {error}") from error

    def all_documents(self) -> list[in_lmdb.Item]:
        """Return all documents as stored, including corrupt ones.

        Raises:
            StoreError: some are missing, or they cannot be read.
        """
        found = self.documents()
        if found.problem:
            raise StoreError(
                f"the store in {self.path} must have all its documents; {found.problem}:"
                " stepwell store verify gives details, stepwell store repair repairs it"
            )
        return found.items

    def _finds(self, key: bytes) -> bool:
        try:
            # search from the root: a cursor would first look on its current page
            return self._transaction.get(key, db=self._sessions) is not None
        except lmdb.Error:
            return False

    def valid(self, session_id: str, record: RecordBytes) -> RecordBytes:
        """Return the valid value of a session, given its last record in LMDB: what is there, or in the log.

        Raises:
            StoreError: a page cannot be read.
        """
        logged = self.log.get(session_id, [])
        if logged and not (supersedes(logged[-1], record) or not is_sound(session_id, logged[-1])):
            logged = []
        if logged and not is_change(logged[0]):
            return value_of(logged)
        return merged(session_id, logged, self._completed(session_id, record)) or b""

    def _completed(self, session_id: str, record: RecordBytes) -> RecordBytes | None:
        """Return the value of a session in LMDB; its last record alone if a page with others cannot be read."""
        if self._earlier is None:
            return record
        try:
            return earlier.completed(self._second, self._earlier, session_id, record)
        except _DAMAGE:
            self._second = self._again()
            return record


@contextlib.contextmanager
def opened(path: Path) -> Iterator[Snapshot]:
    """Open a snapshot of the store in a data directory, whether or not a server uses it.

    Raises:
        StoreError: there is no store, it cannot be read, or acknowledged changes are missing from its log.
    """
    if not (path / DATA).is_file():
        raise StoreError(f"the data directory {path} must hold a store; there is no {DATA} in it")
    try:
        with contextlib.ExitStack() as stack:
            stack.enter_context(read_lock(path))
            environment = _open(path)
            stack.callback(environment.close)
            yield _snapshot(path, environment, _log(path, environment))
    except (lmdb.Error, OSError) as error:
        if isinstance(error, OSError) and error.errno == errno.EROFS:
            raise StoreError(
                f"the data directory {path} must be writable, for locks against its server; its file system is"
                " read-only: stop the server and copy the folder to another disk"
            ) from error
        raise StoreError(f"the store in {path} must be readable: {error}") from error


def _snapshot(path: Path, environment: Any, log: dict[str, list[RecordBytes]]) -> Snapshot:
    for _ in range(_MAX_TRIES):
        with contextlib.suppress(StoreChanged):
            return Snapshot(path, environment, log)
    raise StoreError(f"{path / DATA} must be readable; it changed between all reads")


def _open(path: Path) -> Any:
    size = (path / DATA).stat().st_size
    private_files.ensure_file(path / DATA.with_name("lock.mdb"))
    environment: Any = lmdb.open(
        os.fsencode(path / DATA.parent),
        readonly=True,
        map_size=2 * size + 2**30,  # address space: the file may grow before the transaction begins
        max_dbs=6,
        readahead=True,
        create=False,
    )
    try:
        require_whole_file(environment, path / DATA)
    except BaseException:
        environment.close()
        raise
    return environment


def _log(path: Path, environment: Any) -> dict[str, list[RecordBytes]]:
    for _ in range(_MAX_TRIES):
        with environment.begin() as transaction:
            meta_db = environment.open_db(b"meta", txn=transaction, create=False)
            meta.require_schema(transaction.get(meta.SCHEMA, b"", db=meta_db), path / DATA.parent)
            stored = transaction.get(meta.MARK, b"", db=meta_db)
        if not stored:
            return {}
        with contextlib.suppress(LogReplaced):
            return read_log(path / _LOG, Mark.unpacked(stored).owner)
    raise StoreError(f"{path / _LOG} must belong to this store; it belongs to another")
