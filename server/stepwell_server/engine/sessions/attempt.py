"""What a call that begins sessions asks for, and what an earlier attempt of the same call has made.

On a shared store, attempts of one call may run on several servers at the same time. One that was held up may continue
long after another was answered. An attempt that is refused for good deletes what it made, but only sessions that have
the stamp it wrote. So an attempt that answers with sessions of an earlier attempt first gives them a stamp of its own:
from then on nobody deletes them.
"""

from __future__ import annotations

import asyncio
import dataclasses
from collections.abc import Container, Mapping, Sequence
from typing import NamedTuple

import numpy as np

from stepwell_server.core.exactly_once import Kind
from stepwell_server.core.quotas import SESSION_BYTES, Usage
from stepwell_server.core.sessions import Handles
from stepwell_server.core.slots import Rows
from stepwell_server.engine.api import SessionInfo
from stepwell_server.engine.change import MAX_TRIES, changed_elsewhere
from stepwell_server.engine.commit.committer import not_known
from stepwell_server.engine.content import require_same_opening
from stepwell_server.engine.sessions.context import Context
from stepwell_server.engine.sessions.lookup import Seen
from stepwell_server.engine.state.fields import at_birth
from stepwell_server.engine.state.model import Model
from stepwell_server.engine.types import U64, Array, Mask, Members
from stepwell_server.errors import ServerError, SessionExists, SessionGone
from stepwell_server.store.base import NO_STAMPS, Batch, Committed, stamped
from stepwell_server.store.record import Stored, decode_header

_NO_ROWS: Rows = np.zeros(0, np.intp)
#: Sessions that a message names.
_MAX_NAMED = 5


@dataclasses.dataclass(frozen=True, slots=True)
class OpenedMany:
    """Answer to opening or forking many sessions."""

    session_ids: Sequence[str]
    model: str
    fingerprint: str
    batch_size: int
    revisions: U64
    """`(n,)`."""
    positions: U64
    """`(n,)`."""
    uids: U64
    """`(n,)`: see `SessionInfo.uid`."""
    first: SessionInfo
    """The first of them."""
    replayed: bool = False
    version: int = 0
    """Of the model."""
    resumed: Mask | None = None
    """`(n,)`: which existed before; None: none of them did."""
    versions: U64 | None = None
    """`(n,)`: the version of each; None: all are on `version`."""


class Made(NamedTuple):
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
    undos: list[Made] = dataclasses.field(default_factory=list)
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
    least_revisions: U64
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
    """`(n,)`: with which they begin. An id that had a session before continues its revisions: see `Directory.past`."""
    follows: U64 = dataclasses.field(default_factory=lambda: NO_STAMPS)
    """`(n,)`: see `Directory.follows`."""
    closes: Mapping[str, tuple[int, ...]] = dataclasses.field(default_factory=dict)
    """See `Past.closes`."""
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
            least_revisions=self.least_revisions[places],
            positions=self.positions[places],
            states=None if self.states is None else [self._rows(array, places) for array in self.states],
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
            least_revisions=self.least_revisions[part],
            positions=self.positions[part],
            states=None if self.states is None else [array[own] for array in self.states],
            rows=self.rows[own],
            revisions=self.revisions[part],
            follows=self.follows[part],
        )

    def _rows(self, array: Array, places: Members) -> Array:
        by_session = array.reshape(-1, self.batch_size, *array.shape[1:])
        return by_session[places].reshape(-1, *array.shape[1:])


