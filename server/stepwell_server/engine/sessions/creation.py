"""The making of sessions: kept by the store, then in the table, all of a call's or none."""

from __future__ import annotations

import asyncio
import dataclasses
from collections.abc import Callable, Sequence

import numpy as np

from stepwell_server.clock import Clock
from stepwell_server.core.sessions import SessionTable
from stepwell_server.core.slots import Rows
from stepwell_server.engine.api import SessionInfo
from stepwell_server.engine.durability.committer import not_known
from stepwell_server.engine.durability.group_commit import GroupCommit
from stepwell_server.engine.durability.keeping import Keeping
from stepwell_server.engine.intake.row_queue import RowQueue
from stepwell_server.engine.sessions.directory import Directory
from stepwell_server.engine.sessions.ending import Expiry, Removal
from stepwell_server.engine.sessions.ids import PIECE, in_pieces
from stepwell_server.engine.state.model import Model
from stepwell_server.engine.types import U64
from stepwell_server.errors import ServerError
from stepwell_server.store.base import Batch, Committed
from stepwell_server.store.record import U8, RecordTemplate, Stored


@dataclasses.dataclass(frozen=True, slots=True)
class Fresh:
    """What is true of sessions from their first moment."""

    opened_with: int
    """Request id of the call, 0 for none."""
    revisions: U64
    """`(n,)`. Not 0 where another session had the id: see `Directory.first_revisions`."""
    position: int = 0


class Taken(Exception):
    """Another server has made a session of one of the ids."""


