"""A file of changes: what happened last to sessions that the store has, one entry after the other; see `entries`.

The file is laid out in full when it is made and written from the beginning whenever it is filled anew, so that to
append is one write into blocks that the disk has already: it waits for the disk once, for nothing but the
bytes. A file that grows, or an LMDB transaction, waits twice: for the bytes, and for what points to them. Each
fill has a number drawn by chance; what earlier ones left behind the last entry is none of it.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import secrets
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

from stepwell_server.store.disk import wal_format
from stepwell_server.store.record import Stored, size_of

#: A record of up to this size is read at once, a longer one in two steps.
_GUESS_BYTES = 2048
#: Buffers in one write.
_MOST_BUFFERS = 512
_ZEROS = bytes(1 << 20)
_NO_HEAD = bytes(wal_format.HEAD.size)


class JournalDamaged(Exception):
    """Changes are missing that later ones were made after; nobody can tell of which sessions."""


class Journal:
    """One file. For one thread, but `record`, which others may call while it is not filled anew."""

    def __init__(self, path: Path, size: int, owner: int, *, flush: bool, make: bool) -> None:
        """Open the file, to `load` it, or make it, to be filled anew.

        Args:
            path: The file.
            size: Its bytes.
            owner: Whose it is: a number drawn by chance, not 0.
            flush: Whether an entry is on the disk when it was appended.
            make: Lay it out if it has another size; what is in it does not matter.

        Raises:
            OSError: it cannot be opened, or there is no room.
        """
        self.path = path
        self.size = size
        self.offsets: dict[str, int] = {}
        """Where each session's last record is."""
        self.end = 0
        self.number = 0
        """Of the last write."""
        self.first = 0
        """Of the last write to the other journal when this one was filled anew."""
        self._fill = 0
        self._owner = owner
        self._flags = os.RWF_DSYNC if flush else 0
        self._file = os.open(path, os.O_CREAT | os.O_RDWR | os.O_CLOEXEC, 0o600)
        try:
            if make and os.fstat(self._file).st_size != size:
                self._lay_out()
            if flush:
                os.fsync(self._file)
        except BaseException:
            os.close(self._file)
            raise

    @property
    def descriptor(self) -> int:
        """Of the open file."""
        return self._file

    def fill_anew(self, number: int) -> None:
        """Forget all entries: the file has none from now on.

        Args:
            number: Of the last write to any journal.

        Raises:
            OSError: it could not be written; then this is to be done again before anything is appended.
        """
        self.offsets = {}
        self._fill, self.end = 0, self.size  # there is no room until this is done
        fill = secrets.randbits(63) + 1
        start = wal_format.lay_out((), fill, number, owner=self._owner)
        self._write(start.buffers, 0, start.size)
        self._fill, self.end, self.number, self.first = fill, start.size, number, number

    def append(self, parts: Sequence[Sequence[tuple[str, Stored]]]) -> bool:
        """Write entries, all of them or none; False if there is no room.

        Args:
            parts: Ids and records of each.

        Raises:
            OSError: they could not be written. None is there.
        """
        number = self.number + 1
        added = [
            wal_format.lay_out(part, self._fill, number, rest=len(parts) - 1 - place)
            for place, part in enumerate(parts)
        ]
        size = sum(entry.size for entry in added)
        if self.end + size > self.size:
            return False
        try:
            self._write([buffer for entry in added for buffer in entry.buffers], self.end, size)
        except BaseException:
            self._erase(itertools.accumulate((entry.size for entry in added[:-1]), initial=self.end))
            raise
        for entry in added:
            self.offsets.update(entry.offsets(self.end))
            self.end += entry.size
        self.number = number
        return True

    def append_one(self, session_id: str, record: Stored) -> bool:
        """As `append`, of one record."""
        number, start = self.number + 1, self.end
        data, record_at = wal_format.lay_out_one(session_id, record, self._fill, number)
        size = len(data)
        if start + size > self.size:
            return False
        try:
            self._write((data,), start, size)
        except BaseException:
            self._erase([start])
            raise
        self.offsets[session_id] = start + record_at
        self.end, self.number = start + size, number
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
            JournalDamaged: with `flush` nothing is done about it; else what could be read is loaded, and the rest gone.
            OSError: the file cannot be read.
        """
        self.end = self.size  # nothing can be appended unless it is loaded, or filled anew
        data = os.pread(self._file, self.size, 0)
        start = wal_format.read(data, 0, None)
        if start is None:
            raise JournalDamaged(f"{self.path} cannot be read: it must have a beginning")
        if start.owner != self._owner:
            raise JournalDamaged(f"{self.path} cannot be read: it does not belong to this store")
        self._fill, self.first = wal_format.fill_of(data), start.number
        for write in self._writes(data, start):
            self._take(write)
        there = os.fstat(self._file).st_size
        if there != self.size:
            raise JournalDamaged(
                f"{self.path} cannot be read to its end: it must have {self.size} bytes; it has {there}"
            )
        self._drop_behind(data)

    def _writes(self, data: bytes, start: wal_format.Found) -> Iterator[list[wal_format.Found]]:
        """What was written at once, and is there whole."""
        write, last = [start], start
        while (found := wal_format.read(data, last.end, self._fill)) is not None and found.follows(last):
            if not last.rest:
                # later ones are there, so this one is: a record that was damaged since says so when it is read
                yield write
                write = []
            write.append(found)
            last = found
        if not last.rest and all(wal_format.is_whole(data, entry) for entry in write):
            yield write

    def _drop_behind(self, data: bytes) -> None:
        """Entries behind the last that was taken are of a write that did not come to its end, or there is damage.

        They must not follow upon the next ones by chance.
        """
        behind = list(wal_format.search(data, self.end, self._fill))
        is_damaged = any(found.number > self.number + 1 for found in behind)
        if behind and not (is_damaged and self._flags):
            self._write_zeros(self.end)
            os.fsync(self._file)
        if is_damaged:
            raise JournalDamaged(f"{self.path} cannot be read from byte {self.end} on")

    def sync(self) -> None:
        """See to it that all of it survives a loss of power.

        Raises:
            OSError: the disk refused.
        """
        os.fdatasync(self._file)

    def close(self) -> None:
        """End; not to be used any more."""
        os.close(self._file)

    def _take(self, found: Iterable[wal_format.Found]) -> None:
        for entry in found:
            self.offsets.update(entry.offsets)
            self.end, self.number = entry.end, entry.number

    def _lay_out(self) -> None:
        """Write the whole file once."""
        os.ftruncate(self._file, 0)
        try:
            self._write_zeros(0)
        except OSError:
            os.ftruncate(self._file, 0)
            raise

    def _write_zeros(self, at: int) -> None:
        while at < self.size:
            at += os.pwrite(self._file, _ZEROS[: self.size - at], at)

    def _write(self, buffers: Sequence[Stored], at: int, size: int) -> None:
        if len(buffers) > _MOST_BUFFERS:
            buffers = [b"".join(buffers)]
        written = os.pwritev(self._file, buffers, at, self._flags)
        if written == size:
            return
        rest = memoryview(b"".join(buffers))
        while written < size:  # there was a limit: what is left meets it, or goes in
            written += os.pwritev(self._file, [rest[written:]], at + written, self._flags)

    def _erase(self, heads: Iterable[int]) -> None:
        for at in heads:
            # should this fail as well, the change may be found later: whoever was told that it failed may not mind
            with contextlib.suppress(OSError):
                os.pwrite(self._file, _NO_HEAD, at)
