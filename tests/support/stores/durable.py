"""Data directories that outlive engines, stores with troubles, and what of a session must outlive them."""

from __future__ import annotations

import asyncio
import dataclasses
import itertools
import threading
from collections import deque
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from pathlib import Path
from typing import Any, Literal

import numpy.typing as npt

from stepwell_server.engine.api import SessionInfo
from stepwell_server.errors import Unavailable
from stepwell_server.program import Program
from stepwell_server.store.base import Batch, LogWrite, LogWriter, Parts, Tombstone
from stepwell_server.store.disk.store import DiskStore
from stepwell_server.store.record import JoinedPuts, RecordBytes
from support.clock import ManualClock
from support.engine.fake_executor import WAIT_S
from support.engine.harness import SEGMENT_BYTES, STORES, Answer, Harness, running
from support.stores.disk_store import base_of, copy_files, wal_of
from support.stores.gates import Gated

Array = npt.NDArray[Any]
Running = Callable[..., AbstractAsyncContextManager[Harness]]
_NUMBERS = itertools.count()


class Troubled:
    """A store that fails, stalls and counts for a test."""

    def __init__(self, store: DiskStore) -> None:
        self.store = store
        self.waits_for_disk = store.waits_for_disk
        """Set it, and no commit is made in place."""
        self.tried: list[Batch] = []
        """What was to be kept, the failures as well."""
        self.inside = threading.Event()
        """A commit has begun since this was last cleared."""
        self.read_error: Exception | None = None
        self.refuses: Callable[[Batch], bool] = lambda _batch: False
        """Commits that fail, whichever others share them."""
        self._errors: deque[tuple[Exception, bool]] = deque()
        self._alone = threading.Lock()
        """Held during a commit or a checkpoint."""
        self._open = threading.Event()
        self._open.set()
        self._stalls_behind = False

    def __getattr__(self, name: str) -> Any:
        return getattr(self.store, name)

    def fail(self, error: Exception, times: int = 1, *, kept: bool = False) -> None:
        """Let the next commits fail; `kept`: but what they were to keep is kept."""
        self._errors.extend([(error, kept)] * times)

    def fail_no_more(self) -> None:
        self._errors.clear()

    def stall(self, *, kept: bool = False) -> None:
        """Commits that begin from now on do not come back, until `release`; `kept`: but they are kept before.

        None is made in place any more.
        """
        self.waits_for_disk = True
        self._stalls_behind = kept
        self.inside.clear()
        self._open.clear()

    def release(self) -> None:
        self._open.set()

    async def stalled(self) -> None:
        """Return when a commit does not come back."""
        assert await asyncio.to_thread(self.inside.wait, WAIT_S), "no commit has begun"

    def append(self, puts: Sequence[tuple[str, RecordBytes]]) -> bool:
        self._keep(Batch(puts=puts), may_append=True)
        return True

    def begin_append(self, parts: Parts, after: LogWrite | None = None) -> LogWrite | None:
        assert after is None or isinstance(after, TroubledWrite)
        write = self.store.begin_append(parts, after and after.inner)
        return None if write is None else TroubledWrite(write, Batch(puts=JoinedPuts(parts)))

    def end_append(self, write: LogWrite, error: Exception | None, seconds: float) -> bool:
        assert isinstance(write, TroubledWrite)
        is_kept = self.store.end_append(write.inner, error, seconds)
        if write.error is not None:
            raise type(write.error)(*write.error.args)
        return is_kept

    def withdraw_append(self, write: LogWrite) -> None:
        assert isinstance(write, TroubledWrite)
        self.store.withdraw_append(write.inner)

    def new_writer(self, on_end: Callable[[], None]) -> LogWriter:
        return TroubledWriter(self, on_end)

    def commit(self, batch: Batch) -> None:
        self._keep(batch, may_append=False)

    def checkpoint(self, *, briefly: bool = False) -> None:
        with self._alone:
            self.store.checkpoint(briefly=briefly)

    def trouble_with(self, batch: Batch) -> tuple[Exception | None, bool, bool]:
        """Count an attempt. Returns its error, whether the batch is kept, and whether that is before a stall."""
        self.tried.append(batch)
        error, kept = self._errors.popleft() if self._errors else (None, True)
        if self.refuses(batch):
            error, kept = Unavailable("the test says no"), False
        return error, kept, self._stalls_behind  # as it is now: another stall may begin while this one lasts

    def pass_stall(self) -> None:
        """Return when no stall is on. For any thread."""
        self.inside.set()
        assert self._open.wait(WAIT_S), "the test did not let the store go on"

    def _keep(self, batch: Batch, *, may_append: bool) -> None:
        """What fails, stalls and is counted is the same for a commit and for what goes beside one."""
        error, kept, behind = self.trouble_with(batch)
        if kept and behind:
            self._kept(batch, may_append=may_append)
        self.pass_stall()
        if kept and not behind:
            self._kept(batch, may_append=may_append)
        if error is not None:
            raise type(error)(*error.args)  # a new one: it collects a traceback

    def _kept(self, batch: Batch, *, may_append: bool) -> None:
        if may_append and self.store.append(batch.puts):
            return
        with self._alone:
            self.store.commit(batch)

    def get(self, session_id: str) -> Any:
        self._may_read()
        return self.store.get(session_id)

    def get_many(self, session_ids: Sequence[str]) -> Any:
        self._may_read()
        return self.store.get_many(session_ids)

    def _may_read(self) -> None:
        if self.read_error is not None:
            raise type(self.read_error)(*self.read_error.args)


