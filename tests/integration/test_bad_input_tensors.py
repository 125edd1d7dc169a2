"""Tensors that are none, or do not suit the model: each is refused by every call that takes it, and changes nothing."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from stepwell.v1 import models_pb2, sessions_pb2
from stepwell.v1.tensors_pb2 import Tensor
from support import wire
from support.served import Served
from support.wire import Tensors, tensor

ROWS = 2
ONES = np.ones((ROWS, 3), np.float32)
INDEX = np.ones((ROWS,), np.int32)
NAN, INF = float("nan"), float("inf")
PREDICT = "predict"


@dataclasses.dataclass(frozen=True)
class Bad:
    """Inputs for a session of `ROWS` rows, and what the refusal says."""

    inputs: Callable[[], Tensors]
    words: tuple[str, ...]
    model: str = "seq"
    in_predict: tuple[str, ...] | None = None
    """What Predict says, if it is something else; it takes any batch size, so () means that it is not asked."""


def bad(*inputs: object, says: str, model: str = "seq", in_predict: str | None = None, **fields: Any) -> Bad:
    """One or several inputs; an array goes under the only input's name, with `fields` replaced."""

    def make() -> Tensors:
        return [i if isinstance(i, Tensor) else tensor(i, **fields) for i in inputs]

    predict = None if in_predict is None else tuple(filter(None, [in_predict]))
    return Bad(make, (says,), model, predict)


def with_one(value: float, dtype: str = "float32", shape: tuple[int, ...] = (ROWS, 3)) -> object:
    array = np.ones(shape, dtype)
    array.flat[4] = value
    return array


def multi(**replaced: object) -> list[Tensor]:
    good: dict[str, object] = {
        "profile": np.ones((ROWS, 5), np.float32),
        "series": np.ones((ROWS, 2, 3), np.float32),
        "token": np.ones((ROWS, 2), np.int32),
    }
    return [tensor(array, name) for name, array in (good | replaced).items() if array is not None]


SHAPE = "input 'x' must have shape (2, 3) or (2, T, 3); got "
NAMES = "inputs must name each of ['x'] once; got "
BYTES = "needs 24 bytes of data; got "
FINITE = "input 'x' must hold finite numbers within float32's range; got "
THREE = "inputs must name each of ['profile', 'series', 'token'] once; got "

