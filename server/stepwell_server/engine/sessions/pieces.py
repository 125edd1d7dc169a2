"""Calls on many sessions are done in pieces, one piece in each turn of the event loop.

However many such calls run, each turn has one piece of one of them, so that single steps wait for one piece and not for
one of each call. Tenants take turns, then the calls of a tenant.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import AsyncIterator, Sequence

from stepwell_server.core.namespaces import tenant_of
from stepwell_server.engine.shares import LoopTurns

#: Sessions of one piece: some 0.1 ms of work.
TURN = 64


class Pieces:
    """Whose piece is next. Lives on one event loop."""

    def __init__(self, turns: LoopTurns) -> None:
        self._turns = turns
        self._waiting: dict[str, deque[asyncio.Future[None]]] = {}
        """By tenant, in the order of their turns."""
        self._is_due = False
        """`_next` will be called."""

    async def turn(self, tenant: str) -> None:
        """Return in a turn of the event loop in which no other piece is done."""
        mine: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._waiting.setdefault(tenant, deque()).append(mine)
        self._come_again()
        await mine

    async def of(self, session_ids: Sequence[str]) -> AsyncIterator[slice]:
        """Parts of many ids of one tenant, each in its turn; what is one piece needs none."""
        if session_ids:
            async for part in self.parts(len(session_ids), tenant_of(session_ids[0])):
                yield part

    async def parts(self, count: int, tenant: str) -> AsyncIterator[slice]:
        """As `of`, of so many things of a tenant."""
        for start in range(0, count, TURN):
            if count > TURN:
                await self.turn(tenant)
            yield slice(start, min(start + TURN, count))

    def _come_again(self) -> None:
        if not self._is_due:
            self._is_due = True
            self._turns.soon(self._next)

    def _next(self) -> None:
        self._is_due = False
        while self._waiting:
            tenant = next(iter(self._waiting))
            line = self._waiting.pop(tenant)
            first = line.popleft()
            if line:
                self._waiting[tenant] = line  # at the end
            if not first.done():  # else whoever waited was cancelled
                first.set_result(None)
                break
        if self._waiting:
            self._come_again()
