"""Both clients while the server is killed and comes back on the same port."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

import stepwell
from stepwell.testing import LocalServer
from support.sdk.client_kinds import SHELLS, connect
from support.servers.served import local_server

X = np.ones((1, 3), np.float32)


@pytest.fixture(scope="module")
def server() -> Iterator[LocalServer]:
    with local_server("seq") as server:
        yield server


@pytest.mark.parametrize("shell", SHELLS)
async def test_calls_wait_for_a_server_that_comes_back(shell: str, server: LocalServer) -> None:
    async with connect(shell, server.address, timeout_s=200) as client:
        session = await client.open_session("seq")
        group = await client.open_sessions("seq", 3)
        await session.step(X)
        await group.step(np.ones((3, 3)))
        address = server.address
        assert server.kill() == -9
        waiting = [
            asyncio.ensure_future(call)
            for call in (client.models(), session.step(X), group.step(np.ones((3, 3))))
        ]
        await asyncio.to_thread(server.restart)
        assert server.address == address
        answers: list[Any] = await asyncio.gather(*waiting, return_exceptions=True)
        models, step, group_step = answers
        assert [info.name for info in models] == ["seq"]
        # Its sessions were in memory only: it says that they are gone, and never starts them from zero.
        assert isinstance(step, stepwell.SessionGoneError)
        assert isinstance(group_step, stepwell.SessionGoneError)
        assert sorted(group_step.failures) == [0, 1, 2]
        fresh = await client.open_session("seq")
        await fresh.step(X)
        assert fresh.revision == 1


@pytest.mark.parametrize("shell", SHELLS)
async def test_calls_end_with_their_limit_while_the_server_is_down(shell: str, server: LocalServer) -> None:
    async with connect(shell, server.address, timeout_s=200) as client:
        session = await client.open_session("seq")
        group = await client.open_sessions("seq", 3)
        server.kill()
        try:
            for call in (
                client.models(timeout_s=0.3),
                session.step(X, timeout_s=0.3),
                group.step(np.ones((3, 3)), timeout_s=0.3),
            ):
                with pytest.raises((stepwell.UnavailableError, stepwell.DeadlineExceededError)):
                    await asyncio.wait_for(call, 200)
        finally:
            await asyncio.to_thread(server.restart)


def test_stopping_is_clean(server: LocalServer) -> None:
    assert server.stop() == 0
    assert server.pid is None
    server.restart()
    with stepwell.connect(server.address) as client:
        assert [info.name for info in client.models()] == ["seq"]


@pytest.mark.parametrize("shell", SHELLS)
async def test_a_group_is_taken_up_by_the_names_of_its_sessions(shell: str, server: LocalServer) -> None:
    """What a trainer does that was killed: some sessions are there, at revisions of their own, and one is new."""
    ids = [f"{shell}-env-{i}" for i in range(4)]
    inputs = np.random.default_rng(4).normal(size=(4, 6, 3)).astype(np.float32)
    async with connect(shell, server.address) as killed:
        group = await killed.open_sessions("seq", 3, session_ids=ids[:3])
        await group.step(inputs[:3, 0])
        await group[1].step(inputs[1:2, 1])
    async with connect(shell, server.address) as client:
        group = await client.open_sessions("seq", 4, session_ids=ids, resume=True)
        assert group.resumed.tolist() == [True, True, True, False]
        assert group[0].resumed
        assert group.revisions.tolist() == group.positions.tolist() == [1, 2, 1, 0]
        members = np.array([0, 2, 3])
        await group.step(inputs[members, group.positions[members].astype(int)], members=members)
        for _ in range(2):
            await group.step(inputs[np.arange(4), group.positions.astype(int)])
        assert group.positions.tolist() == [4, 4, 4, 3]
        found = await group.get_states()
        for i, position in enumerate(group.positions.tolist()):
            _, expected = await client.predict("seq", inputs[i : i + 1, :position])
            for name, array in expected.items():
                np.testing.assert_array_equal(found[name][i : i + 1], array)
        with pytest.raises(stepwell.SessionExistsError, match=f"session '{ids[1]}' is open"):
            await client.open_sessions("seq", 2, session_ids=["fresh", ids[1]])
        with pytest.raises(
            stepwell.SessionExistsError, match=rf"session '{ids[1]}' \(index 1\) has model 'seq'"
        ):
            await client.open_sessions("seq", 2, session_ids=["fresh", ids[1]], batch_size=2, resume=True)
        await group.close()


@pytest.mark.parametrize("shell", SHELLS)
async def test_a_handle_of_a_session_that_ended_does_not_step_the_next_of_its_id(
    shell: str, server: LocalServer
) -> None:
    ids = [f"{shell}-stale-{i}" for i in range(3)]
    async with connect(shell, server.address) as mine, connect(shell, server.address) as others:
        stale = await mine.open_session("seq", session_id=ids[0])
        old_group = await mine.open_sessions("seq", 2, session_ids=ids[1:])
        await stale.step(X)
        await old_group.step(np.ones((2, 3)))
        for session_id in ids:
            await others.close_session(session_id)
        fresh = await others.open_session("seq", session_id=ids[0])
        new_group = await others.open_sessions("seq", 2, session_ids=ids[1:])
        first = await fresh.step(X)
        np.testing.assert_array_equal(await new_group.step(np.ones((2, 3))), np.repeat(first, 2, 0))
        with pytest.raises(stepwell.RevisionConflictError):
            await stale.step(X)
        with pytest.raises(stepwell.StepwellError) as caught:
            await old_group.step(np.ones((2, 3)))
        kinds = {type(error) for error in caught.value.failures.values()}
        assert kinds == {stepwell.RevisionConflictError}
        np.testing.assert_array_equal(
            await new_group.step(np.ones((2, 3))), np.repeat(await fresh.step(X), 2, 0)
        )
