"""One thing at a time for each session: whose turn it is, and what waits for it.

A change whose session is claimed waits in the session's line, and so does a read, a fork, a closing (a `Hold`).
When the claim ends, the next in line is started.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import math
from collections import deque
from collections.abc import Callable
from typing import TypeAlias

import numpy as np

from stepwell_server.clock import Clock
from stepwell_server.core.claims import Claims
from stepwell_server.core.sessions import Handles, SessionTable
from stepwell_server.engine.change import Change, too_late
from stepwell_server.engine.intake.paging import Pager, Refused
from stepwell_server.engine.intake.row_queue import RowQueue, Starter
from stepwell_server.engine.models import Models
from stepwell_server.engine.state.model import Model
from stepwell_server.engine.types import Members
from stepwell_server.errors import Overloaded, ServerError, SessionGone, SessionLost, VersionElsewhere

#: Changes that may wait in one session's line.
MAX_LINE = 256


@dataclasses.dataclass(frozen=True, slots=True, eq=False)
class Hold:
    """A turn in a session's line for something that is no change: a read, a fork, the closing."""

    granted: asyncio.Future[None]
    deadline: float
    model: Model
    """The version that the session was on."""


Waiter: TypeAlias = "tuple[Starter, Change, int] | Hold"


class Turns:
    """Claims of sessions and their lines. Lives on the event loop."""

    def __init__(
        self,
        table: SessionTable,
        models: Models,
        pager: Pager,
        row_queue: RowQueue,
        clock: Clock,
        forget: Callable[[int, ServerError], None],
    ) -> None:
        self._table = table
        self._models = models
        self._pager = pager
        self._row_queue = row_queue
        self._clock = clock
        self._forget = forget
        """Takes a claimed session that has ended on another server out of the table."""
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
        granted = self.turn_of(handle, deadline)
        try:
            await granted
        except asyncio.CancelledError:
            self.give_back(handle, granted)
            raise

    async def free(self, handle: int) -> None:
        """Return when what is under way for a session now has ended, and what waits for it already."""
        if self._table.claimed[handle]:
            with contextlib.suppress(SessionGone, VersionElsewhere):
                await self.hold(handle, math.inf, rows=False)
                self.release(np.array([handle]))

    def turn_of(self, handle: int, deadline: float) -> asyncio.Future[None]:
        """Take a place in a claimed session's line: the claim is the caller's when the future is done without an error.

        Who does not want it any more says so by `give_back`.

        Raises:
            Overloaded: too much waits there.
        """
        if self._claims.waiting(handle) >= MAX_LINE:
            raise self._line_full(handle)
        model = self._models.by_handle(handle)
        hold = Hold(asyncio.get_running_loop().create_future(), deadline, model)
        self._wait(model, handle, hold)
        return hold.granted

    def give_back(self, handle: int, granted: asyncio.Future[None]) -> None:
        """Leave a session's line, or end the claim if the turn came in the same moment."""
        granted.cancel()
        if not granted.cancelled() and granted.exception() is None:
            self.release(np.array([handle]))

    async def _have_rows(self, handle: int) -> None:
        """Bring a claimed session back to the arena; if it cannot come its claim ends."""
        handles = np.array([handle])
        came: asyncio.Future[ServerError | None] = asyncio.get_running_loop().create_future()

        def later(_handles: Handles, refused: Refused) -> None:
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
            self._forget(handle, error)
        else:
            self.release(np.array([handle]))

    def line_up(self, starter: Starter, change: Change, members: Members) -> None:
        """Let members wait for the turn of their claimed sessions; refuse those whose line is full."""
        for member in members.tolist():
            handle = int(change.handles[member])
            if self._claims.waiting(handle) >= MAX_LINE:
                change.fail(np.array([member]), self._line_full(handle))
            else:
                self._wait(change.model, handle, (starter, change, member))

    def release(self, handles: Handles) -> None:
        """End claims and start what waited for them."""
        if self.leave_when_free is not None:
            self.leave_when_free(handles)
        if not self._count:  # nobody waits in any line: neither do claims that are ending now
            self._table.claimed[handles] = False
            if self._row_queue.waiting:
                self._row_queue.room_may_have_come()
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
        self._row_queue.room_may_have_come()

    def _wait(self, model: Model, handle: int, waiter: Waiter) -> None:
        self._count += 1
        model.waiting += 1
        self._claims.wait(handle, waiter)

    def _taken(self, waiter: Waiter) -> None:
        self._count -= 1
        # that of the session may be another version by now
        model = waiter.model if isinstance(waiter, Hold) else waiter[1].model
        model.waiting -= 1

    def close_line(self, handle: int, error: ServerError) -> None:
        """Refuse what waited for a session that has gone away.

        It may have been opened anew since it ended: changes look for it once more.
        """
        looks_again = isinstance(error, SessionGone)
        changes: dict[Change, tuple[Starter, list[int]]] = {}
        for waiter in self._claims.drop_line(handle):
            self._taken(waiter)
            if isinstance(waiter, Hold):
                if not waiter.granted.done():
                    waiter.granted.set_exception(error)
            elif looks_again:
                changes.setdefault(waiter[1], (waiter[0], []))[1].append(waiter[2])
            else:
                waiter[1].fail(np.array([waiter[2]]), error)
        for change, (starter, members) in changes.items():
            starter.look_again(change, np.sort(np.array(members, np.intp)))
        if self.leave_when_free is not None:
            self.leave_when_free(np.array([handle]))
        self._row_queue.room_may_have_come()

    def _start_next(self, handles: Handles) -> None:
        changes: dict[Change, tuple[Starter, list[int]]] = {}
        for handle, waiter in self._claims.release(handles):
            self._taken(waiter)
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

    def _line_full(self, handle: int) -> Overloaded:
        return Overloaded(
            f"changes waiting for session {self._table.session_id(handle)!r} must stay within {MAX_LINE}",
            retry_after_s=max(0.01, self._models.by_handle(handle).expected_wait_s),
        )
