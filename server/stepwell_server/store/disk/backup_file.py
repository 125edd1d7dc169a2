"""A backup: the sessions and documents of a store in one file, whatever the store was made of.

    magic, block, block, ...        block: length, CRC-32, kind, content

Kinds: `head` (what is said of the store as a whole, as JSON), then `documents`, `sessions` and `tombstones` (many each; of a
shared store `documents` come last, so that they know all that sessions tell of), `end` (how many there were, and SHA-256 of all before it, as JSON). Little-endian. A file without its end is no backup.
Records and documents are as in the store: encrypted ones stay so, and each has its own checksum. A backup without documents
is one that releases of before there were any can read; they refuse others.
"""

from __future__ import annotations

import dataclasses
import fcntl
import hashlib
import json
import os
import struct
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import BinaryIO

from isal.isal_zlib import crc32

from stepwell_server.files import private_files
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

_NAME, FORMAT = b"stepwell backup ", 3
MAGIC = _NAME + b"%d\n" % FORMAT
"""With the version of everything in the file, records too. Raise it whenever something of it changes."""
_BLOCK = struct.Struct("<IIc")  # bytes of content, checksum of kind and content, kind
_ENTRY = struct.Struct("<HI")  # bytes of id, of record; or of a document's key and value
_STONE = struct.Struct(f"<HBdQ{CLOSES_BYTES}s")  # bytes of id, end, at, revision, request ids of closes
_HEAD, _DOCUMENTS, _SESSIONS, _TOMBSTONES, _END = b"h", b"d", b"s", b"t", b"e"
_BLOCK_BYTES = 2**20
_MOST_BLOCK_BYTES = 2**31
_MAX_MAGIC_BYTES = 32


class BackupError(StoreError):
    """A backup that cannot be written or read. The message is one line and names the file."""


@dataclasses.dataclass(frozen=True, slots=True)
class About:
    """What a backup says of the store as a whole."""

    created: float
    """When it was begun, in seconds since the epoch."""
    incarnation: str
    secret: bytes
    first_revision: int
    key_checks: dict[str, bytes]


