"""Shows whole states of a program with rings, which itself takes and returns parts of them (`StateSpec.gap`)."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from stepwell_server.engine.executors.base import Executor
from stepwell_server.engine.types import Array
from stepwell_server.program import Program, StateSpec


class WindowExecutor(Executor):
    """An `Executor` of whole states over one of their parts. For one thread at a time.

    A ring is a window that slides along a buffer: to carry it to the next time step copies nothing. Only when it reaches
    the end of the buffer, it is copied to the start.
    """

    def __init__(self, parts: Executor, program: Program) -> None:
        self.parts = parts
        """Runs the program on parts of states."""
        self._windows = [_Window(spec) if spec.gap else None for spec in program.state]
        self._rows = 0

    def bind(self, rows: int) -> None:
        """Make the buffers exactly ``rows`` long."""
        self.parts.bind(rows)
        self._rows = rows
        for window in self._windows:
            if window is not None:
                window.bind(rows)

    def inputs(self) -> Sequence[Array]:
        """Writable views of the inputs of one time step."""
        return self.parts.inputs()

    def states(self) -> Sequence[Array]:
        """Writable views of the state before the step."""
        return [
            part if window is None else window.now()
            for window, part in zip(self._windows, self.parts.states(), strict=True)
        ]

    def carry(self) -> None:
        """Make the state after the last step that before the next one."""
        states, after = self.parts.states(), self.parts.next_states()
        for window, state, new in zip(self._windows, states, after, strict=True):
            if window is None:
                np.copyto(state, new)
            else:
                window.slide()

    def invoke(self) -> None:
        """Run one time step."""
        self._give()
        self.parts.invoke()
        self._take()

    # separate functions: no view of the executor's buffers may exist while it runs
    def _give(self) -> None:
        for window, part in zip(self._windows, self.parts.states(), strict=True):
            if window is not None:
                np.copyto(part, window.read())

    def _take(self) -> None:
        for window, row in zip(self._windows, self.parts.next_states(), strict=True):
            if window is not None:
                window.add(row)

    def outputs(self) -> Sequence[Array]:
        """Views of the outputs of the last step."""
        return self.parts.outputs()

    def next_states(self) -> Sequence[Array]:
        """Views of the state after the last step."""
        return [
            part if window is None else window.after()
            for window, part in zip(self._windows, self.parts.next_states(), strict=True)
        ]


class _Window:
    """One ring of some rows."""

    def __init__(self, spec: StateSpec) -> None:
        self._spec, self._length = spec, spec.shape[0]
        self._end = 2 * self._length
        """The last place in the buffer, for the element that the next step adds."""
        self._buffer = np.empty((0, self._end + 1, *spec.shape[1:]), spec.dtype)
        self._rows = 0
        self._at = 0
        """Where the window begins in the buffer."""

    def bind(self, rows: int) -> None:
        self._rows, self._at = rows, 0

    def now(self) -> Array:
        return self._part(self._at, self._at + self._length)

    def after(self) -> Array:
        return self._part(self._at + 1, self._at + 1 + self._length)

    def read(self) -> Array:
        return self._part(self._at, self._at + self._length, self._spec.gap)

    def add(self, row: Array) -> None:
        self._part(self._at + self._length, self._at + self._length + 1)[:, 0] = row

    def slide(self) -> None:
        self._at += 1
        if self._at + self._length > self._end:
            kept = self.now()
            self._at = 0
            np.copyto(self.now(), kept)

    def _part(self, start: int, stop: int, gap: int = 1) -> Array:
        if len(self._buffer) < self._rows:
            # only a pass over whole states needs it
            self._buffer = np.empty((self._rows, *self._buffer.shape[1:]), self._buffer.dtype)
        return self._buffer[: self._rows, start:stop:gap]