class TroubledWrite:
    """A write to the log of a `Troubled` store."""

    def __init__(self, inner: LogWrite, batch: Batch) -> None:
        self.inner = inner
        self.batch = batch
        self.count = inner.count
        self.error: Exception | None = None
        """What the test wants the callers to get, whether or not the write was made."""

    def make(self) -> None:
        raise AssertionError("the store's own writer makes the inner write")


class TroubledWriter(LogWriter):
    """The writer of a store's log, of whichever kind, with the troubles of the store. The event loop answers."""

    def __init__(self, store: Troubled, on_end: Callable[[], None]) -> None:
        self._store = store
        self._on_end = on_end
        self._inner = store.store.new_writer(self._inner_ended)
        self._inner_result: asyncio.Future[tuple[Exception | None, float]]
        self._results: deque[tuple[Exception | None, float]] = deque()
        self._last: asyncio.Task[Exception | None] | None = None
        self._under_way = 0
        """Writes that were not taken."""

    def begin(self, write: LogWrite, steps: Sequence[object] = ()) -> None:
        assert isinstance(write, TroubledWrite)
        self._last = asyncio.create_task(self._make(write, self._last if self._under_way else None))
        self._under_way += 1

    def withdraw(self) -> bool:
        return False

    def take(self) -> tuple[Exception | None, float] | None:
        if not self._results:
            return None
        self._under_way -= 1
        return self._results.popleft()

    def close(self, timeout_s: float) -> bool:
        return self._inner.close(timeout_s)

    async def _make(
        self, write: TroubledWrite, before: asyncio.Task[Exception | None] | None
    ) -> Exception | None:
        problem = None if before is None else await before
        result = (problem, 0.0) if problem is not None else await self._made(write)
        self._results.append(result)
        self._on_end()
        return result[0]

    async def _made(self, write: TroubledWrite) -> tuple[Exception | None, float]:
        write.error, kept, behind = self._store.trouble_with(write.batch)
        result: tuple[Exception | None, float] = (OSError("not made"), 0.0)
        if kept and behind:
            result = await self._make_inner(write)
        await asyncio.to_thread(self._store.pass_stall)
        if kept and not behind:
            result = await self._make_inner(write)
        return result

    async def _make_inner(self, write: TroubledWrite) -> tuple[Exception | None, float]:
        self._inner_result = asyncio.get_running_loop().create_future()
        self._inner.begin(write.inner)
        return await self._inner_result

    def _inner_ended(self) -> None:
        if (result := self._inner.take()) is not None:
            self._inner_result.set_result(result)


