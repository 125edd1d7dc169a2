"""One inference request from message to message: a step of a sequence, or a prediction."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from stepwell_server.core.callers import Caller
from stepwell_server.engine.api import Applied
from stepwell_server.engine.types import Array
from stepwell_server.errors import ServerError
from stepwell_server.rpc import naming
from stepwell_server.rpc.steps.messages import REPLY_BYTES
from stepwell_server.rpc.triton.errors import translated
from stepwell_server.rpc.triton.inference import service_pb2 as pb
from stepwell_server.rpc.triton.parameters import read_parameters, read_sequence_id
from stepwell_server.rpc.triton.sequences import SequenceRequest, Sequences, Turn, session_id_of
from stepwell_server.rpc.triton.statistics import PassObserver
from stepwell_server.rpc.triton.tensors import Inputs, Tensor, write_outputs
from stepwell_server.rpc.triton.versions import InferModels, Reading

if TYPE_CHECKING:
    from stepwell_server.clock import Clock
    from stepwell_server.engine.engine import Engine
    from stepwell_server.rpc.fronts.base import Call


class Inference:
    """Answers inference requests. Lives on the event loop."""

    def __init__(self, engine: Engine, clock: Clock, max_reply_bytes: int, observer: PassObserver) -> None:
        self._engine = engine
        self._clock = clock
        self._max_reply_bytes = max_reply_bytes
        self.sequences = Sequences(engine, clock)
        self.models = InferModels(engine, observer)

    def enter(self, request: pb.ModelInferRequest, who: Caller) -> Turn | None:
        """Its place in the line of its sequence: the order of requests is that in which they got one. None: it needs none."""
        sequence_id = read_sequence_id(request.parameters)
        if sequence_id is None:
            return None
        return self.sequences.enter(naming.inner(who, session_id_of(request.model_name, sequence_id)))

    async def infer(
        self, request: pb.ModelInferRequest, call: Call, turn: Turn | None = None
    ) -> pb.ModelInferResponse:
        """Answer a request, which may set itself a shorter deadline.

        Args:
            request: What is asked.
            call: Which it came with, or on.
            turn: As `enter` gave it, where that was done before; it is left.

        Raises:
            ServerError: in Triton's words where it has some; nothing changed.
        """
        turn = turn or self.enter(request, call.who)
        try:
            return await self._counted(request, call, turn)
        finally:
            if turn is not None:
                turn.leave()

    async def _counted(
        self, request: pb.ModelInferRequest, call: Call, turn: Turn | None
    ) -> pb.ModelInferResponse:
        reading = Reading(self.models, request)
        try:
            response, inputs = await self._infer(reading, request, call, turn)
        except BaseException:
            reading.model.statistics.failed(reading.timing, time.perf_counter_ns())
            raise
        reading.model.statistics.succeeded(
            reading.timing,
            time.perf_counter_ns(),
            now_s=self._clock.now(),
            rows=inputs.rows,
            steps=inputs.steps,
        )
        return response

    async def _infer(
        self, reading: Reading, request: pb.ModelInferRequest, call: Call, turn: Turn | None
    ) -> tuple[pb.ModelInferResponse, Inputs]:
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
                return _response(request, read.model.version, read.outputs, predicted.outputs), read.inputs
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
        read = reading.answered(read, reply.version, reply.outputs.keys())
        response = _response(request, reply.version, read.outputs, reply.outputs)
        _tell_revision(response, reply)
        return response, read.inputs


def _response(
    request: pb.ModelInferRequest, version: int, tensors: Sequence[Tensor], outputs: Mapping[str, Array]
) -> pb.ModelInferResponse:
    response = pb.ModelInferResponse(model_name=request.model_name, model_version=str(version), id=request.id)
    write_outputs(response, tensors, outputs)
    return response


def _tell_revision(response: pb.ModelInferResponse, reply: Applied) -> None:
    response.parameters["stepwell_revision"].int64_param = reply.revision
    response.parameters["stepwell_position"].int64_param = reply.position
    if reply.replayed:
        response.parameters["stepwell_replayed"].bool_param = True
