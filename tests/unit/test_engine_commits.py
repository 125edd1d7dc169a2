"""Group commits: in place or on a thread, in order, together, and each answered with its own result."""

from __future__ import annotations

import asyncio
import dataclasses
import itertools
import tempfile
import threading
from collections.abc import AsyncIterator, Callable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from stepwell_server.engine.commit import group_commit
from stepwell_server.engine.commit.group_commit import GroupCommit
from stepwell_server.errors import Internal, ServerError, Unavailable
from stepwell_server.store.access import local_writes, thread
from stepwell_server.store.access.batches import groups_of, merged
from stepwell_server.store.access.local_writes import MAX_BUILT_HERE
from stepwell_server.store.base import (
    SMALL,
    Batch,
    CommitResult,
    End,
    LocalStore,
    LogWrite,
    LogWriter,
    Parts,
    Tombstone,
    Write,
)
from stepwell_server.store.disk.lmdb import LmdbStore
from stepwell_server.store.disk.wal.writers import ThreadWriter
from stepwell_server.store.in_process import InProcessStore
from stepwell_server.store.memory import MemoryStore
from stepwell_server.store.record import RecordBytes
from support.clock import ManualClock
from support.engine.fake_executor import WAIT_S
from support.samples import examples
from support.stores.durable import until

pytestmark = pytest.mark.stores("memory")

HUGE = 10**9


class Slow(MemoryStore):
    """A durable store, as far as commits know; a commit waits while the gate is closed."""

    for_one_thread = False

    def __init__(self, *, waits_for_disk: bool = False) -> None:
        super().__init__()
        self.waits_for_disk = waits_for_disk
        self.gate = threading.Event()
        self.gate.set()
        self.inside = threading.Event()
        self.batches: list[Batch] = []
        self.threads: list[str] = []
        self.error: Exception | None = None
        self.needs_checkpoint = False
        self.tended: list[str] = []
        """Who did, and what those who wait had been told by then."""
        self.told: list[tuple[str, ServerError | None]] = []

    def checkpoint(self, *, briefly: bool = False) -> None:
        self.tended.append(f"{threading.current_thread().name} {''.join(name for name, _ in self.told)}")
        self.needs_checkpoint = False

    def commit(self, batch: Batch) -> None:
        self.threads.append(threading.current_thread().name)
        self.inside.set()
        assert self.gate.wait(WAIT_S)
        if self.error is not None:
            raise self.error
        self.batches.append(batch)
        super().commit(batch)


class Commits(GroupCommit):
    """Commits to a local store, and what only tests of its lanes ask."""

    def __init__(self, store: LocalStore) -> None:
        face = InProcessStore(store, ManualClock())
        super().__init__(face)
        self.lanes = face._lanes

    def may_commit_here(self, size: int) -> bool:
        return not self.lanes._handed_over and self.lanes._is_short(size)

    def close(self, timeout_s: float) -> bool:
        return self.lanes.close(timeout_s)


def error_of(told: CommitResult | ServerError) -> ServerError | None:
    return told if isinstance(told, ServerError) else None


class Told:
    """What those who wait were told, in that order."""

    def __init__(self, commits: GroupCommit, store: LocalStore) -> None:
        self._commits = commits
        self.told: list[tuple[str, ServerError | None]] = []
        if isinstance(store, Slow):
            store.told = self.told

    def submit(self, name: str, batch: Batch | None = None, size: int = 1, is_change: bool = False) -> None:
        batch = Batch(puts=[(name, b"record")]) if batch is None else batch

        def done(told: CommitResult | ServerError) -> None:
            self.told.append((name, error_of(told)))

        self._commits.submit(lambda: batch, size, done, is_change=is_change)

    @property
    def names(self) -> str:
        return "".join(name for name, error in self.told if error is None)


@pytest.fixture(params=[False, True], ids=["async", "sync"])
async def slow(request: pytest.FixtureRequest) -> AsyncIterator[tuple[Slow, Commits, Told]]:
    store = Slow(waits_for_disk=request.param)
    commits = Commits(store)
    yield store, commits, Told(commits, store)
    store.gate.set()
    await asyncio.wait_for(commits.idle(), WAIT_S)
    assert commits.close(WAIT_S)


