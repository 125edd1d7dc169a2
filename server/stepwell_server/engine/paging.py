"""More sessions than rows: the least recently used leave the arena and come back when they are needed."""

from __future__ import annotations

import numpy as np

from stepwell_server.core.sessions import Handles, SessionTable
from stepwell_server.core.slots import Rows
from stepwell_server.engine.served import ServedModel
from stepwell_server.errors import Overloaded, ServerError, SessionLost
from stepwell_server.store.base import Record, Store

#: When rows are needed, this share of the arena is paged out at once: finding the least recently used
#: means a look at all sessions, and should not be paid for each row.
SHARE_AT_ONCE = 1 / 16


class Pager:
    """Moves sessions between a model's arena and the store. A claimed session is never paged out."""

    def __init__(self, table: SessionTable, store: Store) -> None:
        self._table = table
        self._store = store

    def take(self, model: ServedModel, count: int) -> Rows:
        """Take rows for sessions, paging others out as needed.

        Raises:
            Overloaded: too many of the model's rows belong to sessions with something under way.
        """
        rows = model.slots.take_resident(count)
        if rows is None:
            self._make_room(model, count)
            rows = model.slots.take_resident(count)
        if rows is None:
            raise self._overloaded(model, count)
        return rows

    @staticmethod
    def _overloaded(model: ServedModel, count: int) -> Overloaded:
        return Overloaded(
            f"rows of sessions with something under way must leave {count} free of"
            f" resident_rows {model.slots.resident_limit} of model {model.name!r}",
            retry_after_s=max(0.05, model.loop.expected_wait_s()),
        )

    def page_in(self, model: ServedModel, handles: Handles) -> dict[int, ServerError]:
        """Bring claimed sessions back to the arena, those that are not there and for which there is room.

        Returns:
            Why the others stay away, by handle: `Overloaded` or `SessionLost`.
        """
        absent = handles[self._table.row[handles] < 0]
        if not len(absent):
            return {}
        refused: dict[int, ServerError] = {}
        fits = np.cumsum(self._table.batch_size[absent]) <= self._room(model, absent)
        if not fits.all():
            short = self._overloaded(model, int(self._table.batch_size[absent].sum()))
            refused = dict.fromkeys(absent[~fits].tolist(), short)
            absent = absent[fits]
        records = {handle: self._record(handle) for handle in absent.tolist()}
        lost = {handle: found for handle, found in records.items() if isinstance(found, SessionLost)}
        absent = absent[[handle not in lost for handle in absent.tolist()]] if lost else absent
        if len(absent):
            packed = b"".join(found.rows for found in records.values() if isinstance(found, Record))
            self._unpack(model, absent, packed)
        return refused | lost

    def _room(self, model: ServedModel, handles: Handles) -> int:
        """Rows that could be had for sessions: free ones, and those of sessions that may go."""
        room = model.slots.resident_limit - model.slots.resident
        if int(self._table.batch_size[handles].sum()) > room:
            room += int(self._table.batch_size[self._may_go(model.index)].sum())
        return room

    def _unpack(self, model: ServedModel, handles: Handles, packed: bytes) -> None:
        rows = self.take(model, int(self._table.batch_size[handles].sum()))
        model.arena.unpack(rows, np.frombuffer(packed, np.uint8).reshape(len(rows), -1))
        self._table.set_rows_of(handles, rows)
        if self._store.is_volatile:
            self._store.delete([self._table.session_id(handle) for handle in handles.tolist()])

    def _record(self, handle: int) -> Record | SessionLost:
        session_id = self._table.session_id(handle)
        record = self._store.get(session_id)
        if record is None:
            revision = str(int(self._table.revision[handle]))
            return SessionLost(
                session_id, f"session {session_id!r} was paged out and is not in the store", revision=revision
            )
        return record

    def _make_room(self, model: ServedModel, count: int) -> None:
        short = model.slots.resident + count - model.slots.resident_limit
        wanted = max(short, int(model.slots.resident_limit * SHARE_AT_ONCE))
        victims = self._oldest(model.index, wanted)
        if len(victims):
            self._page_out(model, victims)

    def _oldest(self, model: int, rows: int) -> Handles:
        """The least recently used sessions that have `rows` rows together, or all that may go."""
        table, candidates = self._table, self._may_go(model)
        by_age = candidates[np.argsort(table.used[candidates], kind="stable")]
        enough = int(np.searchsorted(np.cumsum(table.batch_size[by_age]), rows)) + 1
        return by_age[:enough]

    def _may_go(self, model: int) -> Handles:
        table, end = self._table, self._table.end
        return np.flatnonzero((table.model[:end] == model) & (table.row[:end] >= 0) & ~table.claimed[:end])

    def _page_out(self, model: ServedModel, handles: Handles) -> None:
        rows = self._table.rows_of(handles)
        packed = model.arena.pack(rows)
        ends = np.cumsum(self._table.batch_size[handles]).tolist()
        starts = [0, *ends[:-1]]
        self._store.put(
            [
                Record(self._table.session_id(handle), model.program.fingerprint, packed[start:end].tobytes())
                for handle, start, end in zip(handles.tolist(), starts, ends, strict=True)
            ]
        )
        self._table.page_out(handles)
        model.slots.free_resident(rows)
