"""Reads sessions: their states, lists of them, and how many there are."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import functools
import math
from collections import deque
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from typing import Any, Protocol

import numpy as np

from stepwell_server.clock import Clock
from stepwell_server.core.model_names import parse_reference
from stepwell_server.core.namespaces import prefix_of, tenant_of
from stepwell_server.core.sessions import Handles, SessionTable
from stepwell_server.core.slots import Rows
from stepwell_server.engine.api import SessionFilter, SessionInfo, SessionPage, StateResult, StatesResult
from stepwell_server.engine.change import MAX_ERRORS, MAX_TRIES, changed_elsewhere, shared_error, too_late
from stepwell_server.engine.commit.store_policy import StorePolicy
from stepwell_server.engine.intake.pager import Pager
from stepwell_server.engine.intake.queues import SessionQueues
from stepwell_server.engine.sessions.directory import Directory
from stepwell_server.engine.sessions.end import Expiry, Removal
from stepwell_server.engine.sessions.lookup import LookupResult
from stepwell_server.engine.state.model import Model
from stepwell_server.engine.types import Array, Mask, Members
from stepwell_server.engine.versions.registry import Models
from stepwell_server.errors import InvalidInput, Overloaded, ServerError, SessionGone, SessionLost
from stepwell_server.logs import Log
from stepwell_server.store.base import SOLE, Store, StoredSession
from stepwell_server.store.heads import Heads
from stepwell_server.store.record import header_or_none

_log = Log("engine.read")

#: Rows copied in one batch; other work runs between batches.
COPY_BATCH_ROWS = 4096
#: Record headers read in one batch: about a millisecond of the event loop, with their fields.
_HEADS_BATCH_SIZE = 128
#: The most headers that one page reads to find matching sessions.
_MAX_HEADS = 20_000
#: Not printable, so no id contains it: sorts after all ids of a namespace.
_LAST = "\U0010ffff"
#: Seconds after which counts are read again, and the interval for metrics.
_FRESH_S, _COUNT_INTERVAL_S = 1.0, 5.0


def _no_limit(_byte_count: int) -> None:
    """Accept any size."""


class Uses(Protocol):
    """Is notified of sessions that are used without being written."""

    def used(self, handles: Handles) -> None:
        """Sessions are used now."""


class NoUses:
    """Ignores them, for reads that do not count as use. `Uses`."""

    def used(self, handles: Handles) -> None:
        """Sessions are read."""


class StateReader:
    """Reads states. Lives on the event loop."""

    def __init__(
        self,
        table: SessionTable,
        directory: Directory,
        queues: SessionQueues,
        pager: Pager,
        usage: Uses,
        *,
        clock: Clock,
    ) -> None:
        self._usage = usage
        self._call_pieces = directory.pieces
        self._table = table
        self._directory = directory
        self._queues = queues
        self._pager = pager
        self._clock = clock

    async def read(self, session_id: str, seen: LookupResult, deadline: float) -> StateResult:
        """Read a state once its session is free. See `Engine.get_state`."""
        handle = await self._held(session_id, seen, deadline)
        try:
            self._usage.used(np.array([handle]))
            model = self._directory.models.by_handle(handle)
            arrays = await self._in_pieces(model, self._table.rows(handle))
            state = {spec.name: array for spec, array in zip(model.program.state, arrays, strict=True)}
            return StateResult(state, self._directory.info(handle), model.program.structure)
        finally:
            self._queues.release(np.array([handle]))

    async def _held(self, session_id: str, seen: LookupResult, deadline: float) -> int:
        """Claim a session and bring it to the arena; return its handle."""
        for _ in range(MAX_TRIES):
            handle = self._directory.find(session_id, seen)
            try:
                await self._queues.hold(handle, deadline)
            except SessionLost:
                raise
            except SessionGone:
                # it ended meanwhile, and may have been opened again
                seen = await self._directory.look([session_id], reread=True)
                continue
            return handle
        raise changed_elsewhere(session_id)

    @staticmethod
    async def _in_pieces(model: Model, rows: Rows) -> Sequence[Array]:
        """Copies of a claimed session's rows; other work runs between the pieces of a large one."""
        if len(rows) <= COPY_BATCH_ROWS:
            return model.arena.read(rows)
        arrays = [np.empty((len(rows), *state.shape[1:]), state.dtype) for state in model.arena.states]
        for start in range(0, len(rows), COPY_BATCH_ROWS):
            part = slice(start, start + COPY_BATCH_ROWS)
            for array, piece in zip(arrays, model.arena.read(rows[part]), strict=True):
                array[part] = piece
            await asyncio.sleep(0)
        return arrays

    async def read_many(
        self,
        session_ids: Sequence[str],
        seen: LookupResult,
        deadline: float,
        *,
        admit: Callable[[int], None] = _no_limit,
        with_state: bool = True,
    ) -> StatesResult:
        """Read the states of many sessions, each once it is free. See `Engine.get_states`.

        `admit` is called with the total bytes of the states, and raises if they are too many.
        """
        handles = await self._find(session_ids, seen)
        errors = await self._directory.errors_for_many(session_ids, np.flatnonzero(handles < 0), seen)
        there = np.flatnonzero(handles >= 0)
        if not len(there):
            return _none_read(errors)
        readers = [
            (
                there[places],
                _GroupRead(
                    self._table,
                    self._queues,
                    self._pager,
                    model,
                    handles[there[places]],
                    with_state,
                    self._usage,
                ),
            )
            for model, places in self._by_version(handles[there])
        ]
        admit(sum(reader.byte_count for _, reader in readers))
        if self._clock.monotonic() >= deadline:
            raise too_late()
        parts: list[StatesResult] = []
        for own, reader in readers:

            def error_for(place: int, own: Members = own) -> ServerError:
                return self._directory.error_for(session_ids[own[place]], seen)

            await reader.run(deadline, error_for)
            await self._retry_ended(reader)
            failed = [(own[places], error) for places, error in reader.errors()]
            parts.append(reader.answer(own, failed))
        return _merged(parts, errors)

    async def _find(self, session_ids: Sequence[str], seen: LookupResult) -> Handles:
        """Handles of many sessions, -1 for those that cannot be used; other work runs in between."""
        handles = np.full(len(session_ids), -1, np.intp)
        births = np.zeros(len(session_ids), self._table.birth.dtype)
        async for part in self._call_pieces.of(session_ids):
            handles[part] = self._directory.find_all(session_ids[part], seen)
            births[part] = self._table.birth[handles[part]]
        # a handle may have been reused by now
        handles[births != self._table.birth[handles]] = -1
        return handles

    async def _retry_ended(self, reader: _GroupRead) -> None:
        """Look up sessions that ended while they were waited for: another server may have opened them again."""
        ended = reader.ended()
        seen = (
            await self._directory.look(list(ended.values()), reread=True) if ended else self._directory.here
        )
        for place, session_id in ended.items():
            if self._directory.live(session_id, seen) is not None:
                reader.fail(place, changed_elsewhere(session_id))

    def _by_version(self, handles: Handles) -> list[tuple[Model, Members]]:
        """Places of sessions by their version."""
        models = self._table.model[handles]
        versions = [self._directory.models.by_index[index] for index in np.unique(models).tolist()]
        if len({version.name for version in versions}) > 1:
            raise InvalidInput("session_ids must be sessions of one model; got sessions of several")
        if any(version.program.state != versions[0].program.state for version in versions):
            raise InvalidInput(
                "session_ids must be sessions with the same state tensors; got sessions of versions"
                f" {sorted(version.version for version in versions)} of model {versions[0].name!r}"
            )
        return [(version, np.flatnonzero(models == version.index)) for version in versions]


