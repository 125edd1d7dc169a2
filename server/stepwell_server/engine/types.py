"""Array types, named by content."""

from __future__ import annotations

import functools
from collections.abc import Mapping

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[np.generic]
#: Tensors by name. The name "" means the model's only input or state tensor.
Tensors = Mapping[str, Array]
#: Indexes of sessions in a change.
Members = npt.NDArray[np.intp]
Mask = npt.NDArray[np.bool_]
U64 = npt.NDArray[np.uint64]


@functools.cache
def is_float(dtype: np.dtype[np.generic]) -> bool:
    """Whether a dtype is a float type, bfloat16 included."""
    return dtype.kind == "f" or dtype.name == "bfloat16"
