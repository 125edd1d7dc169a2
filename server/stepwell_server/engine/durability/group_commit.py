"""Commits: what has happened is kept by the store, in its order, before anybody hears of it.

A commit that waits for the disk, or is large, is made by a thread while the next pass runs; what comes meanwhile
goes into the next transaction together. One that costs less than the hand-over is made in place.
"""

from __future__ import annotations

import asyncio
import queue
import threading
import time
from collections.abc import Callable, Iterable, Sequence

from stepwell_server.engine.cost import Cost
from stepwell_server.errors import Overloaded, ServerError
from stepwell_server.logs import Log
from stepwell_server.store.base import Batch, LocalStore
from stepwell_server.store.record import Joined

_log = Log("engine.commit")

#: A commit expected to take less is made on the event loop: a thread costs more, in waiting for Python's lock.
COMMIT_IN_PLACE_S = 1e-3
#: Records in one transaction at most, unless a single batch has more.
MOST_TOGETHER = 8192
#: So many sessions may wait for the store before passes wait too.
MOST_WAITING = 32_768

_RETRY_AFTER_S = 0.5

Done = Callable[[ServerError | None], None]


class _Item:
    """What is to be kept, and who wants to know."""

    __slots__ = ("batch", "build", "done", "error", "size")

    def __init__(self, build: Callable[[], Batch], size: int, done: Done) -> None:
        self.build = build
        self.size = size
        self.done = done
        self.batch = Batch()
        self.error: ServerError | None = None


class GroupCommit:
    """Commits to a store. Lives on the event loop, with one thread of its own once that is needed."""

    def __init__(self, store: LocalStore) -> None:
        self._store = store
        self.is_durable = not store.is_volatile
        """Changes are to be committed before they are acknowledged; else the arena is all there is."""
        self._loop = asyncio.get_running_loop()
        self.cost = Cost()
        """Of a commit by its records."""
        self._waiting = 0
        self._queue: queue.SimpleQueue[_Item | None] = queue.SimpleQueue()
        """For the thread; None is its end."""
        self._thread: threading.Thread | None = None
        self._idle: asyncio.Future[None] | None = None
        self._room: asyncio.Future[None] | None = None
        self._listeners: list[Callable[[], None]] = []

    @property
    def is_idle(self) -> bool:
        """Nothing waits for the store."""
        return not self._waiting

    @property
    def waiting(self) -> int:
        """Sessions whose changes wait for the store."""
        return self._waiting

    @property
    def is_full(self) -> bool:
        """So much waits for the store that no more should be done until some of it is kept."""
        return self._waiting >= MOST_WAITING

    def require_room(self) -> None:
        """Refuse what would wait for the store if too much does already.

        Raises:
            Overloaded: with the time after which to come again.
        """
        if self.is_full:
            raise Overloaded(
                f"sessions whose changes wait for the store must stay within {MOST_WAITING};"
                f" {self._waiting} wait",
                retry_after_s=_RETRY_AFTER_S,
            )

    def may_commit_here(self, size: int) -> bool:
        """Whether so many records are committed in place."""
        if self._store.is_volatile:
            return True
        small = self.cost.of(size) <= COMMIT_IN_PLACE_S
        return small and not self._waiting and not self._store.waits_for_disk

    def commit_here(self, batch: Batch, size: int) -> None:
        """Commit on the calling thread; only if `may_commit_here`.

        Raises:
            Unavailable: it was not kept.
        """
        started = time.perf_counter()
        self._store.commit(batch)
        if size:
            self.cost.learn(size, time.perf_counter() - started)
        if self._store.needs_checkpoint:
            self._loop.call_soon(self._checkpoint_here)

    def submit(self, build: Callable[[], Batch], size: int, done: Done) -> None:
        """Commit what `build` makes; `done` is called on the event loop, maybe before this returns.

        Args:
            build: May be called on another thread.
            size: Records in it, about.
            done: Gets None, or why nothing of it was kept. It must not raise.
        """
        item = _Item(build, size, done)
        if self.may_commit_here(size):
            _keep([item], lambda batch: self.commit_here(batch, size))
            done(item.error)
        else:
            self._hand_over(item)

    def on_room(self, listener: Callable[[], None]) -> None:
        """Call `listener` when `is_full` has ended."""
        self._listeners.append(listener)

    async def idle(self) -> None:
        """Return when nothing waits for the store."""
        while self._waiting:
            self._idle = self._idle or self._loop.create_future()
            await asyncio.shield(self._idle)

    async def room(self) -> None:
        """Return when not too much waits for the store."""
        while self.is_full:
            self._room = self._room or self._loop.create_future()
            await asyncio.shield(self._room)

    def close(self, timeout_s: float) -> bool:
        """End the thread; False if the store did not come back to it in time."""
        self._queue.put(None)
        if self._thread is not None:
            self._thread.join(timeout_s)
        return self._thread is None or not self._thread.is_alive()

    def _hand_over(self, item: _Item) -> None:
        self._waiting += max(1, item.size)
        if self._thread is None:
            # a daemon: a store that never comes back must not keep the process from ending
            self._thread = threading.Thread(target=self._work, name="stepwell-store", daemon=True)
            self._thread.start()
        self._queue.put(item)

    def _work(self) -> None:
        while items := self._take():
            size = sum(item.size for item in items)
            started = time.perf_counter()
            _keep(items, self._store.commit)
            waits_for_disk = self._store.waits_for_disk
            if not waits_for_disk:
                if size:
                    self.cost.learn(size, time.perf_counter() - started)
                # before anything is told: then the event loop may use the store
                self._store.checkpoint()
            try:
                self._loop.call_soon_threadsafe(self._finish, items)
            except RuntimeError:  # the event loop was closed: nobody is left to be told
                return
            if waits_for_disk:
                self._store.checkpoint()

    def _checkpoint_here(self) -> None:
        if not self._waiting and not self._store.waits_for_disk:
            self._store.checkpoint()

    def _take(self) -> list[_Item]:
        """What is committed next, together; nothing at the end."""
        items: list[_Item] = []
        size = 0
        item = self._queue.get()
        while item is not None:
            items.append(item)
            size += item.size
            if size >= MOST_TOGETHER or self._queue.empty():
                return items
            item = self._queue.get()
        if items:
            self._queue.put(None)  # the end comes after these
        return items

    def _finish(self, items: Sequence[_Item]) -> None:
        was_full = self.is_full
        for item in items:
            self._waiting -= max(1, item.size)
            item.done(item.error)
        if was_full and not self.is_full:
            for listener in self._listeners:
                listener()
            if self._room is not None:
                self._room.set_result(None)
                self._room = None
        if not self._waiting and self._idle is not None:
            self._idle.set_result(None)
            self._idle = None


