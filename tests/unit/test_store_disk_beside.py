"""What is appended to the log beside a commit: when it is kept, where it finds room, and that nothing of it is lost."""

from __future__ import annotations

import itertools
import os
import queue
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from stepwell_server.errors import StoreGone, Unavailable
from stepwell_server.store.base import Batch
from stepwell_server.store.disk.lmdb import Durability
from stepwell_server.store.disk.store import DiskStore
from support.stores.broken_disk import failing
from support.stores.disk_store import (
    DURABILITIES,
    base_of,
    begin,
    crash_copy,
    end,
    fill_one,
    killed,
    opened,
    put,
    record,
    revisions,
    template,
    wal_of,
)
from support.stores.records import decode

WAIT_S = 60.0


def append(store: DiskStore, *session_ids: str, revision: int) -> bool:
    return store.append([(session_id, record(session_id, revision)) for session_id in session_ids])


class Held:
    """A commit of a store that another thread has begun, and which does not come back while the block runs."""

    def __init__(self, store: DiskStore, monkeypatch: pytest.MonkeyPatch, commit: Callable[[], Any]) -> None:
        self._inside, self._go_on = threading.Event(), threading.Event()
        real = base_of(store).commit

        def slow(batch: Batch) -> None:
            self._inside.set()
            assert self._go_on.wait(WAIT_S)
            real(batch)

        monkeypatch.setattr(base_of(store), "commit", slow)
        self._pool = ThreadPoolExecutor(1)
        self._commit = commit

    def __enter__(self) -> None:
        self._done = self._pool.submit(self._commit)
        assert self._inside.wait(WAIT_S)

    def __exit__(self, *_: object) -> None:
        self._go_on.set()
        self._done.result(WAIT_S)
        self._pool.shutdown()


