"""ModelStreamInfer: requests in, replies out in the order of the requests, as Triton does it.

The reader takes the place of each request in its sequence's line, and starts a task for it, so requests of different
sequences run together; those of one sequence wait for each other. The writer sends the answers in the order in which the requests came. A
request that fails is answered with its error, and the stream continues. Reading stops while too many requests,
or too many bytes of them and their answers, are held.
"""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import Awaitable, Callable
from typing import TYPE_CHECKING

import numpy as np

from stepwell_server.errors import ServerError, Stopping, release_frames
from stepwell_server.rpc.boundary import internal, parse
from stepwell_server.rpc.status import message_of
from stepwell_server.rpc.triton.inference import service_pb2 as pb

if TYPE_CHECKING:
    from stepwell_server.rpc.boundary import RequestObserver
    from stepwell_server.rpc.fronts.base import Call
    from stepwell_server.rpc.steps.stream import StreamLimits
    from stepwell_server.rpc.triton.sequences import Turn

Infer = Callable[[pb.ModelInferRequest, "Turn | None"], Awaitable[pb.ModelInferResponse]]
Enter = Callable[[pb.ModelInferRequest], "Turn | None"]
_FINAL_FLAG = "triton_enable_empty_final_response"


class InferStream:
    """One ModelStreamInfer call. Lives on the event loop."""

    def __init__(
        self, enter: Enter, infer: Infer, limits: StreamLimits, observer: RequestObserver, call: Call
    ) -> None:
        self._enter = enter
        self._infer = infer
        self._limits = limits
        self._observer = observer
        self._call = call
        self._answers: deque[tuple[asyncio.Task[bytes], int, float]] = deque()
        """Tasks of unanswered requests in their order, with the bytes of each request and when it came."""
        self._held_bytes = 0
        """Of unanswered requests, and of answers that wait to be sent."""
        self._is_stopping = False
        self._work = asyncio.Event()
        """For the writer: a request came, or no more will come."""
        self._room = asyncio.Event()
        """For the reader: something was answered."""

    async def run(self) -> None:
        """Serve the stream to its end.

        Raises:
            InvalidInput: the client sent bytes that are no request.
            Stopping: the server is stopping, and all requests are answered.
        """
        reader = asyncio.create_task(self._read())
        reader.add_done_callback(lambda _: self._work.set())
        try:
            await self._write(reader)
        finally:
            reader.cancel()
            tasks = [task for task, _, _ in self._answers]
            for task in tasks:
                task.cancel()
            # Their own errors have either been answered or come too late to matter.
            await asyncio.gather(reader, *tasks, return_exceptions=True)

    def stop(self) -> None:
        """End the stream with UNAVAILABLE as soon as its requests are answered."""
        self._is_stopping = True
        self._work.set()

    async def _read(self) -> None:
        while (raw := await self._call.read()) is not None:
            request = parse(pb.ModelInferRequest, raw)
            turn = self._enter(request)
            task = asyncio.create_task(self._answer(request, turn))
            if turn is not None:  # a task that is cancelled before it begins runs nothing of its own
                task.add_done_callback(turn.leave)
            self._answers.append((task, len(raw), time.perf_counter()))
            self._held_bytes += len(raw)
            self._work.set()
            while len(self._answers) >= self._limits.frames or self._held_bytes >= self._limits.bytes:
                self._room.clear()
                await self._room.wait()

    async def _write(self, reader: asyncio.Task[None]) -> None:
        while True:
            while self._answers:
                task, size, came = self._answers[0]
                answer = await task
                await self._call.write(answer)
                self._answers.popleft()
                self._held_bytes -= size + len(answer)
                self._room.set()
                self._observer.messages_done("ModelStreamInfer", np.array([time.perf_counter() - came]))
            if reader.done():
                return reader.result()
            if self._is_stopping:
                raise Stopping("the server is stopping")
            self._work.clear()
            await self._work.wait()

    async def _answer(self, request: pb.ModelInferRequest, turn: Turn | None) -> bytes:
        try:
            response = pb.ModelStreamInferResponse(infer_response=await self._infer(request, turn))
        except Exception as error:
            response = self._error(request, error)
        parameter = request.parameters.get(_FINAL_FLAG)
        if parameter is not None and parameter.bool_param:
            response.infer_response.parameters["triton_final_response"].bool_param = True
        answer = response.SerializeToString()
        self._held_bytes += len(answer)
        return answer

    def _error(self, request: pb.ModelInferRequest, error: Exception) -> pb.ModelStreamInferResponse:
        known = error if isinstance(error, ServerError) else internal(error, method="ModelStreamInfer")
        release_frames(error)
        self._observer.refused(known.reason, 1, request.model_name)
        return pb.ModelStreamInferResponse(
            error_message=message_of(known), infer_response=pb.ModelInferResponse(id=request.id)
        )
