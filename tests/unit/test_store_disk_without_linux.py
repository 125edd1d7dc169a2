"""The store on a system that has neither writes that wait for the disk, nor fdatasync, nor posix_fallocate: macOS."""

from __future__ import annotations

import errno
import fcntl
import os
from pathlib import Path

import pytest

from stepwell_server.files import flush
from stepwell_server.store.disk.lmdb import Durability
from support.stores.disk_store import DURABILITIES, begin, fill_one, killed, opened, put, revisions

FULL_FLUSH = 51
"""F_FULLFSYNC."""


class Flushes:
    """What is asked of the system instead."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.full, self.plain, self.refuses = 0, 0, False
        self._control, self._fsync = fcntl.fcntl, os.fsync
        monkeypatch.setattr("stepwell_server.store.disk.wal.segment.WRITE_THROUGH", 0)
        monkeypatch.setattr(flush, "_FULL_FLUSH", FULL_FLUSH)
        monkeypatch.delattr(os, "fdatasync")
        monkeypatch.delattr(os, "posix_fallocate")
        monkeypatch.setattr(fcntl, "fcntl", self.fcntl)
        monkeypatch.setattr(os, "fsync", self.fsync)

    def fcntl(self, descriptor: int, command: int) -> int:
        assert command == FULL_FLUSH
        os.fstat(descriptor)
        if self.refuses:
            raise OSError(errno.ENOTSUP, os.strerror(errno.ENOTSUP))
        self.full += 1
        return 0

    def fsync(self, descriptor: int) -> None:
        self.plain += 1
        self._fsync(descriptor)


@pytest.fixture
def flushes(monkeypatch: pytest.MonkeyPatch) -> Flushes:
    return Flushes(monkeypatch)


@DURABILITIES
def test_it_keeps_sessions(path: Path, flushes: Flushes, durability: Durability) -> None:
    store = opened(path, durability)
    changed = fill_one(store)
    store.checkpoint()
    put(store, "s0", revision=7)
    kept = revisions(store)
    assert (kept["s0"], len(changed) > 10) == (7, True)
    assert (path / "sessions" / "reserve").stat().st_blocks > 0
    again = killed(store, durability)
    assert revisions(again) == kept


@pytest.mark.parametrize("refuses", [False, True])
def test_a_change_waits_for_the_medium(path: Path, flushes: Flushes, refuses: bool) -> None:
    """Where the file system does not know how, for what it has."""
    store = opened(path, "sync")
    begin(store, "a", "b")
    flushes.refuses, flushes.full, flushes.plain = refuses, 0, 0
    put(store, "a", revision=1)
    put(store, "a", "b", revision=2)
    assert (flushes.full, flushes.plain) == ((0, 2) if refuses else (2, 0))


def test_a_change_that_need_not_wait_does_not(path: Path, flushes: Flushes) -> None:
    store = opened(path, "async")
    begin(store, "a")
    flushes.full = flushes.plain = 0
    put(store, "a", revision=1)
    assert (flushes.full, flushes.plain) == (0, 0)
