"""Requests of Triton's protocol, made by hand, and an inference on an engine with a fake executor."""

from __future__ import annotations

from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from typing import Any

import numpy as np

from stepwell_server.core.callers import ANYBODY
from stepwell_server.program import Program
from stepwell_server.rpc.triton.infer import Inference
from stepwell_server.rpc.triton.inference import service_pb2 as pb
from stepwell_server.rpc.triton.tensors import of_numpy
from support.engine.harness import Harness, running
from support.rpc.fake_call import FakeCall

Array = np.ndarray[Any, np.dtype[Any]]
MAX_MESSAGE_BYTES = 4096


class NoPasses:
    """A `PassObserver` that has seen nothing."""

    def passes_by_rows(self, model: str) -> Mapping[int, tuple[int, float]]:
        return {}

    def seconds_per_time_step(self, model: str) -> float:
        return 0.0


def request(
    *arrays: Array | tuple[str, Array],
    model: str = "plain",
    sequence_id: int | str | None = None,
    start: bool = False,
    end: bool = False,
    request_id: str = "",
    stateless: bool | None = None,
    **parameters: int,
) -> pb.ModelInferRequest:
    """A request with raw inputs: `x`, or as named. Without a sequence it is a prediction, unless `stateless` is False."""
    made = pb.ModelInferRequest(model_name=model, id=request_id)
    for given in arrays:
        name, array = given if isinstance(given, tuple) else ("x", given)
        datatype = of_numpy(array.dtype.name).name
        made.inputs.add(name=name, datatype=datatype, shape=array.shape)
        made.raw_input_contents.append(array.tobytes())
    if isinstance(sequence_id, str):
        made.parameters["sequence_id"].string_param = sequence_id
    elif sequence_id is not None:
        made.parameters["sequence_id"].int64_param = sequence_id
    if sequence_id is not None:
        made.parameters["sequence_start"].bool_param = start
        made.parameters["sequence_end"].bool_param = end
    if sequence_id is None if stateless is None else stateless:
        made.parameters["stepwell_stateless"].bool_param = True
    for name, value in parameters.items():
        made.parameters[name].int64_param = value
    return made


def outputs_of(response: pb.ModelInferResponse) -> dict[str, Array]:
    """The outputs of a reply, all float32."""
    return {
        tensor.name: np.frombuffer(raw, np.float32).reshape(tuple(tensor.shape))
        for tensor, raw in zip(response.outputs, response.raw_output_contents, strict=True)
    }


class Client:
    """Asks an inference, and reads its replies."""

    def __init__(self, harness: Harness) -> None:
        self.harness = harness
        engine = harness.engine
        self.inference = Inference(engine, harness.clock, MAX_MESSAGE_BYTES, NoPasses())
        self.who = ANYBODY

    async def infer(self, *arrays: Array | tuple[str, Array], **fields: Any) -> pb.ModelInferResponse:
        return await self.send(request(*arrays, **fields))

    async def send(
        self, message: pb.ModelInferRequest, deadline: float = float("inf")
    ) -> pb.ModelInferResponse:
        call = FakeCall(deadline=deadline)
        call.who = self.who
        return await self.inference.infer(message, call)

    async def y(self, *arrays: Array | tuple[str, Array], **fields: Any) -> Array:
        return outputs_of(await self.infer(*arrays, **fields))["y"]

    def sessions(self) -> list[str]:
        """Ids of the live sessions."""
        return self.harness.internals.loaded()


@asynccontextmanager
async def inference(programs: Mapping[str, Program] | None = None, **settings: Any) -> AsyncIterator[Client]:
    """A client of an engine of these programs."""
    async with running(programs, **settings) as harness:
        yield Client(harness)
