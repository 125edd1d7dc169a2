"""Lanes: each makes one call after the other, on the sessions that it owns, in turn.

A lane of mode "unary" or "stream" speaks gRPC with messages made before the run, so that the generator
costs little; "frames" and "group" are the SDK as users have it.
"""

from __future__ import annotations

import abc
import asyncio
import itertools
import random
from collections.abc import Iterator, Sequence
from typing import Any, Generic, TypeVar

import grpc

from stepwell._state.arguments import pack_inputs
from stepwell._state.tensors import to_messages
from stepwell._transport import channel, status
from stepwell.aio import AsyncSession, AsyncSessionGroup
from stepwell.cli.bench.inputs import Inputs
from stepwell.cli.bench.ways import Way, Ways
from stepwell.errors import DeadlineExceededError, StepwellError, UnavailableError
from stepwell.v1 import sessions_pb2

T = TypeVar("T")
M = TypeVar("M", sessions_pb2.StepRequest, sessions_pb2.StepStreamRequest)


class Lane(abc.ABC):
    """One call in flight at a time."""

    @abc.abstractmethod
    async def call(self) -> int:
        """Make the next call. Returns how many sessions it has stepped.

        Raises:
            StepwellError: It failed for some of them at least.
        """

    async def close(self) -> None:  # noqa: B027 - most have nothing to close
        """End what the lane has open; never the sessions."""


class LaneSession(Generic[M]):
    """A session as a lane knows it: its id, its revision, and the change that is not settled yet."""

    __slots__ = ("_request", "key", "request_id", "revision", "session_id")

    def __init__(self, session_id: str) -> None:
        self.session_id = session_id
        self.key = Ways.key(session_id)
        self.revision = 0
        self.request_id = 0
        """Of the change."""
        self._request: M | None = None

    def begin(self, request: M) -> M:
        """The request of the next change: after an error the last one again, under its id, so that it is applied once."""
        if self._request is None:
            self._request = request
            self.request_id = random.getrandbits(64) or 1
        return self._request

    def applied(self) -> None:
        """The change is settled."""
        self.revision += 1
        self._request = None


class UnaryLane(Lane):
    """One Step call for each step.

    Args:
        ways: To the server, or to its replicas.
        ids: Of its sessions.
        requests: To be sent in turn. Lanes may share them: nothing is awaited between filling one in and
            making bytes of it.
        timeout_s: Time limit of a call.
    """

    def __init__(
        self, ways: Ways, ids: Sequence[str], requests: Iterator[sessions_pb2.StepRequest], timeout_s: float
    ) -> None:
        self._ways = ways
        self._requests = requests
        self._sessions = itertools.cycle([LaneSession[sessions_pb2.StepRequest](one) for one in ids])
        self._timeout_s = timeout_s

    async def call(self) -> int:
        """Make the next call."""
        session = next(self._sessions)
        request = session.begin(next(self._requests))
        request.session_id = session.session_id
        request.expected_revision = session.revision
        request.request_id = session.request_id
        way = self._ways.to(session.key)
        try:
            await way.step(request.SerializeToString(), timeout=self._timeout_s, metadata=self._ways.metadata)
        except grpc.RpcError as error:
            raise _told(self._ways, way, channel.translate(error)) from None
        session.applied()
        return 1


class StreamLane(Lane):
    """A stream of its own, to each replica, with one step in each message. Arguments are those of `UnaryLane`."""

    def __init__(
        self,
        ways: Ways,
        ids: Sequence[str],
        requests: Iterator[sessions_pb2.StepStreamRequest],
        timeout_s: float,
    ) -> None:
        self._ways = ways
        self._streams: dict[Way, Any] = {}
        self._requests = requests
        self._sessions = itertools.cycle([LaneSession[sessions_pb2.StepStreamRequest](one) for one in ids])
        self._frame_ids = itertools.count(1)
        self._timeout_s = timeout_s

    async def call(self) -> int:
        """Make the next call."""
        session = next(self._sessions)
        request = session.begin(next(self._requests))
        request.frame_id = next(self._frame_ids)
        request.step.session_ids[0] = session.session_id
        request.step.expected_revisions[0] = session.revision
        request.step.request_ids[0] = session.request_id
        way = self._ways.to(session.key)
        try:
            answer = await self._exchange(way, request.SerializeToString())
        except StepwellError as error:
            raise _told(self._ways, way, error) from None
        for failed in answer.errors:
            raise status.from_message(failed.error)
        session.applied()
        return 1

    async def _exchange(self, way: Way, request: bytes) -> sessions_pb2.StepStreamResponse:
        stream = self._streams.pop(way, None)  # until it has answered, it may be broken
        if stream is None:
            stream = way.stream(metadata=self._ways.metadata)
        try:
            async with asyncio.timeout(self._timeout_s):
                await stream.write(request)
                answer = await stream.read()
        except grpc.RpcError as error:
            raise channel.translate(error) from None
        except asyncio.InvalidStateError:
            raise UnavailableError("the server ended the stream") from None
        except TimeoutError:
            raise DeadlineExceededError("the time limit passed while a frame was unanswered") from None
        if not isinstance(answer, sessions_pb2.StepStreamResponse):
            raise UnavailableError("the server ended the stream")
        self._streams[way] = stream
        return answer

    async def close(self) -> None:
        """End the streams."""
        for stream in self._streams.values():
            stream.cancel()


def _told(ways: Ways, way: Way, error: StepwellError) -> StepwellError:
    """An error that a call ended with, of which the ways know now."""
    ways.failed(way, error)
    return error


class SessionLane(Lane):
    """Sessions of the async SDK, which puts steps awaited at the same time into one message."""

    def __init__(self, sessions: Sequence[AsyncSession], inputs: Iterator[Inputs]) -> None:
        self._sessions = itertools.cycle(sessions)
        self._inputs = inputs

    async def call(self) -> int:
        """Make the next call."""
        await next(self._sessions).step(next(self._inputs))
        return 1


class GroupLane(Lane):
    """Groups of the async SDK, each with inputs of its size: one message for all sessions of a group."""

    def __init__(self, groups: Sequence[tuple[AsyncSessionGroup, Iterator[Inputs]]]) -> None:
        self._groups = itertools.cycle(groups)

    async def call(self) -> int:
        """Make the next call."""
        group, inputs = next(self._groups)
        await group.step(next(inputs))
        return len(group)


def endless(pool: Sequence[T]) -> Iterator[T]:
    """One after the other, again and again."""
    return itertools.cycle(pool)


def step_request(inputs: Inputs) -> sessions_pb2.StepRequest:
    """A Step to be filled in."""
    return sessions_pb2.StepRequest(inputs=to_messages(pack_inputs(inputs)))


def frame_request(inputs: Inputs, batch_size: int) -> sessions_pb2.StepStreamRequest:
    """A frame of one session to be filled in."""
    frame = sessions_pb2.StepFrame(
        session_ids=[""],
        inputs=to_messages(pack_inputs(inputs)),
        expected_revisions=[0],
        request_ids=[1],
        batch_sizes=[batch_size],
    )
    return sessions_pb2.StepStreamRequest(step=frame)
