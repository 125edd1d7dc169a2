"""Unary steps get the same answers by the fast lane and without it, alone and beside streams."""

from __future__ import annotations

import asyncio
from typing import Any

import numpy as np
import pytest

from stepwell.v1 import sessions_pb2 as pb
from support.lane import ALL, BOTH_WAYS, LAST, NONE, Streams, alike, message, parsed, request, streams


def revision(raw: bytes) -> int:
    return pb.StepResponse.FromString(raw).revision


def _random_request(rng: np.random.Generator, session_id: str) -> bytes:
    x = rng.random((1, 2), np.float32)
    fields: dict[str, Any] = {}
    if rng.random() < 0.1:
        x[0, rng.integers(2)] = np.nan
    if rng.random() < 0.4:
        x = x[:, None]
    if rng.random() < 0.1:
        x = x.astype(np.float64)
    if rng.random() < 0.5:
        fields["expected_revision"] = int(rng.integers(6))
    if rng.random() < 0.5:
        fields["request_id"] = int(rng.integers(1, 4))
    if rng.random() < 0.5:
        fields["outputs"] = int(rng.choice([ALL, LAST, NONE, 9]))
    return request(session_id, x, **fields)


@BOTH_WAYS
@pytest.mark.parametrize("seed", range(12))
async def test_random_calls_beside_a_stream(threads: bool, seed: int) -> None:
    async def scenario(at: Streams) -> None:
        rng = np.random.default_rng(seed)
        await at.at.open(*(f"s{i}" for i in range(6)), "busy")
        await at.at.open("big", batch_size=2)
        for wave in range(8):
            if threads and rng.random() < 0.5:
                await at.busy()
            for k in range(int(rng.choice([1, 1, 5, 20]))):
                # sessions of their own: a call and a stream reach the server in no order
                if rng.random() < 0.3:
                    at.send(message(wave * 100 + k, f"s{rng.integers(3, 6)}"))
                else:
                    name = str(rng.choice([*(f"s{i}" for i in range(3)), "nobody", "big", ""]))
                    at.call(_random_request(rng, name), float(rng.choice([60, 90])))
                if rng.random() < 0.2:
                    await at.turns(2)
            await at.turns(int(rng.choice([0, 1, 5])))
            at.at.hooks.open_gate()
        at.at.hooks.open_gate()

    await alike(scenario, threads=threads)


@BOTH_WAYS
async def test_plain_calls_take_the_lane(threads: bool) -> None:
    async def scenario(at: Streams) -> None:
        await at.at.open("a", "b")
        for i in range(20):
            at.call(request("ab"[i % 2], expected_revision=i // 2, request_id=1 + i), 60.0)
        await at.done()
        assert [revision(call.result()) for call in at.calls] == [1 + i // 2 for i in range(20)]

    await alike(scenario, threads=threads, taken=20)


async def test_calls_of_one_turn_run_in_one_pass() -> None:
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

    await alike(scenario, taken=4)


@BOTH_WAYS
async def test_the_revision_that_stands_for_any_is_one_that_no_session_has(threads: bool) -> None:
    async def scenario(at: Streams) -> None:
        await at.at.open("a")
        at.call(request("a", expected_revision=2**64 - 2))
        await at.done()
        for _ in range(2):
            at.call(request("a", expected_revision=2**64 - 1))
        await at.done()
        assert at.at.engine.session_info("a").revision == 0

    await alike(scenario, threads=threads)


async def test_a_few_steps_of_one_turn_run_one_by_one_and_many_together() -> None:
    for count, passes in ((4, []), (12, [(12, 1)])):
        async with streams() as at:
            ids = [f"s{i}" for i in range(12)]
            await at.at.open(*ids, "first")
            at.call(request("first"))
            for session_id in ids[:count]:
                at.call(request(session_id))
            await at.done()
            assert at.at.events.passes == passes


async def test_bytes_that_are_no_request_are_refused() -> None:
    good = request("a")

    async def scenario(at: Streams) -> None:
        await at.at.open("a")
        at.call(good)
        await at.turns()
        for raw in (b"", b"\xff\xff", b"\n\x7fa", good[:-1], good + b"\x10", b"\n\x01\xff" + good[3:]):
            at.call(raw)
        await at.turns()

    await alike(scenario)


async def test_a_cancelled_call_whose_step_still_waits_is_dropped() -> None:
    for x in (None, np.ones((1, 2), np.float64)):  # by the lane, and the general way
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
            assert at.at.engine.session_info("a").revision == 1
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
        assert [at.at.engine.session_info(one).revision for one in "abc"] == [0, 1, 0]

    await alike(scenario, threads=True, taken=3)


async def test_a_call_of_another_layout_is_not_overtaken_by_what_came_later() -> None:
    """Both have the same key: length, and place of the session id."""
    one, other = request("a", outputs=LAST), request("a", expected_revision=1)
    assert len(one) == len(other)

    async def scenario(at: Streams) -> None:
        await at.at.open("a", "busy")
        at.call(one)
        await at.turns()
        await at.busy()
        for raw in (other, request("a", outputs=LAST), request("a")):
            at.call(raw)
        await at.turns()
        await at.done()
        assert [revision(call.result()) for call in at.calls] == [1, 2, 3, 4]

    await alike(scenario, threads=True, taken=4)


async def test_a_stopping_server_answers_what_it_has_taken() -> None:
    async def scenario(at: Streams) -> None:
        await at.at.open("a", "busy")
        await at.busy()
        at.call(request("a"))
        await at.turns()
        at.at.engine.stop_accepting()
        at.call(request("a"))
        await at.turns()

    await alike(scenario, threads=True, taken=1)


async def test_more_than_may_wait_is_refused_both_ways() -> None:
    async def scenario(at: Streams) -> None:
        ids = [f"s{i}" for i in range(100)]
        await at.at.open(*ids, "busy")
        await at.busy()
        for session_id in ids:
            at.call(request(session_id))
        await at.turns()
        refused = [call for call in at.calls if call.done()]
        assert len(refused) == 100 - 64

    await alike(scenario, threads=True, max_batch_rows=1, resident_rows=1000)


async def test_a_call_whose_task_ends_leaves_no_one_waiting() -> None:
    """Its session is closed while it waits: the lane finds that out, the general way says so."""

    async def scenario(at: Streams) -> None:
        await at.at.open("a", "busy")
        await at.busy()
        at.call(request("a"))
        await at.turns()
        closing = asyncio.create_task(at.at.engine.close_session("a"))
        await at.turns()
        at.call(request("a"))
        await at.done()
        await closing

    await alike(scenario, threads=True)


@pytest.mark.parametrize("shape", [(1, 2), (1, 1, 2), (1, 4, 2), (2, 2)])
async def test_booleans_for_floats_are_refused_in_the_same_words_by_calls_and_frames(
    shape: tuple[int, ...],
) -> None:
    flags = np.ones(shape, np.bool_)

    async def scenario(at: Streams) -> None:
        await at.at.open("a")
        at.call(request("a", flags))
        at.send(message(1, "a", x=flags), message(2, "a", x=flags, batch_sizes=[1]))
        at.send(message(3, "a", "nobody", x=np.concatenate([flags, flags]), batch_sizes=[1, 1]))
        await at.turns()

    (replies,) = await alike(scenario)
    said = {reply.errors[0].error.message for reply in parsed(replies)}
    assert said == {"input 'x' must have a dtype that fits float32; got bool"}
