"""Calls that make many sessions, and come again: what an earlier attempt has made is taken over, and the rest is made.

Where others use the store, the attempts of a call may be on several servers at the same time, and one that was held up
may go on long after another was answered. An attempt that is refused for good takes back what it made, as far as that
has the stamp that it wrote. So whoever answers that sessions are there which another attempt has made gives them a
stamp of its own first: from then on nobody takes them back.
"""

from __future__ import annotations

import asyncio
import dataclasses
from collections.abc import Container, Sequence

import numpy as np

from stepwell_server.core.callers import ANYBODY, Caller
from stepwell_server.core.exactly_once import Kind
from stepwell_server.core.sessions import Handles, SessionTable
from stepwell_server.engine.api import Observer
from stepwell_server.engine.change import MAX_TRIES, changed_elsewhere
from stepwell_server.engine.content import require_same_opening
from stepwell_server.engine.durability.committer import not_known
from stepwell_server.engine.durability.group_commit import GroupCommit
from stepwell_server.engine.sessions.directory import Directory
from stepwell_server.engine.sessions.end import Uses
from stepwell_server.engine.sessions.ids import require_session_id
from stepwell_server.engine.sessions.loading import Seen
from stepwell_server.engine.sessions.pieces import Pieces
from stepwell_server.engine.state.model import Model
from stepwell_server.engine.types import U64, Array, Mask, Members
from stepwell_server.errors import InvalidInput, ServerError, SessionExists, SessionGone
from stepwell_server.store.base import SOLE, Batch, Committed, stamped
from stepwell_server.store.record import Stored, decode_header

_SHOWN = 5
"""Sessions that a message names."""


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
    replayed: bool = False
    version: int = 0
    """Of the model."""
    resumed: Mask | None = None
    """`(n,)`, which were there before; None: none was."""
    versions: U64 | None = None
    """`(n,)`, the version that each is on; None: all are on `version`."""


@dataclasses.dataclass(frozen=True, slots=True)
class Wanted:
    """Many sessions that are to begin."""

    model: Model
    ids: Sequence[str]
    batch_size: int
    request_id: int
    are_chosen: bool
    """By the caller; else the ids were made here."""
    field: str
    """Of the request, that has the ids or would have them."""
    kind: Kind
    """Of the call."""
    content: U64
    """`(n,)`, what it says of each: see `content`."""
    revisions: U64 | None = None
    """`(n,)`, those of the sessions they are copies of."""
    positions: U64 | None = None
    """`(n,)`."""
    states: Sequence[Array] | None = None
    """Their rows one after the other; None: the model's initial state."""
    max_idle_ms: int | None = None
    """Of each, as the call asks for it: see `IdleLimits.of_new`."""
    is_pinned: bool = False
    """They stay on this version of the model."""
    who: Caller = ANYBODY
    """Who makes them."""
    is_version: bool = False
    """That version was asked for, by its number."""

    def part(self, places: Members) -> Wanted:
        """Some of them."""
        if len(places) == len(self.ids):
            return self
        return dataclasses.replace(
            self,
            ids=[self.ids[place] for place in places.tolist()],
            content=self.content[places],
            revisions=None if self.revisions is None else self.revisions[places],
            positions=None if self.positions is None else self.positions[places],
            states=None if self.states is None else [self._rows(array, places) for array in self.states],
        )

    def _rows(self, array: Array, places: Members) -> Array:
        by_session = array.reshape(-1, self.batch_size, *array.shape[1:])
        return by_session[places].reshape(-1, *array.shape[1:])


