"""The room that is kept for ending sessions on a full disk."""

from __future__ import annotations

import dataclasses
import os
import types
from pathlib import Path

import pytest

from stepwell_server.store.base import Batch, End, Tombstone
from stepwell_server.store.disk.reserve import RESERVE_BYTES, Extent, Reserve
from support.clock import ManualClock

CLOSE = Batch(deletes=["a"], tombstones=[Tombstone("a", End.CLOSED, 0.0)], counts=[("m", -1)])
OPEN = Batch(puts=[("b", b"r" * 1000)], counts=[("m", 1)])
STEP = Batch(puts=[("b", b"r" * 1000)])
PLENTY = Extent(file_bytes=100 * RESERVE_BYTES, live_bytes=50 * RESERVE_BYTES)
FULL = Extent(file_bytes=100 * RESERVE_BYTES, live_bytes=100 * RESERVE_BYTES)


class Disk:
    """A disk with `free` bytes, apart from those of the reserve."""

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self.free = 1 << 40
        patch.setattr(os, "statvfs", self._statvfs)
        self.fails = 0
        self.kept: list[Batch] = []

    def _statvfs(self, _path: object) -> types.SimpleNamespace:
        return types.SimpleNamespace(f_bavail=self.free // 4096, f_blocks=1 << 28, f_frsize=4096)

    def attempt(self, batch: Batch) -> None:
        """Fail `fails` times."""
        if self.fails:
            self.fails -= 1
            raise OSError("full")
        self.kept.append(batch)


@pytest.fixture
def disk(monkeypatch: pytest.MonkeyPatch) -> Disk:
    return Disk(monkeypatch)


def test_it_is_taken_at_the_start_and_found_again(tmp_path: Path, disk: Disk) -> None:
    assert Reserve(tmp_path, ManualClock()).held_bytes == RESERVE_BYTES
    assert (tmp_path / "reserve").stat().st_blocks * 512 >= RESERVE_BYTES
    disk.free = 0
    assert Reserve(tmp_path, ManualClock()).held_bytes == RESERVE_BYTES


def test_a_start_does_not_need_it(tmp_path: Path, disk: Disk, monkeypatch: pytest.MonkeyPatch) -> None:
    disk.free = 0
    assert Reserve(tmp_path, ManualClock()).is_short

    def refused(*_: object) -> None:
        raise OSError("not on this file system")

    disk.free = 1 << 40
    monkeypatch.setattr(os, "posix_fallocate", refused)
    clock = ManualClock()
    reserve = Reserve(tmp_path, clock)
    assert reserve.held_bytes == 0
    reserve.commit(CLOSE, disk.attempt, lambda: PLENTY)
    assert disk.kept == [CLOSE]


def test_it_is_given_up_for_ending_sessions_alone(tmp_path: Path, disk: Disk) -> None:
    reserve = Reserve(tmp_path, ManualClock())
    for batch in (OPEN, STEP, Batch()):
        disk.fails = 1
        with pytest.raises(OSError, match="full"):
            reserve.commit(batch, disk.attempt, lambda: FULL)
        assert reserve.held_bytes == RESERVE_BYTES
    disk.free, disk.fails = 0, 1
    reserve.commit(CLOSE, disk.attempt, lambda: FULL)
    assert disk.kept == [CLOSE]
    assert reserve.held_bytes == 0
    assert not (tmp_path / "reserve").exists()


def test_remaining_room_is_used_at_once_and_the_rest_later(tmp_path: Path, disk: Disk) -> None:
    clock = ManualClock()
    reserve = Reserve(tmp_path, clock)
    disk.free, disk.fails = 4 << 20, 1
    reserve.commit(CLOSE, disk.attempt, lambda: FULL)
    assert reserve.held_bytes == 3 << 20
    disk.free = 1 << 40
    clock.advance(0.5)
    reserve.commit(STEP, disk.attempt, lambda: FULL)
    assert reserve.is_short, "it looks from time to time"
    clock.advance(1.0)
    reserve.commit(STEP, disk.attempt, lambda: FULL)
    assert reserve.held_bytes == RESERVE_BYTES


def test_free_pages_are_made_usable_if_it_was_not_enough(tmp_path: Path, disk: Disk) -> None:
    reserve = Reserve(tmp_path, ManualClock())
    disk.fails = 2
    reserve.commit(CLOSE, disk.attempt, lambda: FULL)
    assert [bool(batch.deletes) for batch in disk.kept] == [False, True]
    disk.fails = 3
    with pytest.raises(OSError, match="full"):
        reserve.commit(CLOSE, disk.attempt, lambda: FULL)


def test_while_it_is_short_sessions_are_opened_only_where_as_much_stays_free(
    tmp_path: Path, disk: Disk
) -> None:
    disk.free = 0
    reserve = Reserve(tmp_path, ManualClock())
    reserve.commit(OPEN, disk.attempt, lambda: PLENTY)
    reserve.commit(STEP, disk.attempt, lambda: FULL)
    with pytest.raises(OSError, match="new sessions must leave 8388608 bytes free"):
        reserve.commit(OPEN, disk.attempt, lambda: FULL)
    # in place of another that ended less has to be left
    less = Extent(FULL.file_bytes, FULL.file_bytes - RESERVE_BYTES * 7 // 8)
    with pytest.raises(OSError, match="new sessions"):
        reserve.commit(OPEN, disk.attempt, lambda: less)
    reserve.commit(CLOSE, disk.attempt, lambda: FULL)
    reserve.commit(OPEN, disk.attempt, lambda: less)
    with pytest.raises(OSError, match="new sessions"):
        reserve.commit(OPEN, disk.attempt, lambda: less)


def test_while_it_is_short_documents_are_kept_only_where_as_much_stays_free(
    tmp_path: Path, disk: Disk
) -> None:
    disk.free = 0
    reserve = Reserve(tmp_path, ManualClock())
    kept = Batch(documents=[("a", b"c" * 1000)])
    reserve.commit(kept, disk.attempt, lambda: PLENTY)
    with pytest.raises(OSError, match="new documents must leave 8388608 bytes free for closing sessions"):
        reserve.commit(kept, disk.attempt, lambda: FULL)
    removed = Batch(documents=[("a", None)])
    closed = dataclasses.replace(CLOSE, documents=kept.documents)
    for batch in (removed, closed):
        reserve.commit(batch, disk.attempt, lambda: FULL)
    assert disk.kept == [kept, removed, closed]
