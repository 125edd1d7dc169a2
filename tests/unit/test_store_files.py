"""The files of a store are removed, replaced or full while it is used: it says so and acknowledges nothing more."""

from __future__ import annotations

import errno
import os
import resource
import shutil
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from stepwell_server.errors import StoreGone, Unavailable
from stepwell_server.store.base import StoreBusy
from stepwell_server.store.disk import lock as lock_module
from stepwell_server.store.disk.files import OpenFiles, explain
from stepwell_server.store.disk.lmdb import LmdbStore
from stepwell_server.store.disk.lock import DirectoryLock
from stepwell_server.store.disk.store import DiskStore
from support.clock import ManualClock
from support.processes import opened_below
from support.stores.broken_disk import no_space
from support.stores.disk_store import begin, fill_one, opened, opened_base, put, revisions

PARTS = ["", "server.lock", "sessions/data.mdb", "wal/0", "wal/1"]


def remove(path: Path) -> None:
    shutil.rmtree(path) if path.is_dir() else path.unlink()


def rename(path: Path) -> None:
    path.rename(path.with_name("elsewhere"))


def replace(path: Path) -> None:
    """Put an equal copy in its place."""
    copy = path.with_name("copy")
    shutil.copytree(path, copy) if path.is_dir() else shutil.copy(path, copy)
    rename(path)
    copy.rename(path)


@pytest.mark.parametrize("part", PARTS)
@pytest.mark.parametrize("how", [remove, rename, replace])
def test_a_moved_store_file_ends_the_store(path: Path, part: str, how: Callable[[Path], None]) -> None:
    store = opened(path, "sync")
    begin(store, "a")
    assert not store.check().problem
    how(path / part)
    with pytest.raises(StoreGone, match=rf"^{path / part} must stay where it is while a server uses it; "):
        store.check()
    with pytest.raises(StoreGone, match=str(path / part)):
        put(store, "a", revision=1)
    with pytest.raises(StoreGone, match=str(path / part)):
        begin(store, "b")


def test_what_came_back_to_its_place_does_not_count(path: Path) -> None:
    """Others may have used it meanwhile."""
    store = opened(path)
    begin(store, "a")
    path.rename(path.with_name("elsewhere"))
    with pytest.raises(StoreGone):
        store.check()
    path.with_name("elsewhere").rename(path)
    with pytest.raises(StoreGone):
        store.check()
    with pytest.raises(StoreGone):
        put(store, "a", revision=1)


def test_what_was_acknowledged_before_it_was_noticed_is_in_the_folder_that_was_renamed(path: Path) -> None:
    store = opened(path)
    fill_one(store)
    path.rename(path.with_name("elsewhere"))
    put(store, "s0", revision=7)
    kept = revisions(store)
    with pytest.raises(StoreGone):
        store.check()
    store.close()
    again = opened(path.with_name("elsewhere"))
    assert revisions(again) == kept
    assert kept["s0"] == 7


def test_a_segment_is_not_turned_in_a_folder_that_is_gone(path: Path) -> None:
    """Without anybody having looked: no more is lost than fits into one."""
    store = opened(path)
    fill_one(store)
    store.checkpoint()
    shutil.rmtree(path)
    refusals = [error for revision in range(2, 200) if (error := refused(store, revision))]
    assert 1 < len(refusals) < 198
    assert str(path) in refusals[0].message


def refused(store: DiskStore, revision: int) -> StoreGone | None:
    try:
        put(store, "s0", revision=revision)
    except StoreGone as error:
        return error
    return None


def test_looking_after_a_store_that_is_well_changes_nothing(path: Path) -> None:
    store = opened(path)
    begin(store, "a")
    before = opened_below(path)
    assert before
    for _ in range(100):
        assert store.check().reopened == 0
    assert opened_below(path) == before


def test_a_folder_that_cannot_be_looked_at_is_not_gone(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = opened(path)
    stat = os.stat

    def refuse(where: Any, **options: Any) -> os.stat_result:
        if where == path:
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))
        return stat(where, **options)

    monkeypatch.setattr(os, "stat", refuse)
    assert not store.check().problem


def test_a_closed_store_lets_all_descriptors_go(path: Path) -> None:
    for _ in range(3):
        opened(path).close()
        assert opened_below(path) == []


