"""Unary steps, alone and concurrent with streams."""

from __future__ import annotations

import numpy as np

from stepwell.v1 import sessions_pb2 as pb
from support.rpc.streams import Streams, play, request, streams


def revision(raw: bytes) -> int:
    return pb.StepResponse.FromString(raw).revision


async def test_concurrent_calls_run_in_one_pass() -> None:
    async with streams(threads=True) as at:
        ids = [f"s{i}" for i in range(8)]
        await at.at.open(*ids)
        for session_id in ids:
            at.call(request(session_id))
        await at.done()
        assert at.at.events.passes == [(8, 1)]


async def test_a_call_sent_again_is_answered_again() -> None:
    async def scenario(at: Streams) -> None:
        await at.at.open("a")
        for with_time in (False, True):
            x = np.ones((1, 1, 2) if with_time else (1, 2), np.float32)
            at.call(request("a", x, expected_revision=int(with_time), request_id=5 + with_time))
            await at.turns()
            at.call(request("a", x, expected_revision=int(with_time), request_id=5 + with_time))
            await at.turns()
        answers = [pb.StepResponse.FromString(call.result()) for call in at.calls]
        assert [(one.revision, one.replayed) for one in answers] == [
            (1, False),
            (1, True),
            (2, False),
            (2, True),
        ]

    await play(scenario)


async def test_a_cancelled_call_whose_step_still_waits_is_dropped() -> None:
    for x in (None, np.ones((1, 2), np.float64)):  # as it is, and cast
        async with streams(threads=True) as at:
            await at.at.open("a", "busy")
            await at.busy()
            at.call(request("a", x))
            at.call(request("a", x))
            first, second = at.calls
            await at.turns()
            first.cancel()
            await at.turns()
            assert first.cancelled()
            await at.done()
            assert revision(second.result()) == 1
            assert (await at.at.engine.session_info("a")).revision == 1
            assert at.observer.done == [("Step", "CANCELLED"), ("Step", "OK")]


async def test_a_call_past_its_deadline_is_dropped() -> None:
    async def scenario(at: Streams) -> None:
        await at.at.open("a", "b", "c", "busy")
        at.call(request("c"), 0.0)
        await at.turns()
        await at.busy()
        at.call(request("a"), 0.1)
        at.call(request("b"), 60.0)
        await at.turns()
        at.at.clock.advance(1)
        await at.done()
        assert [(await at.at.engine.session_info(one)).revision for one in "abc"] == [0, 1, 0]

    await play(scenario, threads=True)
