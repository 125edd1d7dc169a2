"""How sessions end: what the store keeps of it, how they leave the table, and when they end by themselves.

A session ends by itself when nobody has used it for longer than its limit. This server's table says which of its sessions
may be due, and the store has pages of sessions that it knows to be unused. Both are judged alike, and ended by one commit:
"delete, if it is still unused since". So a server that was held up in between, or whose clock is wrong, ends nothing that
somebody uses. Whoever names a session that is due finds it ended: a lookup judges it first.
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
from stepwell_server.logs import Log
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
"""Sessions that are judged and end together."""
EVENT_LIMIT = 16
"""More sessions that expire together are a line in the log with their number."""
BREAK_S = 20.0
"""A longer time in which no server says that it serves the store is a break, in seconds: it ends no session."""
USE_SHARE = 1 / 10
"""Of the time in which a session ends: the store is notified of use at most so often."""
MAX_WAITING_USES = 65_536
"""Uses that may wait until the store is notified."""
MAX_PAGED_OUT = 1 << 20
"""Sessions in the table that are not in the arena, some 300 bytes each, where the store has a record of each."""
#: What was judged longer ago is judged again.
_LATE_S = 5.0
#: A server says so often that it serves the store.
_SERVES_INTERVAL_S = 5.0
#: Sessions in one notification; and the limit that counts for those that never end by themselves.
_USES_PER_CALL, _MAX_LIMIT_S = 1024, 600.0
#: The sweep looks at what is due at least and at most this often; and at sessions that have something under way.
_MAX_PAUSE_S, _MIN_PAUSE_S = 1.0, 0.05
_MAX_LOOK_S, _MIN_LOOK_S = 0.5, 0.1
#: Passes over the store's unused sessions per time limit; and at most and at least so long between two, in seconds.
_PASSES, _MAX_INTERVAL_S, _MIN_INTERVAL_S = 10, 30.0, 0.1
#: After a page the pass rests: this many times as long as the page took, and at least this long.
_REST, _MIN_REST_S = 3.0, 0.01
#: The table becomes smaller by this share of its limit at once: to find the least recently used is a look at all.
_TRIM_SHARE = 1 / 8
_NOTHING = StoredSession()


class EndedSession(NamedTuple):
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


class IdleBounds(NamedTuple):
    """For how long sessions that end must be unused, `(n,)` each: see `Batch.min_idle_s` and `Batch.max_idle_s`."""

    min_s: F64
    max_s: F64


def ended_of(session_id: str, header: Header, stamp: int = 0) -> EndedSession:
    """A session that ends and only the store has, by its record's header and stamp."""
    closes = closes_of(header.fields)
    return EndedSession(session_id, header.model, header.revision, counts.usage_of(header), stamp, closes)


def batch_of(
    sessions: Sequence[EndedSession], end: End, at: float, request_id: int = 0, idle: IdleBounds | None = None
) -> Batch:
    """What the store is to know of sessions that ended; `request_id` is that of the call that closed them, 0 for none."""
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
    """Knows the sessions that are here, and deletes them. Lives on the event loop."""

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
        self.pending: dict[str, asyncio.Future[None]] = {}
        """Sessions that are being made, or deleted without a caller: nobody sees them before the store has answered."""

    def __contains__(self, session_id: str) -> bool:
        return session_id in self.table or session_id in self.pending

    def reserve(
        self, session_ids: Sequence[str], pending: asyncio.Future[None] | None = None
    ) -> asyncio.Future[None]:
        """Have sessions be `pending`, none of which is, under a new future or that of others. It is for `release`."""
        pending = asyncio.get_running_loop().create_future() if pending is None else pending
        self.pending.update(dict.fromkeys(session_ids, pending))
        return pending

    def release(self, session_ids: Sequence[str], pending: asyncio.Future[None]) -> None:
        """Have sessions be `pending` no longer, and wake who waits for that."""
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
        """What the store is to know of sessions of the table when they end."""
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

        It is done also if the caller is cancelled meanwhile; then, and after an error, the claims of conflicts end.

        Args:
            sessions: What the store is to know of them.
            handles: `(len(sessions),)`.
            end: How they end.
            request_id: Of the call that closes them; 0: none.
            idle: For how long they must be unused.
            ended: Count them there by their models, instead of telling of each; `report` tells of all of them at once.

        Returns:
            The places of conflicts: those that another server has changed, or used. They are claimed still.

        Raises:
            Unavailable: the store did not say that it kept all of it. What it has of the others is the truth: they leave
                the table.
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
        """Take a session that ended out of the table, and tell of it."""
        if handle >= 0:
            self._queues.remove(handle, ended_by(stone))
        if ended is None:
            self._observer.session_event(stone.end.name.lower(), session.model, session.session_id)
        else:
            ended[session.model] += 1

    def _give_up(
        self, sessions: Sequence[EndedSession], handles: Handles, places: Sequence[int], error: ServerError
    ) -> None:
        """Let the store say later what became of sessions of which it did not say whether they were deleted."""
        for place in places:
            if handles[place] < 0:
                self._store.note_use(sessions[place].session_id, idle_s=math.inf, limit_s=0.0)
        here = handles[list(places)]
        if len(here := here[here >= 0]):
            self.drop(here, error)

    def report(self, event: str, ended: Counter[str]) -> None:
        """Tell how many sessions ended."""
        for model, count in ended.items():
            self._observer.session_events(event, model, count)

    def drop(self, handles: Handles, error: ServerError) -> None:
        """Forget claimed sessions whose rows are not what the store holds; they are loaded when next named."""
        _log.warning("sessions left the arena", sessions=len(handles), error=error)
        for handle in handles.tolist():
            self._queues.forget(handle, error)

    def forget_idle(self, session_ids: Sequence[str]) -> int:
        """Let the store say what became of sessions that have nothing under way here; return how many these are."""
        handles = np.unique(self.table.find_all(session_ids))
        handles = handles[(handles >= 0) & ~self.table.claimed[handles]]
        for handle in handles.tolist():
            self._queues.forget(handle, expired(self.table.session_id(handle)))
        return len(handles)


