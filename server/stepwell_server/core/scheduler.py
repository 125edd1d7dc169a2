"""Chooses what runs next: work of the source that has used least.

Callers share passes, the event loop and the compute threads. A `FairQueue` gives each of these to the source that
has used least of it (start-time fair queueing: Goyal, Vin, Cheng, "Start-time fair queuing", SIGCOMM 1996). A
source is a path, (tenant, caller, connection), or a model. Tenants have equal shares, then the callers of a tenant,
then the connections of a caller: a thousand jobs or connections have one share. A single active source gets
everything.
"""

from __future__ import annotations

import heapq
import itertools
import math
from collections import Counter, deque
from collections.abc import Callable, Hashable, Sequence
from typing import Generic, Protocol, Self, TypeVar

from stepwell_server.core.callers import Caller

#: A source counts as active for this many seconds after it had a job in a pass.
ACTIVE_S = 0.05
#: Sources are equals if the one that had the fewest rows recently had at least this share of the mean.
_EQUALS_SHARE = 0.5
#: Consecutive rows of one source in a pass that several sources share.
_QUANTUM = 16
#: A source is light if it has at most a quarter of a short pass (1 / this). Light sources have every other pass to
#: themselves.
_LIGHT_SHARE = 4

#: A model that becomes active starts this many seconds behind the others: one iteration.
CREDIT_S = 400e-6

Source = tuple[Hashable, ...]
"""The sender of work: tenant, caller, connection; or the model it is for. Never empty."""
T = TypeVar("T")
#: The source of many callers' steps that run together, while all of them fit into one pass.
ALL_CALLERS: Source = (None,)
#: The source of steps that run without jobs, where it counts as one of several.
_STEPS: Source = ("steps",)


def source_of(caller: Caller, connection: Hashable) -> Source:
    """The source of a request: its caller and connection."""
    return (caller.tenant, caller.name, connection)


class _Node(Generic[T]):
    """A source, or several with the same beginning."""

    __slots__ = ("active", "children", "count", "heap", "is_new", "items", "served", "start")

    def __init__(self, start: float) -> None:
        self.start = start
        """The amount it has used. A new node starts level with the others."""
        self.is_new = True
        """It has not been charged yet."""
        self.count = 0
        """Its items, and those of the nodes below."""
        self.items: deque[T] = deque()
        self.children: dict[Hashable, _Node[T]] = {}
        self.heap: list[tuple[float, int, Hashable]] = []
        """The children by `start`, then in the order of arrival. A child's `start` may have grown since."""
        self.active = 0
        """Children that have items."""
        self.served = 0.0
        """Where a new child starts: the largest `start` of a child when it was served, or later."""


class FairQueue(Generic[T]):
    """Items of several sources; those of one source stay in order. Not thread-safe."""

    def __init__(self, credit: float = 0.0) -> None:
        """A source that becomes active starts at `credit` less than the source served last."""
        self._credit = credit
        self._root: _Node[T] = _Node(0.0)
        self._order = itertools.count()

    def __bool__(self) -> bool:
        return self._root.count > 0

    def add(self, source: Source, item: T) -> None:
        """Append an item to those of its source."""
        node = self._root
        node.count += 1
        for key in source:
            child = self._child(node, key)
            node.active += not child.count
            child.count += 1
            node = child
        node.items.append(item)

    def next(self) -> Source:
        """The source that is served next. The queue must not be empty."""
        path: list[Hashable] = []
        node = self._root
        while node.heap:
            start, _, key = node.heap[0]
            child = node.children[key]
            if start < child.start:
                heapq.heapreplace(node.heap, (child.start, next(self._order), key))
            elif not child.count:  # the others have used as much since
                heapq.heappop(node.heap)
                del node.children[key]
            else:
                node.served = max(node.served, child.start)
                path.append(key)
                node = child
        return tuple(path)

    def has_others(self, source: Source) -> bool:
        """Whether other sources than this one have items; it has one key."""
        count = self._root.count
        if not count:
            return False
        own = self._root.children.get(source[0])
        return count > (0 if own is None else own.count)

    def first(self, source: Source) -> T:
        """The first item of a source that has one."""
        return self._at(source).items[0]

    def _at(self, source: Source) -> _Node[T]:
        node = self._root
        for key in source:
            node = node.children[key]
        return node

    def pop(self, source: Source) -> T:
        """Remove and return the first item of a source that has one."""
        node = self._root
        node.count -= 1
        for key in source:
            child = node.children[key]
            child.count -= 1
            node.active -= not child.count
            node = child
        return node.items.popleft()

    def pop_all(self, source: Source) -> list[T]:
        """Remove and return all items of a source that has some."""
        return [self.pop(source) for _ in range(self._at(source).count)]

    def charge(self, source: Source, cost: float) -> None:
        """Count what a source has used, now or earlier."""
        node = self._root
        for key in source:
            child = self._child(node, key)
            if child.is_new:  # otherwise a source that has been served would wait for all new ones
                child.is_new = False
                node.served = max(node.served, child.start + cost / max(1, node.active))
            child.start += cost
            node = child

    def _child(self, node: _Node[T], key: Hashable) -> _Node[T]:
        child, least = node.children.get(key), node.served - self._credit
        if child is None:
            child = node.children[key] = _Node(least)
            heapq.heappush(node.heap, (least, next(self._order), key))
        elif not child.count and child.start < least:
            child.start = least
        return child


