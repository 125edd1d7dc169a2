"""Keeps what a native library announces off the server's stderr, where each line is one of its log."""

from __future__ import annotations

import contextlib
import os
import tempfile
from collections.abc import Iterator

_STDERR = 2


@contextlib.contextmanager
def without_announcements() -> Iterator[None]:
    """Leave out the lines that begin with ``INFO: ``; all others come when the block ends.

    TensorFlow Lite writes such lines to the file descriptor itself and has no setting against it. The
    descriptor belongs to the whole process, so this is for moments at the start.
    """
    with tempfile.TemporaryFile() as caught, os.fdopen(os.dup(_STDERR), "wb") as stderr:
        os.dup2(caught.fileno(), _STDERR)
        try:
            yield
        finally:
            os.dup2(stderr.fileno(), _STDERR)
            caught.seek(0)
            stderr.writelines(line for line in caught if not line.startswith(b"INFO: "))
