"""Two engines on one store that others use too."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

from stepwell_server.store.memory import MemoryStore
from support.awaited import RemoteStore
from support.engine import Harness, running, x


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
