"""Conversion of tensors and sessions between messages and the engine; invalid tensors are in `test_refusals`."""

from __future__ import annotations

import dataclasses

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from stepwell.v1 import sessions_pb2, tensors_pb2
from stepwell_server.engine.api import ModelInfo, Select, SessionInfo
from stepwell_server.rpc import convert, tensors
from stepwell_server.rpc.steps import messages
from support.rpc.fake_engine import program

_FLOAT32 = tensors_pb2.DATA_TYPE_FLOAT32
_DTYPES = [
    name.removeprefix("DATA_TYPE_").lower()
    for name in dict(tensors_pb2.DataType.items())
    if name not in {"DATA_TYPE_UNSPECIFIED", "DATA_TYPE_BFLOAT16"}
]


def _tensor(shape: list[int], data: bytes, dtype: int = _FLOAT32, name: str = "x") -> tensors_pb2.Tensor:
    return tensors_pb2.Tensor(name=name, dtype=dtype, shape=shape, data=data)  # type: ignore[arg-type]


@given(data=st.data())
def test_arrays_survive_a_round_trip(data: st.DataObject) -> None:
    dtype = np.dtype(data.draw(st.sampled_from(_DTYPES)))
    as_values = data.draw(st.booleans())
    least = int(as_values)  # numbers say nothing of what is empty
    shapes = hnp.array_shapes(min_dims=least, max_dims=4, min_side=least, max_side=4)
    array = data.draw(hnp.arrays(dtype, shapes))
    sent = array.T if data.draw(st.booleans()) else array  # also one that is not contiguous
    response = sessions_pb2.StepResponse()
    tensors.add_tensors(response.outputs, {"y": sent}, as_values=as_values)
    assert not (response.outputs[0].data and response.outputs[0].values)
    back = tensors.to_arrays(sessions_pb2.StepResponse.FromString(response.SerializeToString()).outputs, "x")
    assert back["y"].dtype == dtype
    np.testing.assert_array_equal(back["y"], sent)


@pytest.mark.parametrize("as_values", [False, True])
def test_bfloat16_survives_a_round_trip(as_values: bool) -> None:
    array = np.array([[1.5, -2.0]], ml_dtypes.bfloat16)
    response = sessions_pb2.StepResponse()
    tensors.add_tensors(response.outputs, {"": array}, as_values=as_values)
    back = tensors.to_arrays(response.outputs, "inputs")[""]
    assert back.dtype == array.dtype
    np.testing.assert_array_equal(back, array)


def test_big_endian_arrays_are_sent_as_little_endian() -> None:
    response = sessions_pb2.StepResponse()
    tensors.add_tensors(response.outputs, {"y": np.array([1.0], ">f4")})
    assert response.outputs[0].data == np.array([1.0], "<f4").tobytes()


def test_request_arrays_are_views() -> None:
    array = tensors.to_arrays([_tensor([1, 2], bytes(8))], "inputs")["x"]
    assert not array.flags.owndata
    assert not array.flags.writeable


def test_an_empty_tensor_is_a_tensor() -> None:
    assert tensors.to_arrays([_tensor([0, 3], b"")], "inputs")["x"].shape == (0, 3)


def test_selections() -> None:
    names = ("UNSPECIFIED", "ALL", "LAST", "NONE")
    values = [sessions_pb2.OutputSelection.Value(f"OUTPUT_SELECTION_{name}") for name in names]
    assert [messages.to_select(value) for value in values] == [
        Select.ALL,
        Select.ALL,
        Select.LAST,
        Select.NONE,
    ]


def test_numbers_are_one_per_session() -> None:
    assert convert.to_numbers([], np.uint64, "request_ids", 3) is None
    numbers = convert.to_numbers([1, 2**64 - 1], np.uint64, "request_ids", 2)
    assert numbers is not None
    assert numbers.tolist() == [1, 2**64 - 1]


def test_descriptions_of_sessions_and_models_are_complete() -> None:
    info = SessionInfo("s", "m", "f", 3, 4, 5, 1.25, 2.5, resident=True)
    session = convert.from_session(info)
    assert (session.session_id, session.model, session.model_fingerprint) == ("s", "m", "f")
    assert (session.batch_size, session.revision, session.position, session.resident) == (3, 4, 5, True)
    assert (session.created_time.ToMilliseconds(), session.last_used_time.ToMilliseconds()) == (1250, 2500)
    assert not session.tenant
    of_acme = convert.from_session(dataclasses.replace(info, session_id="acme\x1fs"), tenant="acme")
    assert (of_acme.session_id, of_acme.tenant) == ("s", "acme")
    assert not convert.from_model(ModelInfo("m", program(), 9), counted=False).sessions
    model = convert.from_model(ModelInfo("m", program(), 9), counted=True)
    assert (model.name, model.fingerprint, model.sessions, model.state_row_bytes) == ("m", "f00d", 9, 8)
    assert (model.inputs[0].name, list(model.inputs[0].shape), model.inputs[0].temporal) == ("x", [2], True)
    assert not model.state[0].temporal
    assert (model.changed_state_row_bytes, model.state[0].window, model.HasField("multiply_adds")) == (
        8,
        0,
        False,
    )
    (spec,) = program().state
    window = dataclasses.replace(spec, shape=(6, *spec.shape), window=6)
    counted = dataclasses.replace(program(), state=(window,), multiply_adds=0)
    model = convert.from_model(ModelInfo("m", counted, 9), counted=True)
    assert (model.state_row_bytes, model.changed_state_row_bytes, model.state[0].window) == (48, 8, 6)
    assert (model.multiply_adds, model.HasField("multiply_adds")) == (0, True)
