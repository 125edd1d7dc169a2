"""The table of what is refused, part one: tensors, and what else a step or a reset says of one session.

For every rule it has a request that breaks it, and the whole message. Each row is tried with every call that takes
such an argument, on a store that answers in place and on one that must be awaited, and leaves all sessions as they
were. What only the wire can show is in `tests/integration/test_bad_input_*`.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from stepwell.v1 import models_pb2
from stepwell.v1 import sessions_pb2 as pb
from stepwell.v1.tensors_pb2 import Tensor
from support.engine.fake_executor import BAD, PLAIN, RICH
from support.peers import wire
from support.peers.wire import Refusal, Tensors, tensor
from support.rpc.calls import BAD_ARGUMENT, MAX_MESSAGE_BYTES, calls

pytestmark = pytest.mark.stores("memory", "fake_shared")

MODELS = {"plain": PLAIN, "rich": RICH}
ROWS = 2
NAN, INF = float("nan"), float("inf")


def ones(*shape: int, dtype: str = "float32") -> Any:
    return np.ones(shape, dtype)


def with_one(value: float, dtype: str = "float32", shape: tuple[int, ...] = (ROWS, 2)) -> Any:
    """Ones but for the last number of the second row."""
    array = np.ones(shape, dtype)
    array[1].flat[-1] = value
    return array


X = ones(ROWS, 2)
GOOD = [tensor(X)]


# Inputs of a session of two rows; x has two features.
SHAPE = "input 'x' must have shape (2, 2) or (2, T, 2); got "
NAMES = "inputs must name each of ['x'] once; got "
THREE = "inputs must name each of ['x', 'token', 'gain'] once; got "
FITS = " must have a dtype that fits "
FINITE = " must hold finite numbers within float32's range; got "
INT32 = " must hold values within int32's range, -2147483648 to 2147483647; got "
BYTES = "inputs: shape [2, 2] of float32 needs 16 bytes of data; got "
NO_ROWS = "inputs must have at least one row; got 0"
RUN = "inputs must be ones that the model can run; it failed with: x is out of range"
ANY_ROWS = ""  # Predict takes any number of rows


def rich(**replaced: object) -> list[Tensor]:
    good: dict[str, object] = {"x": X, "token": ones(ROWS, dtype="int32"), "gain": ones(ROWS)}
    return [tensor(array, name) for name, array in (good | replaced).items() if array is not None]


def x(array: Any = X, **fields: Any) -> list[Tensor]:
    """The only input, without its name; `fields` contradict it."""
    return [tensor(array, **fields)]


def numbers(*values: float, **fields: Any) -> list[Tensor]:
    """The only input, without its name, its elements said as numbers."""
    return [Tensor(values=values, **fields)]


#: Inputs, and the message; a third is what Predict says instead.
INPUTS: dict[str, tuple[Tensors, str] | tuple[Tensors, str, str]] = {
    # Shapes.
    "one row too many": (x(ones(3, 2)), SHAPE + "(3, 2)", ANY_ROWS),
    "one row too few": (x(ones(1, 2)), SHAPE + "(1, 2)", ANY_ROWS),
    "no rows": (x(ones(0, 2)), SHAPE + "(0, 2)", NO_ROWS),
    "one feature too many": (x(ones(ROWS, 3)), SHAPE + "(2, 3)"),
    "one feature too few": (x(ones(ROWS, 5, 1)), SHAPE + "(2, 5, 1)"),
    "no features": (x(ones(ROWS, 0)), SHAPE + "(2, 0)"),
    "rank 0": (x(np.float32(1)), SHAPE + "()", NO_ROWS),
    "rank 1": (x(ones(ROWS)), SHAPE + "(2,)", SHAPE + "(2,): did you mean x[None]?"),
    "rank 4": (x(ones(ROWS, 1, 1, 2)), SHAPE + "(2, 1, 1, 2)"),
    "rank 33": (x(shape=[1] * 33), "inputs: shape must have at most 32 axes; got 33"),
    "rank 100,000": (x(shape=[2**62] * 100_000), "inputs: shape must have at most 32 axes; got 100000"),
    "T = 0": (x(ones(ROWS, 0, 2)), "input 'x' must have at least one time step; got T = 0"),
    # Types.
    "booleans": (x(X > 0), "input 'x'" + FITS + "float32; got bool"),
    "booleans of another shape": (x(ones(1, 4, 2) > 0), "input 'x'" + FITS + "float32; got bool"),
    "no dtype": (x(dtype=0), "inputs: dtype must be one of stepwell.v1.DataType; got 0"),
    "unknown dtype": (x(dtype=99), "inputs: dtype must be one of stepwell.v1.DataType; got 99"),
    "a boolean of 2": (
        x(X > 0, data=b"\1\0\1\2"),
        "inputs: each byte of a bool tensor must be 0 or 1; got 2",
    ),
    # Names.
    "unknown name": (x(name="y"), NAMES + "['y'] (missing ['x'], unknown ['y'])"),
    "extra name": (
        [tensor(X, "x"), tensor(X, "z")],
        NAMES + "['x', 'z'] (missing [], unknown ['z'])",
    ),
    "extra without a name": ([tensor(X, "x"), tensor(X)], NAMES + "['', 'x'] (missing [], unknown [''])"),
    "a name twice": (
        [tensor(X, "x"), tensor(X, "x")],
        "inputs: each tensor must be given once; got 'x' twice",
    ),
    "no name twice": (x() + x(), "inputs: each tensor must be given once; got '' twice"),
    "no inputs": ([], NAMES + "[] (missing ['x'], unknown [])", NO_ROWS),
    # Bytes and shape.
    "bytes too few": (x(data=bytes(15)), BYTES + "15"),
    "bytes too many": (x(data=bytes(17)), BYTES + "17"),
    "no bytes": (x(data=b""), BYTES + "0"),
    "a text's bytes": (x(data=b"two rows of two"), BYTES + "15"),
    "bytes of another dtype": (x(X.astype(np.float64), dtype=1), BYTES + "32"),
    "bytes of a named one": (
        x(name="x", data=b""),
        "inputs['x']: shape [2, 2] of float32 needs 16 bytes of data; got 0",
    ),
    "bytes of a scalar": (x(shape=[]), "inputs: shape [] of float32 needs 4 bytes of data; got 16"),
    "overflow": (
        x(shape=[2**40, 2**40]),
        f"inputs: shape [{2**40}, {2**40}] of float32 needs {2**82} bytes of data; got 16",
    ),
    "overflow to zero": (
        x(shape=[2**62, 4], data=b""),
        f"inputs: shape [{2**62}, 4] of float32 needs {2**66} bytes of data; got 0",
    ),
    "overflow beside a zero": (
        x(shape=[2**40, 2**40, 0], data=b""),
        f"inputs: shape must be possible for an array; got [{2**40}, {2**40}, 0]",
    ),
    "largest axis of all": (
        x(shape=[2**63 - 1, 0], data=b""),
        f"inputs: shape must be possible for an array; got [{2**63 - 1}, 0]",
    ),
    "negative axes": (x(shape=[-2, -2]), "inputs: every axis of shape must be 0 or more; got [-2, -2]"),
    "one negative axis": (
        x(shape=[-1, 0], data=b""),
        "inputs: every axis of shape must be 0 or more; got [-1, 0]",
    ),
    # Elements said as numbers.
    "values and data": (
        x(values=[1]),
        "inputs: data must be empty if values are given; got 16 bytes of data",
    ),
    "values too few": (numbers(1, 2, 3, shape=[2, 2]), "inputs: shape [2, 2] needs 4 values; got 3"),
    "values of one row": (
        numbers(1, 2, 3, 4),
        SHAPE + "(1, 4)",
        "input 'x' must have shape (1, 2) or (1, T, 2); got (1, 4)",
    ),
    "too many values": (
        numbers(*[0.5] * 65_537),
        "inputs: all tensors together must have at most 65536 values, use data for more; got 65537",
    ),
    "values of rank 33": (numbers(1, shape=[1] * 33), "inputs: shape must have at most 32 axes; got 33"),
    "values of a negative axis": (
        numbers(1, 2, shape=[-1, -2]),
        "inputs: every axis of shape must be 0 or more; got [-1, -2]",
    ),
    "values of an unknown dtype": (
        numbers(1, dtype=99),
        "inputs: dtype must be one of stepwell.v1.DataType; got 99",
    ),
    "half an integer": (
        numbers(1, 2.5, dtype=7),
        "inputs: values must be integers from -2147483648 to 2147483647 for int32; got 2.5",
    ),
    "an integer beyond its type": (
        numbers(2**63, dtype=8),
        f"inputs: values must be integers from {-(2**63)} to {2**63 - 1} for int64; got 9.22337e+18",
    ),
    "NaN as an integer": (
        numbers(NAN, dtype=9),
        "inputs: values must be integers from 0 to 255 for uint8; got nan",
    ),
    "two as a boolean": (
        numbers(0, 2, dtype=13),
        "inputs: values must be integers from 0 to 1 for bool; got 2",
    ),
    "NaN as a number": (numbers(1, 2, 3, NAN, shape=[2, 2]), "input 'x'" + FINITE + "nan at index [1, 1]"),
    "a number too large": (
        numbers(1, 2, 3, 1e300, shape=[2, 2], dtype=1),
        "input 'x'" + FINITE + "inf at index [1, 1]",
    ),
    "numbers for integers": (
        [*rich(token=None), Tensor(name="token", values=[0.5, 1], shape=[2])],
        "input 'token'" + FITS + "int32; got float64",
    ),
    # Values.
    "NaN": (x(with_one(NAN)), "input 'x'" + FINITE + "nan at index [1, 1]"),
    "infinity": (x(with_one(INF)), "input 'x'" + FINITE + "inf at index [1, 1]"),
    "minus infinity of float16": (
        x(with_one(-INF, "float16")),
        "input 'x'" + FINITE + "-inf at index [1, 1]",
    ),
    "NaN of float64": (x(with_one(NAN, "float64")), "input 'x'" + FINITE + "nan at index [1, 1]"),
    "NaN of bfloat16": (x(dtype=4, data=b"\xc0\x7f" * 4), "input 'x'" + FINITE + "nan at index [0, 0]"),
    "too large for float32": (
        x(with_one(1e300, "float64")),
        "input 'x' must fit float32; got 1e+300 at index [1, 1]",
    ),
    "NaN in a time step": (
        x(with_one(NAN, shape=(ROWS, 3, 2))),
        "input 'x'" + FINITE + "nan at index [1, 2, 1]",
    ),
    "what the model cannot run": (x(np.array([[1, 1], [BAD, 1]], np.float32)), RUN),
    "what the model cannot run, late": (x(np.array([[[1, 1]] * 9, [[1, 1]] * 8 + [[BAD, 1]]], "f4")), RUN),
    # Several inputs.
    "floats for integers": (rich(token=ones(ROWS)), "input 'token'" + FITS + "int32; got float32"),
    "booleans for integers": (rich(token=ones(ROWS) > 0), "input 'token'" + FITS + "int32; got bool"),
    "above int32": (rich(token=np.array([1, 2**31])), "input 'token'" + INT32 + f"{2**31}"),
    "below int32": (rich(token=np.array([0, -(2**31) - 1])), "input 'token'" + INT32 + f"{-(2**31) - 1}"),
    "the largest uint64": (
        rich(token=np.array([2**64 - 1, 0], np.uint64)),
        "input 'token'" + INT32 + f"{2**64 - 1}",
    ),
    "one of three missing": (rich(token=None), THREE + "['gain', 'x'] (missing ['token'], unknown [])"),
    "three and one more": (
        rich(tok=ones(ROWS)),
        THREE + "['gain', 'tok', 'token', 'x'] (missing [], unknown ['tok'])",
    ),
    "one of three without a name": (
        [*rich(token=None), tensor(ones(ROWS, dtype="int32"))],
        THREE + "['', 'gain', 'x'] (missing ['token'], unknown [''])",
    ),
    "different T": (
        rich(x=ones(ROWS, 2, 2), token=ones(ROWS, 3, dtype="int32")),
        "inputs must have the same number of time steps; got 'x': 2, 'token': 3",
    ),
    "T for one only": (
        rich(token=ones(ROWS, 3, dtype="int32")),
        "inputs must have the same number of time steps; got 'x': none, 'token': 3",
    ),
    "T where there is none": (rich(gain=ones(ROWS, 4)), "input 'gain' must have shape (2,); got (2, 4)"),
    "rows that differ": (rich(gain=ones(3)), "input 'gain' must have shape (2,); got (3,)"),
    "one axis too many": (
        rich(token=ones(ROWS, 3, 1, dtype="int32")),
        "input 'token' must have shape (2,) or (2, T); got (2, 3, 1)",
    ),
    "NaN where there is no T": (
        rich(gain=np.array([1, NAN], np.float32)),
        "input 'gain'" + FINITE + "nan at index [1]",
    ),
}


@pytest.mark.parametrize("name", INPUTS)
async def test_inputs(name: str) -> None:
    inputs, message, *predict = INPUTS[name]
    model = "rich" if len(inputs) > 2 or (inputs and inputs[-1].name == "gain") else "plain"
    async with calls(MODELS) as at:
        session_id = await at.opened(model)
        before = await at.everything()
        step = pb.StepRequest(session_id=session_id, inputs=inputs, request_id=1)
        assert await at.refused(step) == Refusal(*BAD_ARGUMENT, message)
        for sizes in ([], [ROWS]):
            frame = wire.step_frame(1, [session_id], inputs, batch_sizes=sizes)
            assert await at.only_member(frame) == Refusal(*BAD_ARGUMENT, message)
        said = predict[0] if predict else message
        if said is not ANY_ROWS:
            request = models_pb2.PredictRequest(model=model, inputs=inputs)
            assert await at.refused(request) == Refusal(*BAD_ARGUMENT, said)
        assert await at.everything() == before


# States of a session of two rows.
S, COUNT = ones(ROWS, 2), ones(ROWS, dtype="int32")
STATE_NAMES = "state must name each of ['sum', 'count'] once; got "


def state(total: Any = S, count: Any = COUNT, **fields: Any) -> list[Tensor]:
    return [tensor(total, "sum", **fields), tensor(count, "count")]


STATES: dict[str, tuple[Tensors, str]] = {
    "one missing": (state()[:1], STATE_NAMES + "['sum'] (missing ['count'], unknown [])"),
    "one too many": (
        [*state(), tensor(S, "h")],
        STATE_NAMES + "['count', 'h', 'sum'] (missing [], unknown ['h'])",
    ),
    "another name": (
        [tensor(S, "h"), tensor(COUNT, "c")],
        STATE_NAMES + "['c', 'h'] (missing ['sum', 'count'], unknown ['h', 'c'])",
    ),
    "without names": ([tensor(S)], STATE_NAMES + "[''] (missing ['sum', 'count'], unknown [''])"),
    "one twice": ([*state(), tensor(S, "sum")], "state: each tensor must be given once; got 'sum' twice"),
    "more rows": (state(ones(3, 2)), "state 'sum' must have shape (2, 2); got (3, 2)"),
    "fewer rows": (state(ones(1, 2)), "state 'sum' must have shape (2, 2); got (1, 2)"),
    "no rows": (state(ones(0, 2)), "state 'sum' must have shape (2, 2); got (0, 2)"),
    "more units": (state(ones(ROWS, 3)), "state 'sum' must have shape (2, 2); got (2, 3)"),
    "a time axis": (state(ones(ROWS, 1, 2)), "state 'sum' must have shape (2, 2); got (2, 1, 2)"),
    "a scalar": (state(np.float32(0)), "state 'sum' must have shape (2, 2); got ()"),
    "an axis too many": (state(S, COUNT[:, None]), "state 'count' must have shape (2,); got (2, 1)"),
    "booleans": (state(S > 0), "state 'sum'" + FITS + "float32; got bool"),
    "floats for integers": (state(S, ones(ROWS)), "state 'count'" + FITS + "int32; got float32"),
    "above int32": (state(S, np.array([0, 2**40])), "state 'count'" + INT32 + f"{2**40}"),
    "no dtype": (state(dtype=0), "state['sum']: dtype must be one of stepwell.v1.DataType; got 0"),
    "bytes too few": (
        state(data=bytes(12)),
        "state['sum']: shape [2, 2] of float32 needs 16 bytes of data; got 12",
    ),
    "bytes too many": (
        state(data=bytes(20)),
        "state['sum']: shape [2, 2] of float32 needs 16 bytes of data; got 20",
    ),
    "overflow": (
        state(shape=[2**40, 2**40]),
        f"state['sum']: shape [{2**40}, {2**40}] of float32 needs {2**82} bytes of data; got 16",
    ),
    "overflow beside a zero": (
        state(shape=[2**40, 2**40, 0], data=b""),
        f"state['sum']: shape must be possible for an array; got [{2**40}, {2**40}, 0]",
    ),
    "negative axes": (
        state(shape=[-2, -2]),
        "state['sum']: every axis of shape must be 0 or more; got [-2, -2]",
    ),
    "NaN": (state(with_one(NAN)), "state 'sum'" + FINITE + "nan at index [1, 1]"),
    "infinity": (state(with_one(INF)), "state 'sum'" + FINITE + "inf at index [1, 1]"),
    "too large for float32": (
        state(with_one(1e300, "float64")),
        "state 'sum' must fit float32; got 1e+300 at index [1, 1]",
    ),
}


@pytest.mark.parametrize("name", STATES)
async def test_states(name: str) -> None:
    given, message = STATES[name]
    async with calls(MODELS) as at:
        session_id = await at.opened("rich")
        before = await at.everything()
        for request in (
            pb.ResetStatesRequest(session_id=session_id, state=given),
            pb.OpenSessionRequest(
                model="rich", session_id="never", batch_size=ROWS, state=given, request_id=3
            ),
            models_pb2.PredictRequest(model="rich", inputs=rich(), state=given),
        ):
            assert await at.refused(request) == Refusal(*BAD_ARGUMENT, message)
        frame = wire.reset_frame(1, [session_id], state=given)
        assert await at.only_member(frame) == Refusal(*BAD_ARGUMENT, message)
        assert await at.everything() == before


# What else Step and ResetStates say of one session of three rows, and their frames, where they can say it.
THREE_ROWS = [tensor(ones(3, 2))]
OF_ONE: dict[str, tuple[str, dict[str, Any], str]] = {
    "a row out of range": ("ResetStates", {"rows": [0, 3]}, "rows must be within 0 to 2; got 3"),
    "the largest row": ("ResetStates", {"rows": [2**32 - 1]}, "rows must be within 0 to 2; got 4294967295"),
    "a row twice": ("ResetStates", {"rows": [1, 2, 1]}, "rows must name each row once; got [1, 2, 1]"),
    "rows with the state of all": (
        "ResetStates",
        {"rows": [0, 2], "state": THREE_ROWS},
        "state 'sum' must have shape (2, 2); got (3, 2)",
    ),
    "rows with the state of one": (
        "ResetStates",
        {"rows": [0, 2], "state": [tensor(ones(1, 2))]},
        "state 'sum' must have shape (2, 2); got (1, 2)",
    ),
    "rows with another state": (
        "ResetStates",
        {"rows": [0, 2], "state": [tensor(X, "h")]},
        "state must name each of ['sum'] once; got ['h'] (missing ['sum'], unknown ['h'])",
    ),
    "rows with NaN": (
        "ResetStates",
        {"rows": [0, 2], "state": [tensor(with_one(NAN))]},
        "state 'sum'" + FINITE + "nan at index [1, 1]",
    ),
    "no such format": (
        "Step",
        {"tensor_format": 3},
        "tensor_format must be one of stepwell.v1.TensorFormat; got 3",
    ),
    "no such selection": (
        "both",
        {"outputs": 9},
        "outputs must be one of stepwell.v1.OutputSelection; got 9",
    ),
    "an output that is none": (
        "both",
        {"output_names": ["y", "z"]},
        "output_names must be among ['y']; got 'z'",
    ),
    "an output twice": (
        "both",
        {"output_names": ["y", "y"]},
        "output_names must name each output once; got ['y', 'y']",
    ),
    "a mask that is too short": (
        "both",
        {"reset_mask": [True, False]},
        "reset_mask must be empty or one for each of 3 rows; got 2",
    ),
    "a mask of neither rows nor time steps": (
        "both",
        {"reset_mask": [True] * 5, "inputs": [tensor(ones(3, 4, 2))]},
        "reset_mask must be empty or one for each of 3 rows or one for each of 3 rows and 4 time steps; got 5",
    ),
    "no such selection of states": (
        "both",
        {"states": 9},
        "states must be one of stepwell.v1.StateSelection; got 9",
    ),
    "a state row out of range": (
        "Step",
        {"states": 2, "state_rows": [0, 3]},
        "state_rows must be within 0 to 2; got 3",
    ),
    "a state row twice": (
        "Step",
        {"states": 3, "state_rows": [1, 1]},
        "state_rows must name each row once; got [1, 1]",
    ),
    "a state row that does not advance": (
        "Step",
        {"states": 3, "state_rows": [1], "rows": [2, 0], "inputs": [tensor(ones(2, 2))]},
        "state_rows must be among rows, [2, 0]; got 1",
    ),
    "a state member out of range": (
        "frame",
        {"states": 2, "state_members": [1]},
        "state_members must be ascending indexes of the 1 sessions; got [1]",
    ),
    "a state member twice": (
        "frame",
        {"states": 2, "state_members": [0, 0]},
        "state_members must be ascending indexes of the 1 sessions; got [0, 0]",
    ),
    "an advancing row out of range": (
        "Step",
        {"rows": [0, 3], "inputs": [tensor(ones(2, 2))]},
        "rows must be within 0 to 2; got 3",
    ),
    "an advancing row twice": (
        "Step",
        {"rows": [1, 1], "inputs": [tensor(ones(2, 2))]},
        "rows must name each row once; got [1, 1]",
    ),
    "inputs of all rows for some": (
        "Step",
        {"rows": [2, 0]},
        "input 'x' must have shape (2, 2) or (2, T, 2); got (3, 2)",
    ),
    "a mask of all rows for some": (
        "Step",
        {"rows": [2, 0], "inputs": [tensor(ones(2, 2))], "reset_mask": [True] * 3},
        "reset_mask must be empty or one for each of 2 rows; got 3",
    ),
    "rows whose state is to be sent": (
        "Step",
        {"state_rows": [0]},
        "state_rows must be empty with states = STATE_SELECTION_NONE; got 1",
    ),
    "members whose state is to be sent": (
        "frame",
        {"state_members": [0]},
        "state_members must be empty with states = STATE_SELECTION_NONE; got 1",
    ),
    "two revisions": (
        "frame",
        {"expected_revisions": [1, 1]},
        "expected_revisions must be empty or have one entry per session (1); got 2",
    ),
    "two request ids": (
        "frame",
        {"request_ids": [1, 2]},
        "request_ids must be empty or have one entry per session (1); got 2",
    ),
    "a position that is too near to the end of numbers": (
        "ResetStates",
        {"state": GOOD, "position": 2**61 + 1},
        f"position must be at most 2**61, {2**61}; got {2**61 + 1}",
    ),
    "two batch sizes": (
        "frame",
        {"batch_sizes": [1, 2]},
        "batch_sizes must be empty or have one entry per session (1); got 2",
    ),
    "a batch size of 0": ("frame", {"batch_sizes": [0]}, "batch_sizes must be 1 to 2147483648; got 0"),
    "another batch size": (
        "frame",
        {"batch_sizes": [2], "inputs": GOOD},
        "batch_sizes must be the sessions' own; session 'plain 3' has 3, got 2",
    ),
    "another batch size than the rows": (
        "frame",
        {"batch_sizes": [2]},
        "input 'x' must have shape (2, 2) or (2, T, 2); got (3, 2)",
    ),
}


@pytest.mark.parametrize("name", OF_ONE)
async def test_one_session(name: str) -> None:
    way, fields, message = OF_ONE[name]
    wanted = Refusal(*BAD_ARGUMENT, message)
    async with calls() as at:
        session_id = await at.opened(batch_size=3)
        before = await at.everything()
        if way == "ResetStates":
            assert await at.refused(pb.ResetStatesRequest(session_id=session_id, **fields)) == wanted
        said = {"inputs": THREE_ROWS} | fields
        if way in {"Step", "both"}:
            assert await at.refused(pb.StepRequest(session_id=session_id, **said)) == wanted
        if way in {"frame", "both"}:
            assert await at.only_member(wire.step_frame(1, [session_id], **said)) == wanted
        assert await at.everything() == before


async def test_a_reply_that_is_too_large() -> None:
    """Half the size going in as float16, and all of it coming out as float32."""
    inputs = [tensor(np.zeros((1, MAX_MESSAGE_BYTES // 8 + 1, 2), np.float16))]
    size = (MAX_MESSAGE_BYTES // 8 + 1) * 8
    async with calls() as at:
        session_id = await at.opened(batch_size=1)
        before = await at.everything()
        for what, extra, refused in (
            ("step", 544, await at.refused(pb.StepRequest(session_id=session_id, inputs=inputs))),
            ("step", 544, await at.only_member(wire.step_frame(1, [session_id], inputs))),
            ("prediction", 520, await at.refused(models_pb2.PredictRequest(model="plain", inputs=inputs))),
        ):
            limit = f"the reply to the {what} must be at most {MAX_MESSAGE_BYTES} bytes"
            ask = "ask for fewer time steps at once, or for outputs LAST or NONE"
            assert refused.message == f"{limit}; it would be about {size + extra}: {ask}"
            assert (refused.code, refused.reason) == ("INVALID_ARGUMENT", "MESSAGE_TOO_LARGE")
            assert refused.metadata == {
                "limit_bytes": str(MAX_MESSAGE_BYTES),
                "reply_bytes": str(size + extra),
            }
        assert await at.everything() == before
