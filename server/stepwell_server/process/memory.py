"""The memory that the server may use."""

from __future__ import annotations

import os
from pathlib import Path


def memory_bytes() -> int:
    """Return the memory of the machine, or the limit of the container."""
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    try:
        text = Path("/sys/fs/cgroup/memory.max").read_text().strip()
    except OSError:
        text = "max"
    return min(memory, int(text)) if text.isdigit() else memory
