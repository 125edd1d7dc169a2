"""A write-ahead log of two segments: changes are appended to the active one while the sealed one is checkpointed."""

from __future__ import annotations

import errno
import itertools
import shutil
import struct
import threading
from collections import deque
from collections.abc import Callable, Collection, Iterable, Sequence
from pathlib import Path
from typing import NamedTuple, Self

from stepwell_server.store.base import Parts, StoreError
from stepwell_server.store.disk.wal.segment import Segment, SegmentCorrupt, SegmentWrite
from stepwell_server.store.record import RecordBytes, is_change

SEGMENTS = ("0", "1")
"""The file names of the segments."""
SEGMENT_BYTES = 16 * 2**20
"""Size of each segment. A checkpoint skips sessions that changed again in the last half segment: some 9,000 of 900 bytes."""
_MARK = struct.Struct("<IQ")

#: A segment takes at most one part in this many of the free disk space.
_SHARE = 64
_MIN_BYTES = 64 * 1024
#: Checkpoints start when this fraction of the active segment is used.
_CHECKPOINT_AT = 1 / 2
#: To keep up with writes, checkpoints copy twice as many records as were written, and at least this many at a time. A
#: brief checkpoint copies exactly this many.
_MIN_RECORDS = 64

#: A write of more records than this leaves a fraction of the segment free, for smaller writes during its checkpoint.
_SMALL_WRITE, _KEPT_FREE = 512, 1 / 8

Records = list[tuple[str, RecordBytes]]


class Mark(NamedTuple):
    """The entry about the log that LMDB holds while the log may contain records."""

    owner: int
    """Owner of the segments, see `Segment`."""
    size: int
    """Size of each segment."""

    def packed(self) -> bytes:
        """Encode the mark."""
        return _MARK.pack(*self)

    @classmethod
    def unpacked(cls, stored: bytes) -> Self:
        """Decode the result of `packed`.

        Raises:
            StoreError: it is malformed.
        """
        if len(stored) != _MARK.size:
            raise StoreError(
                f"the mark of the write-ahead log must have {_MARK.size} bytes; it is damaged and has {len(stored)}"
            )
        return cls(*_MARK.unpack(stored))


def room_for(folder: Path, size: int) -> int:
    """Return the size of each segment, at most `size`.

    Raises:
        OSError: there is too little free space.
    """
    sizes = {(folder / name).stat().st_size if (folder / name).is_file() else 0 for name in SEGMENTS}
    minimum = min(size, _MIN_BYTES)
    if len(sizes) == 1 and (there := sizes.pop()) >= minimum:
        return there  # the files exist already and take no more space
    room = shutil.disk_usage(folder).free // _SHARE
    if room < minimum:
        raise OSError(errno.ENOSPC, f"{_SHARE * minimum} bytes of the disk must be free")
    return min(size, room)


