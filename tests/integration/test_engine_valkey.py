"""Engines on a real Valkey that is paused, full, killed and started again; sessions that end by its clock."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Iterator
from typing import Any

import pytest

from stepwell_server.clock import Clock, SystemClock
from stepwell_server.errors import Overloaded, ServerError, SessionExpired, Unavailable
from support.engine.fake_executor import WAIT_S
from support.engine.harness import Harness, running, x
from support.servers.valkey_servers import Valkey
from support.stores.valkey_store import fresh_prefix, opened, time_limit

TEN_YEARS_MS = 3650 * 86_400_000


@pytest.fixture(scope="module")
def valkey() -> Iterator[Valkey]:
    with Valkey() as server:
        yield server


@contextlib.asynccontextmanager
async def engines(
    valkey: Valkey, *, limit_s: float | None = None, **options: Any
) -> AsyncIterator[tuple[Harness, Harness]]:
    """Two servers on a new store. `limit_s`: of their waits for its answers, once they are there."""
    clock: Clock = SystemClock()
    url = valkey.url(f"?prefix={fresh_prefix()}&timeout_ms=60000")
    async with contextlib.AsyncExitStack() as stack:
        found = []
        for _ in range(2):
            store = await opened(url, clock=clock)
            stack.push_async_callback(store.close)
            found.append(await stack.enter_async_context(running(store=store, clock=clock, **options)))  # type: ignore[arg-type]
            if limit_s is not None:
                stack.enter_context(time_limit(store, limit_s))
        yield found[0], found[1]


async def until_expired(at: Harness, session_id: str) -> None:
    """Return when a session has ended; nobody names it before."""

    async def wait() -> None:
        while not await at.internals.expire_idle():
            pass  # it has asked the server

    await asyncio.wait_for(wait(), WAIT_S)
    with pytest.raises(SessionExpired):
        await at.state(session_id)


async def test_an_unused_session_ends_by_the_clock_of_the_server(valkey: Valkey) -> None:
    async with engines(valkey, max_session_idle_s=0.3) as (first, second):
        await first.open("a")
        await until_expired(second, "a")
        with pytest.raises(SessionExpired):
            await first.step("a", x(1))
        assert (await first.engine.open_session("plain", session_id="a")).session.revision == 1


@pytest.mark.slow
async def test_sessions_end_by_limits_of_their_own(valkey: Valkey) -> None:
    async with engines(valkey) as (first, second):
        stays = [
            (await first.engine.open_session("plain", max_idle_ms=limit)).session.session_id
            for limit in (TEN_YEARS_MS, 600_000, 0)
        ]
        gone = (await first.engine.open_session("plain", max_idle_ms=5000)).session.session_id
        await until_expired(second, gone)
        with pytest.raises(SessionExpired):
            await first.step(gone, x(1))
        for name in stays:
            assert (await second.step(name, x(1))).revision == 1
        short = (await first.engine.open_session("plain", max_idle_ms=1000)).session.session_id
        await asyncio.wait_for(until_named_expired(second, short), WAIT_S)


async def until_named_expired(at: Harness, session_id: str) -> None:
    """Return when whoever names a session finds it expired; to describe it is no use."""
    while True:
        try:
            await at.engine.session_info(session_id)
        except SessionExpired:
            return


class Drivers:
    """Steps of some sessions, one after the other, each sent again until it is answered."""

    def __init__(self, servers: tuple[Harness, Harness], count: int) -> None:
        self._servers = servers
        self.names = [f"s{number}" for number in range(count)]
        self.revisions = dict.fromkeys(self.names, 0)
        self.refused: list[ServerError] = []
        self._came = asyncio.Event()
        self._is_over = False

    async def run(self, name: str) -> None:
        request = 0
        while not self._is_over:
            request += 1
            for attempt in range(100_000):
                at = self._servers[(attempt + request) % 2]
                try:
                    answer = await at.step(
                        name, x(1, seed=request), expected=self.revisions[name], request_ids=request
                    )
                except (Unavailable, Overloaded) as error:
                    self.refused.append(error)
                    self._came.set()
                    await asyncio.sleep(0)
                    continue
                assert answer.revision == self.revisions[name] + 1
                self.revisions[name] += 1
                self._came.set()
                break

    async def until(self, condition: Any) -> None:
        async def wait() -> None:
            while not condition():
                self._came.clear()
                await self._came.wait()

        await asyncio.wait_for(wait(), WAIT_S)

    async def until_all_went_on(self) -> None:
        """Return when each has been answered once more."""
        before = dict(self.revisions)
        await self.until(lambda: all(self.revisions[name] > before[name] + 1 for name in self.names))

    async def _opened(self, name: str) -> None:
        while True:
            try:
                await self._servers[0].engine.open_session("plain", session_id=name)
            except Unavailable:
                continue  # a busy disk took longer than the store's time limit
            return

    @contextlib.asynccontextmanager
    async def under_way(self) -> AsyncIterator[None]:
        for name in self.names:
            await self._opened(name)
        async with asyncio.TaskGroup() as group:
            for name in self.names:
                group.create_task(self.run(name))
            await self.until_all_went_on()
            yield
            await self.until_all_went_on()
            self._is_over = True
        for name in self.names:
            for at in self._servers:
                assert (await _info(at, name)).revision == self.revisions[name]


async def _info(at: Harness, name: str) -> Any:
    while True:
        try:
            return await at.engine.session_info(name)
        except Unavailable:
            pass  # see `Drivers._opened`


@pytest.mark.slow
@pytest.mark.parametrize("trouble", ["paused", "killed", "full"])
async def test_steps_are_refused_while_the_server_is_in_trouble_and_go_on_afterwards(trouble: str) -> None:
    with Valkey(append="always") as valkey:
        async with engines(valkey, limit_s=1.0, resident_rows=8) as servers:
            drivers = Drivers(servers, 12)
            async with drivers.under_way():
                if trouble == "paused":
                    await asyncio.to_thread(valkey.pause)
                elif trouble == "killed":
                    await asyncio.to_thread(valkey.kill)
                else:
                    valkey.ask("CONFIG", "SET", "maxmemory", "1")
                begun = len(drivers.refused)
                await drivers.until(lambda: len(drivers.refused) > begun + 30)
                for at in servers:
                    assert at.internals.commits.waiting <= 12
                    with pytest.raises((Unavailable, Overloaded)) as refused:
                        await asyncio.wait_for(at.engine.open_session("plain"), WAIT_S)
                    assert (getattr(refused.value, "retry_after_s", 0.0) > 0) or trouble != "full"
                if trouble == "paused":
                    await asyncio.to_thread(valkey.resume)
                elif trouble == "killed":
                    await asyncio.to_thread(valkey.start)
                else:
                    valkey.ask("CONFIG", "SET", "maxmemory", "0")
            if trouble == "full":
                assert any(isinstance(error, Overloaded) for error in drivers.refused)
