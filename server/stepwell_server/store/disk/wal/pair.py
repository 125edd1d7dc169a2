"""The write-ahead logs of a store that waits for the disk: one for what commits write, one for small changes beside them.

A small change must not wait until a large one is on the disk which came before: so it goes into files of its own. The
last change of a session is in one of the two at most; on the disk an earlier one may be in the other, and the revision
tells them apart when a log is read. Where nobody waits for the disk one log is enough: a write to it takes little time.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import NamedTuple, Self

from stepwell_server.store.base import StoreError
from stepwell_server.store.disk.wal.log import Parts, Records, WriteAheadLog
from stepwell_server.store.disk.wal.segment import SegmentDamaged
from stepwell_server.store.record import Puts, is_sound, supersedes

COMMITS, BESIDE = ("0", "1"), ("2", "3")
"""Names of the segments of each log."""

#: Segments for small changes have this part of the size of the others, but not less than so many bytes.
_PART, _MIN_BYTES = 4, 4096
_MARK = struct.Struct("<IQQ")


class Mark(NamedTuple):
    """What LMDB says of the logs while there may be something in them."""

    owner: int
    """Of the segments, see `Segment`."""
    size: int
    """Of a segment of the log of commits."""
    beside_size: int
    """Of one of the other log; 0 if there is none."""

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


def mark_of(owner: int, size: int, *, has_beside: bool) -> Mark:
    """The mark of new logs, of which the first has segments of `size` bytes."""
    return Mark(owner, size, max(min(size, _MIN_BYTES), size // _PART) if has_beside else 0)


def is_later(session_id: str, one: bytes, other: bytes) -> bool:
    """Which of two records counts. One that is damaged does, so that its session does not go back silently."""
    if not is_sound(session_id, one):
        return True
    return is_sound(session_id, other) and supersedes(one, other)


class WriteAheadLogs:
    """What both logs have.

    `commits` is for the thread that commits, and checkpoints both; `beside` for one more thread. They are the same where
    there is one log. `find` and `places_of` are for any thread.
    """

    def __init__(
        self, folder: Path, mark: Mark, *, flush: bool, make: bool, before_rotate: Callable[[], None]
    ) -> None:
        """Open the segments, to be loaded, or make them. See `WriteAheadLog`.

        Raises:
            OSError: one cannot be opened, or there is no room.
        """
        self.mark = mark
        self._moves = [0, 0]
        """How often sessions have moved to the log of commits, and to the other. Each is counted by one thread."""

        def opened(names: tuple[str, str], size: int, appended: Callable[[Parts], None]) -> WriteAheadLog:
            return WriteAheadLog(
                [folder / name for name in names],
                size,
                mark.owner,
                flush=flush,
                make=make,
                before_rotate=before_rotate,
                appended=appended,
                find=self.find,
            )

        self.commits = opened(COMMITS, mark.size, lambda parts: self._moved(self.beside, 0, parts))
        self.beside = self.commits
        self.each: tuple[WriteAheadLog, ...] = (self.commits,)
        if mark.beside_size:
            try:
                self.beside = opened(
                    BESIDE, mark.beside_size, lambda parts: self._moved(self.commits, 1, parts)
                )
            except BaseException:
                self.commits.close()
                raise
            self.each = (self.commits, self.beside)

    def descriptors(self) -> list[tuple[Path, int]]:
        """Paths and descriptors of the open files."""
        return [descriptor for wal in self.each for descriptor in wal.descriptors()]

    def truncate(self) -> None:
        """Drop whatever the files have.

        Raises:
            OSError: they cannot be written.
        """
        for wal in self.each:
            wal.truncate()

    def load(self, counts: Callable[[Records], Iterable[bool]]) -> list[SegmentDamaged]:
        """As `WriteAheadLog.load`, of each."""
        damage = [problem for wal in self.each for problem in wal.load(counts)]
        if self.beside is not self.commits:
            for session_id in self.commits.ids() & self.beside.ids():
                first, second = self.commits.find(session_id) or b"", self.beside.find(session_id) or b""
                older = self.commits if is_later(session_id, second, first) else self.beside
                older.discard([session_id])
        return damage

    @property
    def is_empty(self) -> bool:
        """The store has all that is in here."""
        return all(wal.is_empty for wal in self.each)

    @property
    def needs_checkpoint(self) -> bool:
        """It is time to checkpoint one."""
        return any(wal.needs_checkpoint for wal in self.each)

    @property
    def due(self) -> int:
        """Records that are to be checkpointed to keep up with what was appended."""
        return sum(wal.due for wal in self.each if wal.needs_checkpoint)

    def find(self, session_id: str) -> bytes | None:
        """The record of a session, None if the store has it. From any thread.

        Raises:
            OSError: it cannot be read.
        """
        while True:
            moves = tuple(self._moves)
            record, beside = self.commits.find(session_id), self.beside.find(session_id)
            if record is not None and beside is not None:
                return beside if is_later(session_id, beside, record) else record
            if record is not None or beside is not None or moves == tuple(self._moves):
                return record or beside

    def places_of(self, session_ids: Sequence[str]) -> list[int]:
        """Which of some sessions have records here, by their places. From any thread."""
        return sorted({place for wal in self.each for place in wal.places_of(session_ids)})

    def discard(self, session_ids: Sequence[str]) -> None:
        """Discard the records of sessions: the store has later ones."""
        for wal in self.each:
            wal.discard(session_ids)

    def close(self) -> None:
        """End; not to be used any more."""
        for wal in self.each:
            wal.close()

    def _moved(self, source: WriteAheadLog, to: int, parts: Parts) -> None:
        """A log has later changes of these sessions than another, `source`."""
        if source.is_empty or self.beside is self.commits:
            return
        self._moves[to] += 1  # before: who misses a session in both looks again
        for part in parts:
            source.moved(part.session_ids if isinstance(part, Puts) else [i for i, _ in part])
