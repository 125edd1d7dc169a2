"""All watches of the server: passes changes on to them, and finds out what became of sessions that left the table.

Changes of this server arrive from the commit. Changes of other servers on the same store are found by comparing stamps
with the store at intervals.
"""

from __future__ import annotations

import asyncio
import functools
import math
from collections import Counter
from collections.abc import Callable, Hashable, Sequence
from typing import NamedTuple

import numpy as np

from stepwell_server.alarm import Alarm
from stepwell_server.clock import Clock
from stepwell_server.core.sessions import SessionTable
from stepwell_server.engine.api import Made
from stepwell_server.engine.commit.records import Outcome
from stepwell_server.engine.sessions.directory import Directory
from stepwell_server.engine.sessions.read import StateReader
from stepwell_server.engine.state.model import Model
from stepwell_server.engine.types import Array, Members, Tensors
from stepwell_server.engine.watches.events import Kind, Sample, Wanted
from stepwell_server.engine.watches.watch import NEVER, Budget, Watch
from stepwell_server.errors import (
    DeadlineExceeded,
    InvalidInput,
    Overloaded,
    ServerError,
    Unavailable,
    VersionElsewhere,
    shorten,
)
from stepwell_server.logs import Log
from stepwell_server.program import dtype_of
from stepwell_server.store.base import SOLE

_log = Log("engine.watches")

MAX_SESSIONS = 1024
"""Sessions of one watch."""
MAX_WATCHED = 65_536
"""Sessions of all watches, counted once for each watch. No caller may hold more than is left for the others."""
MAX_WATCHES_OF_SESSION = 256
"""Watches of one session, of all callers: each of its changes costs time for each of them."""
MAX_HELD_BYTES = 128 << 20
"""Bytes of events that wait for slow readers, of all watches."""
COMPARE_INTERVAL_S = 0.5
"""Interval at which watched sessions are compared with a store that other servers use."""
_RETRY_AFTER_S = 1.0
#: Sessions that are read or compared together. After each part other work has this many times as long.
_BATCH_SIZE, _REST = 64, 9.0


class WatchCounts(NamedTuple):
    """Figures for metrics."""

    watches: int
    sessions: int
    """Watched sessions, once for each watch."""
    held_bytes: int
    sent: int
    """Events that were taken by readers."""
    dropped: int
    """Events for which a slow reader had no room."""


