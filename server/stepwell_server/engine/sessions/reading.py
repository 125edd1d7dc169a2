"""A session's state is read when its turn comes."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

import numpy as np

from stepwell_server.clock import Clock
from stepwell_server.core.sessions import SessionTable
from stepwell_server.core.slots import Rows
from stepwell_server.engine.api import StateRead
from stepwell_server.engine.intake.turns import Turns
from stepwell_server.engine.sessions.directory import Directory
from stepwell_server.engine.sessions.loading import Seen
from stepwell_server.engine.state.model import Model
from stepwell_server.engine.types import Array

#: Rows that are copied before others get a turn of the event loop.
ROWS_AT_ONCE = 4096


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
            model = self._directory.models.by_handle(handle)
            arrays = await self._in_pieces(model, self._table.rows(handle))
            state = {spec.name: array for spec, array in zip(model.program.state, arrays, strict=True)}
            return StateRead(state, self._directory.info(handle))
        finally:
            self._turns.release(np.array([handle]))

    @staticmethod
    async def _in_pieces(model: Model, rows: Rows) -> Sequence[Array]:
        """Copies of the states of a claimed session's rows; others get a turn between the pieces of a large one."""
        if len(rows) <= ROWS_AT_ONCE:
            return model.arena.read(rows)
        arrays = [np.empty((len(rows), *state.shape[1:]), state.dtype) for state in model.arena.states]
        for start in range(0, len(rows), ROWS_AT_ONCE):
            part = slice(start, start + ROWS_AT_ONCE)
            for array, piece in zip(arrays, model.arena.read(rows[part]), strict=True):
                array[part] = piece
            await asyncio.sleep(0)
        return arrays
