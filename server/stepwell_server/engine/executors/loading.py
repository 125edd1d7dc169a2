"""How TensorFlow and Keras are loaded, which is most of what a short compilation takes."""

from __future__ import annotations

import contextlib
import gc
import sys
from collections.abc import Iterator


@contextlib.contextmanager
def light_imports() -> Iterator[None]:
    """What is imported in this block is imported a third faster; for the main thread, and frameworks that stay.

    Modules are no garbage, so none is looked for, neither meanwhile nor in what has been loaded by then. Keras
    imports matplotlib where that is there, for plots that no server draws: here it goes without.
    """
    has_plots, collects = "matplotlib" in sys.modules, gc.isenabled()
    if not has_plots:
        sys.modules["matplotlib"] = None  # type: ignore[assignment] # the documented way to make an import fail
    gc.disable()
    try:
        yield
    finally:
        if collects:
            gc.enable()
        gc.freeze()
        if not has_plots:
            del sys.modules["matplotlib"]
