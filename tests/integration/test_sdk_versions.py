"""Sessions whose model goes on to other versions, against a server whose faults are scripted, with both clients."""

from __future__ import annotations

import logging
from collections.abc import AsyncIterator, Iterator
from typing import Any

import grpc
import numpy as np
import pytest

from stepwell import errors
from stepwell.events import ModelVersionEvent
from support.sdk.client_kinds import SHELLS, connect
from support.sdk.scripted_server import MODEL, Fault, ScriptedServer

LOST = Fault(after_work=True)
"""The work is done, the answer is lost."""
X = np.arange(1, 9, dtype=np.float32).reshape(4, 2)


@pytest.fixture
def server() -> Iterator[ScriptedServer]:
    with ScriptedServer() as server:
        server.widths = {1: 2, 2: 2, 3: 4}
        server.labels = {"canary": 2}
        yield server


@pytest.fixture(params=SHELLS)
async def client(
    request: pytest.FixtureRequest, server: ScriptedServer, events: list[Any]
) -> AsyncIterator[Any]:
    hooks: Any = {"model_version": [events.append]}
    async with connect(request.param, server.address, timeout_s=60.0, event_hooks=hooks) as client:
        yield client


@pytest.fixture
def events() -> list[ModelVersionEvent]:
    return []


@pytest.mark.parametrize(
    ("model", "version", "is_pinned"),
    [(MODEL, 1, False), (f"{MODEL}@2", 2, True), (f"{MODEL}:canary", 2, True)],
)
async def test_a_session_is_on_the_version_that_it_was_opened_with(
    client: Any, model: str, version: int, is_pinned: bool
) -> None:
    session = await client.open_session(model)
    assert (session.model, session.model_version, session.model_version_pinned) == (MODEL, version, is_pinned)
    info = await client.session_info(session.id)
    assert (info.model, info.model_version, info.model_version_pinned) == (MODEL, version, is_pinned)
    group = await client.open_sessions(model, 3)
    assert (group.model, group.model_version_pinned) == (MODEL, is_pinned)
    assert group.model_versions.tolist() == [version] * 3
    assert (group[1].model_version, group[1].model_version_pinned) == (version, is_pinned)
    for forked in (await session.fork(), await group.fork(), (await group.fork())[0]):
        assert forked.model_version_pinned is is_pinned
    assert (await session.fork()).model_version == version
    assert (await group.fork()).model_versions.tolist() == [version] * 3


async def test_a_version_that_is_not_there_is_refused(client: Any) -> None:
    for model in (f"{MODEL}@7", f"{MODEL}:nightly"):
        for opening in (client.open_session(model), client.open_sessions(model, 2), client.model(model)):
            with pytest.raises(errors.ModelNotFoundError, match=model):
                await opening


async def test_every_answer_says_which_version_a_session_is_on(
    client: Any, server: ScriptedServer, events: list[ModelVersionEvent]
) -> None:
    session = await client.open_session(MODEL)
    pinned = await client.open_session(f"{MODEL}@1")
    await session.step(X[:1])
    expected = []
    for version, change in (
        (2, lambda: session.step(X[:1])),
        (1, session.reset_states),
        (2, session.refresh),
        (1, lambda: session.trace(X[:1])),
    ):
        server.move(version)
        assert session.model_version == 3 - version, "nobody has told it"
        answer = await change()
        assert session.model_version == version
        assert answer is None or getattr(answer, "model_version", version) == version
        expected.append(ModelVersionEvent(server.address, MODEL, (session.id,), 3 - version, version))
        assert events == expected
        await session.step(X[:1])
        await pinned.step(X[:1])
    assert pinned.model_version == 1
    assert events == expected, "once for each move"


async def test_a_retry_learns_it_too(
    client: Any, server: ScriptedServer, events: list[ModelVersionEvent]
) -> None:
    session = await client.open_session(MODEL)
    server.move(2)
    for method in ("Step", "StepStream"):
        server.fail(method, LOST)
    await session.step(X[:1])
    server.fail_no_more()
    assert (session.model_version, session.revision, server.applied) == (2, 1, 1)
    assert len(events) == 1


async def test_members_of_several_versions_are_put_together(
    client: Any, server: ScriptedServer, events: list[ModelVersionEvent], caplog: pytest.LogCaptureFixture
) -> None:
    group = await client.open_sessions(MODEL, 4)
    for one in (group.ids[1], group.ids[2]):
        server.sessions[one].version = 2
    server.parts = 2
    with caplog.at_level(logging.INFO, "stepwell"):
        y = await group.step(X)
    assert np.array_equal(y, X)
    assert (group.model_versions.tolist(), group.revisions.tolist()) == ([1, 2, 2, 1], [1] * 4)
    assert events == [ModelVersionEvent(server.address, MODEL, (group.ids[1], group.ids[2]), 1, 2)]
    assert "2 sessions of the model 'sum'" in caplog.text
    assert np.array_equal(await group.step(X), 2 * X), "and by their set"
    assert (group[1:].model_versions.tolist(), group[2].model_version) == ([2, 2, 1], 2)
    server.move(2)
    await group.refresh()
    assert group.model_versions.tolist() == [2] * 4
    await group[0].step(X[:1])
    assert len(events) == 2


