"""Inputs and states are put in order and cast. What breaks a rule is in `test_refusals`."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import pytest

from stepwell_server.engine.intake.validation import check_inputs, check_state, finite_rows, require_finite
from stepwell_server.errors import InvalidInput
from stepwell_server.program import TensorSpec
from support.engine.fake_executor import PLAIN, RICH

INT8 = dataclasses.replace(PLAIN, inputs=(TensorSpec("n", (), "int8", temporal=True),))
FLAG = dataclasses.replace(PLAIN, inputs=(TensorSpec("flag", (), "bool", temporal=True),))


def f32(*shape: int) -> np.ndarray:
    return np.zeros(shape, np.float32)


def rich(rows: int = 2, t: tuple[int, ...] = (), **other: Any) -> dict[str, Any]:
    given = {"x": f32(rows, *t, 2), "token": np.zeros((rows, *t), np.int32), "gain": f32(rows)}
    return {name: array for name, array in (given | other).items() if array is not None}


def test_one_time_step_may_leave_out_its_axis_and_the_reply_has_what_was_given() -> None:
    without = check_inputs(PLAIN, {"": f32(2, 2)}, 2)
    assert (without.steps, without.with_time, without.arrays[0].shape) == (1, False, (2, 2))
    single = check_inputs(PLAIN, {"x": f32(2, 1, 2)}, 2)
    assert (single.steps, single.with_time, single.arrays[0].shape) == (1, True, (2, 2))
    three = check_inputs(RICH, rich(t=(3,)), 2)
    assert (three.steps, three.with_time) == (3, True)
    assert [array.shape for array in three.arrays] == [(2, 3, 2), (2, 3), (2,)]


@pytest.mark.parametrize("dtype", ["float64", "float16", "int64", "uint8", "int32", ">f4"])
def test_numbers_are_cast_to_the_models_type(dtype: str) -> None:
    (array,) = check_inputs(PLAIN, {"x": np.array([[1, 2]], dtype)}, 1).arrays
    assert array.dtype == np.dtype("float32")
    assert array.tolist() == [[1, 2]]


def test_integers_are_cast_within_their_range() -> None:
    (array,) = check_inputs(INT8, {"": np.array([[-128, 127]], np.int64)}, 1).arrays
    assert (array.dtype.name, array.tolist()) == ("int8", [[-128, 127]])
    with pytest.raises(InvalidInput, match="within int8's range, -128 to 127; got 128"):
        check_inputs(INT8, {"": np.array([[0, 128]], np.int64)}, 1)


def test_only_a_bool_is_a_bool() -> None:
    assert check_inputs(FLAG, {"": np.array([True])}, 1).arrays[0].dtype == bool
    with pytest.raises(InvalidInput, match="input 'flag' must have a dtype that fits bool; got int64"):
        check_inputs(FLAG, {"": np.array([1])}, 1)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_a_number_that_is_not_finite_is_found_with_its_place(value: float) -> None:
    array = f32(4, 3, 2)
    array[2, 1, 0] = value
    checked = check_inputs(PLAIN, {"": array}, 4)
    finite = finite_rows(checked.arrays)
    assert finite is not None
    assert finite.tolist() == [True, True, False, True]
    with pytest.raises(InvalidInput) as error:
        require_finite("input", checked.arrays, ["x"])
    assert error.value.message == (
        f"input 'x' must hold finite numbers within float32's range; got {value} at index [2, 1, 0]"
    )


@pytest.mark.parametrize("shape", [(1, 2), (1, 1, 2), (1, 3, 2)])
def test_a_float64_that_float32_cannot_hold_is_named_as_it_came(shape: tuple[int, ...]) -> None:
    given = np.zeros(shape)
    given[..., 1] = -1e39
    for inputs in ({"": given}, {"x": given}):
        checked = check_inputs(PLAIN, inputs, 1)
        where = [0, 1] if shape[1] < 3 else [0, 0, 1]
        with pytest.raises(InvalidInput) as error:
            require_finite("input", checked.arrays, ["x"], inputs)
        assert error.value.message == f"input 'x' must fit float32; got -1e+39 at index {where}"


def test_finite_numbers_and_integers_pass() -> None:
    assert finite_rows(check_inputs(RICH, rich(), 2).arrays) is None
    require_finite("input", check_inputs(RICH, rich(), 2).arrays, ["x", "token", "gain"])


def test_a_state_comes_in_the_models_order_and_type() -> None:
    given = {"count": np.array([1, 2], np.int64), "sum": np.ones((2, 2))}
    total, count = check_state(RICH, given, 2)
    assert (total.dtype.name, count.dtype.name) == ("float32", "int32")
    assert count.tolist() == [1, 2]
    assert check_state(PLAIN, {"": f32(1, 2)}, 1)[0].shape == (1, 2)
