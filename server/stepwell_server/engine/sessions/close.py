"""Closes sessions: one, many, or those that match a filter. Each is deleted as soon as it is free."""

from __future__ import annotations

import dataclasses
import math
from collections import Counter
from collections.abc import Mapping, Sequence

import numpy as np

from stepwell_server.clock import Clock
from stepwell_server.core.sessions import Handles
from stepwell_server.engine.api import SessionFilter
from stepwell_server.engine.change import MAX_TRIES, changed_elsewhere
from stepwell_server.engine.commit.committer import outcome_unknown
from stepwell_server.engine.commit.group_commit import GroupCommit
from stepwell_server.engine.intake.pager import Pager
from stepwell_server.engine.intake.queues import SessionQueues
from stepwell_server.engine.sessions.directory import Directory
from stepwell_server.engine.sessions.end import EndedSession, IdleBounds, Removal, ended_of
from stepwell_server.engine.sessions.lookup import LookupResult, refresh
from stepwell_server.engine.sessions.read import Query, SessionList
from stepwell_server.engine.state.fields import Fields, closes_of
from stepwell_server.engine.threads import PIECE_SIZE
from stepwell_server.engine.types import U64, Mask
from stepwell_server.errors import (
    InvalidInput,
    ModelMismatch,
    ModelNotFound,
    ServerError,
    SessionGone,
    SessionLost,
    SessionNotFound,
    SessionReplaced,
    StateCorrupt,
    VersionElsewhere,
)
from stepwell_server.store.base import Batch, End, Outcome, StoredSession, Tombstone, with_close
from stepwell_server.store.record import Header, decode_header, header_or_none

#: Sessions deleted in one transaction by one call: each needs disk space before it frees any.
_CLOSE_BATCH_SIZE = 500
#: Errors of sessions that cannot be stepped here but can be closed.
_UNUSABLE = (ModelMismatch, ModelNotFound, StateCorrupt)


@dataclasses.dataclass(frozen=True, slots=True)
class Place:
    """The progress of a close by filter."""

    as_of: float
    """When it began, in seconds since the epoch: sessions that are newer, or were used since, stay."""
    after: str = ""
    """The id of the last session that was examined."""


