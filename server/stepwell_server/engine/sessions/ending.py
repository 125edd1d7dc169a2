"""How sessions leave: out of the table, and to their end when nobody has used them for too long.

Those that are idle are looked at when they are named, so nobody sees one that should be gone, and by a timer.
"""

from __future__ import annotations

import asyncio
import math
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

import numpy as np

from stepwell_server.clock import Clock
from stepwell_server.core.idle import IdleWatch
from stepwell_server.core.quotas import Usage
from stepwell_server.core.sessions import Handles, SessionTable
from stepwell_server.engine.api import Observer
from stepwell_server.engine.durability.endings import Endings
from stepwell_server.engine.durability.group_commit import GroupCommit
from stepwell_server.engine.intake.turns import Turns
from stepwell_server.engine.models import Models
from stepwell_server.engine.quotas import Quotas
from stepwell_server.engine.state.fields import closes_of
from stepwell_server.errors import ServerError
from stepwell_server.logs import Log
from stepwell_server.store import counts
from stepwell_server.store.base import Batch, Committed, End, Store, Tombstone, with_close
from stepwell_server.store.record import Header, header_or_none

_log = Log("engine.expiry")

SWEPT_AT_ONCE = 500
"""Records."""
_TICKS = 10
"""Looks at what is idle, per time limit."""
_SHORTEST_S = 0.05
_AT_ONCE = 500
_PAUSE_S = 0.01
TOLD_ONE_BY_ONE = 16
"""More sessions that expire together are a line in the log with their number."""


class Ended(NamedTuple):
    """A session that ends."""

    session_id: str
    model: str
    """Empty where the store does not count the session."""
    revision: int
    """The last one known."""
    usage: Usage
    """What it took of its tenant's quotas."""
    stamp: int = 0
    """Of its record; 0: it ends whatever the store has of it."""
    closes: tuple[int, ...] = ()
    """Request ids of the calls that closed earlier sessions of the id: see `Tombstone.closes`."""


def ended_of(session_id: str, header: Header, stamp: int = 0) -> Ended:
    """A session that ends and only the store has, by its record's header and stamp."""
    closes = closes_of(header.fields)
    return Ended(session_id, header.model, header.revision, counts.usage_of(header), stamp, closes)


def batch_of(sessions: Sequence[Ended], end: End, at: float, request_id: int = 0) -> Batch:
    """What the store is to know of sessions that ended; `request_id` is that of the call that closed them, 0 for none."""
    return Batch(
        deletes=[each.session_id for each in sessions],
        tombstones=[
            Tombstone(each.session_id, end, at, with_close(request_id, each.closes), each.revision)
            for each in sessions
        ],
        counts=[(each.model, -1) for each in sessions if each.model],
        tenant_counts=counts.of_tenants(
            [(each.session_id, each.model) for each in sessions if each.model], -1
        ),
        delete_follows=np.array([each.stamp for each in sessions], np.uint64),
    )