async def inside(store: Slow) -> None:
    assert await asyncio.to_thread(store.inside.wait, WAIT_S)


async def hold_up(store: Slow, told: Told, name: str) -> None:
    """Have a large batch under way that does not end."""
    store.gate.clear()
    told.submit(name, size=HUGE)
    await inside(store)


async def release(store: Slow, commits: Commits) -> None:
    """Let all batches end."""
    store.gate.set()
    await commits.idle()


async def test_small_ones_are_made_in_place_unless_they_wait_for_the_disk(
    slow: tuple[Slow, Commits, Told],
) -> None:
    store, commits, told = slow
    told.submit("a")
    if store.waits_for_disk:
        assert told.told == []
        await commits.idle()
    assert told.names == "a"
    assert store.threads == ["stepwell-store" if store.waits_for_disk else "MainThread"]
    told.submit("b", size=HUGE)
    assert told.names == "a", "a large one never is"
    await commits.idle()
    assert told.names == "ab"
    assert store.threads[-1] == "stepwell-store"


@pytest.mark.parametrize(
    ("size", "where"), [(MAX_BUILT_HERE, "MainThread"), (MAX_BUILT_HERE + 1, "stepwell-store")]
)
async def test_records_for_the_thread_are_made_on_the_loop_unless_they_are_many(
    size: int, where: str
) -> None:
    store, made = Slow(waits_for_disk=True), []
    commits = Commits(store)

    def build() -> Batch:
        made.append(threading.current_thread().name)
        return Batch(puts=[("a", b"record")])

    commits.submit(build, size, lambda _: None)
    await asyncio.wait_for(commits.idle(), WAIT_S)
    assert commits.close(WAIT_S)
    assert (made, store.threads) == ([where], ["stepwell-store"])


async def test_deferred_work_runs_after_callers_are_answered(
    slow: tuple[Slow, Commits, Told],
) -> None:
    store, commits, told = slow
    store.needs_checkpoint = True
    told.submit("a")
    await commits.idle()
    await asyncio.sleep(0)
    if store.waits_for_disk:
        # the thread goes on with it while the event loop tells them
        assert commits.close(WAIT_S)
        assert [who.split()[0] for who in store.tended] == ["stepwell-store"]
    else:
        assert store.tended == ["MainThread a"]
        store.needs_checkpoint = True
        told.submit("b", size=HUGE)
        await commits.idle()
        assert store.tended[1:] == ["stepwell-store a"], "before: then the event loop may commit in place"


async def test_nothing_is_done_in_place_while_the_thread_has_the_store(
    slow: tuple[Slow, Commits, Told],
) -> None:
    store, commits, told = slow
    store.needs_checkpoint = True
    told.submit("a")
    await hold_up(store, told, "b")
    for _ in range(3):
        await asyncio.sleep(0)
    assert not any("MainThread" in who for who in store.tended)
    await release(store, commits)


async def test_none_overtakes_those_that_wait(slow: tuple[Slow, Commits, Told]) -> None:
    store, commits, told = slow
    await hold_up(store, told, "a")
    for name in "bcdef":
        told.submit(name, Batch(puts=[("x", name.encode())]))
    assert not commits.may_commit_here(1)
    await asyncio.sleep(0)
    assert told.told == []
    await release(store, commits)
    assert told.names == "abcdef"
    assert store.get("x") == b"f"
    assert len(store.batches) == 2, "what came meanwhile is kept together"


async def test_openings_that_were_committed_together_are_answered_a_few_at_a_time(
    logged: tuple[Logged, Commits, Told],
) -> None:
    store, _, told = logged
    names = "defghijk"
    for name in names:
        told.submit(name)
    told.submit("s", is_change=True)
    if store.waits_for_disk:
        await until(lambda: told.told)
    assert told.names == "s", "a step does not wait for them"
    store.gate.set()
    most = last = 0
    while len(told.told) < len(names) + 2:
        await asyncio.sleep(0)
        most, last = max(most, len(told.told) - last), len(told.told)
    assert told.names == f"sL{names}"
    assert most <= local_writes.ANSWERS_PER_ITERATION + 1, "L was committed before them"


