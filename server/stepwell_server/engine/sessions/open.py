"""Opens and forks sessions: with given states, the model's initial state, or the states of other sessions."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Container, Iterator, Sequence

import numpy as np

from stepwell_server.core import namespaces
from stepwell_server.core.callers import ANYBODY, Caller
from stepwell_server.core.exactly_once import Kind
from stepwell_server.core.sessions import Handles, SessionTable
from stepwell_server.engine.api import (
    Observer,
    OpenManyResult,
    OpenResult,
    SessionInfo,
    StateResult,
    StatesResult,
)
from stepwell_server.engine.change import MAX_TRIES, changed_elsewhere
from stepwell_server.engine.content import content_of_fork, content_of_open
from stepwell_server.engine.intake.validation import check_finite_state, require_sessions
from stepwell_server.engine.sessions.begin import Call, NewSessions, SessionCreator, sessions_of
from stepwell_server.engine.sessions.directory import (
    MAX_SESSIONS_PER_CALL,
    Directory,
    exists,
    require_session_id,
)
from stepwell_server.engine.sessions.end import UseNotifier
from stepwell_server.engine.sessions.lookup import LookupResult
from stepwell_server.engine.sessions.read import StateReader
from stepwell_server.engine.threads import PIECE_SIZE
from stepwell_server.engine.types import U64, Members, Tensors
from stepwell_server.errors import (
    InvalidInput,
    MessageTooLarge,
    ModelMismatch,
    ModelNotFound,
    Overloaded,
    RevisionConflict,
    ServerError,
    SessionExists,
    SessionGone,
    Unavailable,
)

#: The most bytes of states that forks hold at the same time, while sessions are created from them.
MAX_FORK_BYTES = 256 << 20
_RETRY_S = 0.1

#: A message names at most this many sessions.
_MAX_NAMED = 5


class Opener:
    """Opens sessions, or resumes live ones. Lives on the event loop."""

    def __init__(
        self,
        table: SessionTable,
        directory: Directory,
        begin: SessionCreator,
        uses: UseNotifier,
        observer: Observer,
        require_open: Callable[[], None],
    ) -> None:
        """`require_open` refuses a call while the server is stopping, or while too much waits for the store."""
        self._table = table
        self._directory = directory
        self._pieces = directory.pieces
        self._begin = begin
        self._uses = uses
        self._observer = observer
        self._require_open = require_open

    async def one(
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
        caller: Caller = ANYBODY,
    ) -> OpenResult:
        """Open a session, or resume the live one of that id.

        `max_idle_ms` is the own limit of a new session: 0 for none, None for the server's default
        (`IdleLimits.of_new`). A resumed session keeps its limit. Without a `session_id`, an id is generated in the
        `namespace`.

        Raises:
            ModelNotFound, ModelMismatch, InvalidInput, SessionExists, Overloaded, Unavailable
        """
        self._require_open()
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
            max_idle_ms=self._begin.limit(max_idle_ms, is_named=bool(session_id)),
            owner=self._begin.owner(caller),
            min_revisions=np.zeros(1, np.uint64),
            positions=np.zeros(1, np.uint64),
            is_pinned=self._directory.models.is_pinned(model),
            is_version="@" in model,
            is_single=True,
            are_absent=True,  # otherwise it resumes the session
        )

        async def find(new: NewSessions, seen: LookupResult) -> OpenResult | Members | None:
            handle = self._live(name, seen, must_be_new)
            if handle is None:
                new.states = check_finite_state(served.program, state, batch_size)
                new.content = content_of_open(model, batch_size, max_idle_ms, new.states or ())
                return np.zeros(1, np.intp)
            if new.is_version:
                self._directory.require_version(handle, served)
            if not request_id or int(self._table.opened_with[handle]) != request_id:
                return await self._resume(new, handle, seen, must_be_new=must_be_new)
            # a state that its version rejects differs from that of the first attempt
            new.content = np.zeros(1, np.uint64)
            with contextlib.suppress(InvalidInput):
                values = check_finite_state(
                    self._directory.models.by_handle(handle).program, state, batch_size
                )
                new.content = content_of_open(model, batch_size, max_idle_ms, values or ())
            found = await self._begin.attempts.find(new, seen)
            return OpenResult(found.first, replayed=True) if isinstance(found, OpenManyResult) else found

        made: OpenResult | SessionInfo = await self._begin.begin(new, find)
        return made if isinstance(made, OpenResult) else OpenResult(made)

    def _live(self, name: str, seen: LookupResult, must_be_new: bool) -> int | None:
        try:
            return self._directory.live(name, seen)
        except (ModelMismatch, ModelNotFound) as error:
            if must_be_new:  # it exists, whatever model it belongs to
                raise exists("session_id", name) from error
            raise

    async def _resume(
        self, new: NewSessions, handle: int, seen: LookupResult, *, must_be_new: bool
    ) -> OpenResult | None:
        name, model = new.ids[0], new.model
        try:
            info = self._directory.current_info(handle, seen, is_same=True)
        except SessionGone:  # ended on another server while active here
            await self._begin.attempts.free(new.ids)
            return None
        if must_be_new:
            raise exists("session_id", name)
        if info.model != model.name or info.batch_size != new.batch_size:
            raise SessionExists(
                f"session {name!r} is open with model {info.model!r} and batch_size {info.batch_size};"
                f" got model {model.name!r} and batch_size {new.batch_size}",
                session_id=name,
            )
        self._uses.used(np.array([handle]))
        self._observer.session_event("resumed", model.name, name)
        return OpenResult(self._directory.current_info(handle, seen, is_same=True), resumed=True)

    async def many(
        self,
        model: str,
        *,
        count: int = 0,
        session_ids: Sequence[str] = (),
        batch_size: int = 1,
        request_id: int = 0,
        max_idle_ms: int | None = None,
        namespace: str = "",
        caller: Caller = ANYBODY,
        resume: bool = False,
    ) -> OpenManyResult:
        """Open many sessions: all or none. `namespace` and errors are as for `one`.

        If a shared store does not say what it kept, some of the sessions may exist. A repeated call then creates
        the others, here or on another server. With `resume`, live ones of `session_ids` are resumed, and the others
        are opened.
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
        ids = await self._directory.chosen_or_new(
            "session_ids", session_ids, wanted, request_id, namespace=namespace
        )
        new = NewSessions(
            ids=ids,
            are_named=bool(session_ids),
            field="session_ids",
            request_id=request_id,
            kind=Kind.OPEN,
            content=content_of_open(model, batch_size, max_idle_ms, count=wanted),
            model=served,
            batch_size=batch_size,
            max_idle_ms=self._begin.limit(max_idle_ms, is_named=bool(session_ids)),
            owner=self._begin.owner(caller),
            min_revisions=np.zeros(wanted, np.uint64),
            positions=np.zeros(wanted, np.uint64),
            is_pinned=self._directory.models.is_pinned(model),
            is_version="@" in model,
        )
        if not resume:
            return await self._begin.begin_many(new)
        if not session_ids:
            raise InvalidInput("resume must come with session_ids; got none")
        return await self._resume_many(new)

    async def _resume_many(self, new: NewSessions) -> OpenManyResult:
        opened: set[str] = set()
        for _ in range(MAX_TRIES):
            absent = await self._absent(new, await self._begin.look(new.ids))
            if len(absent):
                try:
                    made = await self._begin.begin_many(new.only(absent))
                except SessionExists:  # another call opened one of them meanwhile
                    continue
                if len(absent) == len(new.ids):
                    return made
                opened.update(made.session_ids)
            resumed = await self._resume_live(new, await self._begin.look(new.ids), opened)
            if resumed is not None:
                return resumed
        raise changed_elsewhere(new.ids[0])

    async def _absent(self, new: NewSessions, seen: LookupResult) -> Members:
        """Places of sessions that are not live, for a call that resumes the live ones.

        Raises:
            SessionExists: a live one has another model or batch size.
            InvalidInput: another call with the request id created some of them.
        """
        absent: list[Members] = []
        unlike: list[int] = []
        described: list[str] = []
        async for part in self._pieces.of(new.ids):
            handles = self._directory.find_all(new.ids[part], seen)
            absent.append(part.start + np.flatnonzero(handles < 0))
            self._begin.attempts.require_same(new, part, handles)
            for place in self._unlike(new, handles).tolist():
                unlike.append(part.start + place)
                if len(described) < _MAX_NAMED:
                    described.append(self._described(new.ids, unlike[-1], int(handles[place])))
        if unlike:
            more = f"; {len(unlike) - _MAX_NAMED} more differ" if len(unlike) > _MAX_NAMED else ""
            version = f", version {new.model.version}," if new.is_version else ""
            raise SessionExists(
                f"{new.field} must name new sessions, or live ones to resume of model {new.model.name!r}{version}"
                f" with batch_size {new.batch_size}; {'; '.join(described)}{more}",
                session_id=new.ids[unlike[0]],
            )
        return np.concatenate(absent)

    def _unlike(self, new: NewSessions, handles: Handles) -> Members:
        """Places of live sessions with another model or batch size."""
        table, live = self._table, np.flatnonzero(handles >= 0)
        fits = table.batch_size[handles[live]] == new.batch_size
        for index in np.unique(table.model[handles[live]]).tolist():
            own = self._directory.models.by_index[index]
            if own.name != new.model.name or (new.is_version and own is not new.model):
                fits &= table.model[handles[live]] != index
        unlike: Members = live[~fits]
        return unlike

    def _described(self, ids: Sequence[str], place: int, handle: int) -> str:
        own, rows = self._directory.models.by_handle(handle), int(self._table.batch_size[handle])
        return (
            f"session {ids[place]!r} (index {place}) has model {own.name!r}, version {own.version}, and"
            f" batch_size {rows}"
        )

    async def _resume_live(
        self, new: NewSessions, seen: LookupResult, opened: Container[str]
    ) -> OpenManyResult | None:
        """Resume live sessions, except those that this attempt `opened`.

        Returns:
            None: one has ended meanwhile, and all must be looked up again.
        """
        table, ids = self._table, new.ids
        handles = table.find_all(ids)
        is_made = (handles >= 0) & (table.opened_with[handles] == new.request_id)
        made = [ids[place] for place in np.flatnonzero(is_made).tolist()] if new.request_id else []
        if not await self._begin.attempts.take_over(made, new.request_id, self._directory.store.new_stamp()):
            return None
        handles = table.find_all(ids)
        if (handles < 0).any():
            return None
        is_new = np.fromiter((session_id in opened for session_id in ids), np.bool_, len(ids))
        if new.request_id:
            is_new |= table.opened_with[handles] == new.request_id
        try:
            answer = self._begin.attempts.answer(ids, handles, seen)
        except SessionGone:
            return None
        self._uses.used(handles)
        count = len(ids) - int(is_new.sum())
        if not count:
            return answer
        self._observer.sessions_opened(new.model.name, count, "resumed")
        return dataclasses.replace(answer, resumed=~is_new)