class Closer:
    """Closes sessions. Lives on the event loop."""

    def __init__(
        self,
        directory: Directory,
        queues: SessionQueues,
        pager: Pager,
        commits: GroupCommit,
        *,
        removal: Removal,
        listing: SessionList,
        fields: Fields,
        clock: Clock,
    ) -> None:
        self._table = removal.table
        self._directory = directory
        self._queues = queues
        self._pager = pager
        self._store = directory.store
        self._commits = commits
        self._pieces = directory.pieces
        self._removal = removal
        self._listing = listing
        self._fields = fields
        self._clock = clock

    async def close(
        self, session_id: str, seen: LookupResult, *, request_id: int, deadline: float, uid: int = 0
    ) -> bool:
        """Delete a session once it is free. See `Engine.close_session`."""
        for _ in range(MAX_TRIES):
            try:
                handle = self._directory.find(session_id, seen)
                if not await self._hold(handle, deadline):
                    seen = await self._directory.look([session_id], reread=True)
                    continue
            except SessionGone as error:
                seen = await self._directory.look([session_id], reread=True)
                answer = await self._ended_meanwhile(session_id, request_id, uid, seen, error)
                if answer is not None:
                    return answer
                continue
            except _UNUSABLE as error:
                header = self._directory.stored_header(session_id, seen)
                if self._was_closed_by(session_id, request_id, seen):
                    return True
                if header is not None and uid not in {0, header.opened_with}:
                    raise _replaced(session_id) from error
                model = error.metadata.get("model", "")
                if await self._delete_unusable(session_id, model, request_id, header, seen):
                    return False
                seen = await self._directory.look([session_id])
                continue
            handles = np.array([handle])
            if self._has_closed_before(handle, request_id):
                self._queues.release(handles)
                return True
            if uid and int(self._table.opened_with[handle]) != uid:
                # the store knows which session it is now
                handles, _ = await self._read_records(handles, 0)
                if len(handles) and int(self._table.opened_with[handle]) != uid:
                    self._queues.release(handles)
                    raise _replaced(session_id)
            if len(handles):
                deleted, before = await self._delete(handles, request_id)
                if deleted or before:
                    return not deleted
            seen = await self._directory.look([session_id], reread=True)
            answer = await self._ended_meanwhile(session_id, request_id, uid, seen, None)
            if answer is not None:
                return answer
        raise changed_elsewhere(session_id)

    async def _hold(self, handle: int, deadline: float) -> bool:
        """Claim a session once it is free. False: it left the table, and only the store knows its last revision."""
        try:
            await self._queues.hold(handle, deadline, rows=False)
        except VersionElsewhere:
            return False
        return True

    async def _ended_meanwhile(
        self, session_id: str, request_id: int, uid: int, seen: LookupResult, error: SessionGone | None
    ) -> bool | None:
        """The answer to a close whose session ended meanwhile: True if this same request closed it.

        None: another session has the id, and its uid shows whether it is the intended one.

        Raises:
            SessionGone: no session has the id, or only one opened since; `error` if given.
            Unavailable: a session was opened on another server, and may be the intended one.
        """
        if self._was_closed_by(session_id, request_id, seen):
            return True
        if await self._close_lost(session_id, request_id, seen):
            return False
        if self._table.find(session_id) is not None or seen.get(session_id) is not None:
            if uid:
                return None
            if error is None or isinstance(error, SessionReplaced):
                raise changed_elsewhere(session_id)
            raise error  # no session had the id while this call waited; the current one was opened since
        raise error or self._directory.gone(session_id, seen)

    def _has_closed_before(self, handle: int, request_id: int) -> bool:
        """Whether a call closed an earlier session of a live session's id: then it is a repeated call, and done."""
        return bool(request_id) and request_id in closes_of(self._table.fields.get(handle, b""))

    async def was_closed_by(self, session_id: str, request_id: int) -> bool:
        """Whether a call closed a session of an id; another session may have the id by now."""
        seen = await self._directory.look([session_id], reread=True)
        return self._was_closed_by(session_id, request_id, seen)

    def _was_closed_by(self, session_id: str, request_id: int, seen: LookupResult) -> bool:
        if not request_id:
            return False
        try:
            handle = self._directory.live(session_id, seen)
        except _UNUSABLE:
            header = self._directory.stored_header(session_id, seen)
            return header is not None and request_id in closes_of(header.fields)
        if handle is None:
            return self._directory.was_closed_by(session_id, request_id, seen)
        return self._has_closed_before(handle, request_id)

    async def _close_lost(self, session_id: str, request_id: int, seen: LookupResult) -> bool:
        """Mark a session that a shared store lost as closed; False if it is not lost.

        Raises:
            Unavailable: the store did not confirm it.
        """
        if not isinstance(self._directory.ended(session_id, seen), SessionLost):
            return False
        stone = Tombstone(session_id, End.CLOSED, self._clock.now(), with_close(request_id, ()))
        committed = await self._commits.keep(Batch(tombstones=[stone]), 1)
        if isinstance(committed, ServerError):
            raise committed
        if committed.of(session_id) is Outcome.UNKNOWN:
            raise outcome_unknown()
        return True

    async def close_many(
        self,
        session_ids: Sequence[str],
        *,
        request_id: int = 0,
        uids: U64 | None = None,
        used_before: float = math.inf,
    ) -> int:
        """Delete those of many sessions that exist; return how many this request deleted, now or before.

        Args:
            session_ids: A repeated id counts once.
            request_id: 0: none; otherwise as in `Engine.close_session`, for each session.
            uids: One for each, or one for all; 0 or None: any.
            used_before: On the monotonic clock. Sessions used since then, or active, stay.

        Raises:
            InvalidInput: an id is empty, or the number of uids does not match.
            Overloaded: too much waits for the store, and none was deleted; or for one of the sessions.
            Unavailable: the store did not delete all.
        """
        if "" in session_ids:
            raise InvalidInput("session_ids must not be empty strings; got one")
        if uids is not None and len(uids) not in {1, len(session_ids)}:
            raise InvalidInput(
                f"uids must be empty, one for all of session_ids, or one for each ({len(session_ids)});"
                f" got {len(uids)}"
            )
        wanted = dict.fromkeys(session_ids, 0)
        if uids is not None:
            wanted = dict(zip(session_ids, np.broadcast_to(uids, len(session_ids)).tolist(), strict=True))
        ids = list(wanted)
        is_timed = used_before < math.inf
        # for a shared store, the last use is known after that
        seen = await self._directory.look(ids, reread=is_timed)
        ended: Counter[str] | None = Counter() if len(ids) > 1 else None
        closed, rest, claimed = 0, dict[str, None](), list[Handles]()
        try:
            async for part in self._pieces.of(ids):
                some = {session_id: wanted[session_id] for session_id in ids[part]}
                free, others = self._claim_free(some, seen, request_id, used_before)
                claimed.append(free)
                rest.update(dict.fromkeys(others))
                if part.stop == len(ids) or sum(map(len, claimed)) + PIECE_SIZE > _CLOSE_BATCH_SIZE:
                    handles, claimed = np.concatenate(claimed), []
                    idle_s = self._clock.monotonic() - used_before if is_timed else 0.0
                    closed += (
                        sum(await self._delete(handles, request_id, ended, idle_s)) if len(handles) else 0
                    )
        except BaseException:
            for handles in claimed:
                self._queues.release(handles)
            raise
        finally:
            self._removal.report("closed", ended or Counter())
        # one after the other: holding some while waiting for others could deadlock
        left = list(rest)
        async for part in self._pieces.of(left):
            for session_id in left[part]:
                try:
                    seen = await self._directory.look([session_id])
                    await self.close(
                        session_id, seen, request_id=request_id, deadline=float("inf"), uid=wanted[session_id]
                    )
                except SessionGone:
                    continue  # it did not exist, or was closed by another call meanwhile
                closed += 1
        return closed

    def _in_doubt(self, handles: Handles, there: Mask, uids: U64, request_id: int) -> Mask:
        """Which existing sessions may not be those that a call means to close."""
        apart: Mask = there & (uids != 0) & (self._table.opened_with[handles] != uids)
        if request_id and self._table.fields:
            for place in np.flatnonzero(there).tolist():
                apart[place] |= self._has_closed_before(int(handles[place]), request_id)
        return apart

    def _claim_free(
        self, wanted: Mapping[str, int], seen: LookupResult, request_id: int, used_before: float
    ) -> tuple[Handles, Sequence[str]]:
        """Claim those of some sessions, given with their uids, that exist and are free.

        Returns:
            Their handles, and the ids of the others, which are closed one by one: they are active, cannot be
            stepped here, were closed by this same call, or have another uid.
        """
        ids = list(wanted)
        handles = self._directory.find_all(ids, seen)
        there = handles >= 0
        missing = [ids[place] for place in np.flatnonzero(~there).tolist()]
        is_claimed = self._table.claimed[handles] & there
        if used_before < math.inf:
            there &= ~is_claimed & (self._table.used[handles] < used_before)
        apart = self._in_doubt(handles, there, np.fromiter(wanted.values(), np.uint64, len(ids)), request_id)
        free = handles[there & ~is_claimed & ~apart]
        rest = [ids[place] for place in np.flatnonzero(there & (is_claimed | apart)).tolist()]
        rest += self._directory.unusable(missing, seen)
        try:
            stones = seen.tombstones(missing)
        except (
            ServerError
        ):  # some have left the table meanwhile, or the store cannot be read: look each one up
            rest += missing
        else:
            rest += [
                session_id
                for session_id, stone in zip(missing, stones, strict=True)
                if stone is not None
                and (stone.end is End.LOST or (request_id and request_id in stone.closes))
            ]
        self._queues.claim(free)
        return free, rest

    async def _delete(
        self, handles: Handles, request_id: int, ended: Counter[str] | None = None, idle_s: float = 0.0
    ) -> tuple[int, int]:
        """Delete claimed sessions; others may have been closed on another server.

        With `idle_s`, sessions used there in the last `idle_s` seconds stay.

        Returns:
            How many were deleted, and how many this same request had closed on another server.

        Raises:
            Unavailable: the store did not confirm it. The sessions leave the table, and their records decide.
        """
        deleted = before = 0
        for _ in range(MAX_TRIES):
            conflicts = await self._try_to_delete(handles, request_id, ended, idle_s)
            deleted += len(handles) - len(conflicts)
            if not len(conflicts):
                return deleted, before
            handles, closed = await self._read_records(conflicts, request_id)
            before += closed
            if idle_s:
                self._queues.release(handles)
                return deleted, before
        self._queues.release(handles)
        raise changed_elsewhere(self._table.session_id(int(handles[0])))

    async def _try_to_delete(
        self, handles: Handles, request_id: int, ended: Counter[str] | None, idle_s: float
    ) -> Handles:
        """`_delete`; returns sessions that another server changed, which are still claimed."""
        sessions, count = self._removal.described(handles), len(handles)
        idle = IdleBounds(np.full(count, idle_s), np.full(count, np.inf)) if idle_s else None
        conflicts = await self._removal.delete(
            sessions, handles, End.CLOSED, request_id=request_id, idle=idle, ended=ended
        )
        return handles[conflicts]

    async def _read_records(self, handles: Handles, request_id: int) -> tuple[Handles, int]:
        """Update claimed sessions in the table from the store.

        Returns:
            Those that still exist, and how many of the others the request had closed.
        """
        ids = [self._table.session_id(handle) for handle in handles.tolist()]
        there: list[int] = []
        closed = 0
        try:
            found = await self._store.fetch(ids, self._table.stamp[handles].tolist())
            for session_id, handle, each in zip(ids, handles.tolist(), found, strict=True):
                if self._is_there(handle, each):
                    there.append(handle)
                elif request_id and request_id in _closes(session_id, each):
                    closed += 1
        except BaseException:
            left = [h for h, i in zip(handles.tolist(), ids, strict=True) if self._table.find(i) == h]
            self._queues.release(np.array(left, np.intp))
            raise
        return np.array(there, np.intp), closed

    def _is_there(self, handle: int, found: StoredSession) -> bool:
        session_id = self._table.session_id(handle)
        if found.is_known:
            return True
        if found.record is None:
            gone = SessionNotFound(session_id, f"session {session_id!r} was closed on another server")
            self._queues.forget(handle, gone)
            return False
        header = decode_header(session_id, found.record)
        table = self._table
        if (header.created, header.opened_with) != (table.created[handle], table.opened_with[handle]):
            self._queues.forget(handle, _replaced(session_id))
            return False
        refresh(table, self._fields, handle, header, found.stamp)
        self._pager.discard(self._directory.models.by_handle(handle), np.array([handle]))
        return True

    async def _delete_unusable(
        self, session_id: str, model: str, request_id: int, header: Header | None, seen: LookupResult
    ) -> bool:
        """Delete a session that only the store has; False if another server changed it meanwhile.

        Raises:
            Unavailable: the store did not confirm it.
        """
        _, usage = self._directory.stored_usage(session_id, seen)
        ended = EndedSession(session_id, model, 0, usage, seen.stamp(session_id))
        if header is not None:
            ended = ended_of(session_id, header, ended.stamp)._replace(model=model)
        # its model may not be loaded, so no event is reported
        conflicts = await self._removal.delete(
            [ended], np.array([-1]), End.CLOSED, request_id=request_id, ended=Counter()
        )
        return not len(conflicts)

    async def close_matching(
        self, wanted: SessionFilter, *, limit: int, place: Place | None = None, request_id: int = 0
    ) -> tuple[int, Place | None]:
        """Close up to `limit` sessions that match a filter; return how many, and where to continue (None: done).

        Sessions that begin or are used after the first call stay. So do sessions that began after this request
        closed an earlier one of their id.

        Raises:
            ModelNotFound: no model has that name.
            Overloaded, Unavailable: as for `Engine.close_sessions`.
        """
        now = self._clock.now()
        at = place or Place(now)
        # time has passed: a session that has been idle for long enough now may not have been at the start
        passed = max(0.0, now - at.as_of)
        idle = None if wanted.idle_longer_s is None else wanted.idle_longer_s + passed
        query = Query(
            filter=dataclasses.replace(wanted, idle_longer_s=idle),
            after=at.after,
            limit=limit,
            count=False,
        )
        page, _ = await self._listing.page(query)
        ids = [info.session_id for info in page if info.created <= at.as_of]
        used_before = math.inf if idle is None else self._clock.monotonic() - idle
        closed = 0
        if ids:
            closed = await self.close_many(ids, request_id=request_id, used_before=used_before)
        return closed, None if page.next is None else dataclasses.replace(at, after=page.next)


def _replaced(session_id: str) -> SessionNotFound:
    return SessionNotFound(session_id, f"session {session_id!r} was closed, and another one has its id now")


def _closes(session_id: str, found: StoredSession) -> tuple[int, ...]:
    """Request ids of the calls that closed earlier sessions of an id."""
    if found.tombstone is not None:
        return found.tombstone.closes
    header = None if found.record is None else header_or_none(session_id, found.record)
    return () if header is None else closes_of(header.fields)
