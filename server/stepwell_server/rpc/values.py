"""Tensors whose elements are said as numbers, for who writes and reads JSON: `Tensor.values`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from stepwell.v1 import tensors_pb2
from stepwell_server.engine.types import Array, is_float
from stepwell_server.errors import InvalidInput, MessageTooLarge

#: Elements of all tensors of an argument: each takes a Python object on its way into an array.
MOST_VALUES = 65_536
#: Bytes of elements, as data, of the tensors of an answer that come as values.
MOST_REPLY_BYTES = 256 * 1024
#: A double below this is no other integer that was rounded.
_EXACT = 2.0**53


def are_wanted(wanted: int, inputs: Sequence[tensors_pb2.Tensor] = ()) -> bool:
    """Whether an answer's tensors come as values, by a request's TensorFormat and its own tensors.

    Raises:
        InvalidInput: there is no such format.
    """
    if wanted == tensors_pb2.TENSOR_FORMAT_UNSPECIFIED:
        return any(tensor.values for tensor in inputs)
    if wanted not in (tensors_pb2.TENSOR_FORMAT_DATA, tensors_pb2.TENSOR_FORMAT_VALUES):
        raise InvalidInput(f"tensor_format must be one of stepwell.v1.TensorFormat; got {wanted}")
    return wanted == tensors_pb2.TENSOR_FORMAT_VALUES


def reply_limit(limit: int, *, as_values: bool) -> int:
    """How many bytes a reply may have, counted with its tensors as data, if it may have ``limit`` with them so."""
    return min(limit, MOST_REPLY_BYTES) if as_values else limit


def require_room(arrays: Mapping[str, Array]) -> None:
    """See that arrays may come as values.

    Raises:
        MessageTooLarge: they are more than that.
    """
    size = sum(array.nbytes for array in arrays.values())
    if size > MOST_REPLY_BYTES:
        raise MessageTooLarge(
            f"tensor_format must be DATA for more than {MOST_REPLY_BYTES} bytes of elements; got {size}",
            limit_bytes=str(MOST_REPLY_BYTES),
            reply_bytes=str(size),
        )


def require_count(tensors: Sequence[tensors_pb2.Tensor], argument: str) -> None:
    """See that tensors do not say more elements as numbers than may be.

    Raises:
        InvalidInput: they do.
    """
    count = sum(len(tensor.values) for tensor in tensors)
    if count > MOST_VALUES:
        raise InvalidInput(
            f"{argument}: values must be at most {MOST_VALUES} in all tensors, more go into data; got {count}"
        )


def to_array(tensor: tensors_pb2.Tensor, dtype: np.dtype[np.generic] | None, where: str) -> Array:
    """The array that a tensor's values are, flat.

    Args:
        tensor: one that has values.
        dtype: what they shall be; None: int64 if they all are integers that a double holds, else float64.
        where: the tensor, for messages.

    Raises:
        InvalidInput: they do not fit the dtype, or there is data as well.
    """
    if tensor.data:
        raise InvalidInput(
            f"{where}: data must be empty where values are given; got {len(tensor.data)} bytes of it"
        )
    numbers = np.array(tensor.values, np.float64)
    if dtype is None:
        return numbers.astype(np.int64) if _are_integers(numbers) else numbers
    if is_float(dtype):
        with np.errstate(over="ignore"):  # becomes infinity, which is refused as such
            return numbers.astype(dtype)
    low, high = (0, 1) if dtype.kind == "b" else _range(dtype)
    # the largest 64-bit integers are no doubles, but one more than they is
    wrong = ~((numbers >= low) & (numbers < float(high) + 1) & (numbers == np.floor(numbers)))
    if wrong.any():
        raise InvalidInput(
            f"{where}: values must be integers of {low} to {high} for {dtype.name}; got {numbers[wrong][0]:g}"
        )
    return numbers.astype(dtype)


def of_array(array: Array) -> npt.NDArray[np.float64] | None:
    """An array's elements as doubles, flat; None where doubles do not hold them all."""
    numbers = array.astype(np.float64).reshape(-1)
    if array.dtype.itemsize == 8 and array.dtype.kind in "iu" and (np.abs(numbers) >= _EXACT).any():
        return None
    return numbers


def _range(dtype: np.dtype[Any]) -> tuple[int, int]:
    limits = np.iinfo(dtype)
    return int(limits.min), int(limits.max)


def _are_integers(numbers: npt.NDArray[np.float64]) -> bool:
    # minus zero is a number that integers have not
    return bool(
        (
            (np.abs(numbers) < _EXACT)
            & (numbers == np.floor(numbers))
            & ((numbers != 0) | ~np.signbit(numbers))
        ).all()
    )
