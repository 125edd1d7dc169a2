"""Begins sessions: opened or forked, alone or with others of the same call.

There is one path for all. A call is described by `NewSessions`. It is attempted until it has an answer, or other
servers were faster too often. An attempt looks the ids up, finds sessions made by an earlier attempt of the call,
reserves the ids, takes rows, charges quotas, commits the records (all or none) and enters the sessions in the
table. The ids of a repeated call are given or derived from its request id, and sessions remember the request id. So
the call is done once, also after a restart.

On a shared store, attempts of one call may run on several servers concurrently. A delayed attempt may continue long
after another one was answered. An attempt that is refused for good deletes the sessions it made, but only those
with the stamp it wrote. So an attempt that answers with sessions of an earlier attempt first gives them a new
stamp: from then on no attempt deletes them.
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
    """The rows of the sessions at `places`, `(len(places) * batch_size, ...)`; sessions lie one after the other."""
    by_session = array.reshape(-1, batch_size, *array.shape[1:])
    return by_session[places].reshape(-1, *array.shape[1:])


class CreatedSessions(NamedTuple):
    """Sessions of one model that are, or may be, in the store."""

    ids: Sequence[str]
    stamp: int
    """The stamp of the records that have not been changed or taken over since."""
    model: str


@dataclasses.dataclass(slots=True, kw_only=True)
class Call:
    """A call that begins n sessions: the facts by which a repeated call is recognized."""

    ids: Sequence[str]
    are_named: bool
    """Whether the caller chose the ids."""
    field: str
    """The request field that holds the ids."""
    request_id: int
    """0: none."""
    kind: Kind
    content: U64
    """`(n,)`, a digest of the call's content for each session: see `content`."""
    undos: list[CreatedSessions] = dataclasses.field(default_factory=list)
    """What attempts here created or took over; it is deleted if the call is refused for good."""


@dataclasses.dataclass(slots=True, kw_only=True)
class NewSessions(Call):
    """Sessions of one model that are to begin: columns for n sessions, and values common to all."""

    model: Model
    batch_size: int
    max_idle_ms: int
    """The own idle limit of each; 0: none."""
    owner: str
    """The caller for whom the sessions count besides their tenant: see `Quotas.owner`."""
    min_revisions: U64
    """`(n,)`: the lowest revisions that they may begin with."""
    positions: U64
    """`(n,)`."""
    states: Sequence[Array] | None = None
    """`(n * batch_size, ...)` each, in the model's order; None: the model's initial state."""
    is_pinned: bool = False
    """Whether they stay on this version of the model."""
    is_version: bool = False
    """Whether the call asks for this version by number."""
    is_single: bool = False
    """Whether the call is about one session: the arena makes room for it, and the log names it."""
    are_absent: bool = False
    """Whether the call saw that no session has these ids, at the moment they are reserved."""
    epoch: int = -1
    """The model's epoch when the call arrived; later moves apply to the sessions. -1: the current epoch."""

    # set by each attempt

    rows: Rows = dataclasses.field(default_factory=lambda: _NO_ROWS)
    """Rows of the arena with the states of the first sessions, one after the other. The others begin paged out."""
    revisions: U64 = dataclasses.field(default_factory=lambda: NO_STAMPS)
    """`(n,)`: the revisions they begin with. An id that had a session before continues its revisions: see
    `EarlierSession`."""
    follows: U64 = dataclasses.field(default_factory=lambda: NO_STAMPS)
    """`(n,)`: see `EarlierSession.stamp`."""
    closes: dict[str, tuple[int, ...]] = dataclasses.field(default_factory=dict)
    """By id: see `EarlierSession.closes`."""
    stamp: int = 0
    """The stamp of all their records: see `Store.new_stamp`."""
    created: float = 0.0
    """Seconds since the epoch."""
    opened_with: int = 0
    """The request id, or a random number: sessions of the same id never share it."""

    def __post_init__(self) -> None:
        if self.epoch < 0:
            self.epoch = self.model.epoch

    @property
    def opened_digests(self) -> U64:
        """`(n,)`: digests of the call's content; see `core.exactly_once`."""
        return self.content | self.model.digest_prefixes[self.kind]

    @property
    def usage(self) -> Usage:
        """What each uses of its tenant's quotas."""
        own_bytes = self.batch_size * self.model.arena.row_bytes + len(at_birth(self.owner, None))
        return Usage(1, self.batch_size, SESSION_BYTES + own_bytes)

    @property
    def ready(self) -> int:
        """How many have rows."""
        return len(self.rows) // self.batch_size

    @property
    def is_repeatable(self) -> bool:
        """Whether a repeated call can continue with what this attempt made: it must be able to recognize it."""
        return len(self.ids) == 1 or self.request_id != 0

    def only(self, places: Members) -> NewSessions:
        """The sessions at some places, before they have rows; itself if that is all of them."""
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
        """A slice of the sessions, with their rows; itself if that is all of them."""
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
        """The answer to the call that created them; `first` describes the first of them, as it began."""
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
"""Returns the answer to a call from existing sessions, or the places of sessions to begin; None: look again."""