def _keep(items: Sequence[_Item], commit: Callable[[Batch], None]) -> None:
    """Build and commit, in as few transactions as the order allows; each item gets its error."""
    for item in items:
        try:
            item.batch = item.build()
        except Exception as error:
            item.error = reason(error)
    for group in _groups([item for item in items if item.error is None]):
        try:
            commit(_merged([item.batch for item in group]))
        except Exception as error:
            if len(group) == 1:
                group[0].error = reason(error)
            else:
                _keep_each(group, commit)


def _keep_each(items: Iterable[_Item], commit: Callable[[Batch], None]) -> None:
    """One by one what could not be kept together: on a full disk the end of a session may be, its beginning not."""
    for item in items:
        try:
            commit(item.batch)
        except Exception as error:
            item.error = reason(error)


def _groups(items: Iterable[_Item]) -> list[list[_Item]]:
    """Neighbours that may share a transaction: one that names what another deletes comes after it."""
    groups: list[list[_Item]] = []
    gone: set[str] = set()
    for item in items:
        batch = item.batch
        named = [*batch.forgets, *(put[0] for put in batch.puts)] if gone else ()
        if not groups or not gone.isdisjoint(named):
            groups.append([])
            gone = set()
        groups[-1].append(item)
        gone.update(batch.deletes)
        gone.update(stone.session_id for stone in batch.tombstones)
    return groups


def _merged(batches: Sequence[Batch]) -> Batch:
    if len(batches) == 1:
        return batches[0]
    return Batch(
        puts=Joined([batch.puts for batch in batches if batch.puts]),
        deletes=[name for batch in batches for name in batch.deletes],
        forgets=[name for batch in batches for name in batch.forgets],
        tombstones=[stone for batch in batches for stone in batch.tombstones],
        counts=[count for batch in batches for count in batch.counts],
    )


def reason(error: Exception) -> ServerError:
    """Why a store did not do something, as callers may hear it; the log has what they may not."""
    if isinstance(error, ServerError):
        return error
    return _log.internal("the store raised", error)
