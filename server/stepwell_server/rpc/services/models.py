"""The calls of ModelService."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple, Protocol

from stepwell.v1 import models_pb2 as pb
from stepwell_server.core.callers import Role
from stepwell_server.errors import InvalidInput
from stepwell_server.rpc import convert, tenancy, tensors
from stepwell_server.rpc.steps.messages import REPLY_BYTES

if TYPE_CHECKING:
    from stepwell_server.catalog.catalog import Catalog
    from stepwell_server.clock import Clock
    from stepwell_server.engine.engine import Engine
    from stepwell_server.rpc.fronts.base import Call


MAX_SLOW_SESSIONS = 100
"""The limit of ListSlowSessions. Its source keeps at least this many."""
_SLOW_SESSIONS = 10
"""Number of sessions that it lists by default."""


class SlowStep(NamedTuple):
    """The slowest recent step of a session."""

    seconds: float
    session_id: str
    model: str
    when: float
    """Time of the reply, on the monotonic clock."""


class SlowSteps(Protocol):
    """The sessions with slow steps."""

    def list(self, now: float) -> Sequence[SlowStep]:
        """Return one step per session, the slowest first."""


class ModelServicer:
    """The calls of ModelService, each by its name in snake case. Lives on the event loop."""

    def __init__(
        self,
        engine: Engine,
        server: pb.Server,
        max_reply_bytes: int,
        slow_steps: SlowSteps,
        clock: Clock,
        control: Catalog | None = None,
    ) -> None:
        """`server` describes the server, without the role of a caller. `control` loads models; None: no models are loaded later."""
        self._control = control
        self._slow_steps = slow_steps
        self._clock = clock
        self._engine = engine
        self._server = server
        self._max_reply_bytes = max_reply_bytes

    async def list_models(self, _request: pb.ListModelsRequest, call: Call) -> pb.ListModelsResponse:
        """List the models, and describe the server."""
        await self._engine.refresh_counts()
        counted = call.who.role is Role.ADMIN
        statuses = {} if self._control is None else self._control.statuses()
        infos = self._engine.models()
        models = [
            convert.from_model(info, counted=counted, statuses=statuses.get(info.name, ())) for info in infos
        ]
        for name in statuses.keys() - {info.name for info in infos}:
            versions = [convert.from_version(status, counted=counted) for status in statuses[name]]
            models.append(pb.Model(name=name, versions=versions))
        models.sort(key=lambda model: model.name)
        server = pb.Server(role=call.who.role.value)
        server.MergeFrom(self._server)
        if not counted:
            server.ClearField("metrics_address")
        return pb.ListModelsResponse(models=models, server=server)

    async def get_model(self, request: pb.GetModelRequest, call: Call) -> pb.GetModelResponse:
        """Describe a model."""
        return pb.GetModelResponse(model=await self.described(request.name, call))

    async def described(self, ref: str, call: Call) -> pb.Model:
        """Describe a model or a version of it, as far as the caller may see it.

        Raises:
            ModelNotFound, VersionNotFound: it does not exist.
        """
        await self._engine.refresh_counts()
        info = self._engine.model(ref)
        return convert.from_model(
            info,
            counted=call.who.role is Role.ADMIN,
            statuses=() if self._control is None else self._control.status(info.name),
        )

    async def list_slow_sessions(
        self, request: pb.ListSlowSessionsRequest, call: Call
    ) -> pb.ListSlowSessionsResponse:
        """List the sessions with slow steps in the caller's tenant."""
        if request.limit > MAX_SLOW_SESSIONS:
            raise InvalidInput(f"limit must be at most {MAX_SLOW_SESSIONS}; got {request.limit}")
        return pb.ListSlowSessionsResponse(sessions=self.slow_sessions(call, request.limit or _SLOW_SESSIONS))

    def slow_sessions(self, call: Call, limit: int) -> list[pb.SlowSession]:
        """Return the sessions with the slowest steps in the caller's tenant."""
        now, tenant = self._clock.monotonic(), tenancy.tenant_filter(call.who, "")
        own = [
            step
            for step in self._slow_steps.list(now)
            if tenant is None or tenancy.tenant_of(step.session_id) == tenant
        ]
        return [
            pb.SlowSession(
                session_id=tenancy.external_id(step.session_id),
                tenant=tenancy.shown_tenant(call.who, step.session_id),
                model=step.model,
                seconds=step.seconds,
                age_seconds=now - step.when,
            )
            for step in own[:limit]
        ]

    async def predict(self, request: pb.PredictRequest, call: Call) -> pb.PredictResponse:
        """Run a model without a session."""
        inputs = tensors.to_arrays(request.inputs, "inputs")
        as_values = tensors.wants_values(request.tensor_format, request.inputs)
        predicted = await self._engine.predict(
            request.model,
            inputs,
            tensors.to_optional_arrays(request.state, "state"),
            reset=tensors.to_mask(request.reset_mask),
            deadline=call.deadline,
            source=call.caller,
            caller=call.who,
            reply_limit=tensors.reply_limit(self._max_reply_bytes, as_values=as_values),
            reply_bytes=REPLY_BYTES,
        )
        response = pb.PredictResponse(model_version=predicted.version)
        tensors.add_tensors(response.outputs, predicted.outputs, as_values=as_values)
        tensors.add_tensors(response.state, predicted.state, as_values=as_values)
        return response
