"""A session begins: opened or forked, alone or with others of its call.

All ways are one way. A call is described by `NewSessions`. Then, until it has an answer or another server was faster too
often: look at the ids, find what an earlier attempt of the call has made, reserve the ids, take rows, charge quotas, have
the store keep the records (all of them or none), enter the table. The ids of a repeated call follow from its request id, or
are given, and sessions remember the request id: so the call is done once, also after a restart.

On a shared store, attempts of one call may run on several servers at the same time. One that was held up may continue
long after another was answered. An attempt that is refused for good deletes what it made, but only sessions that have
the stamp it wrote. So an attempt that answers with sessions of an earlier attempt first gives them a stamp of its own:
from then on nobody deletes them.
"""

from __future__ import annotations

import asyncio
import dataclasses
import functools
from collections.abc import Awaitable, Callable, Coroutine, Sequence
from typing import Any, NamedTuple, TypeVar

import numpy as np

from stepwell_server.core import namespaces
from stepwell_server.core.callers import Caller
from stepwell_server.core.exactly_once import Kind
from stepwell_server.core.quotas import SESSION_BYTES, Usage
from stepwell_server.core.sessions import Handles
from stepwell_server.core.slots import Rows
from stepwell_server.engine.api import OpenManyResult, SessionInfo
from stepwell_server.engine.change import MAX_TRIES, changed_elsewhere
from stepwell_server.engine.commit.committer import outcome_unknown
from stepwell_server.engine.commit.group_commit import GroupCommit
from stepwell_server.engine.commit.store_policy import StorePolicy
from stepwell_server.engine.content import require_same_opening
from stepwell_server.engine.eager import Rest, finish, start
from stepwell_server.engine.intake.queues import RowQueue
from stepwell_server.engine.quotas import Quotas
from stepwell_server.engine.sessions.directory import Context
from stepwell_server.engine.sessions.end import Expiry
from stepwell_server.engine.sessions.lookup import LookupResult
from stepwell_server.engine.state.fields import Mark, at_birth, joined
from stepwell_server.engine.state.model import Model
from stepwell_server.engine.types import U64, Array, Members
from stepwell_server.errors import (
    ServerError,
    SessionGone,
    Unavailable,
)
from stepwell_server.logs import Log
from stepwell_server.store import counts
from stepwell_server.store.base import (
    NO_STAMPS,
    Answer,
    Batch,
    CommitResult,
    as_server_error,
    new_stamp,
    stamped,
)
from stepwell_server.store.record import JoinedPuts, RecordBytes, RecordTemplate, decode_header

_log = Log("engine.begin")

_NO_ROWS: Rows = np.zeros(0, np.intp)

_T = TypeVar("_T")


def sessions_of(array: Array, places: Members, batch_size: int) -> Array:
    """The rows of some sessions, `(len(places) * batch_size, ...)`, of sessions whose rows lie one after the other."""
    by_session = array.reshape(-1, batch_size, *array.shape[1:])
    return by_session[places].reshape(-1, *array.shape[1:])


class CreatedSessions(NamedTuple):
    """Sessions of one model that are in the store, or may be."""

    ids: Sequence[str]
    stamp: int
    """Of the records of those that nobody has changed since, or taken over."""
    model: str


@dataclasses.dataclass(slots=True, kw_only=True)
class Call:
    """A call that begins n sessions, as far as it says which: the same call sent again says the same."""

    ids: Sequence[str]
    are_named: bool
    """The caller chose the ids."""
    field: str
    """The request's field for the ids."""
    request_id: int
    """0 for none."""
    kind: Kind
    content: U64
    """`(n,)`, what it says of each: see `content`."""
    undos: list[CreatedSessions] = dataclasses.field(default_factory=list)
    """What attempts here have made, or taken over: it is deleted if the call is refused for good."""


