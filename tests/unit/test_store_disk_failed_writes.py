"""Writes that reached the disk although they failed: all later reads agree on whether they exist."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from stepwell_server.errors import Unavailable
from stepwell_server.store.base import Batch
from stepwell_server.store.disk.lmdb import LmdbStore
from stepwell_server.store.disk.store import DiskStore
from stepwell_server.store.record import RecordBytes
from support.stores.broken_disk import io_error
from support.stores.disk_store import begin, crash_copy, fill_one, killed, opened, put, record, revisions


def doubtful(path: Path, monkeypatch: pytest.MonkeyPatch, batch: Batch) -> DiskStore:
    """A store that has `a` in its segment, and a batch in LMDB whose commit failed."""
    store = opened(path)
    begin(store, "a", "b")
    put(store, "a", revision=1)
    commit = LmdbStore._commit  # inside what says whether it failed

    def late(self: LmdbStore, batch: Batch) -> None:
        commit(self, batch)
        io_error()

    with monkeypatch.context() as patch:
        patch.setattr(os, "pwritev", io_error)
        patch.setattr(LmdbStore, "_commit", late)
        with pytest.raises(Unavailable):
            store.commit(batch)
    return store


CHANGED = Batch(puts=[("a", record("a", 2))])
ENDED = Batch(deletes=["a"])


@pytest.mark.parametrize("batch", [CHANGED, ENDED], ids=["put", "end"])
def test_reads_after_a_failed_commit_agree_with_the_next_start(
    path: Path, monkeypatch: pytest.MonkeyPatch, batch: Batch
) -> None:
    store = doubtful(path, monkeypatch, batch)
    found = store.get("a")
    again = opened(crash_copy(store))
    store.close()
    assert again.get("a") == found


def test_reads_after_a_failed_commit_stay_consistent(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = doubtful(path, monkeypatch, CHANGED)
    for revision in range(revisions(store)["a"] + 1, 6):
        put(store, "a", revision=revision)
        assert revisions(store) == {"a": revision, "b": 0}
        store = killed(store)
        assert revisions(store) == {"a": revision, "b": 0}


@pytest.mark.parametrize("is_read", [True, False])
def test_changes_after_an_unread_failed_commit_are_kept(
    path: Path, monkeypatch: pytest.MonkeyPatch, is_read: bool
) -> None:
    store = doubtful(path, monkeypatch, CHANGED)
    if is_read:
        assert revisions(store)["a"] == 2
    put(store, "a", revision=3)
    assert revisions(store)["a"] == 3
    store.close()
    store = opened(path)
    assert revisions(store)["a"] == 3


@pytest.mark.parametrize(
    "is_read",
    [True, False],
)
def test_a_session_that_has_ended_all_the_same_is_not_checkpointed_again(
    path: Path, monkeypatch: pytest.MonkeyPatch, is_read: bool
) -> None:
    store = doubtful(path, monkeypatch, ENDED)
    if is_read:
        assert store.get("a") is None
    store.close()
    store = opened(path)
    assert revisions(store) == {"b": 0}
    assert store.count() == 1


def test_a_reader_forgets_nothing_that_is_later_than_what_it_looked_at(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two read a doubtful session; one of them has changed it before the other returns."""
    store = doubtful(path, monkeypatch, CHANGED)
    later = store._later  # between a reader's look and its end there is nothing else to take hold of

    def slow(records: Any) -> list[bool]:
        monkeypatch.undo()
        found = later(records)
        put(store, "a", revision=revisions(store)["a"] + 1)
        return found

    monkeypatch.setattr(store, "_later", slow)
    store.get("a")
    assert revisions(store)["a"] == 3
    store.close()


def test_a_segment_that_was_truncated_though_that_failed_is_no_damage(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = opened(path, "sync")
    changed = fill_one(store)
    pwritev, failures = os.pwritev, list[int]()

    def late(file: int, buffers: Sequence[RecordBytes], at: int, flags: int = 0) -> int:
        written = pwritev(file, buffers, at, flags)
        if at == 0:
            failures.append(at)
            io_error()
        return written

    wanted, revision = revisions(store), 2
    with monkeypatch.context() as patch:
        patch.setattr(os, "pwritev", late)
        while not failures:
            put(store, changed[0], revision=revision, size=576)
            wanted[changed[0]] = revision
            revision += 1
        put(store, changed[1], revision=revision)
        wanted[changed[1]] = revision
        assert failures == [0], "there was room for a small one"
    store = killed(store, "sync")
    assert revisions(store) == wanted
