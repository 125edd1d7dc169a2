"""Groups, sub-groups and handles of members against a server whose faults are scripted, with both clients."""

from __future__ import annotations

import asyncio
import functools
from collections.abc import AsyncIterator
from typing import Any

import grpc
import numpy as np
import pytest

from stepwell import errors
from stepwell._core.core import MAX_IDS
from stepwell._transport.retry import RetryPolicy
from support.sdk.client_kinds import connect
from support.sdk.scripted_model import in_full
from support.sdk.scripted_server import MODEL, Fault, ScriptedServer

LOST = Fault(after_work=True)
"""The work is done, the answer is lost."""
FULL = Fault(grpc.StatusCode.RESOURCE_EXHAUSTED, "full", "OVERLOADED", member=2, retry_after_s=0.01)
GONE = Fault(grpc.StatusCode.INTERNAL, "broken", "INTERNAL", member=1)
X = np.arange(1, 9, dtype=np.float32).reshape(4, 2)


@pytest.fixture(params=["sync", "async"])
async def client(request: pytest.FixtureRequest, server: ScriptedServer) -> AsyncIterator[Any]:
    async with connect(request.param, server.address, timeout_s=60.0) as client:
        yield client


@pytest.fixture
async def group(client: Any) -> Any:
    return await client.open_sessions(MODEL, 4)


def states(server: ScriptedServer, group: Any) -> Any:
    return np.concatenate([server.sessions[one].state for one in group.ids])


def are_left(server: ScriptedServer, ids: set[str]) -> bool:
    return server.sessions.keys() == ids


def frames(server: ScriptedServer) -> list[Any]:
    found = [in_full(request) for request in server.requests("StepStream")]
    return [r.step if r.HasField("step") else r.reset for r in found]


async def test_members_that_are_ready_are_reset_and_stepped_once_though_the_answer_is_lost(
    group: Any, server: ScriptedServer
) -> None:
    await group.step(X)
    server.fail("StepStream", LOST)
    ready, done = np.array([True, False, True, True]), np.array([False, True, False])
    y = await group.step(X[ready], reset=done, members=ready)
    assert np.array_equal(y, [2 * X[0], X[2], 2 * X[3]])
    assert np.array_equal(states(server, group), [2 * X[0], X[1], X[2], 2 * X[3]])
    assert server.applied == 7, "once each"
    assert (group.revisions.tolist(), group.positions.tolist()) == ([2, 1, 2, 2], [2, 1, 1, 2])
    first, again = frames(server)[1:]
    assert list(first.reset_mask) == list(again.reset_mask) == [False, True, False]
    assert list(first.request_ids) == list(again.request_ids)
    assert list(first.session_ids) == [group.ids[i] for i in (0, 2, 3)]


async def test_groups_at_the_same_time_are_not_mistaken_for_each_other(
    client: Any, server: ScriptedServer
) -> None:
    server.parts = 2
    groups = [await client.open_sessions(MODEL, 4) for _ in range(6)]
    for _ in range(4):
        await asyncio.gather(*(group.step(X + at) for at, group in enumerate(groups)))
    for at, group in enumerate(groups):
        assert np.array_equal(states(server, group), 4 * (X + at))


async def test_a_member_that_is_sent_again_alone_has_its_own_ids(group: Any, server: ScriptedServer) -> None:
    await group.step(X)
    server.fail("StepStream", FULL)
    assert np.array_equal(await group.step(X), 2 * X)
    everyone, alone = (request.step for request in server.requests("StepStream")[1:])
    assert (list(everyone.session_ids), everyone.batch_size) == (list(group.ids), 1)
    assert list(alone.session_ids) == [group.ids[2]]
    assert list(alone.request_ids) == [everyone.request_id_base + 2]
    assert list(alone.expected_revisions) == [1]
    assert server.applied == 8


@pytest.mark.parametrize(
    ("parts", "times", "sizes"),
    # The first half gets through each time, so less and less is sent again.
    [(1, 1, [4, 4, 4, 4]), (2, 1, [4, 4, 2, 4]), (2, 2, [4, 4, 2, 1, 4])],
)
async def test_a_frame_whose_answer_is_lost_is_sent_again(
    group: Any, server: ScriptedServer, parts: int, times: int, sizes: list[int]
) -> None:
    """The stream breaks after all, or the first half, of a frame was answered; everything is applied once."""
    server.parts = parts
    await group.step(X)
    server.fail("StepStream", LOST, times)
    assert np.array_equal(await group.step(X), 2 * X)
    assert np.array_equal(await group.step(X), 3 * X)
    sent = frames(server)
    assert [len(frame.session_ids) for frame in sent] == sizes
    assert (server.applied, group.revisions.tolist()) == (12, [3] * 4)
    for again in sent[2:-1]:
        assert list(again.request_ids) == list(sent[1].request_ids)[-len(again.session_ids) :]


