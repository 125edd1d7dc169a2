"""Sessions come into being: opened, resumed, forked."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence

import numpy as np

from stepwell_server.clock import Clock
from stepwell_server.core import namespaces
from stepwell_server.core.callers import ANYBODY, Caller
from stepwell_server.core.exactly_once import Kind
from stepwell_server.core.idle import IdleLimits
from stepwell_server.core.sessions import SessionTable
from stepwell_server.core.slots import Rows
from stepwell_server.engine.api import Observer, Opened
from stepwell_server.engine.change import MAX_TRIES, changed_elsewhere
from stepwell_server.engine.content import content_of_fork, content_of_open, require_same_opening
from stepwell_server.engine.intake.paging import Pager
from stepwell_server.engine.intake.turns import Turns
from stepwell_server.engine.intake.validation import check_finite_state
from stepwell_server.engine.sessions.attempts import Attempts, OpenedMany, Wanted
from stepwell_server.engine.sessions.creation import Creation, Fresh, Taken
from stepwell_server.engine.sessions.directory import Directory, Past
from stepwell_server.engine.sessions.end import Uses
from stepwell_server.engine.sessions.ids import MAX_SESSIONS_PER_CALL, require_session_id
from stepwell_server.engine.sessions.loading import Seen
from stepwell_server.engine.sessions.pieces import Pieces
from stepwell_server.engine.state.model import Model
from stepwell_server.engine.types import U64, Array, Tensors
from stepwell_server.errors import (
    InvalidInput,
    ModelMismatch,
    ModelNotFound,
    RevisionConflict,
    ServerError,
    SessionExists,
    SessionGone,
    SessionLost,
    Unavailable,
)


class Opening:
    """Opens and forks sessions. Lives on the event loop.

    A call that says its request id and is sent again gets the session that it made: the session's id follows from
    the request id, or was said, and the session remembers the request id. So it stays through a restart.
    """

    def __init__(
        self,
        table: SessionTable,
        directory: Directory,
        turns: Turns,
        pager: Pager,
        creation: Creation,
        attempts: Attempts,
        pieces: Pieces,
        *,
        drain: Callable[[], None],
        require_open: Callable[[], None],
        usage: Uses,
        limits: IdleLimits,
        clock: Clock,
        observer: Observer,
    ) -> None:
        self._table = table
        self._directory = directory
        self._turns = turns
        self._pager = pager
        self._creation = creation
        self.attempts = attempts
        self._pieces = pieces
        self._drain = drain
        self._require_open = require_open
        self._usage = usage
        self._limits = limits
        self._clock = clock
        self._observer = observer

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

        `max_idle_ms` is the own limit of a session that begins: 0 for none, None for what the server gives
        (`IdleLimits.of_new`). One that is resumed keeps its limit. One that is not named gets an id in the `namespace`.

        Raises:
            ModelNotFound, ModelMismatch, InvalidInput, SessionExists, Overloaded, Unavailable
        """
        self._require_open()
        served = self._directory.models.by_name(model)
        epoch = served.epoch  # what moves while the store is asked takes the session along
        is_pinned = self._directory.models.is_pinned(model)
        served.require_fingerprint(fingerprint)
        served.require_batch_size(batch_size)
        if session_id:
            require_session_id("session_id", session_id)
        name = session_id or self._directory.ids.make(request_id, namespace=namespace)
        for _ in range(MAX_TRIES):
            seen = await self.seen([name])
            handle = self._live(name, seen, must_be_new)
            if handle is not None:
                if "@" in model:
                    self._directory.require_version(handle, served)
                try:
                    if request_id and int(self._table.opened_with[handle]) == request_id:
                        return self._opened_before(handle, seen, model, batch_size, max_idle_ms, state)
                    return self._resume(handle, seen, served, batch_size, must_be_new)
                except SessionGone:  # on another server, while something is under way for it here
                    await self._turns.free(handle)
                    continue
            if not session_id:
                self._directory.require_not_gone(name, seen)
            self._directory.require_own(session_id, seen)
            values = check_finite_state(served.program, state, batch_size)
            rows = self._pager.take(served, batch_size)
            served.arena.clear_outputs(rows)
            if values is None:
                served.arena.reset(rows, served.program.initial)
            else:
                served.arena.write(rows, values)
            past = self._directory.past([name], seen)
            created, positions = self._clock.now(), np.zeros(1, np.uint64)
            fresh = Fresh(
                served,
                [name],
                batch_size,
                rows,
                past.revisions,
                self._directory.follows([name], seen),
                request_id,
                created,
                positions,
                max_idle_ms=self._limits.of_new(max_idle_ms, is_named=bool(session_id)),
                is_pinned=is_pinned,
                epoch=epoch,
                owner=self._creation.owner(who),
                closes=past.closes,
                stamp=self._directory.store.new_stamp(),
                opened_digests=content_of_open(model, batch_size, max_idle_ms, values or ())
                | served.digest_prefixes[Kind.OPEN],
            )
            try:
                info = await self._creation.create(fresh)
            except Taken:
                await self._require_not_over([name])
                continue
            self._observer.session_event("opened", served.name, name)
            return Opened(info)
        raise changed_elsewhere(name)

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

        `resume`: live ones of `session_ids` are resumed, and the others are opened.
        """
        self._require_open()
        served = self._directory.models.by_name(model)
        served.require_batch_size(batch_size)
        if session_ids and count and count != len(session_ids):
            raise InvalidInput(
                f"count must be 0 or the number of session_ids, {len(session_ids)}; got {count}"
            )
        wanted = len(session_ids) or count
        if not 1 <= wanted <= MAX_SESSIONS_PER_CALL:
            raise InvalidInput(f"count must be 1 to {MAX_SESSIONS_PER_CALL}; got {wanted}")
        ids = await self.attempts.ids_to_make(
            "session_ids", session_ids, wanted, request_id, namespace=namespace
        )
        every = Wanted(
            served,
            ids,
            batch_size,
            request_id,
            bool(session_ids),
            "session_ids",
            Kind.OPEN,
            content_of_open(model, batch_size, max_idle_ms, count=len(ids)),
            max_idle_ms=max_idle_ms,
            is_pinned=self._directory.models.is_pinned(model),
            who=who,
            is_version="@" in model,
        )
        if not resume:
            return await self.make_many(every)
        if not session_ids:
            raise InvalidInput("resume must come with session_ids; got none")
        return await self._resume_many(every)

    async def _resume_many(self, wanted: Wanted) -> OpenedMany:
        opened: set[str] = set()
        for _ in range(MAX_TRIES):
            absent = await self.attempts.absent(wanted, await self.seen(wanted.ids))
            if len(absent):
                try:
                    made = await self.make_many(wanted.part(absent))
                except SessionExists:  # another call has opened one of them meanwhile
                    continue
                if len(absent) == len(wanted.ids):
                    return made
                opened.update(made.session_ids)
            resumed = await self.attempts.resume(wanted, await self.seen(wanted.ids), opened)
            if resumed is not None:
                return resumed
        raise changed_elsewhere(wanted.ids[0])

    async def make_many(self, wanted: Wanted) -> OpenedMany:
        """Make sessions: all of them or none. Errors as of `open`.

        Where the store, which others use too, does not say what it kept, some of them may be there: the same call makes
        the others when it comes again, here or on another server.
        """
        taken: list[Taken] = []
        try:
            return await self._make_many(wanted, taken)
        except Unavailable:  # it comes again
            raise
        except ServerError:
            await self._creation.take_back(taken)
            raise

    async def _make_many(self, wanted: Wanted, taken: list[Taken]) -> OpenedMany:
        """As `make_many`; `taken` gets what was made, if not all was."""
        served, every, batch_size = wanted.model, wanted, wanted.batch_size
        epoch = served.epoch
        for _ in range(MAX_TRIES):
            seen = await self.seen(every.ids)
            known = await self.attempts.made_before(
                every.kind, every.ids, every.content, seen, every.request_id
            )
            if known is not None:
                return known
            left = await self.attempts.left(every.field, every.ids, seen, every.request_id)
            if left is None:
                continue
            wanted = every.part(left)
            ids = wanted.ids
            if not wanted.are_chosen:
                self._directory.require_not_gone(ids[0], seen)
            if not await self._reserve(wanted, seen):
                continue  # somebody made one of them meanwhile
            past, rows = await self._begun(wanted, seen)
            created = self._clock.now()
            positions = np.zeros(len(ids), np.uint64) if wanted.positions is None else wanted.positions
            fresh = Fresh(
                served,
                ids,
                batch_size,
                rows,
                past.revisions,
                self._directory.follows(ids, seen),
                wanted.request_id,
                created,
                positions,
                wanted.states,
                self._limits.of_new(wanted.max_idle_ms, is_named=wanted.are_chosen),
                wanted.is_pinned,
                epoch,
                self._creation.owner(wanted.who),
                closes=past.closes,
                stamp=self._directory.store.new_stamp(),
                opened_digests=wanted.content | served.digest_prefixes[wanted.kind],
            )
            try:
                await self._creation.create(fresh)
            except Taken as error:
                taken.append(error)
                await self._require_not_over(ids)
                continue
            self._observer.sessions_opened(
                served.name, len(ids), "opened" if wanted.states is None else "forked"
            )
            if wanted is not every:
                continue  # and now all of them are there
            return OpenedMany(
                ids,
                served.name,
                served.program.fingerprint,
                batch_size,
                past.revisions,
                positions,
                np.full(len(ids), fresh.opened_with, np.uint64),
                version=served.version,
            )
        raise changed_elsewhere(every.ids[0])

    async def _reserve(self, wanted: Wanted, seen: Seen) -> bool:
        """Keep ids that may begin for the call; False if another one is making a session of one of them.

        Raises:
            ServerError: one may not begin, and none is kept.
        """
        ids, creation = wanted.ids, self._creation
        pending, kept = creation.reservation(), 0
        try:
            async for part in self._pieces.of(ids):
                self._directory.require_new(wanted.field, ids[part], seen)
                for session_id in ids[part] if wanted.are_chosen else ():
                    self._directory.require_own(session_id, seen)
                if not creation.reserve(ids[part], pending):
                    break
                kept = part.stop
        except BaseException:
            creation.give_up(ids[:kept], pending)
            raise
        if kept < len(ids):
            creation.give_up(ids[:kept], pending)
        return kept == len(ids)

    async def _begun(self, wanted: Wanted, seen: Seen) -> tuple[Past, Rows]:
        """The past and the rows of sessions that are reserved; if these cannot be had the sessions are given up.

        As many as there is room for have rows at once; the others come when they are stepped.
        """
        served, ids, batch_size = wanted.model, wanted.ids, wanted.batch_size
        rows: Rows | None = None
        try:
            # of ids that are made here none was another session's
            revisions, closes = np.zeros(len(ids), np.uint64), dict[str, tuple[int, ...]]()
            if wanted.are_chosen:
                async for part in self._pieces.of(ids):
                    past = self._directory.past(ids[part], seen)
                    revisions[part] = past.revisions
                    closes.update(past.closes)
            if wanted.revisions is not None:
                revisions = np.maximum(revisions, wanted.revisions)
            fitting = (served.slots.resident_limit - served.slots.resident) // batch_size
            rows = served.slots.take_resident(min(fitting, len(ids)) * batch_size)
            assert rows is not None, "there is room for as many"
            async for part in self._pieces.parts(len(rows), namespaces.tenant_of(ids[0])):
                served.arena.clear_outputs(rows[part])
                if wanted.states is None:
                    served.arena.reset(rows[part], served.program.initial)
                else:
                    served.arena.write(rows[part], [array[part] for array in wanted.states])
        except BaseException:
            if rows is not None:
                served.slots.free_resident(rows)
            self._creation.give_up(ids)
            raise
        return Past(revisions, closes), rows

    async def fork(
        self,
        session_id: str,
        *,
        new_session_id: str = "",
        expected: int | None = None,
        request_id: int = 0,
        max_idle_ms: int | None = None,
        deadline: float = float("inf"),
        who: Caller = ANYBODY,
    ) -> Opened:
        """Open a session with the state, revision and position of another.

        Raises:
            SessionGone, SessionExists, RevisionConflict, InvalidInput, Overloaded, DeadlineExceeded
        """
        self._require_open()
        if new_session_id:
            require_session_id("new_session_id", new_session_id)
        namespace = namespaces.prefix_of(namespaces.tenant_of(session_id))
        name = new_session_id or self._directory.ids.make(request_id, session_id, namespace=namespace)
        content = content_of_fork([session_id], max_idle_ms)
        for _ in range(MAX_TRIES):
            seen = await self.seen([name, session_id])
            self._drain()
            known = self._forked_before(name, seen, request_id, content)
            if known is not None:
                return known
            source = self._directory.find(session_id, seen)
            try:
                await self._turns.hold(source, deadline)
                break
            except SessionLost:
                raise
            except SessionGone:
                continue  # while it was waited for; by now somebody may have opened it anew
        else:
            raise changed_elsewhere(session_id)
        try:
            for _ in range(MAX_TRIES):
                # once more: the same call may have been in line before this one
                seen = await self.seen([name])
                known = self._forked_before(name, seen, request_id, content)
                if known is not None:
                    return known
                if not new_session_id:
                    self._directory.require_not_gone(name, seen)
                self._directory.require_own(new_session_id, seen)
                try:
                    own_ms = self._limits.of_new(max_idle_ms, is_named=bool(new_session_id))
                    return await self._fork(source, name, seen, expected, request_id, content, own_ms, who)
                except Taken:
                    await self._require_not_over([name])
                    continue
            raise changed_elsewhere(name)
        finally:
            self._turns.release(np.array([source]))

    async def _require_not_over(self, ids: Sequence[str]) -> None:
        """Refuse to go on when another server was faster, and what was opened there has ended already.

        It may have been this very call, sent there after it got no answer here: it is done once.

        Raises:
            Unavailable: so it is.
        """
        seen = await self.seen(ids)
        for session_id in ids:
            if self._directory.ended(session_id, seen) is not None:
                raise Unavailable(
                    f"session {session_id!r} was opened and has ended on another server meanwhile; it was not opened anew"
                )

    async def seen(self, ids: Sequence[str]) -> Seen:
        """See `Creation.look`."""
        return await self._creation.look(ids)

    def _live(self, name: str, seen: Seen, must_be_new: bool) -> int | None:
        try:
            return self._directory.live(name, seen)
        except (ModelMismatch, ModelNotFound) as error:
            if must_be_new:  # it is there, whatever it belongs to
                raise _exists("session_id", name) from error
            raise

    def _opened_before(
        self,
        handle: int,
        seen: Seen,
        model: str,
        batch_size: int,
        max_idle_ms: int | None,
        state: Tensors | None,
    ) -> Opened:
        """The answer to a call with the request id that opened a session.

        Raises:
            InvalidInput: it is another call.
        """
        info, own = (
            self._directory.info_now(handle, seen, is_same=True),
            self._directory.models.by_handle(handle),
        )
        values: Sequence[Array] | None = None
        with contextlib.suppress(InvalidInput):  # then it is another state
            values = check_finite_state(own.program, state, batch_size) or ()
        content = np.zeros(1, np.uint64)
        if values is not None:
            content = content_of_open(model, batch_size, max_idle_ms, values)
        stored = self._table.opened_digest[handle : handle + 1]
        require_same_opening(own, [info.session_id], stored, Kind.OPEN, content)
        self._observer.replayed(own.name, "open", 1)
        return Opened(info, replayed=True)

    def _resume(
        self,
        handle: int,
        seen: Seen,
        model: Model,
        batch_size: int,
        must_be_new: bool,
    ) -> Opened:
        session_id = self._table.session_id(handle)
        info = self._directory.info_now(handle, seen, is_same=True)
        if must_be_new:
            raise _exists("session_id", session_id)
        if info.model != model.name or info.batch_size != batch_size:
            raise SessionExists(
                f"session {session_id!r} is open with model {info.model!r} and batch_size {info.batch_size};"
                f" got model {model.name!r} and batch_size {batch_size}",
                session_id=session_id,
            )
        self._usage.used(np.array([handle]))
        self._observer.session_event("resumed", model.name, session_id)
        return Opened(self._directory.info_now(handle, seen, is_same=True), resumed=True)

    async def _fork(
        self,
        source: int,
        name: str,
        seen: Seen,
        expected: int | None,
        request_id: int,
        content: U64,
        max_idle_ms: int,
        who: Caller,
    ) -> Opened:
        table, model = self._table, self._directory.models.by_handle(source)
        revision = int(table.revision[source])
        if expected is not None and expected != revision:
            raise RevisionConflict(table.session_id(source), expected, revision)
        batch_size = int(table.batch_size[source])
        rows = self._pager.take(model, batch_size)
        model.arena.copy(table.rows(source), rows)
        self._usage.used(np.array([source]))
        past = self._directory.past([name], seen)
        revisions = np.maximum(past.revisions, np.uint64(revision))
        positions, created = table.position[source : source + 1].copy(), self._clock.now()
        fresh = Fresh(
            model,
            [name],
            batch_size,
            rows,
            revisions,
            self._directory.follows([name], seen),
            request_id,
            created,
            positions,
            max_idle_ms=max_idle_ms,
            is_pinned=bool(table.pinned[source]),
            owner=self._creation.owner(who),
            closes=past.closes,
            stamp=self._directory.store.new_stamp(),
            opened_digests=content | model.digest_prefixes[Kind.FORK],
        )
        info = await self._creation.create(fresh)
        self._observer.session_event("forked", model.name, name)
        return Opened(info)

    def _forked_before(self, name: str, seen: Seen, request_id: int, content: U64) -> Opened | None:
        known = self._directory.live(name, seen)
        if known is None:
            return None
        if request_id and int(self._table.opened_with[known]) == request_id:
            info, model = self._directory.info_now(known, seen), self._directory.models.by_handle(known)
            require_same_opening(
                model, [name], self._table.opened_digest[known : known + 1], Kind.FORK, content
            )
            self._observer.replayed(info.model, "fork", 1)
            return Opened(info, replayed=True)
        raise _exists("new_session_id", name)


def _exists(name: str, session_id: str) -> SessionExists:
    return SessionExists(f"{name} must be new; session {session_id!r} is open", session_id=session_id)
