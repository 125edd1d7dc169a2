"""Sessions end whose time is over, in a store that others use too: by that store's clock, and by its word.

A session is judged by its own limit and by what the store said of its use a moment ago, and deleted only if nobody has
used it since: the deletion says for how long it must be unused, and which record must be there. So a server that was held
up in between, or whose clock is wrong, ends nothing that somebody uses.
"""

from __future__ import annotations

import asyncio
import dataclasses
from collections import Counter
from collections.abc import Iterable, Sequence

import numpy as np

from stepwell_server.clock import Clock
from stepwell_server.core.idle import IdleLimits
from stepwell_server.core.sessions import SessionTable
from stepwell_server.engine.api import Observer
from stepwell_server.engine.durability.committer import not_known
from stepwell_server.engine.durability.endings import expired
from stepwell_server.engine.durability.group_commit import GroupCommit
from stepwell_server.engine.quotas import Quotas
from stepwell_server.engine.sessions.ending import TOLD_ONE_BY_ONE, Ended, Removal, batch_of, ended_of
from stepwell_server.engine.sessions.service import Service
from stepwell_server.errors import ServerError
from stepwell_server.store.base import Committed, End, Fetched, Outcome
from stepwell_server.store.record import header_or_none, max_idle_ms_of

#: What was judged longer ago is judged again.
LATE_S = 5.0


@dataclasses.dataclass(frozen=True, slots=True)
class Over:
    """A session whose time is over."""

    session: Ended
    limit_s: float
    """For how long it may be unused."""
    idle_s: float
    """For how long it was unused when it was judged, by the store's clock."""


class Overdue:
    """Ends sessions of a shared store. Lives on the event loop."""

    def __init__(
        self,
        table: SessionTable,
        removal: Removal,
        commits: GroupCommit,
        limits: IdleLimits,
        service: Service,
        *,
        quotas: Quotas | None,
        clock: Clock,
        observer: Observer,
    ) -> None:
        self._table = table
        self._removal = removal
        self._commits = commits
        self._limits = limits
        self._service = service
        self._quotas = quotas
        self._clock = clock
        self._observer = observer

    def is_idle(self, session_id: str, found: Fetched) -> bool:
        """Whether a session that is there has been unused for too long; it need not have been possible to use it."""
        if found.record is not None:
            return found.idle_s > self._limits.seconds(max_idle_ms_of(found.record))
        handle = self._table.find(session_id) if found.is_known else None
        return handle is not None and found.idle_s > self._limits.seconds(
            int(self._table.max_idle_ms[handle])
        )

    def is_busy(self, session_id: str) -> bool:
        """Whether a session has something under way here: that is use, of which the store may not have heard yet."""
        handle = self._table.find(session_id)
        return handle is not None and bool(self._table.claimed[handle])

    async def expire(self, found: Iterable[tuple[str, Fetched]]) -> set[str]:
        """End those of some sessions, as the store has them, that have been unused for too long, unless they are used now.

        Returns:
            Their ids: what there is of them is to be read again.

        Raises:
            Unavailable: the store did not say what became of them.
        """
        over: list[Over] = []
        for session_id, each in found:
            if each.record is None or not self.is_idle(session_id, each):
                continue
            header = header_or_none(session_id, each.record)
            if header is not None:
                limit_s = self._limits.seconds(header.max_idle_ms)
                over.append(Over(ended_of(session_id, header, each.stamp), limit_s, each.idle_s))
        if not over:
            return set()
        served_s = await self._service.seconds()
        over = [each for each in over if served_s > each.limit_s]
        if over and (await self.end(over)).unknown:
            raise not_known()
        return {each.session.session_id for each in over}

    async def end(self, over: Sequence[Over]) -> Committed:
        """End sessions, unless they were used within their limits, or have changed; also if the caller is cancelled.

        Raises:
            Unavailable: none of them has ended, as far as the store says.
        """
        told: asyncio.Future[Committed | ServerError] = asyncio.get_running_loop().create_future()
        sessions = [each.session for each in over]
        batch = dataclasses.replace(
            batch_of(sessions, End.EXPIRED, self._clock.now()),
            min_idle_s=np.array([each.limit_s for each in over], np.float64),
            max_idle_s=np.array([each.idle_s + LATE_S for each in over], np.float64),
        )

        def done(committed: Committed | ServerError) -> None:
            if isinstance(committed, Committed):
                self._ended([e for e in sessions if committed.of(e.session_id) is Outcome.KEPT])
            told.set_result(committed)

        self._commits.submit(lambda: batch, len(sessions), done)
        committed = await asyncio.shield(told)
        if isinstance(committed, ServerError):
            raise committed
        return committed

    def _ended(self, sessions: Sequence[Ended]) -> None:
        """Let the table know, and those who count."""
        if self._quotas is not None:
            self._quotas.end((each.session_id, each.usage) for each in sessions)
        for each in sessions:
            handle = self._table.find(each.session_id)
            # what has something under way finds out by itself
            if handle is not None and not self._table.claimed[handle]:
                self._removal.forget(handle, expired(each.session_id))
        if len(sessions) > TOLD_ONE_BY_ONE:
            self._removal.tell("expired", Counter(each.model for each in sessions))
        else:
            for each in sessions:
                self._observer.session_event("expired", each.model, each.session_id)
