"""Streams of one server: order, time limits, numbers of frames, ends."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from stepwell.v1 import sessions_pb2 as pb
from support.engine.harness import BOTH_WAYS
from support.rpc.streams import ALL, LAST, Streams, message, parsed, play, reasons, request, streams


@BOTH_WAYS
async def test_steps_with_all_fields_of_the_sdk(threads: bool) -> None:
    """With everything that `stepwell._batching.frames` fills in."""

    async def scenario(at: Streams) -> None:
        await at.at.open("a")
        await at.at.open("big", batch_size=2)
        for number in range(3):
            fields: dict[str, Any] = {"expected_revisions": [number], "request_ids": [7 + number]}
            at.send(message(1 + number, "a", **fields, batch_sizes=[1], outputs=ALL, timeout_ms=29_000))
        at.send(message(4, "a", batch_sizes=[2]), message(5, "big", batch_sizes=[1]))

    replies = await play(scenario, threads=threads)
    assert [list(reply.revisions) for reply in parsed(replies)[:3]] == [[1], [2], [3]]
    assert reasons(replies)[3:] == ["INVALID_INPUT", "INVALID_INPUT"]


@pytest.mark.parametrize("between", ["none", "double", "other fields"])
async def test_steps_of_one_session_keep_their_order_whatever_their_fields(between: str) -> None:
    async def scenario(at: Streams) -> None:
        await at.at.open("a", "busy")
        at.send(message(1, "a", timeout_ms=5, expected_revisions=[0]))
        at.send(message(2, "a", outputs=LAST))
        await at.turns()
        await at.busy()
        double = np.ones((1, 2), np.float64)
        if between == "other fields":
            at.send(message(3, "a", timeout_ms=0x80_00, expected_revisions=[], outputs=LAST))
        if between == "double":
            at.send(message(3, "a", x=double))
        at.send(message(4, "a", outputs=LAST))
        at.send(message(5, "a", x=double))
        at.send(message(6, "a", timeout_ms=5, expected_revisions=[9], request_ids=[]))
        at.send(message(7, "a", outputs=LAST))
        await at.turns()

    replies = await play(scenario, threads=True)
    applied = [reply.revisions[0] for reply in parsed(replies) if reply.revisions]
    assert applied == sorted(applied)


async def test_a_handle_that_now_belongs_to_another_session_is_refused() -> None:
    async def scenario(at: Streams) -> None:
        await at.at.open("a", "busy")
        await at.busy()
        at.at.clock.advance(6)
        at.at.single("busy", [[2, 2]])
        at.at.clock.advance(5)
        await _run_in_place(at)
        assert (await at.at.internals.expire_idle()) == 1
        await at.at.open("b")
        at.at.hooks.open_gate()
        await at.done()
        assert (await at.at.engine.session_info("b")).revision == 0

    # "a" is still there when the message comes, and expires before the pass in flight ends
    async def _run_in_place(at: Streams) -> None:
        at.at.clock.advance(-5)
        at.send(message(1, "a"))
        await at.turns()
        at.at.clock.advance(5)

    async with streams(threads=True, max_session_idle_s=10) as at:
        at.at.passes[0].on_end = at.at.run_in_place
        await scenario(at)


async def test_time_limits_start_when_the_message_arrives() -> None:
    async def scenario(at: Streams) -> None:
        await at.at.open("a", "b", "c", "d", "busy")
        await at.busy()
        at.send(message(1, "a", timeout_ms=100), message(2, "b", timeout_ms=1), message(3, "c"))
        at.send(message(4, "d", timeout_ms=60_000))
        await at.turns()
        at.at.clock.advance(1)

    replies = await play(scenario, threads=True)
    assert reasons(replies) == ["DEADLINE_EXCEEDED", "DEADLINE_EXCEEDED", "", ""]


async def test_a_step_that_waited_alone_past_its_time_limit_is_dropped() -> None:
    async def scenario(at: Streams) -> None:
        await at.at.open("a", "busy")
        at.at.passes[0].on_end = at.at.run_in_place
        await at.busy()
        at.send(message(1, "a", timeout_ms=100))
        await at.turns()
        at.at.clock.advance(0.1)

    replies = await play(scenario, threads=True)
    assert reasons(replies) == ["DEADLINE_EXCEEDED"]


async def test_waiting_steps_of_an_ended_stream_are_not_applied() -> None:
    for count in (1, 3):
        async with streams(threads=True) as at:
            await at.at.open("a", "busy")
            at.at.passes[0].on_end = at.at.run_in_place
            await at.busy()
            at.send(*(message(frame_id, "a") for frame_id in range(count)))
            await at.turns()
            at.task.cancel()
            await at.turns()
            await at.done()
            assert (await at.at.engine.session_info("a")).revision == 0


@pytest.mark.parametrize("kind", ["frame", "call"])
async def test_a_step_chooses_the_rows_to_reset_and_the_outputs(kind: str) -> None:
    async with streams() as at:
        await at.at.open("a")
        await at.at.step("a", np.ones((1, 2), np.float32))
        fields: dict[str, Any] = {"reset_mask": [True], "output_names": ["y"]}
        if kind == "frame":
            at.send(message(1, "a", **fields))
            (reply,) = parsed(await at.done())
            assert (list(reply.revisions), list(reply.positions)) == ([2], [1])
        else:
            at.call(request("a", **fields))
            await at.done()
            answer = pb.StepResponse.FromString(at.calls[0].result())
            assert (answer.revision, answer.position) == (2, 1)
