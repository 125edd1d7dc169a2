"""Unary Step."""

from __future__ import annotations

from typing import TYPE_CHECKING

from stepwell.v1 import sessions_pb2 as pb
from stepwell_server.rpc.boundary import deadline_of
from stepwell_server.rpc.steps import singles as steps

if TYPE_CHECKING:
    from stepwell_server.clock import Clock
    from stepwell_server.engine.engine import Engine
    from stepwell_server.rpc.boundary import Context
    from stepwell_server.rpc.sizes import ReplySizes


class StepCalls:
    """Serves unary steps. Lives on the event loop."""

    def __init__(self, engine: Engine, clock: Clock, sizes: ReplySizes) -> None:
        self._engine = engine
        self._clock = clock
        self._sizes = sizes

    async def serve(self, request: pb.StepRequest, context: Context) -> pb.StepResponse:
        """The reply to a request.

        Cancelling the waiting task cancels the step.

        Raises:
            ServerError: the step failed; nothing changed.
        """
        single = steps.to_single(request)
        self._sizes.step((single.session_id,), single.inputs, single.select)
        single.source, single.deadline = context.peer(), deadline_of(context, self._clock)
        return steps.from_answer(await self._engine.step(single))
