"""A stream and unary calls of one server, without gRPC."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from typing import Any

import numpy as np

from stepwell.v1 import sessions_pb2 as pb
from stepwell.v1 import tensors_pb2
from stepwell_server.rpc.boundary import Boundary
from stepwell_server.rpc.services.sessions import SessionServicer
from stepwell_server.rpc.steps.stream import FrameStream, StreamLimits
from support.engine.harness import Harness, running
from support.rpc.fake_call import FakeCall, Requests

ALL, LAST, NONE = pb.OUTPUT_SELECTION_ALL, pb.OUTPUT_SELECTION_LAST, pb.OUTPUT_SELECTION_NONE
_LIMITS = StreamLimits(frames=1000, bytes=1 << 24)


def tensor(x: Any, name: str = "") -> tensors_pb2.Tensor:
    x = np.asarray(x)
    number = tensors_pb2.DataType.Value(f"DATA_TYPE_{x.dtype.name.upper()}")
    return tensors_pb2.Tensor(name=name, dtype=number, shape=x.shape, data=x.tobytes())


def message(frame_id: int, *session_ids: str, x: Any = None, **fields: Any) -> bytes:
    if x is None:
        x = np.random.default_rng(frame_id).random((len(session_ids), 2), np.float32)
    step = pb.StepFrame(session_ids=session_ids, inputs=[tensor(x)], **fields)
    raw: bytes = pb.StepStreamRequest(frame_id=frame_id, step=step).SerializeToString()
    return raw


def request(session_id: str, x: Any = None, **fields: Any) -> bytes:
    """The request of a unary Step."""
    if x is None:
        x = np.random.default_rng(len(session_id)).random((1, 2), np.float32)
    raw: bytes = pb.StepRequest(session_id=session_id, inputs=[tensor(x)], **fields).SerializeToString()
    return raw


class Streams:
    """A stream of frames, and unary calls beside it."""

    def __init__(self, at: Harness) -> None:
        self.at = at
        self.context = FakeCall()
        self.observer = Requests()
        self.stream = FrameStream(at.engine, at.clock, 1 << 20, _LIMITS, self.observer, self.context)
        boundary = Boundary(self.observer, max_message_bytes=1 << 20)
        servicer = SessionServicer(at.engine, at.clock, 1 << 20, _LIMITS, self.observer)
        self._serve_call = boundary.unary("Step", servicer.step, pb.StepRequest)
        self.calls: list[asyncio.Task[bytes]] = []
        self.task = asyncio.create_task(self.stream.run())

    def send(self, *messages: bytes) -> None:
        self.context.send(*messages)

    def call(self, raw: bytes, remaining_s: float | None = None) -> None:
        """Make a unary call, with a deadline in so many seconds. See `calls`."""
        deadline = float("inf") if remaining_s is None else self.at.clock.monotonic() + remaining_s
        self.calls.append(asyncio.create_task(self._serve_call(FakeCall(raw, deadline=deadline))))

    async def turns(self, count: int = 30) -> None:
        for _ in range(count):
            await asyncio.sleep(0)

    async def busy(self, session_id: str = "busy") -> None:
        """A pass is in flight from now on until the gate opens."""
        await self.at.begin_pass(session_id, [[1, 1]])

    async def done(self) -> list[bytes]:
        """Everything is answered; the stream's answers by frame."""
        await self.turns()
        self.at.hooks.open_gate()
        for _ in range(12):
            await self.turns()
            await self.at.settled()
        await self.turns()
        if not self.stream.is_over:  # what it must not hold on to shows nowhere but inside
            assert not self.stream._pending, "a frame has no answer"
            assert (self.stream._held_frames, self.stream._held_bytes) == (0, 0)
        replies = [self.context.replies.get_nowait() for _ in range(self.context.replies.qsize())]
        return sorted(replies, key=lambda raw: pb.StepStreamResponse.FromString(raw).frame_id)


@asynccontextmanager
async def streams(**options: Any) -> AsyncIterator[Streams]:
    async with running(**options) as at:
        under_test = Streams(at)
        yield under_test
        at.hooks.open_gate()
        await at.settled()
        await under_test.turns()
        under_test.task.cancel()
        await asyncio.gather(under_test.task, return_exceptions=True)


Scenario = Callable[[Streams], Any]


async def play(scenario: Scenario, **options: Any) -> list[bytes]:
    """Play a scenario; return the stream's answers by frame."""
    async with streams(**options) as at:
        await scenario(at)
        return await at.done()


def parsed(replies: Sequence[bytes]) -> list[pb.StepStreamResponse]:
    return [pb.StepStreamResponse.FromString(raw) for raw in replies]


def reasons(replies: Sequence[bytes]) -> list[str]:
    return [reply.errors[0].error.reason if reply.errors else "" for reply in parsed(replies)]