async def test_outputs_of_several_kinds_are_no_array(client: Any, server: ScriptedServer) -> None:
    """What is applied is applied; the error says which members have which outputs."""
    group = await client.open_sessions(MODEL, 4)
    server.sessions[group.ids[2]].version = 3
    with pytest.raises(errors.ModelMismatchError) as raised:
        await group.step(X)
    assert str(raised.value) == (
        "the members' outputs must have the same names, dtypes and shapes to form one array: of model 'sum' "
        "version 1 has output 'y' float32 (rows, 2) (members 0, 1, 3); "
        "version 3 has output 'y' float32 (rows, 4) (members 2). The step was applied to all of them, and its outputs "
        "are not returned; step the members of each version by themselves: see model_versions"
    )
    assert (group.revisions.tolist(), group.model_versions.tolist()) == ([1] * 4, [1, 1, 3, 1])
    for version, width in ((1, 2), (3, 4)):
        mine = group.model_versions == version
        assert (await group[mine].step(X[mine])).shape == (mine.sum(), width)
    await group.step(X, outputs="none")
    assert group.revisions.tolist() == [3] * 4
    assert server.applied == 12


async def test_members_that_fail_beside_several_kinds_are_reported(
    client: Any, server: ScriptedServer
) -> None:
    group = await client.open_sessions(MODEL, 4)
    server.sessions[group.ids[2]].version = 3
    server.fail("StepStream", Fault(grpc.StatusCode.INTERNAL, "broken", "INTERNAL", member=1))
    with pytest.raises(errors.ModelMismatchError, match=r"was applied to 3 of the 4 members") as raised:
        await group.step(X)
    assert list(raised.value.failures) == [1]
    assert group.revisions.tolist() == [1, 0, 1, 1]


async def test_states_are_those_of_the_version_that_a_session_is_on(
    client: Any, server: ScriptedServer
) -> None:
    await client.model(MODEL)
    session = await client.open_session(MODEL)
    old = await session.get_state()
    server.move(2)
    await session.step(X[:1])
    new = await session.get_state()
    assert new.fingerprint != old.fingerprint
    await session.reset_states(new)
    with pytest.raises(errors.ModelMismatchError, match="fingerprint"):
        await session.reset_states(old)
    await session.reset_states(dict(old))
    group = await client.open_sessions(MODEL, 2)
    server.move(1)
    await group.refresh()
    states = await group.get_states()
    assert states.fingerprint == old.fingerprint
    await group.reset_states(states)
    _, state = await client.predict(f"{MODEL}@2", X)
    assert (state.model, state.fingerprint) == (MODEL, new.fingerprint)


async def test_a_session_that_moved_on_unnoticed_outlives_its_version(
    client: Any, server: ScriptedServer
) -> None:
    """The first calls after `update_model` need the description of a version that it has unloaded."""
    sessions = [await client.open_session(MODEL) for _ in range(2)]
    groups = [await client.open_sessions(MODEL, 2) for _ in range(3)]
    server.move(2)
    del server.widths[1]
    states = await sessions[0].get_state()
    await sessions[0].reset_states(dict(states))
    await sessions[1].trace(X[:1])
    assert [session.model_version for session in sessions] == [2, 2]
    both = await groups[0].get_states()
    await groups[1].reset_states(dict(both))
    await groups[2].trace(X[:2])
    assert [list(group.model_versions) for group in groups[1:]] == [[2, 2], [2, 2]]
    del server.widths[2]
    server.default = 3
    with pytest.raises(errors.ModelNotFoundError, match=f"no '{MODEL}@2'"):
        await sessions[0].reset_states({**states, "sum": states["sum"] + 1, "other": states["sum"]})


async def test_a_prediction_s_state_is_that_of_the_version_that_ran_it(
    client: Any, server: ScriptedServer
) -> None:
    first = (await client.predict(MODEL, X))[1].fingerprint
    server.move(2)
    second = (await client.predict(MODEL, X))[1].fingerprint
    assert (first, second) == (server._fingerprint(1), server._fingerprint(2))


async def test_a_hook_that_raises_ends_the_call_that_was_applied(server: ScriptedServer) -> None:
    def hook(event: ModelVersionEvent) -> None:
        raise errors.InvalidInputError(f"not version {event.version}")

    for shell in SHELLS:
        hooks: Any = {"model_version": [hook]}
        async with connect(shell, server.address, event_hooks=hooks) as client:
            session = await client.open_session(MODEL)
            server.move(2)
            with pytest.raises(errors.InvalidInputError, match="not version 2"):
                await session.step(X[:1])
            assert (session.revision, session.model_version) == (1, 2)
            server.move(1)
