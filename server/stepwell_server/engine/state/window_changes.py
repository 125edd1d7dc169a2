"""What a record of a step has of large windows: the new elements only (`store.changes`)."""

from __future__ import annotations

import functools
import math
from typing import Protocol

import numpy as np
import numpy.typing as npt

from stepwell_server.core.slots import Rows
from stepwell_server.engine.state.arena import Arena
from stepwell_server.engine.types import Array
from stepwell_server.program import Program
from stepwell_server.store.changes import Window, field_of
from stepwell_server.store.record import CHANGE_VERSION, SCHEMA_VERSION

#: Windows of fewer bytes are stored whole; so are rows of at most this many times what a step changes.
_MIN_BYTES, _WORTH = 4096, 8
#: About the bytes of a record besides its rows.
_HEAD_BYTES = 256
#: A record with whole rows is written at least once in this many steps.
_MAX_PERIOD = 512


class Form(Protocol):
    """A part of rows that a record has: everything, or what a change has."""

    schema: int
    """The schema of these records."""
    row_bytes: int
    """Bytes of a packed row."""

    def field(self, batch_size: int, /) -> bytes:
        """The extension field that describes the rows of a session; empty: none."""

    def pack(self, rows: Rows, /) -> npt.NDArray[np.uint8]:
        """Rows as bytes, `(len(rows), row_bytes)`."""

    def pack_row(self, row: int, /) -> bytes:
        """`pack` for one row."""

    def pack_into(self, rows: Rows, packed: npt.NDArray[np.uint8], /) -> None:
        """`pack` into `(n, bytes)`, where each line takes the rows of one session, one after the other."""


class WholeRows:
    """Everything: see `Form`."""

    schema = SCHEMA_VERSION

    def __init__(self, arena: Arena) -> None:
        self.row_bytes = arena.row_bytes
        self.pack, self.pack_row, self.pack_into = arena.pack, arena.pack_row, arena.pack_into

    def field(self, _batch_size: int, /) -> bytes:
        """See `Form`."""
        return b""


class NewElements:
    """What some steps changed: the new elements of windows, and all of other states and of the outputs. See `Form`."""

    schema = CHANGE_VERSION

    def __init__(self, arena: Arena, windows: list[bool], steps: int) -> None:
        """`windows`: which states are windows that a step moves by one element."""
        self._arena = arena
        self._counts = [
            min(steps, state.shape[1]) if is_one else 0
            for state, is_one in zip(arena.states, windows, strict=True)
        ]
        start, self._windows = 0, list[Window]()
        for state, count in zip(arena.states, self._counts, strict=True):
            size = state[0].nbytes
            if count:
                self._windows.append(Window(start, size, size // state.shape[1] * count))
            start += size
        self.row_bytes = arena.row_bytes - sum(window.size - window.new for window in self._windows)
        self._fields: dict[int, bytes] = {}

    def field(self, batch_size: int, /) -> bytes:
        """See `Form`."""
        found = self._fields.get(batch_size)
        if found is None:
            found = self._fields[batch_size] = field_of(self._windows, batch_size)
        return found

    def pack(self, rows: Rows, /) -> npt.NDArray[np.uint8]:
        """See `Form`."""
        parts = [self._newest(index, rows) for index in range(len(self._counts))]
        parts += [output[rows] for output in self._arena.outputs]
        return self._arena.pack_arrays(parts)

    def pack_row(self, row: int, /) -> bytes:
        """See `Form`."""
        parts: list[bytes] = []
        for state, ring, count in zip(self._arena.states, self._arena.rings, self._counts, strict=True):
            if count and ring is not None:
                parts.append(ring.pack_newest(row, count))
            else:
                parts.append(
                    state[row, state.shape[1] - count :].tobytes() if count else state[row].tobytes()
                )
        return b"".join([*parts, *(output[row].tobytes() for output in self._arena.outputs)])

    def pack_into(self, rows: Rows, packed: npt.NDArray[np.uint8], /) -> None:
        """See `Form`."""
        packed[...] = self.pack(rows).reshape(packed.shape)

    def _newest(self, index: int, rows: Rows) -> Array:
        """The new elements of a window, or all of another state."""
        arena, count = self._arena, self._counts[index]
        state, ring = arena.states[index], arena.rings[index]
        if not count:
            return state[rows]
        if ring is None:
            return state[rows, state.shape[1] - count :]
        return ring.newest(rows, count)


class WindowChanges:
    """The changes of a model with large windows."""

    def __init__(self, arena: Arena, windows: list[bool]) -> None:
        self._arena, self._windows = arena, windows
        self.after = functools.lru_cache(16)(self._after)
        """`NewElements` after some steps; None: whole rows are not much larger."""
        step = NewElements(arena, windows, 1)
        self.is_worth = arena.row_bytes > _WORTH * step.row_bytes and arena.row_bytes >= _MIN_BYTES
        period = math.ceil(arena.row_bytes / (step.row_bytes + _HEAD_BYTES))
        self.period = min(_MAX_PERIOD, period)
        """After so many steps, a record with whole rows takes as many bytes as the changes since the last one."""

    @classmethod
    def of(cls, program: Program, arena: Arena) -> WindowChanges | None:
        """The changes of a program; None: its records have whole rows."""
        windows = [spec.gap > 0 for spec in program.state]
        found = cls(arena, windows) if any(windows) else None
        return found if found is not None and found.is_worth else None

    def _after(self, steps: int) -> NewElements | None:
        form = NewElements(self._arena, self._windows, steps)
        return form if 2 * form.row_bytes < self._arena.row_bytes else None