class Disk:
    """A data directory, and the processes that use it one after the other."""

    def __init__(self) -> None:
        self.clock = ManualClock()
        self.store = Troubled(self._opened(STORES.folder / f"disk-{next(_NUMBERS)}"))

    def _opened(self, folder: Path) -> DiskStore:
        durability: Literal["sync", "async"] = "sync" if STORES.kind == "sync" else "async"
        return DiskStore(folder, durability=durability, clock=self.clock, segment_bytes=SEGMENT_BYTES)

    @asynccontextmanager
    async def engine(
        self,
        programs: Mapping[str, Program] | None = None,
        run: Running = running,
        *,
        is_killed: bool = False,
        **options: Any,
    ) -> AsyncIterator[Harness]:
        """A server process. What it does after `kill` is not on the disk that the next one finds."""
        mine = self.store
        try:
            async with run(programs, store=mine, clock=self.clock, **options) as at:
                try:
                    yield at
                    if is_killed:
                        self.kill()
                finally:
                    mine.release()
        finally:
            if self.store is not mine:
                mine.store.close()

    def kill(self, *, away_s: float = 3.0) -> None:
        """End the process as `kill -9` does: the next one finds what is in the files now, and another clock."""
        old = self.store
        folder = STORES.folder / f"disk-{next(_NUMBERS)}"
        copy_files(old.store, folder)
        self.clock = ManualClock(monotonic=5.0 + next(_NUMBERS), now=self.clock.now() + away_s)
        self.store = Troubled(self._opened(folder))

    async def record(self, session_id: str) -> RecordBytes | None:
        """The stored record of a session."""
        return self.store.store.get(session_id)

    async def tombstone(self, session_id: str) -> Tombstone | None:
        return self.store.store.tombstones([session_id])[0]

    async def count(self) -> int:
        return int(self.store.count())

    async def put(self, session_id: str, record: RecordBytes) -> None:
        """Have a record be another one, behind the back of the server."""
        base_of(self.store.store).commit(Batch(puts=[(session_id, record)]))
        wal_of(self.store.store).discard([session_id])

    async def write(self, batch: Batch) -> None:
        """Write into the store behind the back of the server."""
        self.store.store.commit(batch)

    async def knows_use_of(self, session_id: str) -> None:
        """The server alone knows it."""

    def close(self) -> None:
        self.store.store.close()

    async def aclose(self) -> None:
        self.close()


