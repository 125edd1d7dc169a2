"""Changes whose sessions cannot come back to the arena yet: every row is some session's that has something under way.

They wait, first come first served, until sessions that are done may be paged out. One that is let in when the room
is gone again keeps its place. Their own sessions are claimed meanwhile, and have no rows: nobody waits for them but
what is in their lines.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable, Sequence
from itertools import islice

import numpy as np

from stepwell_server.core.sessions import Handles, SessionTable
from stepwell_server.engine.api import Members
from stepwell_server.engine.call import Call
from stepwell_server.engine.intake.paging import Pager
from stepwell_server.engine.state.model import ServedModel

Start = Callable[[Call, Members], Handles]


class Parking:
    """What waits for rows, by model. Lives on the event loop."""

    def __init__(
        self, table: SessionTable, models: Sequence[ServedModel], pager: Pager, start: Start
    ) -> None:
        """See the module.

        Args:
            table: The sessions.
            models: By their index.
            pager: Who knows what room there is.
            start: Starts members of a call whose sessions are claimed; those that still do not fit are put
                back. Returns sessions that are done with already.
        """
        self._table = table
        self._models = models
        self._pager = pager
        self._start = start
        self._waiting: dict[int, deque[tuple[Call, int]]] = {}
        self._is_due = False
        self._is_full = False
        """Somebody that was let in was put back."""
        self.release: Callable[[Handles], None] = lambda _handles: None
        """Ends claims. Set by who has them."""

    def __bool__(self) -> bool:
        return any(self._waiting.values())

    def count(self, model: int) -> int:
        """How many changes of a model wait."""
        return len(self._waiting.get(model, ()))

    def park(self, call: Call, members: Members) -> None:
        """Let members of a call wait."""
        waiting = self._waiting.setdefault(call.model, deque())
        waiting.extend((call, member) for member in members.tolist())

    def put_back(self, call: Call, members: Members) -> None:
        """Let members of a call that were let in wait again, before all others."""
        if len(members):
            self._is_full = True
            self._waiting[call.model].extendleft((call, member) for member in reversed(members.tolist()))

    def room_may_have_come(self) -> None:
        """A session is done, made or gone: look in the next turn of the event loop whether somebody fits now."""
        if not self._is_due and self:
            self._is_due = True
            asyncio.get_running_loop().call_soon(self._let_in)

    def _let_in(self) -> None:
        self._is_due = False
        for model, waiting in list(self._waiting.items()):  # answers may bring what waits for another model
            if waiting:
                self._let_in_some(self._models[model], waiting)

    def _let_in_some(self, model: ServedModel, waiting: deque[tuple[Call, int]]) -> None:
        fitting = self._fitting(model, waiting)
        self._is_full = False
        while fitting and not self._is_full:  # answers may bring what takes the room
            call, members = _take(waiting, fitting)
            fitting -= len(members)
            done = self._start(call, np.array(members, np.intp))
            if len(done):
                self.release(done)

    def _fitting(self, model: ServedModel, waiting: deque[tuple[Call, int]]) -> int:
        """How many of those that wait fit, beginning with the first."""
        # each has a row at least
        first = islice(waiting, model.slots.resident_limit)
        rows = np.array([self._table.batch_size[call.handles[member]] for call, member in first], np.int64)
        return int(np.searchsorted(np.cumsum(rows), self._pager.room(model, int(rows.sum())), side="right"))


def _take(waiting: deque[tuple[Call, int]], most: int) -> tuple[Call, list[int]]:
    """The call that comes first, and its members that wait in a row."""
    call = waiting[0][0]
    members: list[int] = []
    while len(members) < most and waiting and waiting[0][0] is call:
        members.append(waiting.popleft()[1])
    return call, members
