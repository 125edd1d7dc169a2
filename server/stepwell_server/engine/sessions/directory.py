"""Finds models by name and sessions by id, explains missing ones, and generates ids."""

from __future__ import annotations

import asyncio
import base64
import dataclasses
import hashlib
import hmac
import re
import secrets
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from stepwell_server.clock import Clock
from stepwell_server.core.idle import IdleLimits
from stepwell_server.core.namespaces import own, tenant_of
from stepwell_server.core.quotas import NOTHING, Usage
from stepwell_server.core.sessions import Handles, SessionTable, are_missing
from stepwell_server.engine.api import Observer, SessionInfo
from stepwell_server.engine.change import MAX_ERRORS, shared_error
from stepwell_server.engine.commit.tombstones import ended_by
from stepwell_server.engine.eager import Rest, start
from stepwell_server.engine.intake.pager import Pager
from stepwell_server.engine.intake.queues import SessionQueues
from stepwell_server.engine.sessions.end import Expiry, Removal
from stepwell_server.engine.sessions.lookup import Loader, Lookup, LookupResult
from stepwell_server.engine.state.fields import mark_of
from stepwell_server.engine.state.model import Model
from stepwell_server.engine.threads import PIECE_SIZE, Pieces
from stepwell_server.engine.types import Members
from stepwell_server.engine.versions.history import MoveKind
from stepwell_server.engine.versions.registry import Models
from stepwell_server.errors import (
    InvalidInput,
    ModelMismatch,
    ModelNotFound,
    ServerError,
    SessionExists,
    SessionGone,
    SessionLost,
    SessionNotFound,
    StateCorrupt,
    Unavailable,
)
from stepwell_server.store import counts
from stepwell_server.store.base import End, Store
from stepwell_server.store.record import Header, decode_header, header_or_none

MAX_ID_LENGTH = 256
MAX_SESSIONS_PER_CALL = 65_536
MAX_IDS_PER_CALL = 4096
"""The most ids in one call that closes or reads sessions. Parsing and resolving them takes about 1 ms."""
#: Ids of single sessions; then ids of one of many sessions, in the current and in an earlier form that is still in
#: use.
_GENERATED_ID = re.compile(r"s-([0-9a-f]{8})-[A-Za-z0-9_-]{22}([A-Za-z0-9_-]{4}|-[0-9a-f]{4})?")
_TOKEN_BYTES, _TOKEN_LENGTH, _DIGITS = 16, 22, 24
#: The common part of the ids of one call.
_GROUP_BYTES = 3
#: Calls on more sessions than this look them up in parts, and generate ids on a thread.
PIECE = 4096
#: Calls on more sessions than this look them up in parts. A session that leaves the table between two parts is unknown
#: to the caller. The store is asked for fewer at a time: `Store.fetch_size`.
LOOKUP_BATCH_SIZE = 1024
#: Sessions in such a part: a part of 1,024 kept steps waiting for up to a millisecond.
LOOKUP_PART_SIZE = 256


@dataclasses.dataclass(frozen=True, slots=True)
class Context:
    """The parts that operations on sessions share. Lives on the event loop."""

    table: SessionTable
    directory: Directory
    queues: SessionQueues
    pager: Pager
    removal: Removal
    clock: Clock
    observer: Observer


class EarlierSession(NamedTuple):
    """What is remembered of an earlier session of an id."""

    revision: int
    """The lowest revision for a new session of the id: one more than the earlier session's last.

    So a client that still has a revision of the earlier session gets a conflict, instead of stepping another
    session.
    """
    closes: tuple[int, ...] = ()
    """Request ids of the calls that closed it: see `Tombstone.closes`."""
    stamp: int = 0
    """The stamp of its end, which the store must still have when a session of the id begins; 0: none."""


_Alike = dict[tuple[object, ...], tuple[ServerError, list[int]]]
"""Missing sessions by what they have in common: the error of the first of them, and the indexes of all."""


