"""Ends sessions: deletes them from the store and the table, and expires those that have been idle for too long.

A session expires when nobody has used it for longer than its limit. This server's table shows which of its sessions
may be due, and the store has pages of sessions that it considers unused. Both are judged the same way, and ended by
one commit: "delete, if it is still unused since". So a server that was delayed in between, or whose clock is wrong,
never ends a session in use. A due session that is looked up is judged first, so callers find it ended.
"""

from __future__ import annotations

import asyncio
import dataclasses
import itertools
import math
import secrets
from collections import Counter
from collections.abc import Awaitable, Mapping, Sequence
from typing import NamedTuple

import numpy as np

from stepwell_server.alarm import Alarm
from stepwell_server.clock import Clock
from stepwell_server.core.idle import IdleWatch
from stepwell_server.core.quotas import Usage
from stepwell_server.core.sessions import Handles, SessionTable, are_missing
from stepwell_server.engine.api import Observer
from stepwell_server.engine.commit.committer import outcome_unknown
from stepwell_server.engine.commit.group_commit import GroupCommit
from stepwell_server.engine.commit.tombstones import ended_by, expired
from stepwell_server.engine.intake.queues import SessionQueues
from stepwell_server.engine.quotas import Quotas
from stepwell_server.engine.state.fields import closes_of
from stepwell_server.engine.versions.registry import Models
from stepwell_server.errors import ServerError
from stepwell_server.logs import Log, Repeats
from stepwell_server.store import counts
from stepwell_server.store.base import (
    KNOWN,
    Answer,
    Batch,
    End,
    Outcome,
    Store,
    StoredSession,
    Tombstone,
    UnusedSessions,
    as_server_error,
    with_close,
)
from stepwell_server.store.record import F64, Header, header_or_none, max_idle_ms_of

_log = Log("engine.expiry")

BATCH_SIZE = 500
"""Sessions that are judged and ended together."""
EVENT_LIMIT = 16
"""If more sessions than this expire together, one log line reports their number."""
BREAK_S = 20.0
"""If no server reports for longer than this that it serves the store, in seconds, that time does not count as idle."""
USE_SHARE = 1 / 10
"""Share of a session's limit: uses are reported to the store at most this often."""
MAX_WAITING_USES = 65_536
"""Uses that may wait to be reported to the store."""
MAX_PAGED_OUT = 1 << 20
"""Paged-out sessions in the table, some 300 bytes each, if the store has a record of each."""
#: A judgement older than this is repeated.
_LATE_S = 5.0
#: How often a server reports that it serves the store.
_SERVES_INTERVAL_S = 5.0
#: Sessions in one report, and the limit assumed for sessions that never expire.
_USES_PER_CALL, _MAX_LIMIT_S = 1024, 600.0
#: The sweep's longest and shortest interval; and the interval of checks for active sessions.
_MAX_PAUSE_S, _MIN_PAUSE_S = 1.0, 0.05
_MAX_LOOK_S, _MIN_LOOK_S = 0.5, 0.1
#: Scans of the store's unused sessions per time limit; and the longest and shortest interval of scans, in seconds.
_PASSES, _MAX_INTERVAL_S, _MIN_INTERVAL_S = 10, 30.0, 0.1
#: After a page the scan pauses: this many times as long as the page took, and at least this long.
_REST, _MIN_REST_S = 3.0, 0.01
#: The table shrinks by this share of its limit at once, because finding the least recently used sessions scans all
#: of them.
_TRIM_SHARE = 1 / 8
_NOTHING = StoredSession()


class EndedSession(NamedTuple):
    """A session that is to end."""

    session_id: str
    model: str
    """Empty if the store does not count the session."""
    revision: int
    """Its last known revision."""
    usage: Usage
    """What it used of its tenant's quotas."""
    stamp: int = 0
    """The stamp of its record; 0: end it whatever the store has."""
    closes: tuple[int, ...] = ()
    """Request ids of the calls that closed earlier sessions of the id: see `Tombstone.closes`."""


class IdleBounds(NamedTuple):
    """How long sessions must have been unused to end, `(n,)` each: see `Batch.min_idle_s` and `Batch.max_idle_s`."""

    min_s: F64
    max_s: F64


