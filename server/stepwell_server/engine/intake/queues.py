"""Queues of changes: for the next iteration of their model's loop, for rows of the arena, and for their sessions.

Each session has one operation at a time: the one with its claim. A change to a claimed session waits in the
session's queue, and so does a read, a fork or a close (a `Hold`). When the claim ends, the first in the queue
starts.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import math
from collections import deque
from collections.abc import Callable, Hashable
from itertools import islice
from typing import Protocol, TypeAlias

import numpy as np

from stepwell_server.alarm import Alarm
from stepwell_server.clock import Clock
from stepwell_server.core.claims import Claims
from stepwell_server.core.idle import IdleLimits
from stepwell_server.core.scheduler import Source
from stepwell_server.core.sessions import Handles, SessionTable
from stepwell_server.engine.api import OnFailed, StepBatch
from stepwell_server.engine.change import Change, joined, kind_of, may_join, too_late
from stepwell_server.engine.intake.pager import PageInErrors, Pager
from stepwell_server.engine.state.model import Model
from stepwell_server.engine.types import Members
from stepwell_server.engine.versions.registry import Models
from stepwell_server.errors import Overloaded, ServerError, SessionGone, SessionLost, VersionElsewhere
from stepwell_server.store.base import Store

#: The most rows that may wait for passes, in passes of full size.
MAX_WAITING_PASSES = 64
#: The most input bytes that may wait, over all models.
MAX_WAITING_BYTES = 512 << 20
#: The most changes that may wait in one session's queue.
MAX_SESSION_QUEUE = 256


RunBatch: TypeAlias = Callable[[StepBatch, int, OnFailed], bool]


@dataclasses.dataclass(slots=True)
class Inboxes:
    """The inboxes of all models, and their total bytes."""

    bytes: int = 0
    """Input bytes that wait or run."""
    waiting: dict[Inbox, None] = dataclasses.field(default_factory=dict)
    """Inboxes with waiting changes, in the order of arrival."""
    of: dict[int, Inbox] = dataclasses.field(default_factory=dict)
    """Each inbox, by its version's number in the table."""


class Inbox:
    """The queued changes of one model, in order. Lives on the event loop.

    A checked change is put here; its sessions may be gone by the time it is drained. Rows are limited per model,
    input bytes over all models. Anything beyond is refused with a retry delay.
    """

    def __init__(self, model: Model, inboxes: Inboxes) -> None:
        """Make an empty inbox of a model, and add it to `inboxes`."""
        self._model = model
        self._inboxes = inboxes
        inboxes.of[model.index] = self
        self._waiting: list[Change] = []
        self._rows = 0
        self.max_waiting = MAX_WAITING_PASSES * model.max_batch_rows
        """The most rows and changes that may wait, unless a single change has more."""
        self._run: Callable[[Change, Handles], bool] = lambda _change, _handles: False
        self._run_batch: RunBatch = lambda _batch, _room, _fail: False

    def __len__(self) -> int:
        return len(self._waiting)

    def listen(self, run: Callable[[Change, Handles], bool]) -> None:
        """Register what `run_at_once` calls while nothing waits here."""
        self._run = run

    def listen_to_batches(self, run: RunBatch) -> None:
        """Register what `run_batch` calls while nothing waits here."""
        self._run_batch = run

    def run_at_once(self, change: Change, handles: Handles) -> bool:
        """Run an unchecked change of sessions in the table instead of queueing it; returns whether it ran."""
        return not self._waiting and self._run(change, handles)

    def run_batch(self, batch: StepBatch, room: int, fail: OnFailed) -> bool:
        """Run a batch of steps: see `Engine.run_batch`."""
        return not self._waiting and self._run_batch(batch, room, fail)

    @property
    def rows(self) -> int:
        """Rows of the changes that wait here."""
        return self._rows

    @property
    def deadline(self) -> float:
        """The earliest deadline of the waiting changes."""
        return min((change.deadline for change in self._waiting), default=float("inf"))

    def is_of(self, source: Source) -> bool:
        """Whether all waiting changes come from one source."""
        return all(change.only_source == source for change in self._waiting)

    @property
    def waiting(self) -> int:
        """Rows and changes that wait: here, for their session, for rows, or for a pass."""
        return self._rows + self._model.ready.rows_waiting + self._model.waiting

    def require_room(self, rows: int, byte_count: int) -> None:
        """Refuse this many rows and input bytes if too much waits already.

        Raises:
            Overloaded: with the time after which there should be room.
        """
        model, held, waiting = self._model, self._inboxes.bytes, self.waiting
        limit = self.max_waiting
        if waiting and waiting + rows > limit:
            raise Overloaded(
                f"rows waiting for model {model.name!r} must stay within {limit}; {waiting} wait, and this call adds {rows}",
                retry_after_s=max(0.01, model.expected_wait_s / 2),
            )
        if held and held + byte_count > MAX_WAITING_BYTES:
            raise Overloaded(
                f"input bytes waiting must stay within {MAX_WAITING_BYTES}; {held} wait, and this call adds {byte_count}",
                retry_after_s=max(0.01, model.expected_wait_s / 2),
            )

    def hold(self, change: Change) -> None:
        """Count a change's bytes until every member has its answer.

        Raises:
            Overloaded: too much waits already; nothing is counted.
        """
        count, held = change.byte_count, self._inboxes
        self.require_room(change.row_count, count)
        held.bytes += count

        def give() -> None:
            held.bytes -= count

        change.on_end = give

    def put(self, change: Change) -> None:
        """Queue a change that is held for the next iteration."""
        if not self._waiting:
            self._inboxes.waiting[self] = None
        self._waiting.append(change)
        self._rows += change.row_count
        self._model.work.ring()

    def drain(self) -> list[Change]:
        """Take all waiting changes."""
        waiting = self._waiting
        if waiting:
            self._waiting, self._rows = [], 0
            del self._inboxes.waiting[self]
        return waiting


