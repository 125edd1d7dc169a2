"""Writes to a store of one server: on the event loop, or on two threads.

The first thread handles writes that begin or end sessions, and large writes, in order of arrival. Small changes
overtake them if the store has a log: on the event loop, or on the second thread if the log waits for the disk.
"""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import Sequence

from stepwell_server.core.cost import Cost
from stepwell_server.store.access.batches import fail, keep, merged
from stepwell_server.store.access.thread import StoreThread
from stepwell_server.store.base import SMALL, Answer, LocalStore, Write

#: A write that is expected to take less time runs on the event loop. A thread costs more, because it waits for the GIL.
COMMIT_IN_PLACE_S = 1e-3
#: Small writes overtake other changes if those concern more sessions than this in total. For a write of up to this many
#: records the event loop builds the batch, even if a thread writes it: on the thread, building competes with the event
#: loop for the GIL. A larger batch would block the loop for too long. While small writes overtake, the limit is
#: `SMALL`.
MANY = 256
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
        """Number of writes that are on the threads."""
        self._others = 0
        """Number of writes on the first thread that do more than change sessions."""
        self._changes = 0
        """Number of sessions in the other writes on the first thread."""
        self._will_checkpoint = False
        self._unanswered: deque[Write] = deque()
        """Committed writes that are answered in later iterations of the event loop."""
        self._main = StoreThread("stepwell-store", self._commit)
        self._small = StoreThread("stepwell-store-log", self._append)

    def commit(self, write: Write) -> Answer | None:
        """See `Store.commit`."""
        if not self._handed_over and self._is_short(write.size):
            self._commit_here(write)
            return write.answer
        if self._append_here(write):
            return write.answer
        self._put(write)
        return None

    def close(self, timeout_s: float) -> bool:
        """Stop the threads; return False if a commit did not finish in time. For any thread."""
        until = time.monotonic() + timeout_s
        # the second thread ends first: it may hand writes back to the first
        have_ended = [t.close(max(0.0, until - time.monotonic())) for t in (self._small, self._main)]
        return all(have_ended)

    def _is_short(self, size: int) -> bool:
        """Whether committing this many records on the event loop costs less than handing them to a thread."""
        store = self._store
        if store.for_one_thread:
            return True
        is_short = self._cost.of(size) <= COMMIT_IN_PLACE_S and (size <= SMALL or store.behind <= MAX_BEHIND)
        return is_short and not store.waits_for_disk

    def _commit_here(self, write: Write) -> None:
        store = self._store
        started = time.perf_counter()
        keep([write], store.commit)
        if write.size and write.error is None:
            self._cost.learn(write.size, time.perf_counter() - started)
        if store.needs_checkpoint:
            self._checkpoint_soon()

    def _append_here(self, write: Write) -> bool:
        """Append a small write to the log now, although others wait; return whether it was done."""
        if not (write.is_change and self._store.has_log and self._is_short(write.size)):
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
        if write.size <= (SMALL if write.is_latency_sensitive and self._changes > MANY else MANY):
            write.make()
        write.passes = self._passes(write)
        if write.passes:
            self._small.put(write)
            return
        self._count(write, 1)
        self._main.put(write)

    def _passes(self, write: Write) -> bool:
        """Whether a small write goes to the second thread. Otherwise it is cheaper to write it together with the others."""
        store = self._store
        is_small = write.is_change and write.is_small and write.error is None
        if not (is_small and store.has_log and store.waits_for_disk):
            return False
        # while a checkpoint is due, the first thread may be busy with it
        return (
            self._others > 0
            or (write.is_latency_sensitive and self._changes > MANY)
            or store.needs_checkpoint
        )

    def _count(self, write: Write, by: int) -> None:
        if write.is_change:
            self._changes += by * write.size
        else:
            self._others += by

    def _append(self, writes: Sequence[Write]) -> bool:
        """Append small changes, on the second thread; return False if the event loop is closed."""
        if not self._try_append(writes):
            for write in writes:
                self._main.put(write)
            return True
        is_open = self._report(writes)
        if self._store.needs_checkpoint:
            self._main.wake()
        return is_open

    def _try_append(self, writes: Sequence[Write]) -> bool:
        try:
            return self._store.append(merged([write.batch for write in writes]).puts)
        except Exception as error:
            fail(writes, error)
            return True

    def _commit(self, writes: Sequence[Write]) -> bool:
        """Commit writes, on the first thread. An empty list means that a checkpoint is due."""
        size = sum(write.size for write in writes)
        started = time.perf_counter()
        keep(writes, self._store.commit)
        waits_for_disk = self._store.waits_for_disk
        if not waits_for_disk:
            if size:
                self._cost.learn(size, time.perf_counter() - started)
            # before the writes are reported: after that, the event loop may use the store
            self._store.checkpoint()
        is_open = self._report(writes)
        if waits_for_disk and is_open:  # small changes overtake it
            self._store.checkpoint()
        return is_open

    def _report(self, writes: Sequence[Write]) -> bool:
        assert self._loop is not None, "a write was handed over"
        try:
            if writes:
                self._loop.call_soon_threadsafe(self._finish, writes)
        except RuntimeError:  # the event loop was closed
            return False
        return True

    def _finish(self, writes: Sequence[Write]) -> None:
        for write in writes:
            if not write.passes:
                self._count(write, -1)
        self._handed_over -= len(writes)
        is_answering = bool(self._unanswered)
        for write in writes:
            if write.is_change and write.is_small:
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
