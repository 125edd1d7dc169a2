"""The engine's face: sessions are opened, stepped, read and closed here, whatever the transport."""

from __future__ import annotations

import asyncio
import dataclasses
import sys
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np

from stepwell_server.clock import Clock
from stepwell_server.core.scheduler import Scheduler
from stepwell_server.core.sessions import SessionTable
from stepwell_server.core.slots import Slots
from stepwell_server.engine.api import Applied, ModelInfo, Observer, Opened, Predicted, SessionInfo, StateRead
from stepwell_server.engine.change import Awaited, Change
from stepwell_server.engine.cost import Cost
from stepwell_server.engine.durability.committer import Committer
from stepwell_server.engine.durability.group_commit import GroupCommit
from stepwell_server.engine.durability.records import Records
from stepwell_server.engine.executors import load_executor
from stepwell_server.engine.executors.base import Executor
from stepwell_server.engine.intake.admission import Admission
from stepwell_server.engine.intake.inbox import Held, Inbox, joined_where_alike
from stepwell_server.engine.intake.paging import Pager
from stepwell_server.engine.intake.row_queue import RowQueue
from stepwell_server.engine.intake.turns import Turns
from stepwell_server.engine.intake.validation import (
    Validation,
    check_inputs,
    check_state,
    require_finite,
    require_lists,
    require_reply,
)
from stepwell_server.engine.models import Models
from stepwell_server.engine.passes.batch import Lane
from stepwell_server.engine.passes.completion import Completion
from stepwell_server.engine.passes.inline import Inline
from stepwell_server.engine.passes.loop import PassLoop
from stepwell_server.engine.passes.predict import PredictCall
from stepwell_server.engine.passes.runner import Runner, warm_up
from stepwell_server.engine.sessions.closing import Closing
from stepwell_server.engine.sessions.creation import Creation
from stepwell_server.engine.sessions.directory import Directory
from stepwell_server.engine.sessions.expiry import Expiry
from stepwell_server.engine.sessions.expiry_timer import ExpiryTimer
from stepwell_server.engine.sessions.listing import Listing
from stepwell_server.engine.sessions.opening import OpenedMany, Opening
from stepwell_server.engine.sessions.reading import Reading
from stepwell_server.engine.sessions.removal import Removal
from stepwell_server.engine.state.arena import Arena, default_resident_rows
from stepwell_server.engine.state.model import Alarm, Model
from stepwell_server.engine.state.replies import ReplyMemory
from stepwell_server.engine.types import Members, Tensors
from stepwell_server.errors import InvalidInput, Unavailable
from stepwell_server.program import Program
from stepwell_server.store.base import LocalStore
from stepwell_server.store.record import Texts

__all__ = ["Engine", "ModelStats", "OpenedMany"]

_NOBODY: Members = np.zeros(0, np.intp)


@dataclasses.dataclass(frozen=True, slots=True)
class Line:
    """What works on a model's changes."""

    inbox: Inbox
    loop: PassLoop


@dataclasses.dataclass(frozen=True, slots=True)
class ModelStats:
    """What a model has and does now."""

    name: str
    sessions: int
    resident_rows: int
    queued: int
    """Rows and changes that wait for a pass or for their session."""
    queued_bytes: int
    """Bytes of inputs that wait, over all models."""
    uncommitted: int = 0
    """Sessions whose changes wait for the store, over all models."""