class _GroupRead:
    """One call's read of several sessions, by their place among its `handles`.

    It never holds one session while it waits for another, so two calls cannot deadlock.
    """

    def __init__(
        self,
        table: SessionTable,
        queues: SessionQueues,
        pager: Pager,
        model: Model,
        handles: Handles,
        with_state: bool,
        usage: Uses,
    ) -> None:
        self._usage = usage
        self._table = table
        self._queues = queues
        self._pager = pager
        self._model = model
        self._handles = handles
        self._births = table.birth[handles]
        """Read before any wait, because a handle may be reused afterwards."""
        self._sizes = table.batch_size[handles].astype(np.intp)
        self._starts = np.cumsum(self._sizes) - self._sizes
        self._with_state = with_state
        self._arrays: Sequence[Array] = ()
        self._revisions = np.zeros(len(handles), np.uint64)
        self._positions = np.zeros(len(handles), np.uint64)
        self._was_read = np.zeros(len(handles), np.bool_)
        self._failed: dict[int, ServerError] = {}
        self._lines: dict[int, asyncio.Future[None]] = {}
        """Futures of the sessions that are waited for."""
        self._came: deque[int] = deque()
        self._has_come = asyncio.Event()

    @property
    def byte_count(self) -> int:
        """Bytes of the states to read."""
        return int(self._sizes.sum()) * self._model.program.state_row_bytes if self._with_state else 0

    async def run(self, deadline: float, error_for: Callable[[int], ServerError]) -> None:
        """Read all sessions that can be read; `error_for` returns the error for one that has ended, by place."""
        if self._with_state:
            rows = int(self._sizes.sum())
            self._arrays = [np.empty((rows, *s.shape[1:]), s.dtype) for s in self._model.arena.states]
        births = self._births
        try:
            for part in self._pieces(np.arange(len(self._handles))):
                if part[0]:
                    await asyncio.sleep(0)
                gone = births[part] != self._table.birth[self._handles[part]]
                for place in part[gone].tolist():
                    self._failed[place] = error_for(place)
                await self._begin(part[~gone], deadline)
            while self._lines:
                await self._has_come.wait()
                self._has_come.clear()
                await self._read_in_pieces(np.array(self._granted_places(), np.intp))
        finally:
            for place, line in self._lines.items():
                self._queues.withdraw(int(self._handles[place]), line)

    async def _begin(self, places: Members, deadline: float) -> None:
        """Read the free sessions, and join the queues of the others."""
        is_busy = self._table.claimed[self._handles[places]]
        for place in places[is_busy].tolist():
            try:
                line = self._queues.request_claim(int(self._handles[place]), deadline)
            except Overloaded as error:
                self._failed[place] = error
                continue
            self._lines[place] = line
            line.add_done_callback(functools.partial(self._note, place))
        free = places[~is_busy]
        self._queues.claim(self._handles[free])
        await self._read_in_pieces(free)

    def _note(self, place: int, _line: asyncio.Future[None]) -> None:
        self._came.append(place)
        self._has_come.set()

    def _granted_places(self) -> list[int]:
        """The places of sessions whose claims were granted."""
        granted = []
        while self._came:
            place = self._came.popleft()
            error = self._lines.pop(place).exception()
            if error is None:
                granted.append(place)
            else:
                assert isinstance(error, ServerError)
                self._failed[place] = error
        return sorted(granted)

    async def _read_in_pieces(self, places: Members) -> None:
        """Read claimed sessions, and end their claims; other work runs between the pieces."""
        left = places
        try:
            for part in self._pieces(places):
                if part[0] != places[0]:
                    await asyncio.sleep(0)
                await self._read(part)
                left = left[len(part) :]
        finally:
            if len(left):
                self._queues.release(self._handles[left])

    def _pieces(self, places: Members) -> Iterator[Members]:
        ends = np.cumsum(self._sizes[places])
        start = 0
        while start < len(places):
            before = ends[start - 1] if start else 0
            end = max(start + 1, int(np.searchsorted(ends, before + COPY_BATCH_ROWS, side="right")))
            yield places[start:end]
            start = end

    async def _read(self, places: Members) -> None:
        handles = self._handles[places]
        refused: dict[int, ServerError] = {}
        try:
            await self._pager.compare(self._model, handles)
        except ServerError as error:
            refused = dict.fromkeys(handles.tolist(), error)
        if not refused:
            is_here = self._table.row[handles] >= 0
            if self._with_state:
                await self._copy(places[is_here], self._table.rows_of(handles[is_here]))
            away = places[~is_here]
            if len(away):
                # their revisions are also those in the store
                states, refused = await self._pager.states_of(self._model, handles[~is_here])
                if refused:
                    away = away[[handle not in refused for handle in self._handles[away].tolist()]]
                if self._with_state:
                    self._put(away, states)
        if not refused:
            self._done(places)
            return
        is_sound = np.array([handle not in refused for handle in handles.tolist()], np.bool_)
        self._done(places[is_sound])
        for place in places[~is_sound].tolist():
            handle = int(self._handles[place])
            self._failed[place] = refused[handle]
            self._queues.end(handle, refused[handle])

    async def _copy(self, places: Members, rows: Rows) -> None:
        """Copy sessions' rows from the arena; other work runs between the pieces of a large session."""
        where = self._rows_of(places)
        for start in range(0, len(rows), COPY_BATCH_ROWS):
            if start:
                await asyncio.sleep(0)
            part = slice(start, start + COPY_BATCH_ROWS)
            for array, values in zip(self._arrays, self._model.arena.read(rows[part]), strict=True):
                array[where[part]] = values

    def _put(self, places: Members, states: Sequence[Array]) -> None:
        where = self._rows_of(places)
        for array, values in zip(self._arrays, states, strict=False):
            array[where] = values

    def _rows_of(self, places: Members) -> Rows:
        """Rows of sessions in the answer."""
        sizes = self._sizes[places]
        starts = self._starts[places] - (np.cumsum(sizes) - sizes)
        rows: Rows = np.repeat(starts, sizes) + np.arange(int(sizes.sum()))
        return rows

    def _done(self, places: Members) -> None:
        handles = self._handles[places]
        self._usage.used(handles)
        self._revisions[places] = self._table.revision[handles]
        self._positions[places] = self._table.position[handles]
        self._was_read[places] = True
        self._queues.release(handles)

    def ended(self) -> dict[int, str]:
        """Ids of the sessions that have ended, by place."""
        return {
            place: error.session_id for place, error in self._failed.items() if isinstance(error, SessionGone)
        }

    def fail(self, place: int, error: ServerError) -> None:
        """Record that a session was not read because of this error."""
        self._failed[place] = error

    def errors(self) -> Iterator[tuple[Members, ServerError]]:
        """The errors of sessions that were not read; similar ones share the first one's."""
        kinds: dict[type[ServerError], list[int]] = {}
        for place, error in sorted(self._failed.items()):
            kinds.setdefault(type(error), []).append(place)
        for places in kinds.values():
            if len(places) <= MAX_ERRORS:
                for place in places:
                    yield np.array([place]), self._failed[place]
            else:
                yield np.array(places), shared_error(self._failed[places[0]], len(places))

    def answer(self, there: Members, errors: Sequence[tuple[Members, ServerError]]) -> StatesResult:
        """What was read; `there` are the members that the places stand for."""
        arrays, read = self._arrays, self._was_read
        if not read.all():
            rows = np.repeat(read, self._sizes)
            arrays = [array[rows] for array in arrays]
        program = self._model.program
        return StatesResult(
            self._model.name,
            program.fingerprint,
            {spec.name: array for spec, array in zip(program.state, arrays, strict=False)},
            there[read],
            self._sizes[read],
            self._revisions[read],
            self._positions[read],
            errors,
            self._model.version,
            bool(self._table.pinned[self._handles[read]].all()),
            program.structure,
        )


