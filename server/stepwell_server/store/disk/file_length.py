"""Keeps LMDB's data file as long as its map: reading a page beyond the end of the file would kill the process.

LMDB does not write a page that was allocated at the end and freed in the same transaction, so a complete file of its
own may lack pages. Here the file is extended to the size of the map before a transaction can allocate a page there;
unwritten parts are holes, which take no disk space. So a file that is too short for its pages was truncated.
"""

from __future__ import annotations

import os
import resource
from pathlib import Path
from typing import Any

from stepwell_server.files.flush import flush
from stepwell_server.store.base import StoreError

_PAGE_BYTES = 4096


def require_whole_file(environment: Any, data: Path) -> None:
    """Refuse a truncated data file. Another process may be writing it.

    Raises:
        StoreError: it lacks pages.
    """
    wanted = (environment.info()["last_pgno"] + 1) * int(environment.stat()["psize"])
    found = data.stat().st_size
    if found < wanted:
        raise StoreError(f"{data} must have {wanted} bytes; it was truncated to {found}")


def within_limit(size: int) -> int:
    """Return the largest map size up to `size` that this process may write to a file."""
    limit, _ = resource.getrlimit(resource.RLIMIT_FSIZE)
    return size if limit == resource.RLIM_INFINITY else min(size, limit // _PAGE_BYTES * _PAGE_BYTES)


def lengthen(data: Path, size: int, *, durably: bool) -> None:
    """Extend a data file to at least this size; `durably`: it stays extended after a loss of power.

    Raises:
        OSError: the system refused.
    """
    if data.stat().st_size < size:
        os.truncate(data, size)
        if durably:
            flush(data)
