"""The protocol as a set of file descriptors: what Envoy makes JSON by."""

from __future__ import annotations

import base64

from google.protobuf.descriptor import FileDescriptor
from google.protobuf.descriptor_pb2 import FileDescriptorSet
from google.rpc import error_details_pb2, status_pb2

from stepwell.v1 import models_pb2, sessions_pb2

_FILES = (
    sessions_pb2.DESCRIPTOR,
    models_pb2.DESCRIPTOR,
    # what errors are made of: Envoy must know the types of their details to write them as JSON
    status_pb2.DESCRIPTOR,
    error_details_pb2.DESCRIPTOR,
)


def services() -> list[str]:
    """Full names of the services that have HTTP rules."""
    return [
        service.full_name
        for file in (sessions_pb2.DESCRIPTOR, models_pb2.DESCRIPTOR)
        for service in file.services_by_name.values()
    ]


def streams() -> list[str]:
    """Paths of the calls that are streams: `/stepwell.v1.SessionService/StepStream` and so on."""
    return [
        f"/{service.full_name}/{method.name}"
        for file in (sessions_pb2.DESCRIPTOR, models_pb2.DESCRIPTOR)
        for service in file.services_by_name.values()
        for method in service.methods
        if method.client_streaming or method.server_streaming
    ]


def encoded() -> str:
    """The set of all files that the protocol needs, each after those that it imports, in base64."""
    found: dict[str, FileDescriptor] = {}
    for file in _FILES:
        _collect(file, found)
    files = FileDescriptorSet()
    for file in found.values():
        file.CopyToProto(files.file.add())
    return base64.b64encode(files.SerializeToString(deterministic=True)).decode()


def _collect(file: FileDescriptor, found: dict[str, FileDescriptor]) -> None:
    if file.name in found:
        return
    for needed in file.dependencies:
        _collect(needed, found)
    found[file.name] = file