BAD: dict[str, Bad] = {
    # Shapes.
    "one row too many": bad(np.ones((3, 3), np.float32), says=SHAPE + "(3, 3)", in_predict=""),
    "one row too few": bad(np.ones((1, 3), np.float32), says=SHAPE + "(1, 3)", in_predict=""),
    "no rows": bad(np.ones((0, 3), np.float32), says=SHAPE + "(0, 3)", in_predict="at least one row; got 0"),
    "one feature too many": bad(np.ones((ROWS, 4), np.float32), says=SHAPE + "(2, 4)"),
    "one feature too few": bad(np.ones((ROWS, 5, 2), np.float32), says=SHAPE + "(2, 5, 2)"),
    "no features": bad(np.ones((ROWS, 0), np.float32), says=SHAPE + "(2, 0)"),
    "rank 0": bad(np.float32(1), says=SHAPE + "()", in_predict="at least one row; got 0"),
    "rank 1": bad(np.ones(ROWS, np.float32), says=SHAPE + "(2,)"),
    "rank 4": bad(np.ones((ROWS, 1, 1, 3), np.float32), says=SHAPE + "(2, 1, 1, 3)"),
    "rank 33": bad(np.ones(6, np.float32), shape=[1] * 32 + [6], says="at most 32 axes; got 33"),
    "rank 400,000": bad(ONES, shape=[2**62] * 400_000, says="at most 32 axes; got 400000"),
    "T = 0": bad(np.ones((ROWS, 0, 3), np.float32), says="must have at least one time step; got T = 0"),
    # Types.
    "booleans": bad(ONES > 0, says="input 'x' must have a dtype that fits float32; got bool"),
    "no dtype": bad(ONES, dtype=0, says="dtype must be one of stepwell.v1.DataType; got 0"),
    "unknown dtype": bad(ONES, dtype=99, says="dtype must be one of stepwell.v1.DataType; got 99"),
    "a text's bytes": bad(ONES, data=b"two rows of three", says=BYTES + "17"),
    "a boolean of 2": bad(
        ONES > 0, data=b"\1\0\1\2\0\1", says="each byte of a bool tensor must be 0 or 1; got 2"
    ),
    # Names.
    "unknown name": bad(ONES, name="y", says=NAMES + "['y'] (missing ['x'], not known ['y'])"),
    "extra name": bad(
        tensor(ONES, "x"), tensor(ONES, "z"), says=NAMES + "['x', 'z'] (missing [], not known ['z'])"
    ),
    "extra without a name": bad(tensor(ONES, "x"), tensor(ONES), says="(missing [], not known [''])"),
    "a name twice": bad(
        tensor(ONES, "x"), tensor(ONES, "x"), says="each tensor must be given once; got 'x' twice"
    ),
    "no name twice": bad(tensor(ONES), tensor(ONES), says="each tensor must be given once; got '' twice"),
    "no inputs": bad(says=NAMES + "[] (missing ['x'], not known [])", in_predict="at least one row; got 0"),
    # Bytes and shape.
    "bytes too few": bad(ONES, data=bytes(23), says=BYTES + "23"),
    "bytes too many": bad(ONES, data=bytes(25), says=BYTES + "25"),
    "no bytes": bad(ONES, data=b"", says=BYTES + "0"),
    "bytes of another dtype": bad(ONES.astype(np.float64), dtype=1, says=BYTES + "48"),
    "overflow": bad(ONES, shape=[2**40, 2**40], says=f"needs {2**82} bytes of data; got 24"),
    "overflow to zero": bad(ONES, shape=[2**62, 4], data=b"", says=f"needs {2**66} bytes of data; got 0"),
    "overflow beside a zero": bad(
        ONES, shape=[2**40, 2**40, 0], data=b"", says="[1099511627776, 1099511627776, 0]"
    ),
    "largest axis of all": bad(ONES, shape=[2**63 - 1, 0], data=b"", says="9223372036854775807, 0"),
    "negative axes": bad(ONES, shape=[-2, -3], says="every axis of shape must be 0 or more; got [-2, -3]"),
    "one negative axis": bad(
        ONES, shape=[-1, 3], data=b"", says="every axis of shape must be 0 or more; got [-1, 3]"
    ),
    # Values.
    "NaN": bad(with_one(NAN), says=FINITE + "nan at index [1, 1]"),
    "infinity": bad(with_one(INF), says=FINITE + "inf at index [1, 1]"),
    "minus infinity": bad(with_one(-INF, "float16"), says=FINITE + "-inf at index [1, 1]"),
    "NaN of float64": bad(with_one(NAN, "float64"), says=FINITE + "nan at index [1, 1]"),
    "NaN of bfloat16": bad(ONES, dtype=4, data=b"\xc0\x7f" * 6, says=FINITE + "nan at index [0, 0]"),
    "too large for float32": bad(with_one(1e300, "float64"), says=FINITE + "inf at index [1, 1]"),
    "NaN in a time step": bad(with_one(NAN, shape=(ROWS, 2, 3)), says=FINITE + "nan at index [0, 1, 1]"),
    # Integers.
    "floats for tokens": bad(
        np.ones(ROWS, np.float32), model="tokens", says="must have a dtype that fits int32; got float32"
    ),
    "booleans for tokens": bad(np.ones(ROWS) > 0, model="tokens", says="a dtype that fits int32; got bool"),
    "a token out of int32": bad(
        np.array([1, 2**31]),
        model="tokens",
        says="within int32's range, -2147483648 to 2147483647; got 2147483648",
    ),
    "a token out of the vocabulary": bad(
        np.array([1, 9]), model="tokens", says="inputs must be ones that the model"
    ),
    # As in Keras itself, -9 to -1 count from the end of nine.
    "a negative token": bad(np.array([-10, 1]), model="tokens", says="inputs must be ones that the model"),
    "a late token out of the vocabulary": bad(
        np.array([[1] * 9 + [9], [1] * 10]), model="tokens", says="inputs must be ones that the model"
    ),
    # Several inputs.
    "one of three missing": bad(*multi(token=None), model="multi", says=THREE + "['profile', 'series']"),
    "three and one more": bad(*multi(tok=INDEX), model="multi", says="(missing [], not known ['tok'])"),
    "one of three without a name": bad(
        *multi(token=None), tensor(INDEX), model="multi", says="(missing ['token'], not known [''])"
    ),
    "different T": bad(
        *multi(token=np.ones((ROWS, 3), np.int32)),
        model="multi",
        says="inputs must have the same number of time steps; got 'series': 2, 'token': 3",
    ),
    "T for one only": bad(
        *multi(token=INDEX),
        model="multi",
        says="the same number of time steps; got 'series': 2, 'token': none",
    ),
    "T where there is none": bad(
        *multi(profile=np.ones((ROWS, 2, 5), np.float32)),
        model="multi",
        says="input 'profile' must have shape (2, 5); got (2, 2, 5)",
    ),
    "rows that differ": bad(
        *multi(profile=np.ones((3, 5), np.float32)),
        model="multi",
        says="input 'profile' must have shape (2, 5); got (3, 5)",
        in_predict="input 'series' must have shape (3, 3) or (3, T, 3); got (2, 2, 3)",
    ),
    "NaN where there is no T": bad(
        *multi(profile=with_one(NAN, shape=(ROWS, 5))),
        model="multi",
        says="input 'profile' must hold finite numbers",
    ),
}