class Engine:
    """Serves the sessions of some models. Lives on one event loop; not thread-safe."""

    def __init__(
        self,
        programs: Mapping[str, Program],
        *,
        store: LocalStore,
        clock: Clock,
        observer: Observer,
        max_batch_rows: int,
        resident_rows: int | None,
        max_session_idle_s: float,
        compute_threads: int,
        executor: Callable[[Program], Executor] = load_executor,
    ) -> None:
        self._clock = clock
        self._observer = observer
        self._pool = ThreadPoolExecutor(compute_threads, thread_name_prefix="stepwell-compute")
        self._compute_threads = compute_threads
        self._executor = executor
        self._max_idle_s = max_session_idle_s
        self._table = table = SessionTable()
        self._models = Models(table)
        self._group = GroupCommit(store)
        records = Records(table)
        pager = Pager(table, store, records, clock)
        row_queue = RowQueue(table, self._models, pager)
        self._turns = Turns(table, self._models, pager, row_queue, clock)
        self._row_queue = row_queue
        self._held = Held()
        removal = Removal(table, self._models, self._turns, observer)
        self._expiry = Expiry(
            table,
            removal,
            store,
            self._group,
            clock=clock,
            observer=observer,
            max_idle_s=max_session_idle_s,
        )
        self._directory = Directory(
            table, self._models, store, removal=removal, expiry=self._expiry, clock=clock
        )
        self._committer = Committer(
            table, self._group, records, clock, release=self._turns.release, drop=self._expiry.drop
        )
        self._admission = Admission(
            table,
            self._turns,
            row_queue,
            pager,
            self._committer,
            refuse_stale=self._refuse_stale,
            clock=clock,
            observer=observer,
        )
        creation = Creation(
            table,
            self._directory,
            row_queue,
            self._group,
            removal=removal,
            expiry=self._expiry,
            clock=clock,
        )
        self._opening = Opening(
            table, self._directory, self._turns, pager, creation, clock=clock, observer=observer
        )
        self._reading = Reading(table, self._directory, self._turns, clock=clock)
        self._closing = Closing(
            table,
            self._directory,
            self._turns,
            self._group,
            removal=removal,
            drop=self._expiry.drop,
            clock=clock,
        )
        self._listing = Listing(table, self._directory, self._expiry, store)
        self._validation = Validation(table, self._models)
        self._lines: dict[int, Line] = {}
        for name in sorted(programs):
            rows = resident_rows or default_resident_rows(programs[name])
            self._serve(name, programs[name], max_batch_rows, rows)
        self._group.on_room(self._ring_all)
        self._accepting = True
        self._timer = ExpiryTimer(self._expiry, self._group, max_session_idle_s)
        self._expiring: asyncio.Task[None] | None = None

    async def start(self) -> None:
        """Run each program once at several sizes, so that the first callers do not pay for it."""
        for model in self._models:
            runner = self._lines[model.index].loop.runner
            await asyncio.to_thread(warm_up, runner, model.program, model.max_batch_rows)
        self._expiring = asyncio.create_task(self._timer.run())

    def models(self) -> list[ModelInfo]:
        """The models, in the order of their names."""
        return [self._info(model) for model in self._models]

    def model(self, name: str) -> ModelInfo:
        """One model.

        Raises:
            ModelNotFound: there is none of that name.
        """
        return self._info(self._models.by_name(name))

    def program(self, name: str) -> Program:
        """The program of a model.

        Raises:
            ModelNotFound: there is none of that name.
        """
        return self._models.by_name(name).program

    def model_names(self) -> list[str]:
        """Names of the models, in order."""
        return self._models.names()

    async def open_session(
        self,
        model: str,
        *,
        session_id: str = "",
        batch_size: int = 1,
        state: Tensors | None = None,
        must_be_new: bool = False,
        request_id: int = 0,
        fingerprint: str = "",
    ) -> Opened:
        """Open a session, or resume the live one of that id.

        Raises:
            ModelNotFound, ModelMismatch, InvalidInput, SessionExists, Overloaded, Unavailable
        """
        self._require_accepting()
        self._group.require_room()
        return await self._opening.open(
            model,
            session_id=session_id,
            batch_size=batch_size,
            state=state,
            must_be_new=must_be_new,
            request_id=request_id,
            fingerprint=fingerprint,
        )

    async def open_sessions(
        self,
        model: str,
        *,
        count: int = 0,
        session_ids: Sequence[str] = (),
        batch_size: int = 1,
        request_id: int = 0,
    ) -> OpenedMany:
        """Open many sessions: all of them or none. Errors as of `open_session`."""
        self._require_accepting()
        self._group.require_room()
        return await self._opening.open_many(
            model, count=count, session_ids=session_ids, batch_size=batch_size, request_id=request_id
        )

    async def close_session(
        self, session_id: str, *, request_id: int = 0, deadline: float = float("inf")
    ) -> bool:
        """Delete a session after what was received before; True if this request did so before.

        Raises:
            SessionGone, Overloaded, DeadlineExceeded, Unavailable
        """
        self._group.require_room()
        self._drain_inboxes()
        return await self._closing.close(session_id, request_id=request_id, deadline=deadline)

    async def close_sessions(self, session_ids: Sequence[str]) -> int:
        """Delete those of many sessions that are there; return how many they were.

        Raises:
            InvalidInput: there are too many.
            Overloaded: too much waits for the store, and none was deleted; or for one of them.
            Unavailable: the store did not delete all.
        """
        self._group.require_room()
        self._drain_inboxes()
        return await self._closing.close_many(session_ids)

    def session_info(self, session_id: str) -> SessionInfo:
        """Describe a session as of its last completed change.

        Raises:
            SessionGone: there is none.
        """
        return self._directory.describe(session_id)

    async def list_sessions(
        self, *, model: str = "", prefix: str = "", after: str = "", limit: int = 1000
    ) -> tuple[list[SessionInfo], int]:
        """Up to `limit` sessions in the order of their ids, and how many fit in all.

        Raises:
            ModelNotFound: there is no model of that name.
        """
        return await self._listing.page(model=model, prefix=prefix, after=after, limit=limit)

    def submit(self, change: Change) -> None:
        """Take a change. Its replies get every member's answer, some maybe before this returns.

        Raises:
            ServerError: the change is refused as a whole; its replies get nothing.
        """
        self._require_accepting()
        if change.reset:
            self._group.require_room()  # a step waits for its pass, and passes wait for the store
        require_lists(change)
        handles = self._directory.find_all(change.session_ids)
        missing = np.flatnonzero(handles < 0) if len(handles) > 1 or handles[0] < 0 else _NOBODY
        if len(missing) == change.size:
            self._refuse_missing(change, missing)
            return
        refused = self._validation.check(change, handles)
        inbox = self._lines[change.model.index].inbox
        if len(change.members):
            inbox.hold(change)
        for member, error in refused:
            change.fail(np.array([member]), error)
        if len(missing):
            self._refuse_missing(change, missing)
        if len(change.members):
            inbox.put(change)

    async def apply(self, change: Change, answer: Awaited) -> Applied:
        """Submit a change of one session whose replies are `answer`, and wait for it.

        Cancelling the waiting task cancels the change.

        Raises:
            ServerError: the change failed; nothing changed.
        """
        self.submit(change)
        return await answer.get()

    def model_of(self, session_id: str) -> str:
        """The name of a live session's model.

        Raises:
            SessionGone: there is none.
            ModelMismatch, ModelNotFound, StateCorrupt, Unavailable: it cannot be stepped here.
        """
        return self._models.by_handle(self._directory.find(session_id)).name

    def _refuse_missing(self, change: Change, members: Members) -> None:
        for some, error in self._directory.why_not_all(change.session_ids, members):
            change.fail(some, error)

    def _refuse_stale(self, change: Change, members: Members) -> Members:
        """Members whose sessions left the table since they were checked: see `Admission`."""
        found = self._directory.find_all([change.session_ids[member] for member in members.tolist()])
        fits = found >= 0
        fits &= self._table.batch_size[found] == change.sizes[members]
        fits &= self._table.model[found] == change.model.index
        change.handles[members[fits]] = found[fits]
        change.births[members[fits]] = self._table.birth[found[fits]]
        gone = members[~fits]
        if len(gone):
            self._refuse_missing(change, gone)
        return members[fits]

    async def get_state(self, session_id: str, *, deadline: float = float("inf")) -> StateRead:
        """Read a session's state after what was received before.

        Raises:
            SessionGone, DeadlineExceeded, Overloaded
        """
        self._drain_inboxes()
        return await self._reading.read(session_id, deadline)

    async def fork(
        self,
        session_id: str,
        *,
        new_session_id: str = "",
        expected: int | None = None,
        request_id: int = 0,
        deadline: float = float("inf"),
    ) -> Opened:
        """Open a session with the state, revision and position of another.

        Raises:
            SessionGone, SessionExists, RevisionConflict, InvalidInput, Overloaded, DeadlineExceeded
        """
        self._require_accepting()
        self._group.require_room()
        self._drain_inboxes()
        return await self._opening.fork(
            session_id,
            new_session_id=new_session_id,
            expected=expected,
            request_id=request_id,
            deadline=deadline,
        )

    async def predict(
        self,
        model: str,
        inputs: Tensors,
        state: Tensors | None = None,
        *,
        deadline: float = float("inf"),
        source: object = None,
        reply_limit: int = sys.maxsize,
        reply_bytes: int = 0,
    ) -> Predicted:
        """Run a model without a session. The limit of the reply is as of `Change`.

        Raises:
            ModelNotFound, InvalidInput, MessageTooLarge, DeadlineExceeded, Overloaded
        """
        self._require_accepting()
        served = self._models.by_name(model)
        rows = next((len(array) for array in inputs.values() if array.ndim), 0)
        if not rows:
            raise InvalidInput(f"inputs must have at least one row; got {rows}")
        checked = check_inputs(served.program, inputs, rows)
        require_reply(served.program, rows, checked.steps, reply_bytes, reply_limit)
        require_finite("input", checked.arrays, [spec.name for spec in served.program.inputs])
        values = None if state is None else check_state(served.program, state, rows)
        if values is not None:
            require_finite("state", values, [spec.name for spec in served.program.state])
        self._drain_inboxes()
        byte_count = sum(array.nbytes for array in (*checked.arrays, *(values or ())))
        self._lines[served.index].inbox.require_room(rows, byte_count)
        now = self._clock.monotonic()
        call = PredictCall(served, checked, values, rows, deadline=deadline, source=source, now=now)
        self._held.bytes += byte_count
        try:
            predicted = await call.run()
        finally:
            self._held.bytes -= byte_count
        self._observer.applied(model, "predict", 1, rows * checked.steps)
        return predicted

    def stats(self) -> list[ModelStats]:
        """What each model has and does now."""
        return [
            ModelStats(
                name=model.name,
                sessions=self._directory.count(model),
                resident_rows=model.slots.resident,
                queued=self._lines[model.index].inbox.waiting,
                queued_bytes=self._held.bytes,
                uncommitted=self._group.waiting,
            )
            for model in self._models
        ]

    def stop_accepting(self) -> None:
        """From now on refuse new sessions and new changes with `Unavailable`."""
        self._accepting = False

    async def drain(self) -> None:
        """Return when everything that was taken in is finished."""
        while self._is_busy:
            for line in list(self._lines.values()):
                await line.loop.idle()
            await self._group.idle()
            await asyncio.sleep(0)  # what waits for rows is let in by the event loop

    async def close(self, timeout_s: float = 10.0) -> bool:
        """Stop the threads. Nothing may be under way.

        Returns:
            False if the store did not come back from a commit in time: it must not be used any more then.
        """
        if self._expiring is not None:
            self._expiring.cancel()
        self._pool.shutdown(wait=True)
        return await asyncio.to_thread(self._group.close, timeout_s)

    @property
    def _is_busy(self) -> bool:
        return (
            bool(self._row_queue)
            or not self._group.is_idle
            or any(line.loop.busy for line in self._lines.values())
        )

    def expire_idle(self) -> int:
        """Delete the sessions that have been idle for too long; return how many. The timer does it by itself."""
        return self._expiry.expire_idle()

    def _serve(self, name: str, program: Program, max_batch_rows: int, resident_rows: int) -> None:
        slots = Slots(resident_rows)
        arena = Arena(program, slots.capacity)
        model = Model(
            index=self._models.new_index(),
            name=name,
            program=program,
            arena=arena,
            slots=slots,
            replies=ReplyMemory(program, self._table, arena),
            texts=Texts(program.fingerprint, name),
            max_batch_rows=max_batch_rows,
            ready=Scheduler(max_batch_rows),
            cost=Cost(),
            work=Alarm(),
        )
        lanes = [Lane(self._executor(program), arena) for _ in range(self._compute_threads)]
        inbox, runner = Inbox(model, self._held, self._in_line), Runner(model, lanes, self._pool)
        inline = Inline(
            model, self._table, lanes[0], self._committer, clock=self._clock, observer=self._observer
        )
        loop = PassLoop(
            model,
            inbox,
            self._admission,
            runner,
            Completion(model, self._table, self._committer, clock=self._clock, observer=self._observer),
            inline,
            self._turns.release,
            lambda: self._group.is_full,
            clock=self._clock,
            observer=self._observer,
        )
        self._models.add(model)
        self._lines[model.index] = Line(inbox, loop)

    def _in_line(self, model: int) -> int:
        return self._turns.waiting(model) + self._row_queue.count(model)

    def _ring_all(self) -> None:
        for model in self._models:
            model.work.ring()

    def _info(self, model: Model) -> ModelInfo:
        return ModelInfo(model.name, model.program, self._directory.count(model))

    def _drain_inboxes(self) -> None:
        """What waits in the inboxes came before what comes now, which is no change: it must not overtake them."""
        for line in self._lines.values():
            if line.inbox:
                self._admission.admit(joined_where_alike(line.inbox.drain()))

    def _require_accepting(self) -> None:
        if not self._accepting:
            raise Unavailable("the server is stopping; it was not applied")

    @property
    def max_session_idle_s(self) -> float:
        """Seconds after which an unused session expires; 0: never."""
        return self._max_idle_s
