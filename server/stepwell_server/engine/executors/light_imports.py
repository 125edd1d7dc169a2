"""How TensorFlow and Keras are loaded, which is most of what a short compilation takes."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator

from stepwell_server.process.garbage_collection import collection_paused

_UNUSED = ("IPython", "matplotlib", "pandas")
"""What Keras and TensorFlow import where it is there: to show and to draw, and for data frames. No server does that."""


@contextlib.contextmanager
def light_imports() -> Iterator[None]:
    """What is imported in this block is imported in half the time; for the main thread, and frameworks that stay.

    No garbage is looked for in them, and packages that they use where they are there, and that no server needs, are not
    there meanwhile.
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
