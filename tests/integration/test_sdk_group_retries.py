"""Frames of groups in both clients: at the same time, and sent again, whole or in part."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import grpc
import numpy as np
import pytest

from support.sdk.client_kinds import connect
from support.sdk.scripted_server import MODEL, Fault, ScriptedServer

LOST = Fault(after_work=True)
"""The work is done, the answer is lost."""
FULL = Fault(grpc.StatusCode.RESOURCE_EXHAUSTED, "full", "OVERLOADED", member=2, retry_after_s=0.01)
X = np.arange(6, dtype=np.float32).reshape(3, 2)


@pytest.fixture(params=["sync", "async"])
async def client(request: pytest.FixtureRequest, server: ScriptedServer) -> AsyncIterator[Any]:
    async with connect(request.param, server.address, timeout_s=60.0) as client:
        yield client


def frames(server: ScriptedServer) -> list[Any]:
    return [r.step if r.HasField("step") else r.reset for r in server.requests("StepStream")]


def sum_of(server: ScriptedServer, group: Any) -> Any:
    return np.concatenate([server.sessions[one].state for one in group.ids])


async def test_groups_at_the_same_time_are_not_mistaken_for_each_other(
    client: Any, server: ScriptedServer
) -> None:
    server.parts = 2
    groups = [await client.open_sessions(MODEL, 3) for _ in range(6)]
    for _ in range(4):
        await asyncio.gather(*(group.step(X + at) for at, group in enumerate(groups)))
    for at, group in enumerate(groups):
        assert np.array_equal(sum_of(server, group), 4 * (X + at))


async def test_a_member_that_is_sent_again_alone_has_its_own_ids(client: Any, server: ScriptedServer) -> None:
    group = await client.open_sessions(MODEL, 3)
    await group.step(X)
    server.fail("StepStream", FULL)
    assert np.array_equal(await group.step(X), 2 * X)
    everyone, alone = frames(server)[1:]
    assert (list(everyone.session_ids), everyone.batch_size) == (list(group.ids), 1)
    assert list(alone.session_ids) == [group.ids[2]]
    assert list(alone.request_ids) == [everyone.request_id_base + 2]
    assert list(alone.expected_revisions) == [1]
    assert server.applied == 6


@pytest.mark.parametrize("parts", [1, 2])
async def test_a_frame_whose_answer_is_lost_is_sent_again(
    client: Any, server: ScriptedServer, parts: int
) -> None:
    """The stream breaks when all, or some, of a frame was answered; everything is applied once."""
    server.parts = parts
    group = await client.open_sessions(MODEL, 3)
    await group.step(X)
    server.fail("StepStream", LOST)
    assert np.array_equal(await group.step(X), 2 * X)
    assert np.array_equal(await group.step(X), 3 * X)
    # with two parts the first one got through, and only the other member is sent again
    assert [len(frame.session_ids) for frame in frames(server)] == [3, 3, 3 if parts == 1 else 1, 3]
    assert server.applied == 9
    first, again = frames(server)[1:3]
    if parts == 1:
        assert again.request_id_base == first.request_id_base
    else:
        assert list(again.request_ids) == [first.request_id_base + 2]