class Logged(Slow):
    """A store that keeps small changes beside a commit."""

    has_log = True

    def __init__(self, *, waits_for_disk: bool = False) -> None:
        super().__init__(waits_for_disk=waits_for_disk)
        self.appended: list[tuple[str, str]] = []
        """The sessions of each, and who did it."""
        self.has_room = True
        self.log_gate = threading.Event()
        """A write to the log waits while it is closed."""
        self.log_gate.set()
        self.append_error: Exception | None = None

    def append(self, puts: Sequence[tuple[str, RecordBytes]]) -> bool:
        if self.append_error is not None:
            raise self.append_error
        if self.has_room:
            who = threading.current_thread().name
            self.appended.append(("".join(session_id for session_id, _ in puts), who))
        return self.has_room

    def begin_append(self, parts: Parts, after: LogWrite | None = None) -> LogWrite | None:
        return LoggedWrite(self, parts) if self.has_room else None

    def end_append(self, write: LogWrite, error: Exception | None, seconds: float) -> bool:
        if error is not None:
            raise error
        return write.count > 0

    def withdraw_append(self, write: LogWrite) -> None:
        pass

    def new_writer(self, on_end: Callable[[], None]) -> LogWriter:
        return ThreadWriter(on_end)


class LoggedWrite:
    """A write to the log of `Logged`."""

    def __init__(self, store: Logged, parts: Parts) -> None:
        self._store = store
        self._puts = [put for part in parts for put in part]
        self.count = len(self._puts)

    def make(self) -> None:
        assert self._store.log_gate.wait(WAIT_S)
        if self._store.append_error is not None:
            raise self._store.append_error
        who = threading.current_thread().name
        self._store.appended.append(("".join(session_id for session_id, _ in self._puts), who))


@pytest.fixture(params=[False, True], ids=["async", "sync"])
async def logged(request: pytest.FixtureRequest) -> AsyncIterator[tuple[Logged, Commits, Told]]:
    """Something large is being committed, and does not come back."""
    store = Logged(waits_for_disk=request.param)
    commits = Commits(store)
    told = Told(commits, store)
    await hold_up(store, told, "L")
    yield store, commits, told
    store.gate.set()
    await asyncio.wait_for(commits.idle(), WAIT_S)
    assert commits.close(WAIT_S)


async def test_small_changes_overtake_large_ones(logged: tuple[Logged, Commits, Told]) -> None:
    store, commits, told = logged
    for name in "abc":
        told.submit(name, is_change=True)
        await until(lambda: told.names.endswith(name))  # noqa: B023
    assert told.names == "abc", "and the large one still waits"
    who = "stepwell-store-log" if store.waits_for_disk else "MainThread"
    assert store.appended == [("a", who), ("b", who), ("c", who)]
    told.submit("d")
    told.submit("e", size=HUGE, is_change=True)
    await release(store, commits)
    assert told.names.startswith("abcL"), "other writes, and large ones, wait for the thread"
    assert sorted(told.names[4:]) == ["d", "e"]
    assert len(store.appended) == (4 if store.waits_for_disk else 3)


async def test_a_change_without_room_in_the_log_is_committed_in_order(
    logged: tuple[Logged, Commits, Told],
) -> None:
    store, commits, told = logged
    store.has_room = False
    told.submit("a", is_change=True)
    told.submit("b", is_change=True)
    assert told.names == ""
    await release(store, commits)
    assert sorted(told.names) == sorted("Lab")
    assert store.get("a") == store.get("b") == b"record"


