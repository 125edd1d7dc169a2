"""Writes to a store of one server: on the event loop, or on threads.

A thread commits writes that begin or end sessions, and large writes, in order of arrival. Changes overtake them if
the store has a log: on the event loop, or through a `LogQueue` if the log waits for the disk.
"""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import Callable, Sequence
from typing import TypeVar

from stepwell_server.core.cost import Cost
from stepwell_server.errors import Unavailable
from stepwell_server.store.access.batches import fail, keep, merged
from stepwell_server.store.access.log_queue import LogQueue
from stepwell_server.store.access.thread import StoreThread
from stepwell_server.store.base import SMALL, Answer, LocalStore, Write
from stepwell_server.store.record import RecordBytes

_T = TypeVar("_T")

#: A write that is expected to take less time runs on the event loop. A thread costs more, because it waits for the GIL.
COMMIT_IN_PLACE_S = 1e-3
#: For a write of up to this many records the event loop builds the batch, even if a thread writes it: on the thread,
#: building competes with the event loop for the GIL. A larger batch would block the loop for too long.
MAX_BUILT_HERE = 256
#: Writes other than small changes that are answered in one iteration of the event loop. Each answer continues a call.
ANSWERS_PER_ITERATION = 2
#: The event loop commits large writes only while at most this many records wait for a checkpoint. Beyond that, a thread
#: commits and checkpoints.
MAX_BEHIND = 4096


