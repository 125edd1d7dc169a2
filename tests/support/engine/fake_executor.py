"""An executor in plain numpy, of sums and products only: a row has the same bits at every batch size.

Its buffers hold garbage wherever the real ones may: after `bind`, after a run that failed, and under every
view that is kept for too long.
"""

from __future__ import annotations

import dataclasses
import math
import threading
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from stepwell_server.engine.executors.base import Buffers, ExecutionError, Executor
from stepwell_server.engine.executors.windows import WindowExecutor
from stepwell_server.program import Program, StateSpec, TensorSpec

Array = npt.NDArray[Any]

#: A first feature that makes the program refuse the batch, as an index out of range does.
BAD = 1e6
#: A first feature that makes the executor break.
BROKEN = 2e6
WAIT_S = 100.0

PLAIN = Program(
    fingerprint="f-plain",
    inputs=(TensorSpec("x", (2,), "float32", temporal=True),),
    outputs=(TensorSpec("y", (2,), "float32", temporal=True),),
    state=(StateSpec("sum", (2,), "float32"),),
    initial=(np.array([0.5, -0.25], np.float32),),
    executor="litert",
    executor_reason="a fake",
    batch_sizes=(),
    files={},
)
RICH = dataclasses.replace(
    PLAIN,
    fingerprint="f-rich",
    inputs=(
        *PLAIN.inputs,
        TensorSpec("token", (), "int32", temporal=True),
        TensorSpec("gain", (), "float32", temporal=False),
    ),
    outputs=(*PLAIN.outputs, TensorSpec("head", (3,), "float32", temporal=False)),
    state=(*PLAIN.state, StateSpec("count", (), "int32")),
    initial=(*PLAIN.initial, np.array(7, np.int32)),
)

#: Lengths and gaps of windows of past values: the oldest and some others are read, only the oldest, or all.
_WINDOWS = ((7, 3), (5, 5), (2, 1))


def with_windows(*, are_rings: bool) -> Program:
    """A program whose outputs depend on past values, too, which it keeps as rings or as whole windows."""
    specs = [
        StateSpec(f"window{i}", (length, *shape), "float32", length, gap if are_rings else 0)
        for i, ((length, gap), shape) in enumerate(zip(_WINDOWS, [(2,), (), (2, 2)], strict=True))
    ]
    initial = [np.linspace(-1, 1, math.prod(spec.shape), dtype=np.float32) for spec in specs]
    windows = [value.reshape(spec.shape) for value, spec in zip(initial, specs, strict=True)]
    return dataclasses.replace(
        PLAIN,
        fingerprint="f-windows",
        state=(specs[0], *PLAIN.state, *specs[1:]),
        initial=(windows[0], *PLAIN.initial, *windows[1:]),
    )


RINGS = with_windows(are_rings=True)


def _advance_windows(program: Program, x: Array, states: Sequence[Array]) -> tuple[list[Array], list[Array]]:
    places = (0, 2, 3)
    are_rings = program.has_rings
    read = [
        states[i] if are_rings else states[i][:, ::gap] for i, (_, gap) in zip(places, _WINDOWS, strict=True)
    ]
    total = states[1] * np.float32(0.5) + x
    y = total - read[0][:, 0] + read[0][:, -1] + read[1] * np.float32(0.25) + read[2][:, 1, 0]
    after: list[Array] = [y - x, total, total[:, 0] * x[:, 1], np.stack([x, y], 1)]
    if not are_rings:
        for i in places:
            after[i] = np.concatenate([states[i][:, 1:], after[i][:, None]], 1)
    return [y], after


