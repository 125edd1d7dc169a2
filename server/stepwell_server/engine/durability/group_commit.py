"""Commits: what has happened is kept by the store, in its order, before anybody hears of it.

A commit that waits for the disk, or is large, is made by a thread while the next pass runs; what comes meanwhile
goes into the next transaction together. One that costs less than the hand-over is made in place. Small changes of
sessions do not wait for what is large: they pass it. A store that is awaited has no thread: its commits are tasks.
"""

from __future__ import annotations

import asyncio
import dataclasses
import time
from collections import deque
from collections.abc import Callable, Iterable, Sequence

import numpy as np

from stepwell_server.engine.cost import Cost
from stepwell_server.engine.durability.store_thread import StoreThread
from stepwell_server.engine.state.model import Alarm
from stepwell_server.errors import Overloaded, ServerError
from stepwell_server.logs import Log
from stepwell_server.store.base import ALL_KEPT, NO_LIMITS, Batch, Committed, LocalStore, Store
from stepwell_server.store.record import F64, Joined, Stored

_log = Log("engine.commit")

#: A commit expected to take less is made on the event loop: a thread costs more, in waiting for Python's lock.
COMMIT_IN_PLACE_S = 1e-3
#: Up to so many records are made on the event loop, although the store's thread writes them: while that thread makes
#: them it takes Python's lock from the loop, again and again. More of them would hold up the loop for too long.
MADE_HERE = 512
#: Changes of up to so many sessions are small. They pass what begins or ends sessions; and the changes of others, where
#: those are of many sessions together. Then no more than few are made here.
FEW, MANY = 64, 256
#: So many records may be due to be checkpointed; then it is a thread that commits more, and checkpoints them.
MOST_BEHIND = 4096
#: Records in one transaction at most, unless a single batch has more.
MOST_TOGETHER = 8192
#: Beside small changes that wait for the disk, so many sessions begin or end in one transaction: each is a page or two
#: somewhere, and a small write waits at the disk for all of a transaction's. "Beside" are so many turns of the thread
#: after each: a second or so.
MOST_BESIDE, TURNS_BESIDE = 8, 1024
#: Commits to an awaited store at the same time.
MOST_UNDER_WAY = 8
#: So many sessions may wait for the store before passes wait too.
MOST_WAITING = 32_768

_RETRY_AFTER_S = 0.5

_NOTHING = Batch()

Done = Callable[[Committed | ServerError], None]
_Named = set[str | tuple[str]]
"""Sessions and, each as a tuple, documents."""


@dataclasses.dataclass(slots=True, eq=False)
class _Item:
    """What is to be kept, and who wants to know."""

    build: Callable[[], Batch]
    size: int
    done: Done
    is_change: bool = False
    is_hurried: bool = False
    passes: bool = False
    made: bool = False
    batch: Batch = _NOTHING
    error: ServerError | None = None

    @property
    def is_small(self) -> bool:
        """See `FEW`."""
        return self.size <= FEW

    def make(self) -> None:
        """Build the batch, unless that was done, or note why it could not be."""
        if self.made:
            return
        self.made = True
        try:
            self.batch = self.build()
        except Exception as error:
            self.error = reason(error)


