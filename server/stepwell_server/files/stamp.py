"""Detects changes of a file without reading it."""

from __future__ import annotations

import os
from pathlib import Path

Stamp = tuple[int, ...]


def stamp(path: Path) -> Stamp:
    """Return a stamp of a file, which changes with its content, however it is changed."""
    try:
        return stamp_of(os.stat(path))
    except OSError as error:
        return (error.errno or 0,)


def stamp_of(found: os.stat_result) -> Stamp:
    """As `stamp`, for the result of `os.stat`."""
    return found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns, found.st_ctime_ns