linux_only = pytest.mark.skipif(not hasattr(socket, "SO_PEERCRED"), reason="names are locked on Linux only")


@linux_only
@pytest.mark.parametrize("how", [remove, rename])
def test_another_server_cannot_begin_under_the_name_before_the_first_has_noticed(
    path: Path, how: Callable[[Path], None]
) -> None:
    store = opened(path)
    how(path)
    with pytest.raises(
        StoreBusy, match=rf"{path} must be used by one server.*process {os.getpid()} still runs with a"
    ):
        opened(path)
    store.close()
    opened(path).close()


@linux_only
def test_others_with_the_same_name_elsewhere_are_no_concern(tmp_path: Path) -> None:
    for parent in ("a", "b"):
        opened(tmp_path / parent / "data")


@linux_only
def test_a_name_held_by_another_user_does_not_stop_a_start(
    path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    opened(path)
    path.rename(path.with_name("elsewhere"))
    monkeypatch.setattr(os, "geteuid", lambda: 12345)
    # a process of another user would be needed
    monkeypatch.setattr("stepwell_server.store.disk.lock._owner", lambda _: (17, 54321))
    opened(path).close()
    assert "process 17 of user 54321 holds the lock name of data directory" in caplog.text


@linux_only
def test_the_name_of_a_mount_point_is_not_locked(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two services may each have a mount of their own under one name."""
    # a real mount needs privileges: the check and its consequence are tested separately
    assert lock_module._is_mount_point(Path("/proc"))
    assert not lock_module._is_mount_point(path)
    monkeypatch.setattr(lock_module, "_is_mount_point", lambda _: True)
    opened(path)
    path.rename(path.with_name("elsewhere"))
    opened(path).close()


def test_a_lock_file_that_was_replaced_while_it_was_locked_is_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lock_one = (
        DirectoryLock._lock
    )  # between it and the look at the name there is nothing else to take hold of

    def too_late(lock: DirectoryLock, path: Path) -> int:
        file = lock_one(lock, path)
        monkeypatch.setattr(DirectoryLock, "_lock", lock_one)
        path.unlink()
        return file

    monkeypatch.setattr(DirectoryLock, "_lock", too_late)
    lock = DirectoryLock(tmp_path, clock=ManualClock())
    with pytest.raises(StoreBusy):
        DirectoryLock(tmp_path, clock=ManualClock())
    lock.release()


def test_watching_nothing_finds_nothing() -> None:
    watched = OpenFiles()
    watched.check()
    watched.give_up("it is broken")
    watched.give_up("it is another's")
    with pytest.raises(StoreGone, match=r"^it is broken$"):
        watched.check()


class Free(NamedTuple):
    f_bavail: int
    f_frsize: int = 512


@pytest.mark.parametrize(
    ("error", "blocks", "is_full"),
    [
        (OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)), 16, True),
        (OSError(errno.EIO, os.strerror(errno.EIO)), 16, True),
        (OSError(errno.EIO, os.strerror(errno.EIO)), 10**6, False),
        (OSError(errno.EFBIG, os.strerror(errno.EFBIG)), 16, False),
    ],
)
def test_a_full_disk_and_a_broken_one_are_distinguished(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: OSError, blocks: int, is_full: bool
) -> None:
    monkeypatch.setattr(os, "statvfs", lambda _: Free(blocks))
    text = explain(error, tmp_path)
    wanted = f"no room: the disk of {tmp_path} is full, {blocks * 512} bytes are free ({error})"
    assert text == (wanted if is_full else str(error))


@pytest.mark.parametrize("code", [errno.EFBIG, errno.EIO])
def test_a_limit_on_files_and_a_broken_disk_are_distinguished(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int
) -> None:
    monkeypatch.setattr(resource, "getrlimit", lambda _: (4096, 8192))
    error = OSError(code, os.strerror(code))
    assert explain(error, tmp_path) == (
        f"no room: a file of this process must stay within 4096 bytes, its RLIMIT_FSIZE ({error})"
    )


def test_changes_on_a_full_disk_are_refused_with_that_reason(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = opened_base(path)
    monkeypatch.setattr(LmdbStore, "_commit", no_space)
    with pytest.raises(
        Unavailable, match=rf"the disk of {path}/sessions is full, \d+ bytes are free \(.*No space left"
    ):
        begin(store, "a")
