"""Tensors between the wire and arrays, their elements as data or, for who writes and reads JSON, as numbers.

What is refused here is what no array could be made of; whether an array suits the model is the engine's affair.
Arrays made of data are read-only views of a request's bytes.
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
"""NumPy has a limit of its own (64); no model comes near this one."""

_NAMES: dict[int, str] = {
    number: name.removeprefix("DATA_TYPE_").lower()
    for name, number in tensors_pb2.DataType.items()
    if number != tensors_pb2.DATA_TYPE_UNSPECIFIED
}
_NUMBERS: dict[str, tensors_pb2.DataType.ValueType] = {
    name: tensors_pb2.DataType.Value(f"DATA_TYPE_{name.upper()}") for name in _NAMES.values()
}
#: Elements given as numbers, of all tensors of an argument: each takes a Python object on its way into an array.
MAX_VALUES = 65_536
#: Bytes of elements, as data, of the tensors of an answer that come as numbers.
MAX_REPLY_BYTES = 256 * 1024
#: A double below this is no other integer that was rounded.
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
    """Arrays by name; `argument` is the field's name, for messages.

    Raises:
        InvalidInput: one of them is not a tensor, two have the same name, or they have too many values.
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
    """As `to_arrays`; None if there are none."""
    return to_arrays(tensors, argument) if tensors else None


def to_mask(entries: Sequence[bool]) -> Mask | None:
    """A mask of rows; None if there is none."""
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
        # An axis of 0 makes the product 0, but NumPy wants that of the other axes to be a size as well.
        raise InvalidInput(f"{where}: shape must be one that an array can have; got {list(shape)}") from None


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
    """The `DataType` of a type that NumPy calls `name`."""
    return _NUMBERS[name]


def to_columns(columns: Iterable[InputColumn]) -> dict[str, Array]:
    """Arrays by name of tensors that a front has read, `(rows, ...)` each; they fit their shapes and names."""
    return {
        column.name: np.frombuffer(column.data, _dtype(column.dtype)).reshape(-1, *column.tail)
        for column in columns
    }


def to_bytes(array: Array) -> tuple[tensors_pb2.DataType.ValueType, bytes]:
    """The dtype's number on the wire, and the elements as they stand there."""
    little = array if array.dtype.isnative and np.little_endian else _little_endian(array)
    return _number(array.dtype), little.tobytes()


def add_tensors(target: _Tensors, arrays: Mapping[str, Array], *, as_values: bool = False) -> None:
    """Append arrays to a repeated tensor field; `as_values`: as numbers, where doubles hold them."""
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
    return min(limit, MAX_REPLY_BYTES) if as_values else limit


def require_room_as_values(arrays: Mapping[str, Array]) -> None:
    """See that arrays may come as values.

    Raises:
        MessageTooLarge: they are more than that.
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
        f"{argument}: values must be at most {MAX_VALUES} in all tensors, more go into data; got {count}"
    )


def _from_values(tensor: tensors_pb2.Tensor, dtype: np.dtype[np.generic] | None, where: str) -> Array:
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


def _as_values(array: Array) -> npt.NDArray[np.float64] | None:
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