class GroupCommit:
    """Commits to a store. Lives on the event loop.

    A store that answers in place has a thread once that is needed, and another for small changes, which pass what is
    large; one that is awaited has a few commits under way at the same time, never two that name the same session or
    document.
    """

    def __init__(self, store: Store, on_room: Callable[[], None] = lambda: None) -> None:
        """`on_room` is called when `is_full` has ended."""
        self._on_room = on_room
        self.cost = Cost()
        """Of a commit by its records."""
        self._waiting = 0
        self.is_full = False
        """So much waits for the store that no more should be done until some of it is kept."""
        self._local = None if store.local is None else _Local(store.local, self.cost, self._finish)
        self._lane = self._local or _Awaited(store, self._finish)
        self._changed = asyncio.Event()
        """Set when less waits for the store."""

    @property
    def is_idle(self) -> bool:
        """Nothing waits for the store."""
        return not self._waiting

    @property
    def waiting(self) -> int:
        """Sessions whose changes wait for the store."""
        return self._waiting

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
        return self._local is not None and not self._waiting and self._local.may_commit_here(size)

    def submit(
        self,
        build: Callable[[], Batch],
        size: int,
        done: Done,
        *,
        is_change: bool = False,
        is_hurried: bool = False,
    ) -> None:
        """Commit what `build` makes; `done` is called on the event loop, maybe before this returns.

        Args:
            build: May be called on another thread.
            size: Records in it, about.
            done: Gets what became of each session, or why nothing of it was kept. It must not raise.
            is_change: It may be kept before what waits: it is changes of sessions that have been kept, and are claimed, so
                nothing that waits names them.
            is_hurried: Such a change, if it is small, does not wait for larger ones either: they are of others.
        """
        item = _Item(build, size, done, is_change, is_hurried)
        if self._local is not None:
            is_here = self.may_commit_here(size)
            if is_here:
                self._local.commit_here(item)
            if is_here or self._local.append_here(item):
                done(item.error or ALL_KEPT)
                return
        self._waiting += max(1, item.size)
        self.is_full = self._waiting >= MOST_WAITING
        self._lane.put(item)

    async def idle(self) -> None:
        """Return when nothing waits for the store."""
        while self._waiting:
            self._changed.clear()
            await self._changed.wait()

    async def room(self) -> None:
        """Return when not too much waits for the store."""
        while self.is_full:
            self._changed.clear()
            await self._changed.wait()

    def close(self, timeout_s: float) -> bool:
        """End; False if the store did not come back from a commit in time. For any thread."""
        return self._lane.close(timeout_s)

    def _finish(self, items: Sequence[_Item], committed: Committed) -> None:
        was_full = self.is_full
        for item in items:
            self._waiting -= max(1, item.size)
            self.is_full = self._waiting >= MOST_WAITING
            item.done(item.error or committed)
        if was_full and not self.is_full:
            self._on_room()
        self._changed.set()


Finish = Callable[[Sequence[_Item], Committed], None]