class Attempts:
    """Finds what earlier attempts of a call created. Lives on the event loop."""

    def __init__(self, context: Context, commits: GroupCommit) -> None:
        self._context = context
        self._commits = commits
        self._table = context.table
        self._directory = context.directory
        self._pieces = context.directory.pieces

    def answer(self, ids: Sequence[str], handles: Handles, seen: LookupResult) -> OpenManyResult:
        """Describe live sessions, including changes by another server while they are active here.

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
        """Refuse a call whose request id created some of these sessions in another call; -1: no session.

        Raises:
            InvalidInput: the request id was used by another call.
        """
        ids, content = call.ids[part], call.content[part]
        own = np.flatnonzero((handles >= 0) & (self._table.opened_with[handles] == call.request_id))
        if call.request_id and len(own):
            model = self._directory.models.by_handle(int(handles[own[0]]))
            names = ids if len(own) == len(ids) else [ids[place] for place in own.tolist()]
            stored = self._table.opened_digest[handles[own]]
            require_same_opening(model, names, stored, call.kind, content[own])

    async def find(self, call: Call, seen: LookupResult) -> OpenManyResult | Members | None:
        """The answer of an earlier attempt of the call, or the places of the sessions that are to begin.

        Those are all sessions, or those that an earlier attempt did not create. A call is only completed if none of
        its sessions was changed, closed or taken by others; otherwise it is judged as a new one.

        Returns:
            None: something changed meanwhile, and everything must be looked up again.

        Raises:
            InvalidInput: another call with the request id created some of them.
            SessionExists: some are another call's, and some this one's.
            Unavailable, OutcomeUnknown: they exist, but may not last.
        """
        ids, request_id, table = call.ids, call.request_id, self._table
        every: Members = np.arange(len(ids))
        if not request_id or not await self._is_any(ids, seen):
            return every
        handles = self._directory.find_all(ids, seen)
        there = handles >= 0
        if not there.any():
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

    async def _is_any(self, ids: Sequence[str], seen: LookupResult) -> bool:
        """Whether any of the sessions exists."""
        async for part in self._pieces.of(ids):
            if (self._directory.find_all(ids[part], seen) >= 0).any():
                return True
        return False

    async def _answer_again(self, call: Call, handles: Handles, seen: LookupResult) -> OpenManyResult | None:
        """The answer to a call that created all of its sessions; None: one has ended or was replaced."""
        try:
            answer = self.answer(call.ids, handles, seen)
        except SessionGone:
            await self.free(call.ids)
            return None
        # a session that is alone in its call is never deleted
        if len(handles) > 1 and not await self.take_over(
            call.ids, call.request_id, self._directory.store.new_stamp()
        ):
            return None
        self._context.observer.replayed(answer.model, call.kind.name.lower(), len(handles))
        return dataclasses.replace(answer, replayed=True)

    async def free(self, session_ids: Sequence[str]) -> None:
        """Return when the current operations on some sessions have ended."""
        for session_id in session_ids:
            handle = self._table.find(session_id)
            if handle is not None:
                await self._context.queues.free(handle)

    async def take_over(self, ids: Sequence[str], request_id: int, stamp: int) -> bool:
        """Give a new stamp to sessions that an attempt of a call created; False if one has ended.

        Sessions changed since have another stamp already. If the store says at once that all of them are unchanged,
        no other server can delete them, and they need none.
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
        """Write records unchanged, with a new stamp; False if one was changed meanwhile."""

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
        """Update the stamps in the table."""
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
        """`follow` applies moves of the model that were made while the sessions began."""
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
        """Commits in progress; they continue if their calls are cancelled."""

    def limit(self, asked_ms: int | None, *, is_named: bool) -> int:
        """See `IdleLimits.of_new`."""
        return self._expiry.limits.of_new(asked_ms, is_named=is_named)

    def owner(self, caller: Caller, session_id: str = "") -> str:
        """See `Quotas.owner`."""
        return "" if self._quotas is None else self._quotas.owner(caller, session_id)

    # -------------------------------------------------------------------------------------------------------- the path

    async def look(self, session_ids: Sequence[str]) -> LookupResult:
        """Look ids up in the store while no session is being created with them, and refresh their tenants' usage.

        Sessions that ended on another server while active here are ended here first.

        Raises:
            Unavailable: the store cannot be asked now.
        """
        while True:
            if self._quotas is not None:
                await self._quotas.refresh(session_ids[:1])  # all are of one tenant
            seen = await self._directory.look(session_ids, reread=True)
            ended = seen.ended_elsewhere()
            if ended:
                await self.attempts.free(ended)
            elif not self._context.removal.are_pending(session_ids):
                return seen

    async def begin_many(self, new: NewSessions) -> OpenManyResult:
        """Begin sessions, unless an earlier attempt of the call did: see `begin`."""
        found = await self.begin(new, self.attempts.find)
        return found if isinstance(found, OpenManyResult) else new.answer(found)

    async def begin(self, every: NewSessions, find: Find[_T]) -> _T | SessionInfo:
        """Begin sessions, all or none, unless `find` has another answer to the call. Cancelling undoes nothing.

        Returns:
            That answer, or a description of the first session, as it began.
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
                # either all of them exist now, or another call or server was faster with one: the next lookup
                # shows which
            raise changed_elsewhere(every.ids[0])
        except Unavailable:  # the caller repeats the call, which continues with what was created
            raise
        except ServerError:
            await self.undo(every)
            raise

    async def _attempt(self, new: NewSessions, seen: LookupResult) -> SessionInfo | None:
        """Begin sessions that did not exist when the store was `seen`; None: another call or server was faster.

        Returns:
            A description of the first session, as it began.
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
        """Run work that must complete even if the caller is cancelled."""
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
            task.exception()  # retrieve the error, in case the caller was cancelled

    async def _reserve(self, new: NewSessions, seen: LookupResult) -> bool:
        """Reserve the ids, and find their earlier sessions; False if another call is creating one of them.

        Raises:
            ServerError: one must not begin; none is reserved.
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
                if new.are_named:  # these ids may have had sessions before
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
        """Release ids and rows of sessions that do not begin."""
        self._context.removal.release(new.ids, self._context.removal.pending[new.ids[0]])
        new.model.slots.free_resident(new.rows)
        new.rows = new.rows[:0]
        self._row_queue.check_room()

    async def _prepare(self, new: NewSessions) -> None:
        """Take rows: a single session must get some.

        Of many sessions, as many as fit get rows at once; the others enter the arena when they are stepped.

        Raises:
            NoRows: active sessions have all rows.
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
        """Commit sessions that are reserved and have rows; None: another server was faster with one of them.

        Returns:
            A description of the first session, as it began.

        Raises:
            QuotaExceeded: their tenant may not have as many; none is created.
            Unavailable: the store could not keep them; none is created. Or it did not answer, and may have kept
                them.
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
        self._row_queue.check_room()  # the rows belong to idle sessions
        try:
            return self._directory.info(self._directory.find(new.ids[0], self._directory.here))
        except ServerError as gone:  # the default has moved to a version that only another server has
            own = self._directory.models.versions(new.model.name)
            elsewhere = self._directory.models.elsewhere(own.name, own.chosen, new.ids[0])
            if elsewhere is None:
                raise
            raise elsewhere from gone

    async def _keep(self, new: NewSessions) -> ServerError | None:
        """Store the sessions' records, all or none; return the error if that failed."""
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
            forgets=[ids[place] for place in np.flatnonzero(new.follows).tolist()],
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
        if (
            not new.is_repeatable
        ):  # otherwise it may exist, and another attempt may have been answered with it
            await self._delete(CreatedSessions(ids, new.stamp, new.model.name))
        return outcome_unknown()

    async def undo(self, call: Call) -> None:
        """Delete what attempts here created for a call that is refused for good. Continues if cancelled."""
        undos, call.undos = call.undos, []
        for made in undos:
            await self.run_shielded(self._delete(made))

    async def _delete(self, made: CreatedSessions) -> None:
        """Delete sessions of a refused call, except those that were changed or taken over."""
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
        """Enter stored sessions in the table."""
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
        """Refuse to continue if another server was faster, and its sessions have ended already.

        It may have served this same call, sent there after a missing answer here: the call is done once.

        Raises:
            Unavailable: a session has ended.
        """
        seen = await self.look(ids)
        for session_id in ids:
            if self._directory.ended(session_id, seen) is not None:
                raise Unavailable(
                    f"session {session_id!r} was opened on another server meanwhile, and has ended; it was not opened again"
                )


#: Another server created a session with one of the ids, possibly for the same call.
_OVERTAKEN = ServerError("overtaken")


def _records(whole: NewSessions, part: slice) -> Sequence[tuple[str, RecordBytes]]:
    new = whole.part(part)
    model, ready, count = new.model, new.ready, len(new.ids)
    mark = Mark(model.version, new.epoch, is_pinned=new.is_pinned)
    if new.closes:  # the records of a template have the same length
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
