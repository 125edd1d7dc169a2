"""Sessions end whose time is over, in a store that others use too: by that store's clock, and by its word.

A session is judged by what the store said of its use a moment ago, and deleted only if nobody has used it since: the
deletion says for how long it must be unused, and which record must be there. So a server that was held up in between,
or whose clock is wrong, ends nothing that somebody uses.
"""

from __future__ import annotations

import asyncio
import dataclasses
import math
from collections import Counter
from collections.abc import Iterable, Sequence

import numpy as np

from stepwell_server.clock import Clock
from stepwell_server.core.sessions import SessionTable
from stepwell_server.engine.api import Observer
from stepwell_server.engine.durability.committer import not_known
from stepwell_server.engine.durability.endings import Endings
from stepwell_server.engine.durability.group_commit import GroupCommit
from stepwell_server.engine.quotas import Quotas
from stepwell_server.engine.sessions.ending import TOLD_ONE_BY_ONE, Ended, Removal, batch_of, ended_of
from stepwell_server.engine.sessions.service import Service
from stepwell_server.errors import ServerError
from stepwell_server.store.base import Committed, End, Fetched, Outcome, Tombstone
from stepwell_server.store.record import header_or_none

#: What was judged longer ago is judged again.
LATE_S = 5.0


@dataclasses.dataclass(frozen=True, slots=True)
class Over:
    """A session whose time is over."""

    session: Ended
    idle_s: float
    """For how long it was unused when it was judged, by the store's clock."""


class Overdue:
    """Ends sessions of a shared store. Lives on the event loop."""

    def __init__(
        self,
        table: SessionTable,
        removal: Removal,
        commits: GroupCommit,
        endings: Endings,
        service: Service,
        *,
        quotas: Quotas | None,
        clock: Clock,
        observer: Observer,
        max_idle_s: float,
    ) -> None:
        """`max_idle_s` 0: sessions never expire."""
        self._table = table
        self._removal = removal
        self._commits = commits
        self._endings = endings
        self._service = service
        self._quotas = quotas
        self._clock = clock
        self._observer = observer
        self._max_idle_s = max_idle_s or math.inf

    def is_idle(self, found: Fetched) -> bool:
        """Whether a session that is there has been unused for too long; it need not have been possible to use it."""
        return found.idle_s > self._max_idle_s

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
            if each.record is None or not self.is_idle(each):
                continue
            header = header_or_none(session_id, each.record)
            if header is not None:
                over.append(Over(ended_of(session_id, header, each.stamp), each.idle_s))
        if not over or await self._service.seconds() <= self._max_idle_s:
            return set()
        if (await self.end(over, End.EXPIRED, self._max_idle_s)).unknown:
            raise not_known()
        return {each.session.session_id for each in over}

    async def end(self, over: Sequence[Over], end: End, idle_s: float) -> Committed:
        """End sessions, unless they were used in the last `idle_s` seconds, or have changed; also if the caller is cancelled.

        Raises:
            Unavailable: none of them has ended, as far as the store says.
        """
        told: asyncio.Future[Committed | ServerError] = asyncio.get_running_loop().create_future()
        sessions = [each.session for each in over]
        batch = dataclasses.replace(
            batch_of(sessions, end, self._clock.now()),
            idle_s=idle_s,
            idle_most_s=np.array([each.idle_s + LATE_S for each in over], np.float64),
        )

        def done(committed: Committed | ServerError) -> None:
            if isinstance(committed, Committed):
                self._ended([e for e in sessions if committed.of(e.session_id) is Outcome.KEPT], end)
            told.set_result(committed)

        self._commits.submit(lambda: batch, len(sessions), done)
        committed = await asyncio.shield(told)
        if isinstance(committed, ServerError):
            raise committed
        return committed

    def _ended(self, sessions: Sequence[Ended], end: End) -> None:
        """Let the table know, and those who count."""
        if self._quotas is not None:
            self._quotas.end((each.session_id, each.usage) for each in sessions)
        for each in sessions:
            handle = self._table.find(each.session_id)
            # what has something under way finds out by itself
            if handle is not None and not self._table.claimed[handle]:
                self._removal.forget(
                    handle, self._endings.of(Tombstone(each.session_id, end, self._clock.now()))
                )
        if len(sessions) > TOLD_ONE_BY_ONE:
            self._removal.tell("expired", Counter(each.model for each in sessions))
        else:
            for each in sessions:
                self._observer.session_event("expired", each.model, each.session_id)
