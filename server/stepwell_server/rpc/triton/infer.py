"""Serves inference requests: a step of a sequence, or a prediction."""

from __future__ import annotations

import asyncio
import functools
import time
from collections.abc import Callable, Coroutine
from typing import TYPE_CHECKING, Any, TypeVar

from stepwell_server.core.callers import Caller
from stepwell_server.engine.api import ChangeResult, PredictResult
from stepwell_server.errors import ServerError
from stepwell_server.rpc import tenancy
from stepwell_server.rpc.steps.messages import REPLY_BYTES
from stepwell_server.rpc.triton.errors import translated
from stepwell_server.rpc.triton.inference import service_pb2 as pb
from stepwell_server.rpc.triton.request import Origin, Request, read_sequence_id
from stepwell_server.rpc.triton.sequences import QueuePosition, Sequences, session_id_of
from stepwell_server.rpc.triton.statistics import PassObserver, Timing
from stepwell_server.rpc.triton.tensors import write_outputs
from stepwell_server.rpc.triton.versions import InferModel, InferModels, Read

if TYPE_CHECKING:
    from stepwell_server.clock import Clock
    from stepwell_server.engine.engine import Engine
    from stepwell_server.rpc.fronts.base import Call


_T = TypeVar("_T")
Answer = ChangeResult | PredictResult
"""The engine's reply to a step of a sequence, or to a prediction."""


class Inference:
    """Answers inference requests. Lives on the event loop."""

    def __init__(self, engine: Engine, clock: Clock, max_reply_bytes: int, observer: PassObserver) -> None:
        self._engine = engine
        self._clock = clock
        self._max_reply_bytes = max_reply_bytes
        self.sequences = Sequences(engine, clock, max_reply_bytes)
        self.models = InferModels(engine, observer)
        self._running: set[asyncio.Task[None]] = set()
        """Tasks for requests that have no call."""

    def enter(self, message: pb.ModelInferRequest, who: Caller) -> QueuePosition | None:
        """Return a position in the queue of the request's sequence; None: the request has no sequence."""
        sequence_id = read_sequence_id(message.parameters)
        if not sequence_id:
            return None
        return self.sequences.enter(tenancy.internal_id(who, session_id_of(message.model_name, sequence_id)))

    async def infer(
        self, message: pb.ModelInferRequest, call: Call, position: QueuePosition | None = None
    ) -> pb.ModelInferResponse:
        """Return the response to a request of a call, or on a stream. Otherwise like `serve`."""
        position = position or self.enter(message, call.who)
        return await self.serve(message, call, position, functools.partial(_response, message))

    async def serve(
        self,
        message: pb.ModelInferRequest,
        origin: Origin | Call,
        position: QueuePosition | None,
        write: Callable[[Read, Answer], _T],
    ) -> _T:
        """Serve a request, which may set itself a shorter deadline.

        Args:
            message: What is asked.
            origin: Where it comes from.
            position: The result of `enter`. It is left at the end.
            write: Makes the answer of what was read and of the engine's reply: what it returns is returned.

        Raises:
            ServerError: in Triton's words where it has some; nothing changed.
        """
        try:
            request = Request(self.models, message, origin, position)
            try:
                read, reply = await self._reply(request)
                answer = write(read, reply)
            except BaseException:
                request.model.statistics.failed(request.timing, time.perf_counter_ns())
                raise
        finally:
            if position is not None:
                position.leave()
        self.succeeded(request.model, request.timing, rows=read.inputs.rows, steps=read.inputs.steps)
        return answer

    def succeeded(self, model: InferModel, timing: Timing, *, rows: int, steps: int, count: int = 1) -> None:
        """Count answered requests: see `RequestStatistics`."""
        now_s, done = self._clock.now(), time.perf_counter_ns()
        model.statistics.succeeded(timing, done, now_s=now_s, rows=rows, steps=steps, count=count)

    def run(self, work: Coroutine[Any, Any, None], position: QueuePosition) -> None:
        """Run the work of a request that has no call, and leave its position at the end."""
        task = asyncio.create_task(work)
        self._running.add(task)
        task.add_done_callback(self._running.discard)
        task.add_done_callback(position.leave)

    async def wait_idle(self) -> None:
        """Return as soon as no such work is running."""
        while self._running:
            await asyncio.wait(self._running)

    async def _reply(self, request: Request) -> tuple[Read, Answer]:
        request.read_parameters(self._clock.monotonic())
        reply: Answer
        try:
            if request.position is not None:
                read, reply = await self.sequences.step(request, request.position)
            else:
                read, reply = await self._predict(request)
        except ServerError as error:
            raise translated(error, request.parameters.sequence_id, request.name) from error
        request.timing.run = time.perf_counter_ns()
        return request.answered(read, reply.version, reply.outputs.keys()), reply

    async def _predict(self, request: Request) -> tuple[Read, Answer]:
        read = request.read()
        predicted = await self._engine.predict(
            f"{request.name}@{read.model.version}",
            read.inputs.arrays,
            deadline=request.deadline,
            source=request.caller,
            caller=request.who,
            reply_limit=self._max_reply_bytes,
            reply_bytes=REPLY_BYTES,
        )
        return read, predicted


def _response(message: pb.ModelInferRequest, read: Read, reply: Answer) -> pb.ModelInferResponse:
    response = pb.ModelInferResponse(
        model_name=message.model_name, model_version=str(reply.version), id=message.id
    )
    write_outputs(response, read.outputs, reply.outputs)
    if isinstance(reply, ChangeResult):
        response.parameters["stepwell_revision"].int64_param = reply.revision
        response.parameters["stepwell_position"].int64_param = reply.position
        if reply.replayed:
            response.parameters["stepwell_replayed"].bool_param = True
    return response
