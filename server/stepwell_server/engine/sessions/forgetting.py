"""The table of a server does not grow for ever where others keep the sessions: entries of those that are long unused go.

Such a session is in the store; who names it has it read from there, as on a server that has never seen it.
"""

from __future__ import annotations

import asyncio

import numpy as np

from stepwell_server.core.sessions import Handles, SessionTable
from stepwell_server.engine.sessions.ending import Expiry
from stepwell_server.logs import Log

_log = Log("engine.table")

#: Sessions in the table of a server whose store others use too: some 300 bytes each. Those in the arena are beside.
MOST_PAGED_OUT = 1 << 20
#: When there are more, so much of them goes at once: to find the least recently used means a look at all.
_SHARE = 1 / 8
_AT_ONCE = 500
_EVERY_S = 1.0


class Forgetting:
    """Takes sessions out of the table that are in the store. Lives on the event loop."""

    def __init__(self, table: SessionTable, expiry: Expiry) -> None:
        self._table = table
        self._expiry = expiry
        self.most = MOST_PAGED_OUT
        """Sessions of the table that are not in the arena."""

    async def run(self) -> None:
        """Look whether there are too many, until cancelled."""
        while True:
            await asyncio.sleep(_EVERY_S)
            try:
                await self.trim()
            except Exception as error:
                _log.defect("the table could not be made smaller; the timer goes on", error)

    async def trim(self) -> int:
        """Forget the least recently used of those that are paged out, if they are too many; return how many."""
        if len(self._table) <= self.most:
            return 0
        away = self._paged_out()
        if len(away) <= self.most:
            return 0
        count = len(away) - self.most + int(self.most * _SHARE)
        used = self._table.used[away]
        oldest = away[np.argpartition(used, min(count, len(away)) - 1)[:count]]
        births = self._table.birth[oldest]
        forgotten = 0
        for at in range(0, len(oldest), _AT_ONCE):
            part = oldest[at : at + _AT_ONCE]
            still = (self._table.birth[part] == births[at : at + _AT_ONCE]) & (self._table.row[part] < 0)
            forgotten += self._expiry.forget(
                [self._table.session_id(handle) for handle in part[still].tolist()]
            )
            await asyncio.sleep(0)
        return forgotten

    def _paged_out(self) -> Handles:
        table, end = self._table, self._table.end
        return np.flatnonzero((table.model[:end] >= 0) & (table.row[:end] < 0) & ~table.claimed[:end])
