"""One server per data directory."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from stepwell_server.store.base import StoreBusy, StoreError
from stepwell_server.store.disk.lmdb import LmdbStore
from stepwell_server.store.disk.lock import LOCK_FILE, DirectoryLock
from support.clock import ManualClock


def locked(path: Path, listen: str = "") -> DirectoryLock:
    lock = DirectoryLock(path, clock=ManualClock())
    if listen:
        lock.set_listen(listen)
    return lock


def test_the_second_server_learns_which_process_holds_the_store(tmp_path: Path) -> None:
    lock = locked(tmp_path)
    lock.set_listen("127.0.0.1:50051")
    with pytest.raises(StoreBusy, match=rf"process {os.getpid()} on .*, listening at 127.0.0.1:50051") as e:
        locked(tmp_path)
    assert e.value.holder is not None
    assert e.value.holder.pid == os.getpid()
    lock.release()
    lock.release()
    locked(tmp_path).release()


@pytest.mark.parametrize("content", [b"", b"\xff\0", b"[]", b"{}", b'{"pid": "x"}', b"{" * 5000])
def test_what_a_file_says_does_not_matter(tmp_path: Path, content: bytes) -> None:
    file = tmp_path / LOCK_FILE
    file.write_bytes(content)
    lock = locked(tmp_path)
    file.write_bytes(content)
    with pytest.raises(StoreBusy, match="used by another process") as e:
        locked(tmp_path)
    assert e.value.holder is None
    lock.release()


def test_a_shorter_text_covers_a_longer_one(tmp_path: Path) -> None:
    locked(tmp_path, "a-very-long-name.example:50051").release()
    lock = locked(tmp_path, "b:1")
    with pytest.raises(StoreBusy, match="listening at b:1"):
        locked(tmp_path)
    lock.release()


def test_a_directory_that_is_not_there_cannot_be_locked(tmp_path: Path) -> None:
    with pytest.raises(StoreError, match="must be writable"):
        locked(tmp_path / "none")


def test_a_store_holds_the_lock_until_it_is_closed(tmp_path: Path) -> None:
    store = LmdbStore(tmp_path, durability="async", clock=ManualClock())
    store.announce("here:1")
    with pytest.raises(StoreBusy, match="listening at here:1"):
        LmdbStore(tmp_path, durability="async", clock=ManualClock())
    store.close()
    LmdbStore(tmp_path, durability="async", clock=ManualClock()).close()


def test_a_store_that_does_not_open_lets_the_lock_go(tmp_path: Path) -> None:
    (tmp_path / "sessions").mkdir()
    (tmp_path / "sessions" / "data.mdb").write_bytes(b"x" * 10_000)
    for _ in range(2):
        with pytest.raises(StoreError, match="must hold a store"):
            LmdbStore(tmp_path, durability="async", clock=ManualClock())