class Attempts:
    """Finds what earlier attempts of a call have made, and sessions that it resumes. Lives on the event loop."""

    def __init__(self, context: Context) -> None:
        self._context = context
        self._table = context.table
        self._directory = context.directory
        self._pieces = context.directory.pieces

    # ------------------------------------------------------------------------------------------------------- resuming

    async def absent(self, new: NewSessions, seen: Seen) -> Members:
        """Places of sessions that are not live, for a call that resumes the live ones.

        Raises:
            SessionExists: a live one has another model or batch size.
            InvalidInput: another call with the request id has made some.
        """
        absent: list[Members] = []
        unlike: list[int] = []
        described: list[str] = []
        async for part in self._pieces.of(new.ids):
            handles = self._directory.find_all(new.ids[part], seen)
            absent.append(part.start + np.flatnonzero(handles < 0))
            self._require_same(new, part, handles)
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
        """Places of live sessions of another model or batch size."""
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

    async def resume(self, new: NewSessions, seen: Seen, opened: Container[str]) -> OpenedMany | None:
        """Resume live sessions, except those that this attempt has `opened`.

        Returns:
            None: one has ended meanwhile, and all must be looked at again.
        """
        table, ids = self._table, new.ids
        handles = table.find_all(ids)
        is_made = (handles >= 0) & (table.opened_with[handles] == new.request_id)
        made = [ids[place] for place in np.flatnonzero(is_made).tolist()] if new.request_id else []
        if not await self._take_over(made, new.request_id, self._directory.store.new_stamp()):
            return None
        handles = table.find_all(ids)
        if (handles < 0).any():
            return None
        is_new = np.fromiter((session_id in opened for session_id in ids), np.bool_, len(ids))
        if new.request_id:
            is_new |= table.opened_with[handles] == new.request_id
        try:
            answer = self._answer(ids, handles, seen)
        except SessionGone:
            return None
        self._context.uses.used(handles)
        count = len(ids) - int(is_new.sum())
        if not count:
            return answer
        self._context.observer.sessions_opened(new.model.name, count, "resumed")
        return dataclasses.replace(answer, resumed=~is_new)

    def _answer(self, ids: Sequence[str], handles: Handles, seen: Seen) -> OpenedMany:
        """What live sessions are, by what another server made of them while something is under way here.

        Raises:
            SessionGone: one of them has ended there.
        """
        table, models = self._table, self._directory.models
        revisions, positions = table.revision[handles], table.position[handles]
        for place, session_id in enumerate(ids):
            if seen.newer(session_id) is not None:
                info = self._directory.info_now(int(handles[place]), seen, is_same=True)
                revisions[place], positions[place] = info.revision, info.position
        indexes = np.unique(table.model[handles])
        versions = np.zeros(len(ids), np.uint64)
        for index in indexes.tolist():
            versions[table.model[handles] == index] = models.by_index[index].version
        own = models.by_handle(int(handles[0]))
        return OpenedMany(
            ids,
            own.name,
            own.program.fingerprint if len(indexes) == 1 else "",
            int(table.batch_size[handles[0]]),
            revisions,
            positions,
            table.opened_with[handles],
            self._directory.info_now(int(handles[0]), seen),
            version=int(versions[0]),
            versions=versions if len(indexes) > 1 else None,
        )

    # ------------------------------------------------------------------------------------------------ the same attempt

    def _require_same(self, call: Call, part: slice, handles: Handles) -> None:
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

    async def find(self, call: Call, seen: Seen) -> OpenedMany | Members | None:
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
        self._require_same(call, slice(0, len(ids)), handles)
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
        if not await self._take_over(made, request_id, stamp):
            return None
        call.undos.append(Made(made, stamp, self._directory.models.by_handle(int(handles[there][0])).name))
        return every[~there]

    async def _answer_again(self, call: Call, handles: Handles, seen: Seen) -> OpenedMany | None:
        """The answer to a call that has made all of its sessions; None: one of them has ended, or is another one by now."""
        try:
            answer = self._answer(call.ids, handles, seen)
        except SessionGone:
            await self.free(call.ids)
            return None
        # nobody deletes a session that is alone in its call
        if len(handles) > 1 and not await self._take_over(
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
                await self._context.turns.free(handle)

    async def _take_over(self, ids: Sequence[str], request_id: int, stamp: int) -> bool:
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
            puts: list[tuple[str, Stored]] = []
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

    async def _stamp(self, puts: Sequence[tuple[str, Stored]], follows: U64, stamp: int) -> bool:
        """Write records as they are, with a new stamp; False if one was changed meanwhile."""
        answered: asyncio.Future[Committed | ServerError] = asyncio.get_running_loop().create_future()

        def done(committed: Committed | ServerError) -> None:
            if isinstance(committed, Committed):
                self._set_stamps(puts, follows, stamp, committed)
            answered.set_result(committed)

        batch = Batch(puts=puts, follows=follows, stamps=stamped(stamp, len(puts)))
        self._context.commits.submit(lambda: batch, len(puts), done)
        committed = await asyncio.shield(answered)
        if isinstance(committed, ServerError):
            raise committed
        if committed.unknown:
            raise not_known()
        return not committed.conflicts

    def _set_stamps(
        self, puts: Sequence[tuple[str, Stored]], follows: U64, stamp: int, committed: Committed
    ) -> None:
        """Note in the table what its sessions are stamped with now."""
        table = self._table
        for (session_id, _), before in zip(puts, follows.tolist(), strict=True):
            handle = table.find(session_id)
            is_kept = session_id not in committed.conflicts and session_id not in committed.unknown
            if is_kept and handle is not None and int(table.stamp[handle]) == before:
                table.stamp[handle] = stamp