def joined_where_alike(waiting: list[Change]) -> list[Change]:
    """The same changes, with similar one-row steps combined into one. The order of each session's changes is kept."""
    if len(waiting) < 2:
        return waiting
    found: list[Change] = []
    groups: dict[Hashable, list[Change]] = {}
    kinds: dict[str, Hashable] = {}
    """The group that each session is in."""

    def end_groups() -> None:
        found.extend(joined(group) for group in groups.values())
        groups.clear()
        kinds.clear()

    for change in waiting:
        if not may_join(change):
            end_groups()
            found.append(change)
            continue
        kind, session_id = kind_of(change), change.session_ids[0]
        if kinds.get(session_id, kind) != kind:
            end_groups()  # earlier changes of the session are in another group and must go first
        kinds[session_id] = kind
        groups.setdefault(kind, []).append(change)
    end_groups()
    return found


class Starter(Protocol):
    """Starts members of a change when they no longer need to wait."""

    def start_due(self, change: Change, members: Members, /) -> Handles:
        """Claim the members' sessions and start them; return sessions that are done already."""

    def retry_lookup(self, change: Change, members: Members, /) -> None:
        """The members' session left the table: start them if the store has it, otherwise answer them."""

    def start_waiting(self, change: Change, members: Members, /) -> None:
        """There is room: start the members; those that still do not fit are put back."""


