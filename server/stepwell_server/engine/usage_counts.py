"""How many sessions, rows and bytes tenants have.

A store that others use too counts what all servers keep. It is asked again before a tenant with a limit begins sessions,
unless it was just asked. What begins here meanwhile is added, and what is being made here: the store may not have it yet.
So a tenant can have more than its limit by what begins on other servers after the store was asked, and by what servers
have sent that the store gets later still. While it has more it gets no other.

What the store had already when it was asked, and had not said yet, is counted twice until it is asked again. What has
ended is not subtracted, as nobody knows whether the store had counted it when it was asked: it is asked again. Nor is
what was not made, as far as that is known: the store may have it, and only its answer was lost.

A store of one server answers that what its server has counted is exact. So it is: whatever has ended is subtracted, and
no session more or less than the limit is there.
"""

from __future__ import annotations

import asyncio
import dataclasses
import math
from collections.abc import Iterable

from stepwell_server.clock import Clock
from stepwell_server.core.quotas import NOTHING, Usage
from stepwell_server.engine.eager import Rest, finish, start
from stepwell_server.store.base import Store

#: What is older is asked for again, in seconds, before sessions begin.
FRESH_S = 1.0
#: Tenants that are asked for at the same time, for people who look at them.
_MAX_CONCURRENT = 8


@dataclasses.dataclass(frozen=True, slots=True)
class _StoreCount:
    """What the store said of a tenant, and what had begun and ended here when it was asked."""

    has: Usage = NOTHING
    began: Usage = NOTHING
    ended: Usage = NOTHING
    at: float = -math.inf
    is_exact: bool = False
    """What is counted here since is all that there is: sessions that end make room at once."""


_NEVER = _StoreCount()


class UsageCounts:
    """Counts of tenants. Lives on the event loop."""

    def __init__(self, clock: Clock) -> None:
        self.store: Store | None = None
        """Where the sessions are; None: only what is counted here is known."""
        self._clock = clock
        self._asked: dict[str, _StoreCount] = {}
        self._making: dict[str, Usage] = {}
        self._began: dict[str, Usage] = {}
        self._ended: dict[str, Usage] = {}
        self._asking: dict[str, asyncio.Task[None]] = {}

    def add_pending(self, tenant: str, more: Usage) -> None:
        """So many more are being made here, or fewer: then they have begun, and ended too if they were not made."""
        add_pending = self._making.get(tenant, NOTHING) + more
        if add_pending == NOTHING:
            self._making.pop(tenant, None)
        else:
            self._making[tenant] = add_pending

    def begin(self, tenant: str, usage: Usage) -> None:
        """So many have begun here, or sessions have grown by so much."""
        if usage != NOTHING:
            self._began[tenant] = self._began.get(tenant, NOTHING) + usage

    def end(self, tenant: str, usage: Usage) -> None:
        """So many have ended here, or sessions have become smaller by so much."""
        if usage != NOTHING:
            self._ended[tenant] = self._ended.get(tenant, NOTHING) + usage
            asked = self._asked.get(tenant)
            is_all = tenant not in self._asking if asked is None else asked.is_exact
            if is_all and self._ended[tenant] == self._began.get(tenant):
                del self._began[tenant], self._ended[tenant]  # it has nothing

    def upper_bound(self, tenant: str) -> Usage:
        """What a tenant has at most, as far as that is known here."""
        asked = self._asked.get(tenant, _NEVER)
        there = asked.has + self._began.get(tenant, NOTHING) - asked.began + self._making.get(tenant, NOTHING)
        return there - self._ended_since(tenant) if asked.is_exact else there

    def estimate(self, tenant: str) -> Usage:
        """What a tenant has, for people who look at it."""
        there = self.upper_bound(tenant)
        is_exact = self._asked.get(tenant, _NEVER).is_exact
        return there if is_exact else (there - self._ended_since(tenant)).positive()

    def _ended_since(self, tenant: str) -> Usage:
        return self._ended.get(tenant, NOTHING) - self._asked.get(tenant, _NEVER).ended

    def tenants(self) -> list[str]:
        """Those of which something is known."""
        return [*{*self._asked, *self._began, *self._making, *self._ended}]

    async def refresh(self, tenant: str) -> None:
        """Ask the store, unless it was just asked and nothing has ended since. Many who want that ask once.

        Raises:
            Unavailable: it cannot be asked now.
        """
        task = self._asking.get(tenant)
        if task is not None:
            await asyncio.shield(task)  # it was asked before, and may not know what has ended since
        if self._is_fresh(tenant):
            return
        self.look(tenant)
        if (task := self._asking.get(tenant)) is not None:
            await asyncio.shield(task)

    def look(self, tenant: str) -> None:
        """As `refresh`, for callers that cannot wait: what a store says that does not answer at once counts for the next."""
        if self._is_fresh(tenant) or tenant in self._asking:
            return
        rest = start(self._ask(tenant))
        if isinstance(rest, Rest):
            task = self._asking[tenant] = asyncio.create_task(finish(rest))
            task.add_done_callback(lambda task: self._asked_for(tenant, task))

    def _asked_for(self, tenant: str, task: asyncio.Task[None]) -> None:
        del self._asking[tenant]
        if not task.cancelled():
            task.exception()  # who waits gets it; maybe nobody does any more

    def _is_fresh(self, tenant: str) -> bool:
        asked = self._asked.get(tenant, _NEVER)
        is_late = self._clock.monotonic() - asked.at >= FRESH_S
        return asked.is_exact or (asked.ended == self._ended.get(tenant, NOTHING) and not is_late)

    async def refresh_all(self, tenants: Iterable[str]) -> None:
        """As `refresh`, of many, some at a time."""
        wanted = list(tenants)
        for at in range(0, len(wanted), _MAX_CONCURRENT):
            await asyncio.gather(*map(self.refresh, wanted[at : at + _MAX_CONCURRENT]))

    async def _ask(self, tenant: str) -> None:
        began, ended = self._began.get(tenant, NOTHING), self._ended.get(tenant, NOTHING)
        at = self._clock.monotonic()
        has = None if self.store is None else await self.store.usage(tenant)
        if has is None:
            self._asked[tenant] = dataclasses.replace(_NEVER, is_exact=True)
        else:
            self._asked[tenant] = _StoreCount(has, began, ended, at)
