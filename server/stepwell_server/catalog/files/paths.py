"""Checks which files on the server's disk a call may load, with all links resolved."""

from __future__ import annotations

import os
import stat
from pathlib import Path

from stepwell_server.catalog.files.folder import SUFFIXES
from stepwell_server.compile.keras_file.origin import folder_problem
from stepwell_server.errors import InvalidInput

_MAX_SHOWN = 300


def checked(text: str, root: Path | None) -> Path:
    """Return the resolved path of a file that a call names. Blocking.

    Args:
        text: the path in the call.
        root: `--models`, where the resolved path must be; None: any file that the server can read.

    Raises:
        InvalidInput: it is not the absolute path of such a file.
    """
    shown = text if len(text) <= _MAX_SHOWN else f"{text[:_MAX_SHOWN]}..."
    if not os.path.isabs(text) or "\0" in text:
        raise InvalidInput(f"path must be absolute, on the server's disk; got {shown!r}")
    if not text.endswith(SUFFIXES):
        raise InvalidInput(f"path must end in {' or '.join(SUFFIXES)}; got {shown!r}")
    real = Path(os.path.realpath(text))
    # First, so that the answer does not reveal which other files exist.
    if root is not None and not real.is_relative_to(os.path.realpath(root)):
        raise InvalidInput(
            f"path must lead to a file in --models, {root}, after links are followed; got {shown!r}"
        )
    try:
        found = os.stat(real)
    except OSError as error:
        raise InvalidInput(f"path must be that of a file; got {shown!r}: {error.strerror}") from None
    if not stat.S_ISREG(found.st_mode):
        what = folder_problem(real) if stat.S_ISDIR(found.st_mode) else "is no regular file"
        raise InvalidInput(f"path must be that of a file; {shown!r} {what}")
    if not os.access(real, os.R_OK):
        raise InvalidInput(f"path must be that of a file which the server can read; got {shown!r}")
    return real
