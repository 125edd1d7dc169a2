"""Two engines on one store that others use too."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Coroutine, Mapping
from contextlib import asynccontextmanager
from typing import Any

from stepwell_server.program import Program
from stepwell_server.store.memory import MemoryStore
from support.awaited import RemoteStore
from support.clock import ManualClock
from support.engine import Harness, running, x
from support.versions import serving


class Times:
    """The clocks of two servers and of their store, which say quite different times."""

    def __init__(self) -> None:
        self.store = ManualClock()
        self.first = ManualClock(5.0, self.store.now() - 7 * 3600.0)
        self.second = ManualClock(9e6, self.store.now() + 9 * 3600.0)

    def advance(self, seconds: float) -> None:
        """Time goes on."""
        for clock in (self.store, self.first, self.second):
            clock.advance(seconds)


@asynccontextmanager
async def two_in_time(**options: Any) -> AsyncIterator[tuple[Harness, Harness, Times]]:
    """Two servers with clocks of their own."""
    times = Times()
    store = RemoteStore(MemoryStore(), times.store)
    async with (
        running(store=store, clock=times.first, **options) as first,
        running(store=store.replica(), clock=times.second, **options) as second,
    ):
        yield first, second, times


@asynccontextmanager
async def two(**options: Any) -> AsyncIterator[tuple[Harness, Harness]]:
    """Two servers."""
    store = RemoteStore(MemoryStore())
    async with (
        running(store=store, **options) as first,
        running(store=store.replica(), clock=first.clock, **options) as second,
    ):
        yield first, second


async def both_know(first: Harness, second: Harness, *session_ids: str) -> None:
    """Sessions at revision 1 that are resident on both servers."""
    await first.open(*session_ids)
    await first.submit(list(session_ids), x(len(session_ids))).all()
    for session_id in session_ids:
        await second.state(session_id)


async def sweeping(store: RemoteStore, sweep: Coroutine[Any, Any, int]) -> asyncio.Task[int]:
    """A look for sessions to end that has judged them, and whose commit is on its way."""
    store.commits_held = True
    task = asyncio.create_task(sweep)
    await store.until("claim sweep")
    store.let_go_once("claim sweep")
    await store.until("commit", len(store.asked("commit")) + 1)
    return task


@asynccontextmanager
async def serving_two(
    programs: Mapping[str, Program] | None = None,
    others: Mapping[str, Program] | None = None,
    **options: Any,
) -> AsyncIterator[tuple[Harness, Harness]]:
    """Two servers of versions of `plain`, started; `others` are those of the second, the same if nothing is said.

    Neither is told of what the other does to versions: `inside.look` asks.
    """
    store = RemoteStore(MemoryStore())
    other = store.replica()
    store.is_told = other.is_told = False
    async with (
        serving(programs, store=store, **options) as first,
        serving(others or programs, store=other, clock=first.clock, **options) as second,
    ):
        yield first, second
