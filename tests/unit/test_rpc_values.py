"""Tensors with elements as numbers, in requests and answers; invalid ones are in `test_refusals`."""

from __future__ import annotations

import numpy as np
import pytest

from stepwell.v1 import models_pb2, tensors_pb2
from stepwell.v1 import sessions_pb2 as pb
from stepwell_server.rpc import tensors
from support.engine.fake_executor import PLAIN, RICH
from support.peers.wire import tensor
from support.rpc.calls import Calls, calls

DATA, VALUES = tensors_pb2.TENSOR_FORMAT_DATA, tensors_pb2.TENSOR_FORMAT_VALUES
MODELS = {"plain": PLAIN, "rich": RICH}


async def opened(at: Calls, model: str) -> str:
    """A new session of two rows."""
    answer = await at.call(pb.OpenSessionRequest(model=model, batch_size=2))
    session_id: str = answer.session.session_id
    return session_id


def test_integers_that_no_double_represents_are_sent_as_data() -> None:
    response = pb.StepResponse()
    arrays = {
        "a": np.array([2**53 - 1]),
        "b": np.array([-(2**53) - 1]),
        "c": np.array([2**64 - 1], np.uint64),
    }
    tensors.add_tensors(response.outputs, arrays, as_values=True)
    assert [bool(one.data) for one in response.outputs] == [False, True, True]
    back = tensors.to_arrays(response.outputs, "x")
    assert {name: array.tolist() for name, array in back.items()} == {
        "a": [2**53 - 1],
        "b": [-(2**53) - 1],
        "c": [2**64 - 1],
    }


@pytest.mark.parametrize(
    ("values", "dtype"),
    [([1, -2, 2.0**53 - 1], "int64"), ([1, 0.5], "float64"), ([2.0**53], "float64"), ([-0.0], "float64")],
)
def test_without_a_dtype_whole_numbers_are_integers(values: list[float], dtype: str) -> None:
    (array,) = tensors.to_arrays([tensors_pb2.Tensor(values=values)], "inputs").values()
    assert array.dtype == dtype
    assert array.shape == (1, len(values))
    assert [str(value) for value in array.astype(float)[0]] == [str(float(value)) for value in values]


async def test_a_step_in_numbers_is_the_step_in_bytes() -> None:
    x, token, gain = [[0.25, -1.0], [3.0, 4.0]], [1, 0], [2, 1]
    async with calls(MODELS) as at:
        one, other = await opened(at, "rich"), await opened(at, "rich")
        arrays = {"x": np.array(x, "f4"), "token": np.array(token, "i4"), "gain": np.array(gain, "f4")}
        as_bytes = [tensor(array, name) for name, array in arrays.items()]
        in_numbers = [
            tensors_pb2.Tensor(name=name, values=array.ravel().tolist(), shape=array.shape)
            for name, array in arrays.items()
        ]
        states = pb.STATE_SELECTION_LAST
        told = await at.call(pb.StepRequest(session_id=one, inputs=as_bytes, states=states))
        read = await at.call(pb.StepRequest(session_id=other, inputs=in_numbers, states=states))
        assert all(each.data and not each.values for each in (*told.outputs, *told.states))
        assert all(each.values and not each.data for each in (*read.outputs, *read.states))
        for field in ("outputs", "states"):
            wanted = tensors.to_arrays(getattr(told, field), field)
            found = tensors.to_arrays(getattr(read, field), field)
            assert wanted.keys() == found.keys()
            for name, array in wanted.items():
                assert found[name].dtype == array.dtype
                np.testing.assert_array_equal(found[name], array)
        predicted = await at.call(models_pb2.PredictRequest(model="rich", inputs=in_numbers))
        assert all(each.values for each in (*predicted.outputs, *predicted.state))


async def test_answers_have_the_requested_format() -> None:
    numbers = [tensors_pb2.Tensor(values=[1, 2, 3, 4], shape=[2, 2])]
    async with calls(MODELS) as at:
        session_id = await opened(at, "plain")
        step = await at.call(pb.StepRequest(session_id=session_id, inputs=numbers, tensor_format=DATA))
        assert step.outputs[0].data
        again = [tensor(np.ones((2, 2), np.float32))]
        step = await at.call(pb.StepRequest(session_id=session_id, inputs=again, tensor_format=VALUES))
        assert step.outputs[0].values
        reset = pb.ResetStatesRequest(session_id=session_id, state=numbers)
        assert (await at.call(reset)).revision == 3
        for wanted in (tensors_pb2.TENSOR_FORMAT_UNSPECIFIED, DATA, VALUES):
            state = (await at.call(pb.GetStateRequest(session_id=session_id, tensor_format=wanted))).state
            states = (
                await at.call(pb.GetStatesRequest(session_ids=[session_id], tensor_format=wanted))
            ).state
            for (found,) in (state, states):
                assert bool(found.values) is (wanted == VALUES)
                (array,) = tensors.to_arrays([found], "state").values()
                assert array.tolist() == [[1, 2], [3, 4]]


async def test_a_frame_takes_numbers_and_answers_bytes() -> None:
    async with calls(MODELS) as at:
        session_id = await opened(at, "plain")
        numbers = tensors_pb2.Tensor(values=[1, 2, 3, 4], shape=[2, 2])
        frame = pb.StepStreamRequest(
            frame_id=1, step=pb.StepFrame(session_ids=[session_id], inputs=[numbers])
        )
        (answer,) = await at.streamed("StepStream", frame)
        assert pb.StepStreamResponse.FromString(answer).outputs[0].data


async def test_tensors_too_large_for_numbers_are_refused_before_a_change() -> None:
    async with calls(MODELS, resident_rows=40_000) as at:
        many = await at.call(pb.OpenSessionRequest(model="plain", batch_size=32_769))
        session_id, inputs = many.session.session_id, [tensor(np.ones((32_769, 2), np.float32))]
        step = pb.StepRequest(session_id=session_id, inputs=inputs, tensor_format=VALUES)
        refusal = await at.refused(step)
        assert refusal.reason == "MESSAGE_TOO_LARGE"
        assert "the reply to the step must be at most 262144 bytes" in refusal.message
        assert (await at.call(pb.GetSessionRequest(session_id=session_id))).session.revision == 0
        predict = models_pb2.PredictRequest(model="plain", inputs=inputs, tensor_format=VALUES)
        assert (await at.refused(predict)).reason == "MESSAGE_TOO_LARGE"
        step.tensor_format = DATA
        assert (await at.call(step)).revision == 1
        read = pb.GetStateRequest(session_id=session_id, tensor_format=VALUES)
        refusal = await at.refused(read)
        assert refusal.reason == "MESSAGE_TOO_LARGE"
        assert refusal.message == (
            "tensor_format must be DATA for more than 262144 bytes of elements; got 262152"
        )
        named = pb.GetStatesRequest(session_ids=[read.session_id], tensor_format=VALUES)
        assert (await at.refused(named)).message == refusal.message