class Writer:
    """Writes a backup beside its place, and moves it there when it is whole and on the disk.

    What a writer that was killed left behind is taken over by the next one of the same name.
    """

    def __init__(
        self, path: Path, *, bytes_per_s: float, sleep: Callable[[float], None] = time.sleep
    ) -> None:
        """`bytes_per_s` is how fast it may write, on average; infinity: as fast as it can.

        Raises:
            BackupError: there is something already, somebody else writes it, or it cannot be made.
        """
        self._path = path
        self._aside = path.with_name(f".{path.name}.unfinished")
        self._rate, self._sleep = bytes_per_s, sleep
        self._began = time.monotonic()
        self._digest = hashlib.sha256()
        self._kind = _HEAD
        self._block: list[bytes] = []
        self._block_bytes = self.bytes = 0
        self.documents = self.sessions = self.tombstones = 0
        if os.path.lexists(path):
            raise BackupError(f"{path} must not be there yet: a backup overwrites nothing")
        try:
            self._file = self._make()
        except OSError as error:
            raise BackupError(f"{path} must be writable: {error.strerror}") from error

    def begin(self, about: About) -> None:
        """Write what is said of the store as a whole."""
        self._out(MAGIC)
        self._put(_HEAD, json.dumps({
            **dataclasses.asdict(about),
            "secret": about.secret.hex(),
            "key_checks": {key_id: check.hex() for key_id, check in about.key_checks.items()},
        }).encode())  # fmt: skip

    def document(self, item: Item) -> None:
        """Write a document. All of them come before the sessions, or after them."""
        value = item.value or b""
        self._gather(_DOCUMENTS, _ENTRY.pack(len(item.key), len(value)) + item.key + value)
        self.documents += 1

    def session(self, session_id: str, record: bytes) -> None:
        """Write a session. All of them come before the tombstones."""
        key = session_id.encode()
        self._gather(_SESSIONS, _ENTRY.pack(len(key), len(record)) + key + record)
        self.sessions += 1

    def tombstone(self, stone: Tombstone) -> None:
        """Write a tombstone. The oldest comes first."""
        key = stone.session_id.encode()
        closes = pack_closes(stone.closes)
        self._gather(_TOMBSTONES, _STONE.pack(len(key), stone.end, stone.at, stone.revision, closes) + key)
        self.tombstones += 1

    def finish(self) -> None:
        """Write the end, and put the backup in its place.

        Raises:
            BackupError: it could not be written.
        """
        self._flush()
        self._put(_END, json.dumps(_end_of(self, self._digest.hexdigest())).encode())
        try:
            self._file.flush()
            os.fsync(self._file.fileno())
            os.link(self._aside, self._path)  # which overwrites nothing
            self._aside.unlink()
            folder = os.open(self._path.parent, os.O_RDONLY)
            try:
                os.fsync(folder)
            finally:
                os.close(folder)
        except OSError as error:
            raise BackupError(f"{self._path} must be writable: {error.strerror}") from error

    def close(self) -> None:
        """End; what is not finished is removed."""
        self._aside.unlink(missing_ok=True)
        self._file.close()

    def _make(self) -> BinaryIO:
        try:
            descriptor = private_files.create(self._aside)
        except FileExistsError:
            descriptor = os.open(self._aside, os.O_WRONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
        file = os.fdopen(descriptor, "wb")
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

    def _gather(self, kind: bytes, entry: bytes) -> None:
        if kind != self._kind:
            self._flush()
            self._kind = kind
        self._block.append(entry)
        self._block_bytes += len(entry)
        if self._block_bytes >= _BLOCK_BYTES:
            self._flush()

    def _flush(self) -> None:
        if self._block:
            self._put(self._kind, b"".join(self._block))
        self._block, self._block_bytes = [], 0

    def _put(self, kind: bytes, content: bytes) -> None:
        self._out(_BLOCK.pack(len(content), crc32(content, crc32(kind)), kind) + content)

    def _out(self, data: bytes) -> None:
        try:
            self._file.write(data)
        except OSError as error:
            raise BackupError(f"{self._path} must be writable: {error.strerror}") from error
        self._digest.update(data)
        self.bytes += len(data)
        ahead_s = self.bytes / self._rate - (time.monotonic() - self._began)
        if ahead_s > 0:
            self._sleep(ahead_s)


class Reader:
    """Reads a backup, from the beginning to the end."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self.documents = self.sessions = self.tombstones = 0
        """How many were read so far."""

    def about(self) -> About:
        """What is said of the store as a whole.

        Raises:
            BackupError: it is no backup, or its head is damaged.
        """
        for kind, content, _ in self._blocks():
            if kind != _HEAD:
                break
            return self._about(content)
        raise self._damaged("it must begin with a head")

    def entries(self) -> Iterator[Item | tuple[str, bytes] | Tombstone]:
        """All documents, sessions and tombstones, as they come. Whether it is whole is known when this has come to its end.

        Raises:
            BackupError: it is no backup, damaged, or not whole.
        """
        self.documents = self.sessions = self.tombstones = 0
        is_whole = False
        for kind, content, digest in self._blocks():
            if is_whole:
                raise self._damaged("something follows its end")
            try:
                if kind == _DOCUMENTS:
                    yield from self._documents(content)
                elif kind == _SESSIONS:
                    yield from self._sessions(content)
                elif kind == _TOMBSTONES:
                    yield from self._tombstones(content)
                elif kind == _END:
                    self._require_end(content, digest)
                    is_whole = True
                elif kind != _HEAD:
                    raise self._damaged(f"it has a block of the unknown kind {kind!r}")
            except (struct.error, UnicodeDecodeError, ValueError) as error:
                raise self._damaged(f"a block cannot be read ({error})") from error
        if not is_whole:
            raise self._damaged("it has no end: it was cut off")

    def _documents(self, content: bytes) -> Iterator[Item]:
        for key, value in _pairs(content):
            self.documents += 1
            yield Item(key, value)

    def _sessions(self, content: bytes) -> Iterator[tuple[str, bytes]]:
        for key, record in _pairs(content):
            self.sessions += 1
            yield str(key, "utf-8"), record

    def _tombstones(self, content: bytes) -> Iterator[Tombstone]:
        at = 0
        while at < len(content):
            id_bytes, end, ended, revision, closes = _STONE.unpack_from(content, at)
            start = at + _STONE.size
            at = start + id_bytes
            self.tombstones += 1
            yield Tombstone(str(content[start:at], "utf-8"), End(end), ended, unpack_closes(closes), revision)

    def _require_end(self, content: bytes, digest: str) -> None:
        said = json.loads(content)
        found = _end_of(self, digest)
        if said != found:
            raise self._damaged(f"it must have what its end says, {said}; it has {found}")

    def _about(self, content: bytes) -> About:
        try:
            said = json.loads(content)
            checks = {key_id: bytes.fromhex(check) for key_id, check in said["key_checks"].items()}
            created, first_revision = float(said["created"]), int(said["first_revision"])
            if not (0.0 <= created < MAX_TIME and 0 <= first_revision <= MAX_COUNTER):
                raise ValueError(f"created is {created}, first_revision {first_revision}")
            return About(
                created, str(said["incarnation"]), bytes.fromhex(said["secret"]), first_revision, checks
            )
        except (ValueError, KeyError, TypeError, AttributeError, OverflowError, RecursionError) as error:
            raise self._damaged(f"its head cannot be read ({error})") from error

    def _blocks(self) -> Iterator[tuple[bytes, bytes, str]]:
        """Kind and content of each block, and the digest of what stands before it."""
        try:
            with self._path.open("rb") as file:
                self._require_format(file.read(_MAX_MAGIC_BYTES))
                file.seek(len(MAGIC))
                digest = hashlib.sha256(MAGIC)
                while head := file.read(_BLOCK.size):
                    if len(head) < _BLOCK.size:
                        raise self._damaged("it was cut off")
                    size, checksum, kind = _BLOCK.unpack(head)
                    content = file.read(size) if size <= _MOST_BLOCK_BYTES else b""
                    if len(content) < size or crc32(content, crc32(kind)) != checksum:
                        raise self._damaged("a block is not as it was written, or was cut off")
                    yield kind, content, digest.hexdigest() if kind == _END else ""
                    digest.update(head)
                    digest.update(content)
        except OSError as error:
            raise BackupError(f"{self._path} must be readable: {error.strerror}") from error

    def _require_format(self, start: bytes) -> None:
        if start.startswith(MAGIC):
            return
        version, newline, _ = start.removeprefix(_NAME).partition(b"\n")
        if start.startswith(_NAME) and newline and version.isdigit():
            raise BackupError(
                f"{self._path} must be a backup of format {FORMAT}; it is of {int(version)}, which another release wrote"
            )
        raise BackupError(f"{self._path} must be a backup that 'stepwell store backup' wrote")

    def _damaged(self, problem: str) -> BackupError:
        return BackupError(f"the backup {self._path} is damaged: {problem}")


def _pairs(content: bytes) -> Iterator[tuple[bytes, bytes]]:
    """Key and value of each entry of a block."""
    at = 0
    while at < len(content):
        key_bytes, value_bytes = _ENTRY.unpack_from(content, at)
        start = at + _ENTRY.size + key_bytes
        at = start + value_bytes
        yield content[start - key_bytes : start], content[start:at]


def _end_of(backup: Writer | Reader, digest: str) -> dict[str, int | str]:
    """What its end says of a backup."""
    documents = {"documents": backup.documents} if backup.documents else {}
    return {**documents, "sessions": backup.sessions, "tombstones": backup.tombstones, "sha256": digest}
