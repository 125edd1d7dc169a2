"""grpc.health.v1.Health: whether the server, each service, and each model accepts calls."""

from __future__ import annotations

import asyncio
from collections.abc import Iterable, Mapping
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


MODEL_PREFIX = "stepwell.model/"
"""Followed by NAME or NAME@VERSION, it is the name of a service that is SERVING when that model is ready."""


class HealthServicer:
    """The calls of Health, each by its name in snake case. Lives on the event loop.

    Args:
        services: Names of the services that are SERVING when the server is.
        lists_models: Whether `List` contains the models, which makes their names public.
    """

    def __init__(self, services: Iterable[str], *, lists_models: bool = True) -> None:
        self._services = {"", *services}
        self._lists_models = lists_models
        self._is_serving = self._is_stopping = False
        self._models: dict[str, bool] = {}
        """Whether calls for each model can be answered, by the name of its service."""
        self._changed: asyncio.Future[None] = asyncio.get_running_loop().create_future()

    async def check(self, request: pb.HealthCheckRequest, _call: Call) -> pb.HealthCheckResponse:
        """Return the status of a service."""
        if request.service not in self._services and request.service not in self._models:
            raise ServiceNotFound(
                f"service must be empty, one of {sorted(self._services - {''})}, or {MODEL_PREFIX}NAME or "
                f"{MODEL_PREFIX}NAME@VERSION for a model of this server; got {request.service[:256]!r}"
            )
        return pb.HealthCheckResponse(status=self._status(request.service))

    async def list(self, _request: Any, _call: Call) -> Message:
        """Return the status of all services."""
        names = [*self._services, *(self._models if self._lists_models else ())]
        # newer than the oldest supported grpcio-health-checking
        response: Message = pb.HealthListResponse(  # type: ignore[attr-defined,unused-ignore]
            statuses={name: pb.HealthCheckResponse(status=self._status(name)) for name in names}
        )
        return response

    async def watch(self, call: Call) -> None:
        """Send the status of a service, now and after each change."""
        raw = await call.read()
        service = parse(pb.HealthCheckRequest, b"" if raw is None else raw).service
        last: pb.HealthCheckResponse.ServingStatus.ValueType | None = None
        while True:
            changed, status = self._changed, self._status(service)
            if status != last:
                last = status
                await call.write(pb.HealthCheckResponse(status=status).SerializeToString())
            await asyncio.shield(changed)

    def announce(self, *, is_serving: bool, models: Mapping[str, bool]) -> None:
        """Set the status of the server and of each model. A stopping server stays NOT_SERVING.

        Args:
            is_serving: Whether the server is ready.
            models: Whether each model is ready, by NAME and NAME@VERSION.
        """
        before = self._is_serving, self._models
        self._is_serving = is_serving and not self._is_stopping
        self._models = {
            f"{MODEL_PREFIX}{name}": is_ready and not self._is_stopping for name, is_ready in models.items()
        }
        if before != (self._is_serving, self._models):
            self._changed.set_result(None)
            self._changed = asyncio.get_running_loop().create_future()

    def is_serving(self) -> bool:
        """Whether the server is ready."""
        return self._is_serving

    def stop(self) -> None:
        """Set all statuses to NOT_SERVING for good."""
        self._is_stopping = True
        self.announce(
            is_serving=False, models={name.removeprefix(MODEL_PREFIX): False for name in self._models}
        )

    def _status(self, service: str) -> pb.HealthCheckResponse.ServingStatus.ValueType:
        is_serving = self._is_serving if service in self._services else self._models.get(service)
        if is_serving is None:
            return pb.HealthCheckResponse.SERVICE_UNKNOWN
        return _SERVING if is_serving else _NOT_SERVING
