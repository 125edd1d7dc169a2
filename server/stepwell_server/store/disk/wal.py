"""Two journals by turns: one is written, what the other has is brought over into the store meanwhile."""

from __future__ import annotations

import errno
import itertools
import shutil
import threading
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

from stepwell_server.store.disk.wal_file import Journal, JournalDamaged
from stepwell_server.store.record import Stored

NAMES = ("0", "1")
JOURNAL_BYTES = 8 * 2**20
"""Of each of the two."""

#: Of the room on the disk a journal takes no more than this part.
_SHARE = 64
_LEAST_BYTES = 64 * 1024
#: Bringing over begins when this part of the journal that is written is used.
_BEGIN = 1 / 2
#: So many records are brought over at once at least; or twice as many as the last write had, to keep up with writes.
_AT_ONCE = 64

Records = list[tuple[str, Stored]]


def room_for(folder: Path, size: int) -> int:
    """How large journals may be, at most as large as is wanted.

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


class Journals:
    """What happened last to sessions, by id. For one thread, but `find`."""

    def __init__(
        self, folder: Path, size: int, owner: int, *, flush: bool, make: bool, before_turn: Callable[[], None]
    ) -> None:
        """Open the two, to be loaded, or make them. See `Journal`.

        `before_turn` raises if what is written would be lost.

        Raises:
            OSError: one cannot be opened, or there is no room.
        """
        self.size = size
        self._before_turn = before_turn
        self._last_count = 0
        # Held by whoever looks into both: no journal is filled anew meanwhile.
        self._looking = threading.Lock()
        self._written = Journal(folder / NAMES[0], size, owner, flush=flush, make=make)
        try:
            self._left = Journal(folder / NAMES[1], size, owner, flush=flush, make=make)
        except BaseException:
            self._written.close()
            raise

    def descriptors(self) -> list[tuple[Path, int]]:
        """The files that are open."""
        return [(journal.path, journal.descriptor) for journal in (self._written, self._left)]

    def begin(self) -> None:
        """Forget whatever the files have.

        Raises:
            OSError: they cannot be written.
        """
        self._left.fill_anew(0)
        self._written.fill_anew(0)

    def load(self, counts: Callable[[Records], Iterable[bool]]) -> list[JournalDamaged]:
        """Read what the files have.

        Args:
            counts: Which of some records are later than what the store has of their sessions.

        Returns:
            What is missing.

        Raises:
            OSError: a file cannot be read.
        """
        damage = []
        for journal in (self._written, self._left):
            try:
                journal.load()
            except JournalDamaged as error:
                damage.append(error)
        if (self._left.number, self._left.first) > (self._written.number, self._written.first):
            self._turn()
        if not damage and self._left.number < self._written.first:
            damage.append(JournalDamaged(f"{self._left.path} cannot be read to its end"))
        for journal in (self._written, self._left):
            self._drop_earlier(journal, counts)
        return damage

    @property
    def is_empty(self) -> bool:
        """Nothing is here that the store does not have."""
        return not self._written.offsets and not self._left.offsets

    @property
    def is_behind(self) -> bool:
        """It is time to bring something over."""
        return bool(self._left.offsets) and self._written.end > self._written.size * _BEGIN

    def append(self, parts: Sequence[Sequence[tuple[str, Stored]]]) -> bool:
        """Keep changes; False if there is no room until more is brought over, or ever.

        Args:
            parts: Ids and records of each.

        Raises:
            OSError: they could not be written. None is there.
        """
        self._last_count = sum(map(len, parts))
        if self._last_count == len(parts) == 1:
            is_kept = self._written.append_one(*parts[0][0])
        else:
            is_kept = self._written.append(parts)
        if is_kept:
            return True
        if self._left.offsets or not self.takes(parts):
            return False
        self.turn()
        return self._written.append(parts)

    def takes(self, parts: Sequence[Sequence[tuple[str, Stored]]]) -> bool:
        """Whether changes are small enough for a journal that has little else."""
        return sum(len(record) for part in parts for _, record in part) < self._left.size // 2

    def find(self, session_id: str) -> bytes | None:
        """The record of a session, None if the store has it. From any thread.

        Raises:
            OSError: it cannot be read.
        """
        with self._looking:
            return self._written.record(session_id) or self._left.record(session_id)

    def forget(self, session_ids: Iterable[str]) -> None:
        """Let the store be right about sessions."""
        written, left = self._written.offsets, self._left.offsets
        if written or left:
            for session_id in session_ids:
                written.pop(session_id, None)
                left.pop(session_id, None)

    def next(self) -> tuple[list[str], Records]:
        """Sessions whose changes are to be brought over next, to be `done` then; and the records."""
        ids = list(itertools.islice(self._left.offsets, max(_AT_ONCE, 2 * self._last_count)))
        # what the other journal has is later, and stays there
        wanted = [session_id for session_id in ids if session_id not in self._written.offsets]
        records: Records = [(i, record) for i in wanted if (record := self._left.record(i)) is not None]
        return ids, records

    def done(self, session_ids: Iterable[str]) -> None:
        """What `next` gave is in the store."""
        for session_id in session_ids:
            self._left.offsets.pop(session_id, None)

    def turn(self) -> None:
        """Have `next` give what is in the journal that is written; only if the other has nothing.

        Raises:
            OSError: the other cannot be written.
            StoreGone: by `before_turn`.
        """
        self._before_turn()
        with self._looking:
            self._left.fill_anew(self._written.number)
            self._turn()

    def sync(self) -> None:
        """See to it that all of it survives a loss of power.

        Raises:
            OSError: the disk refused.
        """
        self._written.sync()
        self._left.sync()

    def close(self) -> None:
        """End; not to be used any more."""
        self._written.close()
        self._left.close()

    def _turn(self) -> None:
        self._written, self._left = self._left, self._written

    def _drop_earlier(self, journal: Journal, counts: Callable[[Records], Iterable[bool]]) -> None:
        records: Records = [(i, journal.record(i) or b"") for i in journal.offsets]
        for (session_id, _), is_later in zip(records, counts(records), strict=True):
            if not is_later:
                del journal.offsets[session_id]
