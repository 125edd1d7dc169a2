"""Converts arrays to the wire format and back. No other module knows how a message stores a tensor."""

from __future__ import annotations

import functools
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple, TypeAlias

import numpy as np
import numpy.typing as npt

from stepwell._base.wire import bytes_tag, varint
from stepwell.errors import InternalError, InvalidInputError
from stepwell.v1 import tensors_pb2

Array: TypeAlias = npt.NDArray[Any]
"""An array of any dtype. `Any`, as numpy's users write it, lets type checkers accept calculations with it."""

_pb = tensors_pb2
_BY_NAME: Mapping[str, int] = {
    "float32": _pb.DATA_TYPE_FLOAT32,
    "float64": _pb.DATA_TYPE_FLOAT64,
    "float16": _pb.DATA_TYPE_FLOAT16,
    "int8": _pb.DATA_TYPE_INT8,
    "int16": _pb.DATA_TYPE_INT16,
    "int32": _pb.DATA_TYPE_INT32,
    "int64": _pb.DATA_TYPE_INT64,
    "uint8": _pb.DATA_TYPE_UINT8,
    "uint16": _pb.DATA_TYPE_UINT16,
    "uint32": _pb.DATA_TYPE_UINT32,
    "uint64": _pb.DATA_TYPE_UINT64,
    "bool": _pb.DATA_TYPE_BOOL,
    "bfloat16": _pb.DATA_TYPE_BFLOAT16,
}
_NAMES: Mapping[int, str] = {number: name for name, number in _BY_NAME.items()}
# By kind and size and not by numpy's names, because C's long and long long are two types with one layout.
_BY_LAYOUT: Mapping[tuple[str, int], int] = {
    (np.dtype(name).kind, np.dtype(name).itemsize): number
    for name, number in _BY_NAME.items()
    if name != "bfloat16"
}
_DTYPES: Mapping[int, np.dtype[np.generic]] = {
    number: np.dtype(name).newbyteorder("<") for name, number in _BY_NAME.items() if name != "bfloat16"
}
# The types whose arrays are sent as they are, without a look at their layout.
_SENT_AS_IS: Mapping[np.dtype[np.generic], int] = {dtype: number for number, dtype in _DTYPES.items()}


_DATA_TAG = bytes_tag(tensors_pb2.Tensor.DATA_FIELD_NUMBER)


class Packed(NamedTuple):
    """A tensor ready to be sent: a value, equal to another one that looks the same on the wire."""

    name: str
    dtype: int
    shape: tuple[int, ...]
    data: bytes


def pack(name: str, what: str, value: npt.ArrayLike) -> Packed:
    """Checks an array and copies it into the wire format.

    Args:
        name: Name of the input or state tensor; empty for the model's only one.
        what: Its name in messages, for example "input 'x'".
        value: Array with at least one axis and one element.

    Raises:
        InvalidInputError: It is not an array of numbers, has no batch axis, or is empty.
    """
    array = value if type(value) is np.ndarray else as_array(what, value)
    dtype = _SENT_AS_IS.get(array.dtype)
    if dtype is None:
        dtype = _dtype_number(what, array)
        array = array.astype(_DTYPES.get(dtype, array.dtype), copy=False)
    shape = array.shape
    if not shape:
        raise InvalidInputError(f"{what} must have a batch axis, shape (batch_size, ...); got a scalar")
    if 0 in shape:
        raise InvalidInputError(f"{what} must not be empty; got shape {shape}")
    return Packed(name, dtype, shape, array.tobytes())


def sent_as_is(dtype: np.dtype[Any]) -> int | None:
    """The number of a type whose arrays are sent as they are; None for other types."""
    return _SENT_AS_IS.get(dtype)


def as_array(what: str, value: npt.ArrayLike) -> Array:
    """Converts a value to an array of any type.

    Raises:
        InvalidInputError: Its parts differ in shape.
    """
    try:
        return np.asarray(value)
    except (TypeError, ValueError) as error:
        raise InvalidInputError(f"{what} must be an array of numbers: {error}") from None