@pytest.mark.parametrize("name", BAD)
def test_inputs_of_a_step(served: Served, name: str) -> None:
    case = BAD[name]
    with served.session(case.model, ROWS) as session_id, served.nothing_changes(session_id):
        request = sessions_pb2.StepRequest(session_id=session_id, inputs=case.inputs(), request_id=1)
        served.wire.refused("Step", request).expect("INVALID_ARGUMENT", "INVALID_INPUT", *case.words)


@pytest.mark.parametrize("name", BAD)
def test_inputs_of_a_frame(served: Served, name: str) -> None:
    """A frame that is refused harms no other frame of its stream."""
    case = BAD[name]
    with served.session(case.model, ROWS) as session_id, served.session(case.model) as other:
        inputs = served.draw(case.model, 1)
        known = wire.data(served.predicted(other, inputs))
        with served.nothing_changes(session_id):
            answers = served.wire.exchange(
                wire.step_frame(1, [session_id], case.inputs()),
                wire.step_frame(2, [other], wire.tensors(inputs)),
            )
            (refused,) = wire.of_members([a for a in answers if a.frame_id == 1], 1).values()
            refused.expect("INVALID_ARGUMENT", "INVALID_INPUT", *case.words)
            (good,) = [a for a in answers if a.frame_id == 2]
            assert wire.data(good.outputs) == known


@pytest.mark.parametrize("name", [name for name, case in BAD.items() if case.in_predict != ()])
def test_inputs_of_a_prediction(served: Served, name: str) -> None:
    case = BAD[name]
    words = case.words if case.in_predict is None else case.in_predict
    with served.nothing_changes():
        request = models_pb2.PredictRequest(model=case.model, inputs=case.inputs())
        served.wire.refused("Predict", request).expect("INVALID_ARGUMENT", "INVALID_INPUT", *words)


H, C = np.ones((ROWS, 8), np.float32), np.zeros((ROWS, 8), np.float32)


def state_of(h: object = H, c: object = C, **fields: object) -> list[Tensor]:
    return [tensor(h, "lstm/h", **fields), tensor(c, "lstm/c")]


STATE_NAMES = "state must name each of ['lstm/h', 'lstm/c'] once; got "
STATE_SHAPE = "state 'lstm/h' must have shape (2, 8); got "
BAD_STATES: dict[str, tuple[Tensors, str]] = {
    "one missing": (state_of()[:1], STATE_NAMES + "['lstm/h'] (missing ['lstm/c'], not known [])"),
    "one too many": ([*state_of(), tensor(H, "gru/h")], "(missing [], not known ['gru/h'])"),
    "another name": ([tensor(H, "h"), tensor(C, "c")], STATE_NAMES + "['c', 'h']"),
    "without names": ([tensor(H)], STATE_NAMES + "['']"),
    "one twice": (
        [*state_of(), tensor(H, "lstm/h")],
        "state: each tensor must be given once; got 'lstm/h' twice",
    ),
    "more rows": (state_of(np.ones((3, 8), np.float32)), STATE_SHAPE + "(3, 8)"),
    "fewer rows": (state_of(H[:1]), STATE_SHAPE + "(1, 8)"),
    "no rows": (state_of(H[:0]), STATE_SHAPE + "(0, 8)"),
    "more units": (state_of(np.ones((ROWS, 9), np.float32)), STATE_SHAPE + "(2, 9)"),
    "a time axis": (state_of(H[:, None]), STATE_SHAPE + "(2, 1, 8)"),
    "a scalar": (state_of(np.float32(0)), STATE_SHAPE + "()"),
    "booleans": (state_of(H > 0), "state 'lstm/h' must have a dtype that fits float32; got bool"),
    "no dtype": (state_of(dtype=0), "dtype must be one of stepwell.v1.DataType; got 0"),
    "bytes too few": (state_of(data=bytes(60)), "needs 64 bytes of data; got 60"),
    "bytes too many": (state_of(data=bytes(68)), "needs 64 bytes of data; got 68"),
    "overflow": (state_of(shape=[2**40, 2**40]), f"needs {2**82} bytes of data; got 64"),
    "overflow beside a zero": (
        state_of(shape=[2**40, 2**40, 0], data=b""),
        "[1099511627776, 1099511627776, 0]",
    ),
    "negative axes": (state_of(shape=[-2, -8]), "every axis of shape must be 0 or more; got [-2, -8]"),
    "NaN": (state_of(with_one(NAN, shape=(ROWS, 8))), "state 'lstm/h' must hold finite numbers"),
    "infinity": (state_of(c=with_one(INF, shape=(ROWS, 8))), "state 'lstm/c' must hold finite numbers"),
    "too large for float32": (
        state_of(with_one(1e300, "float64", (ROWS, 8))),
        "state 'lstm/h' must hold finite numbers within float32's range; got inf at index [0, 4]",
    ),
}


