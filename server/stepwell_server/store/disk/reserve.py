"""Room on the disk that is kept for ending sessions.

LMDB writes changed pages beside the old ones, so it takes free pages to delete, and on a full disk closing sessions
could make no room. A file of a few MiB lies beside the data for that: it is given up when such a commit finds no
room, and taken again when there is some. What it was used for becomes free pages of the data file, which never
shrinks; so as long as the reserve is short, or the system limits the size of files, sessions are opened only
where as much stays free, or in place of others that ended.
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
"""Each session that ends changes two or three pages at most, of 4 KiB: it is good for five hundred at once and more."""

_SHARE = 8
"""Of a small disk no more than this part is kept."""
_MIN_BYTES = 64 * 1024
_LOOK_S = 1.0
_PER_PUT_BYTES = 128
"""What a record takes beside itself, about."""
_PAGE_FILL = 2 / 3
_NAME = "reserve"

_log = logging.getLogger(__name__)


class NoSpace(OSError):
    """New sessions would take the room that is kept for ending others."""


@dataclasses.dataclass(frozen=True, slots=True)
class Extent:
    """How the data file is used."""

    file_bytes: int
    """Up to the last page that was ever used."""
    live_bytes: int
    """In pages that hold something."""


class Reserve:
    """The file. Used by one thread at a time, like the store's `commit`."""

    def __init__(self, folder: Path, clock: Clock) -> None:
        """Take it if there is room; without it everything works as long as the disk is not full."""
        self._folder = folder
        self._path = folder / _NAME
        self._clock = clock
        self._look_at = 0.0
        self.held_bytes = self._wanted = 0
        """How much it is now, and how much it should be."""
        self._places = 0
        """So many sessions ended while there was little room: others may have theirs, in pages that are half empty."""
        try:
            disk = os.statvfs(folder)
            self._wanted = _whole(min(RESERVE_BYTES, disk.f_blocks * disk.f_frsize // _SHARE))
            self.held_bytes = self._path.stat().st_size if self._path.exists() else 0
        except OSError as error:
            _log.warning("room for closing sessions on a full disk cannot be kept: %s", error)
        self.top_up()

    @property
    def is_short(self) -> bool:
        """Some of it is missing."""
        return self.held_bytes < self._wanted

    def commit(self, batch: Batch, attempt: Callable[[Batch], None], extent: Callable[[], Extent]) -> None:
        """Commit with the room that is meant for such a batch; `attempt` keeps all of it, or raises and keeps nothing.

        Raises:
            Exception: what the last attempt raised, or that there is no room to open sessions.
        """
        change = sum(change for _, change in batch.counts)
        ends = batch.deletes or batch.tombstones
        if change > 0 or (not ends and any(content for _, content in batch.documents)):
            self._open(batch, change, attempt, extent)
            return
        try:
            attempt(batch)
        except Exception:
            # Whatever it was: to try again with more room does no harm. What was merged into it may add a little
            # to the file, but on the whole it makes room.
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
                _log.warning("sessions could not be ended in the room kept for that: %s", error)
            finally:
                self.take_back()
        # Pages that a commit left free can be used by the one after the next: make one that needs next to none.
        attempt(Batch(counts=[("", 0)]))
        attempt(batch)

    def give_up(self) -> bool:
        """Free the reserved space; False if there is none."""
        if not self.held_bytes:
            return False
        try:
            self._path.unlink()
        except OSError as error:
            _log.warning("the room kept for closing sessions cannot be given up: %s", error)
            return False
        _log.warning("the disk is full: sessions are ended in the %d bytes kept for that", self.held_bytes)
        self.held_bytes = 0
        return True

    def take_back(self) -> None:
        """After it was given up and used: take what is left of it before others do."""
        left = _whole(free_bytes(self._folder) * 3 // 4)
        if self.held_bytes < left >= _MIN_BYTES:
            self._take(min(self._wanted, left))

    def top_up(self) -> None:
        """Take what is missing if there is plenty of room; checks at most once a second."""
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
            _log.debug("no room is kept for closing sessions: %s", error)

    def _is_tight(self) -> bool:
        """Whether there may be too little room to open sessions; it costs little to ask."""
        return self.is_short or resource.getrlimit(resource.RLIMIT_FSIZE)[0] != resource.RLIM_INFINITY

    def _require_room(self, batch: Batch, extent: Extent, *, in_place: bool) -> None:
        """Refuse to open sessions, or to keep documents, in the room that ending sessions takes.

        `in_place`: as many have ended. Mostly there is room on their pages, and less has to be left.

        Raises:
            NoSpace: there is no other.
        """
        contents = (*batch.puts, *batch.documents)
        size = int(sum(len(content or b"") + _PER_PUT_BYTES for _, content in contents) / _PAGE_FILL)
        # to end all there are takes no more than the pages they are in
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
