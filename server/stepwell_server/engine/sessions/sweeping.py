"""Sessions of a store that others use too are looked through, for those whose time is over: by one server at a time.

All servers ask for the task, and the store gives it to one, for a while. It goes from page to page, with pauses, and
ends sessions that nobody has used for too long, and those whose client no server has heard of for as long as its lease.
"""

from __future__ import annotations

import asyncio
import math
import secrets
from collections.abc import Sequence

import numpy as np

from stepwell_server.clock import Clock
from stepwell_server.core.leases import Lease
from stepwell_server.engine.durability.group_commit import GroupCommit
from stepwell_server.engine.sessions.ending import Ended
from stepwell_server.engine.sessions.overdue import Over, Overdue
from stepwell_server.engine.sessions.service import Service
from stepwell_server.engine.state.fields import closes_of, lease_of_or_none
from stepwell_server.errors import ServerError
from stepwell_server.logs import Log
from stepwell_server.store.base import CLIENT_KNOWN_S, End, Store, Unused
from stepwell_server.store.record import F64

_log = Log("engine.sweep")

#: Sessions in a page.
_AT_ONCE = 500
#: Looks through the store, per time limit for idle sessions; and at most so long and so short between them, in seconds.
_TICKS = 10
_LONGEST_S, _SHORTEST_S = 30.0, 0.1
#: Of the time that a page took: so long it rests.
_REST = 3.0
_REST_S = 0.01
#: So long one server has the task without saying so again.
_CLAIMED_S = 3 * _LONGEST_S
_TASK = "sweep"
#: Who was used within this time is not looked at: leases that are shorter end a little later.
_USED_S = 5.0


class Sweep:
    """Ends sessions of a shared store. Lives on the event loop."""

    def __init__(
        self,
        store: Store,
        overdue: Overdue,
        service: Service,
        commits: GroupCommit,
        *,
        clock: Clock,
        max_idle_s: float,
    ) -> None:
        """`max_idle_s` 0: sessions never expire."""
        self._store = store
        self._overdue = overdue
        self._service = service
        self._commits = commits
        self._clock = clock
        self._max_idle_s = max_idle_s or math.inf
        self._name = secrets.token_hex(8)
        """Of this server, among those that want the task."""
        self._is_away = False

    async def run(self) -> None:
        """Look through the store from time to time, until cancelled."""
        while True:
            await asyncio.sleep(min(_LONGEST_S, max(_SHORTEST_S, self._max_idle_s / _TICKS)))
            try:
                await self.round()
                self._is_away = False
            except ServerError as error:
                if not self._is_away:
                    _log.warning("the store could not be looked through for sessions to end", error=error)
                self._is_away = True
            except Exception as error:
                _log.defect("the store could not be looked through; the timer goes on", error)

    async def round(self) -> int:
        """Look through the store once, unless another server does; return how many sessions ended.

        Raises:
            Unavailable: the store cannot be asked, or did not end some that were due.
        """
        ended, cursor, is_first = 0, "", True
        least_s = min(self._max_idle_s, _USED_S)
        while cursor or is_first:
            if await self._store.claim(_TASK, self._name, _CLAIMED_S) is None:
                break
            is_first, began = False, self._clock.monotonic()
            page = await self._store.unused(cursor, idle_s=least_s, limit=_AT_ONCE)
            cursor = page.cursor
            ended += await self._end_of(page, await self._service.seconds())
            if cursor:
                await asyncio.sleep(max(_REST_S, _REST * (self._clock.monotonic() - began)))
            await self._commits.room()
        return ended

    async def _end_of(self, page: Unused, served_s: float) -> int:
        """End those of a page that are due; return how many. The store has been served for so many seconds."""
        unused = np.minimum(page.idle_s, served_s)
        idle = np.flatnonzero(unused > self._max_idle_s).tolist()
        ended = await self._end(page, idle, End.EXPIRED, self._max_idle_s) if idle else 0
        by_lease: dict[float, list[int]] = {}
        for place, (client, lease_ms) in await self._left(page, unused, set(idle)):
            del client
            by_lease.setdefault(lease_ms / 1000, []).append(place)
        for lease_s, places in by_lease.items():
            ended += await self._end(page, places, End.LEFT, lease_s)
        return ended

    async def _left(self, page: Unused, unused: F64, others: set[int]) -> list[tuple[int, Lease]]:
        """Sessions of a page that nobody has used, and whose client nobody has heard of, for as long as its lease."""
        leased: list[tuple[int, Lease]] = []
        for place, fields in page.heads.fields.items():
            lease = None if place in others else lease_of_or_none(fields)
            if lease is not None and unused[place] >= lease[1] / 1000:
                leased.append((place, lease))
        if not leased:
            return []
        clients = sorted({client for _, (client, _) in leased})
        unseen = dict(zip(clients, await self._store.clients_unseen(clients), strict=True))
        # what is known of a client may have been forgotten: of a long lease it begins anew then
        begins = {
            client: lease_ms / 1000
            for _, (client, lease_ms) in leased
            if unseen[client] == math.inf and lease_ms / 1000 > CLIENT_KNOWN_S
        }
        if begins:
            await self._store.renew_clients(list(begins), list(begins.values()))
        return [
            (place, (client, lease_ms))
            for place, (client, lease_ms) in leased
            if client not in begins and unseen[client] >= lease_ms / 1000
        ]

    async def _end(self, page: Unused, places: Sequence[int], end: End, idle_s: float) -> int:
        """End sessions of a page unless they were used since; return how many."""
        heads, names = page.heads.heads, page.heads.models
        over = [
            Over(
                Ended(
                    str(page.heads.keys[place], "utf-8", "replace"),
                    names[int(page.heads.model[place])],
                    int(heads["revision"][place]),
                    page.heads.usage(place),
                    int(page.stamps[place]),
                    closes_of(page.heads.fields.get(place, b"")),
                ),
                float(page.idle_s[place]),
            )
            for place in places
        ]
        over = [each for each in over if not self._overdue.is_busy(each.session.session_id)]
        if not over:
            return 0
        committed = await self._overdue.end(over, end, idle_s)
        return len(over) - len(committed.conflicts) - len(committed.unknown)
