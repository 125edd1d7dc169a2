"""The timer that ends sessions which nobody uses any more.

A session is also looked at when it is named, so nobody sees one that should be gone: the timer gives back rows and
room in the store.
"""

from __future__ import annotations

import asyncio
import logging

from stepwell_server.clock import Clock
from stepwell_server.engine.directory import Directory
from stepwell_server.errors import ServerError
from stepwell_server.store.base import Store

log = logging.getLogger(__name__)

_TICKS = 10
"""Per time limit."""
_SHORTEST_S = 0.05
_AT_ONCE = 500
_PAUSE_S = 0.01


class Expiry:
    """Expires idle sessions from time to time. Lives on the event loop."""

    def __init__(self, directory: Directory, store: Store, clock: Clock, max_idle_s: float) -> None:
        self._directory = directory
        self._store = store
        self._clock = clock
        self._max_idle_s = max_idle_s
        self._started = clock.monotonic()
        self._after: str | None = None if store.is_volatile else ""
        """How far the store has been looked through for sessions that nobody named since the start."""

    async def run(self) -> None:
        """Expire sessions until cancelled; without a time limit there is nothing to do."""
        while self._max_idle_s:
            await asyncio.sleep(max(_SHORTEST_S, self._max_idle_s / _TICKS))
            try:
                await self._expire_all()
            except Exception:
                log.exception("idle sessions could not be expired; the timer goes on")

    async def _expire_all(self) -> None:
        for _ in self._directory.expire_idle_in_parts(_AT_ONCE):
            await asyncio.sleep(_PAUSE_S)  # others come first
        more = self.sweep()
        while more:
            await asyncio.sleep(_PAUSE_S)  # others come first
            more = self.sweep()

    def sweep(self) -> bool:
        """Expire some of the store's sessions that nobody has named since the start; True if there are more.

        Each start does this once, when the time limit has passed: from then on all others are in the table.
        """
        if (
            not self._max_idle_s
            or self._after is None
            or self._clock.monotonic() - self._started <= self._max_idle_s
        ):
            return False
        try:
            found = self._store.scan(after=self._after, limit=_AT_ONCE)
        except ServerError as error:
            log.warning("the store could not be looked through for idle sessions: %s", error)
            return False
        self._directory.expire_untouched(found)
        self._after = found[-1][0] if found else None
        return bool(found)
