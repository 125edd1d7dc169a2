"""Imports of what stays for good: modules are no garbage, so none is looked for among them."""

from __future__ import annotations

import contextlib
import gc
from collections.abc import Iterator


@contextlib.contextmanager
def without_collecting() -> Iterator[None]:
    """Import in this block without a look for garbage, neither meanwhile nor, later, in what has been loaded by then.

    For the main thread, before others run.
    """
    collects = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if collects:
            gc.enable()
        gc.freeze()
