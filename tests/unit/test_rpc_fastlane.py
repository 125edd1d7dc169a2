"""The fast lane gives the answers of the general way, byte for byte, whatever comes between."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import pytest

from stepwell.v1 import sessions_pb2 as pb
from stepwell_server.program import TensorSpec
from stepwell_server.rpc.fastlane import FastLane, _locate_in_frame
from support.engine import running
from support.fake_executor import PLAIN
from support.lane import ALL, BOTH_WAYS, LAST, NONE, Streams, alike, message, parsed, reasons, streams


def _random_message(rng: np.random.Generator, frame_id: int, session_id: str, top: int) -> bytes:
    x = rng.random((1, 2), np.float32)
    fields: dict[str, Any] = {}
    if rng.random() < 0.1:
        x[0, rng.integers(2)] = np.nan
    if rng.random() < 0.4:
        x = x[:, None]
    if rng.random() < 0.1:
        x = x.astype(np.float64)
    if rng.random() < 0.5:
        fields["expected_revisions"] = [[0, 1, 2, 3, 4, top][rng.integers(6)]]
    if rng.random() < 0.5:
        fields["request_ids"] = [int(rng.integers(1, 4))]
    if rng.random() < 0.5:
        fields["outputs"] = int(rng.choice([ALL, LAST, NONE, 9]))
    if rng.random() < 0.2:
        fields["timeout_ms"] = 60_000
    if rng.random() < 0.1:
        fields["batch_sizes"] = [1]
    return message(frame_id, session_id, x=x, **fields)


@BOTH_WAYS
@pytest.mark.parametrize("seed", range(12))
async def test_random_messages_over_several_streams(threads: bool, seed: int) -> None:
    async def scenario(at: Streams) -> None:
        rng = np.random.default_rng(seed)
        # one that no session can have is refused out of turn, and says the revision of that moment
        top = 9 if threads else 2**64 - 1
        await at.at.open(*(f"s{i}" for i in range(6)), "busy")
        await at.at.open("big", batch_size=2)
        for wave in range(8):
            if threads and rng.random() < 0.5:
                await at.busy()
            for k in range(int(rng.choice([1, 1, 5, 20]))):
                stream = int(rng.integers(2))
                name = str(rng.choice([f"s{3 * stream + i}" for i in range(3)] + ["nobody"]))
                if rng.random() < 0.05:
                    name = "big"
                at.send(_random_message(rng, wave * 100 + k, name, top), stream=stream)
                if rng.random() < 0.2:
                    await at.turns(2)
            await at.turns(int(rng.choice([0, 1, 5])))
            at.at.hooks.open_gate()
        at.at.hooks.open_gate()

    await alike(scenario, count=2, threads=threads)


@BOTH_WAYS
async def test_plain_steps_take_the_lane(threads: bool) -> None:
    async def scenario(at: Streams) -> None:
        await at.at.open("a", "b")
        for frame_id in range(1, 21):
            at.send(message(frame_id, "ab"[frame_id % 2]))

    (replies,) = await alike(scenario, threads=threads, taken=20)
    assert [reply.revisions[0] for reply in parsed(replies)] == [1 + i // 2 for i in range(20)]


@BOTH_WAYS
async def test_steps_as_the_sdk_sends_them_take_the_lane(threads: bool) -> None:
    """With everything that `stepwell._frames` fills in."""

    async def scenario(at: Streams) -> None:
        await at.at.open("a")
        await at.at.open("big", batch_size=2)
        for number in range(3):
            fields: dict[str, Any] = {"expected_revisions": [number], "request_ids": [7 + number]}
            at.send(message(1 + number, "a", **fields, batch_sizes=[1], outputs=ALL, timeout_ms=29_000))
        at.send(message(4, "a", batch_sizes=[2]), message(5, "big", batch_sizes=[1]))

    (replies,) = await alike(scenario, threads=threads, taken=4)
    assert [list(reply.revisions) for reply in parsed(replies)[:3]] == [[1], [2], [3]]
    assert reasons(replies)[3:] == ["INVALID_INPUT", "INVALID_INPUT"]


@pytest.mark.parametrize("between", ["none", "general", "same key"])
async def test_steps_of_one_session_keep_their_order_across_layouts(between: str) -> None:
    async def scenario(at: Streams) -> None:
        await at.at.open("a", "busy")
        at.send(message(1, "a", timeout_ms=5, expected_revisions=[0]))
        at.send(message(2, "a", outputs=LAST))
        await at.turns()
        await at.busy()
        double = np.ones((1, 2), np.float64)
        if between == "same key":
            # as long as the first one, with a longer number in another place: no longer its layout
            at.send(message(3, "a", timeout_ms=0x80_00, expected_revisions=[], outputs=LAST))
        if between == "general":
            at.send(message(3, "a", x=double))
        at.send(message(4, "a", outputs=LAST))
        at.send(message(5, "a", x=double))
        at.send(message(6, "a", timeout_ms=5, expected_revisions=[9], request_ids=[]))
        at.send(message(7, "a", outputs=LAST))
        await at.turns()

    (replies,) = await alike(scenario, threads=True)
    applied = [reply.revisions[0] for reply in parsed(replies) if reply.revisions]
    assert applied == sorted(applied)


async def test_a_message_of_another_layout_is_not_overtaken_by_what_came_later() -> None:
    """Both have the same key: length, and place of the session id."""

    async def scenario(at: Streams) -> None:
        await at.at.open("a", "busy")
        at.send(message(1, "a", timeout_ms=5), message(2, "a", outputs=LAST, request_ids=[5]))
        await at.turns()
        assert len(message(1, "a", timeout_ms=5)) == len(message(3, "a", outputs=LAST))
        await at.busy()
        at.send(message(3, "a", outputs=LAST), message(4, "a", outputs=LAST, request_ids=[6]))
        await at.turns()

    (replies,) = await alike(scenario, threads=True, taken=4)
    assert [reply.revisions[0] for reply in parsed(replies)] == [1, 2, 3, 4]


async def test_a_step_behind_one_that_goes_the_general_way_keeps_behind_it() -> None:
    async def scenario(at: Streams) -> None:
        await at.at.open("a", "busy")
        double = np.ones((1, 2), np.float64)
        await at.busy()
        at.send(message(1, "a", x=double), message(2, "a"), message(3, "a", x=double), message(4, "a"))
        await at.turns()

    (replies,) = await alike(scenario, threads=True)
    assert [reply.revisions[0] for reply in parsed(replies)] == [1, 2, 3, 4]


async def test_a_handle_that_is_another_sessions_by_now_is_not_stepped() -> None:
    async def scenario(at: Streams) -> None:
        await at.at.open("a", "busy")
        await at.busy()
        at.at.clock.advance(6)
        at.at.single("busy", [[2, 2]])
        at.at.clock.advance(5)
        await _run_in_place(at)
        assert at.at.engine.expire_idle() == 1
        await at.at.open("b")
        at.at.hooks.open_gate()
        await at.done()
        assert at.at.engine.session_info("b").revision == 0

    # "a" is still there when the message comes, and expires before the pass in flight ends
    async def _run_in_place(at: Streams) -> None:
        at.at.clock.advance(-5)
        at.send(message(1, "a"))
        await at.turns()
        at.at.clock.advance(5)

    for fast in (False, True):
        async with streams(fast=fast, threads=True, max_session_idle_s=10) as at:
            at.at.passes[0].on_end = lambda at=at: _cheap(at)  # type: ignore[misc]
            await scenario(at)


def _cheap(at: Streams) -> None:
    """From now on a row is cheap enough to run in place."""
    for model in at.at.engine._models:
        model.loop.runner.cost.seconds = 0.0  # type: ignore[attr-defined]


async def test_time_limits_begin_when_the_message_comes() -> None:
    async def scenario(at: Streams) -> None:
        await at.at.open("a", "b", "c", "d", "busy")
        await at.busy()
        at.send(message(1, "a", timeout_ms=100), message(2, "b", timeout_ms=1), message(3, "c"))
        at.send(message(4, "d", timeout_ms=60_000))
        await at.turns()
        at.at.clock.advance(1)

    (replies,) = await alike(scenario, threads=True, taken=4)
    assert reasons(replies) == ["DEADLINE_EXCEEDED", "DEADLINE_EXCEEDED", "", ""]


async def test_a_step_that_waited_alone_past_its_time_limit_is_dropped() -> None:
    async def scenario(at: Streams) -> None:
        await at.at.open("a", "busy")
        at.at.passes[0].on_end = lambda: _cheap(at)
        await at.busy()
        at.send(message(1, "a", timeout_ms=100))
        await at.turns()
        at.at.clock.advance(0.1)

    (replies,) = await alike(scenario, threads=True, taken=1)
    assert reasons(replies) == ["DEADLINE_EXCEEDED"]


async def test_a_time_limit_is_read_as_a_uint32() -> None:
    async def scenario(at: Streams) -> None:
        await at.at.open("a", "b", "busy")
        await at.busy()
        short = message(1, "a", timeout_ms=5)
        head = short[: short.index(b"\x12") + 1]
        for frame_id, number in ((1, b"\x80\x80\x80\x80\x10"), (2, b"\x81\x80\x80\x80\x10")):
            step = pb.StepStreamRequest.FromString(short).step
            step.timeout_ms = 0
            step.session_ids[0] = "ab"[frame_id - 1]
            body = step.SerializeToString() + b"\x30" + number
            at.send(head[:1] + bytes([frame_id]) + head[2:] + bytes([len(body)]) + body)
        await at.turns()
        at.at.clock.advance(2**33)

    (replies,) = await alike(scenario, threads=True, taken=2)
    assert reasons(replies) == ["", "DEADLINE_EXCEEDED"]


async def test_a_number_cut_off_by_the_end_ends_its_stream_and_no_other() -> None:
    for expected in (True, False):
        fields: dict[str, Any] = {"expected_revisions": [0]} if expected else {"timeout_ms": 9}
        async with streams(count=2) as at:
            await at.at.open("a")
            good = message(1, "a", **fields)
            at.send(good)
            await at.turns()
            at.send(good[:-1] + b"\x80")
            at.send(message(1, "a"), stream=1)
            mine, other = await at.done()
            assert len(mine) == len(other) == 1
            assert "InvalidInput" in repr(at.tasks[0].exception())
            assert not at.tasks[1].done()


async def test_an_unanswered_frames_id_is_refused() -> None:
    async def scenario(at: Streams) -> None:
        await at.at.open("a", "b", "busy")
        await at.busy()
        at.send(message(1, "a"), message(1, "b"), message(0, "a"), message(0, "b"), message(2, "b"))
        await at.turns()

    (replies,) = await alike(scenario, threads=True, taken=3)
    assert sorted(reasons(replies)) == ["", "", "", "INVALID_INPUT", "INVALID_INPUT"]


async def test_what_waits_of_a_stream_that_is_over_is_not_applied() -> None:
    for count in (1, 3):
        async with streams(threads=True) as at:
            await at.at.open("a", "busy")
            at.at.passes[0].on_end = lambda at=at: _cheap(at)  # type: ignore[misc]
            await at.busy()
            at.send(*(message(frame_id, "a") for frame_id in range(count)))
            await at.turns()
            assert at.lane.taken == count
            at.tasks[0].cancel()
            await at.turns()
            await at.done()
            assert at.at.engine.session_info("a").revision == 0


async def test_a_stopping_server_answers_what_it_has_taken() -> None:
    async def scenario(at: Streams) -> None:
        await at.at.open("a", "busy")
        await at.busy()
        at.send(message(1, "a"))
        await at.turns()
        at.at.engine.stop_accepting()
        at.send(message(2, "a"))
        await at.turns()

    (replies,) = await alike(scenario, threads=True, taken=1)
    assert reasons(replies) == ["", "UNAVAILABLE"]


async def test_bools_and_large_replies_go_the_general_way() -> None:
    flag = TensorSpec("x", (2,), "bool", temporal=True)
    large = TensorSpec("y", (20_000,), "float32", temporal=True)
    takes_bools = dataclasses.replace(PLAIN, inputs=(flag,))
    gives_much = dataclasses.replace(PLAIN, outputs=(large,))
    for program, x in ((takes_bools, np.ones((1, 2), np.bool_)), (gives_much, None)):
        async with running({"plain": program}, check=False) as at:
            await at.open("a")
            stream: Any = None  # not asked
            assert not FastLane(at.engine, at.clock).take(stream, message(1, "a", x=x))


@pytest.mark.parametrize(
    "raw", [b"", bytes(7), b"\x08" + b"\x80" * 16_000, b"\x08\x01\x12\x80\x80\x80\x80\x80"]
)
def test_what_has_no_session_id_is_left_alone(raw: bytes) -> None:
    assert _locate_in_frame(raw) is None


async def test_more_than_may_wait_is_refused_both_ways() -> None:
    async def scenario(at: Streams) -> None:
        ids = [f"s{i}" for i in range(100)]
        await at.at.open(*ids, "busy")
        at.send(message(1, ids[0]))
        await at.turns()
        await at.at.settled()
        await at.busy()
        for i, session_id in enumerate(ids):
            at.send(message(100 + i, session_id))
            await at.turns(2)

    (replies,) = await alike(scenario, threads=True, max_batch_rows=1, resident_rows=1000)
    refused = [reason for reason in reasons(replies) if reason]
    assert set(refused) == {"OVERLOADED"}
    assert len(refused) == 100 - 64
