"""Windows of past values in the arena: a step reads some of their elements, and replaces the oldest one.

Nothing else of a window moves. To users and in records it is in the order of time all the same.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from stepwell_server.core.slots import Rows, page_by_page
from stepwell_server.engine.types import Array
from stepwell_server.program import StateSpec, dtype_of


class Ring:
    """The windows of one state."""

    def __init__(self, spec: StateSpec, capacity: int, steps: npt.NDArray[np.int64]) -> None:
        self.length = spec.shape[0]
        self.array = page_by_page((capacity, *spec.shape), dtype_of(spec.dtype))
        self.elements = self.array.reshape(capacity * self.length, *spec.shape[1:])
        """The same memory, one element after the other."""
        self._steps = steps
        """Of each row: the steps since its windows were written. Modulo the length, it is the place of the oldest."""
        self._places = np.arange(self.length)

    def read(self, rows: Rows) -> Array:
        """Copies of the windows of `rows`, each in the order of time."""
        places = (self._steps[rows, None] + self._places) % self.length
        places += rows[:, None] * self.length
        windows: Array = np.take(self.elements, places, axis=0, mode="clip")
        return windows

    def newest(self, rows: Rows, count: int) -> Array:
        """Copies of the last elements of the windows of `rows`, in the order of time."""
        places = (self._steps[rows, None] + self._places[self.length - count :]) % self.length
        places += rows[:, None] * self.length
        return self.elements[places]  # type: ignore[no-any-return]

    def pack_newest(self, row: int, count: int) -> bytes:
        """The last elements of one window as bytes, in the order of time."""
        window, end = self.array[row], int(self._steps[row]) % self.length
        parts: list[bytes] = [window[max(0, end - count) : end].tobytes()]
        if count > end:
            parts.insert(0, window[end - count :].tobytes())
        return b"".join(parts)

    def pack_row(self, row: int) -> bytes:
        """One window as bytes, in the order of time."""
        window, oldest = self.array[row], int(self._steps[row]) % self.length
        parts: list[bytes] = [window[oldest:].tobytes(), window[:oldest].tobytes()]
        return b"".join(parts)


class StepParts:
    """What a step reads and changes of rows whose states are rings, or some of them."""

    def __init__(
        self,
        states: Sequence[Array],
        rings: Sequence[Ring | None],
        gaps: Sequence[int],
        steps: npt.NDArray[np.int64],
    ) -> None:
        """`gaps`: of each ring, every so many elements are read."""
        self._steps, self._gaps = steps, gaps
        self._states = [ring or state for state, ring in zip(states, rings, strict=True)]
        self._lengths = np.array([ring.length for ring in rings if ring is not None])
        read = [range(0, ring.length, gap) for ring, gap in zip(rings, gaps, strict=True) if ring is not None]
        ends = np.cumsum([len(each) for each in read]).tolist()
        self._shares = [slice(end - len(each), end) for each, end in zip(read, ends, strict=True)]
        self._offsets = np.concatenate([np.array(each) for each in read])
        self._moduli = np.repeat(self._lengths, [len(each) for each in read])

    def gather(self, rows: Rows, into: Sequence[Array]) -> None:
        """Copy what a step of `rows` reads."""
        if len(rows) == 1:  # slices of one row cost a third of arrays of indexes
            self._gather_one(int(rows[0]), into)
            return
        places = (self._steps[rows, None] + self._offsets) % self._moduli
        places += rows[:, None] * self._moduli
        shares = iter(self._shares)
        for state, buffer in zip(self._states, into, strict=True):
            if isinstance(state, Ring):
                np.take(state.elements, places[:, next(shares)], axis=0, out=buffer, mode="clip")
            else:
                np.take(state, rows, axis=0, out=buffer, mode="clip")

    def write(self, rows: Rows, states: Sequence[Array]) -> None:
        """Write what a step of `rows` returned: the new elements of rings."""
        if len(rows) == 1:
            self._write_one(int(rows[0]), states)
            return
        steps = self._steps[rows]
        places = steps[:, None] % self._lengths
        places += rows[:, None] * self._lengths
        ring = 0
        for state, values in zip(self._states, states, strict=True):
            if isinstance(state, Ring):
                state.elements[places[:, ring]] = values
                ring += 1
            else:
                state[rows] = values
        self._steps[rows] = steps + 1

    def _gather_one(self, row: int, into: Sequence[Array]) -> None:
        steps = int(self._steps[row])
        for state, gap, buffer in zip(self._states, self._gaps, into, strict=True):
            if isinstance(state, Ring):
                window, oldest, kept = state.array[row], steps % state.length, buffer[0]
                behind = window[oldest::gap]
                count = len(behind)
                kept[:count] = behind
                if count < len(kept):
                    kept[count:] = window[oldest + count * gap - state.length : oldest : gap]
            else:
                buffer[0] = state[row]

    def _write_one(self, row: int, states: Sequence[Array]) -> None:
        steps = int(self._steps[row])
        for state, values in zip(self._states, states, strict=True):
            if isinstance(state, Ring):
                state.array[row, steps % state.length] = values[0]
            else:
                state[row] = values[0]
        self._steps[row] = steps + 1
