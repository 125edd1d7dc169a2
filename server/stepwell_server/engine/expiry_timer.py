"""The timer that ends sessions which nobody uses any more, and so gives back rows and room in the store."""

from __future__ import annotations

import asyncio
import logging

from stepwell_server.engine.expiry import Expiry

log = logging.getLogger(__name__)

_TICKS = 10
"""Per time limit."""
_SHORTEST_S = 0.05
_AT_ONCE = 500
_PAUSE_S = 0.01


class ExpiryTimer:
    """Expires idle sessions from time to time. Lives on the event loop."""

    def __init__(self, expiry: Expiry, max_idle_s: float) -> None:
        self._expiry = expiry
        self._max_idle_s = max_idle_s

    async def run(self) -> None:
        """Expire sessions until cancelled; without a time limit there is nothing to do."""
        while self._max_idle_s:
            await asyncio.sleep(max(_SHORTEST_S, self._max_idle_s / _TICKS))
            try:
                await self._expire_all()
            except Exception:
                log.exception("idle sessions could not be expired; the timer goes on")

    async def _expire_all(self) -> None:
        for _ in self._expiry.expire_idle_in_parts(_AT_ONCE):
            await asyncio.sleep(_PAUSE_S)  # others come first
        more = self._expiry.sweep()
        while more:
            await asyncio.sleep(_PAUSE_S)  # others come first
            more = self._expiry.sweep()
