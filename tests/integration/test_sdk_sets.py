"""Both clients name the sessions of a group once on a stream, and by a number from then on."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import grpc
import numpy as np
import pytest

from support.scripted_server import MODEL, Fault, ScriptedServer
from support.shells import connect

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


def named(server: ScriptedServer) -> list[tuple[int, int, int]]:
    """Of each frame: how many ids it names, the set that it declares, the set that it is for."""
    return [(len(f.session_ids), f.declare_set, f.session_set) for f in frames(server)]


def sum_of(server: ScriptedServer, group: Any) -> Any:
    return np.concatenate([server.sessions[one].state for one in group.ids])


async def test_a_group_is_named_once(client: Any, server: ScriptedServer) -> None:
    group = await client.open_sessions(MODEL, 3)
    for _ in range(3):
        await group.step(X)
    await group.reset_states()
    await group.reset_states(rows=[1])
    assert np.array_equal(await group.step(X), X)
    assert named(server) == [(3, 1, 0), (0, 0, 1), (0, 0, 1), (0, 0, 1), (1, 0, 0), (0, 0, 1)]
    second, last = frames(server)[1], frames(server)[-1]
    assert (second.expected_revision, list(second.expected_revisions)) == (1, [])
    assert second.request_id_base
    assert not second.request_ids
    assert not second.batch_sizes
    assert list(last.expected_revisions) == [4, 5, 4]
    assert not last.HasField("expected_revision")
    assert group.revisions.tolist() == [5, 6, 5]
    assert group.positions.tolist() == [1, 1, 1]


async def test_groups_at_the_same_time_are_not_mistaken_for_each_other(
    client: Any, server: ScriptedServer
) -> None:
    server.parts = 2
    groups = [await client.open_sessions(MODEL, 3) for _ in range(6)]
    for _ in range(4):
        await asyncio.gather(*(group.step(X + at) for at, group in enumerate(groups)))
    for at, group in enumerate(groups):
        assert np.array_equal(sum_of(server, group), 4 * (X + at))
    assert sorted(declared for _, declared, _ in named(server) if declared) == [1, 2, 3, 4, 5, 6]


async def test_a_member_that_is_sent_again_alone_has_its_own_ids(client: Any, server: ScriptedServer) -> None:
    group = await client.open_sessions(MODEL, 3)
    await group.step(X)
    server.fail("StepStream", FULL)
    assert np.array_equal(await group.step(X), 2 * X)
    assert named(server) == [(3, 1, 0), (0, 0, 1), (1, 0, 0)]
    everyone, alone = frames(server)[1:]
    assert list(alone.session_ids) == [group.ids[2]]
    assert list(alone.request_ids) == [everyone.request_id_base + 2]
    assert list(alone.expected_revisions) == [1]
    assert server.applied == 6


@pytest.mark.parametrize("parts", [1, 2])
async def test_a_set_is_declared_again_on_a_new_stream(
    client: Any, server: ScriptedServer, parts: int
) -> None:
    """The stream breaks when all, or some, of a frame was answered; everything is applied once."""
    server.parts = parts
    group = await client.open_sessions(MODEL, 3)
    await group.step(X)
    server.fail("StepStream", LOST)
    assert np.array_equal(await group.step(X), 2 * X)
    assert np.array_equal(await group.step(X), 3 * X)
    assert np.array_equal(await group.step(X), 4 * X)
    # with two parts the first one got through, and only the other member is sent again, by its id
    again = [(3, 1, 0), (0, 0, 1), (0, 0, 1)] if parts == 1 else [(1, 0, 0), (3, 1, 0), (0, 0, 1)]
    assert named(server) == [(3, 1, 0), (0, 0, 1), *again]
    assert server.applied == 12
    if parts == 1:
        first, second = frames(server)[1:3]
        assert list(second.request_ids) == [first.request_id_base + i for i in range(3)]


async def test_a_declaration_whose_answer_is_lost_is_made_anew(client: Any, server: ScriptedServer) -> None:
    group = await client.open_sessions(MODEL, 3)
    server.fail("StepStream", LOST)
    assert np.array_equal(await group.step(X), X)
    await group.step(X)
    assert named(server) == [(3, 1, 0), (3, 1, 0), (0, 0, 1)]
    assert server.applied == 6


async def test_a_server_from_before_there_were_sets_is_sent_ids(client: Any, server: ScriptedServer) -> None:
    server.knows_sets = False
    group = await client.open_sessions(MODEL, 3)
    for number in range(3):
        assert np.array_equal(await group.step(X), (number + 1) * X)
    assert named(server) == [(3, 1, 0), (3, 0, 0), (3, 0, 0)]
    for number, frame in enumerate(frames(server)):
        assert list(frame.expected_revisions) == [number] * 3
        assert len(set(frame.request_ids)) == len(frame.batch_sizes) == 3


async def test_a_set_that_the_server_does_not_know_any_more_is_declared_again(
    client: Any, server: ScriptedServer
) -> None:
    group = await client.open_sessions(MODEL, 3)
    await group.step(X)
    server.sets.clear()
    assert np.array_equal(await group.step(X), 2 * X)
    await group.step(X)
    assert named(server) == [(3, 1, 0), (0, 0, 1), (3, 2, 0), (0, 0, 2)]
    assert server.applied == 9
