"""Limits of memory, time and disk for the compiling process."""

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

from stepwell_server.process.memory import memory_bytes

_FILES, MORE_BYTES = 2, 64 << 20
"""Number of written files, the program and its input, neither much larger than the model; and bytes for the rest."""
DETAIL_BYTES = 64 << 10
"""Maximum of logged details about a refused model."""
_BLOCK_BYTES, _MIN_FILE_BYTES = 512, 4096
_SHARE_OF_MEMORY = 3 / 4
#: Memory that the kernel cannot reclaim, without mapped files such as TensorFlow's libraries.
_OWN = re.compile(r"^(?:RssAnon|RssShmem|VmSwap):\s+(\d+) kB$", re.MULTILINE)


def default_memory_bytes() -> int:
    """Return three quarters of the available memory."""
    return int(memory_bytes() * _SHARE_OF_MEMORY)


@dataclasses.dataclass(frozen=True)
class Limits:
    """Limits of the compilation of one model."""

    model_bytes: int = 2 * 1024**3
    """Maximum of the unpacked content of the file."""
    memory_bytes: int = dataclasses.field(default_factory=default_memory_bytes)
    """Maximum memory of the compiling process."""
    timeout_s: float = 1800.0
    """Maximum time of the compiling process; 0: unlimited."""
    abandoned: threading.Event | None = dataclasses.field(default=None, compare=False)
    """Set, by any thread, when no caller is waiting any more: the compiling process is ended."""

    @property
    def disk_bytes(self) -> int:
        """Maximum of each file that the compiling process writes, and of all together."""
        return _FILES * self.model_bytes + MORE_BYTES


Limit = Literal["memory", "disk", "time", "abandoned"]


def disk_of(pid: int, folder: Path, most: int) -> int:
    """Return the disk space of a process: its folder and its open unnamed files.

    Each name counts as at least a block. Counting stops above ``most``.
    """
    seen = set[tuple[int, int]]()
    total = 0
    for file in _written(pid, folder):
        if total > most:
            break
        try:
            found = os.lstat(file) if isinstance(file, Path) else os.stat(file)
        except OSError:  # it was deleted
            continue
        has_name = isinstance(file, Path)
        place = (found.st_dev, found.st_ino)
        if place not in seen and (has_name or (stat.S_ISREG(found.st_mode) and not found.st_nlink)):
            seen.add(place)
            total += max(found.st_blocks * _BLOCK_BYTES, _MIN_FILE_BYTES)
    return total


def _written(pid: int, folder: Path) -> Iterator[Path | str]:
    """Yield the files in a folder, as paths, and the open files of a process, by their names in /proc."""
    for root, inner, names in os.walk(folder):
        yield from (Path(root, name) for name in (*inner, *names))
    opened = f"/proc/{pid}/fd"
    with contextlib.suppress(OSError):  # it has ended, or the system does not show them
        yield from (f"{opened}/{name}" for name in os.listdir(opened))


def memory_of(pid: int) -> int:
    """Return the private memory of a process; 0 if it has ended, or on other systems than Linux.

    The kernel could limit memory instead (RLIMIT_AS, RLIMIT_DATA). But TensorFlow maps much more than it uses, and
    without memory it fails with SIGSEGV, SIGABRT or a MemoryError somewhere, which looks like a defect.
    """
    try:
        status = Path(f"/proc/{pid}/status").read_text()
    except OSError:
        return 0
    return sum(int(kilobytes) for kilobytes in _OWN.findall(status)) * 1024


def processor_s(timeout_s: float) -> float:
    """Return the processor time available in ``timeout_s`` seconds on this machine."""
    return timeout_s * (os.cpu_count() or 1)
