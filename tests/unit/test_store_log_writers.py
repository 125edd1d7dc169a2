"""The writers of the log: native and in Python, by the same rules, also when the disk is full, short of room or fails."""

from __future__ import annotations

import asyncio
import dataclasses
import errno
import os
import resource
import sys
import time
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

import pytest

from stepwell._admin.record_file import CHECKSUM_BYTES
from stepwell_server.core.cost import Cost
from stepwell_server.errors import ServerError, Unavailable
from stepwell_server.store.access.local_writes import MAX_BUILT_HERE
from stepwell_server.store.access.log_queue import LogQueue
from stepwell_server.store.base import ALL_KEPT, SMALL, Answer, Batch, LogWrite, LogWriter, Store, Write
from stepwell_server.store.disk.store import DiskStore
from stepwell_server.store.disk.wal import layout, writers
from stepwell_server.store.disk.wal.segment import Segment
from stepwell_server.store.in_process import InProcessStore
from stepwell_server.store.record import Puts
from support.clock import ManualClock
from support.engine.fake_executor import WAIT_S
from support.stores.disk_store import (
    begin,
    crash_copy,
    in_lmdb,
    killed,
    opened,
    record,
    revisions,
    wal_of,
    warnings,
)

SIZE = 1 << 16
MAX_CALLS = 27
"""Of Python functions, from a lone change to the writer. Lower it with every change that needs fewer."""


@pytest.fixture(params=["native", "python"], autouse=True)
def kind(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """The kind of writer."""
    kind: str = request.param
    if kind == "native" and writers.NATIVE is None:
        pytest.skip("the native module is not installed")
    if kind == "python":
        monkeypatch.setattr(writers, "NATIVE", None)
    return kind


@contextmanager
def file_limit(size: int) -> Iterator[None]:
    """Limit how long this process may make a file."""
    _, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (hard, hard))


class Writing:
    """A segment and its writer."""

    def __init__(self, folder: Path) -> None:
        self.segment = Segment(folder / "0", SIZE, 7, flush=True, make=True)
        self.segment.truncate(0)
        self._ended = asyncio.Event()
        self.writer = writers.new_writer([self.segment.descriptor], self._ended.set)

    async def write(self, *parts: list[tuple[str, bytes]]) -> Exception | None:
        """Append entries; the error of the write."""
        write = self.segment.addition(parts)
        assert write is not None
        self.writer.begin(write)
        error, seconds = await self.taken()
        assert seconds > 0
        assert self.writer.take() is None, "each write is taken once"
        if error is None:
            self.segment.written(write)
        return error

    async def taken(self) -> tuple[Exception | None, float]:
        """The next write that ends."""
        while (result := self.writer.take()) is None:
            await self.until_one_ends()
        return result

    async def until_one_ends(self) -> None:
        await asyncio.wait_for(self._ended.wait(), WAIT_S)
        self._ended.clear()

    @property
    def data(self) -> bytes:
        return self.segment.path.read_bytes()

    @property
    def stored(self) -> dict[str, int]:
        """The sessions that the next start finds."""
        return layout.content_of(self.data).places.last


@pytest.fixture
async def writing(tmp_path: Path) -> AsyncIterator[Writing]:
    made = Writing(tmp_path)
    yield made
    assert made.writer.close(WAIT_S)
    await asyncio.sleep(0)
    made.segment.close()


def one(session_id: str, revision: int = 1, size: int = 20) -> list[tuple[str, bytes]]:
    return [(session_id, record(session_id, revision, size))]


async def test_what_was_written_is_found_at_the_next_start(writing: Writing) -> None:
    assert await writing.write(one("a")) is None
    assert await writing.write(one("b"), [*one("c"), *one("d")]) is None
    assert writing.stored == writing.segment.offsets
    assert set(writing.stored) == {"a", "b", "c", "d"}
    assert writing.segment.value("c") == [record("c", 1)]


@pytest.mark.parametrize("room", [1, 40, 200, 300, 700])
async def test_nothing_of_a_write_without_room_is_found(writing: Writing, room: int) -> None:
    """The file system takes only the first bytes: a part of the first entry, all of it, or more."""
    assert await writing.write(one("a")) is None
    os.ftruncate(writing.segment.descriptor, writing.segment.end)
    with file_limit(writing.segment.end + room):
        error = await writing.write(one("b", size=100), one("c", size=1000))
    assert isinstance(error, OSError)
    assert error.errno == errno.EFBIG
    assert set(writing.stored) == {"a"}
    assert await writing.write(one("d")) is None, "the next one takes its place"
    assert set(writing.stored) == {"a", "d"}


