"""grpc.reflection.v1alpha.ServerReflection: what services there are, and the messages that they take."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterable
from typing import TYPE_CHECKING, Any

from grpc_reflection.v1alpha import reflection, reflection_pb2

from stepwell_server.rpc.boundary import parse

if TYPE_CHECKING:
    from stepwell_server.rpc.fronts.base import Call

SERVICE = reflection_pb2.DESCRIPTOR.services_by_name["ServerReflection"]


class ReflectionServicer:
    """The call of ServerReflection. Lives on the event loop."""

    def __init__(self, services: Iterable[str], pool: Any) -> None:
        self._servicer: Any = reflection.aio.ReflectionServicer(list(services), pool)

    async def server_reflection_info(self, call: Call) -> None:
        """Answer each question."""
        while (raw := await call.read()) is not None:
            request = parse(reflection_pb2.ServerReflectionRequest, raw)
            async for reply in self._servicer.ServerReflectionInfo(_only(request), None):
                await call.write(reply.SerializeToString())


async def _only(request: Any) -> AsyncIterator[Any]:
    yield request