class _Local:
    """Commits to a store that answers in place: here, or on threads of its own.

    What begins or ends sessions, and what is large, is done by one thread in the order in which it came. Small changes
    pass it where the store has a log for them: here, or by a second thread if that waits for the disk.
    """

    def __init__(self, store: LocalStore, cost: Cost, finish: Finish) -> None:
        self._store = store
        self._cost = cost
        self._finish = finish
        self._loop = asyncio.get_running_loop()
        self._handed_over = 0
        self._others = 0
        """Of those that the first thread has: what is no mere change of sessions."""
        self._changes = 0
        """And how many sessions the changes are of."""
        self._turns = self._beside_until = 0
        """How many the first thread had; and will have had when small changes have not come for long."""
        self._will_checkpoint = False
        self._main = StoreThread("stepwell-store", self._commit, self._goes_along)
        self._small = StoreThread(
            "stepwell-store-log", self._append, lambda _items, size, _found: size < MOST_TOGETHER
        )

    def may_commit_here(self, size: int) -> bool:
        """Whether to commit so many records at once costs less than to hand them over, while nothing waits."""
        store = self._store
        if store.for_one_thread:
            return True
        is_short = self._cost.of(size) <= COMMIT_IN_PLACE_S and (size <= FEW or store.behind <= MOST_BEHIND)
        return is_short and not store.waits_for_disk

    def commit_here(self, item: _Item) -> None:
        store = self._store
        started = time.perf_counter()
        _keep([item], store.commit)
        if item.size and item.error is None:
            self._cost.learn(item.size, time.perf_counter() - started)
        if store.needs_checkpoint:
            self._checkpoint_soon()

    def append_here(self, item: _Item) -> bool:
        """Whether something small was done at once, although others wait."""
        if not (item.is_change and self._store.has_log and self.may_commit_here(item.size)):
            return False
        item.make()
        started = time.perf_counter()
        if item.error is None:
            if not self._try_append([item]):
                return False
            if item.error is None:
                self._cost.learn(item.size, time.perf_counter() - started)
        return True

    def put(self, item: _Item) -> None:
        self._handed_over += 1
        if item.size <= (FEW if item.is_hurried and self._changes > MANY else MADE_HERE):
            item.make()
        if item.is_change and item.size <= FEW and self._store.waits_for_disk:
            self._beside_until = self._turns + TURNS_BESIDE
        item.passes = self._passes(item)
        if item.passes:
            self._small.put(item)
            return
        self._count(item, 1)
        self._main.put(item)

    def _passes(self, item: _Item) -> bool:
        """Whether something small is better off with the second thread: else what waits is best written together."""
        store = self._store
        is_small = item.is_change and item.size <= FEW and item.error is None
        if not (is_small and store.has_log and store.waits_for_disk):
            return False
        # the first thread may be busy with a checkpoint as long as one is due
        return self._others > 0 or (item.is_hurried and self._changes > MANY) or store.needs_checkpoint

    def _count(self, item: _Item, by: int) -> None:
        if item.is_change:
            self._changes += by * item.size
        else:
            self._others += by

    def close(self, timeout_s: float) -> bool:
        until = time.monotonic() + timeout_s
        # the first one may have left something to the second
        have_ended = [t.close(max(0.0, until - time.monotonic())) for t in (self._small, self._main)]
        return all(have_ended)

    def _goes_along(self, items: Sequence[_Item], size: int, found: _Item) -> bool:
        """For the first thread.

        What is small does not wait for what is many behind it. And no change becomes part of a transaction where it can
        be written to a log.
        """
        if self._store.has_log and found.is_change != items[0].is_change:
            return False
        if not found.is_change and self._turns < self._beside_until and size + found.size > MOST_BESIDE:
            return False
        return size < MOST_TOGETHER and not (size <= FEW and found.size > MANY)

    def _append(self, items: Sequence[_Item]) -> bool:
        """Small changes, on their thread; False if nobody is left to be told."""
        if not self._try_append(items):
            for item in items:
                self._main.put(item)
            return True
        goes_on = self._report(items)
        if self._store.needs_checkpoint:
            self._main.wake()
        return goes_on

    def _try_append(self, items: Sequence[_Item]) -> bool:
        try:
            return self._store.append(_merged([item.batch for item in items]).puts)
        except Exception as error:
            _fail(items, error)
            return True

    def _commit(self, items: Sequence[_Item]) -> bool:
        """All else. Nothing at all is a wake-up: there is something to checkpoint."""
        self._turns += 1
        size = sum(item.size for item in items)
        started = time.perf_counter()
        _keep(items, self._store.commit)
        waits_for_disk = self._store.waits_for_disk
        if not waits_for_disk:
            if size:
                self._cost.learn(size, time.perf_counter() - started)
            # before anything is told: then the event loop may use the store
            self._store.checkpoint()
        goes_on = self._report(items)
        if waits_for_disk and goes_on and not self._main.has_small:  # they come first; those after them pass
            self._store.checkpoint()
        return goes_on

    def _report(self, items: Sequence[_Item]) -> bool:
        try:
            if items:
                self._loop.call_soon_threadsafe(self._tell, items)
        except RuntimeError:  # the event loop was closed
            return False
        return True

    def _tell(self, items: Sequence[_Item]) -> None:
        self._handed_over -= len(items)
        for item in items:
            if not item.passes:
                self._count(item, -1)
        self._finish(items, ALL_KEPT)

    def _checkpoint_soon(self) -> None:
        if not self._will_checkpoint:
            self._will_checkpoint = True
            self._loop.call_soon(self._checkpoint_here)

    def _checkpoint_here(self) -> None:
        self._will_checkpoint = False
        if not self._handed_over and not self._store.waits_for_disk:
            self._store.checkpoint(briefly=True)
            if self._store.behind:
                self._checkpoint_soon()


