"""Sessions are forked, many at once: all of them or none."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence

import numpy as np

from stepwell_server.core import namespaces
from stepwell_server.core.callers import ANYBODY, Caller
from stepwell_server.core.exactly_once import Kind
from stepwell_server.engine.api import StatesRead
from stepwell_server.engine.content import content_of_fork
from stepwell_server.engine.intake.validation import require_sessions
from stepwell_server.engine.sessions.attempts import OpenedMany, Wanted
from stepwell_server.engine.sessions.directory import Directory
from stepwell_server.engine.sessions.loading import Seen
from stepwell_server.engine.sessions.opening import Opening
from stepwell_server.engine.sessions.pieces import TURN, Pieces
from stepwell_server.engine.sessions.reading import Reading
from stepwell_server.engine.types import U64, Array, Members
from stepwell_server.errors import InvalidInput, MessageTooLarge, Overloaded, RevisionConflict

#: Bytes of states that are copied at once: they are held while sessions are made of them.
MAX_FORK_BYTES = 256 << 20
_COPY_AGAIN_S = 0.1


class Forking:
    """Forks many sessions. Lives on the event loop.

    Their states are read, each when its turn comes, and then sessions are made of them: no session is held up for
    another one.
    """

    def __init__(
        self,
        directory: Directory,
        opening: Opening,
        reading: Reading,
        pieces: Pieces,
        *,
        drain: Callable[[], None],
        require_open: Callable[[], None],
    ) -> None:
        self._directory = directory
        self._opening = opening
        self._reading = reading
        self._pieces = pieces
        self._drain = drain
        self._require_open = require_open
        self._copied_bytes = 0
        """Of states that are being copied."""

    async def fork(
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

        Each is read after what was received before for it.

        Args:
            session_ids: One may come more than once.
            new_session_ids: One each, or none: they are made here.
            expected: `(n,)`; None: any revisions.
            request_id: 0 for none.
            max_idle_ms: Of each, as in `Opening.open`.
            deadline: Of the reading.
            who: Who asks.

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
        namespace = namespaces.prefix_of(namespaces.tenant_of(session_ids[0]))  # they have one caller
        ids = await self._opening.attempts.ids_to_make(
            field, new_session_ids, count, request_id, session_ids, namespace=namespace
        )
        sources = list(dict.fromkeys(session_ids))
        # Together: between two looks at a store that is awaited, changes that came later would overtake the reading.
        seen = await self._opening.seen([*ids, *sources])
        self._drain()
        content = np.zeros(count, np.uint64)
        async for part in self._pieces.of(ids):
            content[part] = content_of_fork(session_ids[part], max_idle_ms)
        known = await self._opening.attempts.made_before(Kind.FORK, ids, content, seen, request_id)
        if known is not None:  # also if those it was made of are gone by now
            return known
        left = await self._opening.attempts.left(field, ids, seen, request_id)
        new = (
            [new_session_ids[place] for place in left.tolist()]
            if new_session_ids and left is not None
            else ()
        )
        async for part in self._pieces.of(new):
            self._directory.require_new(field, new[part], seen)
        if len(new) > TURN or left is None or len(left) < count:  # others had turns meanwhile
            seen = await self._directory.look(sources, anew=True)
            self._drain()
        with self._copying(session_ids) as admit:
            read, chosen = await self._read_all(session_ids, sources, seen, expected, deadline, admit)
            batch_size = int(read.sizes[0])
            states: Sequence[Array] = list(read.state.values())
            if len(read.members) < count:
                states = [_repeated(array, chosen, batch_size) for array in states]
            return await self._opening.make_many(
                Wanted(
                    self._directory.models.by_name(f"{read.model}@{read.version}"),
                    ids,
                    batch_size,
                    request_id,
                    bool(new_session_ids),
                    field,
                    Kind.FORK,
                    content,
                    read.revisions[chosen],
                    read.positions[chosen],
                    states,
                    max_idle_ms,
                    read.are_pinned,
                    who,
                )
            )

    @contextlib.contextmanager
    def _copying(self, session_ids: Sequence[str]) -> Iterator[Callable[[int], None]]:
        """Count the bytes of states that are copied in the block, which says how many the originals have.

        Raises:
            MessageTooLarge: they are more than may be copied at once.
            Overloaded: so they are with those of other calls.
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
                    retry_after_s=_COPY_AGAIN_S,
                )
            own = copies
            self._copied_bytes += own

        try:
            yield admit
        finally:
            self._copied_bytes -= own

    async def _read_all(
        self,
        session_ids: Sequence[str],
        sources: Sequence[str],
        seen: Seen,
        expected: U64 | None,
        deadline: float,
        admit: Callable[[int], None],
    ) -> tuple[StatesRead, Members]:
        """The states of `sources`, and which of them each of `session_ids` is."""
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


def _repeated(array: Array, chosen: Members, batch_size: int) -> Array:
    """The rows of the chosen ones of sessions whose rows lie one after the other."""
    by_session = array.reshape(-1, batch_size, *array.shape[1:])
    return by_session[chosen].reshape(-1, *array.shape[1:])
