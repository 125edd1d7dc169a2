"""A segment of the write-ahead log: one file of entries in the form of `layout`.

The file is preallocated and, after a truncation, overwritten from the beginning. So an append is one write into
allocated blocks, and waits for the disk once. A growing file, or an LMDB transaction, waits twice: for the data and for
the metadata.
Each truncation draws a random number, the generation. Entries of earlier generations after the last entry are ignored.
"""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import os
import secrets
from collections.abc import Iterable, Sequence
from pathlib import Path

from stepwell._admin.record_file import HEAD
from stepwell_server.files.flush import flush_content, flush_open
from stepwell_server.store.disk.files import write_zeros
from stepwell_server.store.disk.wal import layout
from stepwell_server.store.record import HEADER, RecordBytes, is_change, size_of

#: Flag for a write that returns when the data is on disk; 0: not supported (macOS), so that a flush follows instead.
WRITE_THROUGH: int = getattr(os, "RWF_DSYNC", 0)
#: A record of up to this size is read in one step, a longer one in two.
_GUESS_BYTES = 2048
#: Records that are at most this far apart are read together, and at most this many bytes at a time.
_GAP_BYTES, _READ_BYTES = 4096, 2**18
#: Maximum of buffers in one write.
_MAX_BUFFERS = 512
_NO_HEAD = bytes(HEAD.size)


class SegmentCorrupt(Exception):
    """Changes are missing, though later ones exist; their sessions are unknown."""


@dataclasses.dataclass(slots=True, eq=False)
class SegmentWrite:
    """Entries for a segment, laid out and not yet written. Call `Segment.written` afterwards, if it succeeded."""

    segment: Segment
    buffers: Sequence[RecordBytes]
    at: int
    size: int
    sequence: int
    offsets: Iterable[tuple[str, int]] = ()
    """Where the records will be."""
    heads: Sequence[int] = ()
    """Where the entries begin. A failed write erases them, so that none of them is found later."""
    generation: int = 0
    """Of the truncation that this write ends; 0: it appends."""
    count: int = 0
    """Number of records."""
    changes: Sequence[bool] = ()
    """Which of them are changes; empty: none."""

    @property
    def data(self) -> bytes:
        """The buffers, concatenated."""
        first = self.buffers[0]
        return first if len(self.buffers) == 1 and isinstance(first, bytes) else b"".join(self.buffers)

    def make(self) -> None:
        """Write and, if the segment waits for the disk, flush. For any thread.

        Raises:
            OSError: it could not be written. None of it was kept.
        """
        self.segment.make(self)


