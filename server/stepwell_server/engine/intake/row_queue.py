"""Changes whose sessions cannot come back to the arena yet: every row is some session's that has something under way.

They wait, first come first served, until sessions that are done may be paged out. One that is let in when the room
is gone again keeps its place. Their own sessions are claimed meanwhile, and have no rows: nobody waits for them but
what is in their lines.
"""

from __future__ import annotations

from collections import deque
from itertools import islice
from typing import Protocol

import numpy as np

from stepwell_server.alarm import Alarm
from stepwell_server.core.sessions import Handles, SessionTable
from stepwell_server.engine.change import Change
from stepwell_server.engine.intake.paging import Pager
from stepwell_server.engine.models import Models
from stepwell_server.engine.state.model import Model
from stepwell_server.engine.types import Members


class Starter(Protocol):
    """Who starts members of a change when they need not wait any more."""

    def start_due(self, change: Change, members: Members, /) -> Handles:
        """Their turn has come: claim their sessions and start them; return sessions that are done with already."""

    def look_again(self, change: Change, members: Members, /) -> None:
        """Their session has left the table: start them if the store has it, and answer them else."""

    def start_waiting(self, change: Change, members: Members, /) -> None:
        """There is room: start them; those that still do not fit are put back."""


class RowQueue:
    """What waits for rows, by model. Lives on the event loop."""

    def __init__(self, table: SessionTable, models: Models, pager: Pager) -> None:
        self._table = table
        self._models = models
        self._pager = pager
        self._waiting: dict[int, deque[tuple[Starter, Change, int]]] = {}
        self.waiting = 0
        """Changes of all models."""
        self._look = Alarm(self._let_in)
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

    def room_may_have_come(self) -> None:
        """A session is done, made or gone: look in the next turn of the event loop whether somebody fits now."""
        if self:
            self._look.ring()

    def _let_in(self) -> None:
        for model, waiting in list(self._waiting.items()):  # answers may bring what waits for another model
            if waiting:
                self._let_in_some(self._models.by_index[model], waiting)

    def _let_in_some(self, model: Model, waiting: deque[tuple[Starter, Change, int]]) -> None:
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