@DURABILITIES
def test_it_is_kept_while_a_transaction_is_under_way(
    path: Path, durability: Durability, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = opened(path, durability)
    assert store.has_log
    begin(store, "a", "b")
    with Held(store, monkeypatch, lambda: begin(store, "c")):
        assert append(store, "a", revision=1)
        assert append(store, "a", "b", revision=2)
        assert revisions(store) == {"a": 2, "b": 2}
        crashed = opened(crash_copy(store), durability)
        assert revisions(crashed) == {"a": 2, "b": 2}
        crashed.close()
    assert revisions(store) == {"a": 2, "b": 2, "c": 0}
    store.close()
    again = opened(path, durability)
    assert revisions(again) == {"a": 2, "b": 2, "c": 0}


@DURABILITIES
def test_it_is_kept_while_a_checkpoint_is_under_way(
    path: Path, durability: Durability, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = opened(path, durability)
    changed = fill_one(store)
    before = revisions(store)
    for revision in range(2, 100):  # until half of the other segment is used
        if not store.needs_checkpoint:
            put(store, changed[-1], revision=revision)
    assert store.needs_checkpoint
    latest = revisions(store)[changed[-1]]
    with Held(store, monkeypatch, store.checkpoint):
        assert append(store, changed[0], revision=latest + 5)
    expected = before | {changed[0]: latest + 5, changed[-1]: latest}
    assert revisions(store) == expected
    store = killed(store, durability)
    assert revisions(store) == expected


def test_large_changes_leave_room_for_small_ones(path: Path) -> None:
    store = opened(path, segment_bytes=1 << 20)
    many = [f"m{number:04}" for number in range(600)]
    begin(store, "a", *many)
    wal = wal_of(store)
    revision = 0
    while wal.append([template(many, revision := revision + 1)]):
        pass
    assert append(store, "a", revision=1)
    assert sum(append(store, "a", revision=revision) for revision in range(2, 300)) > 200


def test_without_room_it_reports_that_and_a_commit_makes_room(path: Path) -> None:
    store = opened(path)
    begin(store, *(names := [f"s{number}" for number in range(200)]))
    place = next(place for place, name in enumerate(names) if not append(store, name, revision=1))
    name = names[place]
    assert revisions(store)[name] == 0, "nothing of it is there"
    store.commit(Batch(puts=[(name, record(name, 1))]))
    assert revisions(store) == {each: int(at <= place) for at, each in enumerate(names)}


@DURABILITIES
def test_it_waits_for_a_large_write_that_is_under_way(
    path: Path, durability: Durability, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = opened(path, durability)
    begin(store, "a", "b")
    inside, go_on, pwritev = threading.Event(), threading.Event(), os.pwritev

    def slow(*given: Any) -> int:
        if threading.current_thread() is not threading.main_thread() and not inside.is_set():
            inside.set()
            assert go_on.wait(WAIT_S)
        return pwritev(*given)

    monkeypatch.setattr(os, "pwritev", slow)
    with ThreadPoolExecutor(2) as pool:
        writing = pool.submit(put, store, "a", revision=1)
        assert inside.wait(WAIT_S)
        if durability == "async":
            assert not append(store, "b", revision=1), "the event loop does not wait for it"
        appending = pool.submit(append, store, "b", revision=1) if durability == "sync" else None
        assert revisions(store) == {"a": 0, "b": 0}
        go_on.set()
        writing.result(WAIT_S)
        assert appending is None or appending.result(WAIT_S)
    assert revisions(store) == {"a": 1, "b": int(durability == "sync")}


@DURABILITIES
def test_where_a_transaction_is_flushed_a_checkpoint_is_made_in_pieces(
    path: Path, durability: Durability, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = opened(path, durability, segment_bytes=1 << 20)
    names = [f"s{number:04}" for number in range(8000)]
    begin(store, *names)
    later = itertools.count(1)
    for start in itertools.cycle(range(0, 8000, 1000)):
        if store.needs_checkpoint:
            break
        put(store, *names[start : start + 1000], revision=next(later), size=200)
    sizes, real = list[int](), base_of(store).commit

    def commit(batch: Batch) -> None:
        sizes.append(len(batch.puts))
        real(batch)

    monkeypatch.setattr(base_of(store), "commit", commit)
    before = revisions(store)
    store.checkpoint()
    assert store.behind == 0
    assert sum(sizes) > 1000
    assert (max(sizes) <= 256) == (durability == "sync")
    assert revisions(store) == before


@pytest.mark.parametrize("error", [OSError("no disk"), Unavailable("no room"), StoreGone("no folder")])
def test_what_could_not_be_written_is_left_to_a_commit(
    path: Path, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    store = opened(path)
    begin(store, "a")
    with monkeypatch.context() as patch:
        patch.setattr(wal_of(store), "append", failing(error))
        assert not append(store, "a", revision=1)
    put(store, "a", revision=1)
    assert revisions(store) == {"a": 1}
    store.close()
    assert not append(store, "a", revision=2), "nor after the end"


def test_a_segment_is_rotated_only_onto_an_empty_one(path: Path) -> None:
    store = opened(path)
    fill_one(store)
    wal = wal_of(store)
    assert not wal.rotate()
    while store.needs_checkpoint or wal.to_checkpoint()[0]:
        ids, _ = wal.to_checkpoint()
        wal.checkpointed(ids)
    assert wal.rotate()


def test_nothing_is_behind_once_no_checkpoint_is_needed(path: Path) -> None:
    """The event loop makes checkpoints, a little in each iteration, as long as something is behind."""
    store = opened(path, segment_bytes=1 << 16)
    begin(store, "a")
    later = itertools.count(1)
    while not store.needs_checkpoint:
        put(store, "a", revision=next(later))
    store.checkpoint(briefly=True)
    assert (store.needs_checkpoint, store.behind) == (False, 0)


@pytest.mark.parametrize("error", [Unavailable("no room"), StoreGone("no folder")])
def test_to_keep_up_twice_as_much_is_checkpointed_as_is_written(
    path: Path, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    store = opened(path, segment_bytes=1 << 16)
    names = [f"s{number:03}" for number in range(200)]
    begin(store, *names)
    later = itertools.count(1)
    while not store.needs_checkpoint:
        start = 50 * (revision := next(later)) % 200
        put(store, *names[start : start + 50], revision=revision)
    assert store.behind == 100
    put(store, *names[:10], revision=next(later))
    assert store.behind == 120
    store.checkpoint(briefly=True)
    assert store.behind == 120 - 64
    store.checkpoint()
    assert store.behind == 0
    put(store, *names[:10], revision=next(later))
    assert store.behind == 20
    monkeypatch.setattr(base_of(store), "commit", lambda _: (_ for _ in ()).throw(error))
    store.checkpoint(briefly=True)
    assert store.behind == 0, "not again and again where it fails"


@DURABILITIES
def test_two_threads_lose_nothing(path: Path, durability: Durability) -> None:
    """One begins, changes and ends sessions and checkpoints, the other appends; segments rotate all the time."""
    store = opened(path, durability)
    mine = [f"w{number}" for number in range(5)]
    begin(store, "m", *mine)
    handed, kept = queue.SimpleQueue[int](), threading.Semaphore(0)
    last, appended = 200, list[int]()

    def appending() -> None:
        for revision in range(1, last + 1):
            if append(store, *mine, revision=revision):
                appended.append(revision)
            else:
                handed.put(revision)  # there is no room: the other thread makes some
                assert kept.acquire(timeout=WAIT_S)

    pool = ThreadPoolExecutor(1)
    done = pool.submit(appending)
    revision = 0
    while not done.done() or revision < 50:
        revision += 1
        put(store, "m", revision=revision)
        begin(store, f"n{revision}")
        store.checkpoint()
        end(store, f"n{revision}")
        if revision % 10 == 0:
            store.commit(Batch(puts=[("m", record("m", revision))], forgets=["m"], goes_back=True))
        while not handed.empty():
            put(store, *mine, revision=handed.get())
            kept.release()
        assert decode("m", store.get("m") or b"").revision == revision
    done.result()
    pool.shutdown()
    assert len(appended) > last // 10
    expected = {"m": revision} | dict.fromkeys(mine, last)
    assert revisions(store) == expected
    store = killed(store, durability)
    assert revisions(store) == expected
    store.close()
    store = opened(store.path, durability)
    assert revisions(store) == expected