class Watchers:
    """Lives on the event loop."""

    def __init__(
        self,
        table: SessionTable,
        directory: Directory,
        reader: StateReader,
        drain: Callable[[], None],
        clock: Clock,
    ) -> None:
        """Make it without watches.

        Args:
            table: The sessions.
            directory: Finds sessions, and says why they ended.
            reader: Reads states without counting it as use.
            drain: Admits the changes that wait in the inboxes.
            clock: The source of time.
        """
        self._table = table
        self._directory = directory
        self._reader = reader
        self._drain = drain
        self._clock = clock
        self._budget = Budget(MAX_HELD_BYTES)
        self._by_id: dict[str, list[Watch]] = {}
        self._callers: dict[Watch, tuple[Hashable, int]] = {}
        """The caller of each watch, and its number of sessions at the start."""
        self._held: Counter[Hashable] = Counter()
        """Watched sessions of each caller."""
        self._doubtful: dict[str, None] = {}
        """Sessions to read: they may have changed, ended or not be known yet."""
        self._own: dict[str, int] = {}
        """The last revision that this server made of a watched session, where other servers use the store."""
        self._later: set[str] = set()
        """Sessions to read a little later."""
        self._alarm = Alarm(self._look)
        self._looking: asyncio.Task[None] | None = None
        self._comparing: asyncio.Task[None] | None = None
        table.on_watched_doubtful = self._doubt

    # ------------------------------------------------------------------------------------------------------ watches

    def open(self, session_ids: Sequence[str], wanted: Wanted, caller: Hashable) -> Watch:
        """Begin a watch. Close it with `close`.

        Raises:
            InvalidInput: the list breaks a rule.
            Overloaded: too much is watched already.
        """
        count = len(session_ids)
        if not 1 <= count <= MAX_SESSIONS:
            raise InvalidInput(f"session_ids must have 1 to {MAX_SESSIONS} ids; got {count}")
        if not all(session_ids):
            raise InvalidInput("session_ids must not be empty ids; got one")
        if len(set(session_ids)) < count:
            twice = next(each for each, times in Counter(session_ids).items() if times > 1)
            raise InvalidInput(f"session_ids must not repeat an id; got {shorten(twice, 256)!r} twice")
        total = sum(self._held.values())
        if self._held[caller] + count > MAX_WATCHED - total - count or self._budget.is_full:
            raise Overloaded(
                f"sessions watched must stay within {MAX_WATCHED}, and no caller may watch more than are left; {total} are"
                f" watched, {self._held[caller]} of them by this caller, and this call adds {count}",
                retry_after_s=_RETRY_AFTER_S,
            )
        for session_id in session_ids:
            if len(self._by_id.get(session_id, ())) >= MAX_WATCHES_OF_SESSION:
                raise Overloaded(
                    f"watches of a session must stay within {MAX_WATCHES_OF_SESSION}; session {session_id!r} has as many",
                    retry_after_s=_RETRY_AFTER_S,
                )
        watch = Watch(session_ids, wanted, self._clock, self._budget, self._catch_up, self._left)
        self._callers[watch] = caller, count
        self._held[caller] += count
        self._drain()  # changes received before come before the first event
        for session_id in session_ids:
            self._by_id.setdefault(session_id, []).append(watch)
            self._table.watch(session_id)
            self._doubt(session_id)
        if self._comparing is None:
            self._comparing = asyncio.create_task(self._compare())
        return watch

    def close(self, watch: Watch) -> None:
        """End a watch, whether it has ended or not."""
        watch.close()
        caller, count = self._callers.pop(watch)
        self._held[caller] -= count
        if not self._held[caller]:
            del self._held[caller]
        if not self._callers:
            self._rest()

    def stop(self, error: ServerError) -> None:
        """End all watches with an error."""
        for watch in self._callers:
            watch.stop(error)
        self._rest()

    def _rest(self) -> None:
        """Stop looking at sessions."""
        for task in (self._looking, self._comparing):
            if task is not None:
                task.cancel()
        self._looking = self._comparing = None
        self._doubtful.clear()
        self._later.clear()

    def counts(self) -> WatchCounts:
        """Current figures."""
        budget = self._budget
        sessions = sum(len(watches) for watches in self._by_id.values())
        return WatchCounts(len(self._callers), sessions, budget.held, budget.sent, budget.dropped)

    def _left(self, watch: Watch, session_id: str) -> None:
        """A watch no longer watches a session."""
        watches = self._by_id[session_id]
        watches.remove(watch)
        if not watches:
            del self._by_id[session_id]
            self._table.unwatch(session_id)
            self._doubtful.pop(session_id, None)
            self._own.pop(session_id, None)
            self._later.discard(session_id)

    # ------------------------------------------------------------------------------------------------------ commits

    def committed(self, outcome: Outcome, places: Members | None) -> None:
        """Sessions of an outcome were changed, and some of them are watched; see `Committer`."""
        table, handles, origin = self._table, outcome.handles, outcome.origin
        if origin is None:
            return
        if outcome.stamp > SOLE:
            for at in np.flatnonzero(table.watched[handles]).tolist():
                self._own[table.session_id(int(handles[at]))] = int(outcome.revisions[at])
        some = table.due_to_watches(handles, outcome.revisions, self._clock.monotonic())
        self._report(
            outcome.model,
            handles[some].tolist(),
            lambda place: origin.made(some[place] if places is None else int(places[some[place]])),
        )

    def stepped(self, model: Model, steps: Sequence[tuple[int, Sequence[bytes]]]) -> None:
        """Sessions whose watches may report it made one time step in compiled code: their handles, and inputs as bytes."""
        self._report(model, [handle for handle, _ in steps], lambda place: _made(model, steps[place][1]))

    def _report(self, model: Model, handles: Sequence[int], made: Callable[[int], Made]) -> None:
        """Report changes of sessions to the watches for which they are due. `made` is called with places."""
        copies = _Copies(model, self._table, handles)
        for place, handle in enumerate(handles):
            if due := self._due(handle):
                how = made(place)
                kind = Kind.STEP if how.time_steps else Kind.RESET
                sample = self._sample(kind, model, handle, how, copies.of(place))
                for watch in due:
                    watch.note(sample)
            self._plan(handle)

    def _due(self, handle: int) -> Sequence[Watch]:
        """The watches for which a change is due."""
        table = self._table
        session_id = table.session_id(handle)
        uid, revision = table.opened_with.item(handle), table.revision.item(handle)
        return [each for each in self._by_id.get(session_id, ()) if each.takes(session_id, uid, revision)]

    def _plan(self, handle: int) -> None:
        """Note in the table which changes of a session a watch may report next.

        Whatever makes a change due earlier lets the table ask: a new watch, or a session that enters it.
        """
        table = self._table
        session_id = table.session_id(handle)
        due = [each.next_due(session_id) for each in self._by_id.get(session_id, ())]
        table.watch_revision[handle] = min((revision for revision, _ in due), default=NEVER)
        table.watch_at[handle] = min((at for _, at in due), default=math.inf)

    def _sample(
        self, kind: Kind, model: Model, handle: int, made: Made, copied: Callable[[str], Sequence[Array]]
    ) -> Sample:
        """A session in the arena, at its present revision. `copied` copies its "states" or "outputs"."""
        table, program = self._table, model.program

        def read(what: str) -> Tensors:
            if what == "inputs":
                return {
                    spec.name: array.copy() for spec, array in zip(program.inputs, made.inputs, strict=True)
                }
            arrays = copied(what)
            if what == "states":
                return dict(zip([spec.name for spec in program.state], arrays, strict=True))
            if made.rows:
                arrays = [array[list(made.rows)] for array in arrays]
            return dict(zip([spec.name for spec in program.outputs], arrays, strict=True))

        return Sample(
            kind=kind,
            session_id=table.session_id(handle),
            uid=int(table.opened_with[handle]),
            revision=int(table.revision[handle]),
            position=int(table.position[handle]),
            model=model.name,
            version=model.version,
            time=self._clock.now(),
            read=read,
            time_steps=made.time_steps,
            rows=made.rows,
            is_elsewhere=self._is_elsewhere(handle, int(table.revision[handle])),
        )

    def _is_elsewhere(self, handle: int, revision: int) -> bool:
        """Whether another server made this revision of a session."""
        table = self._table
        if table.stamp[handle] <= SOLE:  # no other server uses the store
            return False
        return revision > self._own.get(table.session_id(handle), 0)

    def _catch_up(self, watch: Watch, session_ids: Sequence[str]) -> None:
        """Show a watch those of some sessions whose last changes it did not report."""
        table = self._table
        for session_id in session_ids:
            handle = table.find(session_id)
            if handle is None:
                self._doubt(session_id)
                continue
            model = self._directory.models.by_handle(handle)
            if not watch.is_missing(session_id, int(table.revision[handle]), model.version):
                continue
            if table.row[handle] < 0:
                self._doubt(session_id)
            elif table.claimed[handle]:
                watch.try_later(session_id)
            else:
                copied = _Copies(model, table, [handle]).of(0)
                watch.present(self._sample(Kind.PRESENT, model, handle, Made(0, (), ()), copied))

    # ------------------------------------------------------------------------------------------------------ reading

    def _doubt(self, session_id: str) -> None:
        """Read a session in the next iteration of the event loop."""
        self._doubtful[session_id] = None
        self._alarm.ring()

    def _look(self) -> None:
        if self._looking is None and self._doubtful:
            self._looking = asyncio.create_task(self._read_doubtful())

    async def _read_doubtful(self) -> None:
        while self._doubtful:
            some = list(self._doubtful)[:_BATCH_SIZE]
            for session_id in some:
                del self._doubtful[session_id]
            try:
                await self._read(some)
            except ServerError:
                self._later.update(each for each in some if each in self._by_id)
            except Exception as error:
                _log.defect("watched sessions could not be read", error)
            await asyncio.sleep(0)
        self._looking = None

    async def _read(self, session_ids: Sequence[str]) -> None:
        """Read sessions, and show them to their watches.

        Raises:
            ServerError: the store cannot be read now.
        """
        seen = await self._directory.look(session_ids, reread=True)
        groups: dict[tuple[str, bool], list[str]] = {}
        for session_id in session_ids:
            try:
                handle = self._directory.find(session_id, seen)
            except ServerError as error:
                self._failed(session_id, error)
                continue
            if self._table.claimed[handle]:  # its change may take long, and will be noted
                self._later.add(session_id)
                continue
            with_state = any(watch.wanted.states for watch in self._by_id.get(session_id, ()))
            model = self._directory.models.by_handle(handle)
            groups.setdefault((str(model), with_state), []).append(session_id)
        for (_, with_state), own in groups.items():
            await self._read_group(own, with_state=with_state)

    async def _read_group(self, session_ids: Sequence[str], *, with_state: bool) -> None:
        """Read sessions of one version."""
        seen = await self._directory.look(session_ids, reread=True)
        found = await self._reader.read_many(session_ids, seen, float("inf"), with_state=with_state)
        for members, error in found.errors:
            for member in members.tolist():
                self._failed(session_ids[member], error)
        starts = np.cumsum(found.sizes) - found.sizes
        for at, member in enumerate(found.members.tolist()):
            handle = self._table.find(session_ids[member])
            if handle is None:  # it has just left, and is doubtful again
                continue
            rows = slice(int(starts[at]), int(starts[at] + found.sizes[at]))
            states = {name: array[rows] for name, array in found.state.items()}
            sample = Sample(
                kind=Kind.PRESENT,
                session_id=session_ids[member],
                uid=int(self._table.opened_with[handle]),
                revision=int(found.revisions[at]),
                position=int(found.positions[at]),
                model=found.model,
                version=found.version,
                time=self._clock.now(),
                read=functools.partial(_states, states),
                is_elsewhere=self._is_elsewhere(handle, int(found.revisions[at])),
            )
            for watch in list(self._by_id.get(session_ids[member], ())):
                watch.present(sample)

    def _failed(self, session_id: str, error: ServerError) -> None:
        """A session could not be read: it has ended, or the store cannot be asked now."""
        is_passing = isinstance(error, (Unavailable, Overloaded, DeadlineExceeded))
        if is_passing and not isinstance(error, VersionElsewhere):
            if session_id in self._by_id:
                self._later.add(session_id)
            return
        for watch in list(self._by_id.get(session_id, ())):
            watch.end(session_id, error)

    async def _compare(self) -> None:
        """Find changes by other servers, at intervals, and read what could not be read before."""
        while True:
            await asyncio.sleep(COMPARE_INTERVAL_S)
            later, self._later = self._later, set()
            for session_id in later & self._by_id.keys():
                self._doubt(session_id)
            watched = list(self._by_id)
            for at in range(0, len(watched), _BATCH_SIZE):
                began = self._clock.monotonic()
                try:
                    await self._compare_some(watched[at : at + _BATCH_SIZE])
                except ServerError as error:
                    _log.debug("watched sessions could not be compared with the store", error=error)
                except Exception as error:
                    _log.defect("watched sessions could not be compared with the store", error)
                await asyncio.sleep(_REST * (self._clock.monotonic() - began))

    async def _compare_some(self, session_ids: Sequence[str]) -> None:
        """Read those of some sessions again that other servers have changed."""
        table = self._table
        handles = table.find_all(session_ids)
        # only a store that other servers use has other stamps
        may_differ = (handles >= 0) & (table.stamp[handles] > SOLE) & ~table.claimed[handles]
        if not np.count_nonzero(may_differ):
            return
        ids = [session_ids[place] for place in np.flatnonzero(may_differ).tolist()]
        stamps = table.stamp[handles[may_differ]].tolist()
        found = await self._directory.store.fetch(ids, stamps)
        for session_id, stamp, each in zip(ids, stamps, found, strict=True):
            handle = table.find(session_id)
            # a session that left the table is doubtful already; another stamp is a change of this server
            if not each.is_known and handle is not None and int(table.stamp[handle]) == stamp:
                self._doubt(session_id)


