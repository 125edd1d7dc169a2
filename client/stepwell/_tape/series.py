"""One array that grows along its first axis, time."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from stepwell._state.tensors import Array

_MIN_CAPACITY = 16


class Series:
    """Values over time. Readers get views, which later values do not change.

    Missing values are NaN. Types without a NaN become float64 with the first missing value, as in pandas.
    """

    def __init__(self, values: Array) -> None:
        self._buffer = values
        self._start, self._end = 0, len(values)

    @classmethod
    def missing(cls, count: int, like: Array) -> Series:
        """A series of missing values. `like` has the shape of a time step, and the dtype."""
        dtype = _with_nan(like.dtype) if count else like.dtype
        return cls(np.full((count, *like.shape), np.nan if count else 0, dtype))

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of one time step."""
        return self._buffer.shape[1:]

    def values(self, count: int) -> Array:
        """The first `count` values: a read-only view."""
        view = self._buffer[self._start : self._start + count]
        view.flags.writeable = False
        return view

    def append(self, values: Array) -> None:
        """Appends the values of some time steps."""
        self._reserve(len(values), self._buffer.dtype)[:] = values

    def append_part(self, count: int, values: Array | None, rows: npt.NDArray[np.intp] | None) -> None:
        """Appends `count` time steps of which some values are missing.

        Args:
            count: Number of time steps.
            values: Values of the last time steps, (at most count, rows, ...); None: all are missing.
            rows: Rows that `values` has; None: all.
        """
        if values is not None and len(values) == count and rows is None:
            self.append(values)
            return
        block = self._reserve(count, _with_nan(self._buffer.dtype))
        block[:] = np.nan
        if values is None:
            return
        known = block[count - len(values) :]
        if rows is None:
            known[:] = values
        else:
            known[:, rows] = values

    def drop(self, count: int) -> None:
        """Drops the first values."""
        self._start += count

    def _reserve(self, count: int, dtype: np.dtype[Any]) -> Array:
        """Makes room for more values at the end, and returns it."""
        end = self._end + count
        if end > len(self._buffer) or dtype != self._buffer.dtype:
            live = self._end - self._start
            buffer = np.empty((max(_MIN_CAPACITY, 2 * (live + count)), *self.shape), dtype)
            buffer[:live] = self._buffer[self._start : self._end]
            self._buffer, self._start, end = buffer, 0, live + count
        room = self._buffer[end - count : end]
        self._end = end
        return room


def _with_nan(dtype: np.dtype[Any]) -> np.dtype[Any]:
    return dtype if dtype.kind == "f" else np.dtype(np.float64)
