"""Who is there: models by name, sessions by id, and what became of those that are gone."""

from __future__ import annotations

import heapq
import re
import secrets
from collections.abc import Sequence

import numpy as np

from stepwell_server.clock import Clock
from stepwell_server.core.remembered import Remembered
from stepwell_server.core.sessions import Handles, SessionTable
from stepwell_server.engine.admission import Admission
from stepwell_server.engine.calls import Observer, SessionInfo
from stepwell_server.engine.ids import shown
from stepwell_server.engine.served import ServedModel
from stepwell_server.errors import (
    ModelNotFound,
    ServerError,
    SessionExpired,
    SessionGone,
    SessionLost,
    SessionNotFound,
)
from stepwell_server.store.base import Store

_TOMBSTONES = 100_000
_MADE_BY_A_SERVER = re.compile(r"s-([0-9a-f]{8})-[A-Za-z0-9_-]{22}")


class Directory:
    """Finds models and sessions, and forgets sessions. Lives on the event loop."""

    def __init__(
        self,
        table: SessionTable,
        models: Sequence[ServedModel],
        admission: Admission,
        store: Store,
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
        self._clock = clock
        self._observer = observer
        self._max_idle_s = max_idle_s
        self._incarnation = secrets.token_hex(4)
        self._expired: Remembered[float] = Remembered(_TOMBSTONES)

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
        """
        handle = self._table.find(session_id)
        if handle is not None and self._is_idle_too_long(handle):
            self._expire(handle)
            handle = None
        if handle is None:
            raise self.gone(session_id)
        return handle

    def live(self, session_id: str) -> int | None:
        """The handle of a live session, or None."""
        try:
            return self.find(session_id)
        except SessionGone:
            return None

    def find_all(self, session_ids: Sequence[str]) -> Handles:
        """Handles of many sessions, -1 for those that are not there."""
        handles = self._table.find_all(session_ids)
        if self._max_idle_s:
            for handle in self._idle_too_long(handles[handles >= 0]):
                self._expire(handle)
                handles[handles == handle] = -1
        return handles

    def gone(self, session_id: str) -> SessionGone:
        """Why there is no such session."""
        if self._expired.get(session_id) is not None:
            return SessionExpired(
                session_id,
                f"session {session_id!r} expired: it was idle for longer than"
                f" max_session_idle_s {self._max_idle_s:g}",
            )
        made = _MADE_BY_A_SERVER.fullmatch(session_id)
        if made and made[1] != self._incarnation and self._store.is_volatile:
            return SessionLost(
                session_id,
                f"session {session_id!r} was lost with the server process that made it: its store was memory",
            )
        return SessionNotFound(
            session_id, f"session_id must be that of an open session; got {shown(session_id)}"
        )

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

    def page(self, *, model: str, prefix: str, after: str, limit: int) -> tuple[list[SessionInfo], int]:
        """Live sessions in the order of their ids. See `Engine.list_sessions`."""
        wanted = self.model(model).index if model else None
        fitting = [
            session_id
            for session_id, handle in self._table.items()
            if session_id.startswith(prefix) and (wanted is None or self._table.model[handle] == wanted)
        ]
        page = heapq.nsmallest(limit, (session_id for session_id in fitting if session_id > after))
        found = [self.live(session_id) for session_id in page]
        return [self.info(handle) for handle in found if handle is not None], len(fitting)

    def new_id(self) -> str:
        """An id that nobody can guess. It tells which server process made it."""
        return f"s-{self._incarnation}-{secrets.token_urlsafe(16)}"

    def forget_end(self, session_id: str) -> None:
        """A session of this id is opened anew: how the last one ended is no answer any more."""
        self._expired.forget(session_id)

    def remove(self, handle: int, event: str, error: ServerError) -> None:
        """Forget a session that is claimed or idle, and refuse what waits for it."""
        session_id, model = self._table.session_id(handle), self.model_of(handle)
        self._admission.close_line(handle, error)
        if self._table.row[handle] >= 0:
            model.slots.free_resident(self._table.rows(handle))
        self._store.delete([session_id])
        model.replies.forget(handle)
        self._table.claimed[handle] = False
        self._table.remove(handle)
        self._observer.session_event(event, model.name, session_id)

    def expire_idle(self) -> int:
        """Delete the sessions that are idle for too long; return how many."""
        if not self._max_idle_s:
            return 0
        end = self._table.end
        due = self._idle_too_long(np.flatnonzero(self._table.model[:end] >= 0))
        for handle in due:
            self._expire(handle)
        return len(due)

    def _expire(self, handle: int) -> None:
        session_id = self._table.session_id(handle)
        self._expired.put(session_id, self._clock.now())
        self.remove(handle, "expired", self.gone(session_id))

    def _idle_too_long(self, handles: Handles) -> list[int]:
        since = self._clock.monotonic() - self._max_idle_s
        idle = (self._table.used[handles] < since) & ~self._table.claimed[handles]
        found: list[int] = handles[idle].tolist()
        return found

    def _is_idle_too_long(self, handle: int) -> bool:
        return bool(self._max_idle_s) and bool(self._idle_too_long(np.array([handle])))
