"""Where changes wait: for the next turn of their model's loop, for rows of the arena, and for their sessions.

One thing at a time is done for each session: whoever has its claim. A change whose session is claimed waits in the
session's line, and so does a read, a fork, a closing (a `Hold`). When the claim ends, the next in line is started.
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
from stepwell_server.engine.change import Change, joined, kind_of, may_join, too_late
from stepwell_server.engine.intake.pager import PageInErrors, Pager
from stepwell_server.engine.state.model import Model
from stepwell_server.engine.types import Members
from stepwell_server.engine.versions.registry import Models
from stepwell_server.errors import Overloaded, ServerError, SessionGone, SessionLost, VersionElsewhere
from stepwell_server.store.base import Store

#: Rows that may wait for passes, in passes of full size.
MAX_WAITING_PASSES = 64
#: Bytes of inputs that may wait, over all models.
MAX_WAITING_BYTES = 512 << 20
#: Changes that may wait in one session's line.
MAX_SESSION_QUEUE = 256


@dataclasses.dataclass(slots=True)
class Inboxes:
    """The inboxes of all models, and the one count of the bytes that wait."""

    bytes: int = 0
    """Of inputs that wait or run."""
    waiting: dict[Inbox, None] = dataclasses.field(default_factory=dict)
    """Inboxes in which something waits, in the order in which it came."""
    of: dict[int, Inbox] = dataclasses.field(default_factory=dict)
    """Each inbox, by the number of its version."""


class Inbox:
    """The changes that have come for one model, in their order. Lives on the event loop.

    A change is put here when it has been checked; its sessions may be gone by the time it is drained. Rows are limited
    for each model, bytes of inputs over all of them: what is too much is refused with a delay.
    """

    def __init__(self, model: Model, inboxes: Inboxes) -> None:
        """Make an empty inbox of a model, which becomes one of all `inboxes`."""
        self._model = model
        self._inboxes = inboxes
        inboxes.of[model.index] = self
        self._waiting: list[Change] = []
        self._rows = 0
        self.max_waiting = MAX_WAITING_PASSES * model.max_batch_rows
        """So many rows and changes may wait, unless one change alone has more."""

    def __len__(self) -> int:
        return len(self._waiting)

    @property
    def rows(self) -> int:
        """Rows of the changes that wait here."""
        return self._rows

    @property
    def deadline(self) -> float:
        """The earliest of those that wait here."""
        return min((change.deadline for change in self._waiting), default=float("inf"))

    def is_of(self, source: Source) -> bool:
        """Whether all that waits here was sent by one source."""
        return all(change.only_source == source for change in self._waiting)

    @property
    def waiting(self) -> int:
        """Rows and changes that wait: here, for their session, for rows, for a pass."""
        return self._rows + self._model.ready.rows_waiting + self._model.waiting

    def require_room(self, rows: int, byte_count: int) -> None:
        """Refuse so many rows and bytes of inputs if too much waits already.

        Raises:
            Overloaded: with the time after which there should be room.
        """
        model, held, waiting = self._model, self._inboxes.bytes, self.waiting
        limit = self.max_waiting
        if waiting and waiting + rows > limit:
            raise Overloaded(
                f"rows waiting for model {model.name!r} must stay within {limit}; {waiting} wait and {rows} came",
                retry_after_s=max(0.01, model.expected_wait_s / 2),
            )
        if held and held + byte_count > MAX_WAITING_BYTES:
            raise Overloaded(
                f"input bytes waiting must stay within {MAX_WAITING_BYTES}; {held} wait and {byte_count} came",
                retry_after_s=max(0.01, model.expected_wait_s / 2),
            )

    def hold(self, change: Change) -> None:
        """Count the bytes of a change until every member has its answer.

        Raises:
            Overloaded: too much waits already, and nothing is counted.
        """
        count, held = change.byte_count, self._inboxes
        self.require_room(change.row_count, count)
        held.bytes += count

        def give() -> None:
            held.bytes -= count

        change.on_end = give

    def put(self, change: Change) -> None:
        """Let a change that is held wait for the next turn."""
        if not self._waiting:
            self._inboxes.waiting[self] = None
        self._waiting.append(change)
        self._rows += change.row_count
        self._model.work.ring()

    def drain(self) -> list[Change]:
        """Take everything that waits."""
        waiting = self._waiting
        if waiting:
            self._waiting, self._rows = [], 0
            del self._inboxes.waiting[self]
        return waiting


def joined_where_alike(waiting: list[Change]) -> list[Change]:
    """The same, with steps of one row that are alike as one change. What a session was sent stays in its order."""
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
            end_groups()  # what the session was sent before must go first, and is in another group
        kinds[session_id] = kind
        groups.setdefault(kind, []).append(change)
    end_groups()
    return found


class Starter(Protocol):
    """Who starts members of a change when they need not wait any more."""

    def start_due(self, change: Change, members: Members, /) -> Handles:
        """Their turn has come: claim their sessions and start them; return sessions that are done with already."""

    def retry_lookup(self, change: Change, members: Members, /) -> None:
        """Their session has left the table: start them if the store has it, and answer them else."""

    def start_waiting(self, change: Change, members: Members, /) -> None:
        """There is room: start them; those that still do not fit are put back."""


class RowQueue:
    """What waits for rows, by model: every row is some session's that has something under way.

    First come, first served, when sessions that are done may be paged out. One that is let in when the room is gone again
    keeps its place. The sessions of those that wait are claimed, and have no rows. Lives on the event loop.
    """

    def __init__(self, table: SessionTable, models: Models, pager: Pager) -> None:
        self._table = table
        self._models = models
        self._pager = pager
        self._waiting: dict[int, deque[tuple[Starter, Change, int]]] = {}
        self.waiting = 0
        """Changes of all models."""
        self._look = Alarm(self._admit)
        self._is_full = False
        """Somebody that was let in was put back."""

    def __bool__(self) -> bool:
        return self.waiting > 0

    def count(self, model: int) -> int:
        """How many changes of a model wait."""
        return len(self._waiting.get(model, ()))

    def add(self, starter: Starter, change: Change, members: Members) -> None:
        """Let members of a change wait, whose sessions are claimed; `starter` starts them."""
        waiting = self._waiting.setdefault(change.model.index, deque())
        waiting.extend((starter, change, member) for member in members.tolist())
        self._add(change.model, len(members))

    def _add(self, model: Model, count: int) -> None:
        self.waiting += count
        model.waiting += count

    def put_back(self, starter: Starter, change: Change, members: Members) -> None:
        """Let members of a change that were let in wait again, before all others."""
        if len(members):
            self._is_full = True
            self._waiting[change.model.index].extendleft(
                (starter, change, member) for member in reversed(members.tolist())
            )
            self._add(change.model, len(members))

    def check_room(self) -> None:
        """A session is done, made or gone: look in the next turn of the event loop whether somebody fits now."""
        if self:
            self._look.ring()

    def _admit(self) -> None:
        for model, waiting in list(self._waiting.items()):  # answers may bring what waits for another model
            if waiting:
                self._admit_some(self._models.by_index[model], waiting)

    def _admit_some(self, model: Model, waiting: deque[tuple[Starter, Change, int]]) -> None:
        fitting = self._fitting(model, waiting)
        self._is_full = False
        while fitting and not self._is_full:  # answers may bring what takes the room
            starter, change, members = _take(waiting, fitting)
            fitting -= len(members)
            self._add(model, -len(members))
            # one whose session was busy may have come behind members that follow it in the change
            starter.start_waiting(change, np.sort(np.array(members, np.intp)))

    def _fitting(self, model: Model, waiting: deque[tuple[Starter, Change, int]]) -> int:
        """How many of those that wait fit, beginning with the first."""
        # each has a row at least
        first = islice(waiting, model.slots.resident_limit)
        rows = np.array(
            [self._table.batch_size[change.handles[member]] for _, change, member in first], np.int64
        )
        return int(np.searchsorted(np.cumsum(rows), self._pager.room(model, int(rows.sum())), side="right"))


def _take(waiting: deque[tuple[Starter, Change, int]], most: int) -> tuple[Starter, Change, list[int]]:
    """The change that comes first, and its members that wait in a row."""
    starter, change, _ = waiting[0]
    members: list[int] = []
    while len(members) < most and waiting and waiting[0][1] is change:
        members.append(waiting.popleft()[2])
    return starter, change, members


@dataclasses.dataclass(frozen=True, slots=True, eq=False)
class Hold:
    """A turn in a session's line for something that is no change: a read, a fork, the closing."""

    granted: asyncio.Future[None]
    deadline: float
    model: Model
    """The version that the session was on."""