class Segment:
    """One file. For one thread; other threads may call `value` and remove offsets, except during a truncation."""

    def __init__(self, path: Path, size: int, owner: int, *, flush: bool, make: bool) -> None:
        """Open the file, to `load` it, or create it, to `truncate` it.

        Args:
            path: The file.
            size: Its size in bytes.
            owner: The store that it belongs to: a random number other than 0.
            flush: Whether an append returns only when the entry is on disk.
            make: Preallocate the file if it has another size. The content does not matter.

        Raises:
            OSError: it cannot be opened, or there is no space.
        """
        self.path = path
        self.size = size
        self.places = layout.Places()
        self.end = 0
        self.sequence = 0
        """Sequence number of the last write."""
        self.base_sequence = 0
        """Sequence number of the last write to the other segment when this one was truncated."""
        self._generation = 0
        self._owner = owner
        self._flush = flush
        self._flags = WRITE_THROUGH if flush else 0
        self._file = os.open(path, os.O_CREAT | os.O_RDWR | os.O_CLOEXEC, 0o600)
        try:
            if make and os.fstat(self._file).st_size != size:
                self._preallocate()
            if flush:
                flush_open(self._file)
        except BaseException:
            os.close(self._file)
            raise

    @property
    def offsets(self) -> dict[str, int]:
        """Offset of each session's last record."""
        return self.places.last

    @property
    def descriptor(self) -> int:
        """The descriptor of the open file."""
        return self._file

    def truncate(self, sequence: int) -> None:
        """Drop all entries; `sequence` is the number of the last write to any segment.

        Raises:
            OSError: it could not be written. Repeat the truncation before appending.
        """
        write = self.truncation(sequence)
        self.make(write)
        self.written(write)

    def truncation(self, sequence: int) -> SegmentWrite:
        """Drop all entries, and return the write of the first new entry: see `truncate`. Until it is made, no append fits."""
        self.places = layout.Places()
        self._generation, self.end = 0, self.size
        generation = secrets.randbits(63) + 1
        start = layout.lay_out((), generation, sequence, owner=self._owner)
        return SegmentWrite(self, start.buffers, 0, start.size, sequence, generation=generation)

    def append(self, parts: Sequence[Sequence[tuple[str, RecordBytes]]], leave: int = 0) -> bool:
        """Write all entries or none; return False if they do not fit with `leave` more bytes.

        Raises:
            OSError: they could not be written. None was kept.
        """
        write = self.addition(parts, leave)
        if write is None:
            return False
        self.make(write)
        self.written(write)
        return True

    def addition(
        self,
        parts: Sequence[Sequence[tuple[str, RecordBytes]]],
        leave: int = 0,
        after: SegmentWrite | None = None,
    ) -> SegmentWrite | None:
        """Return the write of all entries, behind those of `after`; None if they do not fit with `leave` more bytes."""
        sequence, start = self.sequence + 1, self.end
        if after is not None:
            sequence, start = after.sequence + 1, after.at + after.size
        if len(parts) == 1 and len(parts[0]) == 1:
            ((session_id, record),) = parts[0]
            data, record_at = layout.lay_out_one(session_id, record, self._generation, sequence)
            if start + len(data) + leave > self.size:
                return None
            offsets = ((session_id, start + record_at),)
            changes = (True,) if is_change(record) else ()
            return SegmentWrite(
                self, (data,), start, len(data), sequence, offsets, (start,), count=1, changes=changes
            )
        added = [
            layout.lay_out(part, self._generation, sequence, remaining=len(parts) - 1 - place)
            for place, part in enumerate(parts)
        ]
        size = sum(entry.size for entry in added)
        if start + size + leave > self.size:
            return None
        heads = list(itertools.accumulate((entry.size for entry in added[:-1]), initial=start))
        return SegmentWrite(
            self,
            [buffer for entry in added for buffer in entry.buffers],
            start,
            size,
            sequence,
            itertools.chain.from_iterable(
                entry.offsets(head) for entry, head in zip(added, heads, strict=True)
            ),
            heads,
            count=sum(map(len, parts)),
            changes=layout.changes_of(parts),
        )

    def make(self, write: SegmentWrite) -> None:
        """See `SegmentWrite.make`."""
        try:
            self._write(write.buffers, write.at, write.size)
        except BaseException:
            self._erase(write.heads)
            raise

    def written(self, write: SegmentWrite) -> None:
        """Use the entries of a write that was made."""
        if write.generation:
            self._generation, self.base_sequence = write.generation, write.sequence
        places = self.places
        if write.changes or places.earlier or places.unfinished:
            for (session_id, at), is_one in itertools.zip_longest(write.offsets, write.changes):
                places.add(session_id, at, is_change=bool(is_one))
        else:
            places.last.update(write.offsets)
        self.end, self.sequence = write.at + write.size, write.sequence

    def value(self, session_id: str) -> list[RecordBytes]:
        """Return the last record of a session, and those here that it needs, the oldest first; empty: there is none.

        Raises:
            OSError: they cannot be read.
        """
        return [self._record(at) for at in self.places.of(session_id)]

    def _record(self, at: int) -> bytes:
        start = os.pread(self._file, _GUESS_BYTES, at)
        size = min(size_of(start), self.size - at)
        return start[:size] if size <= len(start) else os.pread(self._file, size, at)

    def records(self, session_ids: Iterable[str], *, are_last: bool = False) -> list[tuple[str, RecordBytes]]:
        """Return the last record of each session that has one, and those here that it needs.

        They are in the order of the file: neighbours are read together.

        Args:
            session_ids: The sessions.
            are_last: Return the last record of each only.

        Raises:
            OSError: they cannot be read.
        """
        if are_last or not self.places.earlier:
            last = self.places.last
            places = sorted((at, i) for i in session_ids if (at := last.get(i)) is not None)
        else:
            places = sorted((at, i) for i in session_ids for at in self.places.of(i))
        found: list[tuple[str, RecordBytes]] = []
        data, begin = b"", 0
        for index, (at, session_id) in enumerate(places):
            start = at - begin
            if start + HEADER.itemsize > len(data) or start + size_of(
                data[start : start + HEADER.itemsize]
            ) > len(data):
                data, begin, start = os.pread(self._file, _run_bytes(places, index), at), at, 0
                size = min(size_of(data), self.size - at)
                if size > len(data):
                    data = os.pread(self._file, size, at)
            found.append((session_id, data[start : start + size_of(data[start : start + HEADER.itemsize])]))
        return found

    def load(self) -> None:
        """Read the file. A write that the end of the process or machine interrupted is ignored.

        Raises:
            SegmentCorrupt: with `flush` the file stays unchanged. Otherwise its readable part is loaded and the rest
            is dropped.
            OSError: the file cannot be read.
        """
        self.end = self.size  # no append fits before a load or truncation
        data = os.pread(self._file, self.size, 0)
        found = layout.content_of(data)
        if found.owner is None:
            raise SegmentCorrupt(f"{self.path} {found.problem}")
        if found.owner != self._owner:
            raise SegmentCorrupt(f"{self.path} cannot be read: it does not belong to this store")
        self._generation, self.base_sequence = found.generation, found.base_sequence
        self.places, self.end, self.sequence = found.places, found.end, found.sequence
        there = os.fstat(self._file).st_size
        if there != self.size:
            raise SegmentCorrupt(
                f"{self.path} cannot be read to its end: it must have {self.size} bytes; it has {there}"
            )
        if found.has_rest and not (found.problem and self._flush):
            # This is an interrupted write, or the file is corrupt. Left in place, it could seem to follow a later
            # write.
            write_zeros(self._file, self.end, self.size)
            flush_open(self._file)
        if found.problem:
            raise SegmentCorrupt(f"{self.path} {found.problem}")

    def close(self) -> None:
        """Close the file."""
        os.close(self._file)

    def _preallocate(self) -> None:
        """Write the whole file once, to allocate all its blocks."""
        os.ftruncate(self._file, 0)
        try:
            write_zeros(self._file, 0, self.size)
        except OSError:
            os.ftruncate(self._file, 0)
            raise

    def _write(self, buffers: Sequence[RecordBytes], at: int, size: int) -> None:
        if len(buffers) > _MAX_BUFFERS:
            buffers = [b"".join(buffers)]
        written = os.pwritev(self._file, buffers, at, self._flags)
        if written < size:
            data = memoryview(b"".join(buffers))
            while written < size:  # the write was partial: the rest succeeds, or raises the reason
                written += os.pwritev(self._file, [data[written:]], at + written, self._flags)
        if self._flush and not self._flags:
            flush_content(self._file)

    def _erase(self, heads: Iterable[int]) -> None:
        for at in heads:
            # if this fails too, a change that was reported as failed may be found later
            with contextlib.suppress(OSError):
                os.pwrite(self._file, _NO_HEAD, at)


def _run_bytes(places: Sequence[tuple[int, str]], first: int) -> int:
    """Return the bytes to read from a record on, so that they include its neighbours."""
    begin = last = places[first][0]
    for at, _ in itertools.islice(places, first + 1, None):
        if at - last > _GAP_BYTES or at - begin > _READ_BYTES:
            break
        last = at
    return last - begin + _GUESS_BYTES
