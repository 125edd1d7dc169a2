"""Arrays survive the wire; what is no array of numbers never reaches it."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from stepwell import errors
from stepwell._state.tensors import dtype_name, pack, to_messages, unpack
from stepwell.v1 import tensors_pb2

DTYPES = [
    "float16",
    "float32",
    "float64",
    "int8",
    "int16",
    "int32",
    "int64",
    "uint8",
    "uint16",
    "uint32",
    "uint64",
    "bool",
]


def travel(array: Any) -> Any:
    return unpack(to_messages([pack("x", "input 'x'", array)])[0])


@given(st.sampled_from(DTYPES).flatmap(lambda dtype: hnp.arrays(dtype, hnp.array_shapes(max_dims=4))))
def test_round_trip_of_every_dtype(array: Any) -> None:
    back = travel(array)
    assert (back.dtype, back.shape, back.tobytes()) == (array.dtype, array.shape, array.tobytes())


@pytest.mark.parametrize("dtype", DTYPES)
def test_big_endian_and_strided_arrays(dtype: str) -> None:
    array = np.arange(24).reshape(4, 6).astype(dtype)
    assert np.array_equal(travel(array.astype(array.dtype.newbyteorder(">"))), array)
    assert np.array_equal(travel(array[::-2, ::3]), array[::-2, ::3])
    assert np.array_equal(travel(array.T), array.T)


@pytest.mark.parametrize("dtype", ["longlong", "long", "ulonglong", "intc", "uintc"])
def test_c_types_travel_by_their_layout(dtype: str) -> None:
    array = np.ones((2, 2), dtype)
    assert np.array_equal(travel(array), array)


def test_lists_become_float64() -> None:
    assert travel([[1.0, 2.0]]).dtype == np.float64


def test_what_comes_back_can_be_written_to() -> None:
    back = travel(np.zeros((1, 2)))
    back += 1
    assert back.tolist() == [[1.0, 1.0]]


@pytest.mark.parametrize(
    "value",
    [
        np.array([["a"]]),
        np.array([[object()]]),
        np.ones((1, 1), np.complex64),
        np.ones((1, 1), np.longdouble),
        np.zeros((1, 1), "datetime64[s]"),
        [[1.0], [1.0, 2.0]],
        [[None]],
        {"x": 1},
    ],
    ids=["str", "object", "complex", "longdouble", "datetime", "ragged", "none", "dict"],
)
def test_what_is_no_array_of_numbers_is_refused(value: Any) -> None:
    with pytest.raises(errors.InvalidInputError, match="input 'x'"):
        pack("x", "input 'x'", value)


@pytest.mark.parametrize("value", [3.0, np.float32(1), np.zeros((0, 3)), np.zeros((1, 0, 3)), []])
def test_scalars_and_empty_arrays_are_refused(value: Any) -> None:
    with pytest.raises(errors.InvalidInputError, match=r"scalar|empty"):
        pack("x", "input 'x'", value)


def test_bfloat16_comes_as_float32() -> None:
    values = np.array([[1.0, -2.5, 3.140625]], np.float32)
    halves = (values.view(np.uint32) >> np.uint32(16)).astype("<u2")
    tensor = tensors_pb2.Tensor(
        dtype=tensors_pb2.DATA_TYPE_BFLOAT16, shape=values.shape, data=halves.tobytes()
    )
    assert unpack(tensor).dtype == np.float32
    assert np.array_equal(unpack(tensor), values)


def test_bfloat16_of_ml_dtypes_is_sent() -> None:
    ml_dtypes = pytest.importorskip("ml_dtypes")
    assert travel(np.ones((1, 2), ml_dtypes.bfloat16)).tolist() == [[1.0, 1.0]]


@pytest.mark.parametrize("dtype", [tensors_pb2.DATA_TYPE_FLOAT32, tensors_pb2.DATA_TYPE_BFLOAT16, 0, 77])
def test_a_reply_that_contradicts_itself_is_an_error(dtype: int) -> None:
    tensor = tensors_pb2.Tensor(name="y", shape=[2, 2], data=b"123")
    tensor.dtype = dtype  # type: ignore[assignment]
    with pytest.raises(errors.InternalError, match="'y'"):
        unpack(tensor)


def test_names_of_types() -> None:
    assert dtype_name(tensors_pb2.DATA_TYPE_BFLOAT16) == "bfloat16"
    assert "77" in dtype_name(77)
