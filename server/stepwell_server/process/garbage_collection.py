"""Keeps the garbage collector away from imported modules, which live as long as the process."""

from __future__ import annotations

import contextlib
import gc
from collections.abc import Iterator


@contextlib.contextmanager
def collection_paused() -> Iterator[None]:
    """Pause the collector in this block, and exclude all objects that exist at its end from later collections.

    For the main thread, before other threads run.
    """
    collects = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if collects:
            gc.enable()
        gc.freeze()
