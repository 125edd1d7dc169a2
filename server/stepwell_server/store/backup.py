"""Backup of a store on disk while its server runs, and restore.

A restored store no longer knows changes that clients saw acknowledged after the backup. Nothing that those clients hold
may match something in the new store. So its sessions continue at revisions above any that clients can have seen, new
sessions begin above them, and ids that the server generates begin with another prefix. A client from before the restore
gets REVISION_CONFLICT with the session's current revision, or SESSION_LOST for a session whose id a server generated
after the backup.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator
from pathlib import Path

from stepwell._admin.record_file import Kind
from stepwell_server.clock import Clock
from stepwell_server.store.base import KeyFileError, Tombstone
from stepwell_server.store.changes import joined
from stepwell_server.store.disk import meta
from stepwell_server.store.disk.backup import snapshot
from stepwell_server.store.disk.backup.file import About, Reader, Writer
from stepwell_server.store.disk.backup.new_store import Pair, make, new_folder
from stepwell_server.store.disk.documents import DocumentSet, Item
from stepwell_server.store.disk.key_sums import Sums
from stepwell_server.store.encryption.keyring import Keyring
from stepwell_server.store.encryption.sealer import Sealer
from stepwell_server.store.record import (
    MAX_COUNTER,
    header_or_none,
    is_change,
    is_complete,
    key_id_of,
    with_revision,
)


@dataclasses.dataclass(frozen=True, slots=True)
class BackupSummary:
    """The content of a new backup."""

    file: Path
    bytes: int
    sessions: int
    tombstones: int
    damaged: int
    """Sessions whose records were already damaged in the store; the backup has them unchanged."""
    keys: list[str]
    """Ids of the keys that encrypt its records, if any."""
    documents: int = 0
    damaged_documents: int = 0
    """Number of documents that were already damaged in the store; the backup has them unchanged."""


def back_up(path: Path, file: Path, clock: Clock, *, bytes_per_s: float = math.inf) -> BackupSummary:
    """Write the store in a data directory to a new file, whether or not a server uses it.

    Each session is in the backup as of some moment during this call: with everything acknowledged before the call,
    and with committed changes only.

    Raises:
        StoreError: the store lost sessions or documents, or it cannot be read completely, or the file cannot be
        written.
            Then there is no file.
    """
    writer = Writer(file, bytes_per_s=bytes_per_s)
    damaged, sums = 0, Sums()
    try:
        created = clock.now()
        with snapshot.opened(path) as found:
            checks = found.key_checks
            writer.begin(
                About(
                    created,
                    found.meta[meta.INCARNATION].decode(),
                    found.meta[meta.SECRET],
                    int(found.meta.get(meta.FIRST_REVISION, b"0")),
                    checks,
                )
            )
            documents = DocumentSet()
            for item in found.all_documents():
                documents.add(item)
                writer.document(item)
            for entry in found.sessions():
                sums.add([entry.key])
                damaged += not is_complete(entry.session_id, entry.record)
                writer.session(entry.session_id, bytes(entry.record))
            found.require_all(sums)
            for stone in found.tombstones():
                writer.tombstone(stone)
        writer.finish()
    finally:
        writer.close()
    return BackupSummary(
        file,
        writer.byte_count,
        writer.counts[Kind.SESSION],
        writer.counts[Kind.TOMBSTONE],
        damaged,
        sorted(checks),
        writer.counts[Kind.DOCUMENT],
        len(documents.damaged),
    )


@dataclasses.dataclass(frozen=True, slots=True)
class RestoreSummary:
    """The content of a restored store."""

    created: float
    """When the backup began, in seconds since the epoch."""
    sessions: int
    tombstones: int
    damaged: int
    """Sessions whose records were damaged, or could not be decrypted: they answer STATE_CORRUPT."""
    first_revision: int
    documents: int = 0
    damaged_documents: int = 0
    """Number of documents that are damaged, as they were in the original store."""


@dataclasses.dataclass(frozen=True, slots=True)
class Source:
    """A checked backup, ready to be restored."""

    reader: Reader
    about: About
    first_revision: int
    """First revision of the new store."""
    change: Change
    """Converts its records for the new store."""


def checked(file: Path, clock: Clock, keyring: Keyring | None, *, moved: bool) -> Source:
    """Read and check a whole backup. Takes the arguments of `restore`, and raises the same errors."""
    reader = Reader(file)
    about = reader.about()
    for _ in reader.entries():
        pass
    if keyring is not None:
        keyring.require(about.key_checks)
    elif about.key_checks and not moved:
        raise KeyFileError(
            f"the backup is encrypted with {', '.join(sorted(about.key_checks))}, and a restore changes its revisions:"
            " give the key file"
        )
    first_revision = (
        about.first_revision if moved else meta.later_first_revision(about.first_revision, clock.now())
    )
    change = Change(None if keyring is None else Sealer(keyring), first_revision - about.first_revision)
    return Source(reader, about, first_revision, change)


def restore(file: Path, path: Path, clock: Clock, keyring: Keyring | None, *, moved: bool) -> RestoreSummary:
    """Create a store from a backup in a new data directory. The whole backup is read and checked first.

    Args:
        file: The backup.
        path: The data directory, which must not exist or must be empty.
        clock: For its lock, and for revisions that no client has seen.
        keyring: Keys of the backup. The new store is encrypted with the first one.
        moved: No change was acknowledged after the backup, so that sessions keep their revisions.

    Raises:
        StoreError: the backup or the folder cannot be used.
        KeyFileError: it is encrypted, and a key is missing.
    """
    source = checked(file, clock, keyring, moved=moved)
    reader, about, change = source.reader, source.about, source.change
    stones: list[Tombstone] = []
    documents = DocumentSet()

    def sessions() -> Iterator[Pair]:
        for entry in reader.entries():
            if isinstance(entry, Tombstone):
                stones.append(entry)
            elif isinstance(entry, Item):
                documents.add(entry)
            else:
                yield change(*entry)

    values = {
        meta.FIRST_REVISION: str(source.first_revision).encode(),
        meta.KEYS: meta.pack_keys(about.key_checks if keyring is None else keyring.first_check),
    }
    if moved:
        values |= {meta.INCARNATION: about.incarnation.encode(), meta.SECRET: about.secret}
    with new_folder(path) as folder:
        count = make(folder, clock, sessions(), stones, lambda: documents.items, lambda: values)
    return RestoreSummary(
        about.created,
        count,
        len(stones),
        change.damaged,
        source.first_revision,
        len(documents.items),
        len(documents.damaged),
    )


class Change:
    """Converts records for the new store."""

    def __init__(self, sealer: Sealer | None, ahead: int) -> None:
        """`ahead` is added to each revision. Without a sealer nothing else changes."""
        self._sealer = sealer
        self.ahead = ahead
        self.damaged = 0

    def __call__(self, session_id: str, record: bytes) -> Pair:
        """Convert one record."""
        header = header_or_none(session_id, record)
        if header is None:
            self.damaged += 1
            return session_id, record
        # no number of steps leads there: somebody forged the record, and no server will use it
        self.damaged += header.revision + self.ahead > MAX_COUNTER
        opened = record if self._sealer is None else self._sealer.opened_or_as_is(session_id, record)
        plain = joined(session_id, opened)
        if self._sealer is None:
            if is_change(plain):  # encrypted changes of a store that was moved: the revisions stay
                return session_id, record
            return session_id, with_revision(session_id, plain, header.revision + self.ahead)
        if is_change(plain) or key_id_of(plain) is not None:
            self.damaged += 1
            return session_id, record
        ((_, sealed),) = self._sealer.seal(
            [(session_id, with_revision(session_id, plain, header.revision + self.ahead))]
        )
        return session_id, sealed
