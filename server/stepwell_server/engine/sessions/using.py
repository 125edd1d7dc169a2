"""A store that others use too is notified when sessions are used without being written.

Each session is notified at most every tenth of its limit; what comes while a call to the store is under way goes into the
next call together. If the store cannot be notified nothing is lost: the next use of the session notifies it again.
"""

from __future__ import annotations

import asyncio
import itertools

import numpy as np

from stepwell_server.alarm import Alarm
from stepwell_server.clock import Clock
from stepwell_server.core.idle import IdleLimits
from stepwell_server.core.sessions import Handles, SessionTable
from stepwell_server.logs import Log
from stepwell_server.store.base import Store, as_server_error

_log = Log("engine.use")

#: Of the time in which a session ends.
SHARE = 1 / 10
#: Sessions in one call to the store.
_AT_ONCE = 1024
#: So many may wait to be told of.
MOST_WAITING = 65_536
#: Sessions that never end by themselves are told of as if they ended after so many seconds.
_MAX_S = 600.0
#: Sessions that have something under way are looked at this often, in seconds: at least, and at most.
_LONGEST_S, _SHORTEST_S = 0.5, 0.1


class Usage:
    """Says that sessions are used. Lives on the event loop."""

    def __init__(self, table: SessionTable, limits: IdleLimits, store: Store, clock: Clock) -> None:
        self._table = table
        self._limits = limits
        self._store = store
        self._is_shared = store.local is None
        self._clock = clock
        self._waiting: dict[str, int] = {}
        """Stamps of sessions of which the store is to be told."""
        self._task: asyncio.Task[None] | None = None
        self._work = Alarm(self._start)
        self._is_away = False

    @property
    def is_idle(self) -> bool:
        """The store is not being told of anything."""
        return self._task is None and not self._waiting

    def used(self, handles: Handles) -> None:
        """Sessions are used now, and not written: the store has just said when they were used before.

        What it said is in the table.
        """
        now, table = self._clock.monotonic(), self._table
        if self._is_shared:
            is_due = now - table.used[handles] >= SHARE * self._limits_s(handles)
            for handle in handles[is_due].tolist():
                if len(self._waiting) < MOST_WAITING:
                    self._waiting[table.session_id(handle)] = int(table.stamp[handle])
            if self._waiting:
                self._work.ring()
        table.used[handles] = now

    async def run(self) -> None:
        """Have sessions count as used that have something under way, until cancelled."""
        while self._is_shared:
            await asyncio.sleep(min(_LONGEST_S, max(_SHORTEST_S, SHARE / 2 * self._limits.max_s)))
            self.look()

    def close(self) -> None:
        """Tell the store nothing more."""
        self._waiting = {}
        if self._task is not None:
            self._task.cancel()

    def look(self) -> None:
        """Have sessions count as used that have had something under way for long."""
        table = self._table
        claimed = np.flatnonzero(table.claimed[: table.end] & (table.model[: table.end] >= 0))
        if len(claimed):
            is_due = self._clock.monotonic() - table.used[claimed] >= SHARE * self._limits_s(claimed)
            self.used(claimed[is_due])

    def _limits_s(self, handles: Handles) -> np.ndarray[tuple[int], np.dtype[np.float64]]:
        """After which time each ends, or would be of interest to people who look for what is idle."""
        return np.minimum(_MAX_S, self._limits.seconds_of(self._table.max_idle_ms[handles]))

    def _start(self) -> None:
        if self._task is None and self._waiting:
            self._task = asyncio.create_task(self._tell())

    async def _tell(self) -> None:
        some = dict(itertools.islice(self._waiting.items(), _AT_ONCE))
        for session_id in some:
            del self._waiting[session_id]
        try:
            await self._store.touch(list(some), list(some.values()))
            self._is_away = False
        except Exception as error:
            why = as_server_error(error)
            if not self._is_away:
                _log.warning("the store could not be told of the use of sessions", error=why)
            self._is_away = True
        self._task = None
        if self._waiting:
            self._work.ring()
