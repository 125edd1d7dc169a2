"""When sessions end by themselves: what looks after it, as the store needs it.

Where nobody else uses the store, the table knows when sessions were used, and when clients were heard of. Where others
do, the store does: it is told, asked, and looked through.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine

from stepwell_server.clock import Clock
from stepwell_server.core.leases import Leases
from stepwell_server.core.sessions import SessionTable
from stepwell_server.engine.api import Observer
from stepwell_server.engine.durability.endings import Endings
from stepwell_server.engine.durability.group_commit import GroupCommit
from stepwell_server.engine.quotas import Quotas
from stepwell_server.engine.sessions.ending import Expiry, Removal
from stepwell_server.engine.sessions.forgetting import Forgetting
from stepwell_server.engine.sessions.leaving import Leaving
from stepwell_server.engine.sessions.overdue import Overdue
from stepwell_server.engine.sessions.service import Service
from stepwell_server.engine.sessions.sweeping import Sweep
from stepwell_server.engine.sessions.using import Clients, Usage
from stepwell_server.store.base import Store


class Lifetimes:
    """The parts that know when sessions end. Lives on the event loop."""

    def __init__(
        self,
        table: SessionTable,
        removal: Removal,
        leases: Leases,
        store: Store,
        others: Store | None,
        commits: GroupCommit,
        endings: Endings,
        *,
        quotas: Quotas | None,
        clock: Clock,
        observer: Observer,
        max_idle_s: float,
    ) -> None:
        """`others` is the store, if it may have sessions that are not in the table; `max_idle_s` 0: they never expire."""
        self.expiry = Expiry(
            table,
            removal,
            others,
            commits,
            endings,
            quotas=quotas,
            clock=clock,
            observer=observer,
            max_idle_s=max_idle_s,
        )
        service = Service(store, clock)
        self.overdue = Overdue(
            table,
            removal,
            commits,
            endings,
            service,
            quotas=quotas,
            clock=clock,
            observer=observer,
            max_idle_s=max_idle_s,
        )
        self.usage = Usage(table, leases, store, clock=clock, max_idle_s=max_idle_s)
        self.clients = Clients(leases, store, clock=clock)
        self.leaving = Leaving(leases, self.expiry, others, clock=clock)
        self.sweep = Sweep(store, self.overdue, service, commits, clock=clock, max_idle_s=max_idle_s)
        self.forgetting = Forgetting(table, self.expiry)
        is_shared = store.local is None
        own = [] if quotas is None else [quotas.run]
        self._timers = (
            [service.run, self.sweep.run, self.usage.run, self.clients.run, self.forgetting.run, *own]
            if is_shared
            else [self.expiry.run, self.leaving.run]
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
        self.clients.close()
