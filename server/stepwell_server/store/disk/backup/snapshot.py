"""All that a store has at one moment, read beside its server or at rest: for checks and backups.

The log is read first, then LMDB in one transaction. A change that was acknowledged before is in one of the two: a
checkpoint leaves the log only when LMDB has it. Of each session the later record counts, as when a server starts. So each
session is at a revision that it had between the moments when this began and when it was opened.

While it is open LMDB uses no page again that was in use, so the data file grows by what changes meanwhile.
"""

from __future__ import annotations

import contextlib
import os
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import lmdb

from stepwell_server.files import private_files
from stepwell_server.store.base import StoreError, Tombstone
from stepwell_server.store.disk import documents as in_lmdb
from stepwell_server.store.disk import key_sums, meta
from stepwell_server.store.disk.file_length import require_whole_file
from stepwell_server.store.disk.key_sums import Sums
from stepwell_server.store.disk.keys import all_entries, is_digest, named
from stepwell_server.store.disk.lock import read_lock
from stepwell_server.store.disk.tombstones import age_of, tombstone
from stepwell_server.store.disk.wal.log import Mark
from stepwell_server.store.disk.wal.reader import LogReplaced, read_log
from stepwell_server.store.record import is_sound, supersedes

DATA = Path("sessions") / "data.mdb"
_LOG = "wal"
_MAX_TRIES = 5


class Entry(NamedTuple):
    """A session as it is stored."""

    key: bytes
    session_id: str
    record: bytes
    is_found: bool
    """Whether it is found by searching for its key."""


class Snapshot:
    """See the module. `opened` makes one. For one thread, in a process that has not opened the store otherwise."""

    def __init__(self, path: Path, environment: Any, transaction: Any, log: dict[str, bytes]) -> None:
        self.path = path
        self._environment = environment
        self.log = log
        """The last record of each session that the write-ahead log has."""
        self._transaction = transaction
        names = (b"sessions", b"tombstones", b"meta")
        self._sessions, self._tombstones, self._meta = (
            environment.open_db(name, txn=transaction, create=False) for name in names
        )
        self._documents = None
        with contextlib.suppress(lmdb.NotFoundError):  # damage can have taken it
            self._documents = environment.open_db(b"documents", txn=transaction, create=False)
        self.meta: dict[bytes, bytes] = dict(transaction.cursor(self._meta).iternext())
        """The facts about the store as a whole, see `meta`."""

    def again(self) -> Snapshot:
        """The store as it is now, for a store that no server uses: one that met a damaged page is of no use any more."""
        return Snapshot(self.path, self._environment, self._environment.begin(), self.log)

    @property
    def key_checks(self) -> dict[str, bytes]:
        """The keys that records may be encrypted with."""
        return meta.unpack_keys(self.meta.get(meta.KEYS, b"{}"))

    @property
    def expected(self) -> Sums:
        """The sums that the keys must have."""
        return key_sums.unpack(self.meta.get(key_sums.NAME))

    @property
    def counts(self) -> dict[str, int]:
        """How many sessions each name should have, see `store.counts`; none has 0."""
        return meta.counts(self.meta)

    def sessions(self) -> Iterator[Entry]:
        """All sessions that are there, in the order of their keys.

        Raises:
            StoreError: a page cannot be read; what follows it is not known.
        """
        try:
            for key, value in all_entries(self._transaction.cursor(self._sessions)):
                session_id, record = named(key, value)
                yield Entry(key, session_id, self.later(session_id, record), self._finds(key))
        except lmdb.Error as error:
            raise StoreError(f"a page of {self.path / DATA} cannot be read: {error}") from error

    def require_all(self, found: Sums) -> None:
        """Refuse to continue without sessions that are missing; `found` is of all keys that were there.

        Raises:
            StoreError: some are.
        """
        if self.expected != found:
            raise StoreError(
                f"the store in {self.path} must have all its sessions; keys or pages were damaged, and some are missing:"
                " stepwell store verify says more, stepwell store repair mends it"
            )

    def tombstones(self) -> list[Tombstone]:
        """All tombstones, the oldest first; those that cannot be read are left out.

        Raises:
            StoreError: a page cannot be read.
        """
        found: list[tuple[int, Tombstone]] = []
        try:
            for key, value in self._transaction.cursor(self._tombstones).iternext():
                if not is_digest(key):  # of a long id only a digest is kept
                    with contextlib.suppress(struct.error, ValueError):
                        found.append((age_of(value), tombstone(str(key, "utf-8"), value)))
        except lmdb.Error as error:
            raise StoreError(f"a page of {self.path / DATA} cannot be read: {error}") from error
        return [stone for _, stone in sorted(found, key=lambda each: each[0])]

    def documents(self) -> in_lmdb.DocumentSet:
        """All documents, and what is known of those that are damaged or missing.

        Raises:
            StoreError: they cannot be looked at.
        """
        try:
            return in_lmdb.read(self._transaction, self._documents, self._meta)
        except lmdb.Error as error:
            raise StoreError(f"a page of {self.path / DATA} cannot be read: {error}") from error

    def all_documents(self) -> list[in_lmdb.Item]:
        """As they are stored, damaged ones too.

        Raises:
            StoreError: some are missing, or they cannot be looked at.
        """
        found = self.documents()
        if found.problem:
            raise StoreError(
                f"the store in {self.path} must have all its documents; {found.problem}:"
                " stepwell store verify says more, stepwell store repair mends it"
            )
        return found.items

    def _finds(self, key: bytes) -> bool:
        try:
            # from the root on: a cursor would look on the page where it stands first
            return self._transaction.get(key, db=self._sessions) is not None
        except lmdb.Error:
            return False

    def later(self, session_id: str, record: bytes) -> bytes:
        """The record of a session that counts, of the one that LMDB has and the log's."""
        logged = self.log.get(session_id)
        if logged is None or not (supersedes(logged, record) or not is_sound(session_id, logged)):
            return record
        return logged


@contextlib.contextmanager
def opened(path: Path) -> Iterator[Snapshot]:
    """Read the store in a data directory as it is now, whether or not a server uses it.

    Raises:
        StoreError: there is none, it cannot be read, or acknowledged changes are missing from its log.
    """
    if not (path / DATA).is_file():
        raise StoreError(f"the data directory {path} must hold a store; there is no {DATA} in it")
    try:
        with contextlib.ExitStack() as stack:
            stack.enter_context(read_lock(path))
            environment = _open(path)
            stack.callback(environment.close)
            log = _log(path, environment)
            yield Snapshot(path, environment, stack.enter_context(environment.begin()), log)
    except (lmdb.Error, OSError) as error:
        raise StoreError(f"the store in {path} must be readable: {error}") from error


def _open(path: Path) -> Any:
    size = (path / DATA).stat().st_size
    private_files.ensure_file(path / DATA.with_name("lock.mdb"))
    environment: Any = lmdb.open(
        os.fspath(path / DATA.parent),
        readonly=True,
        map_size=2 * size + 2**30,  # address space: the file may grow before the transaction begins
        max_dbs=5,
        readahead=True,
        create=False,
    )
    try:
        require_whole_file(environment, path / DATA)
    except BaseException:
        environment.close()
        raise
    return environment


def _log(path: Path, environment: Any) -> dict[str, bytes]:
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
