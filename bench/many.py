"""A client for very many sessions: it knows their ids and how often it was told that each was stepped, no more."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence
from typing import Any, Self

import grpc.aio
import numpy as np
import numpy.typing as npt

from bench.harness import MODELS
from bench.loads import tensor
from stepwell.v1 import sessions_pb2 as pb

_SERVICE = "/stepwell.v1.SessionService/"
_NO_LIMIT = [("grpc.max_receive_message_length", -1), ("grpc.max_send_message_length", -1)]
_TIMEOUT_S = 60.0
OPEN_BATCH_SIZE = 10_000

Places = npt.NDArray[np.intp]
"""Sessions, by their place among the client's."""


class ManySessions:
    """The sessions and the calls. Lives on one event loop."""

    def __init__(self, address: str, model: str = "small", *, at_most: int) -> None:
        self._address, self._model = address, model
        self._features = MODELS[model][1]
        self.ids: list[str] = []
        self.made = np.zeros(at_most, np.int64)
        """Steps that were answered, by session."""
        self._one = tensor(1, self._features)

    async def __aenter__(self) -> Self:
        self.connect()
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._channel.close()

    def connect(self) -> None:
        """Connect; again after the server was started again."""
        # a channel that lost its server waits before it tries again, and would be measured waiting
        options = [*_NO_LIMIT, ("grpc.use_local_subchannel_pool", 1)]
        self._channel = grpc.aio.insecure_channel(self._address, options=options)

    async def reconnect(self) -> None:
        """Forget the connection and make another."""
        await self._channel.close()
        self.connect()

    async def _call(self, method: str, request: Any, response: Any) -> Any:
        call: Any = self._channel.unary_unary(
            _SERVICE + method,
            request_serializer=type(request).SerializeToString,
            response_deserializer=response.FromString,
        )
        return await call(request, timeout=_TIMEOUT_S)

    # ----------------------------------------------------------------------------------------------------- opening

    async def open(self, count: int, prefix: str = "") -> float:
        """Open sessions in one call; return its seconds. The server makes their IDs, unless they get a prefix."""
        request = pb.OpenSessionsRequest(model=self._model)
        if prefix:
            request.session_ids.extend(f"{prefix}{number}" for number in range(count))
        else:
            request.count = count
        began = time.perf_counter()
        opened = await self._call("OpenSessions", request, pb.OpenSessionsResponse)
        self.ids += opened.session_ids
        return time.perf_counter() - began

    # ---------------------------------------------------------------------------------------------------- stepping

    async def step(self, place: int) -> float:
        """Step one session by a call of its own; return the seconds."""
        request = pb.StepRequest(session_id=self.ids[place], inputs=[self._one])
        began = time.perf_counter()
        await self._call("Step", request, pb.StepResponse)
        taken = time.perf_counter() - began
        self.made[place] += 1
        return taken

    async def frames(self, rng: np.random.Generator, rows: int, among: Places | int, until: float) -> int:
        """Send frames of random sessions on a stream, one after the other, until a time; return the steps made.

        Args:
            rng: Draws the sessions.
            rows: Sessions of a frame.
            among: Those that are drawn from, or how many of all.
            until: On `time.perf_counter`.
        """
        stream: Any = self._channel.stream_stream(
            f"{_SERVICE}StepStream",
            request_serializer=pb.StepStreamRequest.SerializeToString,
            response_deserializer=pb.StepStreamResponse.FromString,
        )()
        inputs, sizes, steps = tensor(rows, self._features), [1] * rows, 0
        try:
            while time.perf_counter() < until:
                places = rng.choice(among, rows, replace=False, shuffle=False)
                await self._frame(stream, places, inputs, sizes)
                steps += rows
        finally:
            stream.cancel()
        return steps

    async def _frame(self, stream: Any, places: Places, inputs: Any, sizes: list[int]) -> None:
        ids = [self.ids[place] for place in places.tolist()]
        frame = pb.StepFrame(session_ids=ids, inputs=[inputs], batch_sizes=sizes)
        await stream.write(pb.StepStreamRequest(frame_id=1, step=frame))
        while True:
            reply = await stream.read()
            if reply is grpc.aio.EOF:
                raise RuntimeError(f"a stream ended: {await stream.details()}")
            if reply.errors:
                raise RuntimeError(f"a step failed: {reply.errors[0].error.message}")
            self.made[places if reply.all_members else places[list(reply.members)]] += 1
            if reply.last:
                return

    async def step_all(self, places: Places, rows: int) -> None:
        """Step sessions once, in frames."""
        stream: Any = self._channel.stream_stream(
            f"{_SERVICE}StepStream",
            request_serializer=pb.StepStreamRequest.SerializeToString,
            response_deserializer=pb.StepStreamResponse.FromString,
        )()
        try:
            for start in range(0, len(places), rows):
                some = places[start : start + rows]
                inputs = tensor(len(some), self._features)
                await self._frame(stream, some, inputs, [1] * len(some))
        finally:
            stream.cancel()

    # ----------------------------------------------------------------------------------------------------- reading

    async def session(self, place: int) -> pb.Session:
        """What the server says of a session."""
        found: pb.GetSessionResponse = await self._call(
            "GetSession", pb.GetSessionRequest(session_id=self.ids[place]), pb.GetSessionResponse
        )
        return found.session

    async def page(
        self, token: str = "", prefix: str = "", **fields: Any
    ) -> tuple[float, pb.ListSessionsResponse]:
        """A page of the list of sessions: its seconds, and what came."""
        request = pb.ListSessionsRequest(page_token=token, session_id_prefix=prefix, **fields)
        began = time.perf_counter()
        page = await self._call("ListSessions", request, pb.ListSessionsResponse)
        return time.perf_counter() - began, page

    async def close_matching(self, prefix: str) -> int:
        """Close the sessions whose ids begin so; how many there were."""
        request = pb.CloseMatchingSessionsRequest(session_id_prefix=prefix, page_size=2000)
        closed = 0
        while True:
            reply: pb.CloseMatchingSessionsResponse = await self._call(
                "CloseMatchingSessions", request, pb.CloseMatchingSessionsResponse
            )
            closed += reply.closed
            request.page_token = reply.next_page_token
            if not request.page_token:
                return closed


class Watch:
    """Steps one session every few milliseconds while something else goes on: how long others are held up."""

    def __init__(self, many: ManySessions, place: int, every_s: float = 0.005) -> None:
        self._many, self._place, self._every_s = many, place, every_s
        self.latencies: list[float] = []

    async def __aenter__(self) -> Self:
        self._task = asyncio.create_task(self._run())
        return self

    async def __aexit__(self, *_: object) -> None:
        self._stopping = True
        await self._task

    _stopping = False

    async def _run(self) -> None:
        while not self._stopping:
            self.latencies.append(await self._many.step(self._place))
            await asyncio.sleep(self._every_s)


def quantile_ms(latencies_s: Sequence[float], share: float) -> float:
    """A quantile of latencies, in milliseconds."""
    return float(np.quantile(latencies_s, share)) * 1e3