class Attempts:
    """Finds what earlier attempts of a call have made. Lives on the event loop."""

    def __init__(
        self,
        table: SessionTable,
        directory: Directory,
        commits: GroupCommit,
        pieces: Pieces,
        observer: Observer,
        usage: Uses,
    ) -> None:
        self._table = table
        self._directory = directory
        self._store = directory.store
        self._commits = commits
        self._pieces = pieces
        self._observer = observer
        self._usage = usage

    async def ids_to_make(
        self,
        field: str,
        chosen: Sequence[str],
        count: int,
        request_id: int,
        sources: Sequence[str] = (),
        *,
        namespace: str,
    ) -> list[str]:
        """The chosen ids, or new ones; `field` is the one of the request that has them."""
        if not chosen:
            ids = self._directory.ids
            return await ids.make_many(request_id, count, self._pieces, sources, namespace=namespace)
        async for part in self._pieces.of(chosen):
            for session_id in chosen[part]:
                require_session_id(field, session_id)
        if len(set(chosen)) != len(chosen):
            raise InvalidInput(f"{field} must be different from each other; got one of them twice")
        return list(chosen)

    async def absent(self, wanted: Wanted, seen: Seen) -> Members:
        """Places of sessions that are not live, of a call that resumes those that are.

        Raises:
            SessionExists: Live ones are not as the call wants them.
            InvalidInput: another call with the request id has made some.
        """
        absent: list[Members] = []
        unlike: list[int] = []
        told: list[str] = []
        async for part in self._pieces.of(wanted.ids):
            handles = self._directory.find_all(wanted.ids[part], seen)
            absent.append(part.start + np.flatnonzero(handles < 0))
            self._require_same(
                wanted.ids[part], handles, wanted.kind, wanted.content[part], wanted.request_id
            )
            for place in self._unlike(wanted, handles).tolist():
                unlike.append(part.start + place)
                if len(told) < _SHOWN:
                    told.append(self._described(wanted.ids, unlike[-1], int(handles[place])))
        if unlike:
            more = f"; {len(unlike) - _SHOWN} more differ" if len(unlike) > _SHOWN else ""
            version = f", version {wanted.model.version}," if wanted.is_version else ""
            raise SessionExists(
                f"{wanted.field} must name new sessions, or live ones to resume of model {wanted.model.name!r}{version}"
                f" with batch_size {wanted.batch_size}; {'; '.join(told)}{more}",
                session_id=wanted.ids[unlike[0]],
            )
        return np.concatenate(absent)

    def _unlike(self, wanted: Wanted, handles: Handles) -> Members:
        """Places of live sessions of another model or batch size."""
        table, live = self._table, np.flatnonzero(handles >= 0)
        fits = table.batch_size[handles[live]] == wanted.batch_size
        for index in np.unique(table.model[handles[live]]).tolist():
            own = self._directory.models.by_index[index]
            if own.name != wanted.model.name or (wanted.is_version and own is not wanted.model):
                fits &= table.model[handles[live]] != index
        unlike: Members = live[~fits]
        return unlike

    def _described(self, ids: Sequence[str], place: int, handle: int) -> str:
        own, rows = self._directory.models.by_handle(handle), int(self._table.batch_size[handle])
        return (
            f"session {ids[place]!r} (index {place}) has model {own.name!r}, version {own.version}, and"
            f" batch_size {rows}"
        )

    async def resume(self, wanted: Wanted, seen: Seen, opened: Container[str]) -> OpenedMany | None:
        """Resume live sessions, but for those that this attempt has `opened`.

        Returns:
            None: One has ended meanwhile, and all are to be looked at again.
        """
        table, ids = self._table, wanted.ids
        if not await self._take_over(self._made(ids, wanted.request_id), wanted.request_id):
            return None
        handles = table.find_all(ids)
        if (handles < 0).any():
            return None
        revisions, positions = table.revision[handles], table.position[handles]
        for place, session_id in enumerate(ids):
            if seen.newer(session_id) is not None:
                try:
                    info = self._directory.info_now(int(handles[place]), seen, is_same=True)
                except SessionGone:
                    return None
                revisions[place], positions[place] = info.revision, info.position
        self._usage.used(handles)
        model = wanted.model
        made = np.fromiter((session_id in opened for session_id in ids), np.bool_, len(ids))
        if wanted.request_id:
            made |= table.opened_with[handles] == wanted.request_id
        count = len(ids) - int(made.sum())
        if count:
            self._observer.sessions_opened(model.name, count, "resumed")
        indexes = np.unique(table.model[handles])
        versions = np.zeros(len(ids), np.uint64)
        for index in indexes.tolist():
            versions[table.model[handles] == index] = self._directory.models.by_index[index].version
        own = self._directory.models.by_handle(int(handles[0]))
        return OpenedMany(
            ids,
            model.name,
            own.program.fingerprint if len(indexes) == 1 else "",
            wanted.batch_size,
            revisions,
            positions,
            table.opened_with[handles],
            version=int(versions[0]),
            resumed=~made if count else None,
            versions=versions if len(indexes) > 1 else None,
        )

    def _made(self, ids: Sequence[str], request_id: int) -> list[str]:
        """Those that an earlier attempt of the call has made."""
        handles = self._table.find_all(ids)
        is_made = (handles >= 0) & (self._table.opened_with[handles] == request_id)
        return [ids[place] for place in np.flatnonzero(is_made).tolist()] if request_id else []

    def _require_same(
        self, ids: Sequence[str], handles: Handles, kind: Kind, content: U64, request_id: int
    ) -> None:
        """Refuse a call whose request id made some of these sessions by another call; -1 stands for none.

        Raises:
            InvalidInput: so it is.
        """
        own = np.flatnonzero((handles >= 0) & (self._table.opened_with[handles] == request_id))
        if request_id and len(own):
            model = self._directory.models.by_handle(int(handles[own[0]]))
            names = ids if len(own) == len(ids) else [ids[place] for place in own.tolist()]
            stored = self._table.opened_digest[handles[own]]
            require_same_opening(model, names, stored, kind, content[own])

    async def made_before(
        self, kind: Kind, ids: Sequence[str], content: U64, seen: Seen, request_id: int
    ) -> OpenedMany | None:
        """What this very request has made; None if it has not made all of it.

        Raises:
            InvalidInput: another call with the request id has made some of it.
            Unavailable, OutcomeUnknown: it is there, and it is not sure that it stays.
        """
        if not request_id:
            return None
        table, handles = self._table, self._directory.find_all(ids, seen)
        self._require_same(ids, handles, kind, content, request_id)  # before any of the others is made
        if self._directory.live(ids[0], seen) is None:
            return None
        if not ((handles >= 0).all() and (table.opened_with[handles] == request_id).all()):
            return None
        model = self._directory.models.by_handle(int(handles[0]))
        known = OpenedMany(
            ids,
            model.name,
            model.program.fingerprint,
            int(table.batch_size[handles[0]]),
            table.revision[handles],
            table.position[handles],
            table.opened_with[handles],
            replayed=True,
            version=model.version,
        )
        if not await self._take_over(ids, request_id):
            return None
        self._observer.replayed(model.name, kind.name.lower(), len(ids))
        return known

    async def left(self, field: str, ids: Sequence[str], seen: Seen, request_id: int) -> Members | None:
        """Places of sessions that are to be made: of all, or of those that an earlier attempt of the call did not make.

        Only what nobody has changed, closed or taken is made whole: else the call is judged as one that is new.

        Returns:
            None: it has changed meanwhile, and is to be looked at again.

        Raises:
            SessionExists: some are another call's, beside those of this one; `field` is the one of the request that has ids.
            Unavailable, OutcomeUnknown: as `made_before`.
        """
        every: Members = np.arange(len(ids))
        if not request_id:
            return every
        table, handles = self._table, self._directory.find_all(ids, seen)
        there = handles >= 0
        found = handles[there]
        is_own = table.opened_with[found] == request_id
        if not is_own.any():
            return every
        if not is_own.all():
            others = np.flatnonzero(there)[~is_own].tolist()
            self._directory.require_new(field, [ids[place] for place in others], seen)
        missing = [ids[place] for place in np.flatnonzero(~there).tolist()]
        is_whole = not missing or table.request_id[found].any()
        if is_whole or len(self._directory.unusable(missing, seen)):
            return every
        if any(self._directory.ended(session_id, seen) is not None for session_id in missing):
            return every
        made = [ids[place] for place in np.flatnonzero(there).tolist()]
        return every[~there] if await self._take_over(made, request_id) else None

    async def _take_over(self, ids: Sequence[str], request_id: int) -> bool:
        """Give sessions another stamp that an attempt of a call has made; False if one of them is not there any more.

        Those that were changed since have another one already. What nobody else can write, nobody else takes back.
        """
        handles = self._table.find_all(ids)
        if (handles >= 0).all() and (self._table.stamp[handles] == SOLE).all():
            return True
        async for part in self._pieces.of(ids):
            if not await self._take_over_part(ids[part], request_id):
                return False
        return True

    async def _take_over_part(self, ids: Sequence[str], request_id: int) -> bool:
        for _ in range(MAX_TRIES):
            puts: list[tuple[str, Stored]] = []
            follows: list[int] = []
            for session_id, each in zip(ids, await self._store.fetch(ids), strict=True):
                if each.record is None:
                    return False
                header = decode_header(session_id, each.record)
                if header.opened_with != request_id:
                    return False
                if not header.request_id:
                    puts.append((session_id, each.record))
                    follows.append(each.stamp)
            if not puts or await self._stamp(puts, np.array(follows, np.uint64)):
                return True
        raise changed_elsewhere(ids[0])

    async def _stamp(self, puts: Sequence[tuple[str, Stored]], follows: U64) -> bool:
        """Write records as they are, with another stamp; False if one was changed meanwhile."""
        stamp = self._store.new_stamp()
        told: asyncio.Future[Committed | ServerError] = asyncio.get_running_loop().create_future()

        def done(committed: Committed | ServerError) -> None:
            if isinstance(committed, Committed):
                self._know(puts, follows, stamp, committed)
            told.set_result(committed)

        batch = Batch(puts=puts, follows=follows, stamps=stamped(stamp, len(puts)))
        self._commits.submit(lambda: batch, len(puts), done)
        committed = await asyncio.shield(told)
        if isinstance(committed, ServerError):
            raise committed
        if committed.unknown:
            raise not_known()
        return not committed.conflicts

    def _know(
        self, puts: Sequence[tuple[str, Stored]], follows: U64, stamp: int, committed: Committed
    ) -> None:
        """Let the table say what its sessions are stamped with now."""
        table = self._table
        for (session_id, _), before in zip(puts, follows.tolist(), strict=True):
            handle = table.find(session_id)
            is_kept = session_id not in committed.conflicts and session_id not in committed.unknown
            if is_kept and handle is not None and int(table.stamp[handle]) == before:
                table.stamp[handle] = stamp
