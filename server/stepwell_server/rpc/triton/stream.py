"""ModelStreamInfer: requests in, replies out in the order of the requests, as Triton does it.

The reader queues each request at its sequence and starts a task for it. So requests of different sequences run concurrently,
and those of one sequence wait for each other. The writer sends the replies in the order of the requests. A failed request is
answered with its error, and the stream continues. Reading pauses while too many requests, or too many bytes of requests and
replies, are held.
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
    from stepwell_server.rpc.triton.sequences import QueuePosition

Infer = Callable[[pb.ModelInferRequest, "QueuePosition | None"], Awaitable[pb.ModelInferResponse]]
Enter = Callable[[pb.ModelInferRequest], "QueuePosition | None"]
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
        """Tasks of unanswered requests in order, with the bytes and the arrival time of each request."""
        self._held_bytes = 0
        """Bytes of unanswered requests and unsent replies."""
        self._is_stopping = False
        self._work = asyncio.Event()
        """Wakes the writer: a request arrived, or no more will."""
        self._room = asyncio.Event()
        """Wakes the reader: a reply was sent."""

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
            # Their own errors have either been sent or come too late to matter.
            await asyncio.gather(reader, *tasks, return_exceptions=True)

    def stop(self) -> None:
        """End the stream with UNAVAILABLE as soon as its requests are answered."""
        self._is_stopping = True
        self._work.set()

    async def _read(self) -> None:
        while (raw := await self._call.read()) is not None:
            request = parse(pb.ModelInferRequest, raw)
            position = self._enter(request)
            task = asyncio.create_task(self._answer(request, position))
            if position is not None:  # a task that is cancelled before it starts runs no code
                task.add_done_callback(position.leave)
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

    async def _answer(self, request: pb.ModelInferRequest, position: QueuePosition | None) -> bytes:
        try:
            response = pb.ModelStreamInferResponse(infer_response=await self._infer(request, position))
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
