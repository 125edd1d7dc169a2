"""Sessions are exported: each as its record, with all that is kept of it."""

from __future__ import annotations

import asyncio
import dataclasses
from collections.abc import Sequence

import numpy as np

from stepwell_server.engine.api import SessionFilter
from stepwell_server.engine.commit.records import Records, as_it_is, encoded
from stepwell_server.engine.commit.tombstones import ended_by
from stepwell_server.engine.sessions.context import Context
from stepwell_server.engine.sessions.read import Query, SessionList
from stepwell_server.engine.state.fields import Mark, joined, split
from stepwell_server.engine.versions.history import How
from stepwell_server.errors import MessageTooLarge, ServerError, SessionGone, SessionLost, StateCorrupt
from stepwell_server.store.base import Fetched, Store
from stepwell_server.store.record import Stored, decode_header, decode_many, is_sound, key_id_of

Exported = Stored | ServerError

#: Sessions that are listed for one page, at most.
_PAGE_SIZE = 1000
#: Records that are read before others get a turn of the event loop.
_BATCH_SIZE = 64


class Export:
    """Exports sessions. Lives on the event loop."""

    def __init__(self, context: Context, listing: SessionList, records: Records, store: Store) -> None:
        self._table = context.table
        self._directory = context.directory
        self._turns = context.turns
        self._removal = context.removal
        self._expiry = context.expiry
        self._clock = context.clock
        self._listing = listing
        self._records = records
        self._store = store

    async def sessions(self, session_ids: Sequence[str], *, deadline: float) -> list[Exported]:
        """The records of sessions as of their last completed changes, or why there is none."""
        fetched = await self._store.fetch(session_ids)
        found = [self._stored(i, each) for i, each in zip(session_ids, fetched, strict=True)]
        return [
            await self._held(session_id, deadline) if each is None else each
            for session_id, each in zip(session_ids, found, strict=True)
        ]

    async def page(
        self,
        wanted: SessionFilter,
        *,
        after: str,
        page_bytes: int,
        most_bytes: int,
        deadline: float,
    ) -> tuple[list[tuple[str, Exported]], str | None]:
        """Sessions that fit a filter, about `page_bytes` of them but at least one, and the id behind which the next page begins.

        A record of more than `most_bytes` is reported as an error.
        """
        query = Query(filter=wanted, after=after, limit=_PAGE_SIZE, count=False)
        page, _ = await self._listing.page(query)
        found: list[tuple[str, Exported]] = []
        size = 0
        for start in range(0, len(page), _BATCH_SIZE):
            ids = [info.session_id for info in page[start : start + _BATCH_SIZE]]
            for session_id, each in zip(ids, await self.sessions(ids, deadline=deadline), strict=True):
                if isinstance(each, SessionGone):
                    continue  # it ended meanwhile
                record = each
                if not isinstance(record, ServerError) and len(record) > most_bytes:
                    record = MessageTooLarge(
                        f"session {session_id!r} must have at most {most_bytes} bytes to be exported;"
                        f" it has {len(record)}"
                    )
                own = 0 if isinstance(record, ServerError) else len(record) + len(session_id)
                if found and size + own > page_bytes:
                    return found, found[-1][0]
                size += own
                found.append((session_id, record))
            await asyncio.sleep(0)
        return found, page.next

    def _stored(self, session_id: str, fetched: Fetched) -> Exported | None:
        """A session as the store has it; None: the store does not say it all.

        Its state is only in the arena, or another one under the version that it is on by now. Or it begins or ends just now.
        """
        if fetched.tombstone is not None:
            return ended_by(fetched.tombstone)
        record, handle = fetched.record, self._table.find(session_id)
        is_due = handle is not None and self._expiry.is_suspect(handle)
        if record is None or is_due or session_id in self._removal.pending:
            return None
        if not is_sound(session_id, record) or key_id_of(record) is not None:
            return StateCorrupt(
                f"the stored record of session {session_id!r} must be as it was written, and there must be a key that"
                " opens it if it is encrypted",
                session_id=session_id,
            )
        return None if self._expiry.is_over(session_id, fetched) else self._as_now(session_id, record)

    async def _held(self, session_id: str, deadline: float, *, needs_rows: bool = False) -> Exported:
        """The record of a session that nothing else is under way for, made of what is in the arena if that has its state."""
        try:
            seen = await self._directory.look([session_id], anew=True)
            handle = self._directory.find(session_id, seen)
            await self._turns.hold(handle, deadline, rows=needs_rows)
        except ServerError as error:
            return error
        try:
            if self._table.row[handle] < 0:
                (found,) = await self._store.fetch([session_id])
                if found.record is None:
                    stone = found.tombstone
                    return _lost(session_id) if stone is None else ended_by(stone)
                record = self._as_now(session_id, found.record)
            else:
                model = self._directory.models.by_handle(handle)
                outcome = as_it_is(self._table, model, np.array([handle]))
                last_used = self._clock.now() - (self._clock.monotonic() - float(self._table.used[handle]))
                ((_, record),) = self._records.of(outcome, last_used)
        finally:
            self._turns.release(np.array([handle]))
        return await self._held(session_id, deadline, needs_rows=True) if record is None else record

    def _as_now(self, session_id: str, record: Stored) -> Stored | None:
        """A record as of the version that its session is on by now; None: its state is another there."""
        try:
            header = decode_header(session_id, record)
            model, move = self._directory.models.place(session_id, header)
        except ServerError:
            return record  # it leaves as it is
        if move is None:
            return record
        if move.how is not How.CARRY:
            return None
        decoded = decode_many([session_id], [record])
        _, rest = split(header.fields)
        header = dataclasses.replace(
            header,
            fingerprint=model.program.fingerprint,
            fields=joined(Mark(model.version, model.epoch, is_pinned=False), rest),
        )
        return encoded(session_id, header, decoded.rows, decoded.extras.get(0, b""))


def _lost(session_id: str) -> SessionLost:
    return SessionLost(session_id, f"session {session_id!r} was paged out and is not in the store")
