"""A write-ahead log of two segments: changes are appended to the active one while the sealed one is checkpointed."""

from __future__ import annotations

import errno
import itertools
import shutil
import struct
import threading
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import NamedTuple, Self

from stepwell_server.store.base import StoreError
from stepwell_server.store.disk.wal.segment import Segment, SegmentCorrupt
from stepwell_server.store.record import RecordBytes

SEGMENTS = ("0", "1")
"""Their names."""
SEGMENT_BYTES = 8 * 2**20
"""Size of each segment."""
_MARK = struct.Struct("<IQ")

#: A segment takes at most this part of the free disk.
_SHARE = 64
_MIN_BYTES = 64 * 1024
#: Checkpointing begins when this part of the active segment is used.
_CHECKPOINT_AT = 1 / 2
#: To keep up with writes, twice as many records are checkpointed as were written, and at least this many at once. A brief
#: checkpoint takes no more.
_MIN_RECORDS = 64

#: A write of more records leaves this part of a segment free: smaller ones have room while it waits for a checkpoint.
_SMALL_WRITE, _KEPT_FREE = 512, 1 / 8

Records = list[tuple[str, RecordBytes]]
Parts = Sequence[Sequence[tuple[str, RecordBytes]]]
"""Changes that are written together, each with its sessions' records."""


class Mark(NamedTuple):
    """The entry about the log that LMDB has while there may be something in the log."""

    owner: int
    """Of the segments, see `Segment`."""
    size: int
    """Of each segment."""

    def packed(self) -> bytes:
        """As it is stored."""
        return _MARK.pack(*self)

    @classmethod
    def unpacked(cls, stored: bytes) -> Self:
        """Read what `packed` gave.

        Raises:
            StoreError: it was not made so.
        """
        if len(stored) != _MARK.size:
            raise StoreError(
                f"the mark of the write-ahead log must have {_MARK.size} bytes; it is damaged and has {len(stored)}"
            )
        return cls(*_MARK.unpack(stored))


def room_for(folder: Path, size: int) -> int:
    """The size of each segment, at most `size`.

    Raises:
        OSError: there is too little room.
    """
    sizes = {(folder / name).stat().st_size if (folder / name).is_file() else 0 for name in SEGMENTS}
    minimum = min(size, _MIN_BYTES)
    if len(sizes) == 1 and (there := sizes.pop()) >= minimum:
        return there  # the files are there already, and take no more room
    room = shutil.disk_usage(folder).free // _SHARE
    if room < minimum:
        raise OSError(errno.ENOSPC, f"{_SHARE * minimum} bytes of the disk must be free")
    return min(size, room)


