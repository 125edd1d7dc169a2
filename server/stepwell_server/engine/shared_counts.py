"""How many sessions and rows tenants have in a store that others use too.

The store counts what all servers keep. It is asked again before a tenant with a limit begins sessions, unless it was
just asked; what begins and ends here meanwhile is added. So a tenant can have more than its limit by what begins on
other servers within that time, and not for longer than until it asks for more.
"""

from __future__ import annotations

import asyncio
import dataclasses
from collections import Counter
from collections.abc import Iterable, Mapping

from stepwell_server.clock import Clock
from stepwell_server.store import counts
from stepwell_server.store.base import Store

#: What is older is asked for again, in seconds, before sessions begin.
FRESH_S = 1.0
#: Tenants that are asked for at the same time, for people who look at them.
_AT_ONCE = 8


@dataclasses.dataclass(frozen=True, slots=True)
class _Asked:
    """What the store said of a tenant."""

    sessions: int
    rows: int
    began: Mapping[str, int]
    """Sessions and rows that had begun here when it was asked, less those that had ended."""
    at: float


class SharedCounts:
    """Counts of tenants. Lives on the event loop."""

    def __init__(self, store: Store, clock: Clock) -> None:
        self._store = store
        self._clock = clock
        self._asked: dict[str, _Asked] = {}
        self._began: dict[str, Counter[str]] = {}
        self._asking: dict[str, asyncio.Task[None]] = {}

    def change(self, tenant: str, sessions: int, rows: int) -> None:
        """So many more begin here, or fewer are left."""
        began = self._began.setdefault(tenant, Counter())
        began["sessions"] += sessions
        began["rows"] += rows

    def of(self, tenant: str) -> tuple[int, int]:
        """Sessions and rows of a tenant, as far as that is known here."""
        began, asked = self._began.get(tenant, Counter()), self._asked.get(tenant)
        if asked is None:
            return max(0, began["sessions"]), max(0, began["rows"])
        return (
            max(0, asked.sessions + began["sessions"] - asked.began["sessions"]),
            max(0, asked.rows + began["rows"] - asked.began["rows"]),
        )

    def tenants(self) -> list[str]:
        """Those of which something is known."""
        return [*{*self._asked, *self._began}]

    async def refresh(self, tenant: str) -> None:
        """Ask the store, unless it was just asked. Many who want that ask once.

        Raises:
            Unavailable: it cannot be asked now.
        """
        asked = self._asked.get(tenant)
        if asked is not None and self._clock.monotonic() - asked.at < FRESH_S:
            return
        task = self._asking.get(tenant)
        if task is None:
            task = self._asking[tenant] = asyncio.create_task(self._ask(tenant))
            task.add_done_callback(lambda _: self._asking.pop(tenant, None))
        await asyncio.shield(task)

    async def refresh_all(self, tenants: Iterable[str]) -> None:
        """As `refresh`, of many, some at a time."""
        wanted = list(tenants)
        for at in range(0, len(wanted), _AT_ONCE):
            await asyncio.gather(*map(self.refresh, wanted[at : at + _AT_ONCE]))

    async def _ask(self, tenant: str) -> None:
        began, at = dict(self._began.setdefault(tenant, Counter())), self._clock.monotonic()
        began = {"sessions": 0, "rows": 0} | began
        sessions, rows = await asyncio.gather(
            counts.count(self._store, tenant, ""), self._store.count_of(counts.rows_of(tenant))
        )
        self._asked[tenant] = _Asked(sessions, rows, began, at)
