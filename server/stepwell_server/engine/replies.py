"""The reply to each session's last change, kept so that a retry gets the same bytes.

What a reply holds of the last time step lies in the arena beside the state. Only replies of several time
steps are kept as arrays of their own.
"""

from __future__ import annotations

import enum
from collections.abc import Mapping

import numpy as np

from stepwell_server.core.sessions import Handles, SessionTable
from stepwell_server.core.slots import Rows
from stepwell_server.engine.arena import Arena
from stepwell_server.engine.calls import Array, Select
from stepwell_server.engine.job import Job
from stepwell_server.engine.passes import Pass
from stepwell_server.program import Program

Outputs = Mapping[str, Array]


class Kept(enum.IntEnum):
    """How a reply is kept; the values of the session table's column `reply`."""

    EMPTY = 0
    """It has no outputs."""
    ROWS = 1
    """The arena's output rows, as they are."""
    ROWS_WITH_TIME = 2
    """The arena's output rows, temporal ones with a time axis of length 1."""
    ARRAYS = 3
    """Arrays of their own."""


class Replies:
    """The replies of one model's sessions."""

    def __init__(self, program: Program, table: SessionTable, arena: Arena) -> None:
        self._program = program
        self._table = table
        self._arena = arena
        self._arrays: dict[int, dict[str, Array]] = {}

    def outputs(self, work: Pass, index: int, job: Job) -> Outputs:
        """The outputs of a job that has run its last step; views of the pass's arrays."""
        if job.select is Select.NONE:
            return {}
        start = work.starts[index]
        found: dict[str, Array] = {}
        for i, spec in enumerate(self._program.outputs):
            last = work.outputs[i][-1, start : start + job.row_count]
            series = job.collected[i] if job.collected else None
            if series is not None:
                last = series
            elif spec.temporal and _has_time(job):
                last = last[:, None]
            found[spec.name] = last
        return found

    def remember(self, job: Job, handles: Handles, outputs: Outputs) -> None:
        """Keep the reply of a job; the last time step's outputs are in the arena already."""
        kept = self._how(job)
        if self._arrays:
            for handle in handles.tolist():
                self._arrays.pop(handle, None)
        self._table.reply[handles] = kept
        if kept is Kept.ARRAYS:
            self._keep_arrays(job, handles, outputs)

    def remember_rows(self, handle: int, kept: Kept) -> None:
        """Keep how the reply of one session is kept; not as arrays."""
        if self._arrays:
            self._arrays.pop(handle, None)
        self._table.reply[handle] = kept

    def remember_empty(self, handles: Handles) -> None:
        """Keep that the last change's reply has no outputs."""
        self._table.reply[handles] = Kept.EMPTY
        for handle in handles.tolist() if self._arrays else ():
            self._arrays.pop(handle, None)

    def recall(self, handle: int) -> Outputs:
        """The outputs of a session's last change."""
        kept = Kept(self._table.reply[handle])
        if kept is Kept.EMPTY:
            return {}
        if kept is Kept.ARRAYS:
            return self._arrays[handle]
        rows = self._table.rows(handle)
        return {
            spec.name: array[rows][:, None] if kept is Kept.ROWS_WITH_TIME and spec.temporal else array[rows]
            for spec, array in zip(self._program.outputs, self._arena.outputs, strict=True)
        }

    def forget(self, handle: int) -> None:
        """The session is gone."""
        self._arrays.pop(handle, None)

    def _how(self, job: Job) -> Kept:
        if job.select is Select.NONE:
            return Kept.EMPTY
        if any(array is not None for array in job.collected):
            return Kept.ARRAYS
        return Kept.ROWS_WITH_TIME if _has_time(job) else Kept.ROWS

    def _keep_arrays(self, job: Job, handles: Handles, outputs: Outputs) -> None:
        ends: Rows = np.cumsum(job.sizes)
        for handle, size, end in zip(handles.tolist(), job.sizes.tolist(), ends.tolist(), strict=True):
            # copies, so that one session does not keep the arrays of all alive
            self._arrays[handle] = {name: array[end - size : end].copy() for name, array in outputs.items()}


def _has_time(job: Job) -> bool:
    return job.with_time and job.select is Select.ALL