@dataclasses.dataclass(slots=True, kw_only=True)
class NewSessions(Call):
    """Sessions of one model that are to begin: columns of n sessions, and what is the same for all of them."""

    model: Model
    batch_size: int
    max_idle_ms: int
    """Limit of each for being unused; 0: it has no limit of its own."""
    owner: str
    """The caller for whom the sessions count, beside their tenant: see `Quotas.owner`."""
    min_revisions: U64
    """`(n,)`. They begin with these at least."""
    positions: U64
    """`(n,)`."""
    states: Sequence[Array] | None = None
    """`(n * batch_size, ...)` each, in the model's order; None: the model's initial state."""
    is_pinned: bool = False
    """They stay on this version of the model."""
    is_version: bool = False
    """The call asks for this version by its number."""
    is_single: bool = False
    """The call is about one session: the arena makes room for it, and the log names it."""
    are_absent: bool = False
    """The call has seen that no session has these ids, in the moment in which they are reserved."""
    epoch: int = -1
    """Of the model when the call came; moves after it take the sessions along. -1: the model's epoch now."""

    # what each attempt finds or draws

    rows: Rows = dataclasses.field(default_factory=lambda: _NO_ROWS)
    """The arena's rows, with their states, of the first sessions, one after the other. The others begin paged out."""
    revisions: U64 = dataclasses.field(default_factory=lambda: NO_STAMPS)
    """`(n,)`: with which they begin. An id that had a session before continues its revisions: see `Past`."""
    follows: U64 = dataclasses.field(default_factory=lambda: NO_STAMPS)
    """`(n,)`: see `Past.stamp`."""
    closes: dict[str, tuple[int, ...]] = dataclasses.field(default_factory=dict)
    """By the id: see `Past.closes`."""
    stamp: int = 0
    """Of all of their records: see `Store.new_stamp`."""
    created: float = 0.0
    """Seconds since the epoch."""
    opened_with: int = 0
    """The request id, or a drawn number: sessions of the same id never share it."""

    def __post_init__(self) -> None:
        if self.epoch < 0:
            self.epoch = self.model.epoch

    @property
    def opened_digests(self) -> U64:
        """`(n,)`: digests of what the call says of each; see `core.exactly_once`."""
        return self.content | self.model.digest_prefixes[self.kind]

    @property
    def usage(self) -> Usage:
        """What each takes of its tenant's quotas."""
        own_bytes = self.batch_size * self.model.arena.row_bytes + len(at_birth(self.owner, None))
        return Usage(1, self.batch_size, SESSION_BYTES + own_bytes)

    @property
    def ready(self) -> int:
        """How many have rows."""
        return len(self.rows) // self.batch_size

    @property
    def is_repeatable(self) -> bool:
        """The same call can continue with what this attempt made: of many sessions it must be known whose they are."""
        return len(self.ids) == 1 or self.request_id != 0

    def only(self, places: Members) -> NewSessions:
        """Some of them, before they have rows; itself if they are all."""
        if len(places) == len(self.ids):
            return self
        return dataclasses.replace(
            self,
            ids=[self.ids[place] for place in places.tolist()],
            content=self.content[places],
            min_revisions=self.min_revisions[places],
            positions=self.positions[places],
            states=None
            if self.states is None
            else [sessions_of(array, places, self.batch_size) for array in self.states],
        )

    def part(self, part: slice) -> NewSessions:
        """Some of them, with their rows; itself if they are all."""
        if part.stop - part.start == len(self.ids):
            return self
        own = slice(part.start * self.batch_size, part.stop * self.batch_size)
        return dataclasses.replace(
            self,
            ids=self.ids[part],
            content=self.content[part],
            min_revisions=self.min_revisions[part],
            positions=self.positions[part],
            states=None if self.states is None else [array[own] for array in self.states],
            rows=self.rows[own],
            revisions=self.revisions[part],
            follows=self.follows[part],
        )

    def answer(self, first: SessionInfo) -> OpenManyResult:
        """The answer to the call that has made them; `first` is the first of them, as it began."""
        return OpenManyResult(
            self.ids,
            self.model.name,
            self.model.program.fingerprint,
            self.batch_size,
            self.revisions,
            self.positions,
            np.full(len(self.ids), self.opened_with, np.uint64),
            first,
            version=self.model.version,
        )


Find = Callable[[NewSessions, LookupResult], Awaitable[_T | Members | None]]
"""Finds the answer to a call in what exists already, or the places of the sessions that are to begin; None: look again."""