class LoopQueue:
    """Splits large work on the event loop: one part runs between two polls of the network.

    A small step runs as soon as it arrives. So it waits for at most one part of large work, whatever else is
    active: passes, the intake of large batches, pieces of calls on many sessions. Lives on the event loop.
    """

    def __init__(self, call_soon: Callable[[Callable[[], None]], object]) -> None:
        """`call_soon` schedules a function for the next iteration of the event loop."""
        self._call_soon = call_soon
        self._parts: FairQueue[Callable[[], None]] = FairQueue()
        self._is_scheduled = False

    def add(self, source: Source, split_off: Callable[[], None]) -> None:
        """Run `part` in an iteration of the event loop with no other part. Sources get equal numbers of parts."""
        self._parts.add(source, split_off)
        if not self._is_scheduled:
            self._is_scheduled = True
            self._call_soon(self._run_next)

    def _run_next(self) -> None:
        source = self._parts.next()
        split_off = self._parts.pop(source)
        self._parts.charge(source, 1)
        try:
            split_off()
        finally:  # the event loop logs the error
            self._is_scheduled = bool(self._parts)
            if self._is_scheduled:
                self._call_soon(self._run_next)


class Share:
    """One model's share of the event loop and of the threads. Lives on the event loop."""

    __slots__ = (
        *("_alone_from", "_listener", "_others", "_shares", "_uses"),
        *("is_due", "label", "last_on_threads", "pieces", "wanted_s"),
    )

    def __init__(self, shares: Shares, label: str) -> None:
        self._shares = shares
        self._listener: Callable[[], bool] | None = None
        self._uses = 0
        self._others = 0
        """How often other models had used the event loop at the last call of `is_alone`."""
        self._alone_from = 0.0
        self.label = label
        """The model's name, for the log."""
        self.is_due = False
        """The listener is about to be called, or is running."""
        self.last_on_threads = 0.0
        """When it last began or ended a pass on threads."""
        self.pieces = 0
        """Pieces of its pass that wait or run."""
        self.wanted_s = 0.0
        """Seconds that its last pass on threads would have taken at its preferred length."""

    def listen(self, listener: Callable[[], bool]) -> None:
        """Register the function to call when the model is next on the event loop.

        It returns whether to call it again.
        """
        self._listener = listener

    def ring(self) -> None:
        """Schedule a call of the listener. Calling this again before the listener returns has no further effect."""
        if not self.is_due and self._listener is not None:
            self.is_due = True
            self._shares.add(self)

    @property
    def must_wait(self) -> bool:
        """Whether other models are due."""
        return self._shares.due.has_others((self,))

    def is_alone(self, now: float) -> bool:
        """Whether no other model has recently used the event loop. For work that may disturb others; it is asked often."""
        others = self._shares.uses - self._uses
        if others != self._others:
            self._others, self._alone_from = others, now + ACTIVE_S
        return now >= self._alone_from

    def count_use(self) -> None:
        """Count a use of the event loop."""
        self._uses += 1
        self._shares.uses += 1

    def used(self, seconds: float) -> None:
        """Charge time on the event loop in addition to the listener's."""
        self._uses += 1  # as `count_use`, for each step that runs without a pass
        self._shares.uses += 1
        self._shares.due.charge((self,), seconds)

    def leave(self) -> None:
        """The model is unloaded: its listener is not called any more."""
        self._listener = None

    def run(self) -> None:
        """Call the listener; for `Shares`."""
        is_due = False
        try:
            is_due = self._listener is not None and self._listener()
        except Exception as error:  # the other models must continue
            self._shares.on_defect(self.label, error)
        self.is_due = is_due


