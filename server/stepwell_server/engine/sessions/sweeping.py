"""Sessions of a store that others use too are looked through, for those whose time is over: by one server at a time.

All servers ask for the task, and the store gives it to one, for a while. It goes from page to page, with pauses, and
ends sessions that nobody has used for as long as their limits.
"""

from __future__ import annotations

import asyncio
import secrets

import numpy as np

from stepwell_server.clock import Clock
from stepwell_server.core.idle import IdleLimits
from stepwell_server.engine.durability.group_commit import GroupCommit
from stepwell_server.engine.sessions.ending import Ended
from stepwell_server.engine.sessions.overdue import Over, Overdue
from stepwell_server.engine.sessions.service import Service
from stepwell_server.engine.state.fields import closes_of
from stepwell_server.errors import ServerError
from stepwell_server.logs import Log
from stepwell_server.store.base import Store, Unused

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
#: Sessions that were used within this time are not looked at: those with a shorter limit end a little later.
_USED_S = 5.0


class Sweep:
    """Ends sessions of a shared store. Lives on the event loop."""

    def __init__(
        self,
        store: Store,
        overdue: Overdue,
        service: Service,
        commits: GroupCommit,
        limits: IdleLimits,
        clock: Clock,
    ) -> None:
        self._store = store
        self._overdue = overdue
        self._service = service
        self._commits = commits
        self._clock = clock
        self._limits = limits
        self._name = secrets.token_hex(8)
        """Of this server, among those that want the task."""
        self._is_away = False

    async def run(self) -> None:
        """Look through the store from time to time, until cancelled."""
        while True:
            await asyncio.sleep(min(_LONGEST_S, max(_SHORTEST_S, self._limits.max_s / _TICKS)))
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
        least_s = min(self._limits.max_s, _USED_S)
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
        heads, names = page.heads.heads, page.heads.models
        limits_s = self._limits.seconds_of(heads["max_idle_ms"].astype(np.int64))
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
                float(limits_s[place]),
                float(page.idle_s[place]),
            )
            for place in np.flatnonzero(np.minimum(page.idle_s, served_s) > limits_s).tolist()
        ]
        over = [each for each in over if not self._overdue.is_busy(each.session.session_id)]
        if not over:
            return 0
        committed = await self._overdue.end(over)
        return len(over) - len(committed.conflicts) - len(committed.unknown)
