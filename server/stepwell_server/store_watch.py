"""Looks after the store while the server runs, and tells probes, log and metrics how it is."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

from stepwell_server.errors import StoreGone
from stepwell_server.logs import Log

if TYPE_CHECKING:
    from stepwell_server.metrics.observer import PrometheusObserver
    from stepwell_server.process.readiness import Readiness
    from stepwell_server.store.base import Store, StoreHealth

_log = Log("app")
CHECK_S = 2.0
"""Time between two looks."""
_WARNINGS = {
    "disk": ("the disk of the store is nearly full", "the disk of the store has room again"),
    "store": ("the store is not as it should be", "the store is as it should be again"),
}
"""What is said when a warning begins, and when it is over."""


async def look_after(store: Store, readiness: Readiness, observer: PrometheusObserver) -> None:
    """Check the store from time to time; return when it is gone."""
    while True:
        await asyncio.sleep(CHECK_S)
        try:
            health = await store.check()
        except StoreGone as error:
            _log.error("the store is gone, the server ends", reason=error.message)
            return
        except Exception as error:
            _log.defect("the store could not be checked", error)
            continue
        tell(health, readiness, observer, is_damaged=bool(store.damage))


def tell(
    health: StoreHealth, readiness: Readiness, observer: PrometheusObserver, *, is_damaged: bool
) -> None:
    """Make known how the store is; a line is written when that changes."""
    before = readiness.report
    is_ready = not health.problem
    observer.store_checked(
        is_ready=is_ready,
        reopened=health.reopened,
        is_damaged=is_damaged,
        lost_sessions=health.lost_sessions,
    )
    if is_ready is ("store" in before.problems):
        if is_ready:
            _log.info("the store can be used again")
        else:
            _log.warning("the store cannot be used", reason=health.problem)
    readiness.problem("store", health.problem)
    about = health.warns_of
    if bool(health.warning) is not (about in before.warnings):
        begun, over = _WARNINGS[about]
        if health.warning:
            _log.warning(begun, reason=health.warning)
        else:
            _log.info(over)
    readiness.warning(about, health.warning)
