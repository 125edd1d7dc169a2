"""Sessions are closed, each when its turn comes."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence

import numpy as np

from stepwell_server.clock import Clock
from stepwell_server.core.sessions import Handles, SessionTable
from stepwell_server.engine.durability.group_commit import GroupCommit
from stepwell_server.engine.intake.turns import Turns
from stepwell_server.engine.sessions.directory import Directory
from stepwell_server.engine.sessions.ids import MAX_SESSIONS_PER_CALL
from stepwell_server.engine.sessions.removal import Removal
from stepwell_server.errors import (
    InvalidInput,
    ModelMismatch,
    ModelNotFound,
    ServerError,
    SessionGone,
    SessionNotFound,
    StateCorrupt,
)
from stepwell_server.store.base import Batch, End, Tombstone

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
        commits: GroupCommit,
        *,
        removal: Removal,
        drop: Callable[[Handles, ServerError], None],
        clock: Clock,
    ) -> None:
        self._table = table
        self._directory = directory
        self._turns = turns
        self._commits = commits
        self._removal = removal
        self._drop = drop
        self._clock = clock
        self._deleting: dict[str, asyncio.Future[None]] = {}
        """Sessions that cannot be stepped here and are being deleted: they have no claim."""

    async def close(self, session_id: str, *, request_id: int, deadline: float) -> bool:
        """Delete a session when its turn comes. See `Engine.close_session`."""
        try:
            handle = self._directory.find(session_id)
            await self._turns.hold(handle, deadline, rows=False)
        except SessionGone:
            if request_id and self._directory.closed_with(session_id) == request_id:
                return True
            raise
        except _UNUSABLE as error:
            pending = self._deleting.get(session_id)
            if pending is not None:
                await asyncio.shield(pending)
                return await self.close(session_id, request_id=request_id, deadline=deadline)
            await self._delete_unusable(session_id, error.metadata.get("model", ""), request_id)
            return False
        await self._delete(np.array([handle]), request_id)
        return False

    async def close_many(self, session_ids: Sequence[str]) -> int:
        """Delete those of many sessions that are there. See `Engine.close_sessions`."""
        if len(session_ids) > MAX_SESSIONS_PER_CALL:
            raise InvalidInput(f"session_ids must be at most {MAX_SESSIONS_PER_CALL}; got {len(session_ids)}")
        if "" in session_ids:
            raise InvalidInput("session_ids must be ids of sessions; one of them is missing (it is empty)")
        ids = list(dict.fromkeys(session_ids))
        handles = self._directory.find_all(ids)
        there = handles >= 0
        free = handles[there][~self._table.claimed[handles[there]]]
        # what has something under way, and what cannot be stepped here, is closed by itself; the others are not there
        rest = [ids[place] for place in np.flatnonzero(there & self._table.claimed[handles]).tolist()]
        rest += self._directory.unusable([ids[place] for place in np.flatnonzero(~there).tolist()])
        self._turns.claim(free)
        closed = await self._delete_in_parts(free)
        # one after the other: to hold some while waiting for others could wait for ever
        for session_id in rest:
            try:
                await self.close(session_id, request_id=0, deadline=float("inf"))
            except SessionGone:
                continue  # it was not there, or somebody else closed it while it was waited for
            closed += 1
        return closed

    async def _delete_in_parts(self, handles: Handles) -> int:
        """Delete claimed sessions, so many at a time as a full disk has room for; return how many.

        Raises:
            Unavailable: the store did not delete all.
        """
        for start in range(0, len(handles), _CLOSE_AT_ONCE):
            kept = handles[start:]
            try:
                if start:
                    await asyncio.sleep(0)  # a commit in place lets nobody else have a turn
                kept = handles[start + _CLOSE_AT_ONCE :]
                await self._delete(handles[start : start + _CLOSE_AT_ONCE], 0)
            except BaseException:
                self._turns.release(kept)
                raise
        return len(handles)

    async def _delete(self, handles: Handles, request_id: int) -> None:
        """Delete claimed sessions.

        Raises:
            Unavailable: the store did not. They leave the table: what it has of them is the truth.
        """
        table, removal = self._table, self._removal
        sessions = [
            (table.session_id(handle), removal.model_of(handle).name, int(table.revision[handle]))
            for handle in handles.tolist()
        ]

        def done(error: ServerError | None) -> None:
            if error is not None:
                self._drop(handles, error)
                return
            for handle, (session_id, _, _) in zip(handles.tolist(), sessions, strict=True):
                gone = SessionNotFound(session_id, f"session {session_id!r} was closed")
                removal.remove(handle, "closed", gone)

        await self._commit(self._batch(sessions, request_id), done)

    async def _delete_unusable(self, session_id: str, model: str, request_id: int) -> None:
        """Delete a session that only the store has.

        Raises:
            Unavailable: the store did not.
        """
        ended: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._deleting[session_id] = ended

        def done(_error: ServerError | None) -> None:
            del self._deleting[session_id]
            ended.set_result(None)

        revision = self._directory.stored_revision(session_id)
        await self._commit(self._batch([(session_id, model, revision)], request_id), done)

    def _batch(self, sessions: Sequence[tuple[str, str, int]], request_id: int) -> Batch:
        """What the store is to know: ids, models and revisions of sessions that were closed."""
        now = self._clock.now()
        return Batch(
            deletes=[session_id for session_id, _, _ in sessions],
            tombstones=[Tombstone(i, End.CLOSED, now, request_id, revision) for i, _, revision in sessions],
            counts=[(model, -1) for _, model, _ in sessions if model],
        )

    async def _commit(self, batch: Batch, done: Callable[[ServerError | None], None]) -> None:
        """Commit, then call `done`, also if the caller is cancelled meanwhile.

        Raises:
            Unavailable: it was not kept.
        """
        kept: asyncio.Future[ServerError | None] = asyncio.get_running_loop().create_future()

        def settle(error: ServerError | None) -> None:
            done(error)
            kept.set_result(error)

        self._commits.submit(lambda: batch, len(batch.deletes), settle)
        error = await asyncio.shield(kept)
        if error is not None:
            raise error
