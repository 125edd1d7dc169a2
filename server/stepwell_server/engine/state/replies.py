"""The reply to each session's last change, kept so that a retry gets the same bytes.

What a reply holds of the last time step lies in the arena beside the state. Only replies of several time
steps are kept as arrays of their own.
"""

from __future__ import annotations

import enum
import math
import struct
from collections.abc import Mapping

import numpy as np
import numpy.typing as npt

from stepwell_server.core.sessions import Handles, SessionTable
from stepwell_server.core.slots import Rows
from stepwell_server.engine.api import Array, Select
from stepwell_server.engine.job import Job
from stepwell_server.engine.passes.batch import Pass
from stepwell_server.engine.state.arena import Arena
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
        self._arrays: dict[int, Outputs] = {}

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

    def kept(self, job: Job) -> Kept:
        """How the replies of a job are kept."""
        if job.select is Select.NONE:
            return Kept.EMPTY
        if any(array is not None for array in job.collected):
            return Kept.ARRAYS
        return Kept.ROWS_WITH_TIME if _has_time(job) else Kept.ROWS

    @staticmethod
    def arrays_of(job: Job, outputs: Outputs) -> list[dict[str, Array]]:
        """A job's outputs by session: copies, so that one session does not keep the arrays of all alive."""
        ends: Rows = np.cumsum(job.sizes)
        return [
            {name: array[end - size : end].copy() for name, array in outputs.items()}
            for size, end in zip(job.sizes.tolist(), ends.tolist(), strict=True)
        ]

    def remember(self, handles: Handles, kept: npt.NDArray[np.uint8], arrays: Mapping[int, Outputs]) -> None:
        """Keep replies; the last time step's outputs are in the arena already.

        Args:
            handles: The sessions.
            kept: How each of their replies is kept.
            arrays: Those that are kept as arrays, by place.
        """
        if self._arrays:
            for handle in handles.tolist():
                self._arrays.pop(handle, None)
        self._table.reply[handles] = kept
        for place, outputs in arrays.items():
            self._arrays[int(handles[place])] = outputs

    def remember_rows(self, handle: int, kept: Kept) -> None:
        """Keep how the reply of one session is kept; not as arrays."""
        if self._arrays:
            self._arrays.pop(handle, None)
        self._table.reply[handle] = kept

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

    def arrays(self, handles: Handles) -> dict[int, Outputs]:
        """Those replies of sessions that are kept as arrays, by place."""
        if not self._arrays:
            return {}
        places = np.flatnonzero(self._table.reply[handles] == Kept.ARRAYS).tolist()
        return {place: self._arrays[int(handles[place])] for place in places}

    def pack(self, outputs: Outputs) -> bytes:
        """A reply that is kept as arrays, as bytes: each output's shape and data, in the program's order."""
        parts: list[bytes] = []
        for spec in self._program.outputs:
            array = outputs[spec.name]
            parts += [struct.pack(f"<B{array.ndim}I", array.ndim, *array.shape), array.tobytes()]
        return b"".join(parts)

    def restore(self, handle: int, packed: bytes) -> None:
        """Keep what `pack` returned as the reply of a session."""
        found: dict[str, Array] = {}
        at = 0
        for spec in self._program.outputs:
            shape = struct.unpack_from(f"<{packed[at]}I", packed, at + 1)
            at += 1 + 4 * len(shape)
            count = math.prod(shape)
            found[spec.name] = np.frombuffer(packed, spec.dtype, count, at).reshape(shape)
            at += count * found[spec.name].itemsize
        self._arrays[handle] = found

    def forget(self, handle: int) -> None:
        """The session is gone, or only in the store."""
        self._arrays.pop(handle, None)


def _has_time(job: Job) -> bool:
    return job.with_time and job.select is Select.ALL
