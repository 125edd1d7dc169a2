"""Gives the free pages of LMDB's data file back to the disk: LMDB uses pages again but never returns them."""

from __future__ import annotations

import logging
import os
import shutil
from pathlib import Path
from typing import Any

import lmdb

from stepwell_server.files import private_files
from stepwell_server.store.disk.files import flush

_log = logging.getLogger(__name__)


def copy_compactly(environment: Any, data: Path, copy: Path) -> bool:
    """Replace a data file by a copy without its free pages, in one step (rename): one of the two is always there whole.

    Args:
        environment: Open on the data file, and closed afterwards if it was replaced.
        data: The data file.
        copy: A folder to be made for the copy, on the same file system.

    Returns:
        True if it was done; False if there was an error, which is logged.
    """
    copy.mkdir(mode=0o700)
    try:
        environment.copy(os.fspath(copy), compact=True)
        os.chmod(copy / data.name, private_files.FILE_MODE)  # LMDB makes it as the umask says
        flush(copy / data.name)
    except (lmdb.Error, OSError) as error:
        _log.warning("the store could not be compacted: %s", error)
        shutil.rmtree(copy, ignore_errors=True)
        return False
    environment.close()
    os.replace(copy / data.name, data)
    flush(data.parent)
    shutil.rmtree(copy, ignore_errors=True)
    return True
