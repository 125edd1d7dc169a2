"""What the server and its models are, as this protocol tells of it."""

from __future__ import annotations

import functools
from importlib import metadata

from stepwell_server.program import Program
from stepwell_server.rpc.triton.inference import service_pb2 as pb
from stepwell_server.rpc.triton.tensors import ModelTensors

SERVER_NAME = "stepwell"
"""What this server is called. The protocol leaves the name to the server; Triton's clients go by the extensions."""
VERSION = "1"
"""A model has one version; clients may name it or leave it out."""
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


def model_metadata(name: str, program: Program, tensors: ModelTensors) -> pb.ModelMetadataResponse:
    """A model's inputs and outputs, with the batch dimension."""
    response = pb.ModelMetadataResponse(name=name, versions=[VERSION], platform=platform_of(program))
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
