"""Of steps that are under way together one is cancelled, or its time is up, at every place in turn.

The others are answered right. Of the one nobody knows: it was applied once or not at all, and whichever it was, the
session's state, revision and next outputs agree with it; made again, it is the same change.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import stepwell
from support.checks.history import Call, End, Floats, Log
from support.load.driver import FEATURES, MODEL
from support.peers.proxy import Direction, Proxy
from support.sdk.client_kinds import connect
from support.servers.fault_servers import FaultyServer, local, verdict

BATCH = 8
LIMIT_S = 0.1
"""Of the one whose time is up: long enough to get on its way."""
SHELLS = ("async", "async without frames")

Held = Callable[[], contextlib.AbstractAsyncContextManager[Callable[[], Any]]]
"""Inside the block steps get no further than to some place; calling what it gives waits until there are some."""


class Scribe:
    """Uses sessions, and writes it down."""

    def __init__(self, path: Path) -> None:
        self._log = Log(path, seed=31)
        self._rng = np.random.default_rng(31)

    async def open(self, client: Any, i: int) -> Any:
        name, batch_size = f"s{i}", 1 + i % 2
        number = self._log.call(Call(kind="open", session=name, batch_size=batch_size))
        session = await client.open_session(MODEL, batch_size=batch_size, session_id=name)
        self._log.end(number, _at(session))
        return session

    def asked(self, session: Any) -> tuple[str, Floats]:
        """A step that is about to be made: its number and its inputs."""
        x = self._rng.standard_normal((session.batch_size, FEATURES)).astype(np.float32)
        call = Call(kind="step", session=session.id, expected=session.revision, x=x)
        return self._log.call(call), x

    async def made(self, session: Any, number: str, x: Floats) -> None:
        """Make it."""
        y = await session.step(x)
        end = End(outcome="acknowledged", revision=session.revision, position=session.position, y=y)
        self._log.end(number, end)

    async def given_up(self, session: Any, number: str) -> None:
        """Its outcome stays unknown; look where the session is, once nothing is under way there any more."""
        self._log.end(number, End(outcome="unknown"))
        await self.read(session)  # comes after what came before it; looking alone would not
        number = self._log.call(Call(kind="look", session=session.id))
        await session.refresh()
        self._log.end(number, _at(session))

    async def read(self, session: Any) -> None:
        number = self._log.call(Call(kind="read", session=session.id))
        state = await session.get_state()
        at = {"revision": state.revision, "position": state.position}
        self._log.end(number, End(outcome="acknowledged", **at, states=dict(state)))


def _at(session: Any) -> End:
    return End(outcome="acknowledged", revision=session.revision, position=session.position)


async def every_place(client: Any, history: Path, held: Held, how: str) -> None:
    """The test."""
    scribe = Scribe(history)
    sessions = [await scribe.open(client, i) for i in range(BATCH)]
    for place in range(BATCH):
        async with held() as some_are_held:
            asked = [scribe.asked(session) for session in sessions]
            steps = [
                asyncio.ensure_future(
                    session.step(x, timeout_s=LIMIT_S)
                    if how == "deadline" and i == place
                    else scribe.made(session, number, x)
                )
                for i, (session, (number, x)) in enumerate(zip(sessions, asked, strict=True))
            ]
            await some_are_held()
            if how == "cancel":
                steps[place].cancel()
            with pytest.raises((asyncio.CancelledError, stepwell.DeadlineExceededError)):
                await steps[place]
        await asyncio.gather(*(step for i, step in enumerate(steps) if i != place))
        if place % 2:
            await scribe.made(sessions[place], *asked[place])
        else:
            await scribe.given_up(sessions[place], asked[place][0])
        for session in sessions:
            await scribe.read(session)
    report = verdict(history).require_clean()
    assert report.acknowledged == BATCH * BATCH - BATCH // 2
    assert report.unknown == BATCH // 2


@pytest.mark.parametrize("how", ["cancel", "deadline"])
@pytest.mark.parametrize("direction", ["requests", "answers"])
@pytest.mark.parametrize("shell", SHELLS)
async def test_on_the_way(tmp_path: Path, shell: str, direction: Direction, how: str) -> None:
    """Before the server has heard of the steps, or after it has answered."""
    with local(None) as server, Proxy(server.address, seed=31) as proxy:

        @contextlib.asynccontextmanager
        async def held() -> AsyncIterator[Callable[[], Any]]:
            proxy.hold(direction)
            yield lambda: asyncio.to_thread(proxy.held.wait, 100)
            proxy.release()

        async with connect(shell, proxy.address) as client:
            await every_place(client, tmp_path / "history", held, how)


@pytest.mark.parametrize("how", ["cancel", pytest.param("deadline", marks=pytest.mark.slow)])
@pytest.mark.parametrize("shell", SHELLS)
async def test_while_the_store_is_busy(tmp_path: Path, shell: str, how: str) -> None:
    """The first of them have run, none of them is kept yet, the others wait."""
    with FaultyServer(tmp_path / "data", "--durability", "sync") as server:

        @contextlib.asynccontextmanager
        async def held() -> AsyncIterator[Callable[[], Any]]:
            await asyncio.to_thread(server.tell, "stall")
            yield lambda: asyncio.to_thread(server.wait_for, "stalled")
            await asyncio.to_thread(server.tell, "well")

        async with connect(shell, server.address) as client:
            await every_place(client, tmp_path / "history", held, how)