class Removal:
    """Knows the sessions that are here, and lets them go. Lives on the event loop."""

    def __init__(self, table: SessionTable, models: Models, turns: Turns, observer: Observer) -> None:
        self._table = table
        self._models = models
        self._turns = turns
        self._observer = observer
        self.opening: dict[str, asyncio.Future[None]] = {}
        """Sessions that are being made: nobody else sees them before they are kept."""

    def __contains__(self, session_id: str) -> bool:
        return session_id in self._table or session_id in self.opening

    async def all_made(self, session_ids: Sequence[str]) -> None:
        """Return when no session of these ids is being made."""
        opening = self.opening
        while opening and not opening.keys().isdisjoint(session_ids):
            await asyncio.wait({opening[i] for i in session_ids if i in opening})

    def described(self, handles: Handles) -> list[Ended]:
        """What the store is to know of sessions of the table when they end."""
        table = self._table
        return [
            Ended(
                table.session_id(handle),
                self._models.by_handle(handle).name,
                int(table.revision[handle]),
                table.usage(handle),
                int(table.stamp[handle]),
                closes_of(table.fields.get(handle, b"")),
            )
            for handle in handles.tolist()
        ]

    def remove(self, handle: int, event: str, error: ServerError, ended: Counter[str] | None = None) -> None:
        """Forget a session that ended and is claimed or idle, and refuse what waits for it.

        `ended`: count it there by its model instead of telling it; `tell` tells all of them at once.
        """
        session_id, model = self._table.session_id(handle), self._models.by_handle(handle)
        self.forget(handle, error)
        if ended is None:
            self._observer.session_event(event, model.name, session_id)
        else:
            ended[model.name] += 1

    def tell(self, event: str, ended: Counter[str]) -> None:
        """Tell how many sessions ended."""
        for model, count in ended.items():
            self._observer.session_events(event, model, count)

    def forget(self, handle: int, error: ServerError) -> None:
        """As `remove`, of a session that has not ended."""
        model = self._models.by_handle(handle)
        if self._table.row[handle] >= 0:
            model.slots.free_resident(self._table.rows(handle))
        model.replies.forget(handle)
        self._table.claimed[handle] = False
        self._table.remove(handle)
        # last: whoever is refused may ask again at once, and must not get into the line of a session that is gone
        self._turns.close_line(handle, error)