def _dtype_number(what: str, array: Array) -> int:
    number = _BY_LAYOUT.get((array.dtype.kind, array.dtype.itemsize))
    if number is None and array.dtype.name == "bfloat16":
        return _pb.DATA_TYPE_BFLOAT16
    if number is None:
        raise InvalidInputError(
            f"{what} must be an array of floats of 2, 4 or 8 bytes or of integers, or of booleans where the model has them; "
            f"got dtype {array.dtype} and shape {array.shape}"
        )
    return number


def to_messages(tensors: Iterable[Packed]) -> list[tensors_pb2.Tensor]:
    """Packed tensors as messages."""
    return [
        tensors_pb2.Tensor(name=t.name, dtype=_pb.DataType.ValueType(t.dtype), shape=t.shape, data=t.data)
        for t in tensors
    ]


def fields(field: int, tensors: Iterable[Packed]) -> list[bytes]:
    """Packed tensors as bytes: the entries of this field of a message."""
    parts = []
    for name, dtype, shape, data in tensors:
        parts.append(_before_data(field, name, dtype, shape, len(data)))
        parts.append(data)
    return parts


@functools.lru_cache(maxsize=256)
def _before_data(field: int, name: str, dtype: int, shape: tuple[int, ...], size: int) -> bytes:
    """The encoding of a tensor up to its data, which takes most of the time and is the same in each step."""
    message = tensors_pb2.Tensor(name=name, dtype=_pb.DataType.ValueType(dtype), shape=shape)
    head = message.SerializeToString() + _DATA_TAG + varint(size)
    return bytes_tag(field) + varint(len(head) + size) + head


def unpack(tensor: tensors_pb2.Tensor) -> Array:
    """The array in a message: a writable copy. bfloat16 comes as float32, which holds it exactly.

    Raises:
        InternalError: The server sent a tensor that contradicts itself.
    """
    return _array(tensor, bytearray)


def view(tensor: tensors_pb2.Tensor) -> Array:
    """As `unpack`, but not always writable: copy it before you return it to a caller."""
    return _array(tensor, bytes)


def _array(tensor: tensors_pb2.Tensor, buffer: type[bytes | bytearray]) -> Array:
    dtype = _DTYPES.get(tensor.dtype)
    if dtype is None:
        return _unpack_bfloat16(tensor)
    data, shape = tensor.data, tensor.shape[:]  # each access to `data` copies it
    if len(data) != math.prod(shape) * dtype.itemsize:
        raise _broken(tensor)
    return np.ndarray(shape, dtype, buffer(data))


def _unpack_bfloat16(tensor: tensors_pb2.Tensor) -> Array:
    if tensor.dtype != _pb.DATA_TYPE_BFLOAT16 or len(tensor.data) != math.prod(tensor.shape) * 2:
        raise _broken(tensor)
    halves = np.frombuffer(tensor.data, "<u2").astype("<u4")
    return (halves << np.uint32(16)).view("<f4").reshape(tensor.shape)


def _broken(tensor: tensors_pb2.Tensor) -> InternalError:
    return InternalError(
        f"the server sent tensor {tensor.name!r} of dtype {dtype_name(tensor.dtype)}, "
        f"shape {tuple(tensor.shape)} and {len(tensor.data)} bytes, which do not fit"
    )


def unpack_all(tensors: Sequence[tensors_pb2.Tensor]) -> dict[str, Array]:
    """The arrays in messages, by name, in their order."""
    arrays = {}
    for tensor in tensors[:]:  # protobuf's iterators are slower than a list's
        arrays[tensor.name] = unpack(tensor)
    return arrays


def view_all(tensors: Sequence[tensors_pb2.Tensor]) -> dict[str, Array]:
    """As `unpack_all`, with `view`."""
    arrays = {}
    for tensor in tensors[:]:
        arrays[tensor.name] = view(tensor)
    return arrays


def dtype_of(name: str) -> np.dtype[np.generic]:
    """The numpy dtype with which `unpack` returns tensors of a type, by its name."""
    return np.dtype("float32" if name == "bfloat16" else name)


def dtype_name(number: int) -> str:
    """Numpy's name of a wire type, for example "float32"."""
    return _NAMES.get(number, f"unknown type {number}")
