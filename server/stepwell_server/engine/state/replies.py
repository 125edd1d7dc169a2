"""The reply to each session's last change, kept so that a retry gets the same bytes.

What a reply holds of the last time step lies in the arena beside the state. Only replies of several time
steps are kept as arrays of their own.
"""

from __future__ import annotations

import enum
import math
import struct
from collections.abc import Hashable, Iterator, Mapping

import numpy as np

from stepwell_server.core.sessions import Handles, SessionTable
from stepwell_server.core.slots import Rows
from stepwell_server.engine.state.arena import Arena
from stepwell_server.engine.types import Array, Members
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


class ReplyMemory:
    """The last reply of each of one model's sessions."""

    def __init__(self, program: Program, table: SessionTable, arena: Arena) -> None:
        self._program = program
        self._table = table
        self._arena = arena
        self.series: dict[int, Outputs] = {}
        """Those of several time steps, by session."""

    def remember(self, handles: Handles, arrays: Mapping[int, Outputs]) -> None:
        """Keep replies where some are, or were, arrays; else the table's column says all.

        The last time step's outputs are in the arena already. `arrays` are by the session's place.
        """
        if self.series:
            for handle in handles.tolist():
                self.series.pop(handle, None)
        for place, outputs in arrays.items():
            self.series[int(handles[place])] = outputs

    def recall_many(self, handles: Handles) -> Iterator[tuple[Members, Outputs]]:
        """The outputs of sessions' last changes: places of those that have one form, and theirs one after the other."""
        kinds = self._table.reply[handles]
        for kind in (Kept.EMPTY, Kept.ROWS, Kept.ROWS_WITH_TIME):
            places = np.flatnonzero(kinds == kind)
            if len(places):
                yield places, self._of_rows(kind, self._table.rows_of(handles[places]))
        alike: dict[Hashable, list[int]] = {}
        for place in np.flatnonzero(kinds == Kept.ARRAYS).tolist():
            outputs = self.series[int(handles[place])]
            form = tuple((name, array.shape[1:]) for name, array in outputs.items())
            alike.setdefault(form, []).append(place)
        for some in alike.values():
            found = [self.series[int(handle)] for handle in handles[some].tolist()]
            yield (
                np.array(some, np.intp),
                {name: np.concatenate([outputs[name] for outputs in found]) for name in found[0]},
            )

    def _of_rows(self, kept: Kept, rows: Rows) -> Outputs:
        if kept is Kept.EMPTY:
            return {}
        return {
            spec.name: array[rows][:, None] if kept is Kept.ROWS_WITH_TIME and spec.temporal else array[rows]
            for spec, array in zip(self._program.outputs, self._arena.outputs, strict=True)
        }

    def arrays(self, handles: Handles) -> dict[int, Outputs]:
        """Those replies of sessions that are kept as arrays, by place."""
        if not self.series:
            return {}
        places = np.flatnonzero(self._table.reply[handles] == Kept.ARRAYS).tolist()
        return {place: self.series[int(handles[place])] for place in places}

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
        self.series[handle] = found

    def forget(self, handle: int) -> None:
        """The session is gone, or only in the store."""
        self.series.pop(handle, None)
