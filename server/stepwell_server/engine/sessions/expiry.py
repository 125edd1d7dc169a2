"""Sessions that nobody uses any more come to their end.

They are looked at when they are named, so nobody sees one that should be gone, and from time to time (see
`expiry_timer`).
"""

from __future__ import annotations

import math
import sys
from collections.abc import Iterable, Iterator, Sequence

import numpy as np

from stepwell_server.clock import Clock
from stepwell_server.core.idle import IdleWatch
from stepwell_server.core.sessions import Handles, SessionTable
from stepwell_server.engine.api import Observer
from stepwell_server.engine.durability.group_commit import GroupCommit
from stepwell_server.engine.sessions.removal import Removal
from stepwell_server.errors import ServerError, SessionExpired
from stepwell_server.logs import Log
from stepwell_server.store.base import Batch, End, LocalStore, Tombstone
from stepwell_server.store.record import Header, header_or_none

_log = Log("engine.expiry")

SWEPT_AT_ONCE = 500
"""Records."""


class Expiry:
    """Knows which sessions are idle for too long, in the table or in the store, and ends them.

    Lives on the event loop.
    """

    def __init__(
        self,
        table: SessionTable,
        removal: Removal,
        store: LocalStore,
        commits: GroupCommit,
        *,
        clock: Clock,
        observer: Observer,
        max_idle_s: float,
    ) -> None:
        self._table = table
        self._removal = removal
        self._store = store
        self._commits = commits
        self._clock = clock
        self._observer = observer
        self._max_idle_s = max_idle_s
        self._started = clock.monotonic()
        self._idle = IdleWatch(table, max_idle_s, self._started)
        self.burying: dict[str, int] = {}
        """Sessions that expired and may still be in the store, with their revisions."""
        self._strays: dict[str, float] = {}
        """When sessions were last used, on the monotonic clock, that left the table while they may still be in the
        store: their records know it less well. Empty where sessions do not expire."""
        self._swept: str | None = None if store.is_volatile else ""
        """How far the store has been looked through for sessions that nobody named since the start."""

    def watch(self, handles: Handles) -> None:
        """Watch sessions that have come into the table."""
        self._idle.watch(handles)

    def is_due(self, handle: int) -> bool:
        """Whether a session of the table has been idle for too long and has nothing under way."""
        if not self._max_idle_s:
            return False
        return bool(self._idle.too_long(np.array([handle]), self._clock.monotonic())[0])

    def remember_use(self, session_ids: Sequence[str], used: float) -> None:
        """Remember when sessions were last used that leave the table and may still be in the store."""
        if self._max_idle_s:
            self._strays.update(dict.fromkeys(session_ids, used))

    def take_use(self, session_id: str, header: Header) -> float:
        """When a session of the store that comes into the table was last used, on the monotonic clock."""
        # for people: a clock that was set back meanwhile must not make it the future
        recorded = self._clock.monotonic() - max(0.0, self._clock.now() - header.last_used)
        return self._strays.pop(session_id, recorded)

    def error(self, session_id: str) -> SessionExpired:
        """What is said of a session that expired."""
        return SessionExpired(
            session_id,
            f"session {session_id!r} expired: it was idle for longer than"
            f" max_session_idle_s {self._max_idle_s:g}",
        )

    def expire(self, handles: Sequence[int]) -> SessionExpired:
        """End sessions of the table; the answer is the last one's."""
        table, error = self._table, self.error("")
        self._bury(
            [(table.session_id(h), self._removal.model_of(h).name, int(table.revision[h])) for h in handles]
        )
        for handle in handles:
            error = self.error(table.session_id(handle))
            self._removal.remove(handle, "expired", error)
        return error

    def drop(self, handles: Handles, error: ServerError) -> None:
        """Forget claimed sessions whose rows are not what the store holds; they are loaded when next named."""
        _log.warning("sessions left the arena", sessions=len(handles), error=error)
        for handle in handles.tolist():
            self.remember_use([self._table.session_id(handle)], float(self._table.used[handle]))
            self._removal.forget(handle, error)

    def expire_among(self, handles: Handles) -> None:
        """End those of some sessions that are due, and put -1 in their places, as it stands for others already."""
        if not self._max_idle_s:
            return
        there = handles[handles >= 0]
        due = np.unique(there[self._idle.too_long(there, self._clock.monotonic())])
        if len(due):
            handles[np.isin(handles, due)] = -1
            self.expire(due.tolist())

    def expire_idle(self) -> int:
        """End the sessions that are, or were, in the table and are idle for too long; return how many."""
        return sum(self.expire_idle_in_parts(sys.maxsize))

    def expire_idle_in_parts(self, most: int) -> Iterator[int]:
        """As `expire_idle`, at most so many at a time, so that others get a turn; how many each time.

        To be gone through to the end.
        """
        strays = self._expire_strays()
        if strays:
            yield strays
        for due in self._idle.take_due_in_parts(self._clock.monotonic, most):
            if len(due):
                self.expire(due.tolist())
                yield len(due)

    def sweep(self) -> bool:
        """End some of the store's sessions that nobody has named since the start; True if there are more.

        Each start does this once, when the time limit has passed: from then on all others are in the table.
        """
        if (
            not self._max_idle_s
            or self._swept is None
            or self._clock.monotonic() - self._started <= self._max_idle_s
        ):
            return False
        try:
            found = self._store.scan(after=self._swept, limit=SWEPT_AT_ONCE)
        except ServerError as error:
            _log.warning("the store could not be looked through for idle sessions", error=error)
            return False
        self._expire_untouched(found)
        self._swept = found[-1][0] if found else None
        return bool(found)

    def _expire_strays(self) -> int:
        since = self._clock.monotonic() - self._max_idle_s
        due = [session_id for session_id, used in self._strays.items() if used < since]
        if not due:
            return 0
        try:
            records = self._store.get_many(due)
        except ServerError as error:
            _log.warning("the store could not be asked for idle sessions", error=error)
            return 0
        for session_id in due:
            del self._strays[session_id]
        found = zip(due, records, strict=True)
        return self._expire_untouched((i, header_or_none(i, r)) for i, r in found if r is not None)

    def _expire_untouched(self, found: Iterable[tuple[str, Header | None]]) -> int:
        """End those of the store's sessions that nobody has named for the time limit; return how many."""
        untouched = [
            (session_id, header)
            for session_id, header in found
            if header is not None
            and session_id not in self._removal
            and session_id not in self.burying
            and session_id not in self._strays
        ]
        for session_id, header in untouched:
            self._observer.session_event("expired", header.model, session_id)
        self._bury([(session_id, header.model, header.revision) for session_id, header in untouched])
        return len(untouched)

    def _bury(self, sessions: Sequence[tuple[str, str, int]]) -> None:
        """Have the store know that sessions expired: their ids, models and revisions.

        Nobody waits for it. Should it fail, they are found in the store again, idle for too long as before, and
        the timer tries again.
        """
        if not sessions:
            return
        now, ids = self._clock.now(), [session_id for session_id, _, _ in sessions]

        def done(error: ServerError | None) -> None:
            for session_id in ids:
                self.burying.pop(session_id, None)
            if error is not None:
                _log.warning("sessions that expired are still in the store", sessions=len(ids), error=error)
                self.remember_use(ids, -math.inf)

        batch = Batch(
            deletes=ids,
            tombstones=[Tombstone(i, End.EXPIRED, now, revision=revision) for i, _, revision in sessions],
            counts=[(model, -1) for _, model, _ in sessions],
        )
        self.burying.update({session_id: revision for session_id, _, revision in sessions})
        self._commits.submit(lambda: batch, len(sessions), done)
