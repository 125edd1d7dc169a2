"""Sessions are closed, each when its turn comes."""

from __future__ import annotations

import asyncio
import dataclasses
import math
from collections import Counter
from collections.abc import Callable, Sequence

import numpy as np

from stepwell_server.clock import Clock
from stepwell_server.core.sessions import Handles, SessionTable
from stepwell_server.engine.durability.committer import not_known
from stepwell_server.engine.durability.fetching import Fetcher
from stepwell_server.engine.durability.group_commit import GroupCommit
from stepwell_server.engine.intake.admission import MOST_TRIES, changed_elsewhere
from stepwell_server.engine.intake.paging import Pager
from stepwell_server.engine.intake.turns import Turns
from stepwell_server.engine.quotas import Quotas
from stepwell_server.engine.sessions.directory import Directory
from stepwell_server.engine.sessions.ending import Ended, Expiry, Removal, batch_of
from stepwell_server.engine.sessions.ids import MAX_SESSIONS_PER_CALL
from stepwell_server.engine.sessions.loading import Seen, refresh
from stepwell_server.engine.state.fields import Fields
from stepwell_server.errors import (
    InvalidInput,
    ModelMismatch,
    ModelNotFound,
    ServerError,
    SessionGone,
    SessionLost,
    SessionNotFound,
    StateCorrupt,
)
from stepwell_server.store.base import Batch, Committed, End, Fetched, Outcome, Tombstone
from stepwell_server.store.record import decode_header

#: Sessions deleted in one transaction by one call: each needs room on the disk before it gives any back.
_CLOSE_AT_ONCE = 500
#: A session that cannot be stepped here can be closed all the same.
_UNUSABLE = (ModelMismatch, ModelNotFound, StateCorrupt)


