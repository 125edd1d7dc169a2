"""GRPCInferenceService: convert, delegate, convert back."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from google.protobuf import empty_pb2
from google.protobuf.message import Message

from stepwell_server.core.callers import Role
from stepwell_server.errors import ModelNotFound, Unsupported
from stepwell_server.rpc import tenancy
from stepwell_server.rpc.boundary import Boundary, Serve
from stepwell_server.rpc.fronts.base import Call
from stepwell_server.rpc.status import UNSUPPORTED_CODES
from stepwell_server.rpc.steps.stream import Streams
from stepwell_server.rpc.triton.columns import ColumnInference
from stepwell_server.rpc.triton.infer import Inference
from stepwell_server.rpc.triton.inference import service_pb2 as pb
from stepwell_server.rpc.triton.metadata import model_config, model_metadata, server_metadata
from stepwell_server.rpc.triton.stream import InferStream

if TYPE_CHECKING:
    from stepwell_server.clock import Clock
    from stepwell_server.engine.engine import Engine
    from stepwell_server.rpc.boundary import RequestObserver
    from stepwell_server.rpc.steps.stream import StreamLimits
    from stepwell_server.rpc.triton.repository import Repository
    from stepwell_server.rpc.triton.statistics import PassObserver

SERVICE = pb.DESCRIPTOR.services_by_name["GRPCInferenceService"]


class Liveness:
    """ServerLive and ServerReady, which are answered before there is an engine. Lives on the event loop."""

    def __init__(self, is_ready: Callable[[], bool]) -> None:
        self.is_ready = is_ready
        """Whether the server takes requests."""

    async def server_live(self, _request: pb.ServerLiveRequest, _call: Call) -> pb.ServerLiveResponse:
        """Whether the process runs."""
        return pb.ServerLiveResponse(live=True)

    async def server_ready(self, _request: pb.ServerReadyRequest, _call: Call) -> pb.ServerReadyResponse:
        """Whether requests are taken."""
        return pb.ServerReadyResponse(ready=self.is_ready())


class TritonServicer(Liveness):
    """The calls of GRPCInferenceService, each by its name in snake case. Lives on the event loop."""

    def __init__(
        self,
        engine: Engine,
        clock: Clock,
        max_reply_bytes: int,
        limits: StreamLimits,
        observer: RequestObserver,
        passes: PassObserver,
        repository: Repository,
        is_ready: Callable[[], bool],
    ) -> None:
        super().__init__(is_ready)
        self.repository_index = repository.index
        self.repository_model_load, self.repository_model_unload = repository.load, repository.unload
        self._engine = engine
        self._limits = limits
        self._observer = observer
        self._inference = Inference(engine, clock, max_reply_bytes, passes)
        self._models = self._inference.models
        self._streams = Streams()
        self.wire = ColumnInference(self._inference).wire
        """How requests are served that come as columns."""
        self.refuse_streams = self._streams.refuse
        """End each stream that begins from now on with UNAVAILABLE, before anything of it is read."""
        self.stop = self._streams.stop
        """End each stream with UNAVAILABLE as soon as its requests are answered."""
        self.wait_idle = self._inference.wait_idle
        """Return when the requests are answered that no call serves."""

    async def model_ready(self, request: pb.ModelReadyRequest, _call: Call) -> pb.ModelReadyResponse:
        """Whether a model takes requests."""
        try:
            self._models.find(request.name, request.version)
        except ModelNotFound:
            return pb.ModelReadyResponse(ready=False)
        return pb.ModelReadyResponse(ready=self.is_ready())

    async def server_metadata(
        self, _request: pb.ServerMetadataRequest, _call: Call
    ) -> pb.ServerMetadataResponse:
        """Describe the server."""
        return server_metadata()

    async def model_metadata(self, request: pb.ModelMetadataRequest, _call: Call) -> pb.ModelMetadataResponse:
        """Describe a model's inputs and outputs."""
        model = self._models.find(request.name, request.version)
        versions = [model.version] if request.version else self._versions(model.name)
        return model_metadata(model.name, versions, model.program, model.tensors)

    async def model_config(self, request: pb.ModelConfigRequest, _call: Call) -> pb.ModelConfigResponse:
        """Describe a model as Triton's configuration would."""
        model = self._models.find(request.name, request.version)
        versions, idle_s = self._versions(model.name), self._engine.max_session_idle_s
        config = model_config(model.name, versions, model.program, model.tensors, idle_s)
        return pb.ModelConfigResponse(config=config)

    def _versions(self, name: str) -> list[int]:
        return [model.version for model in self._models.all(name)]

    async def model_statistics(
        self, request: pb.ModelStatisticsRequest, call: Call
    ) -> pb.ModelStatisticsResponse:
        """Statistics of one version, of a model's versions, or of all. They count all tenants: only admins get them."""
        if request.name and request.version:
            models = [self._models.find(request.name, request.version)]
        else:
            names = [request.name] if request.name else self._engine.model_names()
            models = [model for name in names for model in self._models.all(name)]
        if call.who.role is Role.ADMIN:
            found = [model.statistics.message() for model in models]
        else:
            found = [pb.ModelStatistics(name=model.name, version=str(model.version)) for model in models]
        return pb.ModelStatisticsResponse(model_stats=found)

    async def model_infer(self, request: pb.ModelInferRequest, call: Call) -> pb.ModelInferResponse:
        """Run a model once."""
        return await self._inference.infer(request, call)

    async def model_stream_infer(self, call: Call) -> None:
        """Run models, request by request."""
        tenancy.namespace_of(call.who)  # raises where no sequence can be named
        stream = InferStream(
            lambda request: self._inference.enter(request, call.who),
            lambda request, position: self._inference.infer(request, call, position),
            self._limits,
            self._observer,
            call,
        )
        await self._streams.run(stream)


_SHARED_MEMORY = "shared memory is not supported; send tensors in the messages"
_REASONS = {
    "SystemSharedMemoryStatus": _SHARED_MEMORY,
    "SystemSharedMemoryRegister": _SHARED_MEMORY,
    "SystemSharedMemoryUnregister": _SHARED_MEMORY,
    "CudaSharedMemoryStatus": _SHARED_MEMORY,
    "CudaSharedMemoryRegister": _SHARED_MEMORY,
    "CudaSharedMemoryUnregister": _SHARED_MEMORY,
    "TraceSetting": "request tracing is not supported",
    "LogSettings": "log settings are made when the server starts: --log-level, --log-format",
}


def unsupported_methods(boundary: Boundary) -> Mapping[str, Serve]:
    """The methods that are refused, by name. Their requests are not looked at."""
    return {name: _refuse(boundary, name, reason) for name, reason in _REASONS.items()}


def _refuse(boundary: Boundary, method: str, reason: str) -> Serve:
    async def behaviour(_request: Any, _call: Call) -> Message:
        raise Unsupported(f"{method}: {reason}")

    return boundary.unary(method, behaviour, empty_pb2.Empty, UNSUPPORTED_CODES)
