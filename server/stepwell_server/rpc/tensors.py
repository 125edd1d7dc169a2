"""Converts tensors between messages and arrays. Their elements are bytes or, for JSON, numbers.

This module refuses tensors that are not arrays; the engine checks whether an array fits the model. Arrays from bytes are
read-only views of the request.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from stepwell.v1 import tensors_pb2
from stepwell_server.engine.types import Array, Mask, is_float
from stepwell_server.errors import InvalidInput, MessageTooLarge
from stepwell_server.program import dtype_of
from stepwell_server.rpc.fronts.base import InputColumn

MAX_RANK = 32
"""Maximum number of axes. NumPy's own limit is 64; no model comes near this one."""

_NAMES: dict[int, str] = {
    number: name.removeprefix("DATA_TYPE_").lower()
    for name, number in tensors_pb2.DataType.items()
    if number != tensors_pb2.DATA_TYPE_UNSPECIFIED
}
_NUMBERS: dict[str, tensors_pb2.DataType.ValueType] = {
    name: tensors_pb2.DataType.Value(f"DATA_TYPE_{name.upper()}") for name in _NAMES.values()
}
#: Limit of elements given as numbers in one field. Each becomes a Python object on its way into an array.
MAX_VALUES = 65_536
#: Limit of bytes of elements in a reply whose tensors are sent as numbers.
MAX_REPLY_BYTES = 256 * 1024
#: Below this, each integer has its own double.
_EXACT = 2.0**53


class _Tensors(Protocol):
    def add(
        self,
        *,
        name: str,
        dtype: tensors_pb2.DataType.ValueType,
        shape: Sequence[int],
        data: bytes = b"",
        values: Iterable[float] = (),
    ) -> object: ...


def to_arrays(tensors: Sequence[tensors_pb2.Tensor], argument: str) -> dict[str, Array]:
    """Return arrays by name. `argument` is the field's name, for messages.

    Raises:
        InvalidInput: a tensor is invalid, two have the same name, or they have too many values.
    """
    arrays: dict[str, Array] = {}
    count = 0
    for tensor in tensors:
        name = tensor.name
        count += len(tensor.values)
        if count > MAX_VALUES:
            raise _too_many_values(tensors, argument)
        if name in arrays:
            raise InvalidInput(f"{argument}: each tensor must be given once; got {name!r} twice")
        arrays[name] = _to_array(tensor, f"{argument}[{name!r}]" if name else argument)
    return arrays


def to_optional_arrays(tensors: Sequence[tensors_pb2.Tensor], argument: str) -> dict[str, Array] | None:
    """Return arrays by name; None if there are none. See `to_arrays`."""
    return to_arrays(tensors, argument) if tensors else None


def to_mask(entries: Sequence[bool]) -> Mask | None:
    """Return a mask of rows; None if the field is empty."""
    return np.array(entries, np.bool_) if entries else None


def _to_array(tensor: tensors_pb2.Tensor, where: str) -> Array:
    dtype = _dtype(tensor.dtype)
    if tensor.values and (dtype is not None or tensor.dtype == tensors_pb2.DATA_TYPE_UNSPECIFIED):
        return _of_values(tensor, dtype, where)
    if dtype is None:
        raise InvalidInput(f"{where}: dtype must be one of stepwell.v1.DataType; got {tensor.dtype}")
    shape = tuple(tensor.shape)
    data = tensor.data
    # The rank comes first: the product of a million axes would keep the server busy for hours.
    if len(shape) > MAX_RANK or min(shape, default=0) < 0 or math.prod(shape) * dtype.itemsize != len(data):
        raise InvalidInput(_shape_problem(where, shape, dtype, len(data)))
    if not data:
        return _to_empty(shape, dtype, where)
    if dtype.kind == "b":
        return _to_bools(data, where).reshape(shape)
    return np.frombuffer(data, dtype).reshape(shape)


def _of_values(tensor: tensors_pb2.Tensor, dtype: np.dtype[np.generic] | None, where: str) -> Array:
    array = _from_values(tensor, dtype, where)
    shape = tuple(tensor.shape) or (1, array.size)
    if len(shape) > MAX_RANK or min(shape) < 0:
        raise InvalidInput(_shape_problem(where, shape, array.dtype, 0))
    if math.prod(shape) != array.size:
        raise InvalidInput(f"{where}: shape {list(shape)} needs {math.prod(shape)} values; got {array.size}")
    return array.reshape(shape)


def _to_empty(shape: tuple[int, ...], dtype: np.dtype[np.generic], where: str) -> Array:
    try:
        return np.empty(shape, dtype)
    except ValueError:
        # An axis of 0 makes the product 0, but NumPy also limits the product of the other axes.
        raise InvalidInput(f"{where}: shape must be possible for an array; got {list(shape)}") from None


def _shape_problem(where: str, shape: tuple[int, ...], dtype: np.dtype[np.generic], size: int) -> str:
    if len(shape) > MAX_RANK:
        return f"{where}: shape must have at most {MAX_RANK} axes; got {len(shape)}"
    if any(axis < 0 for axis in shape):
        return f"{where}: every axis of shape must be 0 or more; got {list(shape)}"
    need = math.prod(shape) * dtype.itemsize
    return f"{where}: shape {list(shape)} of {dtype.name} needs {need} bytes of data; got {size}"


def _to_bools(data: bytes, where: str) -> Array:
    octets = np.frombuffer(data, np.uint8)
    if octets.max() > 1:
        raise InvalidInput(f"{where}: each byte of a bool tensor must be 0 or 1; got {octets.max()}")
    return octets.view(np.bool_)


