"""Server reflection in both versions: v1, which clients try first, and v1alpha.

grpcio-reflection has only v1alpha. v1 is the same protocol under another name, with identical messages.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence
from typing import TYPE_CHECKING, Any

from google.protobuf import descriptor_pb2, descriptor_pool
from google.protobuf.descriptor import FileDescriptor, ServiceDescriptor
from grpc_reflection.v1alpha import reflection_pb2

from stepwell_server.rpc.boundary import parse

if TYPE_CHECKING:
    from stepwell_server.rpc.fronts.base import Call

_V1 = "grpc.reflection.v1"
_V1ALPHA = reflection_pb2.DESCRIPTOR.services_by_name["ServerReflection"]


class ReflectionServicer:
    """The call of ServerReflection. Lives on the event loop."""

    def __init__(self, services: Sequence[ServiceDescriptor]) -> None:
        # Our messages are in the common pool, and Triton's in a separate one. Here all are in one pool.
        pool = descriptor_pool.DescriptorPool()
        added: set[str] = set()
        for service in (*services, _V1ALPHA):
            _add(pool, service.file, added)
        pool.Add(_v1_file())
        self.services = (pool.FindServiceByName(f"{_V1}.ServerReflection"), _V1ALPHA)
        """Descriptors of the reflection services."""
        self._names = [service.full_name for service in (*services, *self.services)]
        self._pool = pool
        self._servicer: Any = None
        """Created on first use, because it imports grpc, 8 MiB that the native front does not need."""

    async def server_reflection_info(self, call: Call) -> None:
        """Answer each request."""
        if self._servicer is None:
            self._servicer = await asyncio.to_thread(_servicer, self._names, self._pool)
        while (raw := await call.read()) is not None:
            request = parse(reflection_pb2.ServerReflectionRequest, raw)
            async for reply in self._servicer.ServerReflectionInfo(_only(request), None):
                await call.write(reply.SerializeToString())


def _servicer(names: Sequence[str], pool: descriptor_pool.DescriptorPool) -> Any:
    from grpc_reflection.v1alpha import reflection

    return reflection.aio.ReflectionServicer(names, pool)


async def _only(request: Any) -> AsyncIterator[Any]:
    yield request


def _add(pool: descriptor_pool.DescriptorPool, file: FileDescriptor, added: set[str]) -> None:
    """Add a file to a pool, after the files that it imports."""
    if file.name in added:
        return
    added.add(file.name)
    for imported in file.dependencies:
        _add(pool, imported, added)
    copy = descriptor_pb2.FileDescriptorProto()
    file.CopyToProto(copy)
    pool.Add(copy)


def _v1_file() -> descriptor_pb2.FileDescriptorProto:
    """Return the description of v1, made from v1alpha's."""
    file = descriptor_pb2.FileDescriptorProto()
    reflection_pb2.DESCRIPTOR.CopyToProto(file)
    old = file.package
    file.name, file.package = _V1.replace(".", "/") + "/reflection.proto", _V1
    for message in file.message_type:
        for field in (field for field in message.field if field.type_name):
            field.type_name = field.type_name.replace(f".{old}.", f".{_V1}.")
    for service in file.service:
        for method in service.method:
            method.input_type = method.input_type.replace(f".{old}.", f".{_V1}.")
            method.output_type = method.output_type.replace(f".{old}.", f".{_V1}.")
    return file
