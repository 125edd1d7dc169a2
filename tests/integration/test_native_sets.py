"""The native front reads frames of sets by itself, and none before what came ahead of it on its stream."""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from typing import Any

import numpy as np
import pytest

from stepwell.v1 import sessions_pb2 as pb
from stepwell_server.addresses import Address
from stepwell_server.clock import SystemClock
from stepwell_server.core.front_limits import FrontLimits
from stepwell_server.rpc.boundary import Boundary
from stepwell_server.rpc.fronts.base import Method, StepColumns
from stepwell_server.rpc.services.sessions import SessionServicer
from stepwell_server.rpc.steps.columns import ColumnSteps
from stepwell_server.rpc.steps.stream import StreamLimits
from support import secured
from support.engine import Harness, running
from support.fake_call import Requests
from support.fronts import needs_native
from support.streams import message

pytestmark = needs_native
LIMIT = 1 << 20
SERVICE = "stepwell.v1.SessionService"
X = np.ones((3, 2), np.float32)


class Watched(ColumnSteps):
    """Remembers what the front has read by itself."""

    def __init__(self, at: Harness) -> None:
        super().__init__(at.engine, SystemClock(), LIMIT, Requests(), lambda _: pytest.fail("not Triton's"))
        self.seen: list[StepColumns] = []

    def take(self, columns: StepColumns) -> None:
        self.seen.append(columns)
        super().take(columns)


class Talk:
    """A stream to a native front in this process, and what the front has read of it by itself."""

    def __init__(self, at: Harness, steps: Watched, call: Any) -> None:
        self.at = at
        self.steps = steps
        self._call = call

    async def send(self, *messages: bytes) -> None:
        for raw in messages:
            await self._call.write(raw)

    async def receive(self) -> pb.StepStreamResponse:
        return pb.StepStreamResponse.FromString(await self._call.read())

    async def ask(self, raw: bytes) -> pb.StepStreamResponse:
        await self.send(raw)
        return await self.receive()


@asynccontextmanager
async def talking() -> AsyncIterator[Talk]:
    from stepwell_server.rpc.fronts.native import NativeFront

    async with running() as at:
        await at.open("a", "b", "c")
        clock = SystemClock()
        limits = StreamLimits(1000, LIMIT)
        servicer = SessionServicer(at.engine, clock, LIMIT, limits, Requests())
        serve = Boundary(Requests(), LIMIT).stream("StepStream", servicer.step_stream)
        steps = Watched(at)
        front = NativeFront(clock, FrontLimits(LIMIT))
        methods = [Method(SERVICE, "StepStream", serve, streams=True)]
        address = await front.start(Address("127.0.0.1", 0), methods, steps, secured.certificates())
        front.set_plain(are_taken=True)
        async with secured.channel_aio(secured.named(address)) as channel:
            stream: Any = channel.stream_stream(f"/{SERVICE}/StepStream")
            call = stream(timeout=100)
            yield Talk(at, steps, call)
            call.cancel()
        await front.stop(100)


def of_set(frame_id: int, number: int, **fields: Any) -> bytes:
    return message(frame_id, x=X, session_set=number, **fields)


def ids_of(seen: Sequence[StepColumns]) -> list[list[str]]:
    return [columns.session_ids for columns in seen]


async def test_a_set_that_was_declared_is_read_natively() -> None:
    async with talking() as talk:
        reply = await talk.ask(message(1, *"abc", x=X, declare_set=3, batch_sizes=[1, 1, 1]))
        assert (reply.declared_set, reply.revision) == (3, 1)
        assert talk.steps.seen == [], "declarations are Python's"
        for number in range(2, 5):
            fields = {"expected_revision": number - 1, "request_id_base": 2**64 - 3}
            reply = await talk.ask(of_set(number, 3, **fields))
            assert (reply.all_members, reply.revision, reply.position) == (True, number, number)
            assert not reply.revisions
            assert not reply.positions
            assert not reply.members
        first, _, last = talk.steps.seen
        assert first.session_ids == ["a", "b", "c"]
        assert last.session_ids is first.session_ids, "no list is made for each frame"
        assert last.expected is not None
        assert last.expected.tolist() == [3, 3, 3]
        assert last.request_ids is not None
        assert last.request_ids.tolist() == [2**64 - 3, 2**64 - 2, 2**64 - 1]
        assert (last.sizes.tolist(), last.says_sizes) == ([1, 1, 1], True)
        reply = await talk.ask(of_set(5, 3, expected_revisions=[4, 4, 9], request_id_base=7))
        assert len(talk.steps.seen) == 4
        parts = [reply, await talk.receive()]
        assert {error.error.reason for part in parts for error in part.errors} == {"REVISION_CONFLICT"}
        (applied,) = [part for part in parts if part.member_count]
        assert (applied.first_member, applied.member_count, applied.revision) == (0, 2, 5)


async def test_members_are_found_by_their_ids_when_a_frame_comes() -> None:
    async with talking() as talk:
        await talk.ask(message(1, *"abc", x=X, declare_set=1))
        await talk.ask(of_set(2, 1))
        await talk.at.engine.close_session("a")
        await talk.at.open("other")  # which takes the place of the one that was closed
        parts = [await talk.ask(of_set(3, 1)), await talk.receive()]
        assert {(tuple(e.members), e.error.reason) for part in parts for e in part.errors} == {
            ((0,), "SESSION_NOT_FOUND")
        }
        assert (await talk.at.engine.session_info("other")).revision == 0
        await talk.at.open("a")
        reply = await talk.ask(of_set(4, 1))
        assert list(reply.positions) == [1, 4, 4], "it begins anew"
        assert ids_of(talk.steps.seen) == [["a", "b", "c"]] * 3


async def test_what_is_forgotten_or_was_never_declared_is_not_read_natively() -> None:
    async with talking() as talk:
        await talk.ask(message(1, *"abc", x=X, declare_set=1))
        await talk.ask(message(2, *"cab", x=X, declare_set=2))
        request = pb.StepStreamRequest(frame_id=3, forget_sets=[1])
        assert (await talk.ask(request.SerializeToString())).last
        for number in (1, 9):
            reply = await talk.ask(of_set(4, number))
            assert reply.errors[0].error.reason == "SESSION_SET_UNKNOWN"
        assert talk.steps.seen == []
        # while Python ends its call of the last frame, it reads the next one too
        for number in range(5, 1000):
            await talk.ask(of_set(number, 2))
            if talk.steps.seen:
                break
        assert ids_of(talk.steps.seen) == [["c", "a", "b"]]


async def test_a_set_frame_overtakes_nothing_of_its_stream() -> None:
    """Neither its declaration nor a frame that Python has to read; sent without waiting for answers."""
    async with talking() as talk:
        revision = 0
        for turn in range(20):
            number, mask = turn + 1, [False] * 3
            await talk.send(
                message(1, *"abc", x=X, declare_set=number, expected_revision=revision),
                of_set(2, number, expected_revision=revision + 1),
                of_set(3, number, expected_revision=revision + 2, reset_mask=mask),
                of_set(4, number, expected_revision=revision + 3),
                of_set(5, number, expected_revision=revision + 4),
            )
            replies = [await talk.receive() for _ in range(5)]
            revision += 5
            assert sorted(reply.revision for reply in replies) == list(range(revision - 4, revision + 1))
            assert not any(reply.errors for reply in replies)
            await talk.ask(pb.StepStreamRequest(frame_id=6, forget_sets=[number]).SerializeToString())
