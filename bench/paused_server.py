"""A server whose log pauses instead of flushing: the disk of another machine, or one that flushes in no time.

    python bench/paused_server.py SECONDS ARGUMENT...     arguments as for `python -m stepwell_server`

The server itself has no such option: this program replaces the flush before the server starts.
"""

from __future__ import annotations

import functools
import sys
import time

from stepwell_server.__main__ import main
from stepwell_server.store.disk.wal import segment, writers


def replace_flushes(pause_s: float) -> None:
    """Make every write to the log pause instead of waiting for the disk."""

    def pause(descriptor: int) -> None:
        if pause_s:
            time.sleep(pause_s)

    segment.WRITE_THROUGH = 0
    segment.flush_content = pause  # type: ignore[attr-defined]
    if writers.NATIVE is not None:
        writers.NATIVE = functools.partial(writers.NATIVE, pause_s=pause_s)  # type: ignore[assignment]


if __name__ == "__main__":
    replace_flushes(float(sys.argv.pop(1)))
    sys.exit(main())
