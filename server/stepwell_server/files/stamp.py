"""Whether a file has changed, without reading it."""

from __future__ import annotations

import os
from pathlib import Path

Stamp = tuple[int, ...]


def stamp(path: Path) -> Stamp:
    """Another one for other contents, however they were put there."""
    try:
        return stamp_of(os.stat(path))
    except OSError as error:
        return (error.errno or 0,)


def stamp_of(found: os.stat_result) -> Stamp:
    """As `stamp`, of a file that has been looked at."""
    return found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns, found.st_ctime_ns
