"""Sessions come and go: open, resume, fork, close, expire."""

from __future__ import annotations

import dataclasses
import heapq
import re
import secrets
from collections.abc import Sequence

import numpy as np

from stepwell_server.clock import Clock
from stepwell_server.core.remembered import Remembered
from stepwell_server.core.sessions import Handles, SessionTable
from stepwell_server.engine.admission import Admission
from stepwell_server.engine.calls import Observer, Opened, SessionInfo, StateRead, Tensors
from stepwell_server.engine.checks import check_state, require_finite
from stepwell_server.engine.paging import Pager
from stepwell_server.engine.served import ServedModel
from stepwell_server.errors import (
    InvalidInput,
    ModelMismatch,
    ModelNotFound,
    RevisionConflict,
    ServerError,
    SessionExists,
    SessionExpired,
    SessionGone,
    SessionLost,
    SessionNotFound,
)
from stepwell_server.store.base import Store

MAX_ID_LENGTH = 256
MAX_SESSIONS_PER_CALL = 65_536
_TOMBSTONES = 100_000
_ANSWERS = 10_000
_MADE_HERE = re.compile(r"s-([0-9a-f]{8})-[A-Za-z0-9_-]{22}")


@dataclasses.dataclass(frozen=True, slots=True)
class OpenedMany:
    """Answer to opening many sessions."""

    session_ids: Sequence[str]
    fingerprint: str
    replayed: bool = False