async def test_views_count_with_their_group(client: Any, server: ScriptedServer) -> None:
    group = await client.open_sessions(MODEL, 4, batch_size=2)
    x = np.arange(16, dtype=np.float32).reshape(8, 2)
    part = group[3:0:-1][:2]
    assert part.ids == (group.ids[3], group.ids[2])
    assert np.array_equal(await part.step(x[:4]), x[:4])
    assert np.array_equal(await group[2].step(x[:2]), x[2:4] + x[:2])
    assert group.revisions.tolist() == [0, 0, 2, 1]
    assert (part.revisions.tolist(), part.positions.tolist()) == ([1, 2], [1, 2])
    members = list(group)
    assert [one.id for one in members] == list(group.ids)
    assert [(one.revision, one.position) for one in members] == [(0, 0), (0, 0), (2, 2), (1, 1)]
    # a mask of members means all of their rows
    y = await group.step(x, reset=np.array([False, False, True, False]))
    assert np.array_equal(y[4:6], x[4:6])
    assert np.array_equal(y[6:], x[6:] + x[:2])
    await members[3].reset_states()
    await group[[3, 0]].step(x[:4])
    assert group.revisions.tolist() == [2, 1, 3, 4]
    assert len(group[4:]) == len(group[np.zeros(4, bool)]) == 0


async def test_members_go_at_the_same_time_and_a_change_of_all_waits_for_them(
    group: Any, server: ScriptedServer
) -> None:
    await asyncio.gather(*(one.step(X[i : i + 1]) for i, one in enumerate(group)), group.step(X))
    await asyncio.gather(group[:2].step(X[:2]), group.step(X), group[1:].step(X[1:]), group[1].reset_states())
    assert group.revisions.tolist() == [4, 6, 4, 4]
    assert all(
        server.sessions[one].revision == count for one, count in zip(group.ids, [4, 6, 4, 4], strict=True)
    )


async def test_a_change_of_some_members_fails_for_one_and_is_finished(
    group: Any, server: ScriptedServer
) -> None:
    """Indexes are those of the handle that was asked."""
    view = group[1:]
    server.fail("StepStream", GONE)
    with pytest.raises(errors.InternalError) as caught:
        await view.step(X[:2], members=[2, 0])
    assert list(caught.value.failures) == [0]
    assert str(caught.value).startswith("1 of 2 sessions failed, first: broken")
    assert str(caught.value).endswith(f"(session {group.ids[1]!r}, index 0)")
    others: Any = caught.value.outputs
    assert np.array_equal(others, [X[0], np.zeros(2)])
    assert group.revisions.tolist() == [0, 0, 0, 1]
    # the same members with the same arguments, by another way: what is there already is not applied again
    assert np.array_equal(await group.step(X[:2], members=[3, 1]), X[:2])
    assert group.revisions.tolist() == [0, 1, 0, 1]
    assert server.applied == 2


async def test_another_change_of_a_member_ends_what_was_unfinished(
    group: Any, server: ScriptedServer
) -> None:
    server.fail("StepStream", GONE)
    with pytest.raises(errors.InternalError):
        await group.step(X)
    await group[1].reset_states()
    assert np.array_equal(await group.step(X), [2 * X[0], X[1], *(2 * X[2:])])
    assert group.revisions.tolist() == [2, 2, 2, 2]


async def test_states_are_read_in_pieces_as_large_as_the_server_bears(
    client: Any, server: ScriptedServer
) -> None:
    server.most_states = 2
    group = await client.open_sessions(MODEL, 5)
    x = np.arange(10, dtype=np.float32).reshape(5, 2)
    await group.step(x)
    state = await group.get_states()
    assert np.array_equal(state["sum"], x)
    assert (state.batch_size, state.model, list(state)) == (5, MODEL, ["sum", "count"])
    asked = [len(request.session_ids) for request in server.requests("GetStates")]
    assert asked == [5, 3, 2, 2, 1]
    assert np.array_equal((await group.get_states(members=[4, 1]))["sum"], x[[4, 1]])
    assert (await group.get_states(members=[])).batch_size == 0
    assert (state.revision, state.position) == (None, None)  # they are the members' own
    del server.sessions[group.ids[3]]
    with pytest.raises(errors.SessionNotFoundError) as caught:
        await group[2:].get_state()
    assert list(caught.value.failures) == [1]
    others: Any = caught.value.outputs
    assert np.array_equal(others["sum"], [x[2], [0, 0], x[4]])