class LocalWrites:
    """Sends writes to a local store. Lives on the event loop."""

    def __init__(self, store: LocalStore) -> None:
        self._store = store
        self._cost = Cost()
        """Estimates the time of a write from its number of records."""
        self._loop: asyncio.AbstractEventLoop | None = None
        self._handed_over = 0
        """Number of writes that are on the thread or in the log's queue."""
        self._will_checkpoint = False
        self._unanswered: deque[Write] = deque()
        """Committed writes that are answered in later iterations of the event loop."""
        self._thread = StoreThread("stepwell-store", self._work)
        self._log = LogQueue(store, done=self._finish_log, refused=self._commit_refused)

    def settle(self) -> None:
        """See `Store.settle`."""
        self._log.settle()

    def commit(self, write: Write) -> Answer | None:
        """See `Store.commit`."""
        if self._is_short(write.size):
            if not self._handed_over:
                self._commit_here(write)
                return write.answer
            if self._append_here(write):
                return write.answer
        self._put(write)
        return None

    async def end(self, timeout_s: float) -> bool:
        """See `Store.end_commits`."""
        until = time.monotonic() + timeout_s
        is_idle = await self._log.idle(timeout_s)
        self._log.stop()
        return await asyncio.to_thread(self.close, max(0.0, until - time.monotonic())) and is_idle

    def close(self, timeout_s: float) -> bool:
        """Stop the threads; return False if a commit did not finish in time. For any thread."""
        until = time.monotonic() + timeout_s
        # the log's writer ends first: the thread may wait for the end of its write
        have_ended = [one.close(max(0.0, until - time.monotonic())) for one in (self._log, self._thread)]
        return all(have_ended)

    def _is_short(self, size: int) -> bool:
        """Whether committing this many records on the event loop costs less than handing them to a thread."""
        store = self._store
        if store.for_one_thread:
            return True
        if store.waits_for_disk:
            return False
        return self._cost.of(size) <= COMMIT_IN_PLACE_S and (size <= SMALL or store.behind <= MAX_BEHIND)

    def _commit_here(self, write: Write) -> None:
        store = self._store
        started = time.perf_counter()
        keep([write], store.commit)
        if write.size and write.error is None:
            self._cost.learn(write.size, time.perf_counter() - started)
        if store.needs_checkpoint:
            self._checkpoint_soon()

    def _append_here(self, write: Write) -> bool:
        """Append a short write to the log now, although others wait; return whether it was done."""
        if not (write.is_change and self._store.has_log):
            return False
        write.make()
        started = time.perf_counter()
        if write.error is None:
            if not self._try_append([write]):
                return False
            if write.error is None:
                self._cost.learn(write.size, time.perf_counter() - started)
        return True

    def _put(self, write: Write) -> None:
        self._loop = self._loop or asyncio.get_running_loop()
        self._handed_over += 1
        store = self._store
        write.is_for_log = write.is_change and store.has_log and store.waits_for_disk
        is_costly = write.size > SMALL and self._cost.of(write.size) > COMMIT_IN_PLACE_S
        is_built = write.puts is not None and write.is_for_log
        if (is_built or write.size <= MAX_BUILT_HERE) and not is_costly:
            if not write.is_for_log:
                write.make()
            elif (puts := self._built(write)) is not None:
                self._log.add(write, puts)
                return
        self._put_on_thread(write)

    def _add_to_log(self, writes: Sequence[tuple[Write, Sequence[tuple[str, RecordBytes]]]]) -> None:
        for write, puts in writes:
            self._log.add(write, puts)

    def _commit_refused(self, writes: Sequence[Write]) -> None:
        """Commit what the log refused."""
        for write in writes:
            write.is_for_log = False
            self._put_on_thread(write)

    def _put_on_thread(self, write: Write) -> None:
        if not self._thread.put(write):
            fail([write], Unavailable("the store must be open; it is closed"))
            # later: the caller may be just handing it over
            asyncio.get_running_loop().call_soon(self._finish, [write])

    def _finish_log(self, writes: Sequence[Write]) -> None:
        if self._store.needs_checkpoint:
            self._thread.wake()
        self._finish(writes)

    def _try_append(self, writes: Sequence[Write]) -> bool:
        try:
            return self._store.append(merged([write.batch for write in writes]).puts)
        except Exception as error:
            fail(writes, error)
            return True

    def _work(self, writes: Sequence[Write]) -> bool:
        """Commit writes, or build those for the log, on the thread. An empty list means that a checkpoint is due."""
        built = [(write, self._built(write)) for write in writes if write.is_for_log]
        # before the event loop gets those for the log: what the log refuses comes back for a commit of its own
        others = [write for write in writes if not write.is_for_log]
        failed = [write for write, puts in built if puts is None]
        sealed = [(write, puts) for write, puts in built if puts is not None]
        if sealed and not self._call(self._add_to_log, sealed):
            return False
        return self._commit([*failed, *others])

    def _built(self, write: Write) -> Sequence[tuple[str, RecordBytes]] | None:
        """Build a write for the log; None: it failed, and has the error."""
        puts = write.puts
        # a small one whose records are known costs too little to learn from
        started = time.perf_counter() if puts is None or write.size > SMALL else None
        if puts is None:
            write.make()
            if write.error is not None:
                return None
            puts = write.batch.puts
        try:
            puts = self._store.sealed(puts)
        except Exception as error:
            fail([write], error)
            return None
        if started is not None:
            self._cost.learn(write.size, time.perf_counter() - started)
        return puts

    def _commit(self, writes: Sequence[Write]) -> bool:
        size = sum(write.size for write in writes)
        started = time.perf_counter()
        keep(writes, self._store.commit)
        waits_for_disk = self._store.waits_for_disk
        if not waits_for_disk:
            if size:
                self._cost.learn(size, time.perf_counter() - started)
            # before the writes are reported: after that, the event loop may use the store
            self._store.checkpoint()
        is_open = not writes or self._call(self._finish, writes)
        if waits_for_disk and is_open:  # small changes overtake it
            self._store.checkpoint()
        return is_open

    def _call(self, callback: Callable[[_T], None], argument: _T) -> bool:
        """Call back on the event loop; return False if it is closed."""
        assert self._loop is not None, "a write was handed over"
        try:
            self._loop.call_soon_threadsafe(callback, argument)
        except RuntimeError:
            return False
        return True

    def _finish(self, writes: Sequence[Write]) -> None:
        self._handed_over -= len(writes)
        is_answering = bool(self._unanswered)
        for write in writes:
            if write.is_change and (write.size <= SMALL or write.steps):  # steps may be answered already
                write.done(write.answer)
            else:
                self._unanswered.append(write)
        if not is_answering:
            self._answer_next()

    def _answer_next(self) -> None:
        """Answer a few writes in each iteration of the event loop, so that steps that arrive do not wait for all of them."""
        for _ in range(min(ANSWERS_PER_ITERATION, len(self._unanswered))):
            write = self._unanswered.popleft()
            write.done(write.answer)
        if self._unanswered:
            asyncio.get_running_loop().call_soon(self._answer_next)

    def _checkpoint_soon(self) -> None:
        if not self._will_checkpoint:
            self._will_checkpoint = True
            asyncio.get_running_loop().call_soon(self._checkpoint_here)

    def _checkpoint_here(self) -> None:
        self._will_checkpoint = False
        if not self._handed_over and not self._store.waits_for_disk:
            self._store.checkpoint(briefly=True)
            if self._store.behind:
                self._checkpoint_soon()
