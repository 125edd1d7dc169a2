"""A model that is served: its program, its rows, what waits for it and what it costs."""

from __future__ import annotations

import asyncio
import dataclasses
from collections.abc import Callable
from typing import Any

from stepwell_server.core.scheduler import Scheduler
from stepwell_server.core.slots import Slots
from stepwell_server.engine.cost import Cost
from stepwell_server.engine.state.arena import Arena
from stepwell_server.engine.state.replies import ReplyMemory
from stepwell_server.program import Program
from stepwell_server.store.record import Texts

#: A pass takes about so long at most while others are about, in seconds; but its fixed part is at most this share of it.
SHORT_PASS_S, _MOST_FIXED = 0.1e-3, 0.25


class Alarm:
    """A call that is due in the next turn of the event loop, however often it is asked for before.

    Rung by whoever has work for the listener. Lives on the event loop.
    """

    def __init__(self, listener: Callable[[], None] | None = None) -> None:
        self._loop = asyncio.get_running_loop()
        self._listener = listener
        self.is_due = False
        """The listener is called as soon as the event loop is at it."""
        self._is_held = False
        """Nothing is scheduled: whoever holds it will look."""
        self._is_scheduled = False
        """The event loop will call: once, or several turns would follow each other without a look at what has come."""

    def listen(self, listener: Callable[[], None]) -> None:
        """Call `listener` after each ring."""
        self._listener = listener

    def ring(self) -> None:
        """Have the listener called once."""
        if not self.is_due and self._listener is not None:
            self.is_due = True
            if not self._is_held:
                self._schedule()

    def hold(self) -> None:
        """Schedule nothing until `go`: more comes at once."""
        self._is_held = True

    def go(self) -> None:
        """Call the listener now if that is due, which saves a turn of the event loop."""
        self._is_held = False
        self._call()

    def done(self) -> None:
        """For the listener: what it has been rung for since it was called is done already."""
        self.is_due = False

    def _schedule(self) -> None:
        if not self._is_scheduled:
            self._is_scheduled = True
            self._loop.call_soon(self._scheduled)

    def _scheduled(self) -> None:
        self._is_scheduled = False
        self._call()

    def _call(self) -> None:
        if not self.is_due:
            return
        assert self._listener is not None, "only rung with a listener"
        self.is_due, self._is_held = False, True
        try:
            self._listener()
        finally:
            self._is_held = False
            if self.is_due:
                self._schedule()


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
    work: Alarm
    """Rung when something has come for the model's loop."""
    waiting: int = 0
    """Changes and holds that wait for their session or for rows: see `turns` and `row_queue`."""

    @property
    def rows_of_a_short_pass(self) -> int:
        """Rows of a pass while others are about: as many as make them wait for a moment only, but worth a pass."""
        return self.cost.items_within(SHORT_PASS_S, _MOST_FIXED)

    @property
    def expected_wait_s(self) -> float:
        """About how long what waits for a pass now will take."""
        return self.cost.of(self.ready.rows_waiting)
