"""Monitors the store's disk: reports a problem while changes cannot be kept, and a warning while little space is left."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

from stepwell_server.errors import StoreGone, Unavailable
from stepwell_server.store.base import Batch
from stepwell_server.store.disk.files import free_bytes

_MIN_BYTES, _MAX_BYTES = 1 << 20, 8 << 20
"""Bounds of the space that must be free before a full disk counts as recovered: as much as the failed change needs."""
_LOW_BYTES, _LOW_SHARE = 1 << 30, 0.1
"""The warning starts when less than both is free."""
_RECOVERY_FACTOR = 1.25
"""The warning ends when this many times as much is free."""


class FreeSpace:
    """The state of the disk. `failed` is for the thread that commits, the other methods for the one that checks."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._failed: tuple[str, int] | None = None
        """Reason and size of the last change that failed, until a test succeeds."""
        self._is_low = False

    def failed(self, error: Unavailable, batch: Batch) -> None:
        """Note that a change could not be kept."""
        self._failed = error.message, _size(batch)

    def problem(self, keep_nothing: Callable[[], None]) -> str:
        """Return why changes cannot be kept now; empty if they can. Tests it only after a failure.

        Args:
            keep_nothing: Commits an empty change, or raises.
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
        """Return a warning if little space is left; empty if there is enough, or if it is unknown."""
        try:
            disk = os.statvfs(self._folder)
        except OSError:
            return ""
        size, free = disk.f_blocks * disk.f_frsize, disk.f_bavail * disk.f_frsize
        limit = min(_LOW_BYTES, size * _LOW_SHARE)
        self._is_low = free < limit * (_RECOVERY_FACTOR if self._is_low else 1)
        return f"{free} of {size} bytes are free on the disk of {self._folder}" if self._is_low else ""


def _size(batch: Batch) -> int:
    """Return the bytes of its records and documents."""
    return sum(len(record) for _, record in batch.puts) + sum(
        len(content or b"") for _, content in batch.documents
    )
