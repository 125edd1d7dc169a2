"""Both clients against a server that refuses a token while changes are under way: sent again with another, applied once."""

from __future__ import annotations

from typing import Any

import grpc
import numpy as np
import pytest

from stepwell import errors
from support.sdk.client_kinds import SHELLS, connect
from support.sdk.scripted_server import MODEL, Fault, ScriptedServer

ENDED = Fault(grpc.StatusCode.UNAUTHENTICATED, "revoked", "UNAUTHENTICATED", after_work=True)
"""The token is revoked when the work is done and before the answer is."""


def numbered(shell: str, given: list[str]) -> Any:
    """A function that returns another token each time."""

    def token() -> str:
        given.append(f"t{len(given) + 1}")
        return given[-1]

    async def awaited() -> str:
        return token()

    return awaited if shell.startswith("async") else token


@pytest.mark.parametrize("shell", SHELLS)
async def test_a_change_whose_token_is_revoked_is_sent_again_with_another(
    shell: str, server: ScriptedServer
) -> None:
    given: list[str] = []
    server.parts = 2
    x = np.random.default_rng(3).random((4, 2), np.float32)
    async with connect(shell, server.address, token=numbered(shell, given)) as client:
        group = await client.open_sessions(MODEL, 4)
        session = await client.open_session(MODEL)
        server.fail("StepStream", ENDED)
        np.testing.assert_array_equal(await group.step(x), x)
        assert group.revisions.tolist() == [1] * 4
        assert (given, server.applied) == (["t1", "t2"], 4)
        assert server.metadata["StepStream"]["authorization"] == "Bearer t2"
        method = "StepStream" if shell == "async" else "Step"
        server.fail(method, ENDED)
        np.testing.assert_array_equal(await session.step(x[:1]), x[:1])
        assert (given, server.applied, session.revision) == (["t1", "t2", "t3"], 5, 1)
        server.fail(method, ENDED, 2)
        with pytest.raises(errors.UnauthenticatedError, match="revoked"):
            await session.step(x[1:2])
        # The same call again finishes the change; it was applied by the first attempt.
        y = await session.step(x[1:2])
        assert (len(given), server.applied, session.revision) == (5, 6, 2)
        assert y.shape == (1, 2)


@pytest.mark.parametrize("shell", ["sync", "async"])
async def test_a_token_that_is_no_function_fails_without_a_retry(shell: str, server: ScriptedServer) -> None:
    x = np.random.default_rng(4).random((4, 2), np.float32)
    async with connect(shell, server.address, token="t1") as client:
        group = await client.open_sessions(MODEL, 4)
        server.fail("StepStream", ENDED)
        with pytest.raises(errors.UnauthenticatedError) as raised:
            await group.step(x)
        assert {getattr(one, "outcome", None) for one in raised.value.failures.values()} == {"unknown"}
        np.testing.assert_array_equal(await group.step(x), x)
        assert (server.applied, group.revisions.tolist()) == (4, [1] * 4)
        assert len(server.requests("StepStream")) == 2
