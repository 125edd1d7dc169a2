"""The memory that the server may use."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path

CGROUPS = Path("/sys/fs/cgroup")
OWN_CGROUP = Path("/proc/self/cgroup")


def memory_bytes() -> int:
    """Return the memory of the machine, or the limit of the container or systemd unit."""
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return min(memory, memory_limit_bytes() or memory)


def memory_limit_bytes() -> int | None:
    """Return the lowest limit of this process's cgroups; None: no limit."""
    limits = [int(text) for text in cgroup_values("memory.max") if text.isdigit()]
    return min(limits, default=None)


def cgroup_values(name: str) -> list[str]:
    """Return a file of this process's cgroup (version 2) and of those above it, where it exists.

    In a container its own cgroup is the top of the tree, whatever path the kernel names.
    """
    try:
        own = OWN_CGROUP.read_text().partition("0::/")[2].strip()
    except OSError:
        own = ""
    folder = CGROUPS / own
    values = []
    for each in (folder, *folder.parents):
        if each.is_relative_to(CGROUPS):
            with contextlib.suppress(OSError):
                values.append((each / name).read_text().strip())
    return values
