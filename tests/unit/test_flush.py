"""Files whose names survive a loss of power: their folders are flushed after them."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import pytest

from stepwell_server import program_file
from stepwell_server.catalog.files.program_store import ProgramStore
from stepwell_server.clock import SystemClock
from stepwell_server.files import private_files
from stepwell_server.files.flush import flush_folders
from stepwell_server.program import Program
from stepwell_server.store.disk.store import DiskStore
from support.stores.broken_disk import io_error

PROGRAM = cast(Program, None)
"""What it contains does not matter."""


@pytest.fixture
def done(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, str]]:
    """Which files were replaced, and which files and folders were flushed, in order."""
    done: list[tuple[str, str]] = []
    replace, fsync = os.replace, os.fsync

    def replaced(old: Any, new: Any) -> None:
        replace(old, new)
        done.append(("replace", os.fspath(new)))

    def flushed(descriptor: int) -> None:
        fsync(descriptor)
        done.append(("flush", os.readlink(f"/proc/self/fd/{descriptor}")))

    monkeypatch.setattr(program_file, "_write", lambda _, file: file.write(b"x"))
    monkeypatch.setattr(os, "replace", replaced)
    monkeypatch.setattr(os, "fsync", flushed)
    return done


@pytest.mark.parametrize("kind", ["program", "private file"])
def test_a_file_s_name_is_flushed_after_it_was_replaced(
    tmp_path: Path, done: list[tuple[str, str]], kind: str
) -> None:
    file = tmp_path / "file"
    write: dict[str, Callable[[], None]] = {
        "program": lambda: program_file.save(PROGRAM, file),
        "private file": lambda: private_files.replace(file, b"x"),
    }
    write[kind]()
    (first, unfinished), *others = done
    assert (first, Path(unfinished).parent) == ("flush", tmp_path)
    assert others == [("replace", str(file)), ("flush", str(tmp_path))]


def test_a_program_that_is_used_briefly_is_not_flushed(tmp_path: Path, done: list[tuple[str, str]]) -> None:
    program_file.save(PROGRAM, tmp_path / "file", is_kept=False)
    assert done == [("replace", str(tmp_path / "file"))]


async def test_the_folder_of_stored_programs_is_flushed_too(
    tmp_path: Path, done: list[tuple[str, str]]
) -> None:
    path = await ProgramStore(tmp_path / "models").keep("m", 2, PROGRAM)
    (first, _), *others = done[1:]
    assert (done[0], first) == (("flush", str(tmp_path)), "flush")
    assert others == [("replace", str(path)), ("flush", str(path.parent))]


@pytest.mark.parametrize("code", [errno.EACCES, errno.EINVAL])
def test_a_store_may_be_in_a_folder_that_cannot_be_flushed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int
) -> None:
    """It may be read by others only, or the file system flushes none. Root reads all folders, so the error is made up."""
    opened = os.open

    def refuse(path: Any, *arguments: Any, **options: Any) -> int:
        if path == tmp_path:
            raise OSError(code, os.strerror(code))
        return opened(path, *arguments, **options)

    monkeypatch.setattr(os, "open", refuse)
    DiskStore(tmp_path / "data", durability="sync", clock=SystemClock()).close()


def test_a_disk_that_refuses_is_noticed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "fsync", io_error)
    with pytest.raises(OSError, match="Input/output error"):
        flush_folders(tmp_path)
