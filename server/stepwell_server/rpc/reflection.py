"""Server reflection, in both of its versions: v1, which clients ask for first, and v1alpha.

grpcio-reflection has v1alpha alone. v1 is the same protocol under another name: the same messages, byte for
byte.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import grpc
import grpc.aio
from google.protobuf import descriptor_pb2, descriptor_pool
from grpc_reflection.v1alpha import reflection, reflection_pb2

from stepwell_server.rpc.triton.inference import service_pb2

V1 = "grpc.reflection.v1.ServerReflection"
V1ALPHA: str = reflection.SERVICE_NAME


def enable_reflection(services: Sequence[str], server: grpc.aio.Server) -> None:
    """Let clients ask a server for its services, by full name, and for their messages."""
    # Our own messages are in the common pool; Triton's are in one of their own, and v1's too.
    pools = Pools(descriptor_pool.Default(), service_pb2.DESCRIPTOR.pool, _v1_pool())
    servicer = reflection.aio.ReflectionServicer((*services, V1, V1ALPHA), pool=pools)
    for name in (V1, V1ALPHA):
        handler = grpc.stream_stream_rpc_method_handler(
            servicer.ServerReflectionInfo,
            request_deserializer=reflection_pb2.ServerReflectionRequest.FromString,
            response_serializer=reflection_pb2.ServerReflectionResponse.SerializeToString,
        )
        handlers = grpc.method_handlers_generic_handler(name, {"ServerReflectionInfo": handler})
        server.add_generic_rpc_handlers((handlers,))


class Pools:
    """What reflection asks of a pool, answered by the first of several that knows."""

    def __init__(self, *pools: Any) -> None:
        self._pools = pools

    def FindFileByName(self, name: str) -> Any:  # noqa: N802  (the names are protobuf's)
        """See `DescriptorPool`."""
        return self._first(lambda pool: pool.FindFileByName(name))

    def FindFileContainingSymbol(self, name: str) -> Any:  # noqa: N802
        """See `DescriptorPool`."""
        return self._first(lambda pool: pool.FindFileContainingSymbol(name))

    def FindMessageTypeByName(self, name: str) -> Any:  # noqa: N802
        """See `DescriptorPool`."""
        return self._first(lambda pool: pool.FindMessageTypeByName(name))

    def FindExtensionByNumber(self, message: Any, number: int) -> Any:  # noqa: N802
        """See `DescriptorPool`."""
        return message.file.pool.FindExtensionByNumber(message, number)

    def FindAllExtensions(self, message: Any) -> Any:  # noqa: N802
        """See `DescriptorPool`."""
        return message.file.pool.FindAllExtensions(message)

    def _first(self, find: Callable[[Any], Any]) -> Any:
        for pool in self._pools[:-1]:
            try:
                return find(pool)
            except KeyError:
                continue
        return find(self._pools[-1])


def _v1_pool() -> descriptor_pool.DescriptorPool:
    """The description of v1, made from v1alpha's."""
    file = descriptor_pb2.FileDescriptorProto()
    reflection_pb2.DESCRIPTOR.CopyToProto(file)
    old, new = file.package, V1.rpartition(".")[0]
    file.name, file.package = new.replace(".", "/") + "/reflection.proto", new
    for message in file.message_type:
        for field in (field for field in message.field if field.type_name):
            field.type_name = field.type_name.replace(f".{old}.", f".{new}.")
    for service in file.service:
        for method in service.method:
            method.input_type = method.input_type.replace(f".{old}.", f".{new}.")
            method.output_type = method.output_type.replace(f".{old}.", f".{new}.")
    pool = descriptor_pool.DescriptorPool()
    pool.Add(file)
    return pool
