"""A write-ahead log of two segments: changes are appended to the active one while the sealed one is checkpointed."""

from __future__ import annotations

import errno
import itertools
import shutil
import threading
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

from stepwell_server.store.disk.wal_file import Segment, SegmentDamaged
from stepwell_server.store.record import Stored

NAMES = ("0", "1")
SEGMENT_BYTES = 8 * 2**20
"""Size of each segment."""

#: A segment takes at most this part of the free disk.
_SHARE = 64
_LEAST_BYTES = 64 * 1024
#: Checkpointing begins when this part of the active segment is used.
_CHECKPOINT_AT = 1 / 2
#: A checkpoint takes at least this many records, or twice those of the last write, to keep up with writes.
_LEAST_RECORDS = 64

Records = list[tuple[str, Stored]]


def room_for(folder: Path, size: int) -> int:
    """How large a segment may be, at most `size`.

    Raises:
        OSError: there is too little room.
    """
    sizes = {(folder / name).stat().st_size if (folder / name).is_file() else 0 for name in NAMES}
    least = min(size, _LEAST_BYTES)
    if len(sizes) == 1 and (there := sizes.pop()) >= least:
        return there  # whatever they are: they take no more
    room = shutil.disk_usage(folder).free // _SHARE
    if room < least:
        raise OSError(errno.ENOSPC, f"{_SHARE * least} bytes of the disk must be free")
    return min(size, room)


class WriteAheadLog:
    """The last change of each session that the store does not have yet. For one thread, except `find`."""

    def __init__(
        self,
        folder: Path,
        size: int,
        owner: int,
        *,
        flush: bool,
        make: bool,
        before_rotate: Callable[[], None],
    ) -> None:
        """Open the segments, to be loaded, or make them. See `Segment`.

        `before_rotate` raises if what is appended would be lost.

        Raises:
            OSError: one cannot be opened, or there is no room.
        """
        self.size = size
        self._before_rotate = before_rotate
        self._last_count = 0
        # Held by who reads both segments: none is truncated meanwhile.
        self._looking = threading.Lock()
        self._active = Segment(folder / NAMES[0], size, owner, flush=flush, make=make)
        try:
            self._sealed = Segment(folder / NAMES[1], size, owner, flush=flush, make=make)
        except BaseException:
            self._active.close()
            raise

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

    def load(self, counts: Callable[[Records], Iterable[bool]]) -> list[SegmentDamaged]:
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
            except SegmentDamaged as error:
                damage.append(error)
        if (self._sealed.sequence, self._sealed.base_sequence) > (
            self._active.sequence,
            self._active.base_sequence,
        ):
            self._swap()
        if not damage and self._sealed.sequence < self._active.base_sequence:
            damage.append(SegmentDamaged(f"{self._sealed.path} cannot be read to its end"))
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
        return bool(self._sealed.offsets) and self._active.end > self._active.size * _CHECKPOINT_AT

    def append(self, parts: Sequence[Sequence[tuple[str, Stored]]]) -> bool:
        """Append changes; False if there is no room until more is checkpointed, or ever.

        Raises:
            OSError: they could not be written. None is there.
        """
        self._last_count = sum(map(len, parts))
        if self._last_count == len(parts) == 1:
            is_kept = self._active.append_one(*parts[0][0])
        else:
            is_kept = self._active.append(parts)
        if is_kept:
            return True
        if self._sealed.offsets or not self.fits(parts):
            return False
        self.rotate()
        return self._active.append(parts)

    def fits(self, parts: Sequence[Sequence[tuple[str, Stored]]]) -> bool:
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
        written, left = self._active.offsets, self._sealed.offsets
        if written or left:
            for session_id in session_ids:
                written.pop(session_id, None)
                left.pop(session_id, None)

    def to_checkpoint(self) -> tuple[list[str], Records]:
        """Sessions to checkpoint next, and those of their records that count; `checkpointed` afterwards."""
        ids = list(itertools.islice(self._sealed.offsets, max(_LEAST_RECORDS, 2 * self._last_count)))
        # the active segment has a later record of the others
        wanted = [session_id for session_id in ids if session_id not in self._active.offsets]
        records: Records = [(i, record) for i in wanted if (record := self._sealed.record(i)) is not None]
        return ids, records

    def checkpointed(self, session_ids: Iterable[str]) -> None:
        """The store has what `to_checkpoint` gave."""
        for session_id in session_ids:
            self._sealed.offsets.pop(session_id, None)

    def rotate(self) -> None:
        """Seal the active segment, and append to the other; only if that one is empty.

        Raises:
            OSError: the other cannot be written.
            StoreGone: by `before_rotate`.
        """
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
