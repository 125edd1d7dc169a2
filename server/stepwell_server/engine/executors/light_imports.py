"""Speeds up the import of TensorFlow and Keras, which takes most of the time of a short compilation."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator

from stepwell_server.process.garbage_collection import collection_paused

_UNUSED = ("IPython", "matplotlib", "pandas")
"""Packages that Keras and TensorFlow import if they are installed, for display, plots and data frames. A server
needs none."""


@contextlib.contextmanager
def light_imports() -> Iterator[None]:
    """Halve the time of imports in this block. For the main thread, and frameworks that stay loaded.

    Garbage collection is off, and optional packages that no server needs cannot be imported.
    """
    absent = [name for name in _UNUSED if name not in sys.modules]
    # the documented way to make an import fail
    sys.modules.update(dict.fromkeys(absent))  # type: ignore[arg-type]
    try:
        with collection_paused():
            yield
    finally:
        for name in absent:
            del sys.modules[name]
