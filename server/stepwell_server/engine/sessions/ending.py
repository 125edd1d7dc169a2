"""How sessions leave: out of the table, and to their end when nobody has used them for too long.

Those that are idle are looked at when they are named, so nobody sees one that should be gone, and by a timer. After a
start some may be in the store alone: its records are looked through, page by page, when the first of their limits ends.
"""

from __future__ import annotations

import asyncio
import heapq
import math
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np

from stepwell_server.clock import Clock
from stepwell_server.core.idle import IdleLimits, IdleWatch
from stepwell_server.core.quotas import Usage
from stepwell_server.core.sessions import Handles, SessionTable
from stepwell_server.engine.api import Observer
from stepwell_server.engine.durability.endings import expired
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
#: The timer looks at least this often, in seconds, and at most this often.
_LONGEST_S, _SHORTEST_S = 1.0, 0.05
#: The store is looked through this long after the start at the latest, and then it rests this many times as long as that took.
_FIRST_S, _REST = 5.0, 10.0
#: A store that could not be read is asked again after this long.
_RETRY_INTERVAL_S = 1.0
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


class Strays:
    """When sessions were used that left the table while the store may have them: their records know it less well.

    Times are on the monotonic clock. Lives on the event loop.
    """

    def __init__(self, limits: IdleLimits, started: float, *, are_kept: bool) -> None:
        """Without `are_kept` none is remembered: only a store that nobody else uses may have sessions that are not in the table."""
        self._limits = limits
        self._started = started
        self._are_kept = are_kept
        self._known: dict[str, tuple[float, float]] = {}
        """When their limits end, and their last uses."""
        self._ends: list[tuple[float, str]] = []
        """A heap of when limits end; entries of sessions that came back into the table are still in it."""

    def __contains__(self, session_id: str) -> bool:
        return session_id in self._known

    def add(self, session_id: str, used: float, max_idle_ms: int) -> None:
        """Remember a session that leaves the table, by its last use and its own limit."""
        limit_s = self._limits.seconds(max_idle_ms)
        if limit_s < math.inf:
            self.put(session_id, used, max(used, self._started) + limit_s)

    def put(self, session_id: str, used: float, end: float) -> None:
        """As `add`, by the moment in which its limit ends."""
        if self._are_kept:
            self._known[session_id] = end, used
            heapq.heappush(self._ends, (end, session_id))

    def take(self, session_id: str) -> float | None:
        """When a session was last used that comes back into the table; None: it is none of these."""
        found = self._known.pop(session_id, None)
        return None if found is None else found[1]

    @property
    def next_end(self) -> float:
        """Before this moment the limit of none of them ends."""
        return self._ends[0][0] if self._ends else math.inf

    def take_due(self, now: float, most: int) -> dict[str, float]:
        """Some of those whose limits have ended, with their last uses; empty: there are no more."""
        due: dict[str, float] = {}
        while self.next_end < now and len(due) < most:
            end, session_id = heapq.heappop(self._ends)
            if (found := self._known.get(session_id)) is not None and found[0] == end:
                due[session_id] = self._known.pop(session_id)[1]
        return due


