"""Descriptions of the server and its models."""

from __future__ import annotations

import functools
from collections.abc import Collection
from importlib import metadata
from typing import TypeVar

import numpy as np

from stepwell_server.program import Program
from stepwell_server.rpc.triton.inference import service_pb2 as pb
from stepwell_server.rpc.triton.tensors import MAX_BATCH_SIZE, ModelTensors, Tensor, of_numpy

_Described = TypeVar("_Described", pb.ModelInput, pb.ModelOutput)

SERVER_NAME = "stepwell"
"""The server's name, which the protocol leaves to it; Triton's clients look at the extensions."""
EXTENSIONS = (
    "sequence",
    "sequence(string_id)",
    "statistics",
    "model_configuration",
    # Sequences outlive the process if the store does, and a step that is sent again is applied once if the
    # request has the parameters stepwell_revision and stepwell_request_id.
    "stepwell_durable_sequences",
    "stepwell_exactly_once(stepwell_revision,stepwell_request_id)",
    # A prediction by a model that keeps state.
    "stepwell_stateless",
)


def server_metadata() -> pb.ServerMetadataResponse:
    """Name, version, extensions."""
    return pb.ServerMetadataResponse(name=SERVER_NAME, version=_version(), extensions=EXTENSIONS)


def model_metadata(
    name: str, versions: Collection[int], program: Program, tensors: ModelTensors
) -> pb.ModelMetadataResponse:
    """The inputs and outputs of a version of a model, with the batch dimension, and the loaded versions."""
    response = pb.ModelMetadataResponse(
        name=name, versions=[str(version) for version in versions], platform=platform_of(program)
    )
    for tensor in tensors.inputs.values():
        response.inputs.add(name=tensor.spec.name, datatype=tensor.datatype.name, shape=(-1, *tensor.dims))
    for tensor in tensors.outputs.values():
        response.outputs.add(name=tensor.spec.name, datatype=tensor.datatype.name, shape=(-1, *tensor.dims))
    return response


def platform_of(program: Program) -> str:
    """What runs the model."""
    return f"{SERVER_NAME}_{program.executor}"


@functools.cache
def _version() -> str:
    return metadata.version("stepwell")


def model_config(
    name: str, versions: Collection[int], program: Program, tensors: ModelTensors, max_session_idle_s: float
) -> pb.ModelConfig:
    """The configuration of a version of a model, which has these versions. One that keeps no state has `dynamic_batching`, not `sequence_batching`."""
    config = pb.ModelConfig(
        name=name,
        platform=platform_of(program),
        backend=SERVER_NAME,
        version_policy=pb.ModelVersionPolicy(specific=pb.ModelVersionPolicy.Specific(versions=versions)),
        max_batch_size=MAX_BATCH_SIZE,
        input=[_described(pb.ModelInput, tensor) for tensor in tensors.inputs.values()],
        output=[_described(pb.ModelOutput, tensor) for tensor in tensors.outputs.values()],
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


def _described(message_type: type[_Described], tensor: Tensor) -> _Described:
    return message_type(
        name=tensor.spec.name,
        data_type=tensor.datatype.number,
        dims=tensor.dims,
        reshape=None if tensor.spec.shape else pb.ModelTensorReshape(),
    )


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
