"""The making of sessions: kept by the store, then in the table, all of a call's or none."""

from __future__ import annotations

import asyncio
import dataclasses
import functools
from collections.abc import Callable, Coroutine, Mapping, Sequence

import numpy as np

from stepwell_server.clock import Clock
from stepwell_server.core.callers import Caller
from stepwell_server.core.quotas import SESSION_BYTES, Usage
from stepwell_server.core.sessions import Handles, SessionTable
from stepwell_server.core.slots import Rows
from stepwell_server.engine.api import SessionInfo
from stepwell_server.engine.durability.committer import not_known
from stepwell_server.engine.durability.group_commit import GroupCommit
from stepwell_server.engine.durability.keeping import Keeping
from stepwell_server.engine.intake.row_queue import RowQueue
from stepwell_server.engine.intake.turns import Turns
from stepwell_server.engine.quotas import Quotas
from stepwell_server.engine.sessions.directory import Directory
from stepwell_server.engine.sessions.end import Expiry, Removal
from stepwell_server.engine.sessions.loading import Seen
from stepwell_server.engine.sessions.pieces import TURN, Pieces
from stepwell_server.engine.state.fields import at_birth, joined
from stepwell_server.engine.state.model import Model
from stepwell_server.engine.types import U64, Array
from stepwell_server.errors import QuotaExceeded, ServerError
from stepwell_server.logs import Log
from stepwell_server.store import counts
from stepwell_server.store.base import (
    ALL_KEPT,
    SOLE,
    Batch,
    Committed,
    Done,
    as_server_error,
    new_stamp,
    stamped,
)
from stepwell_server.store.record import Joined, RecordTemplate, Stored

_log = Log("engine.creation")


@dataclasses.dataclass(frozen=True, slots=True)
class Fresh:
    """Sessions of one model that are to begin, and what is true of them from their first moment."""

    model: Model
    ids: Sequence[str]
    """Reserved, or none of them is there or being made."""
    batch_size: int
    """Of each."""
    rows: Rows
    """The arena's rows, with their states, of the first sessions, one after the other. The others begin paged out."""
    revisions: U64
    """`(n,)`. Not 0 where another session had the id: see `Directory.past`."""
    follows: U64
    """`(n,)`: see `Directory.follows`."""
    request_id: int
    """Of the call, 0 for none."""
    created: float
    """Seconds since the epoch."""
    positions: U64
    """`(n,)`."""
    states: Sequence[Array] | None = None
    """Of all of them, their rows one after the other; None: those that begin paged out have the initial state."""
    max_idle_ms: int = 0
    """For how long each may be unused; 0: no limit of its own."""
    is_pinned: bool = False
    """They stay on this version of the model."""
    epoch: int = -1
    """Of all of their records; -1: that of the model as it is when this is made."""
    owner: str = ""
    """As whose they are counted, beside their tenant's: see `Quotas.owner`."""
    stamp: int = SOLE
    """Of all of their records: see `Store.new_stamp`."""
    closes: Mapping[str, tuple[int, ...]] = dataclasses.field(default_factory=dict)
    """See `Directory.past`."""
    opened_digests: U64 | None = None
    """`(n,)`, of what the call says of each: see `core.exactly_once`. None: it has no request id."""
    opened_with: int = 0
    """The request id, or a number that is drawn: sessions of the same id never share it."""

    def __post_init__(self) -> None:
        if not self.opened_with:
            object.__setattr__(self, "opened_with", self.request_id or new_stamp())
        if self.epoch < 0:
            object.__setattr__(self, "epoch", self.model.epoch)

    @property
    def usage(self) -> Usage:
        """What each takes of its tenant's quotas."""
        own_bytes = self.batch_size * self.model.arena.row_bytes + len(at_birth(self.owner, None))
        return Usage(1, self.batch_size, SESSION_BYTES + own_bytes)

    @property
    def ready(self) -> int:
        """How many have rows."""
        return len(self.rows) // self.batch_size

    def part(self, part: slice) -> Fresh:
        """Some of them."""
        own = slice(part.start * self.batch_size, part.stop * self.batch_size)
        return dataclasses.replace(
            self,
            ids=self.ids[part],
            rows=self.rows[own],
            revisions=self.revisions[part],
            follows=self.follows[part],
            positions=self.positions[part],
            states=None if self.states is None else [array[own] for array in self.states],
            opened_digests=None if self.opened_digests is None else self.opened_digests[part],
        )


def _of_tenants(ids: Sequence[str], model: Model, by: int) -> list[tuple[str, int]]:
    """`Batch.tenant_counts` of sessions of one tenant."""
    return counts.of_tenants([(session_id, model.name) for session_id in ids[:1]], by * len(ids))


