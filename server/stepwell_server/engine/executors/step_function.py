"""Wraps an executor as a plain function of one time step, for trials of programs."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from stepwell_server.engine.executors.base import Executor
from stepwell_server.engine.types import Array

Step = Callable[[Sequence[Array], Sequence[Array]], tuple[Sequence[Array], Sequence[Array]]]
"""``(inputs, states) -> (outputs, next states)``, each ``(rows, *spec.shape)``."""


def step_of_executor(executor: Executor) -> Step:
    """Return an executor as a plain function; its results are copies."""

    def step(inputs: Sequence[Array], states: Sequence[Array]) -> tuple[list[Array], list[Array]]:
        executor.bind(len((*inputs, *states)[0]))
        fill(executor, inputs, states)
        executor.invoke()
        return [np.array(x) for x in executor.outputs()], [np.array(x) for x in executor.next_states()]

    return step


def fill(executor: Executor, inputs: Sequence[Array], states: Sequence[Array]) -> None:
    """Fill an executor's buffers. A separate function, so that no view outlives it."""
    for view, value in zip([*executor.inputs(), *executor.states()], [*inputs, *states], strict=True):
        np.copyto(view, value)


def initial_rows(initial: Sequence[Array], rows: int) -> list[Array]:
    """Return the initial state for ``rows`` rows."""
    return [np.repeat(value[np.newaxis], rows, axis=0) for value in initial]
