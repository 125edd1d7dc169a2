"""Flushes files and folders to disk, so that they survive a loss of power."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
from pathlib import Path

#: On macOS fsync only hands data to the drive, which may keep it in its own cache.
_FULL_FLUSH: int | None = getattr(fcntl, "F_FULLFSYNC", None)
#: Errors of folders that cannot be flushed: no right to read one, or a file system that does not support it.
_IMPOSSIBLE = frozenset({errno.EACCES, errno.EBADF, errno.EINVAL})


def flush(path: Path) -> None:
    """Flush the content of a file or a folder to disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        flush_open(descriptor)
    finally:
        os.close(descriptor)


def flush_open(descriptor: int) -> None:
    """As `flush`, for an open file.

    Raises:
        OSError: the disk refused.
    """
    if _FULL_FLUSH is not None:
        with contextlib.suppress(OSError):  # the file system may not support it
            fcntl.fcntl(descriptor, _FULL_FLUSH)
            return
    os.fsync(descriptor)


def flush_content(descriptor: int) -> None:
    """As `flush_open`, without metadata such as the time of the last change."""
    if hasattr(os, "fdatasync"):
        os.fdatasync(descriptor)
    else:
        flush_open(descriptor)


def flush_folders(*folders: Path) -> None:
    """Flush folders: a new file survives a loss of power only if its folder was flushed too.

    A folder that this user may not read, or of a file system that flushes no folders, is left to the system.

    Raises:
        OSError: the disk refused.
    """
    for folder in folders:
        try:
            flush(folder)
        except OSError as error:
            if error.errno not in _IMPOSSIBLE:
                raise
