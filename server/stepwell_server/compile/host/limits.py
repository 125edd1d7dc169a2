"""What the compiling process may take of memory, time and disk."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import re
import stat
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Literal

_FILES, MORE_BYTES = 2, 64 << 20
"""Files that are written, the program and what it is made from; neither is much larger than the model."""
DETAIL_BYTES = 64 << 10
"""Of the details that are logged about a refused model."""
_BLOCK_BYTES, _MIN_FILE_BYTES = 512, 4096
_SHARE_OF_MEMORY = 3 / 4
#: What a process cannot give back by itself: not the files that it has mapped, such as TensorFlow's libraries.
_OWN = re.compile(r"^(?:RssAnon|RssShmem|VmSwap):\s+(\d+) kB$", re.MULTILINE)


def default_memory_bytes() -> int:
    """Three quarters of the memory that there is."""
    return int(memory_bytes() * _SHARE_OF_MEMORY)


def memory_bytes() -> int:
    """The memory that the machine has, or that the container may have."""
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    try:
        text = Path("/sys/fs/cgroup/memory.max").read_text().strip()
    except OSError:
        text = "max"
    return min(memory, int(text)) if text.isdigit() else memory


@dataclasses.dataclass(frozen=True)
class Limits:
    """What one model may take until it is compiled."""

    model_bytes: int = 2 * 1024**3
    """Of what the file holds, unpacked."""
    memory_bytes: int = dataclasses.field(default_factory=default_memory_bytes)
    """Of the compiling process."""
    timeout_s: float = 1800.0
    """Of the compiling process; 0: as long as it takes."""
    abandoned: threading.Event | None = dataclasses.field(default=None, compare=False)
    """Set, by any thread, when nobody waits for it any more: the compiling process is ended."""

    @property
    def disk_bytes(self) -> int:
        """Of each file that the compiling process writes, and of all of them together."""
        return _FILES * self.model_bytes + MORE_BYTES


Limit = Literal["memory", "disk", "time", "abandoned"]


def disk_of(pid: int, folder: Path, most: int) -> int:
    """Bytes on the disk that a process has in its folder, and in files that it has open and that have no name.

    Each name counts as a block at least. Counting ends above ``most``.
    """
    seen = set[tuple[int, int]]()
    total = 0
    for file in _written(pid, folder):
        if total > most:
            break
        try:
            found = os.lstat(file) if isinstance(file, Path) else os.stat(file)
        except OSError:  # it is gone
            continue
        has_name = isinstance(file, Path)
        place = (found.st_dev, found.st_ino)
        if place not in seen and (has_name or (stat.S_ISREG(found.st_mode) and not found.st_nlink)):
            seen.add(place)
            total += max(found.st_blocks * _BLOCK_BYTES, _MIN_FILE_BYTES)
    return total


def _written(pid: int, folder: Path) -> Iterator[Path | str]:
    """Files in a folder, as paths, and those that a process has open, as the names that the system gives to them."""
    for root, inner, names in os.walk(folder):
        yield from (Path(root, name) for name in (*inner, *names))
    opened = f"/proc/{pid}/fd"
    with contextlib.suppress(OSError):  # it has ended, or the system does not show them
        yield from (f"{opened}/{name}" for name in os.listdir(opened))


def memory_of(pid: int) -> int:
    """Bytes of memory that a process uses for itself; 0 if it has ended, or on other systems than Linux.

    The kernel could refuse more memory instead (RLIMIT_AS, RLIMIT_DATA). But TensorFlow maps many times what it uses, and
    where it is refused memory it ends by SIGSEGV, SIGABRT or a MemoryError somewhere, which looks like a defect.
    """
    try:
        status = Path(f"/proc/{pid}/status").read_text()
    except OSError:
        return 0
    return sum(int(kilobytes) for kilobytes in _OWN.findall(status)) * 1024


def processor_s(timeout_s: float) -> float:
    """The time of processors that fits into ``timeout_s`` seconds on this machine."""
    return timeout_s * (os.cpu_count() or 1)