def _errors_of(alike: _Alike) -> Iterator[tuple[Members, ServerError]]:
    """Their errors; sessions that are missing for the same reason share one."""
    for error, some in alike.values():
        yield np.array(some, np.intp), shared_error(error, len(some))


class Directory:
    """Finds models and sessions, and explains how sessions ended. Lives on the event loop.

    A session enters the table when it is first named; before that, only the store may have it. Callers await `look`
    first, and pass its result on.
    """

    def __init__(
        self,
        table: SessionTable,
        models: Models,
        store: Store,
        *,
        lookup: Lookup,
        loader: Loader,
        expiry: Expiry,
        clock: Clock,
    ) -> None:
        self._table = table
        self.models = models
        self._lookup = lookup
        self.pieces = lookup.pieces
        """Divides calls on many sessions."""
        self._expiry = expiry
        self._clock = clock
        self._loader = loader
        self.store = store
        self.ids = IdMaker(store)
        self.here = LookupResult({})
        """A lookup result without a lookup: enough for sessions in the table."""

    async def look(self, session_ids: Sequence[str], *, reread: bool = False) -> LookupResult:
        """Look sessions up in the store, in the order of all calls on them: see `Lookup.wait`.

        Raises:
            Overloaded: too many calls wait for the store.
            Unavailable: the store cannot be read, and one of the sessions is active here.
        """
        if len(session_ids) > LOOKUP_BATCH_SIZE:
            return await self._look_in_parts(session_ids, reread=reread)
        if not (reread or self._lookup.must_wait(session_ids)):
            return self.here
        self._lookup.require_room()
        return await self._lookup.wait(session_ids, reread=reread)

    def are_as_stored(self, handles: Handles) -> bool:
        """Whether the store says at once that sessions of the table are current."""
        ids = [self._table.session_id(handle) for handle in handles.tolist()]
        found = start(self.store.fetch(ids, self._table.stamp[handles].tolist()))
        if isinstance(found, Rest):
            found.close()  # a caller that needs to know looks the sessions up, in the order of all calls on them
            return False
        return all(each.is_known for each in found)

    async def _look_in_parts(self, session_ids: Sequence[str], *, reread: bool) -> LookupResult:
        """`look` for a long list: one part in each iteration of the event loop.

        A session that leaves the table while later parts are looked up is then unknown: its callers get
        `Unavailable` and must retry.
        """
        tenant, seen = tenant_of(session_ids[0]), LookupResult({})
        size = min(LOOKUP_PART_SIZE, LOOKUP_BATCH_SIZE)
        for at in range(0, len(session_ids), size):
            await self.pieces.turn(tenant)
            part = session_ids[at : at + size]
            if reread or self._lookup.must_wait(part):
                self._lookup.require_room()
                found = await self._lookup.wait(part, reread=reread)
                is_here = self._table.has_any(part)
                seen.add(found, [i for i in part if i in self._table] if is_here else ())
        return seen

    def find(self, session_id: str, seen: LookupResult) -> int:
        """The handle of a live session.

        Raises:
            SessionGone: it does not exist.
            ModelMismatch, ModelNotFound: its model is not loaded.
            StateCorrupt: its record is corrupt.
            Unavailable: the store cannot be read.
        """
        handle = self._find(session_id, seen)
        if handle is None:
            raise self.gone(session_id, seen)
        return handle

    def _find(self, session_id: str, seen: LookupResult) -> int | None:
        handle = self._table.find(session_id)
        return self._loader.load(session_id, seen) if handle is None else handle

    def live(self, session_id: str, seen: LookupResult) -> int | None:
        """The handle of a live session, or None.

        Raises:
            ServerError: as for `find`, except `SessionGone`.
        """
        try:
            return self._find(session_id, seen)
        except SessionGone:
            return None

    def find_all(self, session_ids: Sequence[str], seen: LookupResult) -> Handles:
        """Handles of many sessions; -1 for those that cannot be used: see `errors_for`."""
        handles = self._table.find_all(session_ids)
        if are_missing(handles):
            missing = [session_ids[i] for i in np.flatnonzero(handles < 0).tolist()]
            try:
                loaded, _ = self._loader.load_all(missing, seen)
            except ServerError:
                loaded = 0
            if loaded:
                handles = self._table.find_all(session_ids)
        return handles

    async def chosen_or_new(
        self,
        field: str,
        named: Sequence[str],
        count: int,
        request_id: int,
        sources: Sequence[str] = (),
        *,
        namespace: str,
    ) -> list[str]:
        """The ids in the request's `field`, or generated ones."""
        if not named:
            make = self.ids.make_many
            return await make(request_id, count, self.pieces, sources, namespace=namespace)
        async for part in self.pieces.of(named):
            for session_id in named[part]:
                require_session_id(field, session_id)
        if len(set(named)) != len(named):
            raise InvalidInput(f"{field} must not repeat an id; got one twice")
        return list(named)

    def require_new(self, name: str, session_ids: Sequence[str], seen: LookupResult) -> None:
        """Refuse ids of existing sessions, even if they cannot be stepped here.

        Raises:
            SessionExists: one is live.
            ModelMismatch, ModelNotFound, StateCorrupt: one exists and cannot be stepped here.
            Unavailable: the store cannot be read.
        """
        _, unusable = self._loader.load_all(session_ids, seen)
        if self._table.has_any(session_ids):
            session_id = next(i for i in session_ids if i in self._table)
            raise exists(name, session_id)
        if unusable:
            raise self.error_for(unusable[0], seen)

    def require_not_gone(self, name: str, seen: LookupResult) -> None:
        """Refuse a repeated call whose session has ended: it must not begin again."""
        error = self.ended(name, seen)
        if error is not None:
            raise error

    def require_own(self, chosen: Sequence[str], seen: LookupResult) -> None:
        """Refuse chosen ids that may belong to lost sessions, which must not begin again unnoticed.

        A server may have generated the id, or the store may have lost sessions and cannot tell whether this is one.
        """
        for session_id, stone in zip(chosen, seen.tombstones(chosen), strict=True):
            is_lost = self.store.damage_of(session_id) if stone is None else stone.end is End.LOST
            if is_lost or self.ids.is_generated(session_id):
                raise self.gone(session_id, seen)

    def require_version(self, handle: int, wanted: Model) -> None:
        """Refuse to resume a session that is on another version of the model than requested.

        Raises:
            SessionExists: it is.
        """
        own = self.models.by_handle(handle)
        if own is not wanted and own.name == wanted.name:
            session_id = self._table.session_id(handle)
            raise SessionExists(
                f"session {session_id!r} is open on version {own.version} of model {own.name!r}; got version"
                f" {wanted.version}",
                session_id=session_id,
            )

    def error_for(self, session_id: str, seen: LookupResult) -> ServerError:
        """The error for a session that cannot be used."""
        try:
            self.find(session_id, seen)
        except ServerError as error:
            return error
        return Unavailable(f"session {session_id!r} must be readable; the store could not read it just now")

    def errors_for(
        self, session_ids: Sequence[str], members: Members, seen: LookupResult
    ) -> Iterator[tuple[Members, ServerError]]:
        """The errors for those of some sessions, by index, that cannot be used.

        Sessions that are missing for the same reason share an error, which names the first of them: an error for
        each of 65,536 would block the event loop for seconds.
        """
        if len(members) <= MAX_ERRORS:
            for member in members.tolist():
                yield np.array([member]), self.error_for(session_ids[member], seen)
            return
        alike: _Alike = {}
        self._sort_missing(session_ids, members, seen, alike)
        yield from _errors_of(alike)

    async def errors_for_many(
        self, session_ids: Sequence[str], members: Members, seen: LookupResult
    ) -> list[tuple[Members, ServerError]]:
        """`errors_for` for many sessions; other work runs in between."""
        if len(members) <= PIECE_SIZE:
            return list(self.errors_for(session_ids, members, seen))
        alike: _Alike = {}
        async for part in self.pieces.parts(len(members), tenant_of(session_ids[0])):
            self._sort_missing(session_ids, members[part], seen, alike)
        return list(_errors_of(alike))

    def _sort_missing(
        self, session_ids: Sequence[str], members: Members, seen: LookupResult, alike: _Alike
    ) -> None:
        """Add missing sessions, by index, to the groups with the same reason."""
        ids = [session_ids[member] for member in members.tolist()]
        named = [session_id for session_id in ids if session_id]
        try:
            unusable = set(self._loader.load_all(named, seen)[1])
            stones = dict(zip(named, seen.tombstones(named), strict=True))
        except ServerError:
            unusable, stones = set(ids), {}
        for member, session_id in zip(members.tolist(), ids, strict=True):
            stone = stones.get(session_id)
            kind: tuple[object, ...] = (
                not session_id,
                None if stone is None else stone.end,
                stone is None and self.ids.is_from_elsewhere(session_id),
            )
            if session_id in unusable:
                kind = (type(self.error_for(session_id, seen)),)
            if kind not in alike:
                alike[kind] = self.error_for(session_id, seen), []
            alike[kind][1].append(member)

    def unusable(self, session_ids: Sequence[str], seen: LookupResult) -> Sequence[str]:
        """Sessions that are in the store and cannot be stepped here, or all if it cannot be read."""
        try:
            return self._loader.load_all(session_ids, seen)[1]
        except ServerError:
            return session_ids

    def gone(self, session_id: str, seen: LookupResult) -> ServerError:
        """The error for a session that does not exist."""
        if not session_id:  # a field that was left out or misspelt, not an ended session
            return InvalidInput("session_id must be that of an open session; got none")
        ended = self.ended(session_id, seen)
        if ended is not None:
            return ended
        if self.ids.is_from_elsewhere(session_id):
            return SessionLost(
                session_id,
                f"session {session_id!r} was lost with its store: it was opened on another server process with"
                " --store memory, or with another --data-dir",
            )
        damage = self.store.damage_of(session_id)
        if damage:
            return StateCorrupt(
                f"session {session_id!r} is not in the store, which has lost sessions: {damage}. It may be one of"
                " them, so it is not opened again",
                session_id=session_id,
            )
        return SessionNotFound(
            session_id, f"session_id must be that of an open session; got {shown(session_id)}"
        )

    def ended(self, session_id: str, seen: LookupResult) -> SessionGone | None:
        """How a session ended, if that is remembered."""
        (stone,) = seen.tombstones([session_id])
        return None if stone is None else ended_by(stone)

    def earlier(self, session_ids: Sequence[str], seen: LookupResult) -> dict[int, EarlierSession]:
        """The earlier sessions of ids without a live one, by place, if their ends are remembered."""
        return {
            place: EarlierSession(
                max(self.store.first_revision, stone.revision + 1), stone.closes, each.stamp
            )
            for place, each in enumerate(seen.all_of(session_ids))
            if (stone := each.tombstone) is not None
        }

    def stored_header(self, session_id: str, seen: LookupResult) -> Header | None:
        """The header of a session's record; None if there is none, or it cannot be read."""
        stored = seen.get(session_id)
        return None if stored is None else header_or_none(session_id, stored)

    def stored_usage(self, session_id: str, seen: LookupResult) -> tuple[int, Usage]:
        """A session's revision in the store (0: unknown), and its counted usage."""
        try:
            stored = seen.get(session_id)
        except StateCorrupt:
            stored = b""
        return (0, NOTHING) if stored is None else counts.usage_of_record(session_id, stored)

    def was_closed_by(self, session_id: str, request_id: int, seen: LookupResult) -> bool:
        """Whether a call closed a session of an id without a live one."""
        (stone,) = seen.tombstones([session_id])
        return stone is not None and request_id in stone.closes

    def info(self, handle: int) -> SessionInfo:
        """Describe a session."""
        table, model = self._table, self.models.by_handle(handle)
        return SessionInfo(
            session_id=table.session_id(handle),
            model=model.name,
            fingerprint=model.program.fingerprint,
            batch_size=int(table.batch_size[handle]),
            revision=int(table.revision[handle]),
            position=int(table.position[handle]),
            created=float(table.created[handle]),
            last_used=self._clock.now() - (self._clock.monotonic() - float(table.used[handle])),
            resident=bool(table.row[handle] >= 0),
            max_idle_s=self._expiry.limits.seconds(int(table.max_idle_ms[handle])),
            version=model.version,
            is_pinned=bool(table.pinned[handle]),
            uid=int(table.opened_with[handle]),
            request_id=int(table.request_id[handle]),
        )

    def current_info(self, handle: int, seen: LookupResult, *, is_same: bool = False) -> SessionInfo:
        """Describe a session, including changes by another server while it is active here.

        Raises:
            SessionGone: it ended there; or, with `is_same`, another session has its id there.
            StateCorrupt: its record is corrupt.
        """
        info = self.info(handle)
        session_id, newer = info.session_id, seen.newer(info.session_id)
        if newer is None:
            return info
        if newer.tombstone is not None:
            raise ended_by(newer.tombstone)
        if newer.record is None:
            raise SessionNotFound(session_id, f"session {session_id!r} was closed on another server")
        header = decode_header(session_id, newer.record)
        opened_with = int(self._table.opened_with[handle])
        if is_same and (header.created, header.opened_with) != (info.created, opened_with):
            raise SessionNotFound(
                session_id, f"session {session_id!r} was closed, and another one has its id"
            )
        return dataclasses.replace(self.stored_info(session_id, header), resident=info.resident)

    async def describe(self, session_id: str, *, usable: bool = False) -> SessionInfo:
        """Describe a session as of its last completed change; `usable`: it must be one that can be stepped here.

        Raises:
            SessionGone: it does not exist.
            ModelMismatch, ModelNotFound: it cannot be stepped here, and must be `usable`.
            StateCorrupt, Unavailable: it cannot be read.
        """
        seen = await self.look([session_id], reread=True)
        try:
            return self.current_info(self.find(session_id, seen), seen)
        except (ModelMismatch, ModelNotFound):
            stored = None if usable else seen.get(session_id)
            if stored is None:
                raise
            return self.stored_info(session_id, decode_header(session_id, stored))

    def stored_info(self, session_id: str, header: Header) -> SessionInfo:
        """A session by its record, on its current version."""
        info = stored_info(session_id, header, self._expiry.limits)
        try:
            model, move = self.models.place(session_id, header)
        except (ModelNotFound, ModelMismatch):
            return info
        position = 0 if move is not None and move.how is MoveKind.RESET else info.position
        # common in lists: the record is complete
        return (
            info
            if (info.version, info.fingerprint, info.position)
            == (model.version, model.program.fingerprint, position)
            else dataclasses.replace(
                info, version=model.version, fingerprint=model.program.fingerprint, position=position
            )
        )


