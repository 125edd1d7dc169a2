"""A segment of the write-ahead log: one file of entries, as `layout` lays them out.

The file is preallocated, and overwritten from the beginning after it was truncated. So an append is one write into
blocks that the disk has already, and waits for the disk once. A file that grows, or an LMDB transaction, waits twice:
for the bytes, and for what points to them. Each truncation draws a random number, the generation: entries of earlier
generations behind the last entry do not count.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import secrets
from collections.abc import Iterable, Sequence
from pathlib import Path

from stepwell._admin.record_file import HEAD
from stepwell_server.store.disk.files import flush_content, flush_open, write_zeros
from stepwell_server.store.disk.wal import layout
from stepwell_server.store.record import RecordBytes, size_of

#: A write returns when the disk has it; 0 where the system has no such writes, and a flush follows instead (macOS).
WRITE_THROUGH: int = getattr(os, "RWF_DSYNC", 0)
#: A record of up to this size is read at once, a longer one in two steps.
_GUESS_BYTES = 2048
#: Buffers in one write.
_MAX_BUFFERS = 512
_NO_HEAD = bytes(HEAD.size)


class SegmentCorrupt(Exception):
    """Changes are missing that later ones followed; their sessions are not known."""


class Segment:
    """One file. For one thread; others may call `record`, and forget offsets, while it is not truncated."""

    def __init__(self, path: Path, size: int, owner: int, *, flush: bool, make: bool) -> None:
        """Open the file, to `load` it, or make it, to `truncate` it.

        Args:
            path: The file.
            size: Its bytes.
            owner: The store that it belongs to: a random number, not 0.
            flush: Whether an entry is on the disk when it was appended.
            make: Preallocate it if it has another size; what is in it does not matter.

        Raises:
            OSError: it cannot be opened, or there is no room.
        """
        self.path = path
        self.size = size
        self.offsets: dict[str, int] = {}
        """Where each session's last record is."""
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
    def descriptor(self) -> int:
        """Of the open file."""
        return self._file

    def truncate(self, sequence: int) -> None:
        """Drop all entries; `sequence` is that of the last write to any segment.

        Raises:
            OSError: it could not be written; then this is to be done again before anything is appended.
        """
        self.offsets = {}
        self._generation, self.end = 0, self.size  # there is no room until this is done
        generation = secrets.randbits(63) + 1
        start = layout.lay_out((), generation, sequence, owner=self._owner)
        self._write(start.buffers, 0, start.size)
        self._generation, self.end, self.sequence, self.base_sequence = (
            generation,
            start.size,
            sequence,
            sequence,
        )

    def append(self, parts: Sequence[Sequence[tuple[str, RecordBytes]]], leave: int = 0) -> bool:
        """Write entries, all of them or none; False if there is no room for them and `leave` more bytes.

        Raises:
            OSError: they could not be written. None is there.
        """
        sequence = self.sequence + 1
        added = [
            layout.lay_out(part, self._generation, sequence, remaining=len(parts) - 1 - place)
            for place, part in enumerate(parts)
        ]
        size = sum(entry.size for entry in added)
        if self.end + size + leave > self.size:
            return False
        try:
            self._write([buffer for entry in added for buffer in entry.buffers], self.end, size)
        except BaseException:
            self._erase(itertools.accumulate((entry.size for entry in added[:-1]), initial=self.end))
            raise
        for entry in added:
            self.offsets.update(entry.offsets(self.end))
            self.end += entry.size
        self.sequence = sequence
        return True

    def append_one(self, session_id: str, record: RecordBytes) -> bool:
        """As `append`, of one record."""
        sequence, start = self.sequence + 1, self.end
        data, record_at = layout.lay_out_one(session_id, record, self._generation, sequence)
        size = len(data)
        if start + size > self.size:
            return False
        try:
            self._write((data,), start, size)
        except BaseException:
            self._erase([start])
            raise
        self.offsets[session_id] = start + record_at
        self.end, self.sequence = start + size, sequence
        return True

    def record(self, session_id: str) -> bytes | None:
        """The last record of a session, or None.

        Raises:
            OSError: it cannot be read.
        """
        at = self.offsets.get(session_id)
        if at is None:
            return None
        start = os.pread(self._file, _GUESS_BYTES, at)
        size = min(size_of(start), self.size - at)
        return start[:size] if size <= len(start) else os.pread(self._file, size, at)

    def load(self) -> None:
        """Read what the file has. A write that was under way when the process or the machine ended is left out.

        Raises:
            SegmentCorrupt: with `flush` nothing is done about it; else what could be read is loaded, and the rest is dropped.
            OSError: the file cannot be read.
        """
        self.end = self.size  # nothing can be appended before it is loaded or truncated
        data = os.pread(self._file, self.size, 0)
        found = layout.content_of(data)
        if found.owner is None:
            raise SegmentCorrupt(f"{self.path} {found.problem}")
        if found.owner != self._owner:
            raise SegmentCorrupt(f"{self.path} cannot be read: it does not belong to this store")
        self._generation, self.base_sequence = found.generation, found.base_sequence
        self.offsets, self.end, self.sequence = found.offsets, found.end, found.sequence
        there = os.fstat(self._file).st_size
        if there != self.size:
            raise SegmentCorrupt(
                f"{self.path} cannot be read to its end: it must have {self.size} bytes; it has {there}"
            )
        if found.has_rest and not (found.problem and self._flush):
            # It is of a write that was cut off, or the file is damaged. Left in place, it could seem to follow a later write.
            write_zeros(self._file, self.end, self.size)
            flush_open(self._file)
        if found.problem:
            raise SegmentCorrupt(f"{self.path} {found.problem}")

    def close(self) -> None:
        """End; not to be used any more."""
        os.close(self._file)

    def _preallocate(self) -> None:
        """Write the whole file once, so that the disk has all its blocks."""
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
            while written < size:  # there was a limit: what is left meets it, or goes in
                written += os.pwritev(self._file, [data[written:]], at + written, self._flags)
        if self._flush and not self._flags:
            flush_content(self._file)

    def _erase(self, heads: Iterable[int]) -> None:
        for at in heads:
            # should this fail as well, a change that was reported as failed may be found later
            with contextlib.suppress(OSError):
                os.pwrite(self._file, _NO_HEAD, at)
