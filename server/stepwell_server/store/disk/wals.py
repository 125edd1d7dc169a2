"""The write-ahead logs of a store that waits for the disk: one for what commits write, one for small changes beside them.

A small change must not wait until a large one is on the disk which came before: so it goes into files of its own. The
last change of a session is in one of the two at most; on the disk an earlier one may be in the other, and the revision
tells them apart when a log is read. Where nobody waits for the disk one log is enough: a write to it takes little time.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

from stepwell_server.store.disk.wal import Parts, Records, WriteAheadLog
from stepwell_server.store.disk.wal_file import SegmentDamaged
from stepwell_server.store.disk.wal_mark import BESIDE, COMMITS, Mark, is_later
from stepwell_server.store.record import Puts


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
                folder,
                names,
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
