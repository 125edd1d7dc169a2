"""Random inputs of a model, made before the run so that making them costs it nothing."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from stepwell import TensorInfo
from stepwell.errors import InvalidInputError

Inputs = Mapping[str, npt.NDArray[Any]]

POOL = 16
"""Different inputs at most, taken in turn."""
POOL_BYTES = 64 << 20
"""Memory for them, unless a single one is larger."""
MAX_BYTES = 1 << 30
"""A single one is no larger than this."""


def pool(specs: Sequence[TensorInfo], rows: int, steps: int, seed: int) -> list[Inputs]:
    """Inputs of one call each.

    Numbers are normal, integers 0 or 1: indexes into a vocabulary of any size.

    Args:
        specs: The model's inputs.
        rows: Rows of a call, over all its sessions.
        steps: Time steps of a call; one goes without a time axis.
        seed: Of the random numbers.

    Raises:
        InvalidInputError: One call's inputs would be larger than a gibibyte.
    """
    size = sum(_count(spec, rows, steps) * _dtype(spec).itemsize for spec in specs)
    if size > MAX_BYTES:
        raise InvalidInputError(
            f"the inputs of a call must be {MAX_BYTES} bytes at most; batch size, group size and steps per "
            f"call make them {size}"
        )
    rng = np.random.default_rng(seed)
    count = max(1, min(POOL, POOL_BYTES // max(size, 1)))
    return [{spec.name: _draw(rng, spec, rows, steps) for spec in specs} for _ in range(count)]


def _shape(spec: TensorInfo, rows: int, steps: int) -> tuple[int, ...]:
    return (rows, *((steps,) if spec.temporal and steps > 1 else ()), *spec.shape)


def _count(spec: TensorInfo, rows: int, steps: int) -> int:
    return math.prod(_shape(spec, rows, steps))


def _dtype(spec: TensorInfo) -> np.dtype[Any]:
    # numpy has no bfloat16; the server takes any float.
    return np.dtype("float32" if spec.dtype == "bfloat16" else spec.dtype)


def _draw(rng: np.random.Generator, spec: TensorInfo, rows: int, steps: int) -> npt.NDArray[Any]:
    shape, dtype = _shape(spec, rows, steps), _dtype(spec)
    drawn = rng.standard_normal(shape, np.float32) if dtype.kind == "f" else rng.integers(0, 2, shape)
    return np.asarray(drawn, dtype)
