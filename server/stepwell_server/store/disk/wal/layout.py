"""The layout of a log entry: the records that were written together.

    checksum, magic, generation, sequence, remaining, counts | ids | records | padding

Backups and exported sessions consist of such entries too: `stepwell._admin.record_file` has the common part. The tag of
the first entry of a segment identifies its store; other tags are 0. One write may consist of several entries with the
same sequence number, each with the number of entries that follow (`remaining`).

The checksum covers everything before the records, and the records' own checksums, which are their first bytes. This
distinguishes an incomplete entry, a complete one, and one with a record that was corrupted later.
"""

from __future__ import annotations

import dataclasses
import itertools
import struct
from collections.abc import Iterator, Sequence
from typing import NamedTuple

from isal.isal_zlib import crc32

from stepwell._admin.record_file import ALIGNMENT, CHECKSUM_BYTES, HEAD, LENGTH, MAGIC
from stepwell_server.store.record import (
    HEADER,
    Puts,
    RecordBytes,
    encode_ids,
    follows,
    is_change,
    is_sound,
    size_of,
)

_MARK = struct.Struct("<IQ")  # magic, generation


class Layout(NamedTuple):
    """The part of an entry without its records. It stays the same while the same sessions change."""

    ids: Sequence[str]
    sizes: Sequence[int]
    text: bytes
    """The encoded ids."""


class Entry(NamedTuple):
    """An entry to write."""

    layout: Layout
    buffers: Sequence[RecordBytes]
    size: int

    def offsets(self, at: int) -> Iterator[tuple[str, int]]:
        """Return the offsets of the records if the entry is written at `at`."""
        first = at + HEAD.size + len(self.layout.text)
        return zip(self.layout.ids, itertools.accumulate(self.layout.sizes[:-1], initial=first), strict=True)


class StoredEntry(NamedTuple):
    """An entry as read."""

    sequence: int
    remaining: int
    owner: int
    end: int
    offsets: Sequence[tuple[str, int]]

    def follows(self, other: StoredEntry) -> bool:
        """Whether it is the next write, or the next part of the same write."""
        if other.remaining:
            return (self.sequence, self.remaining) == (other.sequence, other.remaining - 1)
        return self.sequence == other.sequence + 1


@dataclasses.dataclass(slots=True)
class Places:
    """Where the records of sessions are. One thread adds them; others may read, and remove from `last`."""

    last: dict[str, int] = dataclasses.field(default_factory=dict)
    """Offset of each session's last record."""
    earlier: dict[str, list[int]] = dataclasses.field(default_factory=dict)
    """Of sessions whose last record is a change: the offsets of those before it that it needs, the oldest first."""
    unfinished: set[str] = dataclasses.field(default_factory=set)
    """Sessions of which these records need others, because the first one is a change."""

    def add(self, session_id: str, at: int, *, is_change: bool) -> None:
        """Add a record. The order of the assignments matters to `of`."""
        before = self.last.get(session_id)
        if is_change and before is not None:
            self.earlier.setdefault(session_id, []).append(before)
        elif is_change:
            self.earlier.pop(session_id, None)
            self.unfinished.add(session_id)
        self.last[session_id] = at
        if not is_change:
            self.earlier.pop(session_id, None)
            self.unfinished.discard(session_id)

    def add_stored(self, session_id: str, at: int, data: bytes) -> None:
        """Add a record of a segment that is read."""
        head, before = data[at : at + HEADER.itemsize], self.last.get(session_id)
        if before is not None and not follows(head, data[before : before + HEADER.itemsize]):
            del self.last[session_id]  # the records between them went to the store
        self.add(session_id, at, is_change=is_change(head))

    def of(self, session_id: str) -> list[int]:
        """Return the offsets of a session's last record and of the records that it needs, the oldest first."""
        while True:
            at = self.last.get(session_id)
            before = tuple(self.earlier.get(session_id, ()))
            if self.last.get(session_id) == at:  # otherwise a record was added meanwhile
                return [] if at is None else [*(each for each in before if each < at), at]


@dataclasses.dataclass(slots=True)
class Content:
    """The content of a segment."""

    generation: int = 0
    owner: int | None = None
    """None: the segment has no first entry."""
    base_sequence: int = 0
    """Sequence number of the first entry."""
    sequence: int = 0
    """Sequence number of the last complete write."""
    end: int = 0
    """Where that write ends."""
    places: Places = dataclasses.field(default_factory=Places)
    has_rest: bool = False
    """Parts of later writes follow the end."""
    problem: str = ""
    """Why it cannot be read to its end; empty if it can."""


def changes_of(parts: Sequence[Sequence[tuple[str, RecordBytes]]]) -> list[bool]:
    """Return which records are changes; empty if none is."""
    found: list[bool] = []
    for part in parts:
        if isinstance(part, Puts):
            found += [is_change(part.together)] * len(part)
        else:
            found += [is_change(record) for _, record in part]
    return found if any(found) else []


def lay_out(
    puts: Sequence[tuple[str, RecordBytes]],
    generation: int,
    sequence: int,
    *,
    remaining: int = 0,
    owner: int = 0,
) -> Entry:
    """Lay out an entry for records."""
    layout, records = _layout(puts), _records(puts)
    checksums = puts.checksums if isinstance(puts, Puts) else b""
    if not checksums:
        checksums = b"".join([record[:CHECKSUM_BYTES] for _, record in puts])
    # otherwise the next start could not read the log
    assert len(checksums) == CHECKSUM_BYTES * len(layout.ids), "each record has its own checksum"
    byte_count = sum(layout.sizes)
    head = HEAD.pack(
        0, MAGIC, generation, sequence, remaining, len(puts), len(layout.text), owner, byte_count
    )[CHECKSUM_BYTES:]
    checksum = _checksum(head, layout.text, checksums).to_bytes(CHECKSUM_BYTES, "little")
    size = HEAD.size + len(layout.text) + byte_count
    padding = -size % ALIGNMENT
    return Entry(layout, [checksum + head, layout.text, *records, bytes(padding)], size + padding)


