"""Server reflection, in both of its versions: v1, which clients ask for first, and v1alpha.

grpcio-reflection has v1alpha alone. v1 is the same protocol under another name: the same messages, byte for
byte.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Sequence
from typing import TYPE_CHECKING, Any

from google.protobuf import descriptor_pb2, descriptor_pool
from google.protobuf.descriptor import ServiceDescriptor
from grpc_reflection.v1alpha import reflection, reflection_pb2

from stepwell_server.rpc.boundary import parse

if TYPE_CHECKING:
    from stepwell_server.rpc.fronts.base import Call

_V1 = "grpc.reflection.v1"
_V1ALPHA = reflection_pb2.DESCRIPTOR.services_by_name["ServerReflection"]


class ReflectionServicer:
    """The call of ServerReflection. Lives on the event loop."""

    def __init__(self, services: Sequence[ServiceDescriptor]) -> None:
        own = _v1_pool()
        self.services = (own.FindServiceByName(f"{_V1}.ServerReflection"), _V1ALPHA)
        """Descriptors of the services that this one answers."""
        # Our own messages are in the common pool; Triton's are in one of their own, and v1's too.
        pools = {id(service.file.pool): service.file.pool for service in (*services, *self.services)}
        names = [service.full_name for service in (*services, *self.services)]
        self._servicer: Any = reflection.aio.ReflectionServicer(names, Pools(*pools.values()))

    async def server_reflection_info(self, call: Call) -> None:
        """Answer each question."""
        while (raw := await call.read()) is not None:
            request = parse(reflection_pb2.ServerReflectionRequest, raw)
            async for reply in self._servicer.ServerReflectionInfo(_only(request), None):
                await call.write(reply.SerializeToString())


async def _only(request: Any) -> AsyncIterator[Any]:
    yield request


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
    old = file.package
    file.name, file.package = _V1.replace(".", "/") + "/reflection.proto", _V1
    for message in file.message_type:
        for field in (field for field in message.field if field.type_name):
            field.type_name = field.type_name.replace(f".{old}.", f".{_V1}.")
    for service in file.service:
        for method in service.method:
            method.input_type = method.input_type.replace(f".{old}.", f".{_V1}.")
            method.output_type = method.output_type.replace(f".{old}.", f".{_V1}.")
    pool = descriptor_pool.DescriptorPool()
    pool.Add(file)
    return pool
