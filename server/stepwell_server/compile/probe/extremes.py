"""Compares one step of an artefact with TensorFlow at inputs of every magnitude.

Time steps are numbered as high, if the model numbers them. A converted operation may overflow, or lose small values, where TensorFlow's kernel does not: LiteRT's softplus is
infinite from 89 on. Sample sequences do not reach such values.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from stepwell_server.compile.errors import quoted
from stepwell_server.compile.graph.tensorflow_setup import tf
from stepwell_server.compile.probe.probe import TracedModel
from stepwell_server.compile.probe.sequences import step_of_function, tolerance
from stepwell_server.compile.probe.whole_call import perturbed_inputs
from stepwell_server.engine.executors.step_function import Step, initial_rows

Array = npt.NDArray[np.generic]
#: Magnitudes of the inputs of each row, twice, for both signs.
_SIZES = np.repeat(10.0 ** np.arange(-6, 10), 2)


def worst_at_extremes(traced: TracedModel, step: Step) -> str:
    """Return where ``step`` differs from the traced function by more than rounding, as a clause; empty: nowhere."""
    rng = np.random.default_rng(29)
    usual = step_of_function(traced.plan, traced.function)
    states = initial_rows(traced.plan.initial, len(_SIZES))
    what = "inputs"
    if traced.memory is not None and traced.memory.numbers_steps:
        states, what = traced.memory.late(states, _SIZES), "inputs, or numbers of time steps,"
    inputs = _inputs(traced, rng, are_wide=True)
    try:
        expected = usual(inputs, states)
    except tf.errors.OpError:  # An integer was out of range.
        inputs = _inputs(traced, rng, are_wide=False)
        expected = usual(inputs, states)
    model, held = traced.plan.interface.model, traced.sampler.whole
    noisy = usual(perturbed_inputs(model, inputs, held, (), seed=29), states)
    found = step(inputs, states)
    names = [spec.name for spec in traced.plan.outputs] + [spec.name for spec in traced.plan.state]
    allowed = tolerance(model)
    for name, one, two, moved in zip(names, _flat(expected), _flat(found), _flat(noisy), strict=True):
        row = _first_wrong(one, two, moved, allowed)
        if row is not None:
            return f"{quoted(name)} differs from TensorFlow's for {what} of the size {_SIZES[row]:g}"
    return ""


def _inputs(traced: TracedModel, rng: np.random.Generator, *, are_wide: bool) -> list[Any]:
    """Return inputs of one time step, one magnitude per row; integers are wide, or small enough to be accepted always."""
    drawn = traced.sampler.draw(rng, traced.plan.temporal, 1, len(_SIZES))
    arrays: list[Any] = []
    for i, (value, timed) in enumerate(zip(drawn, traced.plan.temporal, strict=True)):
        array: Any = value[:, 0] if timed else value
        sizes = _SIZES.reshape(-1, *[1] * (array.ndim - 1))
        if i in traced.sampler.whole or array.dtype == np.bool_:
            arrays.append(array)
        elif np.issubdtype(array.dtype, np.floating):
            signs = np.where(np.arange(len(_SIZES)) % 2, -1.0, 1.0).reshape(sizes.shape)
            largest = float(np.finfo(array.dtype).max) / 4
            scaled = np.abs(array.astype(np.float64)) * sizes * signs
            arrays.append(np.clip(scaled, -largest, largest).astype(array.dtype))
        elif are_wide:
            largest = min(int(np.iinfo(array.dtype).max), 2**24)
            whole = np.clip(np.rint(sizes * rng.uniform(1, 9, array.shape)), 0, largest)
            arrays.append(whole.astype(array.dtype))
        else:
            arrays.append(array)
    return arrays


def _flat(results: tuple[Sequence[Array], Sequence[Array]]) -> list[npt.NDArray[np.float64]]:
    return [value.reshape(len(value), -1).astype(np.float64) for value in (*results[0], *results[1])]


def _first_wrong(
    one: npt.NDArray[np.float64],
    two: npt.NDArray[np.float64],
    moved: npt.NDArray[np.float64],
    allowed: float,
) -> int | None:
    """Return the first row where two results differ by more than the effect of rounding."""
    with np.errstate(invalid="ignore", over="ignore"):
        effect = np.nan_to_num(np.max(np.abs(one - moved), axis=1, initial=0), nan=np.inf)
        size = np.maximum(np.max(np.abs(one), axis=1, initial=0), 0.1)
        apart = np.where((one == two) | (np.isnan(one) & np.isnan(two)), 0.0, np.abs(one - two))
        apart = np.max(np.nan_to_num(apart, nan=np.inf), axis=1, initial=0)
    meant = np.all(np.isfinite(one), axis=1) & np.isfinite(effect)
    wrong = np.flatnonzero(meant & (apart > allowed * size + effect))
    return int(wrong[0]) if len(wrong) else None
