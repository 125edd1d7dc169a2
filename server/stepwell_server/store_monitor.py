"""Checks the store while the server runs, and reports its health to probes, log and metrics."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

from stepwell_server.errors import StoreGone
from stepwell_server.logs import Log
from stepwell_server.store.base import StoreHealth

if TYPE_CHECKING:
    from stepwell_server.process.readiness import Readiness
    from stepwell_server.store.base import Store

_log = Log("app")
CHECK_S = 2.0
"""The time between checks, in seconds."""
_WARNINGS = {
    "disk": ("the disk of the store is nearly full", "the disk of the store has room again"),
    "store": ("the store has a problem", "the store has no problem any more"),
}
"""The events logged when a warning begins and when it ends."""


class StoreMonitor:
    """Checks the store. Used on the event loop."""

    def __init__(self, store: Store, readiness: Readiness) -> None:
        self._store = store
        self._readiness = readiness
        self.health = StoreHealth()
        """The result of the last check."""

    async def run(self) -> None:
        """Check the store periodically; return when it is gone."""
        while True:
            await asyncio.sleep(CHECK_S)
            try:
                health = await self._store.check()
            except StoreGone as error:
                _log.error("the store is gone, the server ends", reason=error.message)
                return
            except Exception as error:
                _log.defect("the store could not be checked", error)
                continue
            self.report(health)

    def report(self, health: StoreHealth) -> None:
        """Report the store's health to probes, and log changes."""
        self.health = health
        before = self._readiness.report
        is_ready = not health.problem
        if is_ready is ("store" in before.problems):
            if is_ready:
                _log.info("the store can be used again")
            else:
                _log.warning("the store cannot be used", reason=health.problem)
        self._readiness.problem("store", health.problem)
        about = health.warns_of
        if bool(health.warning) is not (about in before.warnings):
            begun, over = _WARNINGS[about]
            if health.warning:
                _log.warning(begun, reason=health.warning)
            else:
                _log.info(over)
        self._readiness.warning(about, health.warning)