@pytest.mark.parametrize("name", BAD_STATES)
def test_states_of_a_reset(served: Served, name: str) -> None:
    state, words = BAD_STATES[name]
    with served.session("seq", ROWS) as session_id, served.nothing_changes(session_id):
        request = sessions_pb2.ResetStatesRequest(session_id=session_id, state=state)
        served.wire.refused("ResetStates", request).expect("INVALID_ARGUMENT", "INVALID_INPUT", words)


@pytest.mark.parametrize("name", BAD_STATES)
def test_states_of_a_reset_frame(served: Served, name: str) -> None:
    state, words = BAD_STATES[name]
    with served.session("seq", ROWS) as session_id, served.nothing_changes(session_id):
        (refused,) = wire.of_members(
            served.wire.exchange(wire.reset_frame(1, [session_id], state=state)), 1
        ).values()
        refused.expect("INVALID_ARGUMENT", "INVALID_INPUT", words)


@pytest.mark.parametrize("name", BAD_STATES)
def test_states_of_a_new_session(served: Served, name: str) -> None:
    state, words = BAD_STATES[name]
    with served.nothing_changes():
        request = sessions_pb2.OpenSessionRequest(
            model="seq", session_id="never", batch_size=ROWS, state=state, request_id=3
        )
        served.wire.refused("OpenSession", request).expect("INVALID_ARGUMENT", "INVALID_INPUT", words)
        gone = served.wire.refused("GetSession", sessions_pb2.GetSessionRequest(session_id="never"))
        gone.expect("NOT_FOUND", "SESSION_NOT_FOUND", "'never'")


@pytest.mark.parametrize("name", BAD_STATES)
def test_states_of_a_prediction(served: Served, name: str) -> None:
    state, words = BAD_STATES[name]
    with served.nothing_changes():
        request = models_pb2.PredictRequest(model="seq", inputs=[tensor(ONES)], state=state)
        served.wire.refused("Predict", request).expect("INVALID_ARGUMENT", "INVALID_INPUT", words)


BAD_ROWS: dict[str, tuple[list[int], Tensors, str]] = {
    "out of range": ([0, 3], (), "rows must be within 0 to 2; got 3"),
    "far out of range": ([2**32 - 1], (), "rows must be within 0 to 2; got 4294967295"),
    "repeated": ([1, 2, 1], (), "rows must name each row once; got [1, 2, 1]"),
    "with the state of all rows": (
        [0, 2],
        state_of(np.ones((3, 8), np.float32), np.ones((3, 8), np.float32)),
        "state 'lstm/h' must have shape (2, 8); got (3, 8)",
    ),
    "with the state of one row": ([0, 2], state_of(H[:1], C[:1]), "must have shape (2, 8); got (1, 8)"),
    "with half a state": ([0, 2], state_of()[:1], "(missing ['lstm/c'], not known [])"),
    "with NaN": (
        [0, 2],
        state_of(c=with_one(NAN, shape=(ROWS, 8))),
        "state 'lstm/c' must hold finite numbers",
    ),
}


@pytest.mark.parametrize("name", BAD_ROWS)
def test_rows_of_a_reset(served: Served, name: str) -> None:
    rows, state, words = BAD_ROWS[name]
    with served.session("seq", 3) as session_id, served.nothing_changes(session_id):
        request = sessions_pb2.ResetStatesRequest(session_id=session_id, rows=rows, state=state)
        served.wire.refused("ResetStates", request).expect("INVALID_ARGUMENT", "INVALID_INPUT", words)