def ended_of(session_id: str, header: Header, stamp: int = 0) -> EndedSession:
    """A session to end that only the store has, by its record's header and stamp."""
    closes = closes_of(header.fields)
    return EndedSession(session_id, header.model, header.revision, counts.usage_of(header), stamp, closes)


def batch_of(
    sessions: Sequence[EndedSession], end: End, at: float, request_id: int = 0, idle: IdleBounds | None = None
) -> Batch:
    """The batch that ends sessions; `request_id` is that of the call that closes them, 0: none."""
    batch = Batch(
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
    return batch if idle is None else dataclasses.replace(batch, min_idle_s=idle.min_s, max_idle_s=idle.max_s)


class Removal:
    """Knows the existing sessions, and deletes them. Lives on the event loop."""

    def __init__(
        self,
        table: SessionTable,
        models: Models,
        queues: SessionQueues,
        store: Store,
        commits: GroupCommit,
        *,
        quotas: Quotas | None,
        clock: Clock,
        observer: Observer,
    ) -> None:
        self.table = table
        self._models = models
        self._queues = queues
        self._store = store
        self._commits = commits
        self._quotas = quotas
        self._clock = clock
        self._observer = observer
        self._drops = Repeats()
        """By class of an error."""
        self.pending: dict[str, asyncio.Future[None]] = {}
        """Sessions being created, or deleted without a caller: they are invisible until the store has answered."""

    def __contains__(self, session_id: str) -> bool:
        return session_id in self.table or session_id in self.pending

    def reserve(
        self, session_ids: Sequence[str], pending: asyncio.Future[None] | None = None
    ) -> asyncio.Future[None]:
        """Mark sessions as `pending`, under a new future or an existing one. Pass it to `release`."""
        pending = asyncio.get_running_loop().create_future() if pending is None else pending
        self.pending.update(dict.fromkeys(session_ids, pending))
        return pending

    def release(self, session_ids: Sequence[str], pending: asyncio.Future[None]) -> None:
        """Mark sessions as no longer `pending`, and wake those who wait for that."""
        for session_id in session_ids:
            self.pending.pop(session_id, None)
        if not pending.done():
            pending.set_result(None)

    def are_pending(self, session_ids: Sequence[str]) -> bool:
        """Whether some of these sessions are `pending`."""
        return bool(self.pending) and not self.pending.keys().isdisjoint(session_ids)

    async def settled(self, session_ids: Sequence[str]) -> None:
        """Return when none of these sessions is `pending`."""
        while self.are_pending(session_ids):
            await asyncio.wait({self.pending[i] for i in session_ids if i in self.pending})

    def described(self, handles: Handles) -> list[EndedSession]:
        """The facts needed to end sessions of the table."""
        table = self.table
        return [
            EndedSession(
                table.session_id(handle),
                self._models.by_handle(handle).name,
                int(table.revision[handle]),
                table.usage(handle),
                int(table.stamp[handle]),
                closes_of(table.fields.get(handle, b"")),
            )
            for handle in handles.tolist()
        ]

    async def delete(
        self,
        sessions: Sequence[EndedSession],
        handles: Handles,
        end: End,
        *,
        request_id: int = 0,
        idle: IdleBounds | None = None,
        ended: Counter[str] | None = None,
    ) -> Handles:
        """Delete sessions that are claimed, or that only the store has: their handles are -1.

        It completes even if the caller is cancelled meanwhile. In that case, and after an error, the claims of
        conflicts end.

        Args:
            sessions: The sessions to end.
            handles: `(len(sessions),)`.
            end: How they end.
            request_id: Of the call that closes them; 0: none.
            idle: How long they must have been unused.
            ended: Counts them by model instead of reporting each; `report` reports all of them at once.

        Returns:
            The places of conflicts: sessions that another server changed or used. They are still claimed.

        Raises:
            Unavailable: the store did not confirm all of it. The other sessions leave the table, and their records
                decide.
        """
        answered: asyncio.Future[ServerError | None] = asyncio.get_running_loop().create_future()
        places: dict[Outcome, list[int]] = {outcome: [] for outcome in Outcome}
        batch = batch_of(sessions, end, self._clock.now(), request_id, idle)
        hidden = [
            each.session_id
            for each, handle in zip(sessions, handles.tolist(), strict=True)
            if handle < 0 or end is End.EXPIRED
        ]
        gone = self.reserve(hidden)

        def done(answer: Answer) -> None:
            self.release(hidden, gone)
            error = answer if isinstance(answer, ServerError) else None
            for place, each in enumerate(sessions):
                outcome = Outcome.UNKNOWN if isinstance(answer, ServerError) else answer.of(each.session_id)
                places[outcome].append(place)
            self._end([sessions[place] for place in places[Outcome.KEPT]])
            for place in places[Outcome.KEPT]:
                self._leave(sessions[place], int(handles[place]), batch.tombstones[place], ended)
            if places[Outcome.UNKNOWN]:
                error = error or outcome_unknown()
                self._give_up(sessions, handles, places[Outcome.UNKNOWN], error)
            answered.set_result(error)

        def release() -> None:
            claimed = handles[places[Outcome.CONFLICT]]
            self._queues.release(claimed[claimed >= 0])

        self._commits.submit(lambda: batch, len(sessions), done)
        try:
            error = await asyncio.shield(answered)
        except asyncio.CancelledError:
            answered.add_done_callback(lambda _: release())
            raise
        if error is not None:
            release()
            raise error
        return np.array(places[Outcome.CONFLICT], np.intp)

    def _end(self, sessions: Sequence[EndedSession]) -> None:
        if self._quotas is not None:
            self._quotas.end((each.session_id, each.usage) for each in sessions)

    def _leave(
        self, session: EndedSession, handle: int, stone: Tombstone, ended: Counter[str] | None
    ) -> None:
        """Remove an ended session from the table, and report it."""
        if handle >= 0:
            self._queues.remove(handle, ended_by(stone))
        if ended is None:
            self._observer.session_event(stone.end.name.lower(), session.model, session.session_id)
        else:
            ended[session.model] += 1

    def _give_up(
        self, sessions: Sequence[EndedSession], handles: Handles, places: Sequence[int], error: ServerError
    ) -> None:
        """Remove sessions from the table for which the store did not say whether they were deleted."""
        for place in places:
            if handles[place] < 0:
                self._store.note_use(sessions[place].session_id, idle_s=math.inf, limit_s=0.0)
        here = handles[list(places)]
        if len(here := here[here >= 0]):
            self.drop(here, error)

    def report(self, event: str, ended: Counter[str]) -> None:
        """Report how many sessions ended."""
        for model, count in ended.items():
            self._observer.session_events(event, model, count)

    def drop(self, handles: Handles, error: ServerError) -> None:
        """Forget claimed sessions whose rows differ from the store; they are loaded when next named."""
        if (more := self._drops.due(type(error).__name__, self._clock.monotonic())) is not None:
            # a full disk refuses every commit
            _log.warning("sessions left the arena", sessions=len(handles), error=error, **more)
        for handle in handles.tolist():
            self._queues.forget(handle, error)

    def forget_idle(self, session_ids: Sequence[str]) -> int:
        """Forget sessions that are not active here; return how many. Their records decide what they are."""
        handles = np.unique(self.table.find_all(session_ids))
        handles = handles[(handles >= 0) & ~self.table.claimed[handles]]
        for handle in handles.tolist():
            self._queues.forget(handle, expired(self.table.session_id(handle)))
        return len(handles)


class Expiry:
    """Judges which sessions have been idle for too long, and ends them. Lives on the event loop."""

    def __init__(
        self, watch: IdleWatch, removal: Removal, queues: SessionQueues, store: Store, *, clock: Clock
    ) -> None:
        self._table, self._watch, self.limits = watch.table, watch, watch.limits
        self._removal = removal
        self._queues = queues
        self._store = store
        self._clock = clock
        self._asked_at = -math.inf

    # ------------------------------------------------------------------------------------------------- what is known

    def watch(self, handles: Handles) -> None:
        """Watch sessions that have entered the table."""
        self._watch.watch(handles)

    def suspects(self, handles: Handles) -> Handles:
        """Sessions that are due by the table and not active; -1: no session.

        The store may know of a later use.
        """
        if len(handles) == 1:  # the common case
            handle = int(handles[0])
            return handles.copy() if handle >= 0 and self.is_suspect(handle) else handles[:0]
        there = handles[handles >= 0]
        return np.unique(there[self._watch.too_long(there, self._clock.monotonic())])

    def is_suspect(self, handle: int) -> bool:
        """`suspects` for one session."""
        return self._watch.is_too_long(handle, self._clock.monotonic())

    def take_use(self, header: Header, idle_s: float) -> float:
        """When a stored session was last used, on the monotonic clock; `idle_s` is the store's value, NaN: unknown."""
        if math.isnan(idle_s):
            # a clock that was set back meanwhile must not make it the future
            idle_s = max(0.0, self._clock.now() - header.last_used)
        return self._clock.monotonic() - idle_s

    def only_stored(self, session_ids: Sequence[str]) -> list[str]:
        """Sessions that only the store can have."""
        table, pending = self._table, self._removal.pending
        return [i for i in dict.fromkeys(session_ids) if i and i not in table and i not in pending]

    async def refresh(self) -> None:
        """Report that this server serves the store, unless it has just done so.

        It then knows since when the store has been served without a break.

        Raises:
            Unavailable: the store cannot be asked now.
        """
        at = self._clock.monotonic()
        if at - self._asked_at >= _SERVES_INTERVAL_S:
            held_s = await self._store.claim("service", "all", BREAK_S)
            self._watch.since, self._asked_at = at - (held_s or 0.0), at

    def is_over(self, session_id: str, found: StoredSession) -> bool:
        """Whether a stored session has been unused for too long."""
        return found.record is not None and self._limit_if_over(session_id, found) is not None

    def is_too_long(self, limit_s: float, idle_s: float) -> bool:
        """Whether a session with this limit has expired, if it was unused for `idle_s`.

        It must not be active; see also `refresh`.
        """
        return min(idle_s, self._clock.monotonic() - self._watch.since) > limit_s

    def _limit_if_over(self, session_id: str, found: StoredSession) -> tuple[Header, float, float] | None:
        """The header of an expired record, its limit, and how long it was unused; None: it has not expired."""
        assert found.record is not None, "the caller has looked"
        limit_s = self.limits.seconds(max_idle_ms_of(found.record))
        # reading a header takes longer than seeing that it need not be read
        if not self.is_too_long(limit_s, math.inf if math.isnan(found.idle_s) else found.idle_s):
            return None
        header = header_or_none(session_id, found.record)
        if header is None:
            return None
        idle_s = self._clock.monotonic() - self.take_use(header, found.idle_s)
        return (header, limit_s, idle_s) if self.is_too_long(limit_s, idle_s) else None

    async def compare(self, session_ids: Sequence[str]) -> dict[str, StoredSession]:
        """Forget sessions of the table that other servers changed and that are not active here.

        The table then has the store's last use of the others.

        Returns:
            Records of other servers' changes to sessions that are active here.

        Raises:
            Unavailable: the store cannot be read, and such a session may have been changed.
        """
        table = self._table
        if not table.has_any(session_ids):
            return {}
        ids, handles = session_ids, table.find_all(session_ids)
        if are_missing(handles):
            there = handles >= 0
            ids, handles = [ids[place] for place in np.flatnonzero(there).tolist()], handles[there]
        was_claimed, were = table.claimed[handles], table.birth[handles]
        try:
            found = await self._store.fetch(ids, table.stamp[handles].tolist())
        except ServerError:
            if was_claimed.any():
                raise
            found = [_NOTHING] * len(ids)  # they are loaded when the store can be read again
        if found.count(KNOWN) == len(found):
            return {}
        births, now = dict(zip(ids, were.tolist(), strict=True)), self._clock.monotonic()
        newer: dict[str, StoredSession] = {}
        changed: list[str] = []
        for handle, (session_id, each) in zip(
            table.find_all(ids).tolist(), zip(ids, found, strict=True), strict=True
        ):
            if handle < 0 or int(table.birth[handle]) != births[session_id]:
                continue  # it has left the table, and is looked up again
            if each.idle_s >= 0:
                table.used[handle] = now - each.idle_s
            # active work may have been stored after the store was read, or before: its stamp is unique
            if each.is_known or (each.stamp and each.stamp == int(table.stamp[handle])):
                continue
            if table.claimed[handle]:
                newer[session_id] = each
            else:
                changed.append(session_id)
        self._removal.forget_idle(changed)
        return newer

    # ------------------------------------------------------------------------------------------------------ their ends

    async def expire_named(self, session_ids: Sequence[str], *, is_compared: bool = False) -> None:
        """End those of some sessions of the table that are due; `is_compared`: they have just been compared.

        Raises:
            Unavailable: the store cannot be asked, or did not confirm the result. The sessions leave the table.
        """
        if self._clock.monotonic() <= self._table.next_end:
            return
        suspects = self.suspects(self._table.find_all(session_ids))
        if not len(suspects):
            return
        ids = [self._table.session_id(handle) for handle in suspects.tolist()]
        try:
            await self._expire_here(ids, is_compared=is_compared)
        except ServerError:
            left = self.suspects(self._table.find_all(ids))
            self._removal.forget_idle([self._table.session_id(handle) for handle in left.tolist()])
            raise

    async def _expire_here(self, session_ids: Sequence[str], *, is_compared: bool = False) -> int:
        """End those of some sessions of the table that are due; return how many.

        Raises:
            Unavailable: the store cannot be asked, or did not confirm the result.
        """
        if not is_compared:
            await self.compare(session_ids)
        await self.refresh()
        due = self.suspects(self._table.find_all(session_ids))
        if not len(due):
            return 0
        limits_s = self.limits.seconds_of(self._table.max_idle_ms[due])
        idle_s = self._clock.monotonic() - self._table.used[due]
        return await self._end(self._removal.described(due), IdleBounds(limits_s, idle_s + _LATE_S))

    async def expire_found(self, found: Mapping[str, StoredSession]) -> set[str]:
        """End expired sessions that only the store has, if their records are unchanged.

        Returns:
            Their ids: they must be read again.

        Raises:
            Unavailable: the store cannot be asked, or did not confirm the result.
        """
        if not self._over(found):
            return set()
        await self.refresh()
        over = self._over(found)
        # the sweep may be ending some meanwhile
        mine = {i: each for i, each in over.items() if i not in self._removal}
        if mine:
            sessions = [ended_of(i, header, found[i].stamp) for i, (header, _, _) in mine.items()]
            limits_s = np.array([limit_s for _, limit_s, _ in mine.values()], np.float64)
            idle_s = np.array([idle_s for _, _, idle_s in mine.values()], np.float64)
            await self._end(sessions, IdleBounds(limits_s, idle_s + _LATE_S))
        return {*over}

    def _over(self, found: Mapping[str, StoredSession]) -> dict[str, tuple[Header, float, float]]:
        return {
            i: over
            for i, each in found.items()
            if each.record is not None and (over := self._limit_if_over(i, each)) is not None
        }

    async def expire_page(self, page: UnusedSessions) -> int:
        """End the expired sessions of a page, unless this server's table knows better; return how many.

        Raises:
            Unavailable: the store cannot be asked, or did not confirm the result.
        """
        await self.refresh()
        heads, names = page.heads.heads, page.heads.models
        limits_s = self.limits.seconds_of(heads["max_idle_ms"].astype(np.int64))
        served_s = self._clock.monotonic() - self._watch.since
        places = [
            place
            for place in np.flatnonzero(np.minimum(page.idle_s, served_s) > limits_s).tolist()
            if self._may_end(str(page.heads.keys[place], "utf-8", "replace"))
        ]
        sessions = [
            EndedSession(
                str(page.heads.keys[place], "utf-8", "replace"),
                names[int(page.heads.model[place])],
                int(heads["revision"][place]),
                page.heads.usage(place),
                int(page.stamps[place]),
                closes_of(page.heads.fields.get(place, b"")),
            )
            for place in places
        ]
        if not sessions:
            return 0
        return await self._end(sessions, IdleBounds(limits_s[places], page.idle_s[places] + _LATE_S))

    def _may_end(self, session_id: str) -> bool:
        """Whether the table agrees: a session that is active here is in use, even if the store does not know yet."""
        if session_id in self._removal.pending:
            return False
        handle = self._table.find(session_id)
        return handle is None or self.is_suspect(handle)

    async def expire_due(self) -> int:
        """End the sessions of the table that are due, in batches; return how many.

        Raises:
            Unavailable: as for `expire_page`.
        """
        count = 0
        for due in self._watch.take_due_in_parts(self._clock.monotonic, BATCH_SIZE):
            ids = [self._table.session_id(handle) for handle in due.tolist()]
            try:
                if ids:
                    count += await self._expire_here(ids)
                    await asyncio.sleep(_MIN_REST_S)
            finally:
                left = self._table.find_all(ids)
                self._watch.watch(left[left >= 0])  # they were used, or the store could not be asked
        return count

    async def _end(self, sessions: Sequence[EndedSession], idle: IdleBounds) -> int:
        """End sessions that were just judged; return how many. Sessions ended together are reported together.

        Raises:
            Unavailable: the store did not confirm the result.
        """
        handles = self._table.find_all([each.session_id for each in sessions])
        self._queues.claim(handles[handles >= 0])
        ended: Counter[str] | None = Counter() if len(sessions) > EVENT_LIMIT else None
        try:
            conflicts = await self._removal.delete(sessions, handles, End.EXPIRED, idle=idle, ended=ended)
        finally:
            self._removal.report("expired", ended or Counter())
        here = handles[conflicts]
        self._queues.release(here[here >= 0])
        # they were used or changed according to the store, unless queued work is active now
        self._removal.forget_idle([sessions[place].session_id for place in conflicts.tolist()])
        return len(sessions) - len(conflicts)


class UseNotifier:
    """Reports uses that write nothing to the store: for each session at most every tenth of its limit.

    Uses that arrive while a call to the store is active go into the next call together. If a call fails, nothing is
    lost: the next use of the session is reported again. Lives on the event loop.
    """

    def __init__(self, watch: IdleWatch, store: Store, clock: Clock) -> None:
        self._table, self._limits = watch.table, watch.limits
        self._store = store
        self._clock = clock
        self._waiting: dict[str, int] = {}
        """Stamps of sessions whose use is to be reported."""
        self._task: asyncio.Task[None] | None = None
        self._work = Alarm(self._start)
        self._is_away = False

    @property
    def is_idle(self) -> bool:
        """Whether no report is active."""
        return self._task is None and not self._waiting

    def used(self, handles: Handles) -> None:
        """Note that sessions are used now without being written. The table has the store's last known use."""
        now, table = self._clock.monotonic(), self._table
        for handle in self._due(handles, now).tolist():
            if len(self._waiting) < MAX_WAITING_USES:
                self._waiting[table.session_id(handle)] = int(table.stamp[handle])
        if self._waiting:
            self._work.ring()
        table.used[handles] = now

    def look(self) -> None:
        """Count sessions that have been active for long as used."""
        table = self._table
        claimed = np.flatnonzero(table.claimed[: table.end])
        claimed = claimed[table.model[claimed] >= 0]
        if len(claimed):
            self.used(self._due(claimed, self._clock.monotonic()))

    def close(self) -> None:
        """Stop reporting."""
        self._waiting = {}
        if self._task is not None:
            self._task.cancel()

    def _due(self, handles: Handles, now: float) -> Handles:
        """Sessions whose use must be reported."""
        table = self._table
        if len(handles) == 1:  # the common case
            handle = int(handles[0])
            limit_s = min(_MAX_LIMIT_S, self._limits.seconds(int(table.max_idle_ms[handle])))
            return handles if now - table.used[handle] >= USE_SHARE * limit_s else handles[:0]
        limits_s = np.minimum(_MAX_LIMIT_S, self._limits.seconds_of(table.max_idle_ms[handles]))
        return handles[now - table.used[handles] >= USE_SHARE * limits_s]

    def _start(self) -> None:
        if self._task is None and self._waiting:
            self._task = asyncio.create_task(self._notify())

    async def _notify(self) -> None:
        some = dict(itertools.islice(self._waiting.items(), _USES_PER_CALL))
        for session_id in some:
            del self._waiting[session_id]
        try:
            await self._store.touch(list(some), list(some.values()))
            self._is_away = False
        except Exception as error:
            why = as_server_error(error)
            if not self._is_away:
                _log.warning("could not report the use of sessions to the store", error=why)
            self._is_away = True
        self._task = None
        if self._waiting:
            self._work.ring()


class Sweep:
    """The timer that ends unused sessions, and limits the table's size. Lives on the event loop.

    One server at a time scans the store's unused sessions: the store assigns the task for a while.
    """

    def __init__(
        self,
        watch: IdleWatch,
        expiry: Expiry,
        removal: Removal,
        uses: UseNotifier,
        store: Store,
        commits: GroupCommit,
        clock: Clock,
        *,
        max_paged_out: float,
    ) -> None:
        """At most `max_paged_out` sessions of the table may be paged out.

        If it is finite, the store has a record of each session.
        """
        self._table, self._watch = watch.table, watch
        self._expiry = expiry
        self._removal = removal
        self._uses = uses
        self._store = store
        self._commits = commits
        self._clock = clock
        self.max_paged_out = max_paged_out
        max_s = watch.limits.max_s
        self._look_every_s = min(_MAX_LOOK_S, max(_MIN_LOOK_S, USE_SHARE / 2 * max_s))
        self._pass_every_s = min(_MAX_INTERVAL_S, max(_MIN_INTERVAL_S, max_s / _PASSES))
        self._name = secrets.token_hex(8)
        """This server's name, among those that want the task."""
        self._cursor = ""
        """The start of the next page; empty: a new scan."""
        self._page_at = self._look_at = -math.inf
        self._away: set[str] = set()
        """Failures of the last attempt."""

    async def run(self) -> None:
        """Do what is due at intervals, until cancelled."""
        while True:
            now = self._clock.monotonic()
            pause_s = min(self._watch.next_in(now), self._page_at - now, self._look_at - now)
            await asyncio.sleep(min(_MAX_PAUSE_S, max(_MIN_PAUSE_S, pause_s)))
            await self.tick()

    async def tick(self) -> None:
        """Do what is due now."""
        now = self._clock.monotonic()
        if now >= self._look_at:
            self._uses.look()
            self._look_at = now + self._look_every_s
        await self._try("could not read from the store since when it is served", self._expiry.refresh())
        if now >= self._page_at:
            await self._try("could not scan the store for expired sessions", self.page())
        await self._try("could not end expired sessions", self._expiry.expire_due())
        await self._try("could not shrink the session table", self.trim())

    async def _try(self, failure: str, work: Awaitable[object]) -> None:
        try:
            await work
            self._away.discard(failure)
        except ServerError as error:
            if failure not in self._away:
                _log.warning(failure, error=error)
            self._away.add(failure)
        except Exception as error:
            _log.defect(failure, error)

    async def round(self) -> int:
        """Scan the store's unused sessions once, unless another server does, and then the table.

        Returns:
            How many sessions ended.

        Raises:
            Unavailable: the store cannot be asked, or did not confirm the result for sessions that were due.
        """
        self._cursor = ""
        ended = await self.page()
        while self._cursor:
            await asyncio.sleep(_MIN_REST_S)
            ended += await self.page()
        return ended + await self._expiry.expire_due()

    async def page(self) -> int:
        """End expired sessions of the next page of the store's unused ones; return how many.

        Does nothing if another server has the task.

        Raises:
            Unavailable: as for `round`.
        """
        began = self._clock.monotonic()
        self._page_at = began + self._pass_every_s
        cursor, self._cursor = self._cursor, ""
        if await self._store.claim("sweep", self._name, 3 * _MAX_INTERVAL_S) is None:
            return 0
        page = await self._store.unused(cursor, limits=self._expiry.limits, limit=BATCH_SIZE)
        ended = await self._expiry.expire_page(page)
        await self._commits.room()
        self._cursor = page.cursor
        if page.cursor:
            self._page_at = began + max(_MIN_REST_S, (1 + _REST) * (self._clock.monotonic() - began))
        return ended

    async def trim(self) -> int:
        """Forget the least recently used paged-out sessions, if there are too many; return how many.

        They are read from the store when next named, as on a server that has never seen them.
        """
        table = self._table
        if len(table) <= self.max_paged_out:
            return 0
        end = table.end
        away = np.flatnonzero((table.model[:end] >= 0) & (table.row[:end] < 0) & ~table.claimed[:end])
        if len(away) <= self.max_paged_out:
            return 0
        count = len(away) - int(self.max_paged_out * (1 - _TRIM_SHARE))
        oldest = away[np.argpartition(table.used[away], min(count, len(away)) - 1)[:count]]
        births, forgotten = table.birth[oldest], 0
        for at in range(0, len(oldest), BATCH_SIZE):
            part = oldest[at : at + BATCH_SIZE]
            still = part[(table.birth[part] == births[at : at + BATCH_SIZE]) & (table.row[part] < 0)]
            forgotten += self._removal.forget_idle([table.session_id(handle) for handle in still.tolist()])
            await asyncio.sleep(0)
        return forgotten