class Attempts:
    """Finds what earlier attempts of a call have made. Lives on the event loop."""

    def __init__(self, context: Context, commits: GroupCommit) -> None:
        self._context = context
        self._commits = commits
        self._table = context.table
        self._directory = context.directory
        self._pieces = context.directory.pieces

    def answer(self, ids: Sequence[str], handles: Handles, seen: LookupResult) -> OpenManyResult:
        """What live sessions are, by what another server made of them while something is under way here.

        Raises:
            SessionGone: one of them has ended there.
        """
        table, models = self._table, self._directory.models
        revisions, positions = table.revision[handles], table.position[handles]
        for place, session_id in enumerate(ids):
            if seen.newer(session_id) is not None:
                info = self._directory.current_info(int(handles[place]), seen, is_same=True)
                revisions[place], positions[place] = info.revision, info.position
        indexes = np.unique(table.model[handles])
        versions = np.zeros(len(ids), np.uint64)
        for index in indexes.tolist():
            versions[table.model[handles] == index] = models.by_index[index].version
        own = models.by_handle(int(handles[0]))
        return OpenManyResult(
            ids,
            own.name,
            own.program.fingerprint if len(indexes) == 1 else "",
            int(table.batch_size[handles[0]]),
            revisions,
            positions,
            table.opened_with[handles],
            self._directory.current_info(int(handles[0]), seen),
            version=int(versions[0]),
            versions=versions if len(indexes) > 1 else None,
        )

    def require_same(self, call: Call, part: slice, handles: Handles) -> None:
        """Refuse a call whose request id made some of these sessions by another call; -1 stands for none.

        Raises:
            InvalidInput: it did.
        """
        ids, content = call.ids[part], call.content[part]
        own = np.flatnonzero((handles >= 0) & (self._table.opened_with[handles] == call.request_id))
        if call.request_id and len(own):
            model = self._directory.models.by_handle(int(handles[own[0]]))
            names = ids if len(own) == len(ids) else [ids[place] for place in own.tolist()]
            stored = self._table.opened_digest[handles[own]]
            require_same_opening(model, names, stored, call.kind, content[own])

    async def find(self, call: Call, seen: LookupResult) -> OpenManyResult | Members | None:
        """The answer of an earlier attempt of the call, or else the places of the sessions that are to begin.

        Those are all of them, or those that an earlier attempt did not make. A call is only completed if nobody has
        changed, closed or taken any of its sessions: else it is judged as a new one.

        Returns:
            None: something has changed meanwhile, and all must be looked at again.

        Raises:
            InvalidInput: another call with the request id has made some of them.
            SessionExists: some are another call's, and some this one's.
            Unavailable, OutcomeUnknown: they exist, and it is not sure that they stay.
        """
        ids, request_id, table = call.ids, call.request_id, self._table
        every: Members = np.arange(len(ids))
        handles = self._directory.find_all(ids, seen)
        there = handles >= 0
        if not request_id or not there.any():
            return every
        self.require_same(call, slice(0, len(ids)), handles)
        is_own = table.opened_with[handles[there]] == request_id
        if not is_own.any():
            return every
        if not is_own.all():
            others = np.flatnonzero(there)[~is_own].tolist()
            self._directory.require_new(call.field, [ids[place] for place in others], seen)
        if there.all():
            return await self._answer_again(call, handles, seen)
        missing = [ids[place] for place in np.flatnonzero(~there).tolist()]
        if table.request_id[handles[there]].any() or len(self._directory.unusable(missing, seen)):
            return every
        if any(self._directory.ended(session_id, seen) is not None for session_id in missing):
            return every
        made = [ids[place] for place in np.flatnonzero(there).tolist()]
        stamp = self._directory.store.new_stamp()
        if not await self.take_over(made, request_id, stamp):
            return None
        call.undos.append(
            CreatedSessions(made, stamp, self._directory.models.by_handle(int(handles[there][0])).name)
        )
        return every[~there]

    async def _answer_again(self, call: Call, handles: Handles, seen: LookupResult) -> OpenManyResult | None:
        """The answer to a call that has made all of its sessions; None: one of them has ended, or is another one by now."""
        try:
            answer = self.answer(call.ids, handles, seen)
        except SessionGone:
            await self.free(call.ids)
            return None
        # nobody deletes a session that is alone in its call
        if len(handles) > 1 and not await self.take_over(
            call.ids, call.request_id, self._directory.store.new_stamp()
        ):
            return None
        self._context.observer.replayed(answer.model, call.kind.name.lower(), len(handles))
        return dataclasses.replace(answer, replayed=True)

    async def free(self, session_ids: Sequence[str]) -> None:
        """Return when what is under way now for some sessions has ended."""
        for session_id in session_ids:
            handle = self._table.find(session_id)
            if handle is not None:
                await self._context.queues.free(handle)

    async def take_over(self, ids: Sequence[str], request_id: int, stamp: int) -> bool:
        """Give sessions that an attempt of a call has made a new stamp; False if one of them is gone.

        Those that were changed since have another one already. If the store says at once that all of them are as they
        were, nobody else can delete them, and they need none.
        """
        handles = self._table.find_all(ids)
        if (handles >= 0).all() and self._directory.are_as_stored(handles):
            return True
        async for part in self._pieces.of(ids):
            if not await self._take_over_part(ids[part], request_id, stamp):
                return False
        return True

    async def _take_over_part(self, ids: Sequence[str], request_id: int, stamp: int) -> bool:
        for _ in range(MAX_TRIES):
            puts: list[tuple[str, RecordBytes]] = []
            follows: list[int] = []
            for session_id, each in zip(ids, await self._directory.store.fetch(ids), strict=True):
                if each.record is None:
                    return False
                header = decode_header(session_id, each.record)
                if header.opened_with != request_id:
                    return False
                if not header.request_id:
                    puts.append((session_id, each.record))
                    follows.append(each.stamp)
            if not puts or await self._stamp(puts, np.array(follows, np.uint64), stamp):
                return True
        raise changed_elsewhere(ids[0])

    async def _stamp(self, puts: Sequence[tuple[str, RecordBytes]], follows: U64, stamp: int) -> bool:
        """Write records as they are, with a new stamp; False if one was changed meanwhile."""

        def done(committed: Answer) -> None:
            if isinstance(committed, CommitResult):
                self._set_stamps(puts, follows, stamp, committed)

        batch = Batch(puts=puts, follows=follows, stamps=stamped(stamp, len(puts)))
        committed = await self._commits.keep(batch, len(puts), done)
        if isinstance(committed, ServerError):
            raise committed
        if committed.unknown:
            raise outcome_unknown()
        return not committed.conflicts

    def _set_stamps(
        self, puts: Sequence[tuple[str, RecordBytes]], follows: U64, stamp: int, committed: CommitResult
    ) -> None:
        """Note in the table what its sessions are stamped with now."""
        table = self._table
        for (session_id, _), before in zip(puts, follows.tolist(), strict=True):
            handle = table.find(session_id)
            is_kept = session_id not in committed.conflicts and session_id not in committed.unknown
            if is_kept and handle is not None and int(table.stamp[handle]) == before:
                table.stamp[handle] = stamp


