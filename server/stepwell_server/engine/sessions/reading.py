"""A session's state is read when its turn comes."""

from __future__ import annotations

import numpy as np

from stepwell_server.clock import Clock
from stepwell_server.core.sessions import SessionTable
from stepwell_server.engine.api import StateRead
from stepwell_server.engine.intake.turns import Turns
from stepwell_server.engine.sessions.directory import Directory
from stepwell_server.engine.sessions.loading import Seen


class Reading:
    """Reads states. Lives on the event loop."""

    def __init__(self, table: SessionTable, directory: Directory, turns: Turns, *, clock: Clock) -> None:
        self._table = table
        self._directory = directory
        self._turns = turns
        self._clock = clock

    async def read(self, session_id: str, seen: Seen, deadline: float) -> StateRead:
        """Read a state when its turn comes. See `Engine.get_state`."""
        handle = self._directory.find(session_id, seen)
        await self._turns.hold(handle, deadline)
        try:
            self._table.used[handle] = self._clock.monotonic()
            model = self._directory.model_of(handle)
            arrays = model.arena.read(self._table.rows(handle))
            state = {spec.name: array for spec, array in zip(model.program.state, arrays, strict=True)}
            return StateRead(state, self._directory.info(handle))
        finally:
            self._turns.release(np.array([handle]))
