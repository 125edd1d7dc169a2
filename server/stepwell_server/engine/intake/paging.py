"""More sessions than rows: the least recently used leave the arena and come back when they are needed.

With a store that keeps every change there is nothing to write when a session leaves: its record is there.
"""

from __future__ import annotations

import numpy as np

from stepwell_server.clock import Clock
from stepwell_server.core.sessions import Handles, SessionTable
from stepwell_server.core.slots import Rows
from stepwell_server.engine.durability.group_commit import reason
from stepwell_server.engine.durability.records import Outcome, Records
from stepwell_server.engine.state.model import Model
from stepwell_server.errors import Overloaded, ServerError, SessionLost
from stepwell_server.store.base import Batch, LocalStore
from stepwell_server.store.record import Decoded, Stored, decode_many

#: When rows are needed, this share of the arena is paged out at once: finding the least recently used
#: means a look at all sessions, and should not be paid for each row.
SHARE_AT_ONCE = 1 / 16


class Pager:
    """Moves sessions between a model's arena and the store. A claimed session is never paged out."""

    def __init__(self, table: SessionTable, store: LocalStore, records: Records, clock: Clock) -> None:
        self._table = table
        self._store = store
        self._records = records
        self._clock = clock

    def take(self, model: Model, count: int) -> Rows:
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
    def _overloaded(model: Model, count: int) -> Overloaded:
        return Overloaded(
            f"rows of sessions with something under way must leave {count} free of"
            f" resident_rows {model.slots.resident_limit} of model {model.name!r}",
            retry_after_s=max(0.05, model.expected_wait_s),
        )

    def page_in(self, model: Model, handles: Handles) -> dict[int, ServerError]:
        """Bring claimed sessions back to the arena, those that are not there and for which there is room.

        Returns:
            Why the others stay away, by handle: `Overloaded`, `SessionLost`, `StateCorrupt`, `Unavailable`,
            `Internal`.
        """
        absent = handles[self._table.row[handles] < 0]
        if not len(absent):
            return {}
        refused: dict[int, ServerError] = {}
        sizes = self._table.batch_size[absent]
        fits = np.cumsum(sizes) <= self.room(model, int(sizes.sum()))
        if not fits.all():
            short = self._overloaded(model, int(self._table.batch_size[absent].sum()))
            refused = dict.fromkeys(absent[~fits].tolist(), short)
            absent = absent[fits]
        return refused | self._bring_back(model, absent) if len(absent) else refused

    def _bring_back(self, model: Model, handles: Handles) -> dict[int, ServerError]:
        ids = [self._table.session_id(handle) for handle in handles.tolist()]
        try:
            records = self._store.get_many(ids)
        except Exception as error:  # whatever it is: their claims must end
            return dict.fromkeys(handles.tolist(), reason(error))
        found = [record if record is not None else b"" for record in records]
        decoded = decode_many(ids, found)
        refused: dict[int, ServerError] = {
            int(handles[place]): error if records[place] is not None else self._lost(int(handles[place]))
            for place, error in decoded.errors.items()
        }
        if len(decoded.sound):
            self._unpack(model, handles[decoded.sound], decoded)
        return refused

    def room(self, model: Model, wanted: int) -> int:
        """Rows that could be had for sessions: free ones, and if these are too few those of sessions that may go."""
        room = model.slots.resident_limit - model.slots.resident
        if wanted > room:
            room += int(self._table.batch_size[self._may_go(model)].sum())
        return room

    def _unpack(self, model: Model, handles: Handles, decoded: Decoded) -> None:
        rows = self.take(model, int(self._table.batch_size[handles].sum()))
        model.arena.unpack(rows, np.frombuffer(decoded.rows, np.uint8).reshape(len(rows), -1))
        self._table.set_rows_of(handles, rows)
        model.slots.owner[self._table.row[handles]] = handles
        for place, packed in decoded.extras.items():
            at = int(np.searchsorted(decoded.sound, place))
            model.replies.restore(int(handles[at]), packed)
        if self._store.is_volatile:
            self._store.commit(Batch(deletes=[self._table.session_id(handle) for handle in handles.tolist()]))

    def _lost(self, handle: int) -> SessionLost:
        session_id = self._table.session_id(handle)
        return SessionLost(
            session_id,
            f"session {session_id!r} was paged out and is not in the store",
            revision=str(int(self._table.revision[handle])),
        )

    def _make_room(self, model: Model, count: int) -> None:
        short = model.slots.resident + count - model.slots.resident_limit
        wanted = max(short, int(model.slots.resident_limit * SHARE_AT_ONCE))
        victims = self._oldest(model, wanted)
        if len(victims):
            self._page_out(model, victims)

    def _oldest(self, model: Model, rows: int) -> Handles:
        """The least recently used sessions that have `rows` rows together, or all that may go."""
        table, candidates = self._table, self._may_go(model)
        by_age = candidates[np.argsort(table.used[candidates], kind="stable")]
        enough = int(np.searchsorted(np.cumsum(table.batch_size[by_age]), rows)) + 1
        return by_age[:enough]

    def _may_go(self, model: Model) -> Handles:
        # by row, not by session: there are many more sessions than rows
        table, owner = self._table, model.slots.owner
        rows = np.flatnonzero(owner >= 0)
        handles = owner[rows]
        may = (table.row[handles] == rows) & (table.model[handles] == model.index) & ~table.claimed[handles]
        found: Handles = handles[may]
        return found

    def _page_out(self, model: Model, handles: Handles) -> None:
        rows = self._table.rows_of(handles)
        if self._store.is_volatile:
            self._store.commit(Batch(puts=self._as_they_are(model, handles)))
        for handle in handles.tolist():
            model.replies.forget(handle)
        self._table.page_out(handles)
        model.slots.free_resident(rows)

    def _as_they_are(self, model: Model, handles: Handles) -> list[tuple[str, Stored]]:
        table = self._table
        as_it_is = Outcome(
            model,
            handles,
            table.revision[handles],
            table.position[handles],
            table.request_id[handles],
            table.reply[handles],
            model.replies.arrays(handles),
        )
        return self._records.of(as_it_is, self._clock.now())