class RowQueue:
    """Changes that wait for rows, by model, because all rows belong to active sessions.

    First come, first served, as sessions become idle and may be paged out. A change admitted too late for the room
    keeps its place. The sessions of waiting members are claimed, and have no rows. Lives on the event loop.
    """

    def __init__(self, table: SessionTable, models: Models, pager: Pager) -> None:
        self._table = table
        self._models = models
        self._pager = pager
        self._waiting: dict[int, deque[tuple[Starter, Change, int]]] = {}
        self.waiting = 0
        """Waiting changes of all models."""
        self._look = Alarm(self._admit)
        self._is_full = False
        """A change was admitted and put back."""

    def __bool__(self) -> bool:
        return self.waiting > 0

    def count(self, model: int) -> int:
        """The number of a model's changes that wait."""
        return len(self._waiting.get(model, ()))

    def add(self, starter: Starter, change: Change, members: Members) -> None:
        """Queue members of a change whose sessions are claimed; `starter` starts them."""
        waiting = self._waiting.setdefault(change.model.index, deque())
        waiting.extend((starter, change, member) for member in members.tolist())
        self._add(change.model, len(members))

    def _add(self, model: Model, count: int) -> None:
        self.waiting += count
        model.waiting += count

    def put_back(self, starter: Starter, change: Change, members: Members) -> None:
        """Queue members of an admitted change again, before all others."""
        if len(members):
            self._is_full = True
            self._waiting[change.model.index].extendleft(
                (starter, change, member) for member in reversed(members.tolist())
            )
            self._add(change.model, len(members))

    def check_room(self) -> None:
        """Check in the next iteration of the event loop whether a change fits.

        Call it when a session became idle, began or ended.
        """
        if self:
            self._look.ring()

    def _admit(self) -> None:
        for model, waiting in list(self._waiting.items()):  # answers may queue changes of another model
            if waiting:
                self._admit_some(self._models.by_index[model], waiting)

    def _admit_some(self, model: Model, waiting: deque[tuple[Starter, Change, int]]) -> None:
        fitting = self._fitting(model, waiting)
        self._is_full = False
        while fitting and not self._is_full:  # answers may start changes that take the room
            starter, change, members = _take(waiting, fitting)
            fitting -= len(members)
            self._add(model, -len(members))
            # a member whose session was busy may be queued after later members of the change
            starter.start_waiting(change, np.sort(np.array(members, np.intp)))

    def _fitting(self, model: Model, waiting: deque[tuple[Starter, Change, int]]) -> int:
        """How many of the waiting changes fit, beginning with the first."""
        # each has at least one row
        first = islice(waiting, model.slots.resident_limit)
        rows = np.array(
            [self._table.batch_size[change.handles[member]] for _, change, member in first], np.int64
        )
        return int(np.searchsorted(np.cumsum(rows), self._pager.room(model, int(rows.sum())), side="right"))


def _take(waiting: deque[tuple[Starter, Change, int]], most: int) -> tuple[Starter, Change, list[int]]:
    """The first change, and its consecutive waiting members."""
    starter, change, _ = waiting[0]
    members: list[int] = []
    while len(members) < most and waiting and waiting[0][1] is change:
        members.append(waiting.popleft()[2])
    return starter, change, members


@dataclasses.dataclass(frozen=True, slots=True, eq=False)
class Hold:
    """A place in a session's queue for an operation that is not a change: a read, a fork or a close."""

    granted: asyncio.Future[None]
    deadline: float
    model: Model
    """The version that the session was on."""


Waiter: TypeAlias = "tuple[Starter, Change, int] | Hold"


