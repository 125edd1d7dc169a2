"""Sessions are closed by a filter, some at a time: those that fitted when it began, and still do."""

from __future__ import annotations

import dataclasses
import math

from stepwell_server.clock import Clock
from stepwell_server.engine.api import SessionFilter
from stepwell_server.engine.sessions.catalogue import Query
from stepwell_server.engine.sessions.closing import Closing
from stepwell_server.engine.sessions.listing import Listing


@dataclasses.dataclass(frozen=True, slots=True)
class Place:
    """How far closing by a filter has come."""

    as_of: float
    """When it began, in seconds since the epoch: what is newer, or was used since, stays."""
    after: str = ""
    """The id of the last session that was looked at."""


class Matching:
    """Closes what fits a filter. Lives on the event loop."""

    def __init__(self, listing: Listing, closing: Closing, clock: Clock) -> None:
        self._listing = listing
        self._closing = closing
        self._clock = clock

    async def close(
        self, wanted: SessionFilter, *, limit: int, place: Place | None = None, request_id: int = 0
    ) -> tuple[int, Place | None]:
        """Close up to `limit` sessions; return how many, and where to go on, None at the end.

        A session that begins after the request of this id closed an earlier one of its id stays.

        Raises:
            ModelNotFound: there is no model of that name.
            Overloaded, Unavailable: as `Engine.close_sessions`.
        """
        now = self._clock.now()
        at = place or Place(now)
        # it has gone on since: what has been idle for long enough by now need not have been so then
        passed = max(0.0, now - at.as_of)
        idle = None if wanted.idle_longer_s is None else wanted.idle_longer_s + passed
        query = Query(
            filter=dataclasses.replace(wanted, idle_longer_s=idle),
            after=(0.0, at.after) if at.after else None,
            limit=limit,
            count=False,
        )
        page, _ = await self._listing.page(query)
        ids = [info.session_id for info in page if info.created <= at.as_of]
        used_before = math.inf if idle is None else self._clock.monotonic() - idle
        closed = 0
        if ids:
            closed = await self._closing.close_many(ids, request_id=request_id, used_before=used_before)
        return closed, None if page.next is None else dataclasses.replace(at, after=page.next[1])