async def test_a_write_behind_a_failed_one_that_was_not_taken_is_not_made(writing: Writing) -> None:
    """The event loop lays it out before it knows of the failure. It would be found behind a gap."""
    assert await writing.write(one("a")) is None
    failed = writing.segment.addition([one("b")])
    assert failed is not None
    behind = writing.segment.addition([one("c")], after=failed)
    assert behind is not None
    writing.writer.begin(dataclasses.replace(failed, at=2**63 - 1))  # no file is that long
    await writing.until_one_ends()
    writing.writer.begin(behind)
    results = [await writing.taken(), await writing.taken()]
    assert [isinstance(error, OSError) for error, _ in results] == [True, True]
    assert set(writing.stored) == {"a"}
    assert await writing.write(one("d")) is None, "the next one takes their place"
    assert set(writing.stored) == {"a", "d"}


async def test_it_ends_after_the_write_that_runs(tmp_path: Path) -> None:
    writing = Writing(tmp_path)
    write = writing.segment.addition([one("a")])
    assert write is not None
    writing.writer.begin(write)
    assert writing.writer.close(WAIT_S)
    assert set(writing.stored) == {"a"}
    await asyncio.sleep(0)
    writing.segment.close()


# --------------------------------------------------------------------------------------------- the store behind it


class Served:
    """A store on disk as the engine uses it."""

    def __init__(self, local: DiskStore) -> None:
        self.local = local
        self.store: Store = InProcessStore(local, ManualClock())

    def change(
        self, session_id: str, revision: int, size: int = 20, steps: Sequence[object] = (), count: int = 1
    ) -> asyncio.Future[Answer]:
        """Change a session; `count`: the reported number of records."""
        later: asyncio.Future[Answer] = asyncio.get_running_loop().create_future()
        batch = Batch(puts=[(session_id, record(session_id, revision, size))])
        answer = self.store.commit(Write(lambda: batch, count, later.set_result, is_change=True, steps=steps))
        assert answer is None, "it waits for the disk"
        return later


def _written(session_id: str, revision: int, built: list[int], done: Callable[[Answer], None]) -> Write:
    """A change of compiled code: its records are known before its batch is built."""
    stored = record(session_id, revision)
    puts = Puts([session_id], [len(stored)], stored)
    puts.checksums = stored[:CHECKSUM_BYTES]

    def build() -> Batch:
        built.append(revision)
        return Batch(puts=puts)

    return Write(build, 1, done, is_change=True, puts=puts)


async def test_known_records_go_to_the_log_in_few_calls(path: Path) -> None:
    served, built, calls = Served(opened(path, "sync")), list[int](), list[str]()
    begin(served.local, "a")
    for revision in range(1, 4):
        later: asyncio.Future[Answer] = asyncio.get_running_loop().create_future()
        write = _written("a", revision, built, later.set_result)
        calls.clear()
        with noted_calls(calls):
            assert served.store.commit(write) is None
        assert await asyncio.wait_for(later, WAIT_S) is ALL_KEPT
    assert not built, "a log needs no batch"
    assert revisions(killed(served.local, "sync")) == {"a": 3}
    assert len(calls) <= MAX_CALLS, calls


@contextmanager
def noted_calls(calls: list[str]) -> Iterator[None]:
    """Note the Python functions of the server that this thread calls."""

    def note(frame: FrameType, event: str, _argument: object) -> None:
        if event == "call" and "stepwell_server" in frame.f_code.co_filename:
            calls.append(frame.f_code.co_qualname)

    before = sys.getprofile()
    sys.setprofile(note)
    try:
        yield
    finally:
        sys.setprofile(before)