class Creation:
    """Makes sessions. Lives on the event loop."""

    def __init__(
        self,
        table: SessionTable,
        directory: Directory,
        row_queue: RowQueue,
        commits: GroupCommit,
        keeping: Keeping,
        *,
        removal: Removal,
        expiry: Expiry,
        clock: Clock,
    ) -> None:
        self._table = table
        self._directory = directory
        self._row_queue = row_queue
        self._removal = removal
        self._expiry = expiry
        self._commits = commits
        self._keeping = keeping
        self._clock = clock
        self._adding: set[asyncio.Task[None]] = set()

    def is_making(self, session_ids: Sequence[str]) -> bool:
        """Whether a session of one of these ids is being made."""
        return not self._removal.opening.keys().isdisjoint(session_ids)

    async def all_settled(self, session_ids: Sequence[str]) -> None:
        """Return when nobody is making sessions of these ids."""
        while pending := {self._removal.opening[i] for i in session_ids if i in self._removal.opening}:
            await asyncio.wait(pending)

    def reserve(self, ids: Sequence[str]) -> bool:
        """Keep ids for sessions that are about to be created; False if one of them is there or being made."""
        if any(session_id in self._removal for session_id in ids):
            return False
        pending: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._removal.opening.update(dict.fromkeys(ids, pending))
        return True

    def give_up(self, ids: Sequence[str]) -> None:
        """End a reservation."""
        pending = self._removal.opening[ids[0]]
        for session_id in ids:
            self._removal.opening.pop(session_id, None)
        pending.set_result(None)

    async def create(
        self, model: Model, ids: Sequence[str], batch_size: int, rows: Rows, facts: Fresh
    ) -> SessionInfo:
        """Make sessions. They are there when this returns; to be cancelled meanwhile changes nothing about it.

        Args:
            model: Of all of them.
            ids: Reserved, or none of them is there or being made.
            batch_size: Of each.
            rows: The arena's rows, with their states, of the first sessions, one after the other. The others begin
                with the initial state, paged out.
            facts: See `Fresh`.

        Returns:
            The first of them, as it was made.

        Raises:
            Unavailable: the store could not keep them; none is made, and the rows are given back.
            Taken: so it is where another server was faster.
        """
        made: asyncio.Future[SessionInfo | Exception] = asyncio.get_running_loop().create_future()
        if ids[0] not in self._removal.opening:
            self.reserve(ids)
        created = self._clock.now()

        def settle(error: Exception | None) -> None:
            if error is not None:
                self.give_up(ids)
                model.slots.free_resident(rows)
                made.set_result(error)
                self._row_queue.room_may_have_come()
            elif len(ids) <= PIECE:
                self._add(model, ids, batch_size, rows, facts, created)
                there()
            else:
                task = asyncio.create_task(self._add_in_pieces(model, ids, batch_size, rows, facts, created))
                self._adding.add(task)
                task.add_done_callback(self._adding.discard)
                task.add_done_callback(lambda _: there())

        def there() -> None:
            self.give_up(ids)
            made.set_result(self._directory.info(self._directory.find(ids[0], self._directory.here)))
            self._row_queue.room_may_have_come()  # the rows are of sessions that have nothing under way

        def done(committed: Committed | ServerError) -> None:
            if isinstance(committed, ServerError):
                settle(committed)
            elif not committed.conflicts.isdisjoint(ids):
                self._undo(model, ids, committed, lambda: settle(Taken()))
            elif not committed.unknown.isdisjoint(ids):
                self._undo(model, ids, committed, lambda: settle(not_known()))
            else:
                settle(None)

        self._commits.submit(
            lambda: self._batch(model, ids, batch_size, rows, facts, created), len(ids), done
        )
        result = await asyncio.shield(made)
        if isinstance(result, Exception):
            raise result
        return result

    def _undo(self, model: Model, ids: Sequence[str], committed: Committed, then: Callable[[], None]) -> None:
        """Delete those of sessions that were not all made which were, or may have been."""
        there = [session_id for session_id in ids if session_id not in committed.conflicts]
        batch = Batch(deletes=there, counts=((model.name, -len(there)),))
        self._commits.submit(lambda: batch, len(there), lambda _: then())

    def _batch(
        self,
        model: Model,
        ids: Sequence[str],
        batch_size: int,
        rows: Rows,
        facts: Fresh,
        created: float,
    ) -> Batch:
        initial = np.tile(model.arena.pack_initial(), (1, batch_size))
        ready = len(rows) // batch_size
        part = self._keeping.made(ids, ready)
        resident, others = rows[part.start * batch_size :], len(ids) - max(ready, part.start)
        packed = np.broadcast_to(initial, (others, initial.shape[1]))
        if len(resident):
            packed = np.concatenate([model.arena.pack(resident).reshape(-1, initial.shape[1]), packed])
        some = dataclasses.replace(facts, revisions=facts.revisions[part])
        return Batch(
            puts=_records(model, ids[part], batch_size, packed, some, created),
            forgets=ids,
            counts=((model.name, len(ids)),),
        )

    async def _add_in_pieces(
        self, model: Model, ids: Sequence[str], batch_size: int, rows: Rows, facts: Fresh, created: float
    ) -> None:
        async for part in in_pieces(ids):
            own = rows[part.start * batch_size : part.stop * batch_size]
            some = dataclasses.replace(facts, revisions=facts.revisions[part])
            self._add(model, ids[part], batch_size, own, some, created)

    def _add(
        self,
        model: Model,
        ids: Sequence[str],
        batch_size: int,
        rows: Rows,
        facts: Fresh,
        created: float,
    ) -> None:
        ready = len(rows) // batch_size
        parts = ((slice(0, ready), rows), (slice(ready, len(ids)), None))
        for part, own in parts:
            some = ids[part]
            if not some:
                continue
            handles = self._table.add(
                some,
                rows=own,
                model=model.index,
                batch_size=batch_size,
                revision=facts.revisions[part],
                position=facts.position,
                opened_with=facts.opened_with,
                used=self._clock.monotonic(),
                created=created,
            )
            if own is not None:
                model.slots.owner[self._table.row[handles]] = handles
            self._expiry.watch(handles)


def _records(
    model: Model, ids: Sequence[str], batch_size: int, rows: U8, facts: Fresh, created: float
) -> list[tuple[str, Stored]]:
    if not ids:
        return []
    template = RecordTemplate(
        ids,
        fingerprint=model.program.fingerprint,
        model=model.name,
        opened_with=facts.opened_with,
        created=created,
        row_bytes=model.arena.row_bytes,
        batch_size=batch_size,
    )
    template.rows[...] = rows
    return template.fill(
        revisions=facts.revisions, positions=facts.position, request_ids=0, last_used=created, replies=0
    )
