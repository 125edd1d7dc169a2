"""The disk that durable stores are measured on: folders for their data, and what the disk itself can do."""

from __future__ import annotations

import contextlib
import itertools
import os
import re
import shutil
import statistics
import tempfile
import time
from collections.abc import Iterable, Iterator
from pathlib import Path

from bench.harness import OUT

_FOLDER = re.compile(r"data-(\d+)-")
_FLUSHES = 200
_FLUSHED_BYTES = 4096
_PAUSE_S = 0.5e-3
"""About as long as it is between two commits of steps."""


@contextlib.contextmanager
def data_folder() -> Iterator[Path]:
    """A folder for a server's data, beside the results and gone afterwards."""
    _remove_left_behind()
    OUT.mkdir(parents=True, exist_ok=True)
    folder = Path(tempfile.mkdtemp(prefix=f"data-{os.getpid()}-", dir=OUT))
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _remove_left_behind() -> None:
    """Remove what runs that were killed had no time to remove."""
    for folder in OUT.glob("data-*"):
        found = _FOLDER.match(folder.name)
        if found is not None and not Path(f"/proc/{found[1]}").exists() and Path("/proc/self").exists():
            shutil.rmtree(folder, ignore_errors=True)


def file_system(path: Path) -> str:
    """The kind of file system that holds a folder, as the kernel calls it."""
    with contextlib.suppress(OSError):
        found: dict[str, str] = {}
        for line in Path("/proc/mounts").read_text().splitlines():
            _, place, kind, *_ = line.split(" ")
            if path.resolve().is_relative_to(place):
                found[place] = kind
        return found[max(found, key=len)]
    return "unknown file system"


def flush_ms(folder: Path) -> float:
    """How long fdatasync takes after 4 KiB were written, the median of many, in milliseconds."""
    return statistics.median(_flushes_ms(folder, range(_FLUSHES)))


def flushes_ms(folder: Path, seconds: float) -> list[float]:
    """How long each flush takes in a file that has its blocks, with a pause behind each, in milliseconds."""
    _flushes_ms(folder, range(_FLUSHES))  # its blocks
    until = time.perf_counter() + seconds
    places = itertools.takewhile(lambda _: time.perf_counter() < until, itertools.cycle(range(_FLUSHES)))
    return _flushes_ms(folder, places, _PAUSE_S)


def _flushes_ms(folder: Path, places: Iterable[int], pause_s: float = 0.0) -> list[float]:
    path = folder / "flushed"
    file = os.open(path, os.O_RDWR | os.O_CREAT, 0o600)
    flush = getattr(os, "fdatasync", os.fsync)
    taken = []
    try:
        for place in places:
            os.pwrite(file, os.urandom(_FLUSHED_BYTES), place * _FLUSHED_BYTES)
            began = time.perf_counter()
            flush(file)
            taken.append((time.perf_counter() - began) * 1e3)
            if pause_s:
                time.sleep(pause_s)
    finally:
        os.close(file)
    return taken


def bytes_used(folder: Path) -> int:
    """What the files of a folder take up on the disk; a file may be longer than that."""
    return sum(path.stat().st_blocks * 512 for path in folder.rglob("*") if path.is_file())