class Closing:
    """Closes sessions. Lives on the event loop."""

    def __init__(
        self,
        table: SessionTable,
        directory: Directory,
        turns: Turns,
        pager: Pager,
        fetcher: Fetcher,
        commits: GroupCommit,
        *,
        quotas: Quotas | None,
        removal: Removal,
        expiry: Expiry,
        fields: Fields,
        clock: Clock,
    ) -> None:
        self._table = table
        self._directory = directory
        self._turns = turns
        self._pager = pager
        self._fetcher = fetcher
        self._commits = commits
        self._removal = removal
        self._quotas = quotas
        self._expiry = expiry
        self._fields = fields
        self._clock = clock
        self._deleting: dict[str, asyncio.Future[None]] = {}
        """Sessions that cannot be stepped here and are being deleted: they have no claim."""

    async def close(self, session_id: str, seen: Seen, *, request_id: int, deadline: float) -> bool:
        """Delete a session when its turn comes. See `Engine.close_session`."""
        for _ in range(MOST_TRIES):
            try:
                handle = self._directory.find(session_id, seen)
                await self._turns.hold(handle, deadline, rows=False)
            except SessionGone as error:
                return await self._closed_before(session_id, request_id, error)
            except _UNUSABLE as error:
                pending = self._deleting.get(session_id)
                if pending is not None:
                    await asyncio.shield(pending)
                elif await self._delete_unusable(
                    session_id, error.metadata.get("model", ""), request_id, seen
                ):
                    return False
                seen = await self._directory.look([session_id])
                continue
            if await self._delete(np.array([handle]), request_id):
                return False
            return await self._closed_before(session_id, request_id, None)
        raise changed_elsewhere(session_id)

    async def _closed_before(self, session_id: str, request_id: int, error: SessionGone | None) -> bool:
        """True if this very request closed a session that is gone.

        Raises:
            SessionGone: it did not.
        """
        seen = await self._directory.look([session_id])
        if request_id and self._directory.closed_with(session_id, seen) == request_id:
            return True
        if await self._close_lost(session_id, request_id, seen):
            return False
        if self._pager.is_shared and self._directory.live(session_id, seen) is not None:
            raise changed_elsewhere(session_id)  # it was closed, and opened anew
        raise error or self._directory.gone(session_id, seen)

    async def _close_lost(self, session_id: str, request_id: int, seen: Seen) -> bool:
        """Have a session that a shared store has lost count as closed; False if it is none.

        Raises:
            Unavailable: the store did not say that it remembers it.
        """
        if not (self._pager.is_shared and isinstance(self._directory.ended(session_id, seen), SessionLost)):
            return False
        kept: asyncio.Future[Committed | ServerError] = asyncio.get_running_loop().create_future()
        batch = Batch(tombstones=[Tombstone(session_id, End.CLOSED, self._clock.now(), request_id)])
        self._commits.submit(lambda: batch, 1, kept.set_result)
        committed = await asyncio.shield(kept)
        if isinstance(committed, ServerError):
            raise committed
        if committed.of(session_id) is Outcome.UNKNOWN:
            raise not_known()
        return True

    async def close_many(self, session_ids: Sequence[str], *, used_before: float = math.inf) -> int:
        """Delete those of many sessions that are there. See `Engine.close_sessions`.

        With `used_before`, on the monotonic clock, those that were used since then, or have something under way, stay.
        """
        if len(session_ids) > MAX_SESSIONS_PER_CALL:
            raise InvalidInput(f"session_ids must be at most {MAX_SESSIONS_PER_CALL}; got {len(session_ids)}")
        if "" in session_ids:
            raise InvalidInput("session_ids must be ids of sessions; one of them is missing (it is empty)")
        ids = list(dict.fromkeys(session_ids))
        is_timed = used_before < math.inf
        # of a store that others use it is known then when they used the sessions
        seen = await self._directory.look(ids, anew=is_timed)
        handles = self._directory.find_all(ids, seen)
        there = handles >= 0
        missing = [ids[place] for place in np.flatnonzero(~there).tolist()]
        claimed = self._table.claimed[handles] & there
        if is_timed:
            there &= ~claimed & (self._table.used[handles] < used_before)
        free = handles[there & ~claimed]
        # what has something under way, and what cannot be stepped here, is closed by itself; the others are not there
        rest = [ids[place] for place in np.flatnonzero(there & claimed).tolist()]
        rest += self._directory.unusable(missing, seen)
        if self._pager.is_shared:
            rest += [i for i in missing if isinstance(self._directory.ended(i, seen), SessionLost)]
        self._turns.claim(free)
        ended: Counter[str] | None = Counter() if len(ids) > 1 else None
        try:
            idle_s = self._clock.monotonic() - used_before if is_timed else 0.0
            closed = await self._delete_in_parts(free, ended, idle_s)
        finally:
            self._removal.tell("closed", ended or Counter())
        # one after the other: to hold some while waiting for others could wait for ever
        for session_id in rest:
            try:
                seen = await self._directory.look([session_id])
                await self.close(session_id, seen, request_id=0, deadline=float("inf"))
            except SessionGone:
                continue  # it was not there, or somebody else closed it while it was waited for
            closed += 1
        return closed

    async def _delete_in_parts(self, handles: Handles, ended: Counter[str] | None, idle_s: float) -> int:
        """Delete claimed sessions, so many at a time as a full disk has room for; return how many.

        `ended` counts them, see `Removal.remove`. Those stay that another server has used in the last `idle_s` seconds.

        Raises:
            Unavailable: the store did not delete all.
        """
        deleted = 0
        for start in range(0, len(handles), _CLOSE_AT_ONCE):
            kept = handles[start:]
            try:
                if start:
                    await asyncio.sleep(0)  # a commit in place lets nobody else have a turn
                kept = handles[start + _CLOSE_AT_ONCE :]
                deleted += await self._delete(handles[start : start + _CLOSE_AT_ONCE], 0, ended, idle_s)
            except BaseException:
                self._turns.release(kept)
                raise
        return deleted

    async def _delete(
        self, handles: Handles, request_id: int, ended: Counter[str] | None = None, idle_s: float = 0.0
    ) -> int:
        """Delete claimed sessions; return how many there were: others may have been closed on another server.

        With `idle_s` those stay that were used there in the last so many seconds.

        Raises:
            Unavailable: the store did not. They leave the table: what it has of them is the truth.
        """
        deleted = 0
        for _ in range(MOST_TRIES):
            conflicts = await self._try_to_delete(handles, request_id, ended, idle_s)
            deleted += len(handles) - len(conflicts)
            if not len(conflicts):
                return deleted
            handles = await self._read_anew(conflicts)
            if idle_s:
                self._turns.release(handles)
                return deleted
        self._turns.release(handles)
        raise changed_elsewhere(self._table.session_id(int(handles[0])))

    async def _try_to_delete(
        self, handles: Handles, request_id: int, ended: Counter[str] | None, idle_s: float
    ) -> Handles:
        """As `_delete`; returns those that another server has changed, which are claimed still."""
        removal, sessions = self._removal, self._removal.described(handles)
        conflicts: list[int] = []

        def done(committed: Committed | ServerError) -> ServerError | None:
            if isinstance(committed, ServerError):
                self._expiry.drop(handles, committed)
                return committed
            error: ServerError | None = None
            for handle, (session_id, _, _, rows, _) in zip(handles.tolist(), sessions, strict=True):
                match committed.of(session_id):
                    case Outcome.KEPT:
                        gone = SessionNotFound(session_id, f"session {session_id!r} was closed")
                        removal.remove(handle, "closed", gone, ended)
                        if self._quotas is not None:
                            self._quotas.end([(session_id, rows)])
                    case Outcome.UNKNOWN:
                        error = not_known()
                        self._expiry.drop(np.array([handle]), error)
                    case Outcome.CONFLICT:
                        conflicts.append(handle)
            return error

        def release() -> None:
            self._turns.release(np.array(conflicts, np.intp))

        await self._commit(sessions, request_id, done, release, idle_s)
        return np.array(conflicts, np.intp)

    async def _read_anew(self, handles: Handles) -> Handles:
        """Let the table say what the store has of claimed sessions; return those that are there still."""
        ids = [self._table.session_id(handle) for handle in handles.tolist()]
        try:
            found = await self._fetcher.fetch(ids)
            return np.array(
                [h for h, each in zip(handles.tolist(), found, strict=True) if self._is_there(h, each)],
                np.intp,
            )
        except BaseException:
            left = [h for h, i in zip(handles.tolist(), ids, strict=True) if self._table.find(i) == h]
            self._turns.release(np.array(left, np.intp))
            raise

    def _is_there(self, handle: int, found: Fetched) -> bool:
        session_id = self._table.session_id(handle)
        if found.record is None:
            gone = SessionNotFound(session_id, f"session {session_id!r} was closed on another server")
            self._removal.forget(handle, gone)
            return False
        header = decode_header(session_id, found.record)
        table = self._table
        if (header.created, header.opened_with) != (table.created[handle], table.opened_with[handle]):
            gone = SessionNotFound(
                session_id, f"session {session_id!r} was closed, and another one has its id now"
            )
            self._removal.forget(handle, gone)
            return False
        refresh(table, self._fields, handle, header, found.stamp)
        self._pager.discard(self._directory.models.by_handle(handle), np.array([handle]))
        return True

    async def _delete_unusable(self, session_id: str, model: str, request_id: int, seen: Seen) -> bool:
        """Delete a session that only the store has; False if another server has changed it meanwhile.

        Raises:
            Unavailable: the store did not.
        """
        deleted: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._deleting[session_id] = deleted
        outcome = Outcome.KEPT

        def done(committed: Committed | ServerError) -> ServerError | None:
            nonlocal outcome
            del self._deleting[session_id]
            deleted.set_result(None)
            if isinstance(committed, ServerError):
                return committed
            outcome = committed.of(session_id)
            if self._quotas is not None and outcome is Outcome.KEPT:
                self._quotas.end([(session_id, rows)])
            self._expiry.forgotten += 1
            return not_known() if outcome is Outcome.UNKNOWN else None

        revision, rows = self._directory.stored_revision(session_id, seen)
        ended = Ended(session_id, model, revision, rows, seen.stamp(session_id))
        await self._commit([ended], request_id, done, lambda: None)
        return outcome is Outcome.KEPT

    async def _commit(
        self,
        sessions: Sequence[Ended],
        request_id: int,
        done: Callable[[Committed | ServerError], ServerError | None],
        release: Callable[[], None],
        idle_s: float = 0.0,
    ) -> None:
        """Commit the end of sessions, then call `done`, also if the caller is cancelled meanwhile: then `release` as well.

        Raises:
            Unavailable: it was not kept, as `done` says.
        """
        kept: asyncio.Future[ServerError | None] = asyncio.get_running_loop().create_future()
        batch = batch_of(sessions, End.CLOSED, self._clock.now(), request_id)
        batch = dataclasses.replace(batch, idle_s=idle_s)
        self._commits.submit(lambda: batch, len(sessions), lambda told: kept.set_result(done(told)))
        try:
            error = await asyncio.shield(kept)
        except asyncio.CancelledError:
            kept.add_done_callback(lambda _: release())
            raise
        if error is not None:
            release()
            raise error
