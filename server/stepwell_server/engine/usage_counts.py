"""How many sessions, rows and bytes each tenant has.

A shared store counts what all servers keep. It is asked before a tenant with a limit begins sessions, unless it was
just asked. Sessions begun here since, or being created now, are added, since the store may not have them yet. So a
tenant can exceed its limit by what begins on other servers after the store was asked, and by what still travels to
the store. While it is over its limit it gets no more sessions.

Sessions that the store already had but did not report are counted twice until it is asked again. Ended sessions are
not subtracted, since the store may not have counted them; the store is asked again instead. The same holds for
sessions that were probably not created: the store may have them, and only its answer was lost.

A store of one server says that this server's own count is exact. Ended sessions are then subtracted, and the limit
holds to the session.
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

#: An answer older than this many seconds is asked for again before sessions begin.
FRESH_S = 1.0
#: Concurrent requests when all tenants are refreshed for display.
_MAX_CONCURRENT = 8


@dataclasses.dataclass(frozen=True, slots=True)
class _StoreCount:
    """The store's count for a tenant, and what had begun and ended here when it was asked."""

    has: Usage = NOTHING
    began: Usage = NOTHING
    ended: Usage = NOTHING
    at: float = -math.inf
    is_exact: bool = False
    """Whether this server's own count is complete: sessions that end make room at once."""


_NEVER = _StoreCount()


class UsageCounts:
    """Counts of tenants. Lives on the event loop."""

    def __init__(self, clock: Clock) -> None:
        self.store: Store | None = None
        """The store of the sessions; None: only what is counted here is known."""
        self._clock = clock
        self._asked: dict[str, _StoreCount] = {}
        self._making: dict[str, Usage] = {}
        self._began: dict[str, Usage] = {}
        self._ended: dict[str, Usage] = {}
        self._asking: dict[str, asyncio.Task[None]] = {}

    def add_pending(self, tenant: str, more: Usage) -> None:
        """Add (or subtract) sessions that are being created here."""
        add_pending = self._making.get(tenant, NOTHING) + more
        if add_pending == NOTHING:
            self._making.pop(tenant, None)
        else:
            self._making[tenant] = add_pending

    def begin(self, tenant: str, usage: Usage) -> None:
        """Add sessions that have begun here, or growth of sessions."""
        if usage != NOTHING:
            self._began[tenant] = self._began.get(tenant, NOTHING) + usage

    def end(self, tenant: str, usage: Usage) -> None:
        """Add sessions that have ended here, or shrinkage of sessions."""
        if usage != NOTHING:
            self._ended[tenant] = self._ended.get(tenant, NOTHING) + usage
            asked = self._asked.get(tenant)
            is_all = tenant not in self._asking if asked is None else asked.is_exact
            if is_all and self._ended[tenant] == self._began.get(tenant):
                del self._began[tenant], self._ended[tenant]  # the tenant has nothing

    def upper_bound(self, tenant: str) -> Usage:
        """The most a tenant may be using, as far as this server knows."""
        asked = self._asked.get(tenant, _NEVER)
        there = asked.has + self._began.get(tenant, NOTHING) - asked.began + self._making.get(tenant, NOTHING)
        return there - self._ended_since(tenant) if asked.is_exact else there

    def estimate(self, tenant: str) -> Usage:
        """What a tenant is probably using, for display."""
        there = self.upper_bound(tenant)
        is_exact = self._asked.get(tenant, _NEVER).is_exact
        return there if is_exact else (there - self._ended_since(tenant)).positive()

    def _ended_since(self, tenant: str) -> Usage:
        return self._ended.get(tenant, NOTHING) - self._asked.get(tenant, _NEVER).ended

    def tenants(self) -> list[str]:
        """The tenants with a count."""
        return [*{*self._asked, *self._began, *self._making, *self._ended}]

    async def refresh(self, tenant: str) -> None:
        """Ask the store, unless it was just asked and nothing has ended since. Concurrent callers share a request.

        Raises:
            Unavailable: the store cannot be asked now.
        """
        task = self._asking.get(tenant)
        if task is not None:
            await asyncio.shield(task)  # it was asked earlier, and may not include what has ended since
        if self._is_fresh(tenant):
            return
        self.look(tenant)
        if (task := self._asking.get(tenant)) is not None:
            await asyncio.shield(task)

    def look(self, tenant: str) -> None:
        """Refresh a count without waiting: an answer that is not immediate counts for the next call."""
        if self._is_fresh(tenant) or tenant in self._asking:
            return
        rest = start(self._ask(tenant))
        if isinstance(rest, Rest):
            task = self._asking[tenant] = asyncio.create_task(finish(rest))
            task.add_done_callback(lambda task: self._asked_for(tenant, task))

    def _asked_for(self, tenant: str, task: asyncio.Task[None]) -> None:
        del self._asking[tenant]
        if not task.cancelled():
            task.exception()  # a waiting caller gets it, if there is one

    def _is_fresh(self, tenant: str) -> bool:
        asked = self._asked.get(tenant, _NEVER)
        is_late = self._clock.monotonic() - asked.at >= FRESH_S
        return asked.is_exact or (asked.ended == self._ended.get(tenant, NOTHING) and not is_late)

    async def refresh_all(self, tenants: Iterable[str]) -> None:
        """`refresh` for many tenants, a few at a time."""
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
