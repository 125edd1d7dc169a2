"""The folders of a test run: one on disk for all that its processes write, one in memory for stores whose flushes no test is about.

Killed servers leave their temporary files, so the run removes them at its end. Folders of failed tests stay where
pytest keeps them.
"""

from __future__ import annotations

import atexit
import functools
import os
import shutil
import tempfile
from pathlib import Path

#: Names the run's folder to the processes among which pytest-xdist divides the tests.
_FOLDER = "TEST_RUN_FOLDER"
_MEMORY = Path("/dev/shm")
_ROOM_BYTES = 1 << 30


@functools.cache
def run_folder() -> Path:
    """The folder of this test run. The first process that asks makes it and removes it at its end."""
    if _FOLDER not in os.environ:
        os.environ[_FOLDER] = _made(None)
    return Path(os.environ[_FOLDER])


@functools.cache
def memory_folder() -> Path:
    """A folder in memory, or on disk where the system has little room in memory. The first process that asks removes it."""
    if not _MEMORY.is_dir() or shutil.disk_usage(_MEMORY).free < _ROOM_BYTES:
        return run_folder()
    if f"{_FOLDER}_IN_MEMORY" not in os.environ:
        os.environ[f"{_FOLDER}_IN_MEMORY"] = _made(_MEMORY)
    return Path(os.environ[f"{_FOLDER}_IN_MEMORY"])


def use_for_temporary_files() -> None:
    """Direct the temporary files of this process and of those that it starts into the run's folder."""
    os.environ.setdefault("PYTEST_DEBUG_TEMPROOT", tempfile.gettempdir())
    folder = run_folder() / "tmp"
    folder.mkdir(exist_ok=True)
    os.environ["TMPDIR"] = tempfile.tempdir = str(folder)
    memory_folder()


def _made(parent: Path | None) -> str:
    folder = tempfile.mkdtemp(prefix="stepwell-tests-", dir=parent)
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return folder