class Lifecycle:
    """Opens, finds, forks, closes and expires sessions. Lives on the event loop."""

    def __init__(
        self,
        table: SessionTable,
        models: Sequence[ServedModel],
        admission: Admission,
        pager: Pager,
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
        self._pager = pager
        self._store = store
        self._clock = clock
        self._observer = observer
        self._max_idle_s = max_idle_s
        self._incarnation = secrets.token_hex(4)
        self._expired: Remembered[float] = Remembered(_TOMBSTONES)
        self._closed_with: Remembered[int] = Remembered(_ANSWERS)
        self._opened_with: Remembered[Sequence[str]] = Remembered(_ANSWERS)

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
        return self._models[self._table.model[handle]]

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
        made = _MADE_HERE.fullmatch(session_id)
        if made and made[1] != self._incarnation and self._store.is_volatile:
            return SessionLost(
                session_id,
                f"session {session_id!r} was lost with the server process that made it: its store was memory",
            )
        return SessionNotFound(
            session_id, f"session_id must be that of an open session; got {_shown(session_id)}"
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

    def open(
        self,
        model_name: str,
        *,
        session_id: str,
        batch_size: int,
        state: Tensors | None,
        must_be_new: bool,
        request_id: int,
        fingerprint: str,
    ) -> Opened:
        """Open a session, or resume a live one. See `Engine.open_session`."""
        model = self.model(model_name)
        self._require_fingerprint(model, fingerprint)
        self._require_batch_size(model, batch_size)
        if session_id:
            require_session_id("session_id", session_id)
        else:
            session_id = self._answered_before(request_id) or self._new_id()
        handle = self._live(session_id)
        if handle is not None:
            return self._resume(handle, model, batch_size, must_be_new, request_id)
        handle = self._add(model, session_id, batch_size, state, request_id)
        self._observer.session_event("opened", model.name, session_id)
        return Opened(self.info(handle))

    def open_many(
        self,
        model_name: str,
        *,
        count: int,
        session_ids: Sequence[str],
        batch_size: int,
        request_id: int,
    ) -> OpenedMany:
        """Open many sessions or none. See `Engine.open_sessions`."""
        model = self.model(model_name)
        self._require_batch_size(model, batch_size)
        known = self._opened_with.get(str(request_id)) if request_id else None
        if known is not None and all(session_id in self._table for session_id in known):
            return OpenedMany(known, model.program.fingerprint, replayed=True)
        ids = self._ids_to_open(count, session_ids)
        rows = self._pager.take(model, len(ids) * batch_size)
        model.arena.reset(rows)
        used, created = self._clock.monotonic(), self._clock.now()
        for i, session_id in enumerate(ids):
            own = rows[i * batch_size : (i + 1) * batch_size].copy()
            self._table.add(
                session_id, model=model.index, rows=own, used=used, created=created, request_id=request_id
            )
        if request_id:
            self._opened_with.put(str(request_id), ids)
        self._observer.sessions_opened(model.name, len(ids))
        return OpenedMany(ids, model.program.fingerprint)

    async def fork(
        self, session_id: str, *, new_session_id: str, expected: int | None, request_id: int, deadline: float
    ) -> Opened:
        """Open a session with the state of another. See `Engine.fork`."""
        if new_session_id:
            require_session_id("new_session_id", new_session_id)
        else:
            new_session_id = self._answered_before(request_id) or self._new_id()
        known = self._live(new_session_id)
        if known is not None:
            if request_id and self._table.opened_with(known) == request_id:
                return Opened(self.info(known), replayed=True)
            raise _exists("new_session_id", new_session_id)
        source = self.find(session_id)
        await self._admission.hold(source, deadline)
        try:
            return self._fork(source, new_session_id, expected, request_id)
        finally:
            self._admission.release(np.array([source]))

    async def read_state(self, session_id: str, deadline: float) -> StateRead:
        """Read a state when its turn comes. See `Engine.get_state`."""
        handle = self.find(session_id)
        await self._admission.hold(handle, deadline)
        try:
            self._table.used[handle] = self._clock.monotonic()
            model = self.model_of(handle)
            arrays = model.arena.read(self._table.rows(handle))
            state = {spec.name: array for spec, array in zip(model.program.state, arrays, strict=True)}
            return StateRead(state, self.info(handle))
        finally:
            self._admission.release(np.array([handle]))

    async def close(self, session_id: str, *, request_id: int, deadline: float) -> bool:
        """Delete a session when its turn comes; True if this request did so before."""
        try:
            handle = self.find(session_id)
        except SessionGone:
            if request_id and self._closed_with.get(session_id) == request_id:
                return True
            raise
        await self._admission.hold(handle, deadline)
        if request_id:
            self._closed_with.put(session_id, request_id)
        self._remove(handle, "closed", SessionNotFound(session_id, f"session {session_id!r} was closed"))
        return False

    async def close_many(self, session_ids: Sequence[str]) -> int:
        """Delete those of many sessions that are there; return how many."""
        if len(session_ids) > MAX_SESSIONS_PER_CALL:
            raise InvalidInput(f"session_ids must be at most {MAX_SESSIONS_PER_CALL}; got {len(session_ids)}")
        closed = 0
        for session_id in session_ids:
            if self._live(session_id) is None:
                continue
            try:
                await self.close(session_id, request_id=0, deadline=float("inf"))
            except SessionGone:
                continue  # somebody else closed it while it was waited for
            closed += 1
        return closed

    def list(self, *, model: str, prefix: str, after: str, limit: int) -> tuple[list[SessionInfo], int]:
        """Live sessions in the order of their ids. See `Engine.list_sessions`."""
        wanted = self.model(model).index if model else None
        fitting = [
            session_id
            for session_id, handle in self._table.items()
            if session_id.startswith(prefix) and (wanted is None or self._table.model[handle] == wanted)
        ]
        page = heapq.nsmallest(limit, (session_id for session_id in fitting if session_id > after))
        found = [self._live(session_id) for session_id in page]
        return [self.info(handle) for handle in found if handle is not None], len(fitting)

    def expire_idle(self) -> int:
        """Delete the sessions that are idle for too long; return how many."""
        if not self._max_idle_s:
            return 0
        end = self._table.end
        due = self._idle_too_long(np.flatnonzero(self._table.model[:end] >= 0))
        for handle in due:
            self._expire(handle)
        return len(due)

    def _live(self, session_id: str) -> int | None:
        try:
            return self.find(session_id)
        except SessionGone:
            return None

    def _resume(
        self, handle: int, model: ServedModel, batch_size: int, must_be_new: bool, request_id: int
    ) -> Opened:
        session_id = self._table.session_id(handle)
        if request_id and self._table.opened_with(handle) == request_id:
            return Opened(self.info(handle), replayed=True)
        if must_be_new:
            raise _exists("session_id", session_id)
        info = self.info(handle)
        if info.model != model.name or info.batch_size != batch_size:
            raise SessionExists(
                f"session {session_id!r} is open with model {info.model!r} and batch_size {info.batch_size};"
                f" got model {model.name!r} and batch_size {batch_size}",
                session_id=session_id,
            )
        self._table.used[handle] = self._clock.monotonic()
        self._observer.session_event("resumed", model.name, session_id)
        return Opened(info, resumed=True)

    def _add(
        self, model: ServedModel, session_id: str, batch_size: int, state: Tensors | None, request_id: int
    ) -> int:
        values = None if state is None else check_state(model.program, state, batch_size)
        if values is not None:
            require_finite("state", values, [spec.name for spec in model.program.state])
        rows = self._pager.take(model, batch_size)
        if values is None:
            model.arena.reset(rows)
        else:
            model.arena.write(rows, values)
        self._remember_answer(request_id, session_id)
        return self._table.add(
            session_id,
            model=model.index,
            rows=rows,
            used=self._clock.monotonic(),
            created=self._clock.now(),
            request_id=request_id,
        )

    def _fork(self, source: int, new_session_id: str, expected: int | None, request_id: int) -> Opened:
        table, model = self._table, self.model_of(source)
        revision = int(table.revision[source])
        if expected is not None and expected != revision:
            raise RevisionConflict(table.session_id(source), expected, revision)
        if new_session_id in table:
            raise _exists("new_session_id", new_session_id)
        rows = self._pager.take(model, int(table.batch_size[source]))
        model.arena.copy(table.rows(source), rows)
        table.used[source] = self._clock.monotonic()
        handle = table.add(
            new_session_id,
            model=model.index,
            rows=rows,
            used=self._clock.monotonic(),
            created=self._clock.now(),
            request_id=request_id,
            revision=revision,
            position=int(table.position[source]),
        )
        self._remember_answer(request_id, new_session_id)
        self._observer.session_event("forked", model.name, new_session_id)
        return Opened(self.info(handle))

    def _remove(self, handle: int, event: str, error: ServerError) -> None:
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

    def _expire(self, handle: int) -> None:
        session_id = self._table.session_id(handle)
        self._expired.put(session_id, self._clock.now())
        self._remove(handle, "expired", self.gone(session_id))

    def _idle_too_long(self, handles: Handles) -> list[int]:
        since = self._clock.monotonic() - self._max_idle_s
        idle = (self._table.used[handles] < since) & ~self._table.claimed[handles]
        found: list[int] = handles[idle].tolist()
        return found

    def _is_idle_too_long(self, handle: int) -> bool:
        return bool(self._max_idle_s) and bool(self._idle_too_long(np.array([handle])))

    def _ids_to_open(self, count: int, session_ids: Sequence[str]) -> list[str]:
        if session_ids and count and count != len(session_ids):
            raise InvalidInput(
                f"count must be 0 or the number of session_ids, {len(session_ids)}; got {count}"
            )
        wanted = len(session_ids) or count
        if not 1 <= wanted <= MAX_SESSIONS_PER_CALL:
            raise InvalidInput(f"count must be 1 to {MAX_SESSIONS_PER_CALL}; got {wanted}")
        if not session_ids:
            return [self._new_id() for _ in range(count)]
        for session_id in session_ids:
            require_session_id("session_ids", session_id)
            if self._live(session_id) is not None:
                raise _exists("session_ids", session_id)
        if len(set(session_ids)) != len(session_ids):
            raise InvalidInput("session_ids must be different from each other; got one of them twice")
        return list(session_ids)

    def _answered_before(self, request_id: int) -> str | None:
        known = self._opened_with.get(str(request_id)) if request_id else None
        return known[0] if known and known[0] in self._table else None

    def _remember_answer(self, request_id: int, session_id: str) -> None:
        self._expired.forget(session_id)
        if request_id:
            self._opened_with.put(str(request_id), (session_id,))

    def _new_id(self) -> str:
        return f"s-{self._incarnation}-{secrets.token_urlsafe(16)}"

    @staticmethod
    def _require_fingerprint(model: ServedModel, fingerprint: str) -> None:
        if fingerprint and fingerprint != model.program.fingerprint:
            raise ModelMismatch(
                f"model_fingerprint must be that of model {model.name!r}, {model.program.fingerprint};"
                f" got {fingerprint}",
                model=model.name,
            )

    @staticmethod
    def _require_batch_size(model: ServedModel, batch_size: int) -> None:
        if not 1 <= batch_size <= model.slots.resident_limit:
            raise InvalidInput(
                f"batch_size must be 1 to resident_rows, {model.slots.resident_limit}; got {batch_size}"
            )


def require_session_id(name: str, session_id: str) -> None:
    """Refuse what cannot be a session id.

    Raises:
        InvalidInput: it is empty, too long, not printable, or begins or ends with a space.
    """
    is_id = 0 < len(session_id) <= MAX_ID_LENGTH and session_id.isprintable()
    if not is_id or session_id.strip() != session_id:
        raise InvalidInput(
            f"{name} must be 1 to {MAX_ID_LENGTH} printable characters without leading or trailing space;"
            f" got {_shown(session_id)}"
        )


def _exists(name: str, session_id: str) -> SessionExists:
    return SessionExists(f"{name} must be new; session {session_id!r} is open", session_id=session_id)


def _shown(session_id: str) -> str:
    if len(session_id) <= MAX_ID_LENGTH:
        return repr(session_id)
    return f"{len(session_id)} characters, {session_id[:32]!r}..."