class Expiry:
    """Judges which sessions have been unused for too long, and ends them. Lives on the event loop."""

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
        """Watch sessions that have come into the table."""
        self._watch.watch(handles)

    def suspects(self, handles: Handles) -> Handles:
        """Those of some sessions that are due by the table and have nothing under way; -1 stands for none.

        The store may know of a later use.
        """
        if len(handles) == 1:  # the common case
            handle = int(handles[0])
            return handles.copy() if handle >= 0 and self.is_suspect(handle) else handles[:0]
        there = handles[handles >= 0]
        return np.unique(there[self._watch.too_long(there, self._clock.monotonic())])

    def is_suspect(self, handle: int) -> bool:
        """`suspects` of one session."""
        return self._watch.is_too_long(handle, self._clock.monotonic())

    def take_use(self, header: Header, idle_s: float) -> float:
        """When a session of the store was last used, on the monotonic clock; `idle_s` is what the store says, NaN: nothing."""
        if math.isnan(idle_s):
            # a clock that people set back meanwhile must not make it the future
            idle_s = max(0.0, self._clock.now() - header.last_used)
        return self._clock.monotonic() - idle_s

    def only_stored(self, session_ids: Sequence[str]) -> list[str]:
        """Those of some sessions that are in the store and nowhere else, if they are anywhere."""
        table, pending = self._table, self._removal.pending
        return [i for i in dict.fromkeys(session_ids) if i and i not in table and i not in pending]

    async def refresh(self) -> None:
        """Say that this server serves the store, unless it has just done so, and know since when it is served without a break.

        Raises:
            Unavailable: the store cannot be asked now.
        """
        at = self._clock.monotonic()
        if at - self._asked_at >= _SERVES_INTERVAL_S:
            held_s = await self._store.claim("service", "all", BREAK_S)
            self._watch.since, self._asked_at = at - (held_s or 0.0), at

    def is_over(self, session_id: str, found: StoredSession) -> bool:
        """Whether a session, as the store has it, has been unused for too long."""
        return found.record is not None and self._limit_if_over(session_id, found) is not None

    def is_too_long(self, limit_s: float, idle_s: float) -> bool:
        """Whether a session with this limit has ended, if it was unused for `idle_s` and has nothing under way: see `refresh`."""
        return min(idle_s, self._clock.monotonic() - self._watch.since) > limit_s

    def _limit_if_over(self, session_id: str, found: StoredSession) -> tuple[Header, float, float] | None:
        """The header of a record that is over, its limit, and for how long it was unused; None: it is not over."""
        assert found.record is not None, "the caller has looked"
        limit_s = self.limits.seconds(max_idle_ms_of(found.record))
        # to read a header takes longer than to see that it need not be read
        if not self.is_too_long(limit_s, math.inf if math.isnan(found.idle_s) else found.idle_s):
            return None
        header = header_or_none(session_id, found.record)
        if header is None:
            return None
        idle_s = self._clock.monotonic() - self.take_use(header, found.idle_s)
        return (header, limit_s, idle_s) if self.is_too_long(limit_s, idle_s) else None

    async def compare(self, session_ids: Sequence[str]) -> dict[str, StoredSession]:
        """Forget sessions that other servers have changed, of those of the table that have nothing under way here.

        The table knows then when the store last heard of the use of the others.

        Returns:
            What other servers made of sessions that have something under way here.

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
                continue  # it has left the table, and is looked for anew
            if each.idle_s >= 0:
                table.used[handle] = now - each.idle_s
            # what is under way may have been kept after the store was asked, or before: its own stamp is no other's
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
            Unavailable: the store cannot be asked, or did not say what became of them. They leave the table.
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
            Unavailable: the store cannot be asked, or did not say what became of them.
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
        """End those of some sessions that only the store has, and has so, which are over.

        Returns:
            Their ids: what there is of them is to be read again.

        Raises:
            Unavailable: the store cannot be asked, or did not say what became of them.
        """
        if not self._over(found):
            return set()
        await self.refresh()
        over = self._over(found)
        # others may be ending by the sweep meanwhile
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
        """End those of a page that are over, unless this server's table knows better; return how many.

        Raises:
            Unavailable: the store cannot be asked, or did not say what became of them.
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
        """Whether the table does not know better: what is under way here is use of which the store may not have heard."""
        if session_id in self._removal.pending:
            return False
        handle = self._table.find(session_id)
        return handle is None or self.is_suspect(handle)

    async def expire_due(self) -> int:
        """End the sessions of the table that are due, some at a time; return how many.

        Raises:
            Unavailable: as `expire_page`.
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
                self._watch.watch(left[left >= 0])  # somebody has used them, or the store could not be asked
        return count

    async def _end(self, sessions: Sequence[EndedSession], idle: IdleBounds) -> int:
        """End sessions that were just judged; return how many. What ends together is reported together.

        Raises:
            Unavailable: the store did not say what became of them.
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
        # somebody has used or changed them: the store says it, unless what waited for them is under way now
        self._removal.forget_idle([sessions[place].session_id for place in conflicts.tolist()])
        return len(sessions) - len(conflicts)