def _merged(parts: Sequence[StatesResult], errors: Sequence[tuple[Members, ServerError]]) -> StatesResult:
    """Merge what was read on several versions, in the order of the members; `errors` are added to theirs."""
    errors = [*errors, *(error for part in parts for error in part.errors)]
    if len(parts) == 1:
        return dataclasses.replace(parts[0], errors=errors)
    members = np.concatenate([part.members for part in parts])
    sizes = np.concatenate([part.sizes for part in parts])
    order = np.argsort(members)
    ends = np.cumsum(sizes)
    spans = [np.arange(ends[place] - sizes[place], ends[place]) for place in order.tolist()]
    rows = np.concatenate(spans) if spans else np.zeros(0, np.intp)
    return dataclasses.replace(
        parts[0],
        state={name: np.concatenate([part.state[name] for part in parts])[rows] for name in parts[0].state},
        members=members[order],
        sizes=sizes[order],
        revisions=np.concatenate([part.revisions for part in parts])[order],
        positions=np.concatenate([part.positions for part in parts])[order],
        errors=errors,
        fingerprint="",
        version=0,
        structure=parts[0].structure if len({part.structure for part in parts}) == 1 else "",
    )


def _none_read(errors: Sequence[tuple[Members, ServerError]]) -> StatesResult:
    none = np.zeros(0, np.intp)
    counts = np.zeros(0, np.uint64)
    return StatesResult("", "", {}, none, none, counts, counts, errors)


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Query:
    """A page of a list of sessions."""

    filter: SessionFilter
    after: str = ""
    """The page begins after this id, whether a session has it or not."""
    limit: int
    """The most sessions on the page."""
    count: bool = True
    """Whether to count the sessions of all pages."""