async def test_known_records_of_a_large_change_go_to_the_log_at_once(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The store's thread gets those that must be built, or whose sealing takes long."""
    served, built = Served(opened(path, "sync")), list[int]()
    begin(served.local, "a")
    assert await served.change("a", 1) is ALL_KEPT  # the log's thread runs
    begun = list[LogWrite]()
    begin_append = DiskStore.begin_append

    def noted(store: DiskStore, *arguments: Any) -> LogWrite | None:
        write = begin_append(store, *arguments)
        begun.extend([] if write is None else [write])
        return write

    monkeypatch.setattr(DiskStore, "begin_append", noted)
    for revision, seconds, is_at_once in ((2, 1e-4, True), (3, 1.0, False)):
        monkeypatch.setattr(Cost, "of", lambda _self, _count, seconds=seconds: seconds)
        later: asyncio.Future[Answer] = asyncio.get_running_loop().create_future()
        write = _written("a", revision, built, later.set_result)
        write.size = MAX_BUILT_HERE + 1
        before = len(begun)
        assert served.store.commit(write) is None
        assert len(begun) - before == is_at_once
        assert await asyncio.wait_for(later, WAIT_S) is ALL_KEPT
    assert not built
    assert await served.store.end_commits(WAIT_S)
    assert revisions(killed(served.local, "sync")) == {"a": 3}


async def test_known_records_that_the_log_refuses_are_built_and_committed(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    served, built = Served(opened(path, "sync")), list[int]()
    begin(served.local, "a")
    monkeypatch.setattr(DiskStore, "begin_append", lambda *_: None)
    monkeypatch.setattr(DiskStore, "_append", lambda *_: False)
    later: asyncio.Future[Answer] = asyncio.get_running_loop().create_future()
    assert served.store.commit(_written("a", 1, built, later.set_result)) is None
    assert await asyncio.wait_for(later, WAIT_S) is ALL_KEPT
    assert built == [1]
    assert in_lmdb(served.local) == {"a": 1}
    assert await served.store.end_commits(WAIT_S)


async def test_a_change_that_fails_before_the_log_has_it_leaves_the_session_as_it_was(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    served = Served(opened(path, "sync"))
    begin(served.local, "a")
    assert await served.change("a", 1) is ALL_KEPT
    with monkeypatch.context() as patch:
        patch.setattr(DiskStore, "sealed", lambda _self, _puts: 1 / 0, raising=False)
        assert isinstance(await served.change("a", 2), ServerError)
    assert revisions(opened(crash_copy(served.local), "sync")) == {"a": 1}
    assert await served.change("a", 2) is ALL_KEPT
    assert await served.store.end_commits(WAIT_S)
    assert revisions(killed(served.local, "sync")) == {"a": 2}


async def test_segments_rotate_while_changes_are_appended(path: Path) -> None:
    served = Served(opened(path, "sync"))
    names = [f"s{number}" for number in range(8)]
    begin(served.local, *names)
    segments = set()
    for revision in range(1, 60):
        answers = await asyncio.gather(*(served.change(name, revision) for name in names))
        assert answers == [ALL_KEPT] * len(names)
        segments.add(wal_of(served.local).descriptors()[0][0].name)
    assert segments == {"0", "1"}
    assert await served.store.end_commits(WAIT_S)
    again = killed(served.local, "sync")
    assert revisions(again) == dict.fromkeys(names, 59)


def hold_writes(monkeypatch: pytest.MonkeyPatch) -> list[LogWrite]:
    """Keep the writes that begin: none is made."""
    held = list[LogWrite]()
    for one_kind in (writers.NativeWriter, writers.ThreadWriter):
        monkeypatch.setattr(one_kind, "begin", lambda _self, write, _steps=(): held.append(write))
        monkeypatch.setattr(one_kind, "withdraw", lambda _self: bool(held.pop()))
    return held


async def test_a_change_is_acknowledged_only_after_its_write(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Killed between the write and its end, the next start finds the change or not, and all earlier ones."""
    held = hold_writes(monkeypatch)
    served = Served(opened(path, "sync"))
    begin(served.local, "a", "b")
    answer = served.change("a", 1)
    later = served.change("b", 1)
    write, behind = held
    before = opened(crash_copy(served.local), "sync")
    assert revisions(before) == {"a": 0, "b": 0}
    write.make()
    assert not answer.done()
    assert revisions(served.local) == {"a": 0, "b": 0}, "nobody sees it before its caller knows"
    after = opened(crash_copy(served.local), "sync")
    assert revisions(after) == {"a": 1, "b": 0}
    monkeypatch.undo()
    writer: LogWriter = served.store._lanes._log._writer  # type: ignore[attr-defined]
    writer.begin(write)
    writer.begin(behind)
    assert await asyncio.wait_for(answer, WAIT_S) is ALL_KEPT
    assert await asyncio.wait_for(later, WAIT_S) is ALL_KEPT
    assert revisions(served.local) == {"a": 1, "b": 1}
    assert await served.store.end_commits(WAIT_S)


async def test_the_writer_has_the_next_small_changes_during_a_write(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They share a write until it begins. Large ones wait for the event loop, so that more of them share theirs."""
    held = hold_writes(monkeypatch)
    served = Served(opened(path, "sync"))
    names = [f"s{number}" for number in range(8)]
    begin(served.local, *names)
    answers = [served.change("s0", 1, count=SMALL + 1), served.change("s1", 1, count=SMALL + 1)]
    assert [write.count for write in held] == [1], "the second one is large"
    answers += [served.change(name, 1) for name in names[2:6]]
    assert [write.count for write in held] == [1, 4]
    for one_kind in (writers.NativeWriter, writers.ThreadWriter):
        monkeypatch.setattr(one_kind, "withdraw", lambda _self: False)
    answers += [served.change(name, 1) for name in names[6:]]
    assert [write.count for write in held] == [1, 4], "it has begun"
    monkeypatch.undo()
    writer: LogWriter = served.store._lanes._log._writer  # type: ignore[attr-defined]
    for write in held:
        writer.begin(write)
    assert set(await asyncio.wait_for(asyncio.gather(*answers), WAIT_S)) == {ALL_KEPT}
    assert revisions(killed(served.local, "sync")) == dict.fromkeys(names, 1)
    assert await served.store.end_commits(WAIT_S)


async def test_small_changes_that_do_not_fit_behind_a_write_wait_for_its_end(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Then the segments rotate."""
    served = Served(opened(path, "sync", segment_bytes=SIZE))
    begin(served.local, "a", "b", "c", "d")
    assert await served.change("d", 1, SIZE * 2 // 5) is ALL_KEPT
    held = hold_writes(monkeypatch)
    answers = [served.change("a", 1, SIZE * 3 // 10), served.change("b", 1, SIZE // 5)]
    assert len(held) == 2
    answers.append(served.change("c", 1, SIZE // 5))
    assert len(held) == 1
    monkeypatch.undo()
    writer: LogWriter = served.store._lanes._log._writer  # type: ignore[attr-defined]
    for write in held:
        writer.begin(write)
    assert set(await asyncio.wait_for(asyncio.gather(*answers), WAIT_S)) == {ALL_KEPT}
    assert await served.store.end_commits(WAIT_S)
    assert not in_lmdb(served.local).items() - dict.fromkeys("abcd", 0).items(), "the log has them"
    assert revisions(killed(served.local, "sync")) == dict.fromkeys("abcd", 1)


async def test_steps_are_answered_by_the_write_that_keeps_them(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A write that makes room keeps nothing, so nobody is answered after it."""
    begun = list[tuple[int, Sequence[object]]]()

    def recorded(begin_write: Callable[..., None]) -> Callable[..., None]:
        def begin_it(self: LogWriter, write: LogWrite, steps: Sequence[object] = ()) -> None:
            begun.append((write.count, steps))
            begin_write(self, write)

        return begin_it

    for one_kind in (writers.NativeWriter, writers.ThreadWriter):
        monkeypatch.setattr(one_kind, "begin", recorded(one_kind.begin))
    served = Served(opened(path, "sync", segment_bytes=SIZE))
    begin(served.local, "a", "b")
    for revision in range(1, 120):
        await asyncio.gather(*(served.change(name, revision, 400, steps=[name]) for name in "ab"))
    assert await served.store.end_commits(WAIT_S)
    assert any(not count for count, _ in begun), "segments rotated"
    assert all(count == len(steps) for count, steps in begun)


async def test_the_end_of_a_write_is_reported_at_once_when_asked(path: Path) -> None:
    """Its callers may have been answered, so what they send next must find it, whoever noticed the end."""
    served = Served(opened(path, "sync"))
    begin(served.local, "a", "b")
    log: LogQueue = served.store._lanes._log  # type: ignore[attr-defined]
    for has_noticed in (False, True):
        answer = served.change("a", 1 + has_noticed)
        until = time.monotonic() + WAIT_S
        while has_noticed and not log._settle():
            assert time.monotonic() < until
        while not answer.done():
            served.store.settle()
            assert has_noticed <= answer.done(), "it is reported at the first call"
            assert time.monotonic() < until
    assert await served.store.end_commits(WAIT_S)


async def test_who_waits_for_an_idle_log_learns_of_an_end_that_another_change_noticed(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The native writer does not report an end that was taken before."""
    served = Served(opened(path, "sync"))
    begin(served.local, "a", "b")
    new_writer = served.local.new_writer
    monkeypatch.setattr(served.local, "new_writer", lambda _ended: new_writer(lambda: None))
    log: LogQueue = served.store._lanes._log  # type: ignore[attr-defined]
    answers = [served.change("a", 1)]
    is_idle = asyncio.create_task(log.idle(WAIT_S))
    await asyncio.sleep(0)
    log.stop()  # the next changes are refused to the log, so no other write follows
    until = time.monotonic() + WAIT_S
    while log._begun:
        answers.append(served.change("b", len(answers)))
        assert time.monotonic() < until
    assert await is_idle
    assert set(await asyncio.wait_for(asyncio.gather(*answers), WAIT_S)) == {ALL_KEPT}
    assert await served.store.end_commits(WAIT_S)


async def test_what_the_disk_refuses_to_the_log_is_committed(
    path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """The log's file may not grow; the transaction has room in its own file."""
    served = Served(opened(path, "sync", first_map_bytes=1 << 20, segment_bytes=SIZE))
    begin(served.local, "a", "b")
    assert await served.change("a", 1) is ALL_KEPT
    for file, descriptor in wal_of(served.local).descriptors():
        os.close(descriptor)
        assert os.open(file, os.O_RDONLY) == descriptor
    served.store = InProcessStore(served.local, ManualClock())  # its writer has the new descriptors
    warnings(caplog)
    answers = await asyncio.gather(served.change("a", 2), served.change("b", 1))
    assert set(answers) == {ALL_KEPT}
    assert "could not be written to the write-ahead log" in warnings(caplog)[0]
    assert in_lmdb(served.local) == {"a": 2, "b": 1} == revisions(served.local)
    assert await served.store.end_commits(WAIT_S)


async def test_a_commit_that_empties_the_log_waits_for_a_write_to_it(path: Path) -> None:
    """It takes the log between two writes, however many changes wait."""
    served = Served(opened(path, "sync", segment_bytes=SIZE))
    begin(served.local, "a", "m")
    revision = 0
    answers = list[asyncio.Future[Answer]]()
    for _ in range(20):
        answers += [served.change("a", revision := revision + 1)]
        batch = Batch(puts=[("m", record("m", revision))], goes_back=True)
        done: asyncio.Future[Answer] = asyncio.get_running_loop().create_future()
        assert served.store.commit(Write(lambda batch=batch: batch, 1, done.set_result)) is None  # type: ignore[misc]
        answers.append(done)
        await asyncio.wait_for(answers[-2], WAIT_S)
    assert set(await asyncio.wait_for(asyncio.gather(*answers), WAIT_S)) == {ALL_KEPT}
    assert revisions(served.local) == {"a": 20, "m": 20}
    assert await served.store.end_commits(WAIT_S)


async def test_after_the_end_changes_are_refused(path: Path) -> None:
    served = Served(opened(path, "sync"))
    begin(served.local, "a")
    assert await served.change("a", 1) is ALL_KEPT
    await served.store.close()
    assert isinstance(await asyncio.wait_for(served.change("a", 2), WAIT_S), Unavailable)


async def test_after_the_last_commit_changes_are_refused(path: Path) -> None:
    """Neither the log nor the thread that commits what the log refuses takes any more."""
    served = Served(opened(path, "sync"))
    begin(served.local, "a")
    assert await served.change("a", 1) is ALL_KEPT
    assert await served.store.end_commits(WAIT_S)
    answer = await asyncio.wait_for(served.change("a", 2), WAIT_S)
    assert isinstance(answer, Unavailable)
    assert answer.message == "the store must be open; it is closed"
    assert revisions(served.local) == {"a": 1}


async def test_a_change_that_waits_for_a_write_that_hangs_is_answered(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The end of the commits does not wait for it; when the write returns, no other one begins."""
    held = hold_writes(monkeypatch)
    served = Served(opened(path, "sync"))
    begin(served.local, "a", "b")
    answer, later = served.change("a", 1), served.change("b", 1)
    assert len(held) == 2
    assert not await served.store.end_commits(0.0)
    (write,) = held
    monkeypatch.undo()
    served.store._lanes._log._writer.begin(write)  # type: ignore[attr-defined]
    assert await asyncio.wait_for(answer, WAIT_S) is ALL_KEPT
    assert isinstance(await asyncio.wait_for(later, WAIT_S), Unavailable)
    assert revisions(served.local) == {"a": 1, "b": 0}
    assert await served.store.end_commits(WAIT_S)
