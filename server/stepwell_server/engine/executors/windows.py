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
        self._rings = [(place, _Window(spec)) for place, spec in enumerate(program.state) if spec.gap]
        self._others = [place for place, spec in enumerate(program.state) if not spec.gap]
        """The places of states that are not rings."""

    def bind(self, rows: int) -> None:
        """Make the buffers exactly ``rows`` long."""
        self.parts.bind(rows)
        for _, window in self._rings:
            window.bind(rows)

    def inputs(self) -> Sequence[Array]:
        """Writable views of the inputs of one time step."""
        return self.parts.inputs()

    def states(self) -> Sequence[Array]:
        """Writable views of the state before the step."""
        states = list(self.parts.states())
        for place, window in self._rings:
            states[place] = window.buffer[:, window.at : window.at + window.length]
        return states

    def carry(self) -> None:
        """Make the state after the last step that before the next one."""
        if self._others:
            states, after = self.parts.states(), self.parts.next_states()
            for place in self._others:
                np.copyto(states[place], after[place])
        for _, window in self._rings:
            window.at += 1
            if window.at > window.length:
                window.begin_again()

    def invoke(self) -> None:
        """Run one time step."""
        self._give()
        self.parts.invoke()
        self._take()

    # separate functions: no view of the executor's buffers may exist while it runs
    def _give(self) -> None:
        states = self.parts.states()
        for place, window in self._rings:
            states[place][...] = window.buffer[:, window.at : window.at + window.length : window.gap]

    def _take(self) -> None:
        after = self.parts.next_states()
        for place, window in self._rings:
            window.buffer[:, window.at + window.length] = after[place]

    def outputs(self) -> Sequence[Array]:
        """Views of the outputs of the last step."""
        return self.parts.outputs()

    def next_states(self) -> Sequence[Array]:
        """Views of the state after the last step."""
        after = list(self.parts.next_states())
        for place, window in self._rings:
            after[place] = window.buffer[:, window.at + 1 : window.at + 1 + window.length]
        return after


class _Window:
    """One ring of some rows."""

    def __init__(self, spec: StateSpec) -> None:
        self.length, self.gap = spec.shape[0], spec.gap
        # twice the window, and a place for the element that the last step adds
        self._whole = np.empty((0, 2 * self.length + 1, *spec.shape[1:]), spec.dtype)
        self.buffer = self._whole
        self.at = 0
        """Where the window begins in the buffer."""

    def bind(self, rows: int) -> None:
        self.at = 0
        if rows > len(self._whole):
            self._whole = np.empty((rows, *self._whole.shape[1:]), self._whole.dtype)
        if rows != len(self.buffer):
            self.buffer = self._whole[:rows]

    def begin_again(self) -> None:
        self.buffer[:, : self.length] = self.buffer[:, self.at : self.at + self.length]
        self.at = 0
