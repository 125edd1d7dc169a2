"""Pages sessions: the least recently used leave the arena, and return when they are needed.

Rows are taken at once, and filled when the records have arrived. If the store does not answer at once, a callback
is called then, and passes run meanwhile. Other servers may have changed a session since, so the table is updated
from its record.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from stepwell_server.clock import Clock
from stepwell_server.core.quotas import SESSION_BYTES
from stepwell_server.core.sessions import Handles, SessionTable
from stepwell_server.core.slots import Rows
from stepwell_server.engine.api import Observer
from stepwell_server.engine.commit.store_policy import StorePolicy
from stepwell_server.engine.commit.tombstones import ended_by
from stepwell_server.engine.eager import Rest, finish, start
from stepwell_server.engine.state.fields import Fields
from stepwell_server.engine.state.model import Model
from stepwell_server.engine.types import U64, Array, Mask
from stepwell_server.engine.versions.record_upgrade import RecordUpgrader, UpgradedRecords
from stepwell_server.engine.versions.registry import Models
from stepwell_server.errors import NoRows, ServerError, SessionLost, SessionReplaced, Unavailable
from stepwell_server.store.base import Store, StoredSession, as_server_error
from stepwell_server.store.fields import counted_bytes
from stepwell_server.store.record import DecodedRecords, decode_many

#: Table columns that are stored in a record's header.
#: No revision of a session: rows that no record has.
_NOT_RECORDED = np.uint64(2**64 - 1)
_FROM_RECORDS = (
    "revision", "position", "request_id", "digest", "opened_with", "opened_digest", "created", "reply", "max_idle_ms",
)  # fmt: skip
#: When rows are needed, this share of the arena is paged out at once, because finding the least recently used
#: sessions scans all of them.
PAGE_OUT_SHARE = 1 / 16

_NO_MEMBERS: Handles = np.zeros(0, np.intp)
_NO_ROWS: Rows = np.zeros(0, np.intp)

PageInErrors = dict[int, ServerError]
"""Why sessions stay paged out, by handle: `NoRows`, `SessionGone`, `StateCorrupt`, `Overloaded`, `Unavailable`,
`Internal`."""
OnPagedIn = Callable[[Handles, PageInErrors], None]
"""Called with sessions that were being read, and the errors for sessions that stay paged out."""


class PageIn(NamedTuple):
    """The immediate result of a page-in; sessions in neither field are in the arena."""

    refused: PageInErrors
    coming: Handles


ALL_HERE = PageIn({}, _NO_MEMBERS)


class Pager:
    """Moves sessions between a model's arena and the store. Never pages out a claimed session.

    Lives on the event loop.
    """

    def __init__(
        self,
        table: SessionTable,
        models: Models,
        store: Store,
        policy: StorePolicy,
        fields: Fields,
        forwarding: RecordUpgrader,
        *,
        clock: Clock,
        observer: Observer,
    ) -> None:
        self._table = table
        self._models = models
        self._store = store
        self._policy = policy
        self._fields = fields
        self._forwarding = forwarding
        self._clock = clock
        self._observer = observer
        self._tasks: set[asyncio.Task[PageInErrors]] = set()

    @property
    def is_idle(self) -> bool:
        """Whether no session is being read."""
        return not self._tasks

    async def idle(self) -> None:
        """Return when no session is being read."""
        while self._tasks:
            await asyncio.wait(self._tasks)

    def take(self, model: Model, count: int) -> Rows:
        """Take rows for sessions, paging others out as needed.

        Raises:
            NoRows: too many of the model's rows belong to active sessions.
        """
        rows = model.slots.take_resident(count)
        if rows is None:
            self._make_room(model, count)
            rows = model.slots.take_resident(count)
        if rows is None:
            raise self._no_rows(model, count)
        return rows

    @staticmethod
    def _no_rows(model: Model, count: int) -> NoRows:
        return NoRows(
            f"model {model.name!r} must have {count} free rows within resident_rows {model.slots.resident_limit};"
            " active sessions use them: send the call again later, or raise --resident-rows",
            retry_after_s=max(0.05, model.expected_wait_s),
        )

    def page_in(self, model: Model, handles: Handles, later: OnPagedIn, *, reread: bool = False) -> PageIn:
        """Bring claimed sessions back to the arena, as far as there is room.

        With `reread`, sessions in the arena are also read again if another server changed them. `later` is called
        when the sessions being read have arrived; their claims must last until then.
        """
        absent = handles[self._table.row[handles] < 0]
        if not (len(absent) or reread):
            return ALL_HERE
        refused: PageInErrors = {}
        sizes = self._table.batch_size[absent]
        fits = np.cumsum(sizes) <= self.room(model, int(sizes.sum()))
        if not fits.all():
            short = self._no_rows(model, int(sizes.sum()))
            refused = dict.fromkeys(absent[~fits].tolist(), short)
            absent = absent[fits]
        coming = handles[np.isin(handles, list(refused), invert=True)] if reread else absent
        if not len(coming):
            return PageIn(refused, coming)
        rows = self.take(model, int(self._table.batch_size[absent].sum())) if len(absent) else _NO_ROWS
        came = start(self._fetch(model, coming, rows))
        if not isinstance(came, Rest):
            return PageIn(refused | came, _NO_MEMBERS) if refused or came else ALL_HERE
        task = asyncio.create_task(finish(came))
        self._tasks.add(task)

        def ended(task: asyncio.Task[PageInErrors]) -> None:
            self._tasks.discard(task)
            if not task.cancelled():  # the event loop is ending
                later(coming, task.result())

        task.add_done_callback(ended)
        return PageIn(refused, coming)

    async def states_of(self, model: Model, handles: Handles) -> tuple[Sequence[Array], PageInErrors]:
        """Read states of claimed sessions that are paged out, without paging them in.

        Returns:
            The rows of the sessions without an error, one after the other, and the errors.
        """
        ids = self._ids(handles)
        try:
            found = await self._store.fetch(ids)
            forwarded = await self._forward(model, handles, ids, found)
        except Exception as error:  # whatever the error: their claims must end
            return (), dict.fromkeys(handles.tolist(), as_server_error(error))
        decoded, sound, refused = self._settle(model, handles, found, forwarded)
        packed = _packed(decoded, sound).reshape(-1, model.arena.row_bytes)
        states = zip(model.arena.states, model.arena.unpacked(packed), strict=False)
        return [values for _, values in states], refused

    async def compare(self, model: Model, handles: Handles) -> None:
        """Remove claimed sessions from the arena that other servers changed since their records were read.

        So a read that begins now returns nothing older than any server has returned before.

        Raises:
            Unavailable: the store cannot be read now.
        """
        here = handles[self._table.row[handles] >= 0]
        if not len(here):
            return
        found = await self._store.fetch(self._ids(here), self._table.stamp[here].tolist())
        changed = np.array([not each.is_known for each in found], np.bool_)
        self.discard(model, here[changed])

    def discard(self, model: Model, handles: Handles) -> None:
        """Remove sessions from the arena whose rows differ from the store."""
        here = handles[self._table.row[handles] >= 0]
        if len(here):
            self._leave(model, here)

    def forget_replies(self, model: Model) -> None:
        """Free memory of replies: page out the sessions with the oldest ones, if the store has them."""
        if self._policy.others is None:
            return
        handles = np.fromiter(model.replies.oldest(), np.intp)
        self.page_out(handles[~self._table.claimed[handles]])

    def page_out(self, handles: Handles) -> None:
        """Page out sessions that are in the arena and idle, except for the operation that asks for this.

        Raises:
            Unavailable: the store cannot keep the sessions.
        """
        for index in np.unique(self._table.model[handles]).tolist():
            model, began = self._models.by_index[index], self._clock.monotonic()
            own = handles[self._table.model[handles] == index]
            self._policy.leave(model, own)
            self._leave(model, own)
            self._paged(model, "out", len(own), began)

    async def _fetch(self, model: Model, handles: Handles, rows: Rows) -> PageInErrors:
        """Read sessions, using the rows that were taken for those without any. Returns the errors of the others."""
        began = self._clock.monotonic()
        try:
            is_here = self._table.row[handles] >= 0
            known = np.where(is_here, self._table.stamp[handles], 0).tolist() if is_here.any() else ()
            ids = self._ids(handles)
            found = await self._store.fetch(ids, known)
            if len(known):
                is_changed = np.array([not each.is_known for each in found], np.bool_)
                handles, found = handles[is_changed], [each for each in found if not each.is_known]
                ids, changed = self._ids(handles), handles[is_here[is_changed]]
                self.discard(model, changed)
                if len(changed):
                    more = self.take(model, int(self._table.batch_size[changed].sum()))
                    rows = self._in_order(handles, changed, rows, more)
                if not len(handles):
                    return {}
            forwarded = await self._forward(model, handles, ids, found)
            refused = self._restore(model, handles, found, forwarded, rows)
            self._paged(model, "in", len(handles) - len(refused), began)
        except Exception as error:  # whatever the error: their claims must end
            model.slots.free_resident(rows)
            refused = dict.fromkeys(handles.tolist(), as_server_error(error))
        return refused

    def _in_order(self, handles: Handles, changed: Handles, rows: Rows, more: Rows) -> Rows:
        """Merge the rows taken before with those of `changed` sessions, in the order of all."""
        is_more = np.repeat(np.isin(handles, changed), self._table.batch_size[handles])
        found = np.empty(len(is_more), rows.dtype)
        found[is_more], found[~is_more] = more, rows
        return found

    async def _forward(
        self, model: Model, handles: Handles, ids: Sequence[str], found: Sequence[StoredSession]
    ) -> UpgradedRecords:
        """Decode records, upgraded to their sessions' current version."""
        stamps = self._table.stamp[handles].tolist()
        as_known = [each.stamp == stamp for each, stamp in zip(found, stamps, strict=True)]
        stored = [each.record if each.record is not None else b"" for each in found]

        def bring() -> UpgradedRecords:
            return self._forwarding.bring(model, decode_many(ids, stored), as_known)

        # a migration may take long, so it runs on a thread
        return await asyncio.to_thread(bring) if self._forwarding.migrates(model) else bring()

    def _restore(
        self,
        model: Model,
        handles: Handles,
        found: Sequence[StoredSession],
        forwarded: UpgradedRecords,
        rows: Rows,
    ) -> PageInErrors:
        """Fill the rows of sessions whose records are valid, and return `rows` that are not needed."""
        decoded, sound, refused = self._settle(model, handles, found, forwarded)
        if not sound.all():
            own = np.repeat(sound, self._table.batch_size[handles])
            model.slots.free_resident(rows[~own])
            rows = rows[own]
        if sound.any():
            self._fill(model, handles, rows, decoded, sound)
            is_own = sound[decoded.sound]
            self._table.recorded[handles[decoded.sound[is_own]]] = (
                decoded.heads["revision"][is_own] if forwarded.have_stored_rows else _NOT_RECORDED
            )
        return refused

    def _settle(
        self, model: Model, handles: Handles, found: Sequence[StoredSession], forwarded: UpgradedRecords
    ) -> tuple[DecodedRecords, Mask, PageInErrors]:
        """Check the records: which are valid and belong to these sessions, and the errors of the others.

        The table is updated with what another server may have written, and what upgrading has changed.
        """
        decoded = forwarded.decoded
        refused: PageInErrors = {
            int(handles[place]): error
            if found[place].record is not None
            else self._gone(int(handles[place]), found[place])
            for place, error in decoded.errors.items()
        }
        sound = np.zeros(len(handles), np.bool_)
        sound[decoded.sound] = True
        for place, error in forwarded.refused.items():
            sound[place] = False
            refused[int(handles[place])] = error
        stamps = np.array([found[place].stamp for place in decoded.sound.tolist()], np.uint64)
        is_changed = stamps != self._table.stamp[handles[decoded.sound]]
        if np.count_nonzero(is_changed):
            self._refresh(model, handles, stamps, is_changed, decoded, sound, refused)
        for place, kind in forwarded.replies.items():
            self._table.reply[handles[place]] = kind
        self._table.position[handles[forwarded.reset]] = 0
        return decoded, sound, refused

    def _fill(self, model: Model, handles: Handles, rows: Rows, decoded: DecodedRecords, sound: Mask) -> None:
        here = handles[sound]
        model.arena.unpack(rows, _packed(decoded, sound).reshape(len(rows), -1))
        self._table.set_rows_of(here, rows)
        model.slots.owner[self._table.row[here]] = here
        for place, extra in decoded.extras.items():
            if sound[place]:
                model.replies.restore(int(handles[place]), extra)
        self._policy.after_page_in(self._ids(here))

    def _refresh(
        self,
        model: Model,
        handles: Handles,
        stamps: U64,
        is_changed: Mask,
        decoded: DecodedRecords,
        sound: Mask,
        refused: PageInErrors,
    ) -> None:
        """Update the table from records that another server wrote; refuse those of other sessions.

        `stamps` and `is_changed` are of the valid records, `(len(decoded.sound),)`.
        """
        table, heads = self._table, decoded.heads
        same = heads["batch_size"] == table.batch_size[handles[decoded.sound]]
        same &= self._are_of(model, decoded)
        for place in decoded.sound[is_changed & ~same].tolist():
            session_id = table.session_id(int(handles[place]))
            sound[place] = False
            refused[int(handles[place])] = SessionReplaced(
                session_id, f"session {session_id!r} was closed, and another one has its id now"
            )
        which = is_changed & same
        places, heads = decoded.sound[which], heads[which]
        own = handles[places]
        for column in _FROM_RECORDS:
            getattr(table, column)[own] = heads[column]
        table.stamp[own] = stamps[which]
        extras = heads["rows_bytes"].astype(np.int64) + heads["extra_bytes"]
        for handle, place, extra in zip(own.tolist(), places.tolist(), extras.tolist(), strict=True):
            fields = decoded.fields.get(place, b"")
            table.bytes[handle] = SESSION_BYTES + extra + counted_bytes(fields)
            self._fields.take(handle, fields)

    def _are_of(self, model: Model, decoded: DecodedRecords) -> Mask:
        """Which records belong to sessions of a model."""
        known: dict[tuple[str, bytes], bool] = {}
        found = [
            (own, decoded.fields.get(place, b""))
            for own, place in zip(decoded.fingerprints, decoded.sound.tolist(), strict=True)
        ]
        for each in set(found):
            try:
                known[each] = self._forwarding.trace(model, *each, is_as_known=False) is not None
            except Unavailable:
                known[each] = True  # it is already refused
        return np.array([known[each] for each in found], np.bool_)

    def _gone(self, handle: int, found: StoredSession) -> ServerError:
        """The error for a session in the table without a record."""
        if found.tombstone is not None:
            return ended_by(found.tombstone)
        session_id = self._table.session_id(handle)
        return SessionLost(
            session_id,
            f"session {session_id!r} was paged out and is not in the store",
            revision=str(int(self._table.revision[handle])),
        )

    def room(self, model: Model, wanted: int) -> int:
        """Rows available for sessions: free rows, and if these are too few, rows of sessions that may leave."""
        room = model.slots.resident_limit - model.slots.resident
        if wanted > room:
            room += int(self._table.batch_size[self._evictable(model)].sum())
        return room

    def _make_room(self, model: Model, count: int) -> None:
        short = model.slots.resident + count - model.slots.resident_limit
        wanted = max(short, int(model.slots.resident_limit * PAGE_OUT_SHARE))
        victims = self._least_recently_used(model, wanted)
        self.page_out(victims)

    def _least_recently_used(self, model: Model, rows: int) -> Handles:
        """The least recently used sessions with `rows` rows together, or all that may leave."""
        table, candidates = self._table, self._evictable(model)
        by_age = candidates[np.argsort(table.used[candidates], kind="stable")]
        enough = int(np.searchsorted(np.cumsum(table.batch_size[by_age]), rows)) + 1
        return by_age[:enough]

    def _evictable(self, model: Model) -> Handles:
        # by row, not by session: there are many more sessions than rows
        table, rows = self._table, np.arange(model.slots.touched)
        handles = model.slots.owner[rows]
        may = (table.row[handles] == rows) & ~table.claimed[handles]
        if len(model.sharing) == 1:
            may &= table.model[handles] == model.index
        else:
            may &= np.isin(table.model[handles], list(model.sharing))
        found: Handles = handles[may]
        return found

    def _leave(self, model: Model, handles: Handles) -> None:
        rows = self._table.rows_of(handles)
        for handle in handles.tolist():
            model.replies.forget(handle)
        self._table.page_out(handles)
        model.slots.free_resident(rows)

    def _paged(self, model: Model, direction: str, sessions: int, began: float) -> None:
        self._observer.paged(model.name, direction, sessions, self._clock.monotonic() - began)

    def _ids(self, handles: Handles) -> list[str]:
        return [self._table.session_id(handle) for handle in handles.tolist()]


def _packed(decoded: DecodedRecords, sound: Mask) -> npt.NDArray[np.uint8]:
    """The packed rows of the valid records, one after the other."""
    fits = sound[decoded.sound]
    packed = np.frombuffer(decoded.rows, np.uint8)
    return packed if fits.all() else packed[np.repeat(fits, decoded.heads["rows_bytes"])]