class Taken(Exception):
    """Another server has made a session of one of the ids. It may have been the same call."""

    def __init__(self, fresh: Fresh, made: Sequence[str]) -> None:
        super().__init__()
        self.fresh = fresh
        self.made = made
        """Those of `fresh` that are there, or may be: see `Creation.take_back`."""


class Creation:
    """Makes sessions. Lives on the event loop."""

    def __init__(
        self,
        table: SessionTable,
        directory: Directory,
        turns: Turns,
        row_queue: RowQueue,
        commits: GroupCommit,
        keeping: Keeping,
        pieces: Pieces,
        *,
        quotas: Quotas | None,
        removal: Removal,
        expiry: Expiry,
        clock: Clock,
        follow: Callable[[Handles, Model, int], None],
    ) -> None:
        """See the class; `follow` lets sessions make the moves that were made while they were."""
        self._table = table
        self._directory = directory
        self._turns = turns
        self._row_queue = row_queue
        self._removal = removal
        self._quotas = quotas
        self._expiry = expiry
        self._commits = commits
        self._keeping = keeping
        self._pieces = pieces
        self._clock = clock
        self._follow = follow
        self._making: set[asyncio.Task[None]] = set()
        """Calls of which one piece after the other is done."""

    def is_making(self, session_ids: Sequence[str]) -> bool:
        """Whether a session of one of these ids is being made."""
        return self._removal.are_pending(session_ids)

    async def look(self, session_ids: Sequence[str]) -> Seen:
        """What the store has of ids, at a moment when nobody makes sessions of them, and it is known what their tenants have.

        Nor has any of them something under way here that has ended on another server: that comes to its end first.

        Raises:
            Unavailable: the store cannot be asked now.
        """
        while True:
            if self._quotas is not None:
                await self._quotas.refresh(session_ids)
            await self._removal.settled(session_ids)
            seen = await self._directory.look(session_ids, anew=True)
            ended = seen.ended_elsewhere()
            for session_id in ended:
                handle = self._table.find(session_id)
                if handle is not None:
                    await self._turns.free(handle)
            if not ended and not self.is_making(session_ids):
                return seen

    @staticmethod
    def reservation() -> asyncio.Future[None]:
        """What those wait for who want an id that a call has reserved."""
        return asyncio.get_running_loop().create_future()

    def reserve(self, ids: Sequence[str], pending: asyncio.Future[None]) -> bool:
        """Keep ids for sessions that are about to be created; False if one of them is there or being made."""
        if self.is_making(ids) or (self._table.find_all(ids) >= 0).any():
            return False
        self._removal.pending.update(dict.fromkeys(ids, pending))
        return True

    def give_up(self, ids: Sequence[str], pending: asyncio.Future[None] | None = None) -> None:
        """End a reservation, `pending` or that of the first id."""
        pending = pending or self._removal.pending[ids[0]]
        for session_id in ids:
            self._removal.pending.pop(session_id, None)
        if not pending.done():
            pending.set_result(None)

    async def create(self, fresh: Fresh) -> SessionInfo:
        """Make sessions. They are there when this returns; to be cancelled meanwhile changes nothing about it.

        Returns:
            The first of them, as it was made.

        Raises:
            Unavailable: the store could not keep them; none is made, and the rows are given back.
            QuotaExceeded: the tenant may not have so many; the same.
            Taken: another server was faster with one. The others may be there, if the call can come again.
        """
        model, ids = fresh.model, fresh.ids
        made: asyncio.Future[SessionInfo | Exception] = asyncio.get_running_loop().create_future()
        if ids[0] not in self._removal.pending:
            self.reserve(ids, self.reservation())
        self._charge(fresh)

        def settle(error: Exception | None) -> None:
            if error is not None:
                self.uncount(ids, fresh.usage)
                self.give_up(ids)
                model.slots.free_resident(fresh.rows)
                made.set_result(error)
                self._row_queue.room_may_have_come()
                return
            self.counted(ids, fresh.usage)
            if len(ids) <= TURN:
                self._add(fresh)
                there()
            else:
                self._go_on(self._add_in_pieces(fresh), there)

        def there() -> None:
            self.give_up(ids)
            try:
                first = self._directory.find(ids[0], self._directory.here)
            except ServerError:  # the default has moved to a version that another server has
                models = self._directory.models
                own = models.versions(model.name)
                made.set_result(models.elsewhere(model.name, own.wanted or own.default, ids[0]))
            else:
                made.set_result(self._directory.info(first))
            self._row_queue.room_may_have_come()  # the rows are of sessions that have nothing under way

        def done(committed: Committed | ServerError) -> None:
            if isinstance(committed, ServerError):
                settle(committed)
            elif not committed.conflicts.isdisjoint(ids):
                there = [i for i in ids if i not in committed.conflicts]
                if not there or self._may_come_again(fresh):
                    settle(Taken(fresh, there))
                else:
                    self._undo(fresh, there, lambda: settle(Taken(fresh, ())))
            elif not committed.unknown.isdisjoint(ids) and self._may_come_again(fresh):
                # it may be there, and somebody may have been told so: whoever asks again finds it
                settle(not_known())
            elif not committed.unknown.isdisjoint(ids):
                self._undo(fresh, ids, lambda: settle(not_known()))
            else:
                settle(None)

        if len(ids) <= TURN:
            self._commits.submit(lambda: self._batch(fresh, self._records(fresh)), len(ids), done)
        else:
            self._go_on(self._commit_in_pieces(fresh, done, settle))
        result = await asyncio.shield(made)
        if isinstance(result, Exception):
            raise result
        return result

    @staticmethod
    def _may_come_again(fresh: Fresh) -> bool:
        """Whether the same call goes on with what is there of it: of many sessions it must be possible to tell whose they are."""
        return len(fresh.ids) == 1 or fresh.request_id != 0

    def _charge(self, fresh: Fresh) -> None:
        try:
            self.count(fresh.ids, fresh.usage, fresh.owner)
        except QuotaExceeded:
            self.give_up(fresh.ids)
            fresh.model.slots.free_resident(fresh.rows)
            raise

    def owner(self, who: Caller, session_id: str = "") -> str:
        """See `Quotas.owner`."""
        return "" if self._quotas is None else self._quotas.owner(who, session_id)

    def count(self, ids: Sequence[str], each: Usage, owner: str = "") -> None:
        """Charge a tenant, and who makes them if it is said, for sessions that are about to be made.

        Raises:
            QuotaExceeded: it may not have so many.
        """
        if self._quotas is not None:
            self._quotas.begin(ids, each, owner)

    def recount(self, session_id: str, more: Usage) -> None:
        """A session is to take more than before, or takes less.

        Raises:
            QuotaExceeded: its tenant may not have so much.
        """
        if self._quotas is not None:
            self._quotas.change(session_id, more)

    def counted(self, ids: Sequence[str], each: Usage) -> None:
        """Sessions that were counted are there."""
        if self._quotas is not None:
            self._quotas.made(ids, each)

    def uncount(self, ids: Sequence[str], each: Usage) -> None:
        """Sessions that were counted are not there."""
        if self._quotas is not None:
            self._quotas.not_made(ids, each)

    async def take_back(self, taken: Sequence[Taken]) -> None:
        """Delete what was made of sessions that are not all made; also if the caller is cancelled."""
        for each in taken:
            if each.made:
                done = asyncio.get_running_loop().create_future()
                self._undo(each.fresh, each.made, functools.partial(done.set_result, None))
                await asyncio.shield(done)

    def _undo(self, fresh: Fresh, there: Sequence[str], then: Callable[[], None]) -> None:
        """Delete some sessions that are there, or may be.

        Only as they were made here: others may have changed them since, or have been told that they are there (`Attempts`).
        """
        batch = Batch(
            deletes=there,
            counts=[(fresh.model.name, -len(there))],
            tenant_counts=_of_tenants(there, fresh.model, -1),
            delete_follows=stamped(fresh.stamp, len(there)),
            undoes=there,
        )

        def done(undone: Committed | ServerError) -> None:
            if isinstance(undone, ServerError) or undone.unknown:
                _log.warning(
                    "sessions of a call that was refused may still be in the store", sessions=len(there)
                )
            then()

        self._commits.submit(lambda: batch, len(there), done)

    def _go_on(self, work: Coroutine[None, None, None], then: Callable[[], None] = lambda: None) -> None:
        """Do what is done in pieces, whatever becomes of the call."""
        task = asyncio.create_task(work)
        self._making.add(task)
        task.add_done_callback(self._making.discard)
        task.add_done_callback(lambda _: then())

    def _records(self, fresh: Fresh) -> Sequence[tuple[str, Stored]]:
        return _records(fresh.part(self._keeping.made(fresh.ids, fresh.ready)))

    def _batch(self, fresh: Fresh, puts: Sequence[tuple[str, Stored]]) -> Batch:
        ids = fresh.ids
        return Batch(
            puts=puts,
            forgets=ids,
            counts=[(fresh.model.name, len(ids))],
            tenant_counts=_of_tenants(ids, fresh.model, 1),
            follows=fresh.follows[len(ids) - len(puts) :],
            stamps=stamped(fresh.stamp, len(puts)),
        )

    async def _commit_in_pieces(
        self, fresh: Fresh, done: Done, settle: Callable[[Exception | None], None]
    ) -> None:
        """Make the records in pieces; they are committed together, unless nobody can see parts of them."""
        try:
            if self._keeping.may_part:
                await self._keep_in_pieces(fresh)
                done(ALL_KEPT)
                return
            made = [self._records(fresh.part(part)) async for part in self._pieces.of(fresh.ids)]
        except Exception as error:
            settle(as_server_error(error))
            return
        batch = self._batch(fresh, Joined([puts for puts in made if puts]))
        self._commits.submit(lambda: batch, len(fresh.ids), done)

    async def _keep_in_pieces(self, fresh: Fresh) -> None:
        """Commit records piece by piece.

        Raises:
            ServerError: one piece was not kept, and none is.
        """
        kept = 0
        failed: list[ServerError] = []

        def done(committed: Committed | ServerError) -> None:
            if isinstance(committed, ServerError):
                failed.append(committed)

        async for part in self._pieces.of(fresh.ids):
            some = fresh.part(part)
            self._commits.submit(
                functools.partial(self._batch, some, self._records(some)), len(some.ids), done
            )
            if failed:
                break
            kept = part.stop
        if failed:
            gone = Batch(
                deletes=fresh.ids[:kept],
                counts=[(fresh.model.name, -kept)],
                tenant_counts=_of_tenants(fresh.ids[:kept], fresh.model, -1),
            )
            self._commits.submit(lambda: gone, kept, lambda _: None)
            raise failed[0]

    async def _add_in_pieces(self, fresh: Fresh) -> None:
        async for part in self._pieces.of(fresh.ids):
            self._add(fresh.part(part))

    def _add(self, fresh: Fresh) -> None:
        ready, model = fresh.ready, fresh.model
        for part, rows in ((slice(0, ready), fresh.rows), (slice(ready, len(fresh.ids)), None)):
            if not fresh.ids[part]:
                continue
            handles = self._table.add(
                fresh.ids[part],
                rows=rows,
                model=model.index,
                batch_size=fresh.batch_size,
                revision=fresh.revisions[part],
                position=fresh.positions[part],
                opened_with=fresh.opened_with,
                opened_digest=0 if fresh.opened_digests is None else fresh.opened_digests[part],
                used=self._clock.monotonic(),
                created=fresh.created,
                max_idle_ms=fresh.max_idle_ms,
                stamp=fresh.stamp,
                pinned=fresh.is_pinned,
                bytes=fresh.usage.bytes,
            )
            if rows is not None:
                model.slots.owner[self._table.row[handles]] = handles
            if fresh.owner or fresh.closes:
                for handle, session_id in zip(handles.tolist(), fresh.ids[part], strict=True):
                    fields = at_birth(fresh.owner, fresh.closes.get(session_id))
                    if fields:
                        self._table.fields[handle] = fields
            self._expiry.watch(handles)
            if not fresh.is_pinned:
                self._follow(handles, model, fresh.epoch)