class Expiry:
    """Knows which sessions are idle for too long, in the table or in the store, and ends them.

    Where others use the store, nothing here ends a session: that store knows of all uses, see `overdue`. What is due by
    the table is only suspected then. Lives on the event loop.
    """

    def __init__(
        self,
        table: SessionTable,
        removal: Removal,
        others: Store | None,
        commits: GroupCommit,
        endings: Endings,
        *,
        quotas: Quotas | None,
        clock: Clock,
        observer: Observer,
        max_idle_s: float,
    ) -> None:
        self._table = table
        self._removal = removal
        self._others = others
        """The store, if it may have sessions that are not in the table."""
        self._endings = endings
        self._commits = commits
        self._clock = clock
        self._quotas = quotas
        self._observer = observer
        self.max_idle_s = max_idle_s
        """0: sessions never expire."""
        self._started = clock.monotonic()
        self._sweep_at = self._started + max_idle_s
        self._idle = IdleWatch(table, max_idle_s, self._started)
        self.burying: dict[str, Tombstone] = {}
        """Sessions that expired and may still be in the store."""
        self._strays: dict[str, float] = {}
        """When sessions were last used, on the monotonic clock, that left the table while they may still be in the
        store: their records know it less well. Empty where sessions do not expire."""
        self.forgotten = 0
        """Counts what changed among the sessions that only the store has, without having been in the table."""
        self._swept: str | None = None if others is None or others.local is None else ""
        """How far the store has been looked through for sessions that nobody named since the start."""

    def watch(self, handles: Handles) -> None:
        """Watch sessions that have come into the table."""
        if not self.is_shared:
            self._idle.watch(handles)

    def is_due(self, handle: int) -> bool:
        """Whether a session of the table has been idle for too long and has nothing under way."""
        return len(self.due_among(np.array([handle]))) > 0

    def due_among(self, handles: Handles) -> Handles:
        """Those of some sessions that are due; -1 stands for none."""
        if not self.max_idle_s or self.is_shared:
            return handles[:0]
        there = handles[handles >= 0]
        due: Handles = there[self._idle.too_long(there, self._clock.monotonic())]
        return np.unique(due) if len(due) > 1 else due

    def suspects(self, handles: Handles) -> Handles:
        """Those of some sessions that may be due; -1 stands for none. Others may have used them where the store is shared."""
        if not self.is_shared:
            return self.due_among(handles)
        there = handles[handles >= 0]
        if not (self.max_idle_s and len(there)):
            return there[:0]
        since = self._clock.monotonic() - self.max_idle_s
        return np.unique(there[(self._table.used[there] < since) & ~self._table.claimed[there]])

    def is_suspect(self, handle: int) -> bool:
        """`suspects` of one session."""
        if not self.is_shared:
            return self.is_due(handle)
        since = self._clock.monotonic() - (self.max_idle_s or math.inf)
        return bool(self._table.used[handle] < since) and not self._table.claimed[handle]

    def remember_use(self, session_ids: Sequence[str], used: float) -> None:
        """Remember when sessions were last used that leave the table and may still be in the store."""
        if self.max_idle_s and not self.is_shared:
            self._strays.update(dict.fromkeys(session_ids, used))

    def take_use(self, session_id: str, header: Header, idle_s: float | None) -> float:
        """When a session of the store that comes into the table was last used, on the monotonic clock.

        `idle_s`: what a store that others use says of it.
        """
        if idle_s is not None:
            return self._clock.monotonic() - idle_s
        # for people: a clock that was set back meanwhile must not make it the future
        recorded = self._clock.monotonic() - max(0.0, self._clock.now() - header.last_used)
        return self._strays.pop(session_id, recorded)

    @property
    def is_shared(self) -> bool:
        """Other servers may use the store, and write into records when they used a session."""
        return self._others is not None and self._others.local is None

    def only_stored(self, session_ids: Sequence[str]) -> list[str]:
        """Those of some sessions that are in the store and nowhere else, to stay, if they are anywhere."""
        return [
            session_id
            for session_id in dict.fromkeys(session_ids)
            if session_id and session_id not in self._removal and session_id not in self.burying
        ]

    def forget_due(self, session_ids: Sequence[str]) -> None:
        """Let the store say whether sessions that were not used here for too long were used elsewhere."""
        self._forget(self.suspects(self._table.find_all(session_ids)))

    def forget(self, session_ids: Sequence[str]) -> int:
        """Let the store say what other servers made of sessions that have nothing under way here; return how many."""
        handles = np.unique(self._table.find_all(session_ids))
        handles = handles[(handles >= 0) & ~self._table.claimed[handles]]
        self._forget(handles)
        return len(handles)

    def _forget(self, handles: Handles, error: ServerError | None = None) -> None:
        self.forgotten += len(handles)
        for handle in handles.tolist():
            session_id = self._table.session_id(handle)
            self.remember_use([session_id], float(self._table.used[handle]))
            self._removal.forget(handle, error or self._endings.expired(session_id))

    def expire(self, handles: Handles, end: End = End.EXPIRED) -> None:
        """End sessions of the table. What ends together is told together."""
        self.bury(self._removal.described(handles), end)
        ended: Counter[str] | None = Counter() if len(handles) > TOLD_ONE_BY_ONE else None
        for handle in handles.tolist():
            error = self._endings.of(Tombstone(self._table.session_id(handle), end, self._clock.now()))
            self._removal.remove(handle, "expired", error, ended)
        self._removal.tell("expired", ended or Counter())

    def drop(self, handles: Handles, error: ServerError) -> None:
        """Forget claimed sessions whose rows are not what the store holds; they are loaded when next named."""
        _log.warning("sessions left the arena", sessions=len(handles), error=error)
        self._forget(handles, error)

    def expire_among(self, handles: Handles) -> None:
        """End those of some sessions that are due, and put -1 in their places, as it stands for others already."""
        due = self.due_among(handles)
        if len(due):
            handles[np.isin(handles, due)] = -1
            self.expire(due)

    async def expire_idle(self) -> int:
        """End the sessions that are, or were, in the table and are idle for too long; return how many."""
        count = await self.expire_strays()
        for some in self.expire_idle_in_parts(_AT_ONCE):
            count += some
            await self.let_others()
        return count

    async def run(self) -> None:
        """End idle sessions from time to time, until cancelled; without a time limit there is nothing to do."""
        while self.max_idle_s:
            await asyncio.sleep(max(_SHORTEST_S, self.max_idle_s / _TICKS))
            try:
                await self.expire_idle()
                while await self.sweep():
                    await self.let_others()
            except Exception as error:
                _log.defect("idle sessions could not be expired; the timer goes on", error)

    async def let_others(self) -> None:
        """Others come first, and so does what waits for the store."""
        await asyncio.sleep(_PAUSE_S)
        await self._commits.room()

    def expire_idle_in_parts(self, most: int) -> Iterator[int]:
        """End the sessions of the table that are due, at most so many at a time; how many each time.

        So others get a turn. To be gone through to the end.
        """
        for due in self._idle.take_due_in_parts(self._clock.monotonic, most):
            if len(due):
                self.expire(due)
                yield len(due)

    async def sweep(self) -> bool:
        """End some of the store's sessions that nobody has named since the start; True if there are more.

        Each start does this once, when the time limit has passed: from then on all others are in the table.
        """
        swept, store = self._swept, self._others
        if store is None or not self.max_idle_s or swept is None or self._clock.monotonic() <= self._sweep_at:
            return False
        try:
            found = await store.scan(after=swept, limit=SWEPT_AT_ONCE)
        except ServerError as error:
            _log.warning("the store could not be looked through for idle sessions", error=error)
            return False
        self._expire_untouched(found)
        self._swept = found[-1][0] if found else None
        return bool(found)

    async def expire_strays(self) -> int:
        """End those sessions that left the table while the store may have them, and that are due; how many."""
        since, store = self._clock.monotonic() - self.max_idle_s, self._others
        due = [session_id for session_id, used in self._strays.items() if used < since]
        if not due or store is None:
            return 0
        try:
            found = await store.fetch(due)
        except ServerError as error:
            _log.warning("the store could not be asked for idle sessions", error=error)
            return 0
        for session_id in due:
            self._strays.pop(session_id, None)  # gone if it was loaded meanwhile
        return self._expire_untouched(
            (i, header_or_none(i, each.record))
            for i, each in zip(due, found, strict=True)
            if each.record is not None
        )

    def _expire_untouched(self, found: Iterable[tuple[str, Header | None]]) -> int:
        """End those of the store's sessions that nobody has named for the time limit; return how many."""
        untouched = [
            (session_id, header)
            for session_id, header in found
            if header is not None and self.only_stored([session_id]) and session_id not in self._strays
        ]
        ended = [ended_of(session_id, header) for session_id, header in untouched]
        self.end_stored(ended, End.EXPIRED)
        return len(untouched)

    def end_stored(self, sessions: Sequence[Ended], end: End) -> None:
        """End sessions that only the store has."""
        self.forgotten += len(sessions)
        if len(sessions) > TOLD_ONE_BY_ONE:
            self._removal.tell("expired", Counter(model for _, model, *_ in sessions))
        else:
            for session_id, model, *_ in sessions:
                self._observer.session_event("expired", model, session_id)
        self.bury(sessions, end)

    def bury(self, sessions: Sequence[Ended], end: End) -> None:
        """Have the store know that sessions expired.

        Nobody waits for it. Should it fail, they are found in the store again, idle for too long as before, and
        the timer tries again.
        """
        if not sessions:
            return
        ids = [session_id for session_id, *_ in sessions]

        def done(committed: Committed | ServerError) -> None:
            for session_id in ids:
                self.burying.pop(session_id, None)
            if isinstance(committed, ServerError):
                _log.warning(
                    "sessions that expired are still in the store", sessions=len(ids), error=committed
                )
                self.remember_use(ids, -math.inf)
            elif self._quotas is not None:
                self._quotas.end((each.session_id, each.usage) for each in sessions)

        batch = batch_of(sessions, end, self._clock.now())
        self.burying.update({stone.session_id: stone for stone in batch.tombstones})
        self._commits.submit(lambda: batch, len(sessions), done)
