"""A session begins: opened or forked, alone or with others of its call.

All ways are one way. A call is described by `NewSessions`. Then, until it has an answer or another server was faster too
often: look at the ids, find what an earlier attempt of the call has made, reserve the ids, take rows, charge quotas, have
the store keep the records (all of them or none), enter the table. The ids of a repeated call follow from its request id, or
are given, and sessions remember the request id: so the call is done once, also after a restart.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
from collections.abc import Awaitable, Callable, Coroutine, Sequence
from typing import Any, TypeVar

import numpy as np

from stepwell_server.core import namespaces
from stepwell_server.core.callers import ANYBODY, Caller
from stepwell_server.core.exactly_once import Kind
from stepwell_server.core.sessions import Handles
from stepwell_server.engine.api import Opened, SessionInfo
from stepwell_server.engine.change import MAX_TRIES, changed_elsewhere
from stepwell_server.engine.commit.committer import not_known
from stepwell_server.engine.commit.policy import StorePolicy
from stepwell_server.engine.content import content_of_open
from stepwell_server.engine.eager import Rest, finish, start
from stepwell_server.engine.intake.validation import check_finite_state
from stepwell_server.engine.sessions.attempt import Attempts, Call, Made, NewSessions, OpenedMany
from stepwell_server.engine.sessions.context import Context
from stepwell_server.engine.sessions.directory import MAX_SESSIONS_PER_CALL, require_session_id
from stepwell_server.engine.sessions.lookup import Seen
from stepwell_server.engine.state.fields import Mark, at_birth, joined
from stepwell_server.engine.state.model import Model
from stepwell_server.engine.types import Members, Tensors
from stepwell_server.errors import (
    InvalidInput,
    ModelMismatch,
    ModelNotFound,
    ServerError,
    SessionExists,
    SessionGone,
    Unavailable,
)
from stepwell_server.logs import Log
from stepwell_server.store import counts
from stepwell_server.store.base import NO_STAMPS, Batch, Committed, as_server_error, new_stamp, stamped
from stepwell_server.store.record import Joined, RecordTemplate, Stored

_log = Log("engine.begin")

_T = TypeVar("_T")
Find = Callable[[NewSessions, Seen], Awaitable[_T | Members | None]]
"""Finds the answer to a call in what exists already, or the places of the sessions that are to begin; None: look again."""


class Begin:
    """Begins sessions. Lives on the event loop."""

    def __init__(
        self,
        context: Context,
        policy: StorePolicy,
        follow: Callable[[Handles, Model, int], None],
    ) -> None:
        """`follow` takes sessions along with the moves of their model that were made while they began."""
        self._context = context
        self._table = context.table
        self._directory = context.directory
        self._pieces = context.directory.pieces
        self.attempts = Attempts(context)
        self._policy = policy
        self._follow = follow
        self._running: set[asyncio.Task[Any]] = set()
        """Commits that wait for the store, whatever becomes of their calls."""

    # --------------------------------------------------------------------------------------------------------- opening

    async def open(
        self,
        model: str,
        *,
        session_id: str = "",
        batch_size: int = 1,
        state: Tensors | None = None,
        must_be_new: bool = False,
        request_id: int = 0,
        fingerprint: str = "",
        max_idle_ms: int | None = None,
        namespace: str = "",
        who: Caller = ANYBODY,
    ) -> Opened:
        """Open a session, or resume the live one of that id.

        `max_idle_ms` is the session's own limit if it begins: 0 for none, None for what the server gives
        (`IdleLimits.of_new`). A resumed session keeps its limit. One without a name gets an id in the `namespace`.

        Raises:
            ModelNotFound, ModelMismatch, InvalidInput, SessionExists, Overloaded, Unavailable
        """
        self._context.require_open()
        served = self._directory.models.by_name(model)
        served.require_fingerprint(fingerprint)
        served.require_batch_size(batch_size)
        if session_id:
            require_session_id("session_id", session_id)
        name = session_id or self._directory.ids.make(request_id, namespace=namespace)
        new = NewSessions(
            ids=[name],
            are_named=bool(session_id),
            field="session_id",
            request_id=request_id,
            kind=Kind.OPEN,
            content=np.zeros(1, np.uint64),
            model=served,
            batch_size=batch_size,
            max_idle_ms=self.limit(max_idle_ms, is_named=bool(session_id)),
            owner=self.owner(who),
            least_revisions=np.zeros(1, np.uint64),
            positions=np.zeros(1, np.uint64),
            is_pinned=self._directory.models.is_pinned(model),
            is_version="@" in model,
            is_single=True,
            are_absent=True,  # else it resumes the session
        )

        async def find(new: NewSessions, seen: Seen) -> Opened | OpenedMany | Members | None:
            handle = self._live(name, seen, must_be_new)
            if handle is None:
                new.states = check_finite_state(served.program, state, batch_size)
                new.content = content_of_open(model, batch_size, max_idle_ms, new.states or ())
                return np.zeros(1, np.intp)
            if new.is_version:
                self._directory.require_version(handle, served)
            if not request_id or int(self._table.opened_with[handle]) != request_id:
                return await self._resume(new, handle, seen, must_be_new=must_be_new)
            # a state that its version does not take is another one than that of the first attempt
            new.content = np.zeros(1, np.uint64)
            with contextlib.suppress(InvalidInput):
                values = check_finite_state(
                    self._directory.models.by_handle(handle).program, state, batch_size
                )
                new.content = content_of_open(model, batch_size, max_idle_ms, values or ())
            return await self.attempts.find(new, seen)

        made: Opened | OpenedMany = await self.begin(new, find)
        return made if isinstance(made, Opened) else Opened(made.first, replayed=made.replayed)

    def _live(self, name: str, seen: Seen, must_be_new: bool) -> int | None:
        try:
            return self._directory.live(name, seen)
        except (ModelMismatch, ModelNotFound) as error:
            if must_be_new:  # it exists, whatever it belongs to
                raise _exists(name) from error
            raise

    async def _resume(self, new: NewSessions, handle: int, seen: Seen, *, must_be_new: bool) -> Opened | None:
        name, model = new.ids[0], new.model
        try:
            info = self._directory.info_now(handle, seen, is_same=True)
        except SessionGone:  # on another server, while something is under way for it here
            await self.attempts.free(new.ids)
            return None
        if must_be_new:
            raise _exists(name)
        if info.model != model.name or info.batch_size != new.batch_size:
            raise SessionExists(
                f"session {name!r} is open with model {info.model!r} and batch_size {info.batch_size};"
                f" got model {model.name!r} and batch_size {new.batch_size}",
                session_id=name,
            )
        self._context.uses.used(np.array([handle]))
        self._context.observer.session_event("resumed", model.name, name)
        return Opened(self._directory.info_now(handle, seen, is_same=True), resumed=True)

    async def open_many(
        self,
        model: str,
        *,
        count: int = 0,
        session_ids: Sequence[str] = (),
        batch_size: int = 1,
        request_id: int = 0,
        max_idle_ms: int | None = None,
        namespace: str = "",
        who: Caller = ANYBODY,
        resume: bool = False,
    ) -> OpenedMany:
        """Open many sessions: all of them or none. The `namespace`, and errors, are as of `open`.

        Where a shared store does not say what it kept, some of them may exist: the same call makes the others when it
        comes again, here or on another server. With `resume`, live ones of `session_ids` are resumed, and the others are
        opened.
        """
        self._context.require_open()
        served = self._directory.models.by_name(model)
        served.require_batch_size(batch_size)
        if session_ids and count and count != len(session_ids):
            raise InvalidInput(
                f"count must be 0 or the number of session_ids, {len(session_ids)}; got {count}"
            )
        wanted = len(session_ids) or count
        if not 1 <= wanted <= MAX_SESSIONS_PER_CALL:
            raise InvalidInput(f"count must be 1 to {MAX_SESSIONS_PER_CALL}; got {wanted}")
        ids = await self.ids("session_ids", session_ids, wanted, request_id, namespace=namespace)
        new = NewSessions(
            ids=ids,
            are_named=bool(session_ids),
            field="session_ids",
            request_id=request_id,
            kind=Kind.OPEN,
            content=content_of_open(model, batch_size, max_idle_ms, count=wanted),
            model=served,
            batch_size=batch_size,
            max_idle_ms=self.limit(max_idle_ms, is_named=bool(session_ids)),
            owner=self.owner(who),
            least_revisions=np.zeros(wanted, np.uint64),
            positions=np.zeros(wanted, np.uint64),
            is_pinned=self._directory.models.is_pinned(model),
            is_version="@" in model,
        )
        if not resume:
            return await self.begin(new, self.attempts.find)
        if not session_ids:
            raise InvalidInput("resume must come with session_ids; got none")
        return await self._resume_many(new)

    async def _resume_many(self, new: NewSessions) -> OpenedMany:
        opened: set[str] = set()
        for _ in range(MAX_TRIES):
            absent = await self.attempts.absent(new, await self.look(new.ids))
            if len(absent):
                try:
                    made = await self.begin(new.only(absent), self.attempts.find)
                except SessionExists:  # another call has opened one of them meanwhile
                    continue
                if len(absent) == len(new.ids):
                    return made
                opened.update(made.session_ids)
            resumed = await self.attempts.resume(new, await self.look(new.ids), opened)
            if resumed is not None:
                return resumed
        raise changed_elsewhere(new.ids[0])

    async def ids(
        self,
        field: str,
        named: Sequence[str],
        count: int,
        request_id: int,
        sources: Sequence[str] = (),
        *,
        namespace: str,
    ) -> list[str]:
        """The ids that the request's `field` names, or new ones."""
        if not named:
            make = self._directory.ids.make_many
            return await make(request_id, count, self._pieces, sources, namespace=namespace)
        async for part in self._pieces.of(named):
            for session_id in named[part]:
                require_session_id(field, session_id)
        if len(set(named)) != len(named):
            raise InvalidInput(f"{field} must be different from each other; got one of them twice")
        return list(named)

    def limit(self, asked_ms: int | None, *, is_named: bool) -> int:
        """See `IdleLimits.of_new`."""
        return self._context.limits.of_new(asked_ms, is_named=is_named)

    def owner(self, who: Caller, session_id: str = "") -> str:
        """See `Quotas.owner`."""
        return "" if self._context.quotas is None else self._context.quotas.owner(who, session_id)

    # -------------------------------------------------------------------------------------------------------- the path

    async def look(self, session_ids: Sequence[str]) -> Seen:
        """What the store has of ids while nobody makes sessions of them; what their tenants have is known then.

        A session of them that has ended on another server while something is under way for it here ends first.

        Raises:
            Unavailable: the store cannot be asked now.
        """
        while True:
            if self._context.quotas is not None:
                await self._context.quotas.refresh(session_ids)
            await self._context.removal.settled(session_ids)
            seen = await self._directory.look(session_ids, anew=True)
            ended = seen.ended_elsewhere()
            if ended:
                await self.attempts.free(ended)
            elif not self._context.removal.are_pending(session_ids):
                return seen

    async def begin(self, every: NewSessions, find: Find[_T]) -> _T | OpenedMany:
        """Begin sessions, all or none, unless `find` has another answer to the call. To be cancelled undoes nothing."""
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
                    return OpenedMany(
                        new.ids,
                        new.model.name,
                        new.model.program.fingerprint,
                        new.batch_size,
                        new.revisions,
                        new.positions,
                        np.full(len(new.ids), new.opened_with, np.uint64),
                        first,
                        version=new.model.version,
                    )
                # all of them exist now, or another call or server was faster with one: the next look says which
            raise changed_elsewhere(every.ids[0])
        except Unavailable:  # the call comes again, and continues with what it has made
            raise
        except ServerError:
            await self.undo(every)
            raise

    async def _attempt(self, new: NewSessions, seen: Seen) -> SessionInfo | None:
        """Begin sessions that were not there when the store was `seen`; None: another call or server was faster.

        Returns:
            The first of them, as it began.
        """
        if not new.are_named:
            self._directory.require_not_gone(new.ids[0], seen)
        if not await self._reserve(new, seen):
            return None
        try:
            await self._prepare(new, seen)
        except BaseException:
            self._give_up(new)
            raise
        first = await self.run_to_the_end(self._create(new))
        if first is None:
            await self._require_not_over(new.ids)
            return None
        self._report(new)
        return first

    async def run_to_the_end(self, work: Coroutine[Any, Any, _T]) -> _T:
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

    async def _reserve(self, new: NewSessions, seen: Seen) -> bool:
        """Reserve the ids; False if another call is making a session of one of them.

        Raises:
            ServerError: one must not begin, and none is reserved.
        """
        pending: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        reserved = 0
        try:
            async for part in self._pieces.of(new.ids):
                ids = new.ids[part]
                if not new.are_absent:
                    self._directory.require_new(new.field, ids, seen)
                for session_id in ids if new.are_named else ():
                    self._directory.require_own(session_id, seen)
                if self._context.removal.are_pending(ids):
                    break
                self._context.removal.pending.update(dict.fromkeys(ids, pending))
                reserved = part.stop
        finally:
            if reserved < len(new.ids):
                self.release(new.ids[:reserved], pending)
        return reserved == len(new.ids)

    def reserve(self, ids: Sequence[str]) -> asyncio.Future[None]:
        """Reserve ids of which no call makes sessions; what is returned is for `release`."""
        pending: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._context.removal.pending.update(dict.fromkeys(ids, pending))
        return pending

    def release(self, ids: Sequence[str], pending: asyncio.Future[None]) -> None:
        """End a reservation, and let those look who wait for it."""
        for session_id in ids:
            self._context.removal.pending.pop(session_id, None)
        if not pending.done():
            pending.set_result(None)

    def _give_up(self, new: NewSessions) -> None:
        """Give ids and rows of sessions back that do not begin."""
        self.release(new.ids, self._context.removal.pending[new.ids[0]])
        new.model.slots.free_resident(new.rows)
        new.rows = new.rows[:0]
        self._context.row_queue.room_may_have_come()

    async def _prepare(self, new: NewSessions, seen: Seen) -> None:
        """Find what the ids had before, and take rows: for one session there must be some.

        Of many, as many as there is room for have rows at once; the others come to the arena when they are stepped.

        Raises:
            NoRows: sessions with something under way have all of them.
        """
        model, ids, slots = new.model, new.ids, new.model.slots
        new.closes = {}
        new.revisions = np.maximum(new.least_revisions, np.uint64(self._directory.store.first_revision))
        if new.are_named:  # others may have had these ids
            async for part in self._pieces.of(ids):
                past = self._directory.past(ids[part], seen)
                new.revisions[part] = np.maximum(new.revisions[part], past.revisions)
                new.closes.update(past.closes)
        new.follows = self._directory.follows(ids, seen)
        if new.is_single:
            new.rows = self._context.pager.take(model, new.batch_size)
        else:
            fitting = min((slots.resident_limit - slots.resident) // new.batch_size, len(ids))
            rows = slots.take_resident(fitting * new.batch_size)
            assert rows is not None, "there is room for them"
            new.rows = rows
        async for part in self._pieces.parts(len(new.rows), namespaces.tenant_of(ids[0])):
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
        quotas, usage = self._context.quotas, new.usage
        try:
            if quotas is not None:
                quotas.begin(new.ids, usage, new.owner)
            error = await self._keep(new)
            if quotas is not None:
                (quotas.made if error is None else quotas.not_made)(new.ids, usage)
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
        self._context.expiry.watch(np.concatenate(entered))
        self.release(new.ids, self._context.removal.pending[new.ids[0]])
        self._context.row_queue.room_may_have_come()  # the rows are of sessions that have nothing under way
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
        ids, puts = new.ids, list[Sequence[tuple[str, Stored]]]()
        try:
            async for part in self._pieces.of(ids):
                some = new.part(part)
                puts.append(self._policy.begin(some.ids, some.ready, functools.partial(_records, some)))
        except Exception as error:
            self._policy.came_back(ids)
            return as_server_error(error)
        joined = puts[0] if len(puts) == 1 else Joined([each for each in puts if each])
        batch = Batch(
            puts=joined,
            forgets=ids if joined else (),
            counts=[(new.model.name, len(ids))],
            tenant_counts=_of_tenants(ids, new.model.name, 1),
            follows=new.follows if joined else NO_STAMPS,
            stamps=stamped(new.stamp, len(joined)),
        )
        committed = await self.commit(batch, len(ids))
        if isinstance(committed, ServerError):
            return committed
        conflicts = committed.conflicts.intersection(ids)
        if conflicts:
            made = Made([i for i in ids if i not in conflicts], new.stamp, new.model.name)
            if new.is_repeatable:
                new.undos.append(made)
            else:
                await self._delete(made)
            return _OVERTAKEN
        if committed.unknown.isdisjoint(ids):
            return None
        if not new.is_repeatable:  # else it may exist, and another attempt may have been answered so
            await self._delete(Made(ids, new.stamp, new.model.name))
        return not_known()

    async def commit(self, batch: Batch, size: int) -> Committed | ServerError:
        """Have the store keep a batch of `size` sessions."""
        answered: asyncio.Future[Committed | ServerError] = asyncio.get_running_loop().create_future()
        self._context.commits.submit(lambda: batch, size, answered.set_result)
        return await asyncio.shield(answered)

    async def undo(self, call: Call) -> None:
        """Delete what attempts here have made of a call that is refused for good. To be cancelled does not stop it."""
        undos, call.undos = call.undos, []
        for made in undos:
            await self.run_to_the_end(self._delete(made))

    async def _delete(self, made: Made) -> None:
        """Delete sessions of a call that is refused, but those that others have changed, or taken over."""
        ids, model = made.ids, made.model
        if not ids:
            return
        batch = Batch(
            deletes=ids,
            counts=[(model, -len(ids))],
            tenant_counts=_of_tenants(ids, model, -1),
            delete_follows=stamped(made.stamp, len(ids)),
            undoes=ids,
        )
        undone = await self.commit(batch, len(ids))
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

    async def _require_not_over(self, ids: Sequence[str]) -> None:
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


def _exists(session_id: str) -> SessionExists:
    return SessionExists(f"session_id must be new; session {session_id!r} is open", session_id=session_id)


def _of_tenants(ids: Sequence[str], model: str, by: int) -> list[tuple[str, int]]:
    """`Batch.tenant_counts` of sessions of one tenant."""
    return counts.of_tenants([(session_id, model) for session_id in ids[:1]], by * len(ids))


def _records(whole: NewSessions, part: slice) -> Sequence[tuple[str, Stored]]:
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
