"""A model that is served: its program, its rows, what waits for it and what it costs."""

from __future__ import annotations

import asyncio
import dataclasses
from collections.abc import Callable
from typing import Any

from stepwell_server.core.scheduler import Scheduler
from stepwell_server.core.slots import Slots
from stepwell_server.engine.cost import Cost
from stepwell_server.engine.shares import Share
from stepwell_server.engine.state.arena import Arena
from stepwell_server.engine.state.replies import ReplyMemory
from stepwell_server.program import Program
from stepwell_server.store.record import Texts

#: A pass takes about so long at most while others are about, in seconds; but its fixed part is at most this share of it.
SHORT_PASS_S, _MOST_FIXED = 0.1e-3, 0.25


class Alarm:
    """A call that is due in the next turn of the event loop, however often it is asked for before. Lives there."""

    def __init__(self, listener: Callable[[], None]) -> None:
        self._loop = asyncio.get_running_loop()
        self._listener = listener
        self._is_due = False

    def ring(self) -> None:
        """Have the listener called once."""
        if not self._is_due:
            self._is_due = True
            self._loop.call_soon(self._call)

    def _call(self) -> None:
        self._is_due = False
        self._listener()


@dataclasses.dataclass(slots=True, eq=False)
class Model:
    """Everything that belongs to one model; who works on it is wired in `engine`."""

    index: int
    """Its number in the session table."""
    name: str
    program: Program
    arena: Arena
    slots: Slots
    replies: ReplyMemory
    texts: Texts
    """Of its sessions' records."""
    max_batch_rows: int
    """Rows of a pass at most, unless a single change has more."""
    ready: Scheduler[Any]
    """Jobs that wait for a pass."""
    cost: Cost
    """Of a pass by its rows, on one thread."""
    work: Share
    """Rung when something has come for the model's loop; its turns, and its passes on threads."""
    waiting: int = 0
    """Changes and holds that wait for their session or for rows: see `turns` and `row_queue`."""

    @property
    def rows_of_a_short_pass(self) -> int:
        """Rows of a pass while others are about: as many as make them wait for a moment only, but worth a pass."""
        return self.rows_within(SHORT_PASS_S)

    def rows_within(self, seconds: float) -> int:
        """Rows of a pass of so many seconds on one thread, but enough to be worth one."""
        return self.cost.items_within(seconds, _MOST_FIXED)

    @property
    def expected_wait_s(self) -> float:
        """About how long what waits for a pass now will take."""
        return self.cost.of(self.ready.rows_waiting)