class UseNotifier:
    """Notifies the store of uses that write nothing, of each session at most every tenth of its limit.

    What comes while a call to the store is under way goes into the next call together. If the store cannot be notified
    nothing is lost: the next use of the session notifies it again. Lives on the event loop.
    """

    def __init__(self, watch: IdleWatch, store: Store, clock: Clock) -> None:
        self._table, self._limits = watch.table, watch.limits
        self._store = store
        self._clock = clock
        self._waiting: dict[str, int] = {}
        """Stamps of sessions of which the store is to be notified."""
        self._task: asyncio.Task[None] | None = None
        self._work = Alarm(self._start)
        self._is_away = False

    @property
    def is_idle(self) -> bool:
        """The store is not being notified of anything."""
        return self._task is None and not self._waiting

    def used(self, handles: Handles) -> None:
        """Sessions are used now, and not written; the table knows what the store last said of their use."""
        now, table = self._clock.monotonic(), self._table
        for handle in self._due(handles, now).tolist():
            if len(self._waiting) < MAX_WAITING_USES:
                self._waiting[table.session_id(handle)] = int(table.stamp[handle])
        if self._waiting:
            self._work.ring()
        table.used[handles] = now

    def look(self) -> None:
        """Count sessions as used that have had something under way for long."""
        table = self._table
        claimed = np.flatnonzero(table.claimed[: table.end])
        claimed = claimed[table.model[claimed] >= 0]
        if len(claimed):
            self.used(self._due(claimed, self._clock.monotonic()))

    def close(self) -> None:
        """Notify the store of nothing more."""
        self._waiting = {}
        if self._task is not None:
            self._task.cancel()

    def _due(self, handles: Handles, now: float) -> Handles:
        """Those of whose use the store is to be notified."""
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
                _log.warning("the store could not be notified of the use of sessions", error=why)
            self._is_away = True
        self._task = None
        if self._waiting:
            self._work.ring()


class Sweep:
    """The timer that ends sessions nobody uses, and keeps the table small. Lives on the event loop.

    One server at a time goes through the store's unused sessions: the store gives it the task, for a while.
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
        """`max_paged_out` sessions of the table may be out of the arena; the store has a record of each if it is finite."""
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
        """Of this server, among those that want the task."""
        self._cursor = ""
        """Of the next page; empty: a pass begins."""
        self._page_at = self._look_at = -math.inf
        self._away: set[str] = set()
        """What could not be done when it was last tried."""

    async def run(self) -> None:
        """Do what is due from time to time, until cancelled."""
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
        await self._try("the store could not be asked since when it is served", self._expiry.refresh())
        if now >= self._page_at:
            await self._try("the store could not be searched for sessions to end", self.page())
        await self._try("sessions that are due could not be ended", self._expiry.expire_due())
        await self._try("the table could not be made smaller", self.trim())

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
        """Go through the store's unused sessions once, unless another server does, and then through the table.

        Returns:
            How many sessions ended.

        Raises:
            Unavailable: the store cannot be asked, or did not say what became of some that were due.
        """
        self._cursor = ""
        ended = await self.page()
        while self._cursor:
            await asyncio.sleep(_MIN_REST_S)
            ended += await self.page()
        return ended + await self._expiry.expire_due()

    async def page(self) -> int:
        """End what is due of the next page of the store's unused sessions, if this server has the task; return how many.

        Raises:
            Unavailable: as `round`.
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
        """Forget the least recently used sessions that are paged out, if they are too many; return how many.

        Whoever names one has it read from the store, as on a server that has never seen it.
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
