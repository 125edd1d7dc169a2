"""One thing at a time for each session: whose turn it is, and what waits for it.

A change whose session is claimed waits in the session's line, and so does a read, a fork, a closing (a `Hold`).
When the claim ends, the next in line is started.
"""

from __future__ import annotations

import asyncio
from collections import Counter, deque
from typing import Protocol, TypeAlias

import numpy as np

from stepwell_server.clock import Clock
from stepwell_server.core.claims import Claims
from stepwell_server.core.sessions import Handles, SessionTable
from stepwell_server.engine.change import Change, too_late
from stepwell_server.engine.intake.paging import Pager
from stepwell_server.engine.intake.row_queue import RowQueue
from stepwell_server.engine.models import Models
from stepwell_server.engine.types import Members
from stepwell_server.errors import Overloaded, ServerError

#: Changes that may wait in one session's line.
MAX_LINE = 256


class Starter(Protocol):
    """Who starts members of a change whose turn has come."""

    def start_due(self, change: Change, members: Members, /) -> Handles:
        """Claim their sessions and start them; return sessions that are done with already."""


class Hold:
    """A turn in a session's line for something that is no change: a read, a fork, the closing."""

    __slots__ = ("deadline", "granted", "rows")

    def __init__(self, granted: asyncio.Future[None], deadline: float, *, rows: bool) -> None:
        self.granted = granted
        self.deadline = deadline
        self.rows = rows


Waiter: TypeAlias = "tuple[Starter, Change, int] | Hold"


class Turns:
    """Claims of sessions and their lines. Lives on the event loop."""

    def __init__(
        self, table: SessionTable, models: Models, pager: Pager, row_queue: RowQueue, clock: Clock
    ) -> None:
        self._table = table
        self._models = models
        self._pager = pager
        self._row_queue = row_queue
        self._clock = clock
        self._claims: Claims[Waiter] = Claims(table)
        self._waiting: Counter[int] = Counter()
        self._ending: deque[Handles] = deque()
        """Claims that are to end: one after the other, since what an end starts may end others."""
        self._is_ending = False

    def __bool__(self) -> bool:
        """Something waits for its turn."""
        return any(self._waiting.values())

    def waiting(self, model: int) -> int:
        """How many changes and holds of a model wait in lines."""
        return self._waiting[model]

    def claim(self, handles: Handles) -> None:
        """Claim sessions that have nothing under way."""
        self._claims.claim(handles)

    async def hold(self, handle: int, deadline: float, *, rows: bool = True) -> None:
        """Claim one session for something that is no change, when its turn comes.

        Args:
            handle: The session.
            deadline: On the clock's monotonic time.
            rows: The session's rows are needed.

        Raises:
            DeadlineExceeded, SessionGone, Overloaded: it did not come.
        """
        if not self._table.claimed[handle]:
            error = self._claim_one(handle, rows=rows)
            if error is not None:
                self.release(np.array([handle]))
                raise error
            return
        if self._claims.waiting(handle) >= MAX_LINE:
            raise self._line_full(handle)
        hold = Hold(asyncio.get_running_loop().create_future(), deadline, rows=rows)
        self._waiting[int(self._table.model[handle])] += 1
        self._claims.wait(handle, hold)
        try:
            await hold.granted
        except asyncio.CancelledError:
            granted = hold.granted
            if granted.done() and not granted.cancelled() and granted.exception() is None:
                self.release(np.array([handle]))  # the turn came in the same moment
            raise

    def line_up(self, starter: Starter, change: Change, members: Members) -> None:
        """Let members wait for the turn of their claimed sessions; refuse those whose line is full."""
        for member in members.tolist():
            handle = int(change.handles[member])
            if self._claims.waiting(handle) >= MAX_LINE:
                change.fail(np.array([member]), self._line_full(handle))
            else:
                self._waiting[change.model.index] += 1
                self._claims.wait(handle, (starter, change, member))

    def release(self, handles: Handles) -> None:
        """End claims and start what waited for them."""
        self._ending.append(handles)
        if self._is_ending:
            return
        self._is_ending = True
        try:
            while self._ending:
                self._start_next(self._ending.popleft())
        finally:
            self._is_ending = False
        self._row_queue.room_may_have_come()

    def close_line(self, handle: int, model: int, error: ServerError) -> None:
        """Refuse what waited for a session that has gone away, of the model of that number."""
        for waiter in self._claims.drop_line(handle):
            self._waiting[model] -= 1
            if isinstance(waiter, Hold):
                if not waiter.granted.done():
                    waiter.granted.set_exception(error)
            else:
                waiter[1].fail(np.array([waiter[2]]), error)
        self._row_queue.room_may_have_come()

    def _start_next(self, handles: Handles) -> None:
        changes: dict[Change, tuple[Starter, list[int]]] = {}
        for handle, waiter in self._claims.release(handles):
            self._waiting[int(self._table.model[handle])] -= 1
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

    def _claim_one(self, handle: int, *, rows: bool) -> ServerError | None:
        """Claim a session; return why its rows cannot be had, if they are needed."""
        handles = np.array([handle])
        self._claims.claim(handles)
        if not rows:
            return None
        return self._pager.page_in(self._models.by_handle(handle), handles).get(handle)

    def _grant(self, hold: Hold, handle: int) -> bool:
        """Whether the turn is taken."""
        if hold.granted.done():
            return False
        if self._clock.monotonic() >= hold.deadline:
            hold.granted.set_exception(too_late())
            return False
        error = self._claim_one(handle, rows=hold.rows)
        if error is not None:
            hold.granted.set_exception(error)
            return False
        hold.granted.set_result(None)
        return True

    def _is_dropped(self, change: Change, member: int) -> bool:
        dropped = change.drop(np.array([member]), self._clock.monotonic())
        for members, error in dropped:
            change.fail(members, error)
        return bool(dropped)

    def _line_full(self, handle: int) -> Overloaded:
        return Overloaded(
            f"changes waiting for session {self._table.session_id(handle)!r} must stay within {MAX_LINE}",
            retry_after_s=max(0.01, self._models.by_handle(handle).expected_wait_s),
        )
