"""Whether the store's disk has room: a problem while changes cannot be kept, a warning while little is left."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

from stepwell_server.errors import StoreGone, Unavailable
from stepwell_server.store.base import Batch
from stepwell_server.store.disk.files import free_bytes

_MIN_BYTES, _MAX_BYTES = 1 << 20, 8 << 20
"""What must be free before a disk that was full counts as one that is not: as much as a change needs, within these."""
_LOW_BYTES, _LOW_SHARE = 1 << 30, 0.1
"""Less than both is little."""
_RECOVERY_FACTOR = 1.25
"""The warning ends when this many times as much is free."""


class Room:
    """What `check` finds out. `failed` is for the thread that commits, the others for the one that checks the store."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._failed: tuple[str, int] | None = None
        """Why the last change that could not be kept could not, and its bytes; until one was kept by way of trial."""
        self._is_low = False

    def failed(self, error: Unavailable, batch: Batch) -> None:
        """A change could not be kept."""
        self._failed = error.message, _size(batch)

    def problem(self, keep_nothing: Callable[[], None]) -> str:
        """Why changes cannot be kept now; empty if they can. Only where one failed is there a trial.

        Args:
            keep_nothing: writes a change of nothing, or raises.
        """
        failed = self._failed
        if failed is None:
            return ""
        try:
            keep_nothing()
        except StoreGone:
            raise
        except Unavailable as error:
            return error.message
        reason, size = failed
        free = free_bytes(self._folder)
        if free < min(max(size, _MIN_BYTES), _MAX_BYTES):
            return f"{reason}; {free} bytes are free now"
        if self._failed is failed:
            self._failed = None
        return ""

    def warning(self) -> str:
        """That there is little room left; empty if there is enough, or that is not known."""
        try:
            disk = os.statvfs(self._folder)
        except OSError:
            return ""
        size, free = disk.f_blocks * disk.f_frsize, disk.f_bavail * disk.f_frsize
        limit = min(_LOW_BYTES, size * _LOW_SHARE)
        self._is_low = free < limit * (_RECOVERY_FACTOR if self._is_low else 1)
        return f"{free} of {size} bytes are free on the disk of {self._folder}" if self._is_low else ""


def _size(batch: Batch) -> int:
    """Bytes of its records and documents."""
    return sum(len(record) for _, record in batch.puts) + sum(
        len(content or b"") for _, content in batch.documents
    )
