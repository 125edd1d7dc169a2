"""A backup file: the sessions, documents and tombstones of any store.

The file has the format of `stepwell._admin.record_file`. START has the facts about the store as a whole. Then come
documents, sessions and tombstones; in a backup of a shared store documents come last, so that they cover all sessions.
Records and documents are as in the store: encrypted ones stay encrypted, and each has its own checksum.
"""

from __future__ import annotations

import contextlib
import dataclasses
import fcntl
import os
import struct
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import BinaryIO

from stepwell._admin import record_file
from stepwell._admin.record_file import Entry, Format, Kind, RecordFileError
from stepwell_server.files import private_files
from stepwell_server.files.flush import flush_folders, flush_open
from stepwell_server.store.base import (
    CLOSES_BYTES,
    End,
    StoreError,
    Tombstone,
    pack_closes,
    unpack_closes,
)
from stepwell_server.store.disk.documents import Item
from stepwell_server.store.record import MAX_COUNTER, MAX_TIME

FORMAT = Format("backup", 6, "a backup that 'stepwell store backup' wrote", oldest=5)
"""Raise its number whenever anything in the file changes, including the records. 5 had no changes (`store.changes`)."""
_STONE = struct.Struct(f"<BdQ{CLOSES_BYTES}s")  # end, at, revision, request ids of closes
_BUFFER_BYTES = 2**20


class BackupError(StoreError):
    """A backup cannot be written or read. The message is one line and names the file."""


@dataclasses.dataclass(frozen=True, slots=True)
class About:
    """Facts about the store as a whole in a backup."""

    created: float
    """When the backup began, in seconds since the epoch."""
    incarnation: str
    secret: bytes
    first_revision: int
    key_checks: dict[str, bytes]


