"""What processes there are, and what they have, as Linux shows it."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable
from pathlib import Path

HANG_S = 240.0
"""Only a hang reaches it."""


def children(pid: int) -> list[int]:
    """Numbers of the processes that a process has started."""
    return [
        int(child)
        for task in Path(f"/proc/{pid}/task").iterdir()
        for child in (task / "children").read_text().split()
    ]


def is_there(pid: int) -> bool:
    """Whether a process is there, and has not ended."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except OSError:
        return False


def until(condition: Callable[[], bool]) -> None:
    """Wait for what the system does by itself, of which nobody is told."""
    never = threading.Event()
    for _ in range(int(HANG_S / 0.02)):
        if condition():
            return
        never.wait(0.02)
    raise AssertionError("it does not come")


def home_of(pid: int) -> Path:
    """The folder of a fork server, in which its workers have theirs."""
    content = Path(f"/proc/{pid}/environ").read_bytes()
    return Path(os.fsdecode(dict(item.split(b"=", 1) for item in content.split(b"\0") if item)[b"HOME"]))


def opened_below(folder: Path) -> list[str]:
    """Files in a folder that this process has open, each as often; of what other tests have open it says nothing."""
    found = list[str]()
    for descriptor in Path("/proc/self/fd").iterdir():
        try:
            name = os.readlink(descriptor)
        except FileNotFoundError:
            continue  # it was closed meanwhile
        if f"{name}/".startswith(f"{folder}/"):
            found.append(name)
    return sorted(found)


def descriptors(pid: int | str = "self") -> int:
    """How many files a process has open."""
    return len(os.listdir(f"/proc/{pid}/fd"))