class SessionList:
    """Lists sessions, sorted by id. Lives on the event loop.

    A page combines the store's sessions with newer facts from the table. A session that exists throughout is on
    exactly one page of a list, whatever begins and ends meanwhile.
    """

    def __init__(
        self,
        table: SessionTable,
        directory: Directory,
        expiry: Expiry,
        removal: Removal,
        policy: StorePolicy,
        store: Store,
        clock: Clock,
    ) -> None:
        self._table = table
        self._directory = directory
        self._expiry = expiry
        self._removal = removal
        self._policy = policy
        self._store = store
        self._clock = clock

    async def ask(
        self, *, after: str = "", limit: int = 1000, count: bool = True, **wanted: Any
    ) -> tuple[SessionPage, int]:
        """Up to `limit` sessions, and how many match in all (0 without `count`). For `wanted` see `SessionFilter`.

        Raises:
            InvalidInput: `model` has no version or label of the right form.
            ModelNotFound: no model has that name, or it has no such version.
            Unavailable: the store cannot be read now.
        """
        return await self.page(Query(filter=SessionFilter(**wanted), after=after, limit=limit, count=count))

    async def page(self, query: Query) -> tuple[SessionPage, int]:
        """`ask` with a `Query`."""
        query = dataclasses.replace(query, filter=self._resolved(query.filter))
        with contextlib.suppress(ServerError):  # reading the page raises it too
            await self._expiry.refresh()
        page = await self._page(query)
        return page, await self._total(query.filter) if query.count else 0

    def _resolved(self, wanted: SessionFilter) -> SessionFilter:
        models = self._directory.models
        if not models.is_pinned(wanted.model):
            if wanted.model:
                models.named(wanted.model)  # raises
            return wanted
        with contextlib.suppress(ValueError):
            meant = parse_reference(wanted.model)
            if meant.version and meant.version in models.named(meant.name).known:  # loaded or not
                return dataclasses.replace(wanted, model=meant.name, version=meant.version)
        model = models.by_name(wanted.model)
        return dataclasses.replace(wanted, model=model.name, version=model.version)

    async def _page(self, query: Query) -> SessionPage:
        page, wanted, read = SessionPage(), query.filter, 0
        most = min(_HEADS_BATCH_SIZE, query.limit + 1) if wanted.is_by_prefix_alone else _HEADS_BATCH_SIZE
        async for own, fitting in self._pieces(wanted, query.after, most):
            left = fitting
            while left:
                room = query.limit + 1 - len(page)  # one more, to see whether there is another page
                page += [info for info in await self._described(left[:room]) if self._fits(info, wanted)]
                if len(page) > query.limit:
                    page.pop()
                    page.next = page[-1].session_id
                    return page
                left = left[room:]
            read += most
            if read >= _MAX_HEADS and own:
                page.next = own[-1]
                return page
        return page

    async def _pieces(
        self, wanted: SessionFilter, after: str, most: int
    ) -> AsyncIterator[tuple[list[str], list[str]]]:
        """Sorted ids: those that may be returned, and those of them whose sessions match by what is known."""
        prefix = wanted.ids_begin_with
        while True:
            heads = await self._policy.heads(after=after, prefix=prefix, limit=most)
            if not heads.keys:
                return
            ids = [str(key, "utf-8", "replace") for key in heads.keys]
            fits = self._fitting(heads, ids, wanted)
            places = [place for place, i in enumerate(ids) if wanted.is_of_tenant(i) and i.startswith(prefix)]
            yield [ids[place] for place in places], [ids[place] for place in places if fits[place]]
            after = ids[-1]
            if not wanted.is_of_tenant(after):
                after = prefix_of(tenant_of(after)) + _LAST  # after all ids of that tenant
            await self._directory.pieces.turn(wanted.tenant or "")

    def _fitting(self, heads: Heads, ids: Sequence[str], wanted: SessionFilter) -> Mask:
        """Which sessions match by model and use. The table may be outdated on a shared store: see `_fits`."""
        table, handles = self._table, self._table.find_all(ids)
        is_here = handles >= 0
        fits = np.ones(len(ids), np.bool_)
        if wanted.model:
            versions = self._directory.models.named(wanted.model).loaded.values()
            is_stored = np.array([name == wanted.model for name in heads.models], np.bool_)[heads.model]
            own = [each.index for each in versions if wanted.version in {0, each.version}]
            is_own = is_here & np.isin(table.model[handles], own)
            if wanted.version:  # else the table, current or not, has the model that the store has
                is_stored &= ~(is_here & (table.stamp[handles] <= SOLE))
            fits = is_stored | is_own
        if wanted.idle_longer_s is not None:
            ahead = self._clock.now() - self._clock.monotonic()
            used = np.where(is_here, table.used[handles] + ahead, -np.inf)
            fits &= np.maximum(used, heads.heads["last_used"]) < self._clock.now() - wanted.idle_longer_s
        return fits

    async def _total(self, wanted: SessionFilter) -> int:
        if not wanted.prefix and wanted.idle_longer_s is None and not wanted.version:
            return await self._policy.count(wanted.tenant, wanted.model)
        total = 0
        async for _, fitting in self._pieces(wanted, "", _HEADS_BATCH_SIZE):
            if wanted.version:  # a record alone does not say which version its session is on now
                total += sum(self._fits(info, wanted) for info in await self._described(fitting))
            else:
                total += len(fitting)
        return total

    async def _described(self, session_ids: Sequence[str]) -> list[SessionInfo]:
        """Describe the sessions that exist."""
        infos: dict[str, SessionInfo] = {}
        left = session_ids
        while left:
            handles = self._table.find_all(left)
            stamps = np.where(handles >= 0, self._table.stamp[handles], 0).tolist()
            found = await self._store.fetch(left, stamps)
            departed: list[str] = []
            async for part in self._directory.pieces.of(left):
                for session_id, each in zip(left[part], found[part], strict=True):
                    if each.is_known and session_id not in self._table:
                        departed.append(session_id)  # it left meanwhile: its record is needed
                    elif (info := self._info(session_id, each)) is not None:
                        infos[session_id] = info
            left = departed
        return [infos[session_id] for session_id in session_ids if session_id in infos]

    def _info(self, session_id: str, found: StoredSession) -> SessionInfo | None:
        """Describe a session by its record, or by the table if that is as new.

        None: the session has ended, or is not visible yet.
        """
        handle = self._table.find(session_id)
        here = None if handle is None else self._directory.info(handle)
        if session_id in self._removal.pending:
            return None
        if here is not None and (found.is_known or found.stamp == int(self._table.stamp[handle])):
            info = here
        elif found.record is None:
            return None
        elif (header := header_or_none(session_id, found.record)) is None:
            # corrupt: only its id is known
            return SessionInfo(session_id, "", "", 0, 0, 0, 0.0, 0.0, resident=False)
        else:
            info = self._directory.stored_info(session_id, header)
        now = self._clock.now()
        if not math.isnan(found.idle_s):
            # this server may know of a use that the store does not know yet
            used = now - found.idle_s if here is None else max(now - found.idle_s, here.last_used)
            info = dataclasses.replace(info, last_used=used, resident=here is not None and here.resident)
        is_busy = handle is not None and bool(self._table.claimed[handle])
        is_over = self._expiry.is_too_long(info.max_idle_s, now - info.last_used)
        return None if is_over and not is_busy else info

    def _fits(self, info: SessionInfo, wanted: SessionFilter) -> bool:
        if wanted.model not in {"", info.model} or wanted.version not in {0, info.version}:
            return False
        idle = wanted.idle_longer_s
        return idle is None or self._clock.now() - info.last_used >= idle


