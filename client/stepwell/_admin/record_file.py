"""Files of records: the one codec of backups (the server's) and of files of exported sessions (the SDK's).

    line, entry, entry, ...
    entry:  checksum, magic, generation, sequence, remaining, records, bytes of names, tag, bytes of records
            | names, each behind its length | records | padding to 8 bytes

The line is text, and says what the file is and the number of its format. The entries are those of the server's
write-ahead log, of generation 0, with one record each; the tag is a `Kind`. The first entry is START, the last one END: both are JSON.
END has the number of entries of each kind, and SHA-256 of all before it. A file without END was cut off.

The checksum (CRC-32, zlib's) covers what comes before the record. Of a session's record it covers the first four bytes
only, which are the record's own checksum; of other records it covers all. Integers are little-endian.
"""

from __future__ import annotations

import contextlib
import enum
import hashlib
import json
import struct
import zlib
from collections import Counter
from collections.abc import Iterator, Mapping
from typing import IO, Any, NamedTuple

# checksum, magic, generation, sequence, remaining, records, bytes of names, tag, bytes of records
HEAD = struct.Struct("<IIQQIIIIQ")
MAGIC = int.from_bytes(b"SWE2", "little")
LENGTH = struct.Struct("<H")
CHECKSUM_BYTES = 4
ALIGNMENT = 8
#: A larger record is corrupt: no writer makes one.
_MAX_RECORD_BYTES = 2**31
_MAX_NAME_BYTES = LENGTH.size + 2**16 - 1
_MAX_LINE_BYTES = 64


class Kind(enum.IntEnum):
    """The kind of an entry's record."""

    SESSION = 0
    """Also all entries of the write-ahead log except the first of each of its files."""
    START = 1
    DOCUMENT = 2
    TOMBSTONE = 3
    END = 4


_KINDS = frozenset(Kind)


class Entry(NamedTuple):
    """An entry of a file."""

    kind: Kind
    name: bytes
    record: bytes
    at: int
    """Its offset in the file, in bytes."""


class RecordFileError(Exception):
    """A file is of another kind or format, or is corrupt. The message follows the file's name."""


class Format(NamedTuple):
    """The format of a file."""

    name: str
    """Name in its first line."""
    number: int
    """Number of the format of all its content."""
    noun: str
    """What it is and what writes it, for messages."""
    oldest: int = 0
    """Number of the oldest format that is read too; 0: none."""

    @property
    def line(self) -> bytes:
        """The first line."""
        return f"stepwell {self.name} {self.number}\n".encode()

    def damaged(self, problem: str, at: int) -> RecordFileError:
        """The error of a file that is corrupt from a byte on."""
        return RecordFileError(f"must be {self.noun}, unchanged; at byte {at}: {problem}")


class Writer:
    """Writes the line and the entries of a file. Errors are those of the file."""

    def __init__(self, file: IO[bytes], form: Format, start: Mapping[str, Any]) -> None:
        """Begins a file; `start` is the content of its first entry."""
        self._file = file
        self._digest = hashlib.sha256()
        self.counts: Counter[Kind] = Counter()
        self.bytes = 0
        self._write(form.line)
        self.put(Kind.START, b"", json.dumps(start).encode())

    def put(self, kind: Kind, name: bytes, record: bytes) -> None:
        """Writes an entry."""
        names = LENGTH.pack(len(name)) + name
        head = HEAD.pack(0, MAGIC, 0, self.counts.total(), 0, 1, len(names), kind, len(record))
        start = head[CHECKSUM_BYTES:] + names
        checksum = _checksum(kind, start, record)
        padding = bytes(-(HEAD.size + len(names) + len(record)) % ALIGNMENT)
        self._write(b"".join((checksum.to_bytes(CHECKSUM_BYTES, "little"), start, record, padding)))
        self.counts[kind] += 1

    def end(self) -> None:
        """Writes the last entry."""
        self.put(Kind.END, b"", json.dumps(_end(self.counts, self._digest.hexdigest())).encode())

    def _write(self, data: bytes) -> None:
        self._file.write(data)
        self._digest.update(data)
        self.bytes += len(data)


