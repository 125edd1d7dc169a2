"""Draws inputs for trials of a step function: ordinary rows and extreme ones, which are each other's neighbours."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from stepwell_server.program import Array, TensorSpec, dtype_of

#: Scales of the rows of numbers. Each row has one of them.
_SCALES = (1.0, 1.0, 1.0, 1.0, 1e-3, 30.0, 1e4)
#: Whole numbers are small: they may be indices of a table.
_LARGEST_INTEGERS = (3, 1, 0)


def draws(specs: Sequence[TensorSpec], rows: int) -> list[tuple[Array, ...]]:
    """Return rows of one time step for each input, several times, from which to take the first that the model accepts.

    Whole numbers become smaller, and the last ones have no extreme rows.
    """
    choices = [(_SCALES, largest) for largest in _LARGEST_INTEGERS] + [((1.0,), 0)]
    if not any(dtype_of(spec.dtype).kind in "iu" for spec in specs):
        choices = [choices[0], choices[-1]]
    return [_draw(specs, rows, scales, largest) for scales, largest in choices]


def _draw(specs: Sequence[TensorSpec], rows: int, scales: Sequence[float], largest: int) -> tuple[Array, ...]:
    rng = np.random.default_rng(17)
    return tuple(_drawn(rng, spec, rows, scales, largest) for spec in specs)


def _drawn(
    rng: np.random.Generator, spec: TensorSpec, rows: int, possible: Sequence[float], largest: int
) -> Array:
    dtype = dtype_of(spec.dtype)
    shape = (rows, *spec.shape)
    if dtype.kind == "b":
        return rng.integers(0, 2, shape).astype(dtype)
    if dtype.kind in "iu":
        return rng.integers(0, largest + 1, shape).astype(dtype)
    scales = rng.choice(possible, rows)
    if dtype.itemsize < 4:
        scales = np.minimum(scales, 100.0)
    found: Array = rng.standard_normal(shape) * scales.reshape(rows, *([1] * len(spec.shape)))
    # Half of the rows are positive: a logarithm of the others is not a number, which hides other bits.
    found[::2] = np.abs(found[::2])
    return found.astype(dtype, copy=False)
