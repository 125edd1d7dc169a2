"""Work that begins at once: what becomes of it when it is cancelled while it waits."""

from __future__ import annotations

import asyncio

import pytest

from stepwell_server.engine.eager import Rest, finish, start


@pytest.mark.parametrize("returns", [True, False])
async def test_work_that_waits_is_cancelled_where_it_waits(returns: bool) -> None:
    """What it waits for is cancelled with it; it may clean up, and wait for that."""
    first, second = (asyncio.get_running_loop().create_future() for _ in range(2))
    steps: list[str] = []

    async def work() -> str:
        try:
            steps.append(await first)
        except asyncio.CancelledError:
            steps.append(await second)
            if not returns:
                raise
        return "returned"

    rest = start(work())
    assert isinstance(rest, Rest)
    task = asyncio.create_task(finish(rest))
    await asyncio.sleep(0)
    task.cancel()
    await asyncio.sleep(0)
    assert first.cancelled()
    assert steps == []
    second.set_result("cleaned up")
    await asyncio.wait([task])
    assert steps == ["cleaned up"]
    assert task.cancelled() is not returns
    assert not returns or task.result() == "returned"