class _Copies:
    """Copies of the rows of some sessions in the arena: of all together, when the first is asked for."""

    def __init__(self, model: Model, table: SessionTable, handles: Sequence[int]) -> None:
        self._arena = model.arena
        self._table = table
        self._handles = handles
        self._known: dict[str, Sequence[Array]] = {}
        self._ends: list[int] = []

    def of(self, place: int) -> Callable[[str], Sequence[Array]]:
        """A function that returns the "states" or the "outputs" of a session. They keep no other session's alive."""
        return functools.partial(self._copied, place)

    def _copied(self, place: int, what: str) -> Sequence[Array]:
        if (arrays := self._known.get(what)) is None:
            handles = np.array(self._handles, np.intp)
            rows = self._table.rows_of(handles)
            self._ends = self._table.batch_size[handles].cumsum().tolist()
            arrays = (
                self._arena.read(rows) if what == "states" else [each[rows] for each in self._arena.outputs]
            )
            self._known[what] = arrays
        if len(self._handles) == 1:
            return arrays
        own = slice(self._ends[place - 1] if place else 0, self._ends[place])
        return [array[own].copy() for array in arrays]


def _made(model: Model, data: Sequence[bytes]) -> Made:
    """How a session made one time step with these inputs."""
    return Made(
        1,
        (),
        [
            np.frombuffer(each, dtype_of(spec.dtype)).reshape(1, *spec.shape)
            for spec, each in zip(model.program.inputs, data, strict=True)
        ],
    )


def _states(states: Tensors, _what: str) -> Tensors:
    """The states that were read; an event of a session that was read has no other tensors."""
    return states