class Forker:
    """Forks sessions: reads their states, each after earlier changes, and begins sessions with them.

    No session is held while another is waited for, nor while the new ones are committed. Lives on the event loop.
    """

    def __init__(
        self,
        directory: Directory,
        begin: SessionCreator,
        reading: StateReader,
        drain: Callable[[], None],
        require_open: Callable[[], None],
    ) -> None:
        """`drain` admits queued changes; for `require_open` see `Opener`."""
        self._directory = directory
        self._begin = begin
        self._reading = reading
        self._drain = drain
        self._require_open = require_open
        self._copied_bytes = 0
        """Bytes of states being copied."""

    async def one(
        self,
        session_id: str,
        *,
        new_session_id: str = "",
        expected: int | None = None,
        request_id: int = 0,
        max_idle_ms: int | None = None,
        deadline: float = float("inf"),
        caller: Caller = ANYBODY,
    ) -> OpenResult:
        """Open a session with the state, revision and position of another, after all changes received before for it.

        Raises:
            SessionGone, SessionExists, RevisionConflict, InvalidInput, Overloaded, DeadlineExceeded
        """
        self._require_open()
        if new_session_id:
            require_session_id("new_session_id", new_session_id)
        namespace = namespaces.prefix_of(namespaces.tenant_of(session_id))
        name = new_session_id or self._directory.ids.make(request_id, session_id, namespace=namespace)
        call = Call(
            ids=[name],
            are_named=bool(new_session_id),
            field="new_session_id",
            request_id=request_id,
            kind=Kind.FORK,
            content=content_of_fork([session_id], max_idle_ms),
        )
        revisions = None if expected is None else np.array([expected], np.uint64)
        limit_ms = self._begin.limit(max_idle_ms, is_named=call.are_named)
        made = await self._fork(call, [session_id], revisions, limit_ms, deadline, caller)
        return OpenResult(made.first, replayed=made.replayed)

    async def many(
        self,
        session_ids: Sequence[str],
        *,
        new_session_ids: Sequence[str] = (),
        expected: U64 | None = None,
        request_id: int = 0,
        max_idle_ms: int | None = None,
        deadline: float = float("inf"),
        caller: Caller = ANYBODY,
    ) -> OpenManyResult:
        """Open sessions with the states, revisions and positions of others: all or none.

        Each source is read after all changes received before for it. No session is held while another is waited
        for.

        Args:
            session_ids: The sources; an id may be repeated.
            new_session_ids: One each; empty: ids are generated.
            expected: `(n,)`; None: any revisions.
            request_id: 0: none.
            max_idle_ms: Of each, as in `Opener.one`.
            deadline: For the reads.
            caller: The caller that makes the call.

        Raises:
            SessionGone, SessionExists, RevisionConflict, InvalidInput, Overloaded, DeadlineExceeded, Unavailable
        """
        self._require_open()
        require_sessions(session_ids, may_repeat=True)
        count = len(session_ids)
        if new_session_ids and len(new_session_ids) != count:
            raise InvalidInput(
                f"new_session_ids must be empty or one for each of session_ids ({count});"
                f" got {len(new_session_ids)}"
            )
        field = "new_session_ids"
        namespace = namespaces.prefix_of(
            namespaces.tenant_of(session_ids[0])
        )  # they all belong to the caller's tenant
        ids = await self._directory.chosen_or_new(
            field, new_session_ids, count, request_id, session_ids, namespace=namespace
        )
        content = np.zeros(count, np.uint64)
        async for part in self._directory.pieces.of(ids):
            content[part] = content_of_fork(session_ids[part], max_idle_ms)
        call = Call(
            ids=ids,
            are_named=bool(new_session_ids),
            field=field,
            request_id=request_id,
            kind=Kind.FORK,
            content=content,
        )
        limit_ms = self._begin.limit(max_idle_ms, is_named=call.are_named)
        return await self._fork(call, session_ids, expected, limit_ms, deadline, caller)

    async def _fork(
        self,
        call: Call,
        session_ids: Sequence[str],
        expected: U64 | None,
        max_idle_ms: int,
        deadline: float,
        caller: Caller,
    ) -> OpenManyResult:
        try:
            return await self._attempt(call, session_ids, expected, max_idle_ms, deadline, caller)
        except Unavailable:  # the caller repeats the call, which continues with what was created
            raise
        except ServerError:
            await self._begin.undo(call)
            raise

    async def _attempt(
        self,
        call: Call,
        session_ids: Sequence[str],
        expected: U64 | None,
        max_idle_ms: int,
        deadline: float,
        caller: Caller,
    ) -> OpenManyResult:
        ids, sources, is_single = call.ids, list(dict.fromkeys(session_ids)), call.field == "new_session_id"
        # A single lookup: between two lookups that are awaited, later changes would overtake the reads.
        seen = await self._begin.look([*ids, *sources])
        self._drain()
        found = await self._begin.attempts.find(call, seen)
        if isinstance(found, OpenManyResult):  # even if the sources have ended by now
            return found
        missing = [ids[place] for place in found.tolist()] if call.are_named and found is not None else ()
        async for part in self._directory.pieces.of(missing):
            self._directory.require_new(call.field, missing[part], seen)
        if len(missing) > PIECE_SIZE or found is None or len(found) < len(ids):  # other work ran meanwhile
            seen = await self._directory.look(sources, reread=True)
            self._drain()
        with self._copying(session_ids) as admit:
            read, chosen = await self._read(
                session_ids, sources, seen, expected, deadline, admit, is_single=is_single
            )
            batch_size, states = int(read.sizes[0]), list(read.state.values())
            if len(read.members) < len(ids):
                states = [sessions_of(array, chosen, batch_size) for array in states]
            new = NewSessions(
                ids=ids,
                are_named=call.are_named,
                field=call.field,
                request_id=call.request_id,
                kind=call.kind,
                content=call.content,
                model=self._directory.models.by_name(f"{read.model}@{read.version}"),
                batch_size=batch_size,
                max_idle_ms=max_idle_ms,
                owner=self._begin.owner(caller),
                min_revisions=read.revisions[chosen],
                positions=read.positions[chosen],
                states=states,
                is_pinned=read.are_pinned,
                is_single=is_single,
                undos=call.undos,
            )
            return await self._begin.begin_many(new)

    @contextlib.contextmanager
    def _copying(self, session_ids: Sequence[str]) -> Iterator[Callable[[int], None]]:
        """Count the bytes of states copied in the block. It yields a function to call with the sources' bytes.

        Raises:
            MessageTooLarge: they exceed the limit by themselves.
            Overloaded: they exceed it together with other calls.
        """
        own = 0

        def admit(byte_count: int) -> None:
            nonlocal own
            copies = byte_count * len(session_ids) // len(set(session_ids))
            if copies > MAX_FORK_BYTES:
                raise MessageTooLarge(
                    f"session_ids must name sessions whose states have at most {MAX_FORK_BYTES} bytes together;"
                    f" got {len(session_ids)} sessions, whose copies need {copies} bytes: fork fewer at once"
                )
            if self._copied_bytes + copies > MAX_FORK_BYTES and self._copied_bytes:
                raise Overloaded(
                    f"bytes of states that are being copied must stay within {MAX_FORK_BYTES};"
                    f" {self._copied_bytes} are, and this call adds {copies}",
                    retry_after_s=_RETRY_S,
                )
            own = copies
            self._copied_bytes += own

        try:
            yield admit
        finally:
            self._copied_bytes -= own

    async def _read(
        self,
        session_ids: Sequence[str],
        sources: Sequence[str],
        seen: LookupResult,
        expected: U64 | None,
        deadline: float,
        admit: Callable[[int], None],
        *,
        is_single: bool,
    ) -> tuple[StatesResult, Members]:
        """The states of `sources`, and which of them belongs to each of `session_ids`."""
        if is_single:
            read = _as_many(await self._reading.read(session_ids[0], seen, deadline))
        else:
            read = await self._reading.read_many(sources, seen, deadline, admit=admit)
        for _, error in read.errors:
            raise error
        if not read.version:
            raise InvalidInput(
                "session_ids must be sessions of one version of their model; got sessions of several:"
                " fork those of each version by themselves"
            )
        batch_size = int(read.sizes[0])
        if (read.sizes != batch_size).any():
            raise InvalidInput(
                "session_ids must be sessions of one batch_size;"
                f" got {batch_size} and {int(read.sizes[read.sizes != batch_size][0])}"
            )
        places = {session_id: place for place, session_id in enumerate(sources)}
        chosen = np.fromiter((places[session_id] for session_id in session_ids), np.intp, len(session_ids))
        if expected is not None:
            _require_revisions(session_ids, expected, read.revisions[chosen])
        return read, chosen


def _require_revisions(session_ids: Sequence[str], expected: U64, actual: U64) -> None:
    for place in np.flatnonzero(expected != actual).tolist():
        raise RevisionConflict(session_ids[place], int(expected[place]), int(actual[place]))


def _as_many(read: StateResult) -> StatesResult:
    """The state of one session, in the form of a read of many."""
    info, one = read.session, np.zeros(1, np.intp)
    return StatesResult(
        info.model,
        info.fingerprint,
        read.state,
        one,
        one + info.batch_size,
        np.array([info.revision], np.uint64),
        np.array([info.position], np.uint64),
        (),
        version=info.version,
        are_pinned=info.is_pinned,
    )