def lay_out_one(session_id: str, record: RecordBytes, generation: int, sequence: int) -> tuple[bytes, int]:
    """Return the entry of `lay_out` for one record, and the record's offset in it. A fast path for a single step."""
    key = session_id.encode()
    start = b"".join((
        HEAD.pack(0, MAGIC, generation, sequence, 0, 1, LENGTH.size + len(key), 0, len(record))[CHECKSUM_BYTES:],
        LENGTH.pack(len(key)),
        key,
    ))  # fmt: skip
    checksum = crc32(record[:CHECKSUM_BYTES], crc32(start)).to_bytes(CHECKSUM_BYTES, "little")
    record_at = CHECKSUM_BYTES + len(start)
    padding = bytes(-(record_at + len(record)) % ALIGNMENT)
    return b"".join((checksum, start, record, padding)), record_at


def read(data: bytes, at: int, generation: int | None) -> StoredEntry | None:
    """Return the entry at an offset; None if there is no complete entry of this generation (None: of any)."""
    if len(data) - at < HEAD.size:
        return None
    checksum, magic, its_generation, sequence, remaining, count, text_bytes, owner, byte_count = (
        HEAD.unpack_from(data, at)
    )
    records_at = at + HEAD.size + text_bytes
    if magic != MAGIC or generation not in (None, its_generation) or records_at + byte_count > len(data):
        return None
    text = data[at + HEAD.size : records_at]
    offsets = _offsets(data, text, records_at, count)
    if offsets is None:
        return None
    checksums = b"".join([data[offset : offset + CHECKSUM_BYTES] for _, offset in offsets])
    if _checksum(data[at + CHECKSUM_BYTES : at + HEAD.size], text, checksums) != checksum:
        return None
    end = records_at + byte_count
    return StoredEntry(sequence, remaining, owner, end + -(end - at) % ALIGNMENT, offsets)


def writes(data: bytes, start: StoredEntry) -> Iterator[list[StoredEntry]]:
    """Return the complete writes of a segment; `start` is its first entry."""
    generation, write, last = generation_of(data), [start], start
    while (found := read(data, last.end, generation)) is not None and found.follows(last):
        if not last.remaining:
            # a later write exists, so this one was complete: a record corrupted since is detected when it is read
            yield write
            write = []
        write.append(found)
        last = found
    if not last.remaining and all(is_whole(data, entry) for entry in write):
        yield write


def content_of(data: bytes) -> Content:
    """Read a segment up to the last complete write."""
    start = read(data, 0, None)
    if start is None:
        return Content(problem="cannot be read: its first entry is missing")
    found = Content(generation_of(data), start.owner, start.sequence, start.sequence, start.end)
    for write in writes(data, start):
        for entry in write:
            for session_id, at in entry.offsets:
                found.places.add_stored(session_id, at, data)
            found.end, found.sequence = entry.end, entry.sequence
    behind = [entry.sequence for entry in search(data, found.end, found.generation)]
    found.has_rest = bool(behind)
    if any(sequence > found.sequence + 1 for sequence in behind):
        found.problem = f"cannot be read from byte {found.end} on"
    return found


def generation_of(data: bytes) -> int:
    """Return the generation of the first entry."""
    return int(HEAD.unpack_from(data)[2])


def search(data: bytes, at: int, generation: int) -> Iterator[StoredEntry]:
    """Find all entries of a generation after an offset, whatever is between them."""
    mark = _MARK.pack(MAGIC, generation)
    place = data.find(mark, at)
    while place >= 0:
        found = read(data, place - CHECKSUM_BYTES, generation)
        if found is not None:
            yield found
        place = data.find(mark, place + 1)


def is_whole(data: bytes, found: StoredEntry) -> bool:
    """Whether all records of an entry are intact."""
    return all(
        is_sound(name, data[at : at + size_of(data[at : at + HEADER.itemsize])]) for name, at in found.offsets
    )


def _checksum(head: RecordBytes, text: bytes, checksums: bytes) -> int:
    return crc32(checksums, crc32(text, crc32(head)))


def _records(puts: Sequence[tuple[str, RecordBytes]]) -> Sequence[RecordBytes]:
    return [puts.together] if isinstance(puts, Puts) else [record for _, record in puts]


def _layout(puts: Sequence[tuple[str, RecordBytes]]) -> Layout:
    if isinstance(puts, Puts):
        return Layout(puts.session_ids, puts.sizes, puts.encoded_ids)
    ids = [session_id for session_id, _ in puts]
    return Layout(ids, [len(record) for _, record in puts], encode_ids(ids))


def _offsets(data: bytes, text: bytes, at: int, count: int) -> list[tuple[str, int]] | None:
    """Return ids and the offsets of their records; None if the entry is corrupt."""
    place, offsets = 0, []
    try:
        for _ in range(count):
            (length,) = LENGTH.unpack_from(text, place)
            place += LENGTH.size + length
            offsets.append((str(text[place - length : place], "utf-8"), at))
            at += size_of(data[at : at + HEADER.itemsize])
    except (struct.error, UnicodeDecodeError):
        return None
    return offsets if place == len(text) else None