class Writer:
    """Writes a backup to a temporary file, and moves it to its path when it is complete and on disk.

    The next writer of the same name reuses a file that a killed writer left behind.
    """

    def __init__(
        self, path: Path, *, bytes_per_s: float, sleep: Callable[[float], None] = time.sleep
    ) -> None:
        """`bytes_per_s` limits the average write rate; infinity: no limit.

        Raises:
            BackupError: the path exists, another process is writing it, or it cannot be created.
        """
        if os.path.lexists(path):  # such as "." and "/", which have no name
            raise BackupError(f"{path} must not exist yet: a backup overwrites nothing")
        self._path = path
        self._aside = path.with_name(f".{path.name}.unfinished")
        self._rate, self._sleep = bytes_per_s, sleep
        self._began = time.monotonic()
        with self._writing():
            self._file = self._make()

    def begin(self, about: About) -> None:
        """Write the facts about the store as a whole."""
        start = {
            **dataclasses.asdict(about),
            "secret": about.secret.hex(),
            "key_checks": {key_id: check.hex() for key_id, check in about.key_checks.items()},
        }
        with self._writing():
            self._entries = record_file.Writer(self._file, FORMAT, start)

    @property
    def byte_count(self) -> int:
        """Number of bytes written."""
        return self._entries.bytes

    @property
    def counts(self) -> Counter[Kind]:
        """Number of entries written, by kind."""
        return self._entries.counts

    def document(self, item: Item) -> None:
        """Write a document."""
        self._put(Kind.DOCUMENT, item.key, item.value or b"")

    def session(self, session_id: str, record: bytes) -> None:
        """Write a session."""
        self._put(Kind.SESSION, session_id.encode(), record)

    def tombstone(self, stone: Tombstone) -> None:
        """Write a tombstone. The oldest comes first."""
        content = _STONE.pack(stone.end, stone.at, stone.revision, pack_closes(stone.closes))
        self._put(Kind.TOMBSTONE, stone.session_id.encode(), content)

    def finish(self) -> None:
        """Write the end, and move the backup to its path.

        Raises:
            BackupError: it could not be written.
        """
        with self._writing():
            self._entries.end()
            self._file.flush()
            flush_open(self._file.fileno())
            os.link(self._aside, self._path)  # which overwrites nothing
            self._aside.unlink()
            flush_folders(self._path.parent)

    def close(self) -> None:
        """Close the file. An unfinished backup is removed."""
        self._aside.unlink(missing_ok=True)
        self._file.close()

    def _make(self) -> BinaryIO:
        try:
            descriptor = private_files.create(self._aside)
        except FileExistsError:
            descriptor = os.open(self._aside, os.O_WRONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
        file = os.fdopen(descriptor, "wb", _BUFFER_BYTES)
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            os.fchmod(file.fileno(), private_files.FILE_MODE)
            file.truncate(0)
        except BlockingIOError:
            file.close()
            raise BackupError(f"{self._path} is being written by another process") from None
        except BaseException:
            file.close()
            raise
        return file

    def _put(self, kind: Kind, name: bytes, record: bytes) -> None:
        try:
            self._entries.put(kind, name, record)
        except OSError as error:
            raise self._unwritable(error) from error
        ahead_s = self._entries.bytes / self._rate - (time.monotonic() - self._began)
        if ahead_s > 0:
            self._sleep(ahead_s)

    @contextlib.contextmanager
    def _writing(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise self._unwritable(error) from error

    def _unwritable(self, error: OSError) -> BackupError:
        return BackupError(f"{self._path} must be writable: {error.strerror}")


class Reader:
    """Reads a backup sequentially."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self.tombstones = 0
        """Number of tombstones read so far."""

    def about(self) -> About:
        """Return the facts about the store as a whole.

        Raises:
            BackupError: the file is not a backup, or its start is corrupt.
        """
        for entry in self._read():
            return self._about(entry)
        raise AssertionError("reading raises where there is no first entry")

    def entries(self) -> Iterator[Item | tuple[str, bytes] | Tombstone]:
        """Iterate over all documents, sessions and tombstones. The backup is known to be complete only at the end.

        Raises:
            BackupError: the file is not a backup, or is corrupt or incomplete.
        """
        self.tombstones = 0
        for entry in self._read():
            try:
                if entry.kind is Kind.DOCUMENT:
                    yield Item(entry.name, entry.record)
                elif entry.kind is Kind.SESSION:
                    yield str(entry.name, "utf-8"), entry.record
                elif entry.kind is Kind.TOMBSTONE:
                    end, ended, revision, closes = _STONE.unpack(entry.record)
                    self.tombstones += 1
                    yield Tombstone(
                        str(entry.name, "utf-8"), End(end), ended, unpack_closes(closes), revision
                    )
            except (struct.error, ValueError) as error:
                raise self._damaged(f"an entry cannot be read ({error})", entry) from error

    def _about(self, entry: Entry) -> About:
        try:
            start = record_file.content_of(entry, FORMAT)
            checks = {key_id: bytes.fromhex(check) for key_id, check in start["key_checks"].items()}
            created, first_revision = float(start["created"]), int(start["first_revision"])
            if not (0.0 <= created < MAX_TIME and 0 <= first_revision <= MAX_COUNTER):
                raise ValueError(f"created is {created}, first_revision {first_revision}")
            return About(
                created, str(start["incarnation"]), bytes.fromhex(start["secret"]), first_revision, checks
            )
        except (ValueError, KeyError, TypeError, AttributeError, OverflowError) as error:
            raise self._damaged(f"its start cannot be read ({error})", entry) from error

    def _read(self) -> Iterator[Entry]:
        try:
            with self._path.open("rb", _BUFFER_BYTES) as file:
                yield from record_file.read(file, FORMAT)
        except RecordFileError as error:
            raise BackupError(f"{self._path} {error}") from error
        except OSError as error:
            raise BackupError(f"{self._path} must be readable: {error.strerror}") from error

    def _damaged(self, problem: str, entry: Entry) -> BackupError:
        return BackupError(f"{self._path} {FORMAT.damaged(problem, entry.at)}")
