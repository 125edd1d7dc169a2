"""What the compiling process may take of memory and time, and who sees to it."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import re
import signal
import stat
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Literal, Self

from stepwell_server.clock import Clock

_LOOK_S = 0.02
_LOOKS_AT_DISK = 10
_FILES, MORE_BYTES = 2, 64 << 20
"""What is written: the program, and what it is made from, none of which is much larger than the model."""
DETAIL_BYTES = 64 << 10
"""Of what the log is told of a model that is refused."""
_BLOCK_BYTES, _LEAST_BYTES = 512, 4096
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
    """Set, by any thread: nobody waits for it any more, and the compiling process is ended."""

    @property
    def disk_bytes(self) -> int:
        """Of each file that the compiling process writes, and of all of them together."""
        return _FILES * self.model_bytes + MORE_BYTES


Limit = Literal["memory", "disk", "time", "abandoned"]


class Watch:
    """Ends a process that goes over its limits while it does one thing; a context manager.

    It looks at the memory and the time of processors that the process uses, many times in a second, and does not have
    the kernel refuse more memory (RLIMIT_AS, RLIMIT_DATA): TensorFlow maps many times what it uses, and where it is
    refused memory it ends by SIGSEGV, SIGABRT or a MemoryError somewhere, which cannot be told from a defect. Other
    systems than Linux do not say what a process uses; there only the time that passes is limited.
    """

    def __init__(self, limits: Limits, clock: Clock, closing: threading.Event) -> None:
        """Nobody waits for it any more, too, when `closing` is set."""
        self._limits = limits
        self._clock = clock
        self._abandoned = [closing, *([limits.abandoned] if limits.abandoned is not None else [])]
        self._began = clock.monotonic()
        self._over = threading.Event()
        self._guard = threading.Lock()
        self._pid: int | None = None
        self._folder: Path | None = None
        self._used_s = 0.0
        self._thread = threading.Thread(target=self._look, name="stepwell-compile-watch", daemon=True)
        self.exceeded: Limit | None = None
        """The limit for which the process was ended."""

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_exc_info: object) -> None:
        self._over.set()
        self._thread.join()

    def look_at(self, pid: int | None, folder: Path | None = None) -> None:
        """From now on look at the process ``pid``, which may write ``folder``; None: at no process.

        It must not be waited for before another one is looked at: somebody else might have its number then.
        """
        with self._guard:
            self._pid, self._folder = pid, folder
            self._used_s = 0.0 if pid is None else processor_s_of(pid)
            self._end_if_exceeded()

    def _look(self) -> None:
        looks = 0
        while self.exceeded is None and not self._over.wait(_LOOK_S):
            looks += 1
            with self._guard:
                self.exceeded = self._found(with_disk=looks % _LOOKS_AT_DISK == 0)
                self._end_if_exceeded()

    def _found(self, *, with_disk: bool) -> Limit | None:
        limits, pid = self._limits, self._pid
        if any(event.is_set() for event in self._abandoned):
            return "abandoned"
        if 0 < limits.timeout_s < self._clock.monotonic() - self._began:
            return "time"
        if pid is None:
            return None
        if memory_of(pid) > limits.memory_bytes:
            return "memory"
        if 0 < processor_s(limits.timeout_s) < processor_s_of(pid) - self._used_s:
            return "time"
        if with_disk and self._folder is not None:
            most = limits.disk_bytes
            return "disk" if disk_of(pid, [self._folder], most) > most else None
        return None

    def _end_if_exceeded(self) -> None:
        if self.exceeded is not None and self._pid is not None:
            with contextlib.suppress(ProcessLookupError):
                os.kill(self._pid, signal.SIGKILL)


def disk_of(pid: int, folders: Sequence[Path], most: int) -> int:
    """Bytes on the disk that a process has in its folders, and in files that it has open and that have no name.

    Each name counts as a block at least. Counting ends above ``most``.
    """
    seen = set[tuple[int, int]]()
    total = 0
    for file in _written(pid, folders):
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
            total += max(found.st_blocks * _BLOCK_BYTES, _LEAST_BYTES)
    return total


def _written(pid: int, folders: Sequence[Path]) -> Iterator[Path | str]:
    """Files in folders, as paths, and those that a process has open, as the names that the system gives to them."""
    for folder in folders:
        for root, inner, names in os.walk(folder):
            yield from (Path(root, name) for name in (*inner, *names))
    opened = f"/proc/{pid}/fd"
    with contextlib.suppress(OSError):  # it has ended, or the system does not say
        yield from (f"{opened}/{name}" for name in os.listdir(opened))


def memory_of(pid: int) -> int:
    """Bytes of memory that a process uses for itself; 0 if it has ended or the system does not say."""
    try:
        status = Path(f"/proc/{pid}/status").read_text()
    except OSError:
        return 0
    return sum(int(kilobytes) for kilobytes in _OWN.findall(status)) * 1024


def processor_s(timeout_s: float) -> float:
    """The time of processors that fits into ``timeout_s`` seconds on this machine."""
    return timeout_s * (os.cpu_count() or 1)


def processor_s_of(pid: int) -> float:
    """Seconds of processors that a process has used; 0 if it has ended or the system does not say."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return 0.0
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")
