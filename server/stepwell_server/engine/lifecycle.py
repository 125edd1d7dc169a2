"""Sessions come and go: open, resume, fork, read, close."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np

from stepwell_server.clock import Clock
from stepwell_server.core.remembered import Remembered
from stepwell_server.core.sessions import SessionTable
from stepwell_server.engine.admission import Admission
from stepwell_server.engine.calls import Observer, Opened, StateRead, Tensors
from stepwell_server.engine.checks import check_state, require_finite
from stepwell_server.engine.directory import Directory
from stepwell_server.engine.ids import require_session_id
from stepwell_server.engine.paging import Pager
from stepwell_server.engine.served import ServedModel
from stepwell_server.errors import (
    InvalidInput,
    ModelMismatch,
    RevisionConflict,
    SessionExists,
    SessionGone,
    SessionNotFound,
)

MAX_SESSIONS_PER_CALL = 65_536
_ANSWERS = 10_000


@dataclasses.dataclass(frozen=True, slots=True)
class OpenedMany:
    """Answer to opening many sessions."""

    session_ids: Sequence[str]
    fingerprint: str
    replayed: bool = False


class Lifecycle:
    """Opens, forks, reads and closes sessions. Lives on the event loop."""

    def __init__(
        self,
        table: SessionTable,
        directory: Directory,
        admission: Admission,
        pager: Pager,
        *,
        clock: Clock,
        observer: Observer,
    ) -> None:
        self._table = table
        self._directory = directory
        self._admission = admission
        self._pager = pager
        self._clock = clock
        self._observer = observer
        self._closed_with: Remembered[int] = Remembered(_ANSWERS)
        self._opened_with: Remembered[Sequence[str]] = Remembered(_ANSWERS)

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
        model = self._directory.model(model_name)
        self._require_fingerprint(model, fingerprint)
        self._require_batch_size(model, batch_size)
        if session_id:
            require_session_id("session_id", session_id)
        else:
            session_id = self._answered_before(request_id) or self._directory.new_id()
        handle = self._directory.live(session_id)
        if handle is not None:
            return self._resume(handle, model, batch_size, must_be_new, request_id)
        handle = self._add(model, session_id, batch_size, state, request_id)
        self._observer.session_event("opened", model.name, session_id)
        return Opened(self._directory.info(handle))

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
        model = self._directory.model(model_name)
        self._require_batch_size(model, batch_size)
        known = self._opened_with.get(str(request_id)) if request_id else None
        if known is not None and all(session_id in self._table for session_id in known):
            return OpenedMany(known, model.program.fingerprint, replayed=True)
        ids = self._ids_to_open(count, session_ids)
        # In portions that page each other out. If the rows of the first can be had, so can all others'.
        portion = max(1, model.slots.resident_limit // 4 // batch_size)
        for low in range(0, len(ids), portion):
            self._add_many(model, ids[low : low + portion], batch_size, request_id)
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
        known = self._forked_before(new_session_id, request_id)
        if known is not None:
            return known
        source = self._directory.find(session_id)
        await self._admission.hold(source, deadline)
        try:
            # once more: the same call may have been in line before this one
            known = self._forked_before(new_session_id, request_id)
            new_session_id = new_session_id or self._directory.new_id()
            return known or self._fork(source, new_session_id, expected, request_id)
        finally:
            self._admission.release(np.array([source]))

    async def read_state(self, session_id: str, deadline: float) -> StateRead:
        """Read a state when its turn comes. See `Engine.get_state`."""
        handle = self._directory.find(session_id)
        await self._admission.hold(handle, deadline)
        try:
            self._table.used[handle] = self._clock.monotonic()
            model = self._directory.model_of(handle)
            arrays = model.arena.read(self._table.rows(handle))
            state = {spec.name: array for spec, array in zip(model.program.state, arrays, strict=True)}
            return StateRead(state, self._directory.info(handle))
        finally:
            self._admission.release(np.array([handle]))

    async def close(self, session_id: str, *, request_id: int, deadline: float) -> bool:
        """Delete a session when its turn comes; True if this request did so before."""
        try:
            handle = self._directory.find(session_id)
            await self._admission.hold(handle, deadline, rows=False)
        except SessionGone:
            if request_id and self._closed_with.get(session_id) == request_id:
                return True
            raise
        if request_id:
            self._closed_with.put(session_id, request_id)
        self._directory.remove(
            handle, "closed", SessionNotFound(session_id, f"session {session_id!r} was closed")
        )
        return False

    async def close_many(self, session_ids: Sequence[str]) -> int:
        """Delete those of many sessions that are there; return how many."""
        if len(session_ids) > MAX_SESSIONS_PER_CALL:
            raise InvalidInput(f"session_ids must be at most {MAX_SESSIONS_PER_CALL}; got {len(session_ids)}")
        closed = 0
        for session_id in session_ids:
            if self._directory.live(session_id) is None:
                continue
            try:
                await self.close(session_id, request_id=0, deadline=float("inf"))
            except SessionGone:
                continue  # somebody else closed it while it was waited for
            closed += 1
        return closed

    def _resume(
        self, handle: int, model: ServedModel, batch_size: int, must_be_new: bool, request_id: int
    ) -> Opened:
        session_id = self._table.session_id(handle)
        if request_id and self._table.opened_with(handle) == request_id:
            return Opened(self._directory.info(handle), replayed=True)
        if must_be_new:
            raise _exists("session_id", session_id)
        info = self._directory.info(handle)
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

    def _add_many(
        self, model: ServedModel, session_ids: Sequence[str], batch_size: int, request_id: int
    ) -> None:
        rows = self._pager.take(model, len(session_ids) * batch_size)
        model.arena.reset(rows)
        used, created = self._clock.monotonic(), self._clock.now()
        for i, session_id in enumerate(session_ids):
            own = rows[i * batch_size : (i + 1) * batch_size].copy()
            self._directory.forget_end(session_id)
            self._table.add(
                session_id, model=model.index, rows=own, used=used, created=created, request_id=request_id
            )

    def _fork(self, source: int, new_session_id: str, expected: int | None, request_id: int) -> Opened:
        table, model = self._table, self._directory.model_of(source)
        revision = int(table.revision[source])
        if expected is not None and expected != revision:
            raise RevisionConflict(table.session_id(source), expected, revision)
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
        return Opened(self._directory.info(handle))

    def _ids_to_open(self, count: int, session_ids: Sequence[str]) -> list[str]:
        if session_ids and count and count != len(session_ids):
            raise InvalidInput(
                f"count must be 0 or the number of session_ids, {len(session_ids)}; got {count}"
            )
        wanted = len(session_ids) or count
        if not 1 <= wanted <= MAX_SESSIONS_PER_CALL:
            raise InvalidInput(f"count must be 1 to {MAX_SESSIONS_PER_CALL}; got {wanted}")
        if not session_ids:
            return [self._directory.new_id() for _ in range(count)]
        for session_id in session_ids:
            require_session_id("session_ids", session_id)
            if self._directory.live(session_id) is not None:
                raise _exists("session_ids", session_id)
        if len(set(session_ids)) != len(session_ids):
            raise InvalidInput("session_ids must be different from each other; got one of them twice")
        return list(session_ids)

    def _forked_before(self, new_session_id: str, request_id: int) -> Opened | None:
        name = new_session_id or self._answered_before(request_id)
        known = self._directory.live(name) if name else None
        if known is None:
            return None
        if request_id and self._table.opened_with(known) == request_id:
            return Opened(self._directory.info(known), replayed=True)
        raise _exists("new_session_id", self._table.session_id(known))

    def _answered_before(self, request_id: int) -> str | None:
        known = self._opened_with.get(str(request_id)) if request_id else None
        return known[0] if known and known[0] in self._table else None

    def _remember_answer(self, request_id: int, session_id: str) -> None:
        self._directory.forget_end(session_id)
        if request_id:
            self._opened_with.put(str(request_id), (session_id,))

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


def _exists(name: str, session_id: str) -> SessionExists:
    return SessionExists(f"{name} must be new; session {session_id!r} is open", session_id=session_id)
