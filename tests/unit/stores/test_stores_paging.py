"""More sessions than rows with a store that has every change: to leave the arena costs nothing, to come back a read."""

from __future__ import annotations

from typing import Any

import pytest

from stepwell_server.engine.api import Select
from support.engine.harness import x
from support.stores.durable import DurableStore, same_reply
from support.stores.kinds import DURABLE

pytestmark = DURABLE


async def test_to_leave_and_to_come_back_writes_nothing(durable_store: DurableStore) -> None:
    ids = [f"s{i}" for i in range(12)]
    async with durable_store.engine(resident_rows=4) as at:
        await at.engine.open_sessions("plain", session_ids=ids)
        assert len(durable_store.store.tried) == 1
        for i, session_id in enumerate(ids):
            at.clock.advance(1)
            await at.step(session_id, x(1, seed=i))
        assert len(durable_store.store.tried) == 13, "one for each step"
        for session_id in ids:
            at.clock.advance(1)
            await at.state(session_id)
        assert len(durable_store.store.tried) == 13
        assert at.slots().resident <= 4
        assert await durable_store.count() == 12


@pytest.mark.parametrize("killed", [False, True])
@pytest.mark.parametrize(
    ("size", "steps", "select"),
    [(1, 5, Select.ALL), (3, 2, Select.ALL), (1, 1, Select.ALL), (3, 0, Select.ALL), (2, 5, Select.LAST)],
)
async def test_a_reply_comes_back_with_its_session(
    durable_store: DurableStore, size: int, steps: int, select: Select, killed: bool
) -> None:
    value = x(size, *([steps] if steps else []))
    again: dict[str, Any] = {"expected": 0, "request_ids": 7, "select": select}
    async with durable_store.engine(resident_rows=4) as at:
        await at.open("a", batch_size=size)
        first = await at.step("a", value, **again)
        at.clock.advance(1)
        await at.open("b", batch_size=4)
        assert not (await at.engine.session_info("a")).resident
        assert not at.internals.model("plain").replies.series
        if killed:
            durable_store.kill()
        else:
            for _ in range(2):
                same_reply(await at.step("a", value, **again), first)
                at.clock.advance(1)
                await at.state("b")
                assert not (await at.engine.session_info("a")).resident
    if killed:
        async with durable_store.engine(resident_rows=4) as at:
            same_reply(await at.step("a", value, **again), first)


async def test_a_fork_of_a_session_that_is_away_is_kept(durable_store: DurableStore) -> None:
    async with durable_store.engine(resident_rows=2) as at:
        await at.open("a")
        await at.step("a", x(1, 3))
        at.clock.advance(1)
        await at.open("b", "c")
        assert not (await at.engine.session_info("a")).resident
        await at.engine.fork("a", new_session_id="d")
        state = await at.state("a")
        durable_store.kill()
    async with durable_store.engine(resident_rows=2) as at:
        for name in "da":
            assert (await at.state(name))["sum"].tobytes() == state["sum"].tobytes()
            assert (await at.engine.session_info(name)).position == 3