def stored_info(session_id: str, header: Header, limits: IdleLimits) -> SessionInfo:
    """A session by its record."""
    return SessionInfo(
        session_id=session_id,
        model=header.model,
        fingerprint=header.fingerprint,
        batch_size=header.batch_size,
        revision=header.revision,
        position=header.position,
        created=header.created,
        last_used=header.last_used,
        resident=False,
        max_idle_s=limits.seconds(header.max_idle_ms),
        version=0 if (mark := mark_of(header.fields)) is None else mark.version,
        is_pinned=mark is not None and mark.is_pinned,
        uid=header.opened_with,
        request_id=header.request_id,
    )


class IdMaker:
    """Generates ids that cannot be guessed.

    The id for a call with a request id is derived from that and the store's secret (HMAC, RFC 2104). So a repeated
    call means the same session, also after a restart, and nothing needs to be remembered. The id is in the given
    namespace and depends on it: the same request id gives another id in another namespace.
    """

    def __init__(self, store: Store) -> None:
        self._incarnation = store.incarnation
        self._secret = store.secret

    def make(self, request_id: int, source: str = "", *, namespace: str = "") -> str:
        """An id for a new session; `source` is the session that it is made from, if any."""
        (made,) = self._named(_digits(self._token(request_id, source, namespace)), namespace)
        return made

    async def make_many(
        self, request_id: int, count: int, pieces: Pieces, sources: Sequence[str] = (), *, namespace: str = ""
    ) -> list[str]:
        """Ids for the sessions of one call: neighbours in the store, ascending.

        Knowing some of them does not help to guess others. `sources` are the sessions that they are made from, if
        any.
        """
        wanted = request_id, count, sources, namespace
        # most of it runs without the GIL
        group, digits = (
            self._drawn(*wanted) if count <= PIECE else await asyncio.to_thread(self._drawn, *wanted)
        )
        made: list[str] = []
        async for part in pieces.parts(count, tenant_of(namespace)):
            made += self._named(digits[part], namespace, group)
        return made

    def _drawn(
        self, request_id: int, count: int, sources: Sequence[str], namespace: str
    ) -> tuple[str, npt.NDArray[np.bytes_]]:
        """The common part of one call's ids, and the digits of each, ascending. For any thread."""
        seed = self._token(request_id, "\n".join(["many", *sources]), namespace)
        # a prefix of the output reveals nothing about the rest: FIPS 202
        drawn = hashlib.shake_256(self._secret + seed).digest(_GROUP_BYTES + count * _TOKEN_BYTES)
        group = base64.urlsafe_b64encode(drawn[:_GROUP_BYTES]).decode()
        return group, np.sort(_digits(drawn[_GROUP_BYTES:]))

    def _named(self, digits: npt.NDArray[np.bytes_], namespace: str, group: str = "") -> list[str]:
        begin = f"{namespace}s-{self._incarnation}-{group}"
        return [begin + token.decode() for token in digits.tolist()]

    def _token(self, request_id: int, source: str, namespace: str) -> bytes:
        if not request_id:
            return secrets.token_bytes(_TOKEN_BYTES)
        content = f"{namespace}{request_id} {source}".encode()
        return hmac.digest(self._secret, content, "sha256")[:_TOKEN_BYTES]

    @staticmethod
    def is_generated(session_id: str) -> bool:
        """Whether an id has the form of generated ids, which callers may not choose."""
        return _GENERATED_ID.fullmatch(own(session_id)) is not None

    def is_from_elsewhere(self, session_id: str) -> bool:
        """Whether an id was generated with another store."""
        made = _GENERATED_ID.fullmatch(own(session_id))
        return made is not None and made[1] != self._incarnation


