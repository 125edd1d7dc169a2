"""Who is there: models by name, sessions by id, and what became of those that are gone."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np

from stepwell_server.clock import Clock
from stepwell_server.core.sessions import Handles, SessionTable
from stepwell_server.engine.api import SessionInfo
from stepwell_server.engine.models import Models
from stepwell_server.engine.sessions.expiry import Expiry
from stepwell_server.engine.sessions.ids import IdMaker, shown
from stepwell_server.engine.sessions.loading import Loader
from stepwell_server.engine.sessions.removal import Removal
from stepwell_server.engine.state.model import Model
from stepwell_server.engine.types import U64, Members
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
from stepwell_server.logs import Log
from stepwell_server.store.base import End, LocalStore
from stepwell_server.store.record import Header, decode_header

_log = Log("engine.directory")
#: Sessions of one change that are gone and have an error each; more of them share one.
MOST_ERRORS = 32


class Directory:
    """Finds models and sessions, and says how sessions ended. Lives on the event loop.

    A session is in the table from when it is first named; before that, it may be in the store alone.
    """

    def __init__(
        self,
        table: SessionTable,
        models: Models,
        store: LocalStore,
        *,
        removal: Removal,
        expiry: Expiry,
        clock: Clock,
    ) -> None:
        self._table = table
        self.models = models
        self._store = store
        self._removal = removal
        self._expiry = expiry
        self._clock = clock
        self._loader = Loader(table, models, removal, expiry, store)
        self.ids = IdMaker(store)

    def model_of(self, handle: int) -> Model:
        """The model of a session."""
        return self._removal.model_of(handle)

    def find(self, session_id: str) -> int:
        """The handle of a live session.

        Raises:
            SessionGone: there is none.
            ModelMismatch, ModelNotFound: it belongs to a model that is not served.
            StateCorrupt: its record is damaged.
            Unavailable: the store cannot be read.
        """
        handle = self._table.find(session_id)
        if handle is None:
            handle = self._loader.load(session_id)
        if handle is not None and self._expiry.is_due(handle):
            raise self._expiry.expire([handle])
        if handle is None:
            raise self.gone(session_id)
        return handle

    def live(self, session_id: str) -> int | None:
        """The handle of a live session, or None.

        Raises:
            ServerError: as of `find`, but for `SessionGone`.
        """
        try:
            return self.find(session_id)
        except SessionGone:
            return None

    def find_all(self, session_ids: Sequence[str]) -> Handles:
        """Handles of many sessions, -1 for those that cannot be had; `why_not` says why."""
        handles = self._table.find_all(session_ids)
        if not self._store.is_volatile and (handles < 0).any():
            missing = [session_ids[i] for i in np.flatnonzero(handles < 0).tolist()]
            try:
                loaded, _ = self._loader.load_all(missing)
            except Unavailable:
                loaded = 0
            if loaded:
                handles = self._table.find_all(session_ids)
        self._expiry.expire_among(handles)
        return handles

    def require_new(self, name: str, session_ids: Sequence[str]) -> None:
        """Refuse ids of sessions that are there, be it that they cannot be stepped here.

        Raises:
            SessionExists: one is live.
            ModelMismatch, ModelNotFound, StateCorrupt: so is one that cannot be stepped here.
            Unavailable: the store cannot be read.
        """
        unusable: Sequence[str] = ()
        if not self._store.is_volatile:
            handles = self._table.find_all(session_ids)
            missing = [session_ids[i] for i in np.flatnonzero(handles < 0).tolist()]
            _, unusable = self._loader.load_all(missing)
        there = np.flatnonzero(self.find_all(session_ids) >= 0).tolist()
        if there:
            session_id = session_ids[there[0]]
            raise SessionExists(f"{name} must be new; session {session_id!r} is open", session_id=session_id)
        if unusable:
            raise self.why_not(unusable[0])

    def why_not(self, session_id: str) -> ServerError:
        """Why a session cannot be had."""
        try:
            self.find(session_id)
        except ServerError as error:
            return error
        return Unavailable(f"session {session_id!r} must be readable; it was not, just now")

    def why_not_all(
        self, session_ids: Sequence[str], members: Members
    ) -> Iterator[tuple[Members, ServerError]]:
        """Why those of some sessions, by their index, cannot be had.

        Many that are gone alike share an error, which names the first of them: an error of its own for each of
        65,536 would keep the event loop for seconds.
        """
        if len(members) <= MOST_ERRORS:
            for member in members.tolist():
                yield np.array([member]), self.why_not(session_ids[member])
            return
        unusable = set(self.unusable([session_ids[member] for member in members.tolist()]))
        alike: dict[type[ServerError], tuple[ServerError, list[int]]] = {}
        for member in members.tolist():
            session_id = session_ids[member]
            error = self.why_not(session_id) if session_id in unusable else self.gone(session_id)
            alike.setdefault(type(error), (error, []))[1].append(member)
        for error, some in alike.values():
            if len(some) > 1:
                error.message = f"{error.message} (and so for {len(some) - 1} others of the session_ids)"
            yield np.array(some, np.intp), error

    def unusable(self, session_ids: Sequence[str]) -> Sequence[str]:
        """Those that are in the store and cannot be stepped here, or all if it cannot be read."""
        if self._store.is_volatile:
            return ()
        try:
            return self._loader.load_all(session_ids)[1]
        except Unavailable:
            return session_ids

    def gone(self, session_id: str) -> ServerError:
        """Why there is no such session."""
        if not session_id:  # a field that was left out or misspelt, not a session that has ended
            return InvalidInput("session_id is missing; it must be that of an open session")
        ended = self.ended(session_id)
        if ended is not None:
            return ended
        if self.ids.is_from_elsewhere(session_id):
            return SessionLost(
                session_id,
                f"session {session_id!r} was lost with the store that kept it: it is of another server process"
                " with --store memory, or of another --data-dir",
            )
        return SessionNotFound(
            session_id, f"session_id must be that of an open session; got {shown(session_id)}"
        )

    def ended(self, session_id: str) -> SessionGone | None:
        """How a session ended, as far as that is remembered."""
        if session_id in self._expiry.burying:
            return self._expiry.error(session_id)
        stone = self._store.tombstone(session_id) if session_id else None
        if stone is None:
            return None
        if stone.end is End.EXPIRED:
            return self._expiry.error(session_id)
        return SessionNotFound(session_id, f"session {session_id!r} was closed")

    def first_revisions(self, session_ids: Sequence[str]) -> U64:
        """The revisions with which sessions begin: 0, or more than another session that had the id ever had.

        So whoever still has that one's revision gets a conflict, and does not step a session that is not theirs.
        As long as its end is remembered, that is.
        """
        return np.array([self._first_revision(session_id) for session_id in session_ids], np.uint64)

    def _first_revision(self, session_id: str) -> int:
        if session_id in self._expiry.burying:
            return self._expiry.burying[session_id] + 1
        stone = self._store.tombstone(session_id)
        return 0 if stone is None else stone.revision + 1

    def stored_revision(self, session_id: str) -> int:
        """The revision that the store has of a session, 0 if it cannot tell."""
        try:
            stored = self._store.get(session_id)
            return 0 if stored is None else decode_header(session_id, stored).revision
        except StateCorrupt:
            return 0

    def closed_with(self, session_id: str) -> int:
        """The request id of the call that closed a session that is gone, 0 if none said one."""
        stone = self._store.tombstone(session_id) if session_id else None
        return stone.request_id if stone is not None and stone.end is End.CLOSED else 0

    def info(self, handle: int) -> SessionInfo:
        """Describe a session."""
        table, model = self._table, self.model_of(handle)
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
        )

    def describe(self, session_id: str) -> SessionInfo:
        """Describe a session, also one of a model that is not served.

        Raises:
            SessionGone, StateCorrupt, Unavailable: as of `find`.
        """
        try:
            return self.info(self.find(session_id))
        except (ModelMismatch, ModelNotFound):
            stored = self._store.get(session_id)
            if stored is None:
                raise
            return stored_info(session_id, decode_header(session_id, stored))

    def count(self, model: Model) -> int:
        """How many sessions a model has."""
        if not self._store.is_volatile:
            try:
                return self._store.count_of(model.name)
            except Unavailable as error:
                _log.warning("the store could not be asked how many sessions it has", error=error)
        return self._table.count(model.index)


def stored_info(session_id: str, header: Header) -> SessionInfo:
    """What a record says of a session."""
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
    )
