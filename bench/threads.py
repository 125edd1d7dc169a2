"""Processor time of a server's threads, by what they do."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from pathlib import Path

_ROLES = {
    "stepwell-front": "wire",
    "bare-front": "wire",
    "compute": "compute",
    "store": "store",
    "store-log": "store",
}
"""By the name that the kernel has, without a number; the main thread is the event loop."""
ROLES = ("wire", "loop", "compute", "store", "other")


def thread_times_s(pid: int) -> Mapping[str, float]:
    """Processor time of the threads of a process so far, in seconds, by role.

    The wire of a lone connection runs on the event loop's thread, and counts there.
    """
    times = dict.fromkeys(ROLES, 0.0)
    for task in Path(f"/proc/{pid}/task").iterdir():
        with contextlib.suppress(FileNotFoundError, ProcessLookupError):  # the thread has ended
            name = (task / "comm").read_text().strip()
            role = "loop" if task.name == str(pid) else _ROLES.get(name.partition("_")[0], "other")
            times[role] += int((task / "schedstat").read_text().split()[0]) / 1e9
    return times