def _digits(tokens: bytes) -> npt.NDArray[np.bytes_]:
    """Consecutive tokens in base64, `(n,)`."""
    # in one operation: 18 bytes are 24 digits; the digits of the last two bytes are dropped
    padded = np.zeros((len(tokens) // _TOKEN_BYTES, 18), np.uint8)
    padded[:, :_TOKEN_BYTES] = np.frombuffer(tokens, np.uint8).reshape(-1, _TOKEN_BYTES)
    digits = np.frombuffer(base64.urlsafe_b64encode(padded.tobytes()), f"S{_DIGITS}")
    return digits.astype(f"S{_TOKEN_LENGTH}")


def require_session_id(field: str, session_id: str) -> None:
    """Refuse invalid session ids, before they are put into their namespace.

    Raises:
        InvalidInput: the id is empty, too long, not printable, or begins or ends with a space.
    """
    name = own(session_id)
    is_id = 0 < len(name) <= MAX_ID_LENGTH and name.isprintable()
    if not is_id or name.strip() != name:
        raise InvalidInput(
            f"{field} must be 1 to {MAX_ID_LENGTH} printable characters without leading or trailing space;"
            f" got {shown(session_id)}"
        )


def shown(session_id: str) -> str:
    """An id for messages, shortened if it is long."""
    name = own(session_id)
    if len(name) <= MAX_ID_LENGTH:
        return repr(session_id)
    return f"{len(name)} characters, {name[:32]!r}..."


def exists(field: str, session_id: str) -> SessionExists:
    """The error for a new session whose id, given in a request field, is in use."""
    return SessionExists(f"{field} must be new; session {session_id!r} is open", session_id=session_id)
