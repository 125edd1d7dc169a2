"""When sessions end by themselves: what looks after it, as the store needs it.

Where nobody else uses the store, the table knows when sessions were used. Where others do, the store does: it is notified,
asked, and looked through.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine

from stepwell_server.clock import Clock
from stepwell_server.core.idle import IdleLimits
from stepwell_server.core.sessions import SessionTable
from stepwell_server.engine.api import Observer
from stepwell_server.engine.durability.group_commit import GroupCommit
from stepwell_server.engine.quotas import Quotas
from stepwell_server.engine.sessions.ending import Expiry, Removal, Strays
from stepwell_server.engine.sessions.forgetting import Forgetting
from stepwell_server.engine.sessions.overdue import Overdue
from stepwell_server.engine.sessions.service import Service
from stepwell_server.engine.sessions.sweeping import Sweep
from stepwell_server.engine.sessions.using import Usage
from stepwell_server.store.base import Store


class Lifetimes:
    """The parts that know when sessions end. Lives on the event loop."""

    def __init__(
        self,
        table: SessionTable,
        removal: Removal,
        store: Store,
        others: Store | None,
        commits: GroupCommit,
        limits: IdleLimits,
        strays: Strays,
        *,
        quotas: Quotas | None,
        clock: Clock,
        observer: Observer,
    ) -> None:
        """`others` is the store, if it may have sessions that are not in the table."""
        self.expiry = Expiry(
            table,
            removal,
            others,
            commits,
            limits,
            strays,
            quotas=quotas,
            clock=clock,
            observer=observer,
        )
        service = Service(store, clock)
        self.overdue = Overdue(
            table,
            removal,
            commits,
            limits,
            service,
            quotas=quotas,
            clock=clock,
            observer=observer,
        )
        self.usage = Usage(table, limits, store, clock)
        self.sweep = Sweep(store, self.overdue, service, commits, limits, clock)
        self.forgetting = Forgetting(table, self.expiry)
        is_shared = store.local is None
        own = [] if quotas is None else [quotas.run]
        self._timers = (
            [service.run, self.sweep.run, self.usage.run, self.forgetting.run, *own]
            if is_shared
            else [self.expiry.run]
        )
        self._tasks: list[asyncio.Task[None]] = []

    def start(self, *others: Callable[[], Coroutine[None, None, None]]) -> None:
        """Look after it from time to time, and run others as long."""
        self._tasks = [asyncio.create_task(run()) for run in (*self._timers, *others)]

    def close(self) -> None:
        """End that, and tell the store nothing more."""
        for task in self._tasks:
            task.cancel()
        self.usage.close()
