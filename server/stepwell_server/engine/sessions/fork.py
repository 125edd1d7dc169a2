"""Sessions are forked: their states are read, each after what was received before, and sessions begin with them.

No session is held up for another one, nor while the new ones are committed.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence

import numpy as np

from stepwell_server.core import namespaces
from stepwell_server.core.callers import ANYBODY, Caller
from stepwell_server.core.exactly_once import Kind
from stepwell_server.engine.api import Opened, StateRead, StatesRead
from stepwell_server.engine.content import content_of_fork
from stepwell_server.engine.intake.validation import require_sessions
from stepwell_server.engine.sessions.attempt import Call, NewSessions, OpenedMany
from stepwell_server.engine.sessions.begin import Begin
from stepwell_server.engine.sessions.context import Context
from stepwell_server.engine.sessions.directory import require_session_id
from stepwell_server.engine.sessions.lookup import Seen
from stepwell_server.engine.sessions.read import StateReader
from stepwell_server.engine.shares import TURN
from stepwell_server.engine.types import U64, Array, Members
from stepwell_server.errors import (
    InvalidInput,
    MessageTooLarge,
    Overloaded,
    RevisionConflict,
    ServerError,
    Unavailable,
)

#: Bytes of states that forks copy at the same time: they are held while sessions are made of them.
MAX_FORK_BYTES = 256 << 20
_RETRY_S = 0.1


class Fork:
    """Forks sessions. Lives on the event loop."""

    def __init__(self, context: Context, begin: Begin, reading: StateReader) -> None:
        self._context = context
        self._directory = context.directory
        self._begin = begin
        self._reading = reading
        self._copied_bytes = 0
        """Of states that are being copied."""

    async def one(
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
        """Open a session with the state, revision and position of another, after what was received before for that one.

        Raises:
            SessionGone, SessionExists, RevisionConflict, InvalidInput, Overloaded, DeadlineExceeded
        """
        self._context.require_open()
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
        made = await self._fork(call, [session_id], revisions, limit_ms, deadline, who)
        return Opened(made.first, replayed=made.replayed)

    async def many(
        self,
        session_ids: Sequence[str],
        *,
        new_session_ids: Sequence[str] = (),
        expected: U64 | None = None,
        request_id: int = 0,
        max_idle_ms: int | None = None,
        deadline: float = float("inf"),
        who: Caller = ANYBODY,
    ) -> OpenedMany:
        """Open sessions with the states, revisions and positions of others: all of them or none.

        Each is read after what was received before for it, and no session is held up for another one.

        Args:
            session_ids: One may come more than once.
            new_session_ids: One each, or none: they are made here.
            expected: `(n,)`; None: any revisions.
            request_id: 0 for none.
            max_idle_ms: Of each, as in `open`.
            deadline: Of the reading.
            who: The caller.

        Raises:
            SessionGone, SessionExists, RevisionConflict, InvalidInput, Overloaded, DeadlineExceeded, Unavailable
        """
        self._context.require_open()
        require_sessions(session_ids, may_repeat=True)
        count = len(session_ids)
        if new_session_ids and len(new_session_ids) != count:
            raise InvalidInput(
                f"new_session_ids must be empty or one for each of session_ids ({count});"
                f" got {len(new_session_ids)}"
            )
        field = "new_session_ids"
        namespace = namespaces.prefix_of(namespaces.tenant_of(session_ids[0]))  # they have one caller
        ids = await self._begin.ids(
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
        return await self._fork(call, session_ids, expected, limit_ms, deadline, who)

    async def _fork(
        self,
        call: Call,
        session_ids: Sequence[str],
        expected: U64 | None,
        max_idle_ms: int,
        deadline: float,
        who: Caller,
    ) -> OpenedMany:
        try:
            return await self._attempt(call, session_ids, expected, max_idle_ms, deadline, who)
        except Unavailable:  # the call comes again, and continues with what it has made
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
        who: Caller,
    ) -> OpenedMany:
        ids, sources, is_single = call.ids, list(dict.fromkeys(session_ids)), call.field == "new_session_id"
        # Together: between two looks at a store that is awaited, changes that came later would overtake the reading.
        seen = await self._begin.look([*ids, *sources])
        self._context.drain()
        found = await self._begin.attempts.find(call, seen)
        if isinstance(found, OpenedMany):  # also if those it was made of have ended by now
            return found
        missing = [ids[place] for place in found.tolist()] if call.are_named and found is not None else ()
        async for part in self._directory.pieces.of(missing):
            self._directory.require_new(call.field, missing[part], seen)
        if len(missing) > TURN or found is None or len(found) < len(ids):  # others had turns meanwhile
            seen = await self._directory.look(sources, anew=True)
            self._context.drain()
        with self._copying(session_ids) as admit:
            read, chosen = await self._read(
                session_ids, sources, seen, expected, deadline, admit, is_single=is_single
            )
            batch_size, states = int(read.sizes[0]), list(read.state.values())
            if len(read.members) < len(ids):
                states = [_repeated(array, chosen, batch_size) for array in states]
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
                owner=self._begin.owner(who),
                least_revisions=read.revisions[chosen],
                positions=read.positions[chosen],
                states=states,
                is_pinned=read.are_pinned,
                is_single=is_single,
                undos=call.undos,
            )
            return await self._begin.begin(new, self._begin.attempts.find)

    @contextlib.contextmanager
    def _copying(self, session_ids: Sequence[str]) -> Iterator[Callable[[int], None]]:
        """Count the bytes of states that are copied in the block. It calls what it gets with the bytes of the originals.

        Raises:
            MessageTooLarge: they are more than may be copied at once.
            Overloaded: they are, with those of other calls.
        """
        own = 0

        def admit(byte_count: int) -> None:
            nonlocal own
            copies = byte_count * len(session_ids) // len(set(session_ids))
            if copies > MAX_FORK_BYTES:
                raise MessageTooLarge(
                    f"session_ids must be sessions whose states have at most {MAX_FORK_BYTES} bytes together;"
                    f" got {len(session_ids)}, whose copies would have {copies}: fork fewer at once"
                )
            if self._copied_bytes + copies > MAX_FORK_BYTES and self._copied_bytes:
                raise Overloaded(
                    f"bytes of states that are being copied must stay within {MAX_FORK_BYTES};"
                    f" {self._copied_bytes} are and {copies} came",
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
        seen: Seen,
        expected: U64 | None,
        deadline: float,
        admit: Callable[[int], None],
        *,
        is_single: bool,
    ) -> tuple[StatesRead, Members]:
        """The states of `sources`, and which of them each of `session_ids` is."""
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


def _as_many(read: StateRead) -> StatesRead:
    """The state of one session, as if it had been read with others."""
    info, one = read.session, np.zeros(1, np.intp)
    return StatesRead(
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


def _repeated(array: Array, chosen: Members, batch_size: int) -> Array:
    """The rows of the chosen ones of sessions whose rows lie one after the other."""
    by_session = array.reshape(-1, batch_size, *array.shape[1:])
    return by_session[chosen].reshape(-1, *array.shape[1:])
