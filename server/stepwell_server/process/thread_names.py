"""Names of threads in the kernel, as `top -H` and profilers show them."""

from __future__ import annotations

import contextlib
import threading
from pathlib import Path

_PREFIX = "stepwell-"
_MAX_LENGTH = 15


def name_thread() -> None:
    """Give the kernel the name of the current thread without its prefix. Python does not do it before 3.14."""
    name = threading.current_thread().name.removeprefix(_PREFIX)[:_MAX_LENGTH]
    with contextlib.suppress(OSError):  # not on Linux, or forbidden: it is of use to readers only
        Path(f"/proc/self/task/{threading.get_native_id()}/comm").write_text(name, encoding="ascii")