class _Awaited:
    """Commits to a store that is awaited: at once if none is under way, else with what comes in the same turn of the loop."""

    def __init__(self, store: Store, finish: Finish) -> None:
        self._store = store
        self._finish = finish
        self._queue: list[_Item] = []
        self._busy: _Named = set()
        """What a commit which is under way names."""
        self._under_way: set[asyncio.Future[Committed]] = set()
        self._work = Alarm(self._start)

    def put(self, item: _Item) -> None:
        item.make()
        self._queue.append(item)
        if self._under_way:
            self._work.ring()
        else:
            self._start()

    def close(self, _timeout_s: float) -> bool:
        return not self._under_way

    def _start(self) -> None:
        while self._queue and len(self._under_way) < MOST_UNDER_WAY:
            items, ids = self._take()
            if not items:
                return
            self._commit(items, ids)

    def _take(self) -> tuple[list[_Item], _Named]:
        """What may be committed together now, in the order of all that it names; and all it names."""
        taken: list[_Item] = []
        named: _Named = set()
        left: list[_Item] = []
        blocked = set(self._busy)
        size = 0
        for item in self._queue:
            ids = _named(item.batch)
            is_alike = not taken or item.batch.idle_s == taken[0].batch.idle_s
            if size >= MOST_TOGETHER or not is_alike or not blocked.isdisjoint(ids):
                left.append(item)
            else:
                taken.append(item)
                named |= ids
                size += item.size
            blocked |= ids
        self._queue = left
        return taken, named

    def _commit(self, items: Sequence[_Item], ids: _Named) -> None:
        sound = [item for item in items if item.error is None]
        if not sound:
            self._finish(items, ALL_KEPT)
            return
        try:
            committing = self._store.commit(_merged([item.batch for item in sound]))
        except Exception as error:
            _fail(sound, error)
            self._finish(items, ALL_KEPT)
            return
        under_way = (
            committing if isinstance(committing, asyncio.Future) else asyncio.ensure_future(committing)
        )
        self._busy |= ids
        self._under_way.add(under_way)

        def ended(under_way: asyncio.Future[Committed]) -> None:
            self._under_way.discard(under_way)
            self._busy -= ids
            if under_way.cancelled():  # the event loop ends
                return
            committed = ALL_KEPT
            try:
                committed = under_way.result()
            except Exception as error:
                _fail(sound, error)
            self._finish(items, committed)
            if self._queue:
                self._start()

        under_way.add_done_callback(ended)


def _fail(items: Sequence[_Item], error: Exception) -> None:
    why = reason(error)
    for item in items:
        item.error = why


def _keep(items: Sequence[_Item], commit: Callable[[Batch], None]) -> None:
    """Build and commit, in as few transactions as the order allows; each item gets its error."""
    for item in items:
        item.make()
    groups = deque(_groups([item for item in items if item.error is None]))
    while groups:
        group = groups.popleft()
        try:
            commit(_merged([item.batch for item in group]))
        except Exception as error:
            if len(group) == 1:
                group[0].error = reason(error)
            else:  # one by one: on a full disk the end of a session may be kept, its beginning not
                groups.extendleft([item] for item in reversed(group))


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
        puts=Joined([part for batch in batches for part in _parts(batch.puts)]),
        deletes=[name for batch in batches for name in batch.deletes],
        forgets=[name for batch in batches for name in batch.forgets],
        tombstones=[stone for batch in batches for stone in batch.tombstones],
        counts=[count for batch in batches for count in batch.counts],
        tenant_counts=[count for batch in batches for count in batch.tenant_counts],
        documents=[document for batch in batches for document in batch.documents],
        goes_back=any(batch.goes_back for batch in batches),
        follows=np.concatenate([batch.follows for batch in batches]),
        stamps=np.concatenate([batch.stamps for batch in batches]),
        resized=[name for batch in batches for name in batch.resized],
        delete_follows=np.concatenate([batch.delete_follows for batch in batches]),
        undoes=[name for batch in batches for name in batch.undoes],
        idle_s=batches[0].idle_s,
        idle_most_s=_limits(batches),
        documents_follow={name: was for batch in batches for name, was in batch.documents_follow.items()},
    )


def _limits(batches: Sequence[Batch]) -> F64:
    """`Batch.idle_most_s` of all together."""
    if not any(len(batch.idle_most_s) for batch in batches):
        return NO_LIMITS
    each = [
        batch.idle_most_s if len(batch.idle_most_s) else np.full(len(batch.deletes), np.inf)
        for batch in batches
    ]
    return np.concatenate(each)


def _named(batch: Batch) -> _Named:
    return {*batch.session_ids, *((name,) for name, _ in batch.documents)}


def _parts(puts: Sequence[tuple[str, Stored]]) -> Sequence[Sequence[tuple[str, Stored]]]:
    return puts.parts if isinstance(puts, Joined) else [puts] if puts else ()


def reason(error: Exception) -> ServerError:
    """Why a store did not do something, as callers may hear it; the log has what they may not."""
    if isinstance(error, ServerError):
        return error
    return _log.internal("the store raised", error)