async def test_another_session_with_the_id_of_a_member_is_none_of_the_group(
    client: Any, server: ScriptedServer
) -> None:
    group = await client.open_sessions(MODEL, 3, session_ids=["a", "b", "c"])
    await group.step(X[:3])
    await client.close_session("b")
    await client.open_session(MODEL, batch_size=4, session_id="b")
    with pytest.raises(
        errors.InvalidInputError, match="must have its batch_size, 1; another one with 4"
    ) as caught:
        await group.get_states()
    assert list(caught.value.failures) == [1]
    others: Any = caught.value.outputs
    assert np.array_equal(others["sum"], [X[0], [0, 0], X[2]])


async def test_members_that_are_busy_are_read_again_alone(
    group: Any, server: ScriptedServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    await group.step(X)
    server.busy = {group.ids[1], group.ids[2]}
    assert np.array_equal((await group.get_states())["sum"], X)
    asked = [list(request.session_ids) for request in server.requests("GetStates")]
    assert asked == [list(group.ids), list(group.ids[1:3])]
    monkeypatch.setattr(RetryPolicy, "delay_s", lambda *_: None)
    server.busy = {group.ids[3]}
    with pytest.raises(errors.OverloadedError) as caught:
        await group.get_states()
    assert list(caught.value.failures) == [3]


async def test_a_refresh_is_one_call_and_takes_over_what_is_there(group: Any, server: ScriptedServer) -> None:
    for session_id, revision in zip(group.ids, (5, 6, 7, 8), strict=True):
        server.sessions[session_id].revision = revision
    await group[1:3].refresh()
    assert group.revisions.tolist() == [0, 6, 7, 0]
    del server.sessions[group.ids[1]]
    with pytest.raises(errors.SessionNotFoundError) as caught:
        await group.refresh()
    assert list(caught.value.failures) == [1]
    assert group.revisions.tolist() == [5, 6, 7, 8]
    assert len(server.requests("GetStates")) == 2
    assert all(request.without_state for request in server.requests("GetStates"))
    assert np.array_equal(await group.step(X[:3], members=[0, 2, 3]), X[:3])


async def test_a_fork_of_a_group_goes_its_own_way(group: Any, server: ScriptedServer) -> None:
    """Its answer is lost once, and it is there once."""
    await group.step(X)
    server.fail("ForkSessions", LOST)
    async with await group[[2, 0]].fork() as twins:
        assert len(server.sessions) == 6
        assert (twins.revisions.tolist(), twins.positions.tolist()) == ([1, 1], [1, 1])
        assert np.array_equal(await twins.step(X[:2]), X[[2, 0]] + X[:2])
        assert np.array_equal(states(server, group), X)
    assert len(server.sessions) == 4, "it was made without ids, and its block has ended"
    named = await group.fork(session_ids=list("abcd"))
    assert named.ids == tuple("abcd")
    with pytest.raises(errors.InvalidInputError, match="one id for each of 4 sessions; got 1"):
        await group.fork(session_ids=["e"])


async def test_a_fork_without_an_answer_leaves_nothing_that_nobody_named(
    client: Any, server: ScriptedServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    def delay_s(_policy: RetryPolicy, _attempt: int, error: errors.StepwellError) -> float | None:
        return None if "scripted" in error.message else 0.0

    monkeypatch.setattr(RetryPolicy, "delay_s", delay_s)
    group = await client.open_sessions(MODEL, 2, session_ids=["a", "b"])
    for ids, left in ((None, {"a", "b"}), (["c", "d"], {"a", "b", "c", "d"})):
        server.fail("ForkSessions", LOST)
        with pytest.raises(errors.UnavailableError):
            await group.fork(ids)
        assert await asyncio.to_thread(server.wait_until, functools.partial(are_left, server, left))
    assert len(server.requests("CloseSessions")) == 1


async def test_a_large_group_is_read_and_closed_in_requests_that_the_server_takes(
    client: Any, server: ScriptedServer
) -> None:
    group = await client.open_sessions(MODEL, MAX_IDS + 3)
    assert (await group.get_states())["sum"].shape == (MAX_IDS + 3, 2)
    asked = [list(request.session_ids) for request in server.requests("GetStates")]
    assert asked == [list(group.ids[:MAX_IDS]), list(group.ids[MAX_IDS:])]
    server.fail("CloseSessions", LOST)
    await group.close()
    assert not server.sessions
    first, again, rest = server.requests("CloseSessions")
    assert first == again, "a retry keeps its request id"
    assert [list(first.session_ids), list(rest.session_ids)] == asked
    assert first.request_id != rest.request_id


async def test_a_group_takes_its_views_with_it(group: Any, server: ScriptedServer) -> None:
    view, member, nested = group[:2], group[3], group[1:][0]
    await view.close()
    assert set(server.sessions) == set(group.ids[2:])
    with pytest.raises(errors.ClosedError):
        await view.step(X[:2])
    with pytest.raises(errors.SessionNotFoundError):
        await nested.step(X[:1])
    await group.step(X[2:], members=[2, 3])
    await group[0:0].close()
    await group.close()
    for handle in (group[2:], member, nested):
        with pytest.raises(errors.ClosedError):
            await handle.reset_states()


async def test_what_cannot_be_members_is_refused(client: Any, group: Any, server: ScriptedServer) -> None:
    refused: list[tuple[dict[str, Any], str]] = [
        ({"members": [4]}, r"members must be from 0 to 3, each at most once; got \[4\]"),
        ({"members": np.array([1, 1])}, r"members must be from 0 to 3, each at most once; got \[1, 1\]"),
        ({"members": np.array([-1])}, r"members must be from 0 to 3"),
        ({"members": np.ones(3, bool)}, r"members must be booleans of shape \(4,\).* got 3 booleans"),
        ({"members": 3}, "members must be a list of indexes or booleans; got 3"),
        ({"members": [0.5]}, "members must be integers or booleans; got 0.5"),
        (
            {"members": [0]},
            r"must have 1 row on its first axis \(members x batch_size\), .*; got \(4, 2\)$",
        ),
        ({"members": []}, r"the input must have 0 rows because members selects none; got shape \(4, 2\)"),
        ({"members": [], "x": {}}, "inputs must name at least one array; got an empty mapping"),
        ({"members": [], "x": [[1.0], [2.0, 3.0]]}, "the input must be an array of numbers"),
        ({"reset": np.ones(3, bool)}, r"reset must be booleans of shape \(4,\)"),
        ({"outputs": []}, "outputs must name at least one output"),
    ]
    for arguments, message in refused:
        with pytest.raises(errors.InvalidInputError, match=message):
            await group.step(**{"x": X} | arguments)
    pairs = await client.open_sessions(MODEL, 2, batch_size=2)
    with pytest.raises(
        errors.InvalidInputError, match=r"reset must be booleans .* got \[\[True\], \[True, F"
    ):
        await pairs.step(X, reset=[[True], [True, False]])
    for ids, message in (("ab", "a list of ids; got 'ab'"), (["a", "a"], "different .* got 'a' twice")):
        with pytest.raises(errors.InvalidInputError, match=f"session_ids must be {message}"):
            await pairs.fork(ids)
    with pytest.raises(errors.InvalidInputError, match="members and rows must not both be given"):
        await group.reset_states(rows=[0], members=[0])
    indexes: list[tuple[type[Exception], str, Any]] = [
        (IndexError, "index must be from -4 to 3 in a group of 4 sessions; got 4", 4),
        (errors.InvalidInputError, "members must be from 0 to 3", [7]),
        (errors.InvalidInputError, "members must be .*; got True", True),
        (errors.InvalidInputError, "members must be .*; got None", None),
    ]
    for kind, message, index in indexes:
        with pytest.raises(kind, match=message):
            group[index]
    nothing = await group.step(np.zeros((0, 2), np.float32), members=np.zeros(4, bool))
    assert (nothing.shape, nothing.dtype) == ((0, 2), np.float32)
    assert (await group.step(np.zeros((0, 5, 2), np.float32), members=[])).shape == (0, 5, 2)
    await group.reset_states(members=[])
    assert not server.requests("StepStream")