class SessionQueues:
    """Claims of sessions and their queues, until the sessions leave the table. Lives on the event loop."""

    def __init__(
        self,
        table: SessionTable,
        models: Models,
        pager: Pager,
        row_queue: RowQueue,
        store: Store,
        limits: IdleLimits,
        clock: Clock,
    ) -> None:
        self._table = table
        self._models = models
        self._pager = pager
        self._row_queue = row_queue
        self._store = store
        self._limits = limits
        self._clock = clock
        self._claims: Claims[Waiter] = Claims(table)
        self._count = 0
        """Items in all queues."""
        self._ending: deque[Handles] = deque()
        """Claims to end, one after the other, since ending one may start an operation that ends others."""
        self._is_ending = False
        self.leave_when_free: Callable[[Handles], None] | None = None
        """Called with sessions whose claims end, before their queues continue; None: no session is to leave."""

    def __bool__(self) -> bool:
        """Something waits for its turn."""
        return self._count > 0

    def claim(self, handles: Handles) -> None:
        """Claim free sessions."""
        self._claims.claim(handles)

    async def hold(self, handle: int, deadline: float, *, rows: bool = True) -> None:
        """Claim one session for an operation that is not a change, once it is free; with `rows`, bring it to the arena.

        Its state is then no older than what any server has returned before.

        Raises:
            DeadlineExceeded, SessionGone, Overloaded, Unavailable: the session could not be claimed.
        """
        if self._clock.monotonic() >= deadline:
            raise too_late()
        if self._table.claimed[handle]:
            await self._await_claim(handle, deadline)
        else:
            self._claims.claim(np.array([handle]))
        if not rows:
            return
        await self._compare(handle)
        if self._table.row[handle] < 0:
            await self._have_rows(handle)

    async def _compare(self, handle: int) -> None:
        """Remove a claimed session from the arena if another server changed it. If that is unknown, end the claim."""
        try:
            await self._pager.compare(self._models.by_handle(handle), np.array([handle]))
        except BaseException:
            self.release(np.array([handle]))
            raise

    async def _await_claim(self, handle: int, deadline: float) -> None:
        """Wait in a claimed session's queue until the claim is passed on."""
        granted = self.request_claim(handle, deadline)
        try:
            await granted
        except asyncio.CancelledError:
            self.withdraw(handle, granted)
            raise

    async def free(self, handle: int) -> None:
        """Return when the active operation of a session, and those queued now, have ended."""
        if self._table.claimed[handle]:
            with contextlib.suppress(SessionGone, VersionElsewhere):
                await self.hold(handle, math.inf, rows=False)
                self.release(np.array([handle]))

    def request_claim(self, handle: int, deadline: float) -> asyncio.Future[None]:
        """Join a claimed session's queue: the claim is the caller's when the future is done without an error.

        Use `withdraw` to leave the queue.

        Raises:
            Overloaded: the queue is full.
        """
        if self._claims.waiting(handle) >= MAX_SESSION_QUEUE:
            raise self._queue_full(handle)
        model = self._models.by_handle(handle)
        hold = Hold(asyncio.get_running_loop().create_future(), deadline, model)
        self._wait(model, handle, hold)
        return hold.granted

    def withdraw(self, handle: int, granted: asyncio.Future[None]) -> None:
        """Leave a session's queue, or end the claim if it was granted in the same moment."""
        granted.cancel()
        if not granted.cancelled() and granted.exception() is None:
            self.release(np.array([handle]))

    async def _have_rows(self, handle: int) -> None:
        """Bring a claimed session back to the arena. If that fails, end the claim."""
        handles = np.array([handle])
        came: asyncio.Future[ServerError | None] = asyncio.get_running_loop().create_future()

        def later(_handles: Handles, refused: PageInErrors) -> None:
            error = refused.get(handle)
            if came.done():  # the waiting caller was cancelled
                self.end(handle, error)
            else:
                came.set_result(error)

        paged = self._pager.page_in(self._models.by_handle(handle), handles, later)
        error = paged.refused.get(handle)
        if len(paged.coming):
            try:
                error = await came
            except asyncio.CancelledError:
                if not came.cancelled():
                    self.end(handle, came.result())  # it arrived in the same moment
                raise
        if error is not None:
            self.end(handle, error)
            raise error

    def end(self, handle: int, error: ServerError | None) -> None:
        """End the claim of a session that could not be paged in because of `error`.

        A session that ended, or that another server knows more about, leaves the table.
        """
        if isinstance(error, (SessionGone, VersionElsewhere)) and not isinstance(error, SessionLost):
            self.forget(handle, error)
        else:
            self.release(np.array([handle]))

    def enqueue(self, starter: Starter, change: Change, members: Members) -> None:
        """Queue members for their claimed sessions; refuse those whose queue is full."""
        for member in members.tolist():
            handle = int(change.handles[member])
            if self._claims.waiting(handle) >= MAX_SESSION_QUEUE:
                change.fail(np.array([member]), self._queue_full(handle))
            else:
                self._wait(change.model, handle, (starter, change, member))

    def release(self, handles: Handles) -> None:
        """End claims and start queued operations."""
        if self.leave_when_free is not None:
            self.leave_when_free(handles)
        if not self._count:  # nothing is queued anywhere, so no claims are ending now either
            self._table.claimed[handles] = False
            if self._row_queue.waiting:
                self._row_queue.check_room()
            return
        self._ending.append(handles)
        if self._is_ending:
            return
        self._is_ending = True
        try:
            while self._ending:
                self._start_next(self._ending.popleft())
        finally:
            self._is_ending = False
        self._row_queue.check_room()

    def _wait(self, model: Model, handle: int, waiter: Waiter) -> None:
        self._count += 1
        model.waiting += 1
        self._claims.wait(handle, waiter)

    def _removed(self, waiter: Waiter) -> None:
        self._count -= 1
        # the session may be on another version by now
        model = waiter.model if isinstance(waiter, Hold) else waiter[1].model
        model.waiting -= 1

    def forget(self, handle: int, error: ServerError) -> None:
        """Remove a session from the table that still exists elsewhere; refuse what is queued for it.

        The session is claimed or idle.
        """
        table = self._table
        limit_s = self._limits.seconds(int(table.max_idle_ms[handle]))
        idle_s = self._clock.monotonic() - float(table.used[handle])
        self._store.note_use(table.session_id(handle), idle_s=idle_s, limit_s=limit_s)
        self.remove(handle, error)

    def remove(self, handle: int, error: ServerError) -> None:
        """Remove a session from the table that is claimed or idle, and refuse what is queued for it."""
        model = self._models.by_handle(handle)
        if self._table.row[handle] >= 0:
            model.slots.free_resident(self._table.rows(handle))
        model.replies.forget(handle)
        self._table.claimed[handle] = False
        self._table.remove(handle)
        # last: a refused caller may retry at once, and must not join the queue of a removed session
        self.close_queue(handle, error)

    def close_queue(self, handle: int, error: ServerError) -> None:
        """Refuse what is queued for a session that was removed.

        It may have been opened again since: changes look it up once more.
        """
        looks_again = isinstance(error, SessionGone)
        changes: dict[Change, tuple[Starter, list[int]]] = {}
        for waiter in self._claims.drop_queue(handle):
            self._removed(waiter)
            if isinstance(waiter, Hold):
                if not waiter.granted.done():
                    waiter.granted.set_exception(error)
            elif looks_again:
                changes.setdefault(waiter[1], (waiter[0], []))[1].append(waiter[2])
            else:
                waiter[1].fail(np.array([waiter[2]]), error)
        for change, (starter, members) in changes.items():
            starter.retry_lookup(change, np.sort(np.array(members, np.intp)))
        if self.leave_when_free is not None:
            self.leave_when_free(np.array([handle]))
        self._row_queue.check_room()

    def _start_next(self, handles: Handles) -> None:
        changes: dict[Change, tuple[Starter, list[int]]] = {}
        for handle, waiter in self._claims.release(handles):
            self._removed(waiter)
            if isinstance(waiter, Hold):
                if not self._grant(waiter, handle):
                    self._ending.append(np.array([handle]))
            elif self._is_dropped(waiter[1], waiter[2]):
                self._ending.append(np.array([handle]))
            else:
                changes.setdefault(waiter[1], (waiter[0], []))[1].append(waiter[2])
        for change, (starter, members) in changes.items():
            done = starter.start_due(change, np.sort(np.array(members, np.intp)))
            if len(done):
                self._ending.append(done)

    def _grant(self, hold: Hold, handle: int) -> bool:
        """Whether the caller accepts the claim."""
        if hold.granted.done():
            return False
        if self._clock.monotonic() >= hold.deadline:
            hold.granted.set_exception(too_late())
            return False
        self._claims.claim(np.array([handle]))
        hold.granted.set_result(None)
        return True

    def _is_dropped(self, change: Change, member: int) -> bool:
        dropped = change.drop(np.array([member]), self._clock.monotonic())
        for members, error in dropped:
            change.fail(members, error)
        return bool(dropped)

    def _queue_full(self, handle: int) -> Overloaded:
        return Overloaded(
            f"changes waiting for session {self._table.session_id(handle)!r} must stay within {MAX_SESSION_QUEUE}",
            retry_after_s=max(0.01, self._models.by_handle(handle).expected_wait_s),
        )