def _records(fresh: Fresh) -> Sequence[tuple[str, Stored]]:
    if not fresh.ids:
        return ()
    model, ready = fresh.model, fresh.ready
    mark = model.mark(fresh.epoch, is_pinned=fresh.is_pinned)
    if fresh.closes:  # the records of one template have the same length
        fields = [
            joined(mark, at_birth(fresh.owner, fresh.closes.get(session_id, ()))) for session_id in fresh.ids
        ]
    else:
        alike = joined(mark, at_birth(fresh.owner, None))
        fields = [alike] * len(fresh.ids) if alike else []
    template = RecordTemplate(
        fresh.ids,
        fingerprint=model.program.fingerprint,
        model=model.name,
        opened_with=fresh.opened_with,
        opened_digest=0 if fresh.opened_digests is None else fresh.opened_digests,
        max_idle_ms=fresh.max_idle_ms,
        created=fresh.created,
        row_bytes=model.arena.row_bytes,
        batch_size=fresh.batch_size,
        fields=fields,
    )
    model.arena.pack_into(fresh.rows, template.rows[:ready])
    if fresh.states is None:
        template.rows[ready:] = np.tile(
            model.arena.pack_initial(model.program.initial), (1, fresh.batch_size)
        )
    elif ready < len(fresh.ids):
        count, start = (len(fresh.ids) - ready) * fresh.batch_size, ready * fresh.batch_size
        packed = model.arena.pack_states([array[start:] for array in fresh.states], count)
        template.rows[ready:] = packed.reshape(len(fresh.ids) - ready, -1)
    return template.fill(
        revisions=fresh.revisions,
        positions=fresh.positions,
        request_ids=0,
        last_used=fresh.created,
        replies=0,
    )
