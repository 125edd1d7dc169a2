"""Who is there: models by name, sessions by id, and what became of those that are gone."""

from __future__ import annotations

import asyncio
import logging
import math
import sys
from collections.abc import Iterable, Iterator, Sequence

import numpy as np

from stepwell_server.clock import Clock
from stepwell_server.core.idle import IdleWatch
from stepwell_server.core.sessions import Handles, SessionTable
from stepwell_server.engine.admission import Admission
from stepwell_server.engine.call import U64
from stepwell_server.engine.calls import Observer, SessionInfo
from stepwell_server.engine.commits import Commits
from stepwell_server.engine.ids import IdMaker, shown
from stepwell_server.engine.served import ServedModel
from stepwell_server.errors import (
    ModelMismatch,
    ModelNotFound,
    ServerError,
    SessionExists,
    SessionExpired,
    SessionGone,
    SessionLost,
    SessionNotFound,
    StateCorrupt,
    Unavailable,
)
from stepwell_server.store.base import Batch, End, Store, Tombstone
from stepwell_server.store.record import Header, Stored, decode_header

log = logging.getLogger(__name__)


class Directory:
    """Finds models and sessions, and forgets sessions. Lives on the event loop.

    A session is in the table from when it is first named; before that, it may be in the store alone.
    """

    def __init__(
        self,
        table: SessionTable,
        models: Sequence[ServedModel],
        admission: Admission,
        store: Store,
        commits: Commits,
        *,
        clock: Clock,
        observer: Observer,
        max_idle_s: float,
    ) -> None:
        self._table = table
        self._models = models
        self._by_name = {model.name: model for model in models}
        self._admission = admission
        self._store = store
        self._commits = commits
        self._clock = clock
        self._observer = observer
        self._max_idle_s = max_idle_s
        self.ids = IdMaker(store)
        self.idle = IdleWatch(table, max_idle_s, clock.monotonic())
        self.opening: dict[str, asyncio.Future[None]] = {}
        """Sessions that are being made: nobody else sees them before they are kept."""
        self.burying: dict[str, int] = {}
        """Sessions that expired and may still be in the store, with their revisions."""
        self._strays: dict[str, float] = {}
        """When sessions were last used, on the monotonic clock, that left the table while they may still be in the
        store: their records know it less well. Empty where sessions do not expire."""

    def model(self, name: str) -> ServedModel:
        """The model served under a name.

        Raises:
            ModelNotFound: there is none.
        """
        model = self._by_name.get(name)
        if model is None:
            raise ModelNotFound(f"model must be one of {sorted(self._by_name)}; got {name!r}", model=name)
        return model

    def model_of(self, handle: int) -> ServedModel:
        """The model of a session."""
        return self._models[int(self._table.model[handle])]

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
            handle = self._load(session_id)
        if handle is not None and self._is_idle_too_long(handle):
            raise self._expire([handle])
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
        if self._commits.is_durable and (handles < 0).any():
            missing = [session_ids[i] for i in np.flatnonzero(handles < 0).tolist()]
            try:
                loaded, _ = self._load_all(missing)
            except Unavailable:
                loaded = 0
            if loaded:
                handles = self._table.find_all(session_ids)
        if self._max_idle_s:
            there = handles[handles >= 0]
            idle = np.unique(there[self.idle.too_long(there, self._clock.monotonic())])
            if len(idle):
                handles[np.isin(handles, idle)] = -1
                self._expire(idle.tolist())
        return handles

    def require_new(self, name: str, session_ids: Sequence[str]) -> None:
        """Refuse ids of sessions that are there, be it that they cannot be stepped here.

        Raises:
            SessionExists: one is live.
            ModelMismatch, ModelNotFound, StateCorrupt: so is one that cannot be stepped here.
            Unavailable: the store cannot be read.
        """
        unusable: Sequence[str] = ()
        if self._commits.is_durable:
            handles = self._table.find_all(session_ids)
            missing = [session_ids[i] for i in np.flatnonzero(handles < 0).tolist()]
            _, unusable = self._load_all(missing)
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

    def gone(self, session_id: str) -> SessionGone:
        """Why there is no such session."""
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
        if session_id in self.burying:
            return self._expired(session_id)
        stone = self._store.tombstone(session_id) if session_id else None
        if stone is None:
            return None
        if stone.end is End.EXPIRED:
            return self._expired(session_id)
        return SessionNotFound(session_id, f"session {session_id!r} was closed")

    def first_revisions(self, session_ids: Sequence[str]) -> U64:
        """The revisions with which sessions begin: 0, or more than another session that had the id ever had.

        So whoever still has that one's revision gets a conflict, and does not step a session that is not theirs.
        As long as its end is remembered, that is.
        """
        return np.array([self._first_revision(session_id) for session_id in session_ids], np.uint64)

    def _first_revision(self, session_id: str) -> int:
        if session_id in self.burying:
            return self.burying[session_id] + 1
        stone = self._store.tombstone(session_id)
        return 0 if stone is None else stone.revision + 1

    def stored_revision(self, session_id: str) -> int:
        """The revision that the store has of a session, 0 if it cannot tell."""
        try:
            stored = self._store.get(session_id)
        except StateCorrupt:
            return 0
        header = None if stored is None else _header_or_none(session_id, stored)
        return 0 if header is None else header.revision

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

    def count(self, model: ServedModel) -> int:
        """How many sessions a model has."""
        if self._commits.is_durable:
            try:
                return self._store.count_of(model.name)
            except Unavailable as error:
                log.warning("the store could not be asked how many sessions it has: %s", error)
        return self._table.count(model.index)

    def remove(self, handle: int, event: str, error: ServerError) -> None:
        """Forget a session that is claimed or idle, and refuse what waits for it."""
        session_id, model = self._table.session_id(handle), self.model_of(handle)
        self._forget(handle, error)
        self._observer.session_event(event, model.name, session_id)

    def drop(self, handles: Handles, error: ServerError) -> None:
        """Forget claimed sessions whose rows are not what the store holds; they are loaded when next named."""
        log.warning("%d sessions left the arena: %s", len(handles), error)
        for handle in handles.tolist():
            self._remember_use([self._table.session_id(handle)], float(self._table.used[handle]))
            self._forget(handle, error)

    def expire_idle(self) -> int:
        """Delete the sessions that are, or were, in the table and are idle for too long; return how many."""
        return sum(self.expire_idle_in_parts(sys.maxsize))

    def expire_idle_in_parts(self, most: int) -> Iterator[int]:
        """As `expire_idle`, at most so many at a time, so that others get a turn; how many each time.

        To be gone through to the end.
        """
        strays = self._expire_strays()
        if strays:
            yield strays
        for due in self.idle.take_due_in_parts(self._clock.monotonic, most):
            if len(due):
                self._expire(due.tolist())
                yield len(due)

    def expire_untouched(self, found: Iterable[tuple[str, Header | None]]) -> int:
        """Delete those of the store's sessions that nobody has named since the start; return how many.

        Only once the time limit has passed since then.
        """
        untouched = [
            (session_id, header)
            for session_id, header in found
            if header is not None and self._is_only_stored(session_id) and session_id not in self._strays
        ]
        for session_id, header in untouched:
            self._observer.session_event("expired", header.model, session_id)
        self._bury([(session_id, header.model, header.revision) for session_id, header in untouched])
        return len(untouched)

    def _forget(self, handle: int, error: ServerError) -> None:
        model = self.model_of(handle)
        if self._table.row[handle] >= 0:
            model.slots.free_resident(self._table.rows(handle))
        model.replies.forget(handle)
        self._table.claimed[handle] = False
        self._table.remove(handle)
        # last: whoever is refused may ask again at once, and must not get into the line of a session that is gone
        self._admission.close_line(handle, model.index, error)

    def _remember_use(self, session_ids: Sequence[str], used: float) -> None:
        if self._max_idle_s:
            self._strays.update(dict.fromkeys(session_ids, used))

    def _expire_strays(self) -> int:
        since = self._clock.monotonic() - self._max_idle_s
        due = [session_id for session_id, used in self._strays.items() if used < since]
        if not due:
            return 0
        try:
            records = self._store.get_many(due)
        except ServerError as error:
            log.warning("the store could not be asked for idle sessions: %s", error)
            return 0
        for session_id in due:
            del self._strays[session_id]
        found = zip(due, records, strict=True)
        return self.expire_untouched((i, _header_or_none(i, r)) for i, r in found if r is not None)

    def _expire(self, handles: Sequence[int]) -> SessionExpired:
        """Delete sessions; the answer is the last one's."""
        table, error = self._table, self._expired("")
        self._bury([(table.session_id(h), self.model_of(h).name, int(table.revision[h])) for h in handles])
        for handle in handles:
            error = self._expired(table.session_id(handle))
            self.remove(handle, "expired", error)
        return error

    def _bury(self, sessions: Sequence[tuple[str, str, int]]) -> None:
        """Have the store know that sessions expired: their ids, models and revisions.

        Nobody waits for it. Should it fail, they are found in the store again, idle for too long as before, and
        the timer tries again.
        """
        if not sessions:
            return
        now, ids = self._clock.now(), [session_id for session_id, _, _ in sessions]

        def done(error: ServerError | None) -> None:
            for session_id in ids:
                self.burying.pop(session_id, None)
            if error is not None:
                log.warning("sessions that expired are still in the store: %s", error)
                self._remember_use(ids, -math.inf)

        batch = Batch(
            deletes=ids,
            tombstones=[Tombstone(i, End.EXPIRED, now, revision=revision) for i, _, revision in sessions],
            counts=[(model, -1) for _, model, _ in sessions],
        )
        self.burying.update({session_id: revision for session_id, _, revision in sessions})
        self._commits.submit(lambda: batch, len(sessions), done)

    def _expired(self, session_id: str) -> SessionExpired:
        return SessionExpired(
            session_id,
            f"session {session_id!r} expired: it was idle for longer than"
            f" max_session_idle_s {self._max_idle_s:g}",
        )

    def _is_idle_too_long(self, handle: int) -> bool:
        if not self._max_idle_s:
            return False
        return bool(self.idle.too_long(np.array([handle]), self._clock.monotonic())[0])

    def _load(self, session_id: str) -> int | None:
        """The handle of a session that was only in the store; None if it is not there."""
        if not self._commits.is_durable or not self._is_only_stored(session_id):
            return None
        stored = self._store.get(session_id)
        if stored is None:
            return None
        header = decode_header(session_id, stored)
        return int(self._adopt([(session_id, header, self._served(session_id, header))])[0])

    def _is_only_stored(self, session_id: str) -> bool:
        """If it is anywhere, it is in the store and nowhere else, to stay."""
        return (
            session_id != ""
            and session_id not in self._table
            and session_id not in self.opening
            and session_id not in self.burying
        )

    def _load_all(self, session_ids: Sequence[str]) -> tuple[int, list[str]]:
        """Take those sessions into the table that are in the store and can be stepped.

        Returns:
            How many they are, and those that are there and cannot be stepped.

        Raises:
            Unavailable: the store cannot be read.
        """
        wanted = [session_id for session_id in dict.fromkeys(session_ids) if self._is_only_stored(session_id)]
        found: list[tuple[str, Header, ServedModel]] = []
        unusable: list[str] = []
        for session_id, stored in zip(wanted, self._store.get_many(wanted), strict=True):
            if stored is None:
                continue
            try:
                header = decode_header(session_id, stored)
                found.append((session_id, header, self._served(session_id, header)))
            except (StateCorrupt, ModelMismatch, ModelNotFound):
                unusable.append(session_id)  # `find` says why
        if found:
            self._adopt(found)
        return len(found), unusable

    def _served(self, session_id: str, header: Header) -> ServedModel:
        """The model of a stored session."""
        model = self._by_name.get(header.model)
        if model is None:
            raise ModelNotFound(
                f"session {session_id!r} belongs to model {header.model!r}, which is not served;"
                f" model must be one of {sorted(self._by_name)}. Serve it again, or close the session",
                model=header.model,
            )
        if model.program.fingerprint != header.fingerprint:
            raise ModelMismatch(
                f"session {session_id!r} belongs to model {header.model!r} with fingerprint"
                f" {header.fingerprint}; the one that is served has {model.program.fingerprint}."
                " Serve that model file again, or close the session",
                model=header.model,
            )
        return model

    def _adopt(self, sessions: Sequence[tuple[str, Header, ServedModel]]) -> Handles:
        headers = [header for _, header, _ in sessions]
        handles = self._table.add(
            [session_id for session_id, _, _ in sessions],
            rows=None,
            model=[model.index for _, _, model in sessions],
            batch_size=[header.batch_size for header in headers],
            revision=np.array([header.revision for header in headers], np.uint64),
            position=np.array([header.position for header in headers], np.uint64),
            request_id=np.array([header.request_id for header in headers], np.uint64),
            opened_with=np.array([header.opened_with for header in headers], np.uint64),
            created=[header.created for header in headers],
            used=[self._strays.pop(i, self._last_used(header)) for i, header, _ in sessions],
            reply=[header.reply for header in headers],
        )
        self.idle.watch(handles)
        return handles

    def _last_used(self, header: Header) -> float:
        """On the monotonic clock."""
        # for people: a clock that was set back meanwhile must not make it the future
        return self._clock.monotonic() - max(0.0, self._clock.now() - header.last_used)


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


def _header_or_none(session_id: str, stored: Stored) -> Header | None:
    try:
        return decode_header(session_id, stored)
    except StateCorrupt:
        return None
