"""A close whose answer is lost is sent again, and leaves what another client has opened meanwhile."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from typing import Any

import numpy as np
import pytest

from stepwell import errors
from support.peers.proxy import Proxy
from support.sdk.client_kinds import SHELLS, connect
from support.servers.served import Served

X = np.ones((1, 3), np.float32)
WAIT_S = 200.0
Close = Callable[[Any, Any, Any], Coroutine[Any, Any, Any]]
CLOSES: dict[str, Close] = {
    "session.close": lambda _client, session, _group: session.close(),
    "client.close_session": lambda client, session, _group: client.close_session(session.id),
    "group.close": lambda _client, _session, group: group.close(),
    "client.close_sessions": lambda client, _session, group: client.close_sessions(group.ids),
}


async def gone(client: Any, session_id: str) -> None:
    """Return when there is no session of an id."""
    async with asyncio.timeout(WAIT_S):
        while True:
            try:
                await client.session_info(session_id)
            except errors.SessionNotFoundError:
                return


@pytest.mark.parametrize("shell", SHELLS[::2])
@pytest.mark.parametrize("close", CLOSES)
async def test_a_close_whose_answer_is_lost_leaves_the_session_that_was_opened_since(
    served: Served, shell: str, close: str
) -> None:
    prefix = f"lost {shell} {close}:"
    ids = [prefix + name for name in ("one", "two", "three")]
    with Proxy(served.address, 1) as proxy:
        async with connect(shell, proxy.address) as first, connect("sync", served.address) as second:
            session = await first.open_session("seq", session_id=ids[0])
            group = await first.open_sessions("seq", 2, session_ids=ids[1:])
            closed = ids[:1] if "sessions" not in close and "group" not in close else ids[1:]
            await session.step(X)
            proxy.hold("answers")
            closing = asyncio.create_task(CLOSES[close](first, session, group))
            for session_id in closed:
                await gone(second, session_id)
            others = [await second.open_session("seq", session_id=each) for each in closed]
            for other in others:
                await other.step(X)
            proxy.be("clean")  # the connection ends, and with it the answer
            proxy.release()
            async with asyncio.timeout(WAIT_S):
                await closing
            for other in others:
                await other.step(X)
            await second.close_sessions(prefix=prefix)


@pytest.mark.parametrize("shell", SHELLS[::2])
async def test_a_handle_closes_its_own_session_alone(served: Served, shell: str) -> None:
    """Also where nobody sends anything again: another client has closed and opened the id."""
    async with connect(shell, served.address) as first, connect("sync", served.address) as second:
        session = await first.open_session("seq", session_id="handle")
        group = await first.open_sessions("seq", 2, session_ids=["member 1", "member 2"])
        await second.close_sessions(["handle", "member 1"])
        others = [await second.open_session("seq", session_id=each) for each in ("handle", "member 1")]
        await session.close()
        await group.close()
        for other in others:
            await other.step(X)
        with pytest.raises(errors.SessionNotFoundError):
            await second.session_info("member 2")
        again = await first.open_session("seq", session_id="handle")
        assert again.resumed
        await again.close()
        with pytest.raises(errors.SessionNotFoundError):
            await others[0].step(X)
        await others[1].close()