class Database:
    """A store that several servers can use, and the servers that use it one after the other."""

    def __init__(self) -> None:
        self.clock = ManualClock()
        self._views: list[Gated] = []
        self._began = self.clock.now() - self.clock.monotonic()

    def monotonic(self) -> float:
        return self.clock.monotonic()

    def now(self) -> float:
        """The store's time, which nobody sets."""
        return self._began + self.clock.monotonic()

    @property
    def store(self) -> Gated:
        """As the present server sees it."""
        return self._views[-1]

    async def open(self) -> None:
        """Make the store, or join it as another server."""
        self._views.append(await (self.store.another() if self._views else STORES.make_shared(self)))

    @asynccontextmanager
    async def engine(
        self,
        programs: Mapping[str, Program] | None = None,
        run: Running = running,
        *,
        is_killed: bool = False,
        **options: Any,
    ) -> AsyncIterator[Harness]:
        """A server process. What it does after `kill` is not in the store that the next one finds."""
        if self.store.is_killed:
            await self.open()
        async with run(programs, store=self.store, clock=self.clock, **options) as at:
            try:
                yield at
                if is_killed:
                    self.kill()
            finally:
                at.store.release()

    def kill(self, *, away_s: float = 3.0) -> None:
        """End the process as `kill -9` does: the next one has another clock."""
        now = self.now()
        self.store.kill()
        self.clock = ManualClock(monotonic=5.0 + next(_NUMBERS), now=self.clock.now() + away_s)
        self._began = now + max(0.0, away_s) - self.clock.monotonic()

    async def record(self, session_id: str) -> RecordBytes | None:
        """The stored record of a session."""
        return (await self.store.found(session_id))[0].record

    async def tombstone(self, session_id: str) -> Tombstone | None:
        return (await self.store.found(session_id))[0].tombstone

    async def count(self) -> int:
        return len(await self.store.ids())

    async def put(self, session_id: str, record: RecordBytes) -> None:
        """Have a record be another one, behind the back of the server."""
        (found,) = await self.store.found(session_id)
        await self.store.put_back(session_id, dataclasses.replace(found, record=record))

    async def write(self, batch: Batch) -> None:
        """Write into the store behind the back of the server."""
        await self.store.inner.apply(batch)

    async def knows_use_of(self, session_id: str) -> None:
        """Return when the store has been notified that a session was just used."""
        async with asyncio.timeout(WAIT_S):
            while (await self.store.found(session_id))[0].idle_s > 0:  # noqa: ASYNC110 - the store sets no event
                await asyncio.sleep(0)

    async def aclose(self) -> None:
        for view in self._views:
            await view.close()


DurableStore = Disk | Database
"""A store that outlives its servers."""


async def new_durable_store() -> DurableStore:
    """An empty one, of the kind that the test is about."""
    if STORES.kind in {"sync", "async"}:
        return Disk()
    database = Database()
    await database.open()
    return database


async def stalled(store: Troubled | Gated) -> None:
    """Return when a commit does not come back."""
    await store.stalled()


async def until(is_so: Callable[[], object]) -> None:
    """Let the event loop, and the threads that it waits for, go on until something is so."""
    async with asyncio.timeout(WAIT_S):
        while not is_so():  # noqa: ASYNC110  # what makes it so may be a thread, which sets no event
            await asyncio.sleep(0)


async def start_task(call: Awaitable[Any], turns: int = 1) -> asyncio.Task[Any]:
    """Start a task and let it take its place in line."""

    async def run() -> Any:
        return await call

    task = asyncio.create_task(run())
    for _ in range(turns):
        await asyncio.sleep(0)
    return task


async def damage(lasting: DurableStore, session_id: str) -> None:
    """Flip a bit of a record."""
    record = await lasting.record(session_id)
    assert record is not None
    changed = bytearray(record)
    changed[-1] ^= 4
    await lasting.put(session_id, bytes(changed))


def same_reply(found: Answer, wanted: Answer, *, replayed: bool = True) -> None:
    assert (found.revision, found.position) == (wanted.revision, wanted.position)
    assert found.replayed is replayed
    for ours, theirs in ((found.outputs, wanted.outputs), (found.states, wanted.states)):
        assert list(ours) == list(theirs)
        for name, array in theirs.items():
            assert ours[name].shape == array.shape
            assert ours[name].dtype == array.dtype
            assert ours[name].tobytes() == array.tobytes()


def facts(info: SessionInfo) -> tuple[Any, ...]:
    """The facts that a restart must not change."""
    return (
        info.session_id, info.model, info.fingerprint, info.batch_size, info.revision, info.position,
        info.created, info.last_used,
    )  # fmt: skip


async def everything(at: Harness) -> dict[str, tuple[Any, ...]]:
    """The sessions of a server by id: facts and state."""
    infos, total = await at.engine.list_sessions()
    assert total == len(infos)
    found = {}
    for info in infos:
        state = await at.state(info.session_id)
        found[info.session_id] = (*facts(info), {name: array.tobytes() for name, array in state.items()})
    return found
