"""An executor that runs only certain batch sizes, whatever the number of rows.

Some kernels compute different bits for a row if the batch has another size. A program then lists the sizes that
agree (`Program.batch_sizes`). Rows are cut and padded so that only those sizes ever run.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import numpy as np

from stepwell_server.engine.executors.base import Executor
from stepwell_server.engine.types import Array
from stepwell_server.program import Program

Run = Callable[[Sequence[Array], Sequence[Array]], tuple[Sequence[Array], Sequence[Array]]]
"""One time step: ``(inputs, states) -> (outputs, next_states)``, each ``(rows, *spec.shape)``."""


def chunks(rows: int, sizes: Sequence[int]) -> Iterator[tuple[int, int, int]]:
    """Cut ``rows`` into ``(start, stop, size)`` with ``stop - start <= size`` and ``size`` in ``sizes``.

    If ``sizes`` is empty, every size is allowed. The largest size is used while it is full; the rest runs in the
    smallest size that holds it.
    """
    if not sizes:
        yield 0, rows, rows
        return
    start, largest = 0, max(sizes)
    while start < rows:
        left = rows - start
        size = largest if left >= largest else min(size for size in sizes if size >= left)
        yield start, min(start + size, rows), size
        start += size


class PaddedExecutor(Executor):
    """An `Executor` over a function that requires exact batch sizes. For one thread at a time."""

    def __init__(self, program: Program, run: Run) -> None:
        """``run`` may return views that its next call overwrites."""
        self._program = program
        self._run = run
        self._rows = 0
        self._in: list[Array] = []
        self._state: list[Array] = []
        self._out: list[Array] = []
        self._next: list[Array] = []

    def bind(self, rows: int) -> None:
        """Make the buffers exactly ``rows`` long."""
        if rows == self._rows:
            return
        self._in = [np.zeros((rows, *spec.shape), spec.dtype) for spec in self._program.inputs]
        self._state = [np.zeros((rows, *spec.shape), spec.dtype) for spec in self._program.states_taken]
        self._out = [np.zeros((rows, *spec.shape), spec.dtype) for spec in self._program.outputs]
        self._next = [np.zeros((rows, *spec.shape), spec.dtype) for spec in self._program.states_returned]
        self._rows = rows

    def inputs(self) -> Sequence[Array]:
        """Writable views of the inputs of one time step."""
        return self._in

    def states(self) -> Sequence[Array]:
        """Writable views of the state before the step."""
        return self._state

    def invoke(self) -> None:
        """Run one time step, in chunks of the allowed sizes."""
        for start, stop, size in chunks(self._rows, self._program.batch_sizes):
            outputs, after = self._run(
                [_padded(array, start, stop, size) for array in self._in],
                [_padded(array, start, stop, size) for array in self._state],
            )
            for whole, part in zip([*self._out, *self._next], [*outputs, *after], strict=True):
                np.copyto(whole[start:stop], part[: stop - start])

    def outputs(self) -> Sequence[Array]:
        """Views of the outputs of the last step."""
        return self._out

    def next_states(self) -> Sequence[Array]:
        """Views of the state after the last step."""
        return self._next


def _padded(array: Array, start: int, stop: int, size: int) -> Array:
    rows = array[start:stop]
    if len(rows) == size:
        return rows
    # A repeated real row: it cannot fail or be slow unless the real one is.
    return np.concatenate([rows, np.repeat(rows[-1:], size - len(rows), axis=0)])
