"""The timer that ends sessions which nobody uses any more, and so gives back rows and room in the store."""

from __future__ import annotations

import asyncio

from stepwell_server.engine.durability.group_commit import GroupCommit
from stepwell_server.engine.sessions.expiry import Expiry
from stepwell_server.logs import Log

_log = Log("engine.expiry")

_TICKS = 10
"""Per time limit."""
_SHORTEST_S = 0.05
_AT_ONCE = 500
_PAUSE_S = 0.01


class ExpiryTimer:
    """Expires idle sessions from time to time. Lives on the event loop."""

    def __init__(self, expiry: Expiry, commits: GroupCommit, max_idle_s: float) -> None:
        self._expiry = expiry
        self._commits = commits
        self._max_idle_s = max_idle_s

    async def run(self) -> None:
        """Expire sessions until cancelled; without a time limit there is nothing to do."""
        while self._max_idle_s:
            await asyncio.sleep(max(_SHORTEST_S, self._max_idle_s / _TICKS))
            try:
                await self._expire_all()
            except Exception as error:
                _log.defect("idle sessions could not be expired; the timer goes on", error)

    async def _expire_all(self) -> None:
        for _ in self._expiry.expire_idle_in_parts(_AT_ONCE):
            await self._let_others()
        while self._expiry.sweep():
            await self._let_others()

    async def _let_others(self) -> None:
        """Others come first, and so does what waits for the store."""
        await asyncio.sleep(_PAUSE_S)
        await self._commits.room()
