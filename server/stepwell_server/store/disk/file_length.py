"""LMDB's data file is as long as its map: to read a page behind the file's end through the map would end the process.

LMDB never writes a page that was taken at the end and given back in the same transaction, so its own file may lack pages
and be whole. Here the file is made as long as the map before a transaction can take a page there. What was not written is a
hole, which takes no room on the disk. So a file that is shorter than its pages need was cut off.
"""

from __future__ import annotations

import os
import resource
from pathlib import Path
from typing import Any

from stepwell_server.store.base import StoreError
from stepwell_server.store.disk.files import flush

_PAGE_BYTES = 4096


def require_whole_file(environment: Any, data: Path) -> None:
    """Refuse a data file that was cut off. Others may write it meanwhile.

    Raises:
        StoreError: it lacks pages.
    """
    wanted = (environment.info()["last_pgno"] + 1) * int(environment.stat()["psize"])
    found = data.stat().st_size
    if found < wanted:
        raise StoreError(f"{data} must have {wanted} bytes; it was cut off at {found}")


def within_limit(size: int) -> int:
    """The largest map up to `size` whose file this process may write."""
    limit, _ = resource.getrlimit(resource.RLIMIT_FSIZE)
    return size if limit == resource.RLIM_INFINITY else min(size, limit // _PAGE_BYTES * _PAGE_BYTES)


def lengthen(data: Path, size: int, *, durably: bool) -> None:
    """Make a data file at least this long; `durably`: a loss of power must not make it shorter again.

    Raises:
        OSError: the system refused.
    """
    if data.stat().st_size < size:
        os.truncate(data, size)
        if durably:
            flush(data)
