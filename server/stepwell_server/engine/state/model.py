"""A model that is served: its program, its rows, what waits for it and what it costs."""

from __future__ import annotations

import dataclasses
from typing import Any

from stepwell_server.core.scheduler import Scheduler
from stepwell_server.core.slots import Slots
from stepwell_server.engine.alarm import Alarm
from stepwell_server.engine.cost import Cost
from stepwell_server.engine.state.arena import Arena
from stepwell_server.engine.state.replies import ReplyMemory
from stepwell_server.program import Program
from stepwell_server.store.record import Texts


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
    in_inbox: int = 0
    """Rows of changes that wait in its inbox."""

    @property
    def expected_wait_s(self) -> float:
        """About how long what waits for a pass now will take."""
        return self.cost.of(self.ready.rows_waiting)
