"""The preallocated rows: the state of every resident session, and its last output."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
import numpy.typing as npt

from stepwell_server.core.slots import Rows, page_by_page
from stepwell_server.engine.state.rings import Ring, StepParts
from stepwell_server.engine.types import Array
from stepwell_server.program import Program, dtype_of


class Arena:
    """Rows with the states of one model's sessions and their last outputs.

    The memory is reserved at once and used when a row is first written: untouched pages cost nothing. Rows of
    different sessions may be read and written from different threads; a session's claim decides which thread may
    access its rows.
    """

    def __init__(self, program: Program, capacity: int) -> None:
        self.has_rings = program.has_rings
        """Whether some of its states are rings."""
        self.steps = page_by_page((capacity if self.has_rings else 0,), np.dtype(np.int64))
        """Of rows with rings: see `Ring`."""
        self.rings = [Ring(spec, capacity, self.steps) if spec.gap else None for spec in program.state]
        self.states = tuple(
            page_by_page((capacity, *spec.shape), dtype_of(spec.dtype)) if ring is None else ring.array
            for spec, ring in zip(program.state, self.rings, strict=True)
        )
        self.outputs = tuple(
            page_by_page((capacity, *spec.shape), dtype_of(spec.dtype)) for spec in program.outputs
        )
        """Each row's outputs of its last time step: part of the remembered reply."""
        self._arrays = (*self.states, *self.outputs)
        self._rings = (*self.rings, *[None] * len(self.outputs))
        self.row_bytes = sum(array.nbytes // capacity for array in self._arrays)
        """Bytes of a packed row."""

    def read(self, rows: Rows) -> tuple[Array, ...]:
        """Copies of the states of `rows`, `(len(rows), ...)` each."""
        return tuple(self._copies(rows)[: len(self.states)])

    def _copies(self, rows: Rows) -> list[Array]:
        """Copies of states and outputs of `rows`."""
        return [
            array[rows] if ring is None else ring.read(rows)
            for array, ring in zip(self._arrays, self._rings, strict=True)
        ]

    def gather(self, rows: Rows, into: Sequence[Array]) -> None:
        """Copy the states of `rows` into buffers of the same length."""
        for state, ring, buffer in zip(self.states, self.rings, into, strict=True):
            if ring is not None:
                np.copyto(buffer, ring.read(rows))
            else:
                # mode="clip" lets numpy write straight into `out`; the rows are always in range
                np.take(state, rows, axis=0, out=buffer, mode="clip")

    def write(self, rows: Rows, states: Sequence[Array]) -> None:
        """Set the states of `rows`."""
        for state, values in zip(self.states, states, strict=True):
            state[rows] = values
        if self.has_rings:
            self.steps[rows] = 0

    def parts(self, program: Program) -> StepParts | None:
        """What a step of a program reads and changes of its rings; None: its rings are not those of this arena."""
        gaps = [spec.gap for spec in program.state]
        if not any(gaps) or [gap > 0 for gap in gaps] != [ring is not None for ring in self.rings]:
            return None
        return StepParts(self.states, self.rings, gaps, self.steps)

    def keep_outputs(self, rows: Rows, outputs: Sequence[Array]) -> None:
        """Keep the outputs of the last time step of `rows`."""
        for kept, values in zip(self.outputs, outputs, strict=True):
            kept[rows] = values

    def pack(self, rows: Rows) -> npt.NDArray[np.uint8]:
        """States and outputs of `rows` as bytes, `(len(rows), bytes per row)`."""
        return np.concatenate([_as_bytes(array) for array in self._copies(rows)], axis=1)

    def pack_into(self, rows: Rows, packed: npt.NDArray[np.uint8]) -> None:
        """`pack` into `(n, bytes)`, where each line takes the rows of one session, one after the other."""
        if not len(rows):
            return
        lines = packed.reshape(len(rows), -1) if packed.flags.c_contiguous else None
        if lines is None and len(packed) == len(rows):
            lines = packed
        if lines is None:
            packed[...] = self.pack(rows).reshape(packed.shape)
            return
        start, where = 0, _as_slice(rows)
        for array, ring in zip(self._arrays, self._rings, strict=True):
            part = _as_bytes(array[where] if ring is None else ring.read(rows))
            lines[:, start : start + part.shape[1]] = part
            start += part.shape[1]

    def pack_row(self, row: int) -> bytes:
        """`pack` for one row."""
        return b"".join(
            [
                array[row].tobytes() if ring is None else ring.pack_row(row)
                for array, ring in zip(self._arrays, self._rings, strict=True)
            ]
        )

    def pack_states(self, states: Sequence[Array], count: int) -> npt.NDArray[np.uint8]:
        """The `pack` of `count` rows with these states that have not been stepped."""
        outputs = [np.zeros((count, *array.shape[1:]), array.dtype) for array in self.outputs]
        return self.pack_arrays([*states, *outputs])

    @staticmethod
    def pack_arrays(arrays: Sequence[Array]) -> npt.NDArray[np.uint8]:
        """The `pack` of rows with these states and outputs, `(n, ...)` each."""
        return np.concatenate([_as_bytes(array) for array in arrays], axis=1)

    def pack_initial(self, initial: Sequence[Array]) -> npt.NDArray[np.uint8]:
        """The `pack` of a row that has not been stepped, `(1, bytes per row)`."""
        states = [value.astype(state.dtype)[None] for state, value in zip(self.states, initial, strict=True)]
        return self.pack_states(states, 1)

    def unpack(self, rows: Rows, packed: npt.NDArray[np.uint8]) -> None:
        """Set states and outputs of `rows` from packed rows."""
        for array, values in zip(self._arrays, self.unpacked(packed), strict=True):
            array[rows] = values
        if self.has_rings:
            self.steps[rows] = 0

    def unpacked(self, packed: npt.NDArray[np.uint8]) -> Iterator[Array]:
        """The states, then the outputs, of packed rows, `(n, ...)` each."""
        start = 0
        for array in self._arrays:
            size = array.dtype.itemsize * int(np.prod(array.shape[1:], dtype=np.int64))
            part = np.ascontiguousarray(packed[:, start : start + size])
            yield part.view(array.dtype).reshape(len(packed), *array.shape[1:])
            start += size

    def clear_outputs(self, rows: Rows) -> None:
        """Clear the outputs of `rows`, which belong to earlier sessions."""
        for output in self.outputs:
            output[rows] = 0

    def reset(self, rows: Rows, initial: Sequence[Array]) -> None:
        """Set `rows` to an initial state: that of their sessions' model version."""
        for state, value in zip(self.states, initial, strict=True):
            state[rows] = value
        if self.has_rings:
            self.steps[rows] = 0


def _as_slice(rows: Rows) -> Rows | slice:
    """Consecutive rows as a slice, which numpy need not copy; rows of a group usually are consecutive."""
    first = int(rows[0])
    if int(rows[-1]) - first == len(rows) - 1 and (rows[1:] - rows[:-1] == 1).all():
        return slice(first, first + len(rows))
    return rows


def _as_bytes(array: Array) -> npt.NDArray[np.uint8]:
    flat = np.ascontiguousarray(array).reshape(len(array), -1)
    return flat.view(np.uint8)
