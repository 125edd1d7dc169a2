"""Disks that fail: in a function that a test replaces, or in the last write of a transaction of the real LMDB."""

from __future__ import annotations

import errno
import fcntl
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any


def failing(error: BaseException) -> Callable[..., Any]:
    """A function that raises an error, whatever its arguments."""

    def fail(*_: Any, **_options: Any) -> Any:
        raise error

    return fail


io_error = failing(OSError(errno.EIO, os.strerror(errno.EIO)))
no_space = failing(OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)))


def break_last_writes(data_dir: Path) -> None:
    """Make the next transaction of a store of this process fail when it writes its meta page.

    LMDB writes that page, the last of a transaction with `sync`, through a descriptor of its own (O_DSYNC). Something
    without room is put in its place. What fails there makes LMDB give its environment up (MDB_PANIC); one that is
    reopened has new descriptors, as on a disk that has recovered.
    """
    data = os.fspath((data_dir / "sessions" / "data.mdb").resolve())
    full = os.open("/dev/full", os.O_RDWR | os.O_CLOEXEC)
    replaced = 0
    for name in os.listdir("/proc/self/fd"):
        try:
            is_data = os.readlink(f"/proc/self/fd/{name}") == data
            writes_through = is_data and fcntl.fcntl(int(name), fcntl.F_GETFL) & os.O_DSYNC
        except OSError:  # the one that listed the folder
            continue
        if writes_through:
            os.dup2(full, int(name), inheritable=False)
            replaced += 1
    os.close(full)
    assert replaced == 1, f"LMDB must have one descriptor of {data} for meta pages; it has {replaced}"