class SessionCreator:
    """Begins sessions. Lives on the event loop."""

    def __init__(
        self,
        context: Context,
        commits: GroupCommit,
        policy: StorePolicy,
        expiry: Expiry,
        quotas: Quotas | None,
        row_queue: RowQueue,
        follow: Callable[[Handles, Model, int], None],
    ) -> None:
        """`follow` takes sessions along with the moves of their model that were made while they began."""
        self._context = context
        self._table = context.table
        self._directory = context.directory
        self._pieces = context.directory.pieces
        self.attempts = Attempts(context, commits)
        self._commits = commits
        self._policy = policy
        self._expiry = expiry
        self._quotas = quotas
        self._row_queue = row_queue
        self._follow = follow
        self._running: set[asyncio.Task[Any]] = set()
        """Commits that wait for the store, whatever becomes of their calls."""

    def limit(self, asked_ms: int | None, *, is_named: bool) -> int:
        """See `IdleLimits.of_new`."""
        return self._expiry.limits.of_new(asked_ms, is_named=is_named)

    def owner(self, caller: Caller, session_id: str = "") -> str:
        """See `Quotas.owner`."""
        return "" if self._quotas is None else self._quotas.owner(caller, session_id)

    # -------------------------------------------------------------------------------------------------------- the path

    async def look(self, session_ids: Sequence[str]) -> LookupResult:
        """What the store has of ids while nobody makes sessions of them; what their tenants have is known then.

        A session of them that has ended on another server while something is under way for it here ends first.

        Raises:
            Unavailable: the store cannot be asked now.
        """
        while True:
            if self._quotas is not None:
                await self._quotas.refresh(session_ids)
            seen = await self._directory.look(session_ids, reread=True)
            ended = seen.ended_elsewhere()
            if ended:
                await self.attempts.free(ended)
            elif not self._context.removal.are_pending(session_ids):
                return seen

    async def begin_many(self, new: NewSessions) -> OpenManyResult:
        """Begin sessions, unless an earlier attempt of the call has: see `begin`."""
        found = await self.begin(new, self.attempts.find)
        return found if isinstance(found, OpenManyResult) else new.answer(found)

    async def begin(self, every: NewSessions, find: Find[_T]) -> _T | SessionInfo:
        """Begin sessions, all or none, unless `find` has another answer to the call. To be cancelled undoes nothing.

        Returns:
            That answer, or else the first of the sessions, as it began.
        """
        try:
            for _ in range(MAX_TRIES):
                seen = await self.look(every.ids)
                found = await find(every, seen)
                if found is None:
                    continue
                if not isinstance(found, np.ndarray):
                    return found
                new = every.only(found)
                first = await self._attempt(new, seen)
                if first is not None and new is every:
                    return first
                # all of them exist now, or another call or server was faster with one: the next look says which
            raise changed_elsewhere(every.ids[0])
        except Unavailable:  # the call comes again, and continues with what it has made
            raise
        except ServerError:
            await self.undo(every)
            raise

    async def _attempt(self, new: NewSessions, seen: LookupResult) -> SessionInfo | None:
        """Begin sessions that were not there when the store was `seen`; None: another call or server was faster.

        Returns:
            The first of them, as it began.
        """
        if not new.are_named:
            self._directory.require_not_gone(new.ids[0], seen)
        if not await self._reserve(new, seen):
            return None
        try:
            await self._prepare(new)
        except BaseException:
            self._give_up(new)
            raise
        first = await self.run_shielded(self._create(new))
        if first is None:
            await self._require_still_open(new.ids)
            return None
        self._report(new)
        return first

    async def run_shielded(self, work: Coroutine[Any, Any, _T]) -> _T:
        """Run what must not end in the middle if the caller is cancelled."""
        result = start(work)
        if not isinstance(result, Rest):
            return result
        task = asyncio.ensure_future(finish(result))
        self._running.add(task)
        task.add_done_callback(self._ended)
        return await asyncio.shield(task)

    def _ended(self, task: asyncio.Task[Any]) -> None:
        self._running.discard(task)
        if not task.cancelled():
            task.exception()  # nobody else asks for it if the caller was cancelled

    async def _reserve(self, new: NewSessions, seen: LookupResult) -> bool:
        """Reserve the ids, and find what they had before; False if another call is making a session of one of them.

        Raises:
            ServerError: one must not begin, and none is reserved.
        """
        removal = self._context.removal
        pending, reserved, new.closes = removal.reserve(()), 0, {}
        new.revisions = np.maximum(new.min_revisions, np.uint64(self._directory.store.first_revision))
        new.follows = np.zeros(len(new.ids), np.uint64)
        try:
            async for part in self._pieces.of(new.ids):
                ids = new.ids[part]
                if not new.are_absent:
                    self._directory.require_new(new.field, ids, seen)
                if new.are_named:  # others may have had these ids
                    self._directory.require_own(ids, seen)
                if removal.are_pending(ids):
                    break
                pending = removal.reserve(ids, pending)
                reserved = part.stop
                for place, earlier in self._directory.earlier(ids, seen).items():
                    new.follows[part][place] = earlier.stamp
                    new.revisions[part][place] = max(earlier.revision, int(new.revisions[part][place]))
                    if earlier.closes:
                        new.closes[ids[place]] = earlier.closes
        finally:
            if reserved < len(new.ids):
                removal.release(new.ids[:reserved], pending)
        return reserved == len(new.ids)

    def _give_up(self, new: NewSessions) -> None:
        """Give ids and rows of sessions back that do not begin."""
        self._context.removal.release(new.ids, self._context.removal.pending[new.ids[0]])
        new.model.slots.free_resident(new.rows)
        new.rows = new.rows[:0]
        self._row_queue.check_room()

    async def _prepare(self, new: NewSessions) -> None:
        """Take rows: for one session there must be some.

        Of many, as many as there is room for have rows at once; the others come to the arena when they are stepped.

        Raises:
            NoRows: sessions with something under way have all of them.
        """
        model, slots = new.model, new.model.slots
        if new.is_single:
            new.rows = self._context.pager.take(model, new.batch_size)
        else:
            fitting = min((slots.resident_limit - slots.resident) // new.batch_size, len(new.ids))
            rows = slots.take_resident(fitting * new.batch_size)
            assert rows is not None, "there is room for them"
            new.rows = rows
        async for part in self._pieces.parts(len(new.rows), namespaces.tenant_of(new.ids[0])):
            model.arena.clear_outputs(new.rows[part])
            if new.states is None:
                model.arena.reset(new.rows[part], model.program.initial)
            else:
                model.arena.write(new.rows[part], [array[part] for array in new.states])
        new.created = self._context.clock.now()
        new.stamp = self._directory.store.new_stamp()
        new.opened_with = new.request_id or new_stamp()

    async def _create(self, new: NewSessions) -> SessionInfo | None:
        """Make sessions that are reserved and have rows; None: another server was faster with one of them.

        Returns:
            The first of them, as it began.

        Raises:
            QuotaExceeded: their tenant must not have as many; none is made.
            Unavailable: the store could not keep them; the same. Or it did not answer, and may have kept them.
        """
        quotas, usage = self._quotas, new.usage
        try:
            if quotas is not None:
                quotas.begin(new.ids, usage, new.owner)
            error = await self._keep(new)
            if quotas is not None:
                (quotas.made if error is None else quotas.cancel)(new.ids, usage)
        except BaseException:
            self._give_up(new)
            raise
        if error is not None:
            self._give_up(new)
            if error is _OVERTAKEN:
                return None
            raise error
        entered: list[Handles] = []
        async for part in self._pieces.of(new.ids):
            entered += self._enter(new.part(part), usage.bytes)
        self._expiry.watch(np.concatenate(entered))
        self._context.removal.release(new.ids, self._context.removal.pending[new.ids[0]])
        self._row_queue.check_room()  # the rows are of sessions that have nothing under way
        try:
            return self._directory.info(self._directory.find(new.ids[0], self._directory.here))
        except ServerError as gone:  # the default has moved to a version that another server has
            own = self._directory.models.versions(new.model.name)
            elsewhere = self._directory.models.elsewhere(own.name, own.chosen, new.ids[0])
            if elsewhere is None:
                raise
            raise elsewhere from gone

    async def _keep(self, new: NewSessions) -> ServerError | None:
        """Have the store keep records of sessions, of all or of none; why it did not."""
        ids, puts = new.ids, list[Sequence[tuple[str, RecordBytes]]]()
        try:
            async for part in self._pieces.of(ids):
                some = new.part(part)
                puts.append(self._policy.begin(some.ids, some.ready, functools.partial(_records, some)))
        except Exception as error:
            self._policy.after_page_in(ids)
            return as_server_error(error)
        joined = puts[0] if len(puts) == 1 else JoinedPuts([each for each in puts if each])
        batch = Batch(
            puts=joined,
            forgets=ids,
            counts=[(new.model.name, len(ids))],
            tenant_counts=counts.of_tenants([(ids[0], new.model.name)], len(ids)),
            follows=new.follows if joined else NO_STAMPS,
            stamps=stamped(new.stamp, len(joined)),
        )
        committed = await self._commits.keep(batch, len(ids))
        if isinstance(committed, ServerError):
            return committed
        conflicts = committed.conflicts.intersection(ids)
        if conflicts:
            made = CreatedSessions([i for i in ids if i not in conflicts], new.stamp, new.model.name)
            if new.is_repeatable:
                new.undos.append(made)
            else:
                await self._delete(made)
            return _OVERTAKEN
        if committed.unknown.isdisjoint(ids):
            return None
        if not new.is_repeatable:  # else it may exist, and another attempt may have been answered so
            await self._delete(CreatedSessions(ids, new.stamp, new.model.name))
        return outcome_unknown()

    async def undo(self, call: Call) -> None:
        """Delete what attempts here have made of a call that is refused for good. To be cancelled does not stop it."""
        undos, call.undos = call.undos, []
        for made in undos:
            await self.run_shielded(self._delete(made))

    async def _delete(self, made: CreatedSessions) -> None:
        """Delete sessions of a call that is refused, but those that others have changed, or taken over."""
        ids, model = made.ids, made.model
        if not ids:
            return
        batch = Batch(
            deletes=ids,
            counts=[(model, -len(ids))],
            tenant_counts=counts.of_tenants([(ids[0], model)], -len(ids)),
            delete_follows=stamped(made.stamp, len(ids)),
            undoes=ids,
        )
        undone = await self._commits.keep(batch, len(ids))
        if isinstance(undone, ServerError) or undone.unknown:
            _log.warning("sessions of a call that was refused may still be in the store", sessions=len(ids))

    def _enter(self, new: NewSessions, byte_count: int) -> list[Handles]:
        """Let the table have sessions that the store has kept."""
        ready, model, entered = new.ready, new.model, list[Handles]()
        for part, rows in ((slice(0, ready), new.rows), (slice(ready, len(new.ids)), None)):
            if not new.ids[part]:
                continue
            handles = self._table.add(
                new.ids[part],
                rows=rows,
                model=model.index,
                batch_size=new.batch_size,
                revision=new.revisions[part],
                position=new.positions[part],
                opened_with=new.opened_with,
                opened_digest=new.opened_digests[part],
                used=self._context.clock.monotonic(),
                created=new.created,
                max_idle_ms=new.max_idle_ms,
                stamp=new.stamp,
                pinned=new.is_pinned,
                bytes=byte_count,
            )
            if rows is not None:
                model.slots.owner[self._table.row[handles]] = handles
            if new.owner or new.closes:
                for handle, session_id in zip(handles.tolist(), new.ids[part], strict=True):
                    fields = at_birth(new.owner, new.closes.get(session_id))
                    if fields:
                        self._table.fields[handle] = fields
            entered.append(handles)
            if not new.is_pinned:
                self._follow(handles, model, new.epoch)
        return entered

    def _report(self, new: NewSessions) -> None:
        event = "opened" if new.kind is Kind.OPEN else "forked"
        if new.is_single:
            self._context.observer.session_event(event, new.model.name, new.ids[0])
        else:
            self._context.observer.sessions_opened(new.model.name, len(new.ids), event)

    async def _require_still_open(self, ids: Sequence[str]) -> None:
        """Refuse to continue when another server was faster, and what began there has ended already.

        It may have been this very call, sent there after it got no answer here: it is done once.

        Raises:
            Unavailable: it has ended.
        """
        seen = await self.look(ids)
        for session_id in ids:
            if self._directory.ended(session_id, seen) is not None:
                raise Unavailable(
                    f"session {session_id!r} was opened and has ended on another server meanwhile; it was not opened anew"
                )


#: Another server has made a session of one of the ids. It may have been the same call.
_OVERTAKEN = ServerError("overtaken")


def _records(whole: NewSessions, part: slice) -> Sequence[tuple[str, RecordBytes]]:
    new = whole.part(part)
    model, ready, count = new.model, new.ready, len(new.ids)
    mark = Mark(model.version, new.epoch, is_pinned=new.is_pinned)
    if new.closes:  # the records of one template have the same length
        fields = [joined(mark, at_birth(new.owner, new.closes.get(session_id, ()))) for session_id in new.ids]
    else:
        alike = joined(mark, at_birth(new.owner, None))
        fields = [alike] * count if alike else []
    template = RecordTemplate(
        new.ids,
        model.texts,
        (new.batch_size, model.arena.row_bytes),
        opened_with=new.opened_with,
        opened_digest=new.opened_digests,
        max_idle_ms=new.max_idle_ms,
        created=new.created,
        fields=fields,
    )
    model.arena.pack_into(new.rows, template.rows[:ready])
    if new.states is None:
        template.rows[ready:] = np.tile(model.arena.pack_initial(model.program.initial), (1, new.batch_size))
    elif ready < count:
        start_row = ready * new.batch_size
        packed = model.arena.pack_states(
            [array[start_row:] for array in new.states], (count - ready) * new.batch_size
        )
        template.rows[ready:] = packed.reshape(count - ready, -1)
    return template.fill(
        revisions=new.revisions,
        positions=new.positions,
        request_ids=0,
        last_used=new.created,
        replies=0,
    )