def advance(inputs: Sequence[Array], states: Sequence[Array]) -> tuple[list[Array], list[Array]]:
    """One time step of either program: `(outputs, states)`."""
    x, before = inputs[0], states[0]
    if len(inputs) == 1:
        after = before * np.float32(0.5) + x
        return [after * np.float32(2) - before], [after]
    token, gain, count = inputs[1], inputs[2], states[1]
    after = before * np.float32(0.5) + x * gain[:, None] + token.astype(np.float32)[:, None]
    head = np.stack([after[:, 0], gain, token.astype(np.float32)], axis=1)
    return [after + count.astype(np.float32)[:, None], head], [after, count + np.int32(1)]


class Hooks:
    """Hooks for a test while programs run. The executors of an engine share them."""

    def __init__(self) -> None:
        self.rows: list[int] = []
        """Rows of each run so far."""
        self.inside = threading.Event()
        """A run has begun since this was last cleared."""
        self._open = threading.Event()
        self._open.set()

    def close_gate(self) -> None:
        """Runs on threads that begin from now on wait until the gate opens. Those on the event loop do not."""
        self.inside.clear()
        self._open.clear()

    def open_gate(self) -> None:
        self._open.set()

    def run(self, rows: int) -> None:
        self.rows.append(rows)
        self.inside.set()
        if threading.current_thread() is not threading.main_thread() and not self._open.wait(WAIT_S):
            raise AssertionError("the test did not open the gate")


def load_fake(program: Program, hooks: Hooks) -> Executor:
    """Return an executor of whole states, as `load_executor` does."""
    executor = FakeExecutor(program, hooks)
    return WindowExecutor(executor, program) if program.has_rings else executor


class FakeExecutor:
    """See `executors.base.Executor`. As LiteRT's, it keeps its arrays for batches of at most their size."""

    def __init__(self, program: Program, hooks: Hooks) -> None:
        self._program = program
        self._hooks = hooks
        self._rows = 0
        self._in: list[Array] = []
        self._state: list[Array] = []
        self._out: list[Array] = []
        self._next: list[Array] = []
        self._whole = Buffers([], [], [], [])
        self._size = 0
        """Rows of `_whole`."""
        self._is_kept = False

    def bind(self, rows: int) -> None:
        assert rows >= 1
        if rows == self._rows:
            return
        self._is_kept = rows <= self._size
        if not self._is_kept:
            program = self._program
            specs = (program.inputs, program.states_taken, program.outputs, program.states_returned)
            self._whole, self._size = Buffers(*(_garbage(rows, each) for each in specs)), rows
        self._rows, whole = rows, self._whole
        arrays = (whole.inputs, whole.states, whole.outputs, whole.next_states)
        self._in, self._state, self._out, self._next = ([one[:rows] for one in each] for each in arrays)

    def buffers(self) -> Buffers | None:
        return self._whole if self._is_kept else None

    def inputs(self) -> Sequence[Array]:
        return self._in

    def states(self) -> Sequence[Array]:
        return self._state

    def carry(self) -> None:
        for state, after in zip(self._state, self._next, strict=True):
            np.copyto(state, after)

    def invoke(self) -> None:
        self._hooks.run(self._rows)
        try:
            if np.any(self._in[0][:, 0] == BAD):
                raise ExecutionError("x is out of range\nnode 7 failed")
            if np.any(self._in[0][:, 0] == BROKEN):
                raise RuntimeError("a secret detail")
            if len(self._state) > 2:
                outputs, states = _advance_windows(self._program, self._in[0], self._state)
            else:
                outputs, states = advance(self._in, self._state)
        except Exception:
            self._rows = self._size = 0  # as the real one: it must be bound again
            self._in = self._state = self._out = self._next = []
            raise
        for kept, value in zip([*self._out, *self._next], [*outputs, *states], strict=True):
            np.copyto(kept, value)

    def outputs(self) -> Sequence[Array]:
        return self._out

    def next_states(self) -> Sequence[Array]:
        return self._next


def _garbage(rows: int, specs: Sequence[TensorSpec | StateSpec]) -> list[Array]:
    return [np.full((rows, *spec.shape), 111_111_111, spec.dtype) for spec in specs]
