"""Inputs and states that break a rule are refused with a message that names it; the others are cast."""

from __future__ import annotations

import dataclasses
import re
from typing import Any

import numpy as np
import pytest

from stepwell_server.engine.intake.validation import check_inputs, check_state, finite_rows, require_finite
from stepwell_server.engine.sessions.ids import require_session_id
from stepwell_server.errors import InvalidInput
from stepwell_server.program import TensorSpec
from support.fake_executor import PLAIN, RICH

INT8 = dataclasses.replace(PLAIN, inputs=(TensorSpec("n", (), "int8", temporal=True),))
FLAG = dataclasses.replace(PLAIN, inputs=(TensorSpec("flag", (), "bool", temporal=True),))


def f32(*shape: int) -> np.ndarray:
    return np.zeros(shape, np.float32)


def rich(rows: int = 2, t: tuple[int, ...] = (), **other: Any) -> dict[str, Any]:
    given = {"x": f32(rows, *t, 2), "token": np.zeros((rows, *t), np.int32), "gain": f32(rows)}
    return {name: array for name, array in (given | other).items() if array is not None}


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"x": f32(3, 2)}, "input 'x' must have shape (2, 2) or (2, T, 2); got (3, 2)"),
        ({"x": f32(2, 3)}, "input 'x' must have shape (2, 2) or (2, T, 2); got (2, 3)"),
        ({"x": f32(2, 5, 3)}, "input 'x' must have shape (2, 2) or (2, T, 2); got (2, 5, 3)"),
        ({"x": f32(2)}, "input 'x' must have shape (2, 2) or (2, T, 2); got (2,)"),
        ({"x": f32(2, 1, 1, 2)}, "input 'x' must have shape (2, 2) or (2, T, 2); got (2, 1, 1, 2)"),
        ({"x": f32()}, "input 'x' must have shape (2, 2) or (2, T, 2); got ()"),
        ({"x": f32(0, 2)}, "input 'x' must have shape (2, 2) or (2, T, 2); got (0, 2)"),
        ({"x": f32(2, 0, 2)}, "input 'x' must have at least one time step; got T = 0"),
        ({"y": f32(2, 2)}, "inputs must name each of ['x'] once; got ['y'] (missing ['x'], not known ['y'])"),
        ({}, "inputs must name each of ['x'] once; got [] (missing ['x'], not known [])"),
        (
            {"x": f32(2, 2), "y": f32(2)},
            "inputs must name each of ['x'] once; got ['x', 'y'] (missing [], not known ['y'])",
        ),
        ({"x": np.zeros((2, 2), complex)}, "input 'x' must have a dtype that fits float32; got complex128"),
        ({"x": np.zeros((2, 2), bool)}, "input 'x' must have a dtype that fits float32; got bool"),
        ({"x": np.zeros((2, 2), "U3")}, "input 'x' must have a dtype that fits float32; got <U3"),
        ({"x": np.zeros((2, 2), object)}, "input 'x' must have a dtype that fits float32; got object"),
    ],
)
def test_what_does_not_fit_is_named(given: dict[str, Any], message: str) -> None:
    with pytest.raises(InvalidInput, match=f"^{re.escape(message)}$"):
        check_inputs(PLAIN, given, 2)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"token": f32(2)}, "input 'token' must have a dtype that fits int32; got float32"),
        (
            {"token": np.array([1, 2**31])},
            "input 'token' must hold values within int32's range, -2147483648 to 2147483647; got 2147483648",
        ),
        (
            {"token": np.array([0, -(2**31) - 1])},
            "input 'token' must hold values within int32's range, -2147483648 to 2147483647; got -2147483649",
        ),
        (
            {"token": np.array([2**64 - 1, 0], np.uint64)},
            f"input 'token' must hold values within int32's range, {-(2**31)} to {2**31 - 1}; got {2**64 - 1}",
        ),
        ({"gain": f32(3)}, "input 'gain' must have shape (2,); got (3,)"),
        ({"gain": f32(2, 4)}, "input 'gain' must have shape (2,); got (2, 4)"),
        ({"token": np.zeros((2, 3, 1), np.int32)}, "input 'token' must have shape (2,) or (2, T)"),
        (
            {"token": np.zeros((2, 3), np.int32)},
            "inputs must have the same number of time steps; got 'x': none",
        ),
        ({"token": None}, "inputs must name each of ['x', 'token', 'gain'] once; got ['gain', 'x'] (missing"),
    ],
)
def test_several_inputs_are_told_apart(given: dict[str, Any], message: str) -> None:
    with pytest.raises(InvalidInput, match=f"^{re.escape(message)}"):
        check_inputs(RICH, rich(**given), 2)


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


def test_a_float64_that_float32_cannot_hold_is_refused_like_infinity() -> None:
    checked = check_inputs(PLAIN, {"": np.array([[1e300, 0.0]])}, 1)
    with pytest.raises(InvalidInput, match=r"within float32's range; got inf at index \[0, 0\]"):
        require_finite("input", checked.arrays, ["x"])


def test_finite_numbers_and_integers_pass() -> None:
    assert finite_rows(check_inputs(RICH, rich(), 2).arrays) is None
    require_finite("input", check_inputs(RICH, rich(), 2).arrays, ["x", "token", "gain"])


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"sum": f32(2, 2)}, "state must name each of ['sum', 'count'] once; got ['sum'] (missing ['count']"),
        (
            {"sum": f32(2, 2), "count": np.zeros(2, np.int32), "h": f32(2)},
            "state must name each of ['sum', 'count'] once; got ['count', 'h', 'sum'] (missing [], not known ['h'])",
        ),
        (
            {"sum": f32(2, 3), "count": np.zeros(2, np.int32)},
            "state 'sum' must have shape (2, 2); got (2, 3)",
        ),
        (
            {"sum": f32(2, 2), "count": np.zeros((2, 1), np.int32)},
            "state 'count' must have shape (2,); got (2, 1)",
        ),
        ({"sum": f32(2, 2), "count": f32(2)}, "state 'count' must have a dtype that fits int32; got float32"),
        (
            {"sum": f32(2, 2), "count": np.array([0, 2**40])},
            "state 'count' must hold values within int32's range",
        ),
        ({"": f32(2, 2)}, "state must name each of ['sum', 'count'] once; got [''] (missing"),
    ],
)
def test_a_state_that_does_not_fit_is_named(given: dict[str, Any], message: str) -> None:
    with pytest.raises(InvalidInput, match=f"^{re.escape(message)}"):
        check_state(RICH, given, 2)


def test_a_state_comes_in_the_models_order_and_type() -> None:
    given = {"count": np.array([1, 2], np.int64), "sum": np.ones((2, 2))}
    total, count = check_state(RICH, given, 2)
    assert (total.dtype.name, count.dtype.name) == ("float32", "int32")
    assert count.tolist() == [1, 2]
    assert check_state(PLAIN, {"": f32(1, 2)}, 1)[0].shape == (1, 2)


@pytest.mark.parametrize("session_id", ["", "x" * 257, "x" * 10_000, "a\nb", "a\0b", " a", "a ", "\u202ea"])
def test_what_cannot_be_a_session_id(session_id: str) -> None:
    with pytest.raises(InvalidInput, match=r"^session_id must be 1 to 256 printable characters") as error:
        require_session_id("session_id", session_id)
    assert len(error.value.message) < 1500


@pytest.mark.parametrize("session_id", ["a", "user 42", "x" * 256, "größe", "東京"])
def test_what_can_be_a_session_id(session_id: str) -> None:
    require_session_id("session_id", session_id)