class Removal:
    """Knows the sessions that are here, and lets them go. Lives on the event loop."""

    def __init__(
        self, table: SessionTable, models: Models, turns: Turns, strays: Strays, observer: Observer
    ) -> None:
        self._table = table
        self._strays = strays
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
        self._take_out(handle, error)
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
        table = self._table
        self._strays.add(table.session_id(handle), float(table.used[handle]), int(table.max_idle_ms[handle]))
        self._take_out(handle, error)

    def _take_out(self, handle: int, error: ServerError) -> None:
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
        limits: IdleLimits,
        strays: Strays,
        *,
        quotas: Quotas | None,
        clock: Clock,
        observer: Observer,
    ) -> None:
        self._table = table
        self._removal = removal
        self._others = others
        """The store, if it may have sessions that are not in the table."""
        self.is_shared = others is not None and others.local is None
        """Other servers may use the store, and write into records when they used a session."""
        self._commits = commits
        self._clock = clock
        self._quotas = quotas
        self._observer = observer
        self.limits = limits
        # a shared store knows of use before the start
        self._started = -math.inf if self.is_shared else clock.monotonic()
        self._idle = IdleWatch(table, limits, self._started)
        if self.is_shared:
            table.next_end = -math.inf  # nothing is watched
        self.burying: dict[str, Tombstone] = {}
        """Sessions that expired and may still be in the store."""
        self._strays = strays
        self.forgotten = 0
        """Counts what changed among the sessions that only the store has, without having been in the table."""
        self._sweep_at = math.inf
        """When the store is looked through for sessions that nobody named since the start."""
        if others is not None and not self.is_shared:
            self._sweep_at = self._started + min(limits.max_s, _FIRST_S)
        self._sweep_began = 0.0
        self._swept: str | None = None
        """How far the store has been looked through; None: it is not being looked through."""
        self._next_end = math.inf
        """When the first of the limits ends that were seen and have not ended."""

    def watch(self, handles: Handles) -> None:
        """Watch sessions that have come into the table."""
        if not self.is_shared:
            self._idle.watch(handles)

    def is_due(self, handle: int) -> bool:
        """Whether a session of the table has been idle for too long and has nothing under way."""
        return not self.is_shared and self.is_suspect(handle)

    def due_among(self, handles: Handles) -> Handles:
        """Those of some sessions that are due; -1 stands for none."""
        return handles[:0] if self.is_shared else self.suspects(handles)

    def suspects(self, handles: Handles) -> Handles:
        """Those of some sessions that may be due; -1 stands for none. Others may have used them where the store is shared."""
        if len(handles) == 1:  # the common case
            handle = int(handles[0])
            return handles.copy() if handle >= 0 and self.is_suspect(handle) else handles[:0]
        there = handles[handles >= 0]
        return np.unique(there[self._idle.too_long(there, self._clock.monotonic())])

    def is_suspect(self, handle: int) -> bool:
        """`suspects` of one session."""
        return self._idle.is_too_long(handle, self._clock.monotonic())

    def take_use(self, session_id: str, header: Header, idle_s: float) -> float:
        """When a session of the store that comes into the table was last used, on the monotonic clock.

        `idle_s`: what the store says of it; NaN: nothing.
        """
        if not math.isnan(idle_s):
            return self._clock.monotonic() - idle_s
        if (used := self._strays.take(session_id)) is not None:
            return used
        # for people: a clock that was set back meanwhile must not make it the future
        return self._clock.monotonic() - max(0.0, self._clock.now() - header.last_used)

    def only_stored(self, session_ids: Sequence[str]) -> list[str]:
        """Those of some sessions that are in the store and nowhere else, to stay, if they are anywhere."""
        return [
            session_id
            for session_id in dict.fromkeys(session_ids)
            if session_id and session_id not in self._removal and session_id not in self.burying
        ]

    def forget_due(self, session_ids: Sequence[str]) -> None:
        """Let the store say whether sessions that were not used here for too long were used elsewhere."""
        if self.is_shared:
            self._forget(self.suspects(self._table.find_all(session_ids)))

    def expire_due(self, session_ids: Sequence[str]) -> list[str]:
        """End those of some sessions that are due, and return them."""
        due = self.due_among(self._table.find_all(session_ids))
        ids = [self._table.session_id(handle) for handle in due.tolist()]
        if ids:
            self.expire(due)
        return ids

    def forget(self, session_ids: Sequence[str]) -> int:
        """Let the store say what other servers made of sessions that have nothing under way here; return how many."""
        handles = np.unique(self._table.find_all(session_ids))
        handles = handles[(handles >= 0) & ~self._table.claimed[handles]]
        self._forget(handles)
        return len(handles)

    def _forget(self, handles: Handles, error: ServerError | None = None) -> None:
        self.forgotten += len(handles)
        for handle in handles.tolist():
            self._removal.forget(handle, error or expired(self._table.session_id(handle)))

    def expire(self, handles: Handles) -> None:
        """End sessions of the table. What ends together is told together."""
        self._bury(self._removal.described(handles))
        ended: Counter[str] | None = Counter() if len(handles) > TOLD_ONE_BY_ONE else None
        for handle in handles.tolist():
            self._removal.remove(handle, "expired", expired(self._table.session_id(handle)), ended)
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
        count = await self._expire_strays()
        for some in self.expire_idle_in_parts(_AT_ONCE):
            count += some
            await self.let_others()
        return count

    async def run(self) -> None:
        """End idle sessions from time to time, until cancelled."""
        while True:
            now = self._clock.monotonic()
            pause_s = min(self._idle.next_in(now), self._strays.next_end - now, self._sweep_at - now)
            await asyncio.sleep(min(_LONGEST_S, max(_SHORTEST_S, pause_s)))
            try:
                await self.expire_idle()
                while await self.sweep():
                    await self.let_others()
                    await self.expire_idle()
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
        """End some of the store's sessions that nobody has named since the start; True if there are more to look at.

        The store is looked through again when the next of the limits ends that were seen: all other sessions are in the
        table by then.
        """
        store, now = self._others, self._clock.monotonic()
        if store is None or now <= self._sweep_at:
            return False
        if self._swept is None:
            self._swept, self._sweep_began, self._next_end = "", now, math.inf
        try:
            page = await store.heads(after=self._swept, limit=SWEPT_AT_ONCE)
            keys = [str(key, "utf-8", "replace") for key in page.keys]
            ends = self._started + self.limits.seconds_of(page.heads["max_idle_ms"].astype(np.int64))
            is_over = ends < now
            await self._expire_stored(store, [keys[place] for place in np.flatnonzero(is_over).tolist()])
        except ServerError as error:
            _log.warning("the store could not be looked through for idle sessions", error=error)
            self._sweep_at = now + _RETRY_INTERVAL_S
            return False
        self._next_end = min(self._next_end, float(ends[~is_over].min(initial=math.inf)))
        if keys:
            self._swept = keys[-1]
            return True
        self._swept = None
        now = self._clock.monotonic()
        self._sweep_at = max(self._next_end, now + _REST * (now - self._sweep_began))
        return False

    async def _expire_strays(self) -> int:
        """End those sessions that left the table while the store may have them, and that are due; how many."""
        now, store, count = self._clock.monotonic(), self._others, 0
        while store is not None and (due := self._strays.take_due(now, _AT_ONCE)):
            try:
                count += await self._expire_stored(store, list(due))
            except ServerError as error:
                _log.warning("the store could not be asked for idle sessions", error=error)
                for session_id in self.only_stored(list(due)):
                    self._strays.put(session_id, due[session_id], now + _RETRY_INTERVAL_S)
                break
            if len(due) == _AT_ONCE:
                await self.let_others()
        return count

    async def _expire_stored(self, store: Store, due: Sequence[str]) -> int:
        """End those of some sessions that the store has, and nobody has named for their limits; return how many.

        Raises:
            Unavailable: it cannot be asked.
        """
        due = [session_id for session_id in self.only_stored(due) if session_id not in self._strays]
        if not due:
            return 0
        over: list[Ended] = []
        for session_id, each in zip(due, await store.fetch(due), strict=True):
            header = None if each.record is None else header_or_none(session_id, each.record)
            # it may have come into the table meanwhile
            if header is not None and self.only_stored([session_id]) and session_id not in self._strays:
                over.append(ended_of(session_id, header))
        if not over:
            return 0
        self.forgotten += len(over)
        if len(over) > TOLD_ONE_BY_ONE:
            self._removal.tell("expired", Counter(each.model for each in over))
        else:
            for ended in over:
                self._observer.session_event("expired", ended.model, ended.session_id)
        self._bury(over)
        return len(over)

    def _bury(self, sessions: Sequence[Ended]) -> None:
        """Have the store know that sessions expired.

        Nobody waits for it. Should it fail, they are found in the store again, idle for too long as before, and
        the timer tries again.
        """

        def done(committed: Committed | ServerError) -> None:
            for each in sessions:
                self.burying.pop(each.session_id, None)
            if isinstance(committed, ServerError):
                _log.warning(
                    "sessions that expired are still in the store", sessions=len(sessions), error=committed
                )
                for each in sessions:
                    self._strays.put(each.session_id, -math.inf, -math.inf)
            elif self._quotas is not None:
                self._quotas.end((each.session_id, each.usage) for each in sessions)

        batch = batch_of(sessions, End.EXPIRED, self._clock.now())
        self.burying.update({stone.session_id: stone for stone in batch.tombstones})
        self._commits.submit(lambda: batch, len(sessions), done)
