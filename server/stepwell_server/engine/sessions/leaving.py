"""Sessions end when their client has been gone for longer than its lease.

Those of the table are found by their leases. After a start some may be in the store alone: now and then its records are
looked through, as long as there are such sessions. Where other servers use the store too, this ends none: a client may
be there for another server, see `sweeping`.
"""

from __future__ import annotations

import asyncio
import math

from stepwell_server.clock import Clock
from stepwell_server.core.leases import Leases
from stepwell_server.engine.sessions.ending import Ended, Expiry
from stepwell_server.engine.state.fields import closes_of, lease_of_or_none
from stepwell_server.errors import ServerError
from stepwell_server.logs import Log
from stepwell_server.store.base import End, Store

_log = Log("engine.leases")

#: Sessions that end before others get a turn.
_AT_ONCE = 500
#: The timer looks at least so often, in seconds, and at most so often.
_LONGEST_S, _SHORTEST_S = 1.0, 0.05
#: The store is looked through this long after the start, and then at most so often.
_FIRST_S, _BETWEEN_S = 5.0, 60.0


class Leaving:
    """Ends sessions whose client is gone. Lives on the event loop."""

    def __init__(
        self,
        leases: Leases,
        expiry: Expiry,
        others: Store | None,
        *,
        clock: Clock,
    ) -> None:
        """`others` is the store, if it may have sessions that are not in the table."""
        self._leases = leases
        self._expiry = expiry
        self._others = others
        self._clock = clock
        self._look_at = math.inf if others is None else clock.monotonic() + _FIRST_S
        """When the store is looked through next."""
        self._forgotten = expiry.forgotten

    async def run(self) -> None:
        """End sessions as they come due, until cancelled."""
        while True:
            await asyncio.sleep(self._pause_s())
            try:
                await self.end_due()
            except Exception as error:
                _log.defect("leases could not be looked at; the timer goes on", error)

    def _pause_s(self) -> float:
        now = self._clock.monotonic()
        return min(_LONGEST_S, max(_SHORTEST_S, min(self._leases.next_check_in(now), self._look_at - now)))

    async def end_due(self) -> int:
        """End all sessions that are due; return how many."""
        count = 0
        for due in self._leases.take_due_in_parts(self._clock.monotonic, _AT_ONCE):
            self._expiry.expire(due, End.LEFT)
            count += len(due)
            await self._expiry.let_others()
        if self._others is None:
            return count
        if (
            self._forgotten != self._expiry.forgotten
        ):  # some may have left the table that are in the store still
            self._forgotten = self._expiry.forgotten
            self._look_at = min(self._look_at, self._clock.monotonic() + _BETWEEN_S)
        if self._clock.monotonic() >= self._look_at:
            count += await self._look_through(self._others)
        return count

    async def _look_through(self, store: Store) -> int:
        """End those of the store's sessions that are due and not in the table; return how many."""
        began, count, after, next_end = self._clock.monotonic(), 0, "", math.inf
        self._look_at = began + _BETWEEN_S
        while True:
            try:
                heads = await store.heads(after=after, limit=_AT_ONCE)
            except ServerError as error:
                _log.warning(
                    "the store could not be looked through for sessions whose client is gone", error=error
                )
                return count
            if not len(heads):
                break
            ids = [str(key, "utf-8", "replace") for key in heads.keys]
            after = ids[-1]
            leased = {ids[place]: (place, lease_of_or_none(fields)) for place, fields in heads.fields.items()}
            due: list[Ended] = []
            for session_id in self._expiry.only_stored(list(leased)):
                place, lease = leased[session_id]
                if lease is None:
                    continue
                if self._leases.is_over(lease, self._clock.monotonic()):
                    due.append(
                        Ended(
                            session_id,
                            heads.models[int(heads.model[place])],
                            int(heads.heads["revision"][place]),
                            heads.usage(place),
                            closes=closes_of(heads.fields[place]),
                        )
                    )
                else:
                    next_end = min(next_end, self._leases.heard(lease[0]) + lease[1] / 1000)
            if due:
                self._expiry.end_stored(due, End.LEFT)
                self._forgotten = self._expiry.forgotten
                count += len(due)
            await self._expiry.let_others()
        self._look_at = max(next_end, self._clock.monotonic() + _BETWEEN_S)
        return count
