"""Backups of a store on disk, beside its server, and stores that are made of them.

A store that goes back to a backup has forgotten what clients were told since. So that nothing they hold can be taken for
something that it means now, it is another store: sessions go on at revisions above any that clients can have been told, and
new ones begin above them; ids that the server makes begin otherwise. A client of before gets REVISION_CONFLICT with the
revision that the session has now, and SESSION_LOST for a session that a server named after the backup.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator
from pathlib import Path

from stepwell._admin.record_file import Kind
from stepwell_server.clock import Clock
from stepwell_server.store.base import KeyFileError, Tombstone
from stepwell_server.store.disk import meta
from stepwell_server.store.disk.backup import snapshot
from stepwell_server.store.disk.backup.file import About, Reader, Writer
from stepwell_server.store.disk.backup.new_store import Pair, make, new_folder
from stepwell_server.store.disk.documents import DocumentSet, Item
from stepwell_server.store.disk.key_sums import Sums
from stepwell_server.store.encryption.keyring import Keyring
from stepwell_server.store.encryption.sealer import Sealer
from stepwell_server.store.record import MAX_COUNTER, header_or_none, is_sound, key_id_of, with_revision


@dataclasses.dataclass(frozen=True, slots=True)
class BackupSummary:
    """What a backup has."""

    file: Path
    bytes: int
    sessions: int
    tombstones: int
    damaged: int
    """Sessions whose records were damaged in the store already; they are in the backup as they are."""
    keys: list[str]
    """With which it is encrypted, as far as it is."""
    documents: int = 0
    damaged_documents: int = 0
    """So many of them were damaged in the store already; they are in the backup as they are."""


def back_up(path: Path, file: Path, clock: Clock, *, bytes_per_s: float = math.inf) -> BackupSummary:
    """Write the store in a data directory into a new file, whether or not a server uses it.

    Each session is in it as it was at some moment between the begin and the end of this call: with all that was
    acknowledged before, and with nothing that was not committed.

    Raises:
        StoreError: the store lost sessions or documents, or cannot be read whole, or the file not be written; then there is no file.
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
                damaged += not is_sound(entry.session_id, entry.record)
                writer.session(entry.session_id, entry.record)
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
    """What a store has that was made of a backup."""

    created: float
    """When the backup was begun, in seconds since the epoch."""
    sessions: int
    tombstones: int
    damaged: int
    """Sessions whose records were damaged, or could not be opened with the keys: they answer STATE_CORRUPT."""
    first_revision: int
    documents: int = 0
    damaged_documents: int = 0
    """So many of them are damaged, as they were in the store that was backed up."""


@dataclasses.dataclass(frozen=True, slots=True)
class Source:
    """A backup that a store is to be made of."""

    reader: Reader
    about: About
    first_revision: int
    """Of the new store."""
    change: Change
    """Makes its records."""


def checked(file: Path, clock: Clock, keyring: Keyring | None, *, moved: bool) -> Source:
    """Read and check a whole backup. Arguments and errors are those of `restore`."""
    reader = Reader(file)
    about = reader.about()
    for _ in reader.entries():
        pass
    if keyring is not None:
        keyring.require(about.key_checks)
    elif about.key_checks and not moved:
        raise KeyFileError(
            f"the backup is encrypted, with {', '.join(sorted(about.key_checks))}, and revisions in it are to change:"
            " its keys must be given"
        )
    first_revision = (
        about.first_revision if moved else meta.later_first_revision(about.first_revision, clock.now())
    )
    change = Change(None if keyring is None else Sealer(keyring), first_revision - about.first_revision)
    return Source(reader, about, first_revision, change)


def restore(file: Path, path: Path, clock: Clock, keyring: Keyring | None, *, moved: bool) -> RestoreSummary:
    """Make a store of a backup in a new data directory. The whole backup is read and checked before.

    Args:
        file: The backup.
        path: The data directory, which is not there or empty.
        clock: For its lock, and for revisions that nobody was told.
        keyring: Keys of the backup: all is encrypted with the first one then.
        moved: No change was acknowledged since the backup was made: sessions go on as they were.

    Raises:
        StoreError: the backup cannot be used, or the folder.
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
    """Records as the new store has them."""

    def __init__(self, sealer: Sealer | None, ahead: int) -> None:
        """`ahead`: by so much revisions are higher. Without a sealer records stay as they are otherwise."""
        self._sealer = sealer
        self.ahead = ahead
        self.damaged = 0

    def __call__(self, session_id: str, record: bytes) -> Pair:
        """A record as it is to be stored."""
        header = header_or_none(session_id, record)
        if header is None:
            self.damaged += 1
            return session_id, record
        # no step leads there: somebody made the record, which no server uses then
        self.damaged += header.revision + self.ahead > MAX_COUNTER
        if self._sealer is None:
            return session_id, with_revision(session_id, record, header.revision + self.ahead)
        plain = self._sealer.opened_or_as_is(session_id, record)
        if key_id_of(plain) is not None:
            self.damaged += 1
            return session_id, record
        ((_, sealed),) = self._sealer.seal(
            [(session_id, with_revision(session_id, plain, header.revision + self.ahead))]
        )
        return session_id, sealed
