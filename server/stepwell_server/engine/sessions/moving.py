"""Sessions leave as their records."""

from __future__ import annotations

import asyncio
import dataclasses
from collections.abc import Sequence

import numpy as np

from stepwell_server.core.history import How
from stepwell_server.engine.api import SessionFilter
from stepwell_server.engine.durability.endings import ended_by
from stepwell_server.engine.durability.records import Records, as_it_is, encoded
from stepwell_server.engine.sessions.context import Context
from stepwell_server.engine.sessions.lookup import Seen
from stepwell_server.engine.sessions.read import Query, SessionList
from stepwell_server.engine.state.fields import (
    joined,
    split,
)
from stepwell_server.errors import (
    MessageTooLarge,
    ServerError,
    SessionGone,
    SessionLost,
    StateCorrupt,
)
from stepwell_server.store.base import Fetched, Store
from stepwell_server.store.record import (
    Stored,
    decode_header,
    decode_many,
    is_sound,
    key_id_of,
)

#: Sessions that are listed for one page.
_PAGE = 1000
#: Records that are read before others get a turn.
_PIECE = 64


Exported = Stored | ServerError


class Moving:
    """Exports sessions. Lives on the event loop."""

    def __init__(
        self,
        context: Context,
        listing: SessionList,
        records: Records,
        store: Store,
        others: Store | None,
    ) -> None:
        """`others` is the store, if it has a record of every change."""
        self._table = context.table
        self._directory = context.directory
        self._turns = context.turns
        self._listing = listing
        self._records = records
        self._store = store
        self._others = others
        self._expiry = context.expiry
        self._clock = context.clock

    async def export(self, session_ids: Sequence[str], *, deadline: float) -> list[Exported]:
        """The records of sessions as of their last completed changes, or why there is none."""
        if self._others is None:
            return [await self._of_arena(session_id, deadline) for session_id in session_ids]
        fetched = await self._others.fetch(session_ids)
        over = {i for i, each in zip(session_ids, fetched, strict=True) if self._expiry.is_over(i, each)}
        missing = [
            i for i, each in zip(session_ids, fetched, strict=True) if each.record is None or i in over
        ]
        seen = await self._directory.look(missing, anew=bool(over)) if missing else self._directory.here
        found = [
            self._exported(i, each, seen, must_be_here=i in over)
            for i, each in zip(session_ids, fetched, strict=True)
        ]
        for place, each in enumerate(found):
            if not isinstance(each, ServerError):
                as_now = self._as_now(session_ids[place], each)
                found[place] = as_now or await self._of_arena(session_ids[place], deadline, brings=True)
        return found

    def _as_now(self, session_id: str, record: Stored) -> Stored | None:
        """A record as of the version that its session is on by now; None: its state is another there."""
        try:
            header = decode_header(session_id, record)
            model, way = self._directory.models.place(session_id, header)
        except ServerError:
            return record  # it leaves as it is
        if not way:
            return record
        if any(move.how is not How.CARRY for move in way):
            return None
        decoded = decode_many([session_id], [record])
        _, rest = split(header.fields)
        header = dataclasses.replace(
            header,
            fingerprint=model.program.fingerprint,
            fields=joined(model.mark(model.epoch, is_pinned=False), rest),
        )
        return encoded(session_id, header, decoded.rows, decoded.extras.get(0, b""))

    def _exported(self, session_id: str, fetched: Fetched, seen: Seen, *, must_be_here: bool) -> Exported:
        record = fetched.record
        if (
            fetched.tombstone is not None and not must_be_here
        ):  # maybe by another server, and the table has it still
            return ended_by(fetched.tombstone)
        if must_be_here or session_id in self._table:
            try:
                self._directory.find(session_id, seen)
            except ServerError as error:
                return error
        if record is None:
            return self._directory.gone(session_id, seen)
        if not is_sound(session_id, record) or key_id_of(record) is not None:
            return StateCorrupt(
                f"the stored record of session {session_id!r} must be as it was written, and there must be a key that"
                " opens it if it is encrypted",
                session_id=session_id,
            )
        return record

    async def _of_arena(self, session_id: str, deadline: float, *, brings: bool = False) -> Exported:
        """The record of a session of which the store has no other, or has one only while it is not in the arena."""
        try:
            seen = await self._directory.look([session_id])
            handle = self._directory.find(session_id, seen)
            await self._turns.hold(handle, deadline, rows=brings)
        except ServerError as error:
            return error
        try:
            if self._table.row[handle] < 0:
                (found,) = await self._store.fetch([session_id])
                record = found.record
                if record is None:
                    stone = found.tombstone
                    return _lost(session_id) if stone is None else ended_by(stone)
                as_now = self._as_now(session_id, record)
            else:
                model = self._directory.models.by_handle(handle)
                outcome = as_it_is(self._table, model, np.array([handle]))
                last_used = self._clock.now() - (self._clock.monotonic() - float(self._table.used[handle]))
                ((_, as_now),) = self._records.of(outcome, last_used)
        finally:
            self._turns.release(np.array([handle]))
        return await self._of_arena(session_id, deadline, brings=True) if as_now is None else as_now

    async def export_page(
        self,
        wanted: SessionFilter,
        *,
        after: str,
        page_bytes: int,
        most_bytes: int,
        deadline: float,
    ) -> tuple[list[tuple[str, Exported]], str | None]:
        """Sessions that fit a filter, about so many bytes of them but at least one, and where the next page begins.

        A record of more than `most_bytes` is told as an error.
        """
        query = Query(filter=wanted, after=after, limit=_PAGE, count=False)
        page, _ = await self._listing.page(query)
        found: list[tuple[str, Exported]] = []
        size = 0
        for start in range(0, len(page), _PIECE):
            ids = [info.session_id for info in page[start : start + _PIECE]]
            for session_id, each in zip(ids, await self.export(ids, deadline=deadline), strict=True):
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


def _lost(session_id: str) -> SessionLost:
    return SessionLost(session_id, f"session {session_id!r} was paged out and is not in the store")
