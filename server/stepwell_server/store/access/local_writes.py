"""Writes to a store of one server: in place, or on threads of its own.

What begins or ends sessions, and what is large, is done by one thread in the order in which it came. Small changes pass it
where the store has a log for them: here, or on a second thread if the log waits for the disk.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence

from stepwell_server.core.cost import Cost
from stepwell_server.store.access.batches import fail, keep, merged
from stepwell_server.store.access.thread import StoreThread
from stepwell_server.store.base import SMALL, Answer, LocalStore, Write

#: A write expected to take less is made on the event loop: a thread costs more, in waiting for Python's lock.
COMMIT_IN_PLACE_S = 1e-3
#: Small writes pass the changes of others, where those are of more sessions than this together. Up to so many records are
#: made on the event loop, although the store's thread writes them: while that thread makes them it takes Python's lock from
#: the loop, again and again. More of them would hold up the loop for too long; while small writes pass, more than small ones.
MANY = 256
#: So many records may be due to be checkpointed; then it is a thread that commits more, and checkpoints them.
MAX_BEHIND = 4096


class LocalWrites:
    """Writes to a store that answers in place. Lives on the event loop."""

    def __init__(self, store: LocalStore) -> None:
        self._store = store
        self._cost = Cost()
        """Of a write by its records."""
        self._loop: asyncio.AbstractEventLoop | None = None
        self._handed_over = 0
        """Writes that the threads have."""
        self._others = 0
        """Of those that the first thread has: what is no mere change of sessions."""
        self._changes = 0
        """And how many sessions the changes are of."""
        self._will_checkpoint = False
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
        """End; False if the store did not come back from a commit in time. For any thread."""
        until = time.monotonic() + timeout_s
        # the first one may have left something to the second
        have_ended = [t.close(max(0.0, until - time.monotonic())) for t in (self._small, self._main)]
        return all(have_ended)

    def _is_short(self, size: int) -> bool:
        """Whether to commit so many records at once costs less than to hand them over."""
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
        """Whether something small was done at once, although others wait."""
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
        """Whether something small is better off with the second thread: else what waits is best written together."""
        store = self._store
        is_small = write.is_change and write.is_small and write.error is None
        if not (is_small and store.has_log and store.waits_for_disk):
            return False
        # the first thread may be busy with a checkpoint as long as one is due
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
        """Small changes, on their thread; False if nobody is left to be told."""
        if not self._try_append(writes):
            for write in writes:
                self._main.put(write)
            return True
        goes_on = self._report(writes)
        if self._store.needs_checkpoint:
            self._main.wake()
        return goes_on

    def _try_append(self, writes: Sequence[Write]) -> bool:
        try:
            return self._store.append(merged([write.batch for write in writes]).puts)
        except Exception as error:
            fail(writes, error)
            return True

    def _commit(self, writes: Sequence[Write]) -> bool:
        """All else. Nothing at all is a wake-up: there is something to checkpoint."""
        size = sum(write.size for write in writes)
        started = time.perf_counter()
        keep(writes, self._store.commit)
        waits_for_disk = self._store.waits_for_disk
        if not waits_for_disk:
            if size:
                self._cost.learn(size, time.perf_counter() - started)
            # before anything is told: then the event loop may use the store
            self._store.checkpoint()
        goes_on = self._report(writes)
        if waits_for_disk and goes_on:  # small changes pass it
            self._store.checkpoint()
        return goes_on

    def _report(self, writes: Sequence[Write]) -> bool:
        assert self._loop is not None, "something was handed over"
        try:
            if writes:
                self._loop.call_soon_threadsafe(self._tell, writes)
        except RuntimeError:  # the event loop was closed
            return False
        return True

    def _tell(self, writes: Sequence[Write]) -> None:
        for write in writes:
            if not write.passes:
                self._count(write, -1)
        for write in writes:
            self._handed_over -= 1
            write.done(write.answer)

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