@functools.cache
def _dtype(number: int) -> np.dtype[np.generic] | None:
    name = _NAMES.get(number)
    return dtype_of(name).newbyteorder("<") if name else None


def number_of(name: str) -> tensors_pb2.DataType.ValueType:
    """Return the `DataType` of a NumPy type name."""
    return _NUMBERS[name]


def to_columns(columns: Iterable[InputColumn]) -> dict[str, Array]:
    """Return arrays by name, `(rows, ...)` each, of columns that a front has read and checked."""
    return {
        column.name: np.frombuffer(column.data, _dtype(column.dtype)).reshape(-1, *column.tail)
        for column in columns
    }


def to_bytes(array: Array) -> tuple[tensors_pb2.DataType.ValueType, bytes]:
    """Return the dtype's number in the protocol, and the elements as bytes."""
    little = array if array.dtype.isnative and np.little_endian else _little_endian(array)
    return _number(array.dtype), little.tobytes()


def add_tensors(target: _Tensors, arrays: Mapping[str, Array], *, as_values: bool = False) -> None:
    """Append arrays to a repeated tensor field. `as_values`: as numbers, if doubles can represent them."""
    for name, array in arrays.items():
        numbers = _as_values(array) if as_values else None
        if numbers is not None:
            target.add(name=name, dtype=_number(array.dtype), shape=array.shape, values=numbers.tolist())
            continue
        number, data = to_bytes(array)
        target.add(name=name, dtype=number, shape=array.shape, data=data)


@functools.cache
def _number(dtype: np.dtype[np.generic]) -> tensors_pb2.DataType.ValueType:
    return _NUMBERS[dtype.name]


def _little_endian(array: Array) -> Array:
    return array.astype(array.dtype.newbyteorder("<"))


def wants_values(wanted: int, inputs: Sequence[tensors_pb2.Tensor] = ()) -> bool:
    """Whether the tensors of a reply are sent as values, by the request's TensorFormat and its own tensors.

    Raises:
        InvalidInput: the format is unknown.
    """
    if wanted == tensors_pb2.TENSOR_FORMAT_UNSPECIFIED:
        return any(tensor.values for tensor in inputs)
    if wanted not in (tensors_pb2.TENSOR_FORMAT_DATA, tensors_pb2.TENSOR_FORMAT_VALUES):
        raise InvalidInput(f"tensor_format must be one of stepwell.v1.TensorFormat; got {wanted}")
    return wanted == tensors_pb2.TENSOR_FORMAT_VALUES


def reply_limit(limit: int, *, as_values: bool) -> int:
    """Return the limit of bytes of a reply, counted with its tensors as data. ``limit`` applies if they are sent so."""
    return min(limit, MAX_REPLY_BYTES) if as_values else limit


def require_room_as_values(arrays: Mapping[str, Array]) -> None:
    """Check that arrays can be sent as values.

    Raises:
        MessageTooLarge: they are too large.
    """
    size = sum(array.nbytes for array in arrays.values())
    if size > MAX_REPLY_BYTES:
        raise MessageTooLarge(
            f"tensor_format must be DATA for more than {MAX_REPLY_BYTES} bytes of elements; got {size}",
            limit_bytes=str(MAX_REPLY_BYTES),
            reply_bytes=str(size),
        )


def _too_many_values(tensors: Sequence[tensors_pb2.Tensor], argument: str) -> InvalidInput:
    count = sum(len(tensor.values) for tensor in tensors)
    return InvalidInput(
        f"{argument}: all tensors together must have at most {MAX_VALUES} values, use data for more; got {count}"
    )


def _from_values(tensor: tensors_pb2.Tensor, dtype: np.dtype[np.generic] | None, where: str) -> Array:
    """Return the values of a tensor as a flat array.

    Args:
        tensor: A tensor with values.
        dtype: The wanted type; None: int64 if all values are exact integers, else float64.
        where: The tensor's name, for messages.

    Raises:
        InvalidInput: the values do not fit the dtype, or the tensor has data too.
    """
    if tensor.data:
        raise InvalidInput(
            f"{where}: data must be empty if values are given; got {len(tensor.data)} bytes of data"
        )
    numbers = np.array(tensor.values, np.float64)
    if dtype is None:
        return numbers.astype(np.int64) if _are_integers(numbers) else numbers
    if is_float(dtype):
        with np.errstate(over="ignore"):  # becomes infinity, which the engine refuses
            return numbers.astype(dtype)
    low, high = (0, 1) if dtype.kind == "b" else _range(dtype)
    # the largest 64-bit integers are not doubles, but the next integer is
    wrong = ~((numbers >= low) & (numbers < float(high) + 1) & (numbers == np.floor(numbers)))
    if wrong.any():
        raise InvalidInput(
            f"{where}: values must be integers from {low} to {high} for {dtype.name}; got {numbers[wrong][0]:g}"
        )
    return numbers.astype(dtype)


def _as_values(array: Array) -> npt.NDArray[np.float64] | None:
    """Return an array's elements as flat doubles; None if doubles cannot represent all of them."""
    numbers = array.astype(np.float64).reshape(-1)
    if array.dtype.itemsize == 8 and array.dtype.kind in "iu" and (np.abs(numbers) >= _EXACT).any():
        return None
    return numbers


def _range(dtype: np.dtype[Any]) -> tuple[int, int]:
    limits = np.iinfo(dtype)
    return int(limits.min), int(limits.max)


def _are_integers(numbers: npt.NDArray[np.float64]) -> bool:
    # integers have no minus zero
    return bool(
        (
            (np.abs(numbers) < _EXACT)
            & (numbers == np.floor(numbers))
            & ((numbers != 0) | ~np.signbit(numbers))
        ).all()
    )
