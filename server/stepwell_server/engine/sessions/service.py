"""For how long a shared store has been served without a break: time in which nobody could use a session ends none.

Every server says every few seconds that it is there, by a claim that all of them have together. Where nobody could say
so for longer, because the store was away or no server ran, the time begins anew.
"""

from __future__ import annotations

import asyncio
import math

from stepwell_server.clock import Clock
from stepwell_server.errors import ServerError
from stepwell_server.logs import Log
from stepwell_server.store.base import Store

_log = Log("engine.service")

TASK, EVERYBODY = "service", "all"
#: A longer time in which no server says that it is there is a break, in seconds.
BREAK_S = 20.0
_EVERY_S = 5.0


class Service:
    """Knows since when a store is served. Lives on the event loop."""

    def __init__(self, store: Store, clock: Clock) -> None:
        self._store = store
        self._clock = clock
        self._held_s = 0.0
        self._asked_at = -math.inf

    async def seconds(self) -> float:
        """For how long the store has been served.

        Raises:
            Unavailable: it cannot be asked now.
        """
        if self._clock.monotonic() - self._asked_at >= _EVERY_S:
            await self._say()
        return self._held_s + self._clock.monotonic() - self._asked_at

    async def run(self) -> None:
        """Say that this server is there, until cancelled."""
        while True:
            try:
                await self._say()
            except ServerError:
                pass  # what looks after the store says so
            except Exception as error:
                _log.defect("the store could not be told that it is served; the timer goes on", error)
            await asyncio.sleep(_EVERY_S)

    async def _say(self) -> None:
        at = self._clock.monotonic()
        held_s = await self._store.claim(TASK, EVERYBODY, BREAK_S)
        self._held_s, self._asked_at = held_s or 0.0, at
