"""One inference request from message to message: a step of a sequence, or a prediction."""

from __future__ import annotations

import asyncio
import functools
import time
from collections.abc import Callable, Coroutine
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

from stepwell_server.core.callers import Caller
from stepwell_server.engine.api import Applied, Predicted
from stepwell_server.errors import ServerError
from stepwell_server.rpc import naming
from stepwell_server.rpc.steps.messages import REPLY_BYTES
from stepwell_server.rpc.triton.errors import translated
from stepwell_server.rpc.triton.inference import service_pb2 as pb
from stepwell_server.rpc.triton.parameters import read_parameters, read_sequence_id
from stepwell_server.rpc.triton.sequences import SequenceRequest, Sequences, Turn, session_id_of
from stepwell_server.rpc.triton.statistics import PassObserver
from stepwell_server.rpc.triton.tensors import write_outputs
from stepwell_server.rpc.triton.versions import InferModels, Read, Reading

if TYPE_CHECKING:
    from stepwell_server.clock import Clock
    from stepwell_server.engine.engine import Engine
    from stepwell_server.rpc.fronts.base import Call


_T = TypeVar("_T")
Answer = Applied | Predicted
"""The engine's reply to a step of a sequence, or to a prediction."""


class Origin(NamedTuple):
    """Where a request comes from that a front has read by itself: as `Call` has it."""

    caller: str
    who: Caller
    deadline: float


class Inference:
    """Answers inference requests. Lives on the event loop."""

    def __init__(self, engine: Engine, clock: Clock, max_reply_bytes: int, observer: PassObserver) -> None:
        self._engine = engine
        self._clock = clock
        self._max_reply_bytes = max_reply_bytes
        self.sequences = Sequences(engine, clock)
        self.models = InferModels(engine, observer)
        self._running: set[asyncio.Task[None]] = set()
        """Work on requests that no call serves."""

    def enter(self, request: pb.ModelInferRequest, who: Caller) -> Turn | None:
        """Its place in the line of its sequence: the order of requests is that in which they got one. None: it needs none."""
        sequence_id = read_sequence_id(request.parameters)
        if sequence_id is None:
            return None
        return self.sequences.enter(naming.inner(who, session_id_of(request.model_name, sequence_id)))

    async def infer(
        self, request: pb.ModelInferRequest, call: Call, turn: Turn | None = None
    ) -> pb.ModelInferResponse:
        """The response to a request, which came with `call`, or on it. Otherwise as `serve`."""
        turn = turn or self.enter(request, call.who)
        return await self.serve(request, call, turn, functools.partial(_response, request))

    async def serve(
        self,
        request: pb.ModelInferRequest,
        origin: Origin | Call,
        turn: Turn | None,
        write: Callable[[Read, Answer], _T],
    ) -> _T:
        """Serve a request, which may set itself a shorter deadline.

        Args:
            request: What is asked.
            origin: Where it comes from.
            turn: As `enter` gave it; it is left.
            write: Makes the answer of what was read and of the engine's reply: what it returns is returned.

        Raises:
            ServerError: in Triton's words where it has some; nothing changed.
        """
        try:
            reading = Reading(self.models, request)
            try:
                read, reply = await self._reply(reading, request, origin, turn)
                answer = write(read, reply)
            except BaseException:
                reading.model.statistics.failed(reading.timing, time.perf_counter_ns())
                raise
        finally:
            if turn is not None:
                turn.leave()
        reading.model.statistics.succeeded(
            reading.timing,
            time.perf_counter_ns(),
            now_s=self._clock.now(),
            rows=read.inputs.rows,
            steps=read.inputs.steps,
        )
        return answer

    def run(self, work: Coroutine[Any, Any, None], turn: Turn) -> None:
        """Run the work of a request that no call serves, and leave its turn when that ends."""
        task = asyncio.create_task(work)
        self._running.add(task)
        task.add_done_callback(self._running.discard)
        task.add_done_callback(turn.leave)

    async def wait_idle(self) -> None:
        """Return as soon as no such work is running."""
        while self._running:
            await asyncio.wait(self._running)

    async def _reply(
        self, reading: Reading, request: pb.ModelInferRequest, call: Origin | Call, turn: Turn | None
    ) -> tuple[Read, Answer]:
        name, timing = request.model_name, reading.timing
        parameters = read_parameters(name, request.parameters, keeps_state=bool(reading.model.program.state))
        deadline = call.deadline
        if parameters.timeout_us:
            deadline = min(deadline, self._clock.monotonic() + parameters.timeout_us / 1e6)
        try:
            if parameters.sequence_id is None or turn is None:
                read = reading.read()
                predicted = await self._engine.predict(
                    f"{name}@{read.model.version}",
                    read.inputs.arrays,
                    deadline=deadline,
                    source=call.caller,
                    who=call.who,
                    reply_limit=self._max_reply_bytes,
                    reply_bytes=REPLY_BYTES,
                )
                timing.run = time.perf_counter_ns()
                return read, predicted
            reply, read = await self.sequences.step(
                SequenceRequest(
                    model=name,
                    reading=reading,
                    sequence_id=parameters.sequence_id,
                    turn=turn,
                    parameters=parameters,
                    deadline=deadline,
                    source=call.caller,
                    who=call.who,
                    max_reply_bytes=self._max_reply_bytes,
                )
            )
        except ServerError as error:
            raise translated(error, parameters.sequence_id, name) from error
        timing.run = time.perf_counter_ns()
        return reading.answered(read, reply.version, reply.outputs.keys()), reply


def _response(request: pb.ModelInferRequest, read: Read, reply: Answer) -> pb.ModelInferResponse:
    version = reply.version if isinstance(reply, Applied) else read.model.version
    response = pb.ModelInferResponse(model_name=request.model_name, model_version=str(version), id=request.id)
    write_outputs(response, read.outputs, reply.outputs)
    if isinstance(reply, Applied):
        response.parameters["stepwell_revision"].int64_param = reply.revision
        response.parameters["stepwell_position"].int64_param = reply.position
        if reply.replayed:
            response.parameters["stepwell_replayed"].bool_param = True
    return response