async def test_what_the_log_refuses_is_told_and_it_goes_on(
    logged: tuple[Logged, Commits, Told], monkeypatch: pytest.MonkeyPatch
) -> None:
    store, commits, told = logged
    times = (
        itertools.count()
    )  # each look at the clock is a second later: what failed says nothing of what others cost
    if not store.waits_for_disk:
        monkeypatch.setattr(local_writes, "time", SimpleNamespace(perf_counter=lambda: float(next(times))))
    costs = commits.may_commit_here(1)
    store.append_error = ValueError("a secret detail")
    told.submit("a", is_change=True)
    await until(lambda: told.told)
    assert [(name, type(error)) for name, error in told.told] == [("a", Internal)]
    assert "secret" not in str(told.told)
    assert commits.may_commit_here(1) == costs
    monkeypatch.undo()
    store.append_error = None
    told.submit("b", is_change=True)
    await until(lambda: told.names == "b")


async def test_none_that_cannot_be_made_keeps_small_changes_from_passing(
    logged: tuple[Logged, Commits, Told],
) -> None:
    store, commits, told = logged

    def broken() -> Batch:
        raise ZeroDivisionError

    commits.submit(broken, 1, lambda told_of: told.told.append(("broken", error_of(told_of))), is_change=True)
    told.submit("a", is_change=True)
    await until(lambda: told.names == "a")
    await release(store, commits)
    assert [type(error) for name, error in told.told if name == "broken"] == [Internal]


async def test_whoever_commits_checkpoints_what_others_append(
    logged: tuple[Logged, Commits, Told],
) -> None:
    store, commits, told = logged
    store.needs_checkpoint = True
    told.submit("a", is_change=True)
    await until(lambda: told.names)
    assert store.tended == []
    store.gate.set()
    await until(lambda: store.tended and commits.is_idle)
    assert {who.split()[0] for who in store.tended} == {"stepwell-store"}


async def test_changes_that_arrive_during_a_write_to_the_log_share_the_next_one() -> None:
    store = Logged(waits_for_disk=True)
    commits = Commits(store)
    told = Told(commits, store)
    store.log_gate.clear()
    for name, size in (("a", 1), ("m", MAX_BUILT_HERE), ("b", 1), ("n", MAX_BUILT_HERE), ("c", 1)):
        told.submit(name, size=size, is_change=True)
    assert told.told == []
    store.log_gate.set()
    await until(lambda: commits.is_idle)
    assert [names for names, _ in store.appended] == ["a", "mn", "bc"], "small and large ones alternate"
    assert sorted(told.names) == list("abcmn")
    assert commits.close(WAIT_S)


async def test_what_the_log_refuses_later_is_committed() -> None:
    store = Logged(waits_for_disk=True)
    commits = Commits(store)
    told = Told(commits, store)
    store.log_gate.clear()
    told.submit("a", is_change=True)
    store.has_room = False
    told.submit("b", is_change=True)
    store.log_gate.set()
    await until(lambda: commits.is_idle)
    assert [names for names, _ in store.appended] == ["a"]
    assert store.get("b") == b"record"
    assert told.names == "ab"
    assert commits.close(WAIT_S)


