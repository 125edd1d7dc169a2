"""Two engines on one store that others use too."""

from __future__ import annotations

import asyncio
import inspect
from collections.abc import AsyncIterator, Callable, Coroutine, Mapping
from contextlib import asynccontextmanager
from typing import Any

from stepwell_server.clock import Clock
from stepwell_server.program import Program
from stepwell_server.store.base import Tombstone
from support.clock import ManualClock
from support.engine.harness import STORES, Harness, running, x
from support.engine.versions import serving
from support.stores.durable import start_task
from support.stores.gates import Gated


class Times:
    """The clocks of two servers and of their store, which say quite different times."""

    def __init__(self) -> None:
        self.store = ManualClock()
        self.first = ManualClock(5.0, self.store.now() - 7 * 3600.0)
        self.second = ManualClock(9e6, self.store.now() + 9 * 3600.0)

    def advance(self, seconds: float) -> None:
        """Advance the clocks of all servers."""
        for clock in (self.store, self.first, self.second):
            clock.advance(seconds)


@asynccontextmanager
async def shared_by_two(clock: Clock | None = None) -> AsyncIterator[tuple[Gated, Gated]]:
    """A store of the kind that the test is about, as two servers see it; `clock` is its own."""
    store = await STORES.make_shared(clock)
    other = await store.another()
    try:
        yield store, other
    finally:
        await store.close()
        await other.close()


@asynccontextmanager
async def two_in_time(**options: Any) -> AsyncIterator[tuple[Harness, Harness, Times]]:
    """Two servers with clocks of their own."""
    times = Times()
    async with (
        shared_by_two(times.store) as (store, other),
        running(store=store, clock=times.first, **options) as first,
        running(store=other, clock=times.second, **options) as second,
    ):
        yield first, second, times


@asynccontextmanager
async def two(**options: Any) -> AsyncIterator[tuple[Harness, Harness]]:
    """Two servers."""
    async with (
        shared_by_two() as (store, other),
        running(store=store, **options) as first,
        running(store=other, clock=first.clock, **options) as second,
    ):
        yield first, second


async def make_resident_on_both(first: Harness, second: Harness, *session_ids: str) -> None:
    """Sessions at revision 1 that are resident on both servers."""
    await first.open(*session_ids)
    await first.submit(list(session_ids), x(len(session_ids))).all()
    for session_id in session_ids:
        await second.state(session_id)


async def held(at: Harness, begin: Callable[[], Any]) -> Any:
    """Begin a change whose commit waits until `at.store.release()`; a coroutine begins as a task."""
    store: Gated = at.store
    store.commits_held, before = True, len(store.asked("commit"))
    change = begin()
    if inspect.iscoroutine(change):
        change = await start_task(change)
    await store.until("commit", before + 1)
    return change


async def ended(*servers: Harness) -> int:
    """Run the timers of the servers; return how many sessions they ended."""
    return sum([await at.internals.expire_idle() for at in servers])


async def ended_later(times: Times, seconds: float, *servers: Harness) -> int:
    """The same after `seconds` more."""
    times.advance(seconds)
    return await ended(*servers)


async def tombstone(at: Harness, session_id: str) -> Tombstone:
    """The store's tombstone of an ended session."""
    (found,) = await at.store.found(session_id)
    assert found.tombstone is not None
    stone: Tombstone = found.tombstone
    return stone


async def sweeping(store: Gated, sweep: Coroutine[Any, Any, int]) -> asyncio.Task[int]:
    """A sweep for idle sessions that has chosen them and whose commit is held back."""
    store.commits_held = True
    task = asyncio.create_task(sweep)
    commit = asyncio.create_task(store.until("commit", len(store.asked("commit")) + 1))
    claims = 0
    while not commit.done():  # it claims the task for each page
        claim = asyncio.create_task(store.until("claim sweep", claims := claims + 1))
        await asyncio.wait({commit, claim}, return_when=asyncio.FIRST_COMPLETED)
        claim.cancel()
        store.release_once("claim sweep")
    return task


@asynccontextmanager
async def serving_two(
    programs: Mapping[str, Program] | None = None,
    others: Mapping[str, Program] | None = None,
    **options: Any,
) -> AsyncIterator[tuple[Harness, Harness]]:
    """Two servers of versions of `plain`, started; `others` are those of the second; by default the same.

    Neither is told of what the other does to versions: `internals.look` asks.
    """
    async with shared_by_two() as (store, other):
        store.is_told = other.is_told = False
        async with (
            serving(programs, store=store, **options) as first,
            serving(others or programs, store=other, clock=first.clock, **options) as second,
        ):
            yield first, second
