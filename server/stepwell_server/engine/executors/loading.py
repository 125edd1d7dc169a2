"""How TensorFlow and Keras are loaded, which is most of what a short compilation takes."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator

from stepwell_server.importing import without_collecting


@contextlib.contextmanager
def light_imports() -> Iterator[None]:
    """What is imported in this block is imported a third faster; for the main thread, and frameworks that stay.

    No garbage is looked for in them. Keras imports matplotlib where that is there, for plots that no server draws: here
    it goes without.
    """
    has_plots = "matplotlib" in sys.modules
    if not has_plots:
        sys.modules["matplotlib"] = None  # type: ignore[assignment] # the documented way to make an import fail
    try:
        with without_collecting():
            yield
    finally:
        if not has_plots:
            del sys.modules["matplotlib"]