class SessionCounts:
    """Counts each model's sessions, on all versions. Lives on the event loop."""

    def __init__(self, table: SessionTable, models: Models, store: Store, clock: Clock) -> None:
        self._table = table
        self._models = models
        self._store = store
        self._clock = clock
        self._counts: dict[str, int] = {}
        """The store's last answer."""
        self._asked = -math.inf

    def of(self, name: str) -> int:
        """A model's sessions: the current number, or as of the last `refresh` if the store must be awaited."""
        try:
            count = self._store.count_now(name)
        except ServerError as error:
            _log.warning("could not read the number of sessions from the store", error=error)
            count = None
        if count is None and (count := self._counts.get(name)) is None:
            versions = self._models.named(name).loaded.values()
            return sum(self._table.count(version.index) for version in versions)
        return count

    async def refresh(self) -> None:
        """Read the counts from the store, unless that was just done."""
        now = self._clock.monotonic()
        if now - self._asked < _FRESH_S:
            return
        self._asked = now  # concurrent callers take the known counts
        try:
            for name in self._models.names():
                self._counts[name] = await self._store.count_of(name)
        except ServerError as error:
            _log.warning("could not read the number of sessions from the store", error=error)

    async def run(self) -> None:
        """Read the counts at intervals, for metrics, until cancelled."""
        while True:
            try:
                await self.refresh()
            except Exception as error:
                _log.defect("the sessions could not be counted; the timer continues", error)
            await asyncio.sleep(_COUNT_INTERVAL_S)
