"""Tensors of Triton's protocol: accepted ones, and messages of refusals."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from stepwell_server.errors import InvalidInput, ServerError, Unsupported
from stepwell_server.program import Program, StateSpec, TensorSpec
from stepwell_server.rpc.triton.inference import service_pb2 as pb
from stepwell_server.rpc.triton.metadata import model_config, model_metadata
from stepwell_server.rpc.triton.tensors import ModelTensors, write_outputs
from support.engine.fake_executor import PLAIN, RICH
from support.triton.triton_requests import Array, inference, outputs_of, request

X = np.array([[1.5, -2.0]], np.float32)
_ID = "[request id: <id_unknown>] "
Change = Callable[[pb.ModelInferRequest], None]


def of_dtype(dtype: str, shape: tuple[int, ...] = (2,)) -> ModelTensors:
    return ModelTensors("m", program_of(dtype, shape))


def program_of(dtype: str, shape: tuple[int, ...] = (2,)) -> Program:
    spec = TensorSpec("x", shape, dtype, temporal=True)
    return Program("f", (spec,), (spec,), (StateSpec("s", shape, dtype),), (), "litert", "", (), {})


@pytest.mark.parametrize(
    ("dtype", "name", "field"),
    [
        ("bool", "BOOL", "bool_contents"),
        ("uint8", "UINT8", "uint_contents"),
        ("uint16", "UINT16", "uint_contents"),
        ("uint32", "UINT32", "uint_contents"),
        ("uint64", "UINT64", "uint64_contents"),
        ("int8", "INT8", "int_contents"),
        ("int16", "INT16", "int_contents"),
        ("int32", "INT32", "int_contents"),
        ("int64", "INT64", "int64_contents"),
        ("float16", "FP16", ""),
        ("bfloat16", "BF16", ""),
        ("float32", "FP32", "fp32_contents"),
        ("float64", "FP64", "fp64_contents"),
    ],
)
def test_raw_and_typed_are_the_same(dtype: str, name: str, field: str) -> None:
    tensors = of_dtype(dtype)
    values = np.array([[0, 1], [1, 0], [1, 1]]).astype(tensors.inputs["x"].dtype)
    raw = pb.ModelInferRequest(raw_input_contents=[values.tobytes()])
    raw.inputs.add(name="x", datatype=name, shape=[3, 2])
    read = tensors.read(raw)
    assert (read.rows, read.steps) == (3, 1)
    np.testing.assert_array_equal(read.arrays["x"], values)
    response = pb.ModelInferResponse()
    write_outputs(response, list(tensors.outputs.values()), {"x": values})
    assert (response.outputs[0].datatype, list(response.outputs[0].shape)) == (name, [3, 2])
    assert response.raw_output_contents[0] == values.tobytes()
    typed = pb.ModelInferRequest()
    typed.inputs.add(name="x", datatype=name, shape=[3, 2])
    contents = typed.inputs[0].contents
    if field:
        getattr(contents, field).extend(values.ravel().tolist())
        again = tensors.read(typed).arrays["x"]
        assert again.dtype == values.dtype
        np.testing.assert_array_equal(again, values)
    else:
        contents.fp32_contents.extend([1.0] * 6)
        with pytest.raises(InvalidInput, match=f"{name} needs raw contents"):
            tensors.read(typed)


@pytest.mark.parametrize(
    ("dtype", "field", "value"),
    [("int8", "int_contents", 128), ("int16", "int_contents", -40_000), ("uint8", "uint_contents", 256)],
)
def test_typed_elements_are_not_cut_off(dtype: str, field: str, value: int) -> None:
    typed = pb.ModelInferRequest()
    typed.inputs.add(name="x", datatype=dtype.upper(), shape=[1, 2])
    getattr(typed.inputs[0].contents, field).extend([1, value])
    with pytest.raises(InvalidInput, match=f"must be within .*, got {value}"):
        of_dtype(dtype).read(typed)


@pytest.mark.parametrize("shape", [(), (1,), (3,), (2, 4)])
def test_shapes(shape: tuple[int, ...]) -> None:
    """[B, features...] is one time step, [B, T, features...] are several; one number is [1]."""
    tensors = of_dtype("float32", shape)
    dims = shape or (1,)
    for leading in ((1,), (5,), (1, 1), (5, 1), (5, 7)):
        values = np.random.default_rng(0).random((*leading, *dims), np.float32)
        read = tensors.read(request(values))
        assert read.arrays["x"].shape == (*leading, *shape)
        assert (read.rows, read.steps) == (leading[0], leading[1] if len(leading) > 1 else 1)
        response = pb.ModelInferResponse()
        write_outputs(response, list(tensors.outputs.values()), read.arrays)
        np.testing.assert_array_equal(outputs_of(response)["x"], values)
    metadata = model_metadata("m", [1], program_of("float32", shape), tensors)
    assert list(metadata.inputs[0].shape) == list(metadata.outputs[0].shape) == [-1, *dims]


def change(**fields: Any) -> Change:
    def apply(message: pb.ModelInferRequest) -> None:
        for name, value in fields.items():
            if name == "shape":
                message.inputs[0].shape[:] = value
            elif name == "raw":
                message.raw_input_contents[:] = value
            else:
                setattr(message.inputs[0], name, value)

    return apply


def typed_with(field: str, *values: Any) -> Change:
    def apply(message: pb.ModelInferRequest) -> None:
        del message.raw_input_contents[:]
        getattr(message.inputs[0].contents, field).extend(values)

    return apply


def parameter(name: str, value: str) -> Change:
    def apply(message: pb.ModelInferRequest) -> None:
        message.inputs[0].parameters[name].string_param = value

    return apply


def output(*names: str, classify: bool = False) -> Change:
    def apply(message: pb.ModelInferRequest) -> None:
        for name in names:
            wanted = message.outputs.add(name=name)
            if classify:
                wanted.parameters["classification"].int64_param = 3

    return apply


def no_inputs(message: pb.ModelInferRequest) -> None:
    del message.inputs[:]
    del message.raw_input_contents[:]


def twice(message: pb.ModelInferRequest) -> None:
    message.inputs.add(name="x", datatype="FP32", shape=[1, 2])


def mixed(message: pb.ModelInferRequest) -> None:
    message.inputs[0].contents.fp32_contents.extend([1, 2])


_COUNT = "Please provide all required input(s)."
BAD: dict[str, tuple[Change, str]] = {
    "name": (change(name="z"), "unexpected inference input 'z' for model 'plain'"),
    "none": (
        no_inputs,
        (
            f"{_ID}expected 1 inputs but got 0 inputs for model 'plain'. Got input(s) [], but missing required"
            f" input(s) ['x']. {_COUNT}"
        ),
    ),
    "too many": (twice, f"{_ID}expected 1 inputs but got 2 inputs for model 'plain'. Got input(s) ['x','x']"),
    "datatype": (
        change(datatype="INT32"),
        f"{_ID}inference input 'x' data-type is 'INT32', but model 'plain' expects 'FP32'",
    ),
    "bytes": (change(datatype="BYTES"), "data-type is 'BYTES', but model 'plain' expects 'FP32'"),
    "half": (change(datatype="FP16"), "data-type is 'FP16', but model 'plain' expects 'FP32'"),
    "brain": (change(datatype="BF16"), "data-type is 'BF16', but model 'plain' expects 'FP32'"),
    "nonsense": (change(datatype="float"), "data-type is 'float', but model 'plain' expects 'FP32'"),
    "no shape": (
        change(shape=[]),
        f"{_ID}input 'x' has no shape but model requires batch dimension for 'plain'",
    ),
    "shape": (
        change(shape=[1, 3]),
        f"{_ID}unexpected shape for input 'x' for model 'plain'. Expected [-1,2], got [1,3]. NOTE:",
    ),
    "no batch": (change(shape=[2]), "Expected [-1,2], got [2]"),
    "rank": (change(shape=[1, 1, 1, 2]), "Expected [-1,2], got [1,1,1,2]"),
    "negative": (
        change(shape=[-1, 2]),
        f"{_ID}All input dimensions should be specified for input 'x' for model 'plain', got [-1,2]",
    ),
    "no rows": (change(shape=[0, 2], raw=[b""]), "must have at least one row and time step, got [0,2]"),
    "no time": (change(shape=[1, 0, 2], raw=[b""]), "must have at least one row and time step, got [1,0,2]"),
    "batch": (
        change(shape=[1025, 2], raw=[bytes(1025 * 8)]),
        f"{_ID}inference request batch-size must be <= 1024 for 'plain'",
    ),
    "huge": (change(shape=[2**62, 2]), "inference request batch-size must be <= 1024 for 'plain'"),
    "long": (change(shape=[1, 2**62, 2]), f"Expected {2**65}, got 8"),
    "size": (
        change(raw=[bytes(12)]),
        f"{_ID}input byte size mismatch for input 'x' for model 'plain'. Expected 8, got 12",
    ),
    "no data": (
        change(raw=[]),
        "unable to find data for input tensor 'x' for model 'plain' in request.",
    ),
    "too much": (change(raw=[bytes(8)] * 2), "raw_input_contents must have one entry for each of the 1 inputs"),
    "mixed": (
        mixed,
        "contents field must not be specified when using raw_input_contents for 'x' for model 'plain'",
    ),
    "typed": (
        typed_with("int_contents", 1, 2),
        (
            "unexpected explicit tensor data for input tensor 'x' for model 'plain' of type 'INT32', expected"
            " datatype 'FP32'"
        ),
    ),
    "typed size": (typed_with("fp32_contents", 1.0), "input byte size mismatch for input 'x'"),
    "typed bytes": (typed_with("bytes_contents", b"1"), "of type 'BYTES', expected datatype 'FP32'"),
    "typed nothing": (typed_with("fp32_contents"), "Expected 8, got 0"),
    "nan": (change(raw=[np.array([1, np.nan], np.float32).tobytes()]), "must hold finite numbers"),
    "output": (output("z"), "unexpected inference output 'z' for model 'plain'"),
    "output twice": (output("y", "y"), f"{_ID}output 'y' already exists in request"),
    "version": (lambda message: setattr(message, "model_version", "2"), "Request for unknown model: 'plain' version 2 is not found"),
    "model": (lambda message: setattr(message, "model_name", "z"), "Request for unknown model: 'z' is not found"),
    "shared memory": (parameter("shared_memory_region", "r"), "shared memory is not supported"),
    "classes": (output("y", classify=True), "classification is not supported"),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
@pytest.mark.parametrize("with_sequence", [True, False])
async def test_bad_input_is_refused_and_changes_nothing(name: str, with_sequence: bool) -> None:
    spoil, message = BAD[name]
    async with inference() as client:
        await client.infer(X, sequence_id=1, start=True)
        bad = request(X, sequence_id=1 if with_sequence else None)
        spoil(bad)
        with pytest.raises(ServerError) as caught:
            await client.send(bad)
        assert message in caught.value.message
        after = await client.infer(X, sequence_id=1)
        assert after.parameters["stepwell_revision"].int64_param == 2


async def test_a_reply_over_the_limit_is_refused_before_the_step() -> None:
    async with inference() as client:
        await client.infer(X, sequence_id=1, start=True)
        with pytest.raises(InvalidInput, match="must be at most 4096 bytes"):
            await client.infer(np.zeros((1, 600, 2), np.float32), sequence_id=1)
        after = await client.infer(X, sequence_id=1)
        assert after.parameters["stepwell_revision"].int64_param == 2


async def test_several_inputs_and_chosen_outputs() -> None:
    rng = np.random.default_rng(0)
    x = rng.standard_normal((2, 3, 2)).astype(np.float32)
    token, gain = rng.integers(0, 5, (2, 3, 1)).astype(np.int32), rng.random((2, 1), np.float32)
    async with inference({"rich": RICH}) as client:
        inputs = [("gain", gain), ("x", x), ("token", token)]
        whole = outputs_of(await client.infer(*inputs, model="rich"))
        assert (whole["y"].shape, whole["head"].shape) == ((2, 3, 2), (2, 3))
        message = request(*inputs, model="rich", sequence_id="s", start=True)
        message.outputs.add(name="head")
        some = outputs_of(await client.send(message))
        assert list(some) == ["head"]
        np.testing.assert_array_equal(some["head"], whole["head"])
        other = [("gain", gain[:1]), ("x", x), ("token", token)]
        with pytest.raises(InvalidInput, match="batch size does not match other inputs for 'rich'"):
            await client.infer(*other, model="rich")


def test_a_boolean_is_0_or_1() -> None:
    message = pb.ModelInferRequest(raw_input_contents=[b"\x01\x02"])
    message.inputs.add(name="x", datatype="BOOL", shape=[1, 2])
    with pytest.raises(
        InvalidInput, match="each byte of BOOL input tensor 'x' for model 'm' must be 0 or 1, got 2"
    ):
        of_dtype("bool").read(message)


def test_the_configuration_describes_the_state() -> None:
    config = model_config("rich", [1], RICH, ModelTensors("rich", RICH), 1.5)
    batching = config.sequence_batching
    assert batching.max_sequence_idle_microseconds == 1_500_000
    assert [(state.input_name, list(state.dims)) for state in batching.state] == [("sum", [2]), ("count", [])]
    assert batching.state[0].initial_state[0].WhichOneof("state_data") == "data_file"
    assert [list(one.dims) for one in config.input] == [[2], [1], [1]]
    assert [one.HasField("reshape") for one in config.input] == [False, True, True]
    stateless = Program("f", PLAIN.inputs, PLAIN.outputs, (), (), "litert", "", (), {})
    config = model_config("m", [1, 4], stateless, ModelTensors("m", stateless), 0)
    assert config.WhichOneof("scheduling_choice") == "dynamic_batching"
    assert list(config.version_policy.specific.versions) == [1, 4]


def test_arrays_are_views_of_the_request() -> None:
    message = request(X)
    array: Array = of_dtype("float32").read(message).arrays["x"]
    assert not array.flags.writeable


def test_shared_memory_is_unsupported() -> None:
    message = request(X)
    message.inputs[0].parameters["shared_memory_region"].string_param = "r"
    with pytest.raises(Unsupported):
        of_dtype("float32").read(message)