async def test_a_large_change_that_the_log_refuses_at_once_is_committed_once(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The event loop may refuse it while the thread that built it is still in its call."""
    store = Logged(waits_for_disk=True)
    commits = Commits(store)
    told = Told(commits, store)
    store.has_room = False
    lanes, call = commits.lanes, commits.lanes._call

    def at_once(callback: Callable[[Any], None], argument: Any) -> bool:
        has_run = threading.Event()

        def run(argument: Any) -> None:
            callback(argument)
            has_run.set()

        return call(run, argument) and has_run.wait(WAIT_S)

    monkeypatch.setattr(lanes, "_call", at_once)
    told.submit("a", size=MAX_BUILT_HERE + 1, is_change=True)
    await until(lambda: commits.is_idle)
    assert commits.close(WAIT_S)
    await asyncio.sleep(0)
    assert told.told == [("a", None)]
    assert len(store.batches) == 1


async def test_the_end_waits_for_the_log() -> None:
    store = Logged(waits_for_disk=True)
    commits = Commits(store)
    told = Told(commits, store)
    store.log_gate.clear()
    told.submit("a", is_change=True)
    told.submit("b", is_change=True)
    ending = asyncio.create_task(commits.lanes.end(WAIT_S))
    await asyncio.sleep(0)
    store.log_gate.set()
    assert await ending
    assert told.names == "ab"


async def test_small_changes_do_not_wait_for_a_checkpoint(
    logged: tuple[Logged, Commits, Told],
) -> None:
    store, commits, told = logged
    await release(store, commits)
    await until(
        lambda: bool(store.tended)
    )  # the checkpoint after the first, which may come when that has been told
    store.waits_for_disk = True
    checkpoint, inside_it, go_on = store.checkpoint, threading.Event(), threading.Event()

    def slow(*, briefly: bool = False) -> None:
        inside_it.set()
        assert go_on.wait(WAIT_S)
        checkpoint(briefly=briefly)

    store.checkpoint = slow  # type: ignore[method-assign]
    store.needs_checkpoint = True
    told.submit("m", size=MAX_BUILT_HERE, is_change=True)
    assert await asyncio.to_thread(inside_it.wait, WAIT_S)
    await until(lambda: told.names.endswith("m"))
    told.submit("a", is_change=True)
    told.submit("b", size=SMALL + 1, is_change=True)
    told.submit("c")
    await until(lambda: "a" in told.names and "b" in told.names)
    assert {who for _, who in store.appended} == {"stepwell-store-log"}
    go_on.set()
    await commits.idle()
    assert sorted(told.names) == sorted("Lmabc")
    assert told.names[-1] == "c"


async def test_work_added_after_a_wake_up_is_done_before_the_end() -> None:
    store = Logged(waits_for_disk=True)
    commits = Commits(store)
    told = Told(commits, store)
    await hold_up(store, told, "L")
    store.needs_checkpoint = True
    told.submit("a", is_change=True)
    await until(lambda: told.names)
    told.submit("M", size=HUGE)
    assert commits.close(0) is False
    store.gate.set()
    assert commits.close(WAIT_S)
    await commits.idle()
    assert told.names == "aLM"


async def test_in_place_little_is_checkpointed_at_once_until_it_has_kept_up() -> None:
    class Behind(Logged):
        pieces: ClassVar[list[bool]] = []

        def checkpoint(self, *, briefly: bool = False) -> None:
            self.pieces.append(briefly)
            self.behind -= 1

    store = Behind()
    commits = Commits(store)
    told = Told(commits, store)
    store.needs_checkpoint, store.behind = True, 3
    told.submit("a")
    told.submit("b")
    await until(lambda: store.behind == 0)
    await asyncio.sleep(0)
    assert store.pieces == [True] * 3
    store.behind = local_writes.MAX_BEHIND + 1
    assert commits.may_commit_here(SMALL)
    assert not commits.may_commit_here(SMALL + 1), "a thread does that, and checkpoints"
    store.behind = 0
    assert commits.close(WAIT_S)


async def test_a_transaction_takes_only_so_much(
    slow: tuple[Slow, Commits, Told], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(thread, "MAX_RECORDS", 10)
    store, commits, told = slow
    await hold_up(store, told, "a")
    for name, size in (("b", 4), ("c", 5), ("d", 1), ("e", 25), ("f", 0), ("g", 9), ("h", 9)):
        told.submit(name, size=size)
    await release(store, commits)
    assert ["".join(i for i, _ in batch.puts) for batch in store.batches] == ["a", "bcd", "e", "fgh"]
    assert told.names == "abcdefgh"


async def test_a_batch_that_cannot_be_built_fails_alone(slow: tuple[Slow, Commits, Told]) -> None:
    store, commits, told = slow
    await hold_up(store, told, "a")

    def broken() -> Batch:
        raise ZeroDivisionError

    told.submit("b")
    commits.submit(broken, 1, lambda told_of: told.told.append(("broken", error_of(told_of))))
    told.submit("c")
    await release(store, commits)
    assert told.names == "abc"
    assert [type(error) for name, error in told.told if name == "broken"] == [Internal]


@pytest.mark.parametrize("error", [Unavailable("no room"), ValueError("a secret detail")])
async def test_a_failed_transaction_is_reported_to_all_its_changes(
    slow: tuple[Slow, Commits, Told], error: Exception
) -> None:
    store, commits, told = slow
    await hold_up(store, told, "a")
    told.submit("b", Batch(deletes=["x"]))
    told.submit("c")
    told.submit("d", Batch(puts=[("x", b"1")]))  # not together with what deletes it
    told.submit("e")
    store.error = error
    await release(store, commits)
    store.error = None
    assert [name for name, _ in told.told] == [*"abcde"]
    said = [why for _, why in told.told]
    assert {type(why) for why in said} == {Unavailable if isinstance(error, Unavailable) else Internal}
    assert "secret" not in "".join(str(why) for why in said)
    told.submit("f")
    await commits.idle()
    assert told.names == "f", "it goes on"


async def test_changes_that_fail_together_are_tried_one_by_one(
    slow: tuple[Slow, Commits, Told], monkeypatch: pytest.MonkeyPatch
) -> None:
    store, commits, told = slow
    await hold_up(store, told, "a")
    told.submit("b", Batch(deletes=["x"]))
    told.submit("c", Batch(puts=[("y", b"1")]))
    told.submit("d", Batch(deletes=["z"]))
    kept, commit = [], store.commit

    def full(batch: Batch) -> None:
        commit(batch)
        if batch.puts:
            raise Unavailable("no room")
        kept.append(batch.deletes)

    monkeypatch.setattr(store, "commit", full)
    await release(store, commits)
    assert kept[-2:] == [["x"], ["z"]]
    assert [(name, type(why)) for name, why in told.told] == [
        ("a", type(None)),
        ("b", type(None)),
        ("c", Unavailable),
        ("d", type(None)),
    ]


async def test_it_says_when_it_is_full_and_when_it_is_not_any_more(
    slow: tuple[Slow, Commits, Told], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(group_commit, "MAX_WAITING", 5)
    store, commits, told = slow
    rooms: list[bool] = []
    monkeypatch.setattr(commits, "_on_room", lambda: rooms.append(commits.is_full))
    store.gate.clear()
    monkeypatch.setattr(commits.lanes._cost, "_each_s", 1.0)
    told.submit("a", size=4)
    await inside(store)
    full = [commits.is_full]
    told.submit("b", size=0)
    full.append(commits.is_full)
    assert full == [False, True], "one of no records counts as well"
    await release(store, commits)
    assert rooms == [False]
    assert commits.is_idle


async def test_closing_commits_the_remaining_changes(slow: tuple[Slow, Commits, Told]) -> None:
    store, commits, told = slow
    await hold_up(store, told, "a")
    told.submit("b")
    assert commits.close(0.01) is False
    store.gate.set()
    assert commits.close(WAIT_S) is True
    await commits.idle()
    assert told.names == "ab"
    assert store.get("b") == b"record"


async def test_it_learns_what_a_record_costs_in_place() -> None:
    store = Slow()
    commits = Commits(store)
    assert commits.may_commit_here(100)
    for _ in range(100):
        commits.lanes._cost.learn(100, 1.0)
    assert not commits.may_commit_here(100)
    for _ in range(300):
        commits.lanes._cost.learn(100, 1e-6)
    assert commits.may_commit_here(100)
    assert commits.close(0)


ids = st.sampled_from("abc")
some = st.lists(ids, max_size=2)
stones = st.builds(
    Tombstone,
    ids,
    st.sampled_from([End.EXPIRED, End.CLOSED]),
    st.just(1.0),
    closes=st.tuples(st.integers(1, 99)),
)
batches = st.builds(
    Batch,
    puts=st.lists(st.tuples(ids, st.binary(min_size=1, max_size=2)), max_size=2),
    deletes=some,
    forgets=some,
    tombstones=st.lists(stones, max_size=2),
    counts=st.lists(st.tuples(st.sampled_from("mn"), st.integers(-2, 2)), max_size=2),
    tenant_counts=st.lists(st.tuples(st.sampled_from(["\x1f", "m\x1f"]), st.integers(-2, 2)), max_size=2),
    documents=st.lists(st.tuples(ids, st.none() | st.binary(max_size=1)), max_size=2),
)


def content(store: LocalStore) -> list[object]:
    found: list[object] = [(i, store.get(i), store.tombstones([i])[0]) for i in "abc"]
    counts = [store.count_of(name) for name in ("m", "n", "\x1f", "m\x1f")]
    return [*found, store.count(), *counts, store.documents()]


def together(batches: Sequence[Batch]) -> list[Batch]:
    writes = [Write(Batch, 1, lambda _error: None) for _ in batches]
    for write, batch in zip(writes, batches, strict=True):
        write.batch = batch
    groups = groups_of(writes)
    assert [write for group in groups for write in group] == writes
    return [merged([write.batch for write in group]) for group in groups]


@settings(max_examples=examples(500))
@given(st.lists(batches, min_size=2, max_size=8))
def test_together_is_as_one_by_one(batches: list[Batch]) -> None:
    one_by_one, at_once = MemoryStore(), MemoryStore()
    for batch in batches:
        one_by_one.commit(batch)
    for batch in together(batches):
        at_once.commit(batch)
    assert content(at_once) == content(one_by_one)


@settings(max_examples=30)
@given(st.lists(st.lists(batches, min_size=1, max_size=6), min_size=1, max_size=6))
def test_so_it_is_on_disk(runs: list[list[Batch]]) -> None:
    one_by_one = MemoryStore()
    with tempfile.TemporaryDirectory() as folder:
        store = LmdbStore(Path(folder), durability="async", clock=ManualClock())
        for batches in runs:
            for batch in batches:
                one_by_one.commit(batch)
            for batch in together(batches):
                store.commit(batch)
            assert content(store) == content(one_by_one)
        store.close()


def test_unrelated_changes_are_one_transaction() -> None:
    made = [Batch(puts=[(f"s{i}", b"1")], forgets=[f"s{i}"], counts=[("m", 1)]) for i in range(100)]
    ended = [Batch(deletes=[f"t{i}"], tombstones=[Tombstone(f"t{i}", End.CLOSED, 1.0)]) for i in range(100)]
    assert len(together([*made, *ended])) == 1
    assert len(together([*ended, *made])) == 1
    assert len(together([*ended, Batch(puts=[("t5", b"1")])])) == 2
    assert len(together([*ended, Batch(forgets=["t5"])])) == 2
    named = [
        Batch(documents=[("t5", b"1")]),
        Batch(documents=[("t5", None)]),
        Batch(documents=[("t5", b"2")]),
    ]
    (batch,) = together([*ended, *named])
    assert batch.documents == [("t5", b"1"), ("t5", None), ("t5", b"2")], "a document is no session"


def test_nothing_that_a_batch_says_is_lost_where_several_are_committed_together() -> None:
    """A field that the merging forgets would be lost only beside other commits."""
    one = Batch(
        puts=[("a", b"1")],
        deletes=["b"],
        forgets=["c"],
        tombstones=[Tombstone("b", End.CLOSED, 1.0)],
        counts=[("m", 1)],
        tenant_counts=[("t", 1)],
        documents=[("d", b"1")],
        goes_back=True,
        follows=np.array([1], np.uint64),
        stamps=np.array([2], np.uint64),
        resized=["a"],
        delete_follows=np.array([3], np.uint64),
        undoes=["b"],
        min_idle_s=np.array([4.0]),
        max_idle_s=np.array([5.0]),
        documents_follow={"d": None},
    )
    nothing, both = Batch(), merged([one, Batch()])
    for field in dataclasses.fields(Batch):
        asked, kept = getattr(one, field.name), getattr(both, field.name)
        assert not np.array_equal(asked, getattr(nothing, field.name)), f"{field.name} is not tried"
        assert (
            np.array_equal(list(kept), list(asked))
            if isinstance(asked, (list, np.ndarray))
            else kept == asked
        ), field.name