class WriteAheadLog:
    """The last change of each session that the store does not have yet.

    For one thread that checkpoints, and one more that appends meanwhile; `find` and `places_of` are for any.
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
        """Open the two segments, to be loaded, or make them. See `Segment`.

        `before_rotate` raises if what is appended would be lost.

        Raises:
            OSError: one cannot be opened, or there is no room.
        """
        self._before_rotate = before_rotate
        self.due = 0
        """Records that are to be checkpointed to keep up with what was appended."""
        # Held to append or to rotate.
        self._appending = threading.Lock()
        # Held to read both segments, so that neither is truncated meanwhile.
        self._looking = threading.Lock()
        first, second = (folder / name for name in SEGMENTS)
        self._active = Segment(first, mark.size, mark.owner, flush=flush, make=make)
        try:
            self._sealed = Segment(second, mark.size, mark.owner, flush=flush, make=make)
        except BaseException:
            self._active.close()
            raise
        self._segments = (self._active, self._sealed)

    def descriptors(self) -> list[tuple[Path, int]]:
        """Paths and descriptors of the open files."""
        return [(segment.path, segment.descriptor) for segment in (self._active, self._sealed)]

    def truncate(self) -> None:
        """Drop whatever the files have.

        Raises:
            OSError: they cannot be written.
        """
        self._sealed.truncate(0)
        self._active.truncate(0)

    def load(self, counts: Callable[[Records], Iterable[bool]]) -> list[SegmentCorrupt]:
        """Read what the files have.

        Args:
            counts: Which of some records are later than what the store has of their sessions.

        Returns:
            What is missing.

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
        """The store has all that is in here."""
        return not self._active.offsets and not self._sealed.offsets

    @property
    def needs_checkpoint(self) -> bool:
        """It is time to checkpoint."""
        return self._is_due and self._active.end > self._active.size * _CHECKPOINT_AT

    @property
    def _is_due(self) -> bool:
        """There is something to checkpoint before the segments can be rotated."""
        return bool(self._sealed.offsets)

    def append(self, parts: Parts, patience_s: float = -1.0) -> bool:
        """Append changes; False if there is no room until more is checkpointed, or ever.

        Args:
            parts: The changes, each with its sessions' records.
            patience_s: Give up (False) if another thread appends for this many seconds; -1: wait for it.

        Raises:
            OSError: they could not be written. None is there.
        """
        if not self._appending.acquire(timeout=patience_s):
            return False
        try:
            return self._append(parts)
        finally:
            self._appending.release()

    def _append(self, parts: Parts) -> bool:
        count = sum(map(len, parts))
        self.due = 2 * count + (self.due if self.needs_checkpoint else 0)
        if count == len(parts) == 1:
            is_kept = self._active.append_one(*parts[0][0])
        else:
            leave = 0 if count <= _SMALL_WRITE else int(self._active.size * _KEPT_FREE)
            is_kept = self._active.append(parts, leave)
        if is_kept:
            return True
        if self._is_due or not self.fits(parts):
            return False
        self._rotate()
        return self._active.append(parts)

    def fits(self, parts: Parts) -> bool:
        """Whether changes are small enough for a segment that holds little else."""
        return sum(len(record) for part in parts for _, record in part) < self._sealed.size // 2

    def find(self, session_id: str) -> bytes | None:
        """The record of a session, None if the store has it. From any thread.

        Raises:
            OSError: it cannot be read.
        """
        with self._looking:
            return self._active.record(session_id) or self._sealed.record(session_id)

    def places_of(self, session_ids: Sequence[str]) -> list[int]:
        """Which of some sessions it has records of, by their places. From any thread."""
        active, sealed = self._active.offsets, self._sealed.offsets
        return [place for place, i in enumerate(session_ids) if i in active or i in sealed]

    def discard(self, session_ids: Iterable[str]) -> None:
        """Discard the log's records of sessions: the store has later ones."""
        for segment in self._segments:  # the store has all of one that is truncated meanwhile
            offsets = segment.offsets
            for session_id in offsets.keys() & session_ids if offsets else ():
                offsets.pop(session_id, None)

    def to_checkpoint(self, *, briefly: bool = False, limit: int | None = None) -> tuple[list[str], Records]:
        """Sessions to checkpoint next, at most `limit`, and their records; call `checkpointed` when the store has them."""
        with self._looking:
            active, sealed = self._active, self._sealed
        # nobody rotates while the sealed one has something
        wanted = _MIN_RECORDS if briefly else max(_MIN_RECORDS, self.due)
        count = wanted if limit is None else min(limit, wanted)
        ids = list(itertools.islice(sealed.offsets, count))
        self.due = max(0, self.due - len(ids)) if ids else 0
        # the active segment has a later record of the others
        last_here = [session_id for session_id in ids if session_id not in active.offsets]
        records: Records = [(i, record) for i in last_here if (record := sealed.record(i)) is not None]
        return ids, records

    def checkpointed(self, session_ids: Iterable[str]) -> None:
        """The store has what `to_checkpoint` gave."""
        offsets = self._sealed.offsets
        for session_id in session_ids:
            offsets.pop(session_id, None)

    def rotate(self) -> bool:
        """Seal the active segment, and append to the other; False if that one is not empty.

        Raises:
            OSError: the other cannot be written.
            StoreGone: by `before_rotate`.
        """
        with self._appending:
            if self._is_due:
                return False
            self._rotate()
            return True

    def _rotate(self) -> None:
        self._before_rotate()
        with self._looking:
            self._sealed.truncate(self._active.sequence)
            self._swap()

    def close(self) -> None:
        """End; not to be used any more."""
        self._active.close()
        self._sealed.close()

    def _swap(self) -> None:
        self._active, self._sealed = self._sealed, self._active

    def _drop_superseded(self, segment: Segment, counts: Callable[[Records], Iterable[bool]]) -> None:
        records: Records = [(i, segment.record(i) or b"") for i in segment.offsets]
        for (session_id, _), is_later in zip(records, counts(records), strict=True):
            if not is_later:
                del segment.offsets[session_id]
