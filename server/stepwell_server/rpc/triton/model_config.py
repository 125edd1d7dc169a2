"""A model as Triton's config.pbtxt would describe it."""

from __future__ import annotations

import numpy as np

from stepwell_server.program import Program
from stepwell_server.rpc.triton.datatypes import of_numpy
from stepwell_server.rpc.triton.inference import service_pb2 as pb
from stepwell_server.rpc.triton.metadata import SERVER_NAME, platform_of
from stepwell_server.rpc.triton.tensors import MAX_BATCH_SIZE, ModelTensors, Tensor


def model_config(
    name: str, program: Program, tensors: ModelTensors, max_session_idle_s: float
) -> pb.ModelConfig:
    """The configuration of a model. One that keeps no state has `dynamic_batching`, not `sequence_batching`."""
    config = pb.ModelConfig(
        name=name,
        platform=platform_of(program),
        backend=SERVER_NAME,
        version_policy=pb.ModelVersionPolicy(latest=pb.ModelVersionPolicy.Latest(num_versions=1)),
        max_batch_size=MAX_BATCH_SIZE,
        input=[_input(tensor) for tensor in tensors.inputs.values()],
        output=[_output(tensor) for tensor in tensors.outputs.values()],
        instance_group=[
            pb.ModelInstanceGroup(name=name, kind=pb.ModelInstanceGroup.KIND_CPU, count=1),
        ],
        model_transaction_policy=pb.ModelTransactionPolicy(decoupled=False),
    )
    config.parameters["fingerprint"].string_value = program.fingerprint
    if program.state:
        config.sequence_batching.CopyFrom(_sequence_batching(program, max_session_idle_s))
    else:
        config.dynamic_batching.SetInParent()
    return config


def _input(tensor: Tensor) -> pb.ModelInput:
    return pb.ModelInput(
        name=tensor.spec.name,
        data_type=tensor.datatype.number,
        dims=tensor.dims,
        reshape=_reshape(tensor),
    )


def _output(tensor: Tensor) -> pb.ModelOutput:
    return pb.ModelOutput(
        name=tensor.spec.name,
        data_type=tensor.datatype.number,
        dims=tensor.dims,
        reshape=_reshape(tensor),
    )


def _reshape(tensor: Tensor) -> pb.ModelTensorReshape | None:
    return None if tensor.spec.shape else pb.ModelTensorReshape()


def _sequence_batching(program: Program, max_session_idle_s: float) -> pb.ModelSequenceBatching:
    batching = pb.ModelSequenceBatching(
        max_sequence_idle_microseconds=round(max_session_idle_s * 1e6),
        oldest=pb.ModelSequenceBatching.StrategyOldest(),
    )
    for spec, initial in zip(program.state, program.initial, strict=True):
        number = of_numpy(spec.dtype).number
        start = pb.ModelSequenceBatching.InitialState(name=spec.name, data_type=number, dims=spec.shape)
        if np.any(initial):
            start.data_file = "initial.npz"
        else:
            start.zero_data = True
        batching.state.add(
            input_name=spec.name,
            output_name=spec.name,
            data_type=number,
            dims=spec.shape,
            initial_state=[start],
        )
    return batching