def read(file: IO[bytes], form: Format) -> Iterator[Entry]:
    """The entries of a file, without END. They are valid only once the iteration has come to its end without an error.

    Raises:
        RecordFileError: the file is not of this format, or is corrupt.
    """
    line = file.readline(_MAX_LINE_BYTES)
    _require_format(line, form)
    digest, counts, at = hashlib.sha256(line), Counter[Kind](), len(line)
    while head := file.read(HEAD.size):
        entry, data = _entry(file, head, at, counts.total(), form)
        if (entry.kind is Kind.START) is not (not counts):
            raise form.damaged("it must have one start, which is its first entry", at)
        content = content_of(entry, form) if entry.kind in (Kind.START, Kind.END) else None
        if entry.kind is Kind.END:
            wanted = _end(counts, digest.hexdigest())
            if content != wanted:
                raise form.damaged(f"its end reports {content}; it has {wanted}", at)
            if file.read(1):
                raise form.damaged("something follows its end", at + len(data))
            return
        digest.update(data)
        counts[entry.kind] += 1
        at += len(data)
        yield entry
    raise form.damaged("its end is missing: it was cut off", at)


def _require_format(line: bytes, form: Format) -> None:
    if line in (
        form.line,
        *(form._replace(number=n).line for n in range(form.oldest or form.number, form.number)),
    ):
        return
    name, _, number = line.rstrip(b"\n").rpartition(b" ")
    if line == b"STPWLS1\n":  # the first line of an earlier format of exported sessions
        name, number = b"stepwell sessions", b"1"
    is_of_this_kind = name == f"stepwell {form.name}".encode() and number.isdigit()
    if not is_of_this_kind or int(number) == form.number:
        raise RecordFileError(f"must be {form.noun}; it begins otherwise")
    raise RecordFileError(
        f"must be {form.noun}, of format {form.number}; it is of {int(number)}, which the release that wrote it reads"
    )


def _entry(file: IO[bytes], head: bytes, at: int, sequence: int, form: Format) -> tuple[Entry, bytes]:
    """The entry with this head, and its bytes.

    Raises:
        RecordFileError: it is corrupt, or not the next one.
    """
    if len(head) < HEAD.size:
        raise form.damaged("an entry was cut off", at)
    checksum, *fixed, names_bytes, tag, record_bytes = HEAD.unpack(head)
    if fixed != [MAGIC, 0, sequence, 0, 1]:
        raise form.damaged("an entry is not the one that was written there", at)
    if not LENGTH.size <= names_bytes <= _MAX_NAME_BYTES or record_bytes > _MAX_RECORD_BYTES:
        raise form.damaged("the head of an entry is wrong", at)
    padding = bytes(-(HEAD.size + names_bytes + record_bytes) % ALIGNMENT)
    size = names_bytes + record_bytes
    body = file.read(size + len(padding))
    if len(body) < size + len(padding):
        raise form.damaged("an entry was cut off", at)
    names, record = body[:names_bytes], body[names_bytes:size]
    name = names[LENGTH.size :]
    is_sound = names == LENGTH.pack(len(name)) + name and body.endswith(padding)
    if not is_sound or _checksum(tag, head[CHECKSUM_BYTES:] + names, record) != checksum:
        raise form.damaged("the checksum of an entry is wrong", at)
    if tag not in _KINDS:
        raise form.damaged(f"an entry is of kind {tag}, which is unknown here", at)
    return Entry(Kind(tag), name, record, at), head + body


def content_of(entry: Entry, form: Format) -> dict[str, Any]:
    """The content of START or END.

    Raises:
        RecordFileError: it is not a JSON object.
    """
    with contextlib.suppress(ValueError, RecursionError):
        found = json.loads(entry.record)
        if isinstance(found, dict):
            return found
    raise form.damaged("an entry must be an object of JSON", entry.at)


def _end(counts: Counter[Kind], digest: str) -> dict[str, Any]:
    return {**{kind.name.lower(): count for kind, count in counts.items()}, "sha256": digest}


def _checksum(tag: int, start: bytes, record: bytes) -> int:
    return zlib.crc32(record if tag else record[:CHECKSUM_BYTES], zlib.crc32(start))