class WriteAheadLog:
    """The latest change of each session that is not yet in the store.

    For one thread that checkpoints and one that appends at the same time; `value` and `places_of` are for any thread.
    """

    def __init__(
        self,
        folder: Path,
        mark: Mark,
        *,
        flush: bool,
        make: bool,
        before_rotate: Callable[[], None],
    ) -> None:
        """Open the two segments, to load them, or create them. See `Segment`.

        `before_rotate` raises if appended records would be lost.

        Raises:
            OSError: a segment cannot be opened, or there is no space.
        """
        self._before_rotate = before_rotate
        self.due = 0
        """Number of records to checkpoint now, to keep up with appends."""
        self.removals = 0
        """Grows before records are removed, after the store has them or later ones. A reader of the store that then finds
        a session in neither segment has its latest record, unless this grew since it began to read."""
        # Held while appending or rotating, by one thread or from the first `begin` to the last `end`.
        self._appending = threading.Lock()
        self._begun = 0
        """Number of writes between `begin` and `end`."""
        self._queue: deque[None] = deque()
        """An entry for each thread that waits for this lock: `begin` lets them pass."""
        # Held while reading both segments, so that neither is truncated meanwhile.
        self._looking = threading.Lock()
        first, second = (folder / name for name in SEGMENTS)
        self._active = Segment(first, mark.size, mark.owner, flush=flush, make=make)
        try:
            self._sealed = Segment(second, mark.size, mark.owner, flush=flush, make=make)
        except BaseException:
            self._active.close()
            raise

    def descriptors(self) -> list[tuple[Path, int]]:
        """Paths and descriptors of the open files."""
        return [(segment.path, segment.descriptor) for segment in (self._active, self._sealed)]

    def truncate(self) -> None:
        """Drop the content of both files.

        Raises:
            OSError: they cannot be written.
        """
        self._sealed.truncate(0)
        self._active.truncate(0)

    def load(self, counts: Callable[[Records], Iterable[bool]]) -> list[SegmentCorrupt]:
        """Read the files.

        Args:
            counts: Returns which records are newer than those in the store.

        Returns:
            The damage found.

        Raises:
            OSError: a file cannot be read.
        """
        damage = []
        for segment in (self._active, self._sealed):
            try:
                segment.load()
            except SegmentCorrupt as error:
                damage.append(error)
        if (self._sealed.sequence, self._sealed.base_sequence) > (
            self._active.sequence,
            self._active.base_sequence,
        ):
            self._swap()
        if not damage and self._sealed.sequence < self._active.base_sequence:
            damage.append(SegmentCorrupt(f"{self._sealed.path} cannot be read to its end"))
        for segment in (self._active, self._sealed):
            self._drop_superseded(segment, counts)
        return damage

    @property
    def is_empty(self) -> bool:
        """Everything in the log is in the store. Concurrent with a checkpoint, compare `removals` too."""
        return not self._active.offsets and not self._sealed.offsets

    @property
    def needs_checkpoint(self) -> bool:
        """A checkpoint is due."""
        return self._active.end > self._active.size * _CHECKPOINT_AT and self._is_due

    @property
    def _is_due(self) -> bool:
        """The sealed segment has records to checkpoint before the segments can rotate."""
        return bool(self._sealed.offsets)

    def append(self, parts: Parts, patience_s: float = -1.0) -> bool:
        """Append changes; return False if they do not fit before a checkpoint, or never fit.

        Args:
            parts: The changes, each with the records of its sessions.
            patience_s: Return False if another thread appends for this many seconds; -1: wait for it.

        Raises:
            OSError: they could not be written. None was kept.
        """
        if not self._acquire(patience_s):
            return False
        try:
            return self._append(parts)
        finally:
            self._appending.release()

    def begin(self, parts: Parts, after: SegmentWrite | None = None) -> SegmentWrite | None:
        """Begin to append changes without waiting; return the write to make, and pass it to `end` afterwards.

        Args:
            parts: The changes, each with the records of its sessions.
            after: The write that has begun, if any: this one is made after it, unless it fails.

        Returns:
            None: they do not fit before a checkpoint, or never fit, or another thread appends or waits for that.

        Raises:
            StoreGone: raised by `before_rotate`.
        """
        if self._queue:
            return None
        if after is not None:
            behind = self._addition(parts, after) if after.count else None
            self._begun += behind is not None
            return behind
        if not self._appending.acquire(blocking=False):
            return None
        write: SegmentWrite | None = None
        try:
            write = self._addition(parts)
            if write is None and not self._is_due and self.fits(parts):
                self._before_rotate()
                write = self._sealed.truncation(self._active.sequence)
            self._begun += write is not None
            return write
        finally:
            if write is None:
                self._appending.release()

    def withdraw(self, write: SegmentWrite) -> None:
        """Withdraw the last write of `begin`, which is behind another one and was not made."""
        self.due = max(0, self.due - 2 * write.count)
        self._begun -= 1

    def end(self, write: SegmentWrite, *, is_made: bool) -> bool:
        """End a write of `begin`. Return whether it appended; False if it failed, or only made room: begin again."""
        try:
            if not is_made:
                return False
            write.segment.written(write)
            if write.segment is self._active:
                return True
            with self._looking:
                self._swap()
            return False
        finally:
            self._begun -= 1
            if not self._begun:
                self._appending.release()

    def _append(self, parts: Parts) -> bool:
        write = self._addition(parts)
        if write is None:
            if self._is_due or not self.fits(parts):
                return False
            self._rotate()
            return self._active.append(parts)
        write.make()
        self._active.written(write)
        return True

    def _addition(self, parts: Parts, after: SegmentWrite | None = None) -> SegmentWrite | None:
        count = len(parts[0]) if len(parts) == 1 else sum(map(len, parts))
        self.due = 2 * count + (self.due if self.needs_checkpoint else 0)
        return self._active.addition(
            parts, 0 if count <= _SMALL_WRITE else int(self._active.size * _KEPT_FREE), after
        )

    def _acquire(self, patience_s: float = -1.0) -> bool:
        """Acquire the lock for appending, in this time."""
        self._queue.append(None)
        is_mine = self._appending.acquire(timeout=patience_s)
        self._queue.pop()
        return is_mine

    def fits(self, parts: Parts) -> bool:
        """Whether changes fit into a nearly empty segment."""
        return sum(len(record) for part in parts for _, record in part) < self._sealed.size // 2

    def value(self, session_id: str) -> list[RecordBytes]:
        """Return the last record of a session, and those in the log that it needs, the oldest first. For any thread.

        If the first one is a change, the store has the records before it.

        Raises:
            OSError: they cannot be read.
        """
        with self._looking:
            found = self._active.value(session_id)
            if not found:
                # Look again: a later record may have been appended meanwhile, and the sealed one removed.
                return self._sealed.value(session_id) or self._active.value(session_id)
            return [*self._sealed.value(session_id), *found] if is_change(found[0]) else found

    def places_of(self, session_ids: Sequence[str]) -> list[int]:
        """Return the indices of the sessions that have records in the log. For any thread."""
        with self._looking:
            active, sealed = self._active.offsets, self._sealed.offsets
            if not (active or sealed or active):
                return []
            # in the order of `value`
            return [place for place, i in enumerate(session_ids) if i in active or i in sealed or i in active]

    def discard(self, session_ids: Iterable[str]) -> None:
        """Discard the records of sessions, because the store has newer ones."""
        with self._looking:
            # first the sealed segment: its record must not be found after that of the active one is gone
            segments = self._sealed.offsets, self._active.offsets
        for offsets in segments:  # if a segment is truncated meanwhile, the store has everything from it
            self._remove(offsets, offsets.keys() & session_ids if offsets else ())

    def to_checkpoint(self, *, briefly: bool = False, limit: int | None = None) -> tuple[list[str], Records]:
        """Return the next sessions to checkpoint, at most `limit`, and their records. Call `checkpointed` afterwards."""
        with self._looking:
            active, sealed = self._active, self._sealed
        # no thread rotates while the sealed segment has records
        wanted = _MIN_RECORDS if briefly else max(_MIN_RECORDS, self.due)
        count = wanted if limit is None else min(limit, wanted)
        ids = list(itertools.islice(sealed.offsets, count))
        self.due = max(0, self.due - len(ids)) if ids else 0
        # the active segment has newer records of the others, which need none of these
        unfinished = active.places.unfinished
        needed = [i for i in ids if i not in active.offsets or i in unfinished]
        return ids, sealed.records(needed)

    def checkpointed(self, session_ids: Collection[str]) -> None:
        """Remove sessions from the sealed segment, after the store has their records."""
        self._remove(self._sealed.offsets, session_ids)

    def _remove(self, offsets: dict[str, int], session_ids: Collection[str]) -> None:
        if session_ids:
            self.removals += 1
        for session_id in session_ids:
            offsets.pop(session_id, None)

    def rotate(self) -> bool:
        """Seal the active segment and append to the other; return False if the other is not empty.

        Raises:
            OSError: the other segment cannot be written.
            StoreGone: raised by `before_rotate`.
        """
        self._acquire()
        try:
            if self._is_due:
                return False
            self._rotate()
            return True
        finally:
            self._appending.release()

    def _rotate(self) -> None:
        self._before_rotate()
        with self._looking:
            self._sealed.truncate(self._active.sequence)
            self._swap()

    def close(self) -> None:
        """Close the files."""
        self._active.close()
        self._sealed.close()

    def _swap(self) -> None:
        self._active, self._sealed = self._sealed, self._active

    def _drop_superseded(self, segment: Segment, counts: Callable[[Records], Iterable[bool]]) -> None:
        records: Records = segment.records(segment.offsets, are_last=True)
        for (session_id, _), is_later in zip(records, counts(records), strict=True):
            if not is_later:
                del segment.offsets[session_id]
