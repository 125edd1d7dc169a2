"""A disk that fails in the very last write of an LMDB transaction, under the real LMDB."""

from __future__ import annotations

import fcntl
import os
from pathlib import Path


def break_last_writes(data_dir: Path) -> None:
    """Have the next transaction of a store of this process fail when it writes its meta page.

    LMDB writes that page, the last of a transaction with `sync`, through a descriptor of its own (O_DSYNC). Something
    without room is put in its place. What fails there makes LMDB give its environment up (MDB_PANIC); one that is
    opened anew has new descriptors, as on a disk that is well again.
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