Waiter: TypeAlias = "tuple[Starter, Change, int] | Hold"


class SessionQueues:
    """Claims of sessions and their lines, until the sessions leave the table. Lives on the event loop."""

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
        """What waits in all lines."""
        self._ending: deque[Handles] = deque()
        """Claims that are to end: one after the other, since what an end starts may end others."""
        self._is_ending = False
        self.leave_when_free: Callable[[Handles], None] | None = None
        """Called with sessions whose claims end, before what waits for them is started; None: none of them is to leave."""

    def __bool__(self) -> bool:
        """Something waits for its turn."""
        return self._count > 0

    def claim(self, handles: Handles) -> None:
        """Claim sessions that have nothing under way."""
        self._claims.claim(handles)

    async def hold(self, handle: int, deadline: float, *, rows: bool = True) -> None:
        """Claim one session for something that is no change, when its turn comes; `rows`: and bring it to the arena.

        What is in the arena then is no older than what any server has answered before.

        Raises:
            DeadlineExceeded, SessionGone, Overloaded, Unavailable: it did not come.
        """
        if self._clock.monotonic() >= deadline:
            raise too_late()
        if self._table.claimed[handle]:
            await self._await_turn(handle, deadline)
        else:
            self._claims.claim(np.array([handle]))
        if not rows:
            return
        await self._compare(handle)
        if self._table.row[handle] < 0:
            await self._have_rows(handle)

    async def _compare(self, handle: int) -> None:
        """Have a claimed session leave the arena if another server has changed it; if that is not known its claim ends."""
        try:
            await self._pager.compare(self._models.by_handle(handle), np.array([handle]))
        except BaseException:
            self.release(np.array([handle]))
            raise

    async def _await_turn(self, handle: int, deadline: float) -> None:
        """Wait in a claimed session's line until the claim is this one's."""
        granted = self.request_claim(handle, deadline)
        try:
            await granted
        except asyncio.CancelledError:
            self.withdraw(handle, granted)
            raise

    async def free(self, handle: int) -> None:
        """Return when what is under way for a session now has ended, and what waits for it already."""
        if self._table.claimed[handle]:
            with contextlib.suppress(SessionGone, VersionElsewhere):
                await self.hold(handle, math.inf, rows=False)
                self.release(np.array([handle]))

    def request_claim(self, handle: int, deadline: float) -> asyncio.Future[None]:
        """Take a place in a claimed session's line: the claim is the caller's when the future is done without an error.

        Who does not want it any more says so by `withdraw`.

        Raises:
            Overloaded: too much waits there.
        """
        if self._claims.waiting(handle) >= MAX_SESSION_QUEUE:
            raise self._queue_full(handle)
        model = self._models.by_handle(handle)
        hold = Hold(asyncio.get_running_loop().create_future(), deadline, model)
        self._wait(model, handle, hold)
        return hold.granted

    def withdraw(self, handle: int, granted: asyncio.Future[None]) -> None:
        """Leave a session's line, or end the claim if the turn came in the same moment."""
        granted.cancel()
        if not granted.cancelled() and granted.exception() is None:
            self.release(np.array([handle]))

    async def _have_rows(self, handle: int) -> None:
        """Bring a claimed session back to the arena; if it cannot come its claim ends."""
        handles = np.array([handle])
        came: asyncio.Future[ServerError | None] = asyncio.get_running_loop().create_future()

        def later(_handles: Handles, refused: PageInErrors) -> None:
            error = refused.get(handle)
            if came.done():  # who waited was cancelled
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
                    self.end(handle, came.result())  # it came in the same moment
                raise
        if error is not None:
            self.end(handle, error)
            raise error

    def end(self, handle: int, error: ServerError | None) -> None:
        """End a claim whose session could not come back because of `error`.

        One that has ended leaves the table, and so does one of which another server knows more.
        """
        if isinstance(error, (SessionGone, VersionElsewhere)) and not isinstance(error, SessionLost):
            self.forget(handle, error)
        else:
            self.release(np.array([handle]))

    def enqueue(self, starter: Starter, change: Change, members: Members) -> None:
        """Let members wait for the turn of their claimed sessions; refuse those whose line is full."""
        for member in members.tolist():
            handle = int(change.handles[member])
            if self._claims.waiting(handle) >= MAX_SESSION_QUEUE:
                change.fail(np.array([member]), self._queue_full(handle))
            else:
                self._wait(change.model, handle, (starter, change, member))

    def release(self, handles: Handles) -> None:
        """End claims and start what waited for them."""
        if self.leave_when_free is not None:
            self.leave_when_free(handles)
        if not self._count:  # nobody waits in any line: neither do claims that are ending now
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
        # that of the session may be another version by now
        model = waiter.model if isinstance(waiter, Hold) else waiter[1].model
        model.waiting -= 1

    def forget(self, handle: int, error: ServerError) -> None:
        """Take a session that has not ended, or not here, and is claimed or idle out of the table; refuse what waits for it."""
        table = self._table
        limit_s = self._limits.seconds(int(table.max_idle_ms[handle]))
        idle_s = self._clock.monotonic() - float(table.used[handle])
        self._store.note_use(table.session_id(handle), idle_s=idle_s, limit_s=limit_s)
        self.remove(handle, error)

    def remove(self, handle: int, error: ServerError) -> None:
        """Take a session that is claimed or idle out of the table, and refuse what waits for it."""
        model = self._models.by_handle(handle)
        if self._table.row[handle] >= 0:
            model.slots.free_resident(self._table.rows(handle))
        model.replies.forget(handle)
        self._table.claimed[handle] = False
        self._table.remove(handle)
        # last: a caller who is refused may ask again at once, and must not get into the line of a session that is gone
        self.close_queue(handle, error)

    def close_queue(self, handle: int, error: ServerError) -> None:
        """Refuse what waited for a session that has gone away.

        It may have been opened anew since it ended: changes look for it once more.
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
        """Whether the turn is taken."""
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
