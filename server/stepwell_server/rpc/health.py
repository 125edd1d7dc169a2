"""grpc.health.v1.Health: whether the server, and each of its services, takes calls."""

from __future__ import annotations

import asyncio
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from google.protobuf.message import Message
from grpc_health.v1 import health_pb2 as pb

from stepwell_server.errors import ServiceNotFound
from stepwell_server.rpc.boundary import parse

if TYPE_CHECKING:
    from stepwell_server.rpc.fronts.base import Call

SERVICE = pb.DESCRIPTOR.services_by_name["Health"]
_SERVING = pb.HealthCheckResponse.SERVING
_NOT_SERVING = pb.HealthCheckResponse.NOT_SERVING


class HealthServicer:
    """The calls of Health, each by its name in snake case. Lives on the event loop."""

    def __init__(self, services: Iterable[str]) -> None:
        self._services = {"", *services}
        self._is_serving = self._is_stopping = False
        self._changed: asyncio.Future[None] = asyncio.get_running_loop().create_future()

    async def check(self, request: pb.HealthCheckRequest, _call: Call) -> pb.HealthCheckResponse:
        """Say how a service is."""
        if request.service not in self._services:
            raise ServiceNotFound(
                f"service must be empty or one of {sorted(self._services - {''})}; got {request.service[:256]!r}"
            )
        return pb.HealthCheckResponse(status=self._status(request.service))

    async def list(self, _request: Any, _call: Call) -> Message:
        """Say how all services are."""
        # newer than the oldest grpcio-health-checking that is allowed
        response: Message = pb.HealthListResponse(  # type: ignore[attr-defined,unused-ignore]
            statuses={name: pb.HealthCheckResponse(status=self._status(name)) for name in self._services}
        )
        return response

    async def watch(self, call: Call) -> None:
        """Say how a service is, now and whenever that changes."""
        raw = await call.read()
        service = parse(pb.HealthCheckRequest, b"" if raw is None else raw).service
        while True:
            changed = self._changed
            await call.write(pb.HealthCheckResponse(status=self._status(service)).SerializeToString())
            await asyncio.shield(changed)

    def announce(self, *, is_serving: bool) -> None:
        """Say from now on whether calls can be answered, unless the server stops."""
        before, self._is_serving = self._is_serving, is_serving and not self._is_stopping
        if self._is_serving is before:
            return
        self._changed.set_result(None)
        self._changed = asyncio.get_running_loop().create_future()

    def stop(self) -> None:
        """Say from now on that nothing is served."""
        self._is_stopping = True
        self.announce(is_serving=False)

    def _status(self, service: str) -> pb.HealthCheckResponse.ServingStatus.ValueType:
        if service not in self._services:
            return pb.HealthCheckResponse.SERVICE_UNKNOWN
        return _SERVING if self._is_serving else _NOT_SERVING