class Shares:
    """Chooses which model runs next on the event loop. Lives there."""

    def __init__(
        self, now: Callable[[], float], loop_queue: LoopQueue, on_defect: Callable[[str, Exception], None]
    ) -> None:
        """`on_defect` is called with the model's label and the error when a listener raises."""
        self._now = now
        self._loop_queue = loop_queue
        self.on_defect = on_defect
        self.due: FairQueue[Share] = FairQueue(CREDIT_S)
        """Models whose listeners are to be called."""
        self._is_scheduled = False
        """The loop queue already holds a part for this. A second one would run without a poll of the network in
        between."""
        self.uses = 0
        """How often models have used the event loop."""

    def add(self, share: Share) -> None:
        """Schedule a model; for `Share`."""
        self.due.add((share,), share)
        self._schedule()

    def run_next(self) -> None:
        """Run the next due model now, if there is one, instead of in another iteration of the event loop."""
        if self.due:
            self._run()

    def _schedule(self) -> None:
        if not self._is_scheduled:
            self._is_scheduled = True
            self._loop_queue.add(("passes",), self._scheduled)

    def _scheduled(self) -> None:
        self._is_scheduled = False
        self.run_next()

    def _run(self) -> None:
        source = self.due.next()
        share = self.due.pop(source)
        began = self._now()
        share.count_use()
        share.run()
        self.due.charge(source, self._now() - began)
        if share.is_due:
            self.due.add(source, share)
        if self.due:
            self._schedule()


class Schedulable(Protocol):
    """What the scheduler needs of a job."""

    @property
    def row_count(self) -> int:
        """The rows that it adds to a pass."""

    @property
    def steps_left(self) -> int:
        """The time steps that it still has to run."""

    @property
    def source(self) -> Source:
        """The sender of the job."""

    @property
    def is_splittable(self) -> bool:
        """Whether `split_off` may be called."""

    def split_off(self, rows: int, /) -> Self:
        """Split off its first sessions as a job of its own: up to `rows` rows, but at least one session.

        Returns the job itself if that is all of it.
        """


J = TypeVar("J", bound=Schedulable)


def _left(rows: float, seconds: float) -> float:
    """Return what remains of rows that ran some time ago."""
    return rows * math.pow(0.5, seconds / ACTIVE_S)


