"""Keeps announcements of native libraries off the server's stderr, which is its log."""

from __future__ import annotations

import contextlib
import os
import tempfile
from collections.abc import Iterator

_STDERR = 2


@contextlib.contextmanager
def without_announcements() -> Iterator[None]:
    """Drop lines that begin with ``INFO: ``; print all others when the block ends.

    TensorFlow Lite writes such lines directly to the file descriptor and has no setting to stop it. The descriptor
    belongs to the whole process, so use this only while the server starts.
    """
    with tempfile.TemporaryFile() as caught, os.fdopen(os.dup(_STDERR), "wb") as stderr:
        os.dup2(caught.fileno(), _STDERR)
        try:
            yield
        finally:
            os.dup2(stderr.fileno(), _STDERR)
            caught.seek(0)
            stderr.writelines(line for line in caught if not line.startswith(b"INFO: "))
