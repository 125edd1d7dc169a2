"""Disk space reserved for ending sessions.

LMDB writes changed pages to free places. So a delete needs free pages, and on a full disk closing sessions could not
free any. Therefore a file of a few MiB lies next to the data. It is deleted when a commit that ends sessions finds no
room,
and created again when there is room. The space used meanwhile becomes free pages of the data file, which never shrinks.
While the reserve is too small, or the system limits file sizes, sessions can only be opened if enough room stays
free, or in place of others that ended.
"""

from __future__ import annotations

import dataclasses
import errno
import logging
import os
import resource
from collections.abc import Callable
from pathlib import Path

from stepwell_server.clock import Clock
from stepwell_server.store.base import Batch
from stepwell_server.store.disk.files import allocate, free_bytes

RESERVE_BYTES = 8 * 2**20
"""Ending a session changes at most two or three pages of 4 KiB, so this suffices for 500 sessions at once and more."""

_SHARE = 8
"""The reserve takes at most one part in this many of a small disk."""
_MIN_BYTES = 64 * 1024
_LOOK_S = 1.0
_PER_PUT_BYTES = 128
"""Approximate overhead of a record."""
_PAGE_FILL = 2 / 3
_NAME = "reserve"

_log = logging.getLogger(__name__)


class NoSpace(OSError):
    """New sessions would use the space reserved for ending others."""


@dataclasses.dataclass(frozen=True, slots=True)
class Extent:
    """How much of the data file is used."""

    file_bytes: int
    """Up to the last page ever used."""
    live_bytes: int
    """In pages with data."""


class Reserve:
    """The reserve file. For one thread at a time, like the store's `commit`."""

    def __init__(self, folder: Path, clock: Clock) -> None:
        """Create the file if there is room. Without it everything works while the disk is not full."""
        self._folder = folder
        self._path = folder / _NAME
        self._clock = clock
        self._look_at = 0.0
        self.held_bytes = self._wanted = 0
        """The current and the wanted size."""
        self._places = 0
        """Number of sessions that ended while space was tight: as many new ones fit into their half-empty pages."""
        try:
            disk = os.statvfs(folder)
            self._wanted = _whole(min(RESERVE_BYTES, disk.f_blocks * disk.f_frsize // _SHARE))
            self.held_bytes = self._path.stat().st_size if self._path.exists() else 0
        except OSError as error:
            _log.warning("space for closing sessions on a full disk cannot be reserved: %s", error)
        self.top_up()

    @property
    def is_short(self) -> bool:
        """It is smaller than wanted."""
        return self.held_bytes < self._wanted

    def commit(self, batch: Batch, attempt: Callable[[Batch], None], extent: Callable[[], Extent]) -> None:
        """Commit a batch, using the reserve if it ends sessions. `attempt` keeps the whole batch, or raises and keeps nothing.

        Raises:
            Exception: that of the last attempt, or `NoSpace` for new sessions.
        """
        change = sum(change for _, change in batch.counts)
        ends = batch.deletes or batch.tombstones
        if change > 0 or (not ends and any(content for _, content in batch.documents)):
            self._open(batch, change, attempt, extent)
            return
        try:
            attempt(batch)
        except Exception:
            # Whatever the error, a retry with more room does no harm. Other changes in the same batch may need a little
            # space, but in total the batch frees some.
            if not ends:
                raise
            self._commit_in_reserve(batch, attempt)
        if change < 0 and self._is_tight():
            self._places -= change
        if self.is_short:
            self.top_up()

    def _open(
        self, batch: Batch, opened: int, attempt: Callable[[Batch], None], extent: Callable[[], Extent]
    ) -> None:
        if not self._is_tight():
            self._places = 0
        else:
            self._require_room(batch, extent(), in_place=0 < opened <= self._places)
        attempt(batch)
        self._places = max(0, self._places - max(0, opened))

    def _commit_in_reserve(self, batch: Batch, attempt: Callable[[Batch], None]) -> None:
        if self.give_up():
            try:
                attempt(batch)
                return
            except Exception as error:
                _log.warning("sessions could not be ended in the reserved space: %s", error)
            finally:
                self.take_back()
        # Pages freed by a commit can be used two commits later, so insert a commit that needs almost none.
        attempt(Batch(counts=[("", 0)]))
        attempt(batch)

    def give_up(self) -> bool:
        """Free the reserved space; False if there is none."""
        if not self.held_bytes:
            return False
        try:
            self._path.unlink()
        except OSError as error:
            _log.warning("the reserved space for closing sessions cannot be freed: %s", error)
            return False
        _log.warning("the disk is full: sessions are ended in %d reserved bytes", self.held_bytes)
        self.held_bytes = 0
        return True

    def take_back(self) -> None:
        """Reserve the remaining space again, after `give_up`, before others use it."""
        left = _whole(free_bytes(self._folder) * 3 // 4)
        if self.held_bytes < left >= _MIN_BYTES:
            self._take(min(self._wanted, left))

    def top_up(self) -> None:
        """Reserve the missing space if there is plenty; checks at most once per second."""
        now = self._clock.monotonic()
        if not self.is_short or now < self._look_at:
            return
        self._look_at = now + _LOOK_S
        if free_bytes(self._folder) >= 2 * (self._wanted - self.held_bytes):
            self._take(self._wanted)

    def _take(self, size: int) -> None:
        try:
            handle = os.open(self._path, os.O_CREAT | os.O_RDWR | os.O_CLOEXEC, 0o600)
            try:
                allocate(handle, 0, size)
                self.held_bytes = size
            except OSError:
                os.ftruncate(handle, self.held_bytes)
            finally:
                os.close(handle)
        except OSError as error:
            _log.debug("no space is reserved for closing sessions: %s", error)

    def _is_tight(self) -> bool:
        """Whether there may be too little room for new sessions; a cheap test."""
        return self.is_short or resource.getrlimit(resource.RLIMIT_FSIZE)[0] != resource.RLIM_INFINITY

    def _require_room(self, batch: Batch, extent: Extent, *, in_place: bool) -> None:
        """Refuse new sessions or documents that would use the reserved space.

        `in_place`: as many sessions have ended before. Usually there is room on their pages, so that less must stay
        free.

        Raises:
            NoSpace: there is too little room.
        """
        contents = (*batch.puts, *batch.documents)
        size = int(sum(len(content or b"") + _PER_PUT_BYTES for _, content in contents) / _PAGE_FILL)
        # ending all sessions takes at most the pages they are in
        kept = min(self._wanted, extent.live_bytes + size)
        if in_place:
            kept = kept * 3 // 4
        free = extent.file_bytes - extent.live_bytes
        limit, _ = resource.getrlimit(resource.RLIMIT_FSIZE)
        rooms = []
        if limit != resource.RLIM_INFINITY:
            rooms.append(free + limit - extent.file_bytes)
        if self.is_short:
            rooms.append(free + free_bytes(self._folder) + self.held_bytes)
        if rooms and min(rooms) < size + kept:
            what = "sessions" if batch.puts else "documents"
            raise NoSpace(
                errno.ENOSPC,
                f"{os.strerror(errno.ENOSPC)}: new {what} must leave {kept} bytes free for closing sessions;"
                f" the disk of {self._folder} has {free_bytes(self._folder)} bytes free",
            )


def _whole(size: int) -> int:
    return size // 4096 * 4096