class Scheduler(Generic[J]):
    """The ready jobs of one model. Each session is in at most one of them.

    While several sources are active, passes are short, and jobs of many sessions are split. A job of several time
    steps moves to the end of its source's jobs after each pass.
    """

    def __init__(self, max_rows: int) -> None:
        self._max_rows = max_rows
        self._queue: FairQueue[J] = FairQueue()
        self._waiting: Counter[Source] = Counter()
        """Waiting rows, by source."""
        self._active: dict[Source, tuple[float, int, float]] = {}
        """When each source last had jobs in a pass, their rows, and its rows of recent passes; the latest last.

        Rows of earlier passes count by half for each `ACTIVE_S` that has passed since.
        """
        self._light: list[Source] = []
        """Sources that have the next pass to themselves."""
        self._was_light = False
        """The latest pass had only light sources."""
        self.rows_waiting = 0
        self.contended_until = -math.inf
        """Until then, jobs of many time steps run in short slices, because other work has come meanwhile."""
        self.alone_until = -math.inf
        self.alone_by: object = None
        """Until when the sender of the last step that ran without a job is active, and its connection, or a list of it.
        Plain attributes: each such step sets them."""

    def __bool__(self) -> bool:
        return bool(self._queue)

    def add(self, job: J) -> None:
        """Append a job to those of its source."""
        self._wait(job.source, job.row_count)
        self._queue.add(job.source, job)

    def _wait(self, source: Source, rows: int) -> None:
        self.rows_waiting += rows
        self._waiting[source] += rows
        if not self._waiting[source]:
            del self._waiting[source]

    def is_contended(self, now: float) -> bool:
        """Whether several sources are active."""
        active, waiting = self._active, self._waiting
        if (
            not waiting and now > self.alone_until and len(active) < 2
        ):  # the common case, also if one is inactive
            return False
        self._forget_inactive(now)
        if len(active) > 1 or len(waiting) > 1 or (active and not waiting.keys() <= active.keys()):
            return True
        return self._is_beside_steps(now)

    def _is_beside_steps(self, now: float) -> bool:
        """Whether another connection than those with jobs has sent a step that ran without one."""
        if now > self.alone_until or self.alone_by is None:
            return False
        connection = self.alone_by[0] if isinstance(self.alone_by, list) else self.alone_by
        with_jobs = {source[-1] for source in {*self._waiting, *self._active} - {ALL_CALLERS}}
        return bool(with_jobs) and connection not in with_jobs

    def may_overtake(self, rows: int, short: int) -> bool:
        """Whether steps of so many rows may run before what waits, without a job; `short`: rows of a short pass.

        They are as few as those of a light source. Whatever waits still has every other part of the event loop's time.
        """
        return not self.rows_waiting or rows <= short // _LIGHT_SHARE

    def only_source(self, now: float) -> Source | None:
        """The only source with jobs in recent passes; None: there were several, or none."""
        self._forget_inactive(now)
        return next(iter(self._active)) if len(self._active) == 1 else None

    def _forget_inactive(self, now: float) -> None:
        active = self._active
        while active and next(iter(active.values()))[0] < now - ACTIVE_S:
            del active[next(iter(active))]

    def max_rows_of_pass(self, now: float, short: int) -> int | None:
        """The row limit of the next pass, so that sources that send meanwhile do not wait long; None: `max_rows`.

        A single active source gets full passes, and so do equals: with short ones, whoever happened to be late once
        would stay behind. Otherwise a pass has `short` rows, or more if each source has as many, and light sources
        have every other pass to themselves.
        """
        if self.rows_waiting <= short or not self.is_contended(now) or self._are_equals(now):
            return None
        rows = (
            Counter({source: rows for source, (_, rows, _) in self._active.items()}) | self._waiting
        )  # the larger ones
        rows.pop(ALL_CALLERS, None)
        if self._is_beside_steps(now):
            rows[_STEPS] = 1
        light = [source for source, count in self._waiting.items() if count <= short // _LIGHT_SHARE]
        self._light = light if not self._was_light and len(light) < len(self._waiting) else []
        return max(short, len(rows) * min(rows.values(), default=0) + self._waiting[ALL_CALLERS])

    def _are_equals(self, now: float) -> bool:
        """Whether all sources that are active or wait had similar numbers of rows recently."""
        active = self._active
        if self._is_beside_steps(now) or not self._waiting.keys() <= active.keys():
            return False
        recent = [_left(rows, now - at) for source, (at, _, rows) in active.items() if source != ALL_CALLERS]
        return min(recent, default=0) * len(recent) >= _EQUALS_SHARE * sum(recent)

    def ran(self, source: Source, rows: int, now: float) -> None:
        """Note that rows of a source ran without a job."""
        recent = float(rows)
        if (former := self._active.pop(source, None)) is not None:
            recent += _left(former[2], now - former[0])
        self._active[source] = (now, rows, recent)

    def next_pass(self, now: float = 0.0, limit: int | None = None) -> list[J]:
        """Take the jobs of the next pass, up to `max_rows` rows.

        With a `limit` of rows, jobs are split where possible. A job that exceeds it makes a pass of its own.
        """
        light, self._light = self._light, []
        self._was_light = bool(light)
        room = self._max_rows if limit is None else min(limit, self._max_rows)
        taken = self._of_light(light, room) if light else self._round_robin(room, can_split=limit is not None)
        rows: dict[Source, int] = {}
        for job in taken:
            self._wait(job.source, -job.row_count)
            rows[job.source] = rows.get(job.source, 0) + job.row_count
        for source, count in rows.items():
            self.ran(source, count, now)
        return taken

    def _of_light(self, light: Sequence[Source], room: int) -> list[J]:
        """Take all jobs of light sources that fit."""
        taken: list[J] = []
        for source in light:
            rows = self._waiting[source]
            if rows <= room:
                taken += self._queue.pop_all(source)
                self._queue.charge(source, rows)
                room -= rows
        return taken

    def _round_robin(self, room: int, *, can_split: bool) -> list[J]:
        """Take jobs of all sources, a few rows of each at a time. The first job that does not fit ends it."""
        queue = self._queue
        chosen: dict[J, int] = {}
        """Rows of each."""
        while queue and room > 0:
            source = queue.next()
            job = queue.first(source)
            left = job.row_count - chosen.get(job, 0)
            count = min(left, room, _QUANTUM) if can_split and job.is_splittable else left
            if count > room and chosen:
                break
            chosen[job] = chosen.get(job, 0) + count
            room -= count
            if count == left:
                queue.pop(source)
            queue.charge(source, count)
        return [self._taken_part(job, count) for job, count in chosen.items()]

    def _taken_part(self, job: J, count: int) -> J:
        """A job, or its part of that many rows, of which the rest has stayed first of its source."""
        taken = job if count == job.row_count else job.split_off(count)
        if (
            taken is job and count < job.row_count
        ):  # it is one session, and has more rows than there was room for
            self._queue.pop(job.source)
        return taken

    def steps_together(self, chosen: Sequence[J], budget: int) -> int:
        """How many time steps the chosen jobs may run in one pass: 1 if anything else waits."""
        if self or budget <= 1:
            return 1
        return max(1, min(budget, *(job.steps_left for job in chosen)))
