"""The engine's face: sessions are opened, stepped, read and closed here, whatever the transport."""

from __future__ import annotations

import asyncio
import dataclasses
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np

from stepwell_server.clock import Clock
from stepwell_server.core.sessions import SessionTable
from stepwell_server.core.slots import Slots
from stepwell_server.engine.admission import Admission
from stepwell_server.engine.arena import Arena, default_resident_rows
from stepwell_server.engine.calls import (
    Frame,
    ModelInfo,
    Observer,
    Opened,
    Part,
    Predicted,
    SessionInfo,
    Single,
    StateRead,
    StepReply,
    Tensors,
)
from stepwell_server.engine.checks import check_inputs, check_state, require_finite
from stepwell_server.engine.closing import Closing
from stepwell_server.engine.commits import Commits
from stepwell_server.engine.completion import ModelCompletion
from stepwell_server.engine.creation import Creation
from stepwell_server.engine.directory import Directory
from stepwell_server.engine.executors import load_executor
from stepwell_server.engine.executors.base import Executor
from stepwell_server.engine.expiry import Expiry
from stepwell_server.engine.expiry_timer import ExpiryTimer
from stepwell_server.engine.frames import Frames
from stepwell_server.engine.keeper import Keeper
from stepwell_server.engine.listing import Listing
from stepwell_server.engine.loop import PassLoop
from stepwell_server.engine.opening import OpenedMany, Opening
from stepwell_server.engine.paging import Pager
from stepwell_server.engine.passes import Lane
from stepwell_server.engine.plain import PlainIntake
from stepwell_server.engine.port import PlainPort
from stepwell_server.engine.predict import PredictCall
from stepwell_server.engine.reading import Reading
from stepwell_server.engine.replies import Replies
from stepwell_server.engine.roster import Roster
from stepwell_server.engine.runner import Runner
from stepwell_server.engine.served import ServedModel
from stepwell_server.engine.singles import Singles
from stepwell_server.engine.solo import Solo
from stepwell_server.engine.warmup import warm_up
from stepwell_server.errors import InvalidInput, ServerError, Unavailable
from stepwell_server.program import Program
from stepwell_server.store.base import LocalStore
from stepwell_server.store.record import Texts

__all__ = ["Engine", "ModelStats", "OpenedMany"]


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
        self._table = SessionTable()
        self._models: list[ServedModel] = []
        self._commits = Commits(store)
        self._keeper = Keeper(self._table, self._commits, clock)
        pager = Pager(self._table, store, self._keeper, clock)
        self._admission = Admission(
            self._table, self._models, clock=clock, observer=observer, pager=pager, keeper=self._keeper
        )
        for name in sorted(programs):
            self._models.append(
                self._serve(
                    name,
                    programs[name],
                    max_batch_rows,
                    resident_rows or default_resident_rows(programs[name]),
                )
            )
        self._roster = Roster(self._table, self._models, self._admission, observer)
        self._expiry = Expiry(
            self._table,
            self._roster,
            store,
            self._commits,
            clock=clock,
            observer=observer,
            max_idle_s=max_session_idle_s,
        )
        self._directory = Directory(
            self._table, self._models, store, roster=self._roster, expiry=self._expiry, clock=clock
        )
        self._keeper.drop = self._directory.drop
        creation = Creation(
            self._table,
            self._directory,
            self._admission,
            self._commits,
            roster=self._roster,
            expiry=self._expiry,
            clock=clock,
        )
        self._opening = Opening(
            self._table,
            self._directory,
            self._admission,
            pager,
            creation,
            clock=clock,
            observer=observer,
        )
        self._reading = Reading(self._table, self._directory, self._admission, clock=clock)
        self._closing = Closing(
            self._table, self._directory, self._admission, self._commits, roster=self._roster, clock=clock
        )
        self._listing = Listing(self._table, self._directory, self._expiry, store)
        self._frames = Frames(self._table, self._directory)
        self.ports = [self._port(model) for model in self._models]
        """Where plain steps come in, by the number of the model that `locate` says."""
        self._singles = [Singles(self._table, port, clock, self._take) for port in self.ports]
        for port, singles in zip(self.ports, self._singles, strict=True):
            port.feed(singles.admit_all, singles.__len__)
        self._accepting = True
        self._timer = ExpiryTimer(self._expiry, self._commits, max_session_idle_s)
        self._expiring: asyncio.Task[None] | None = None

    async def start(self) -> None:
        """Run each program once at several sizes, so that the first callers do not pay for it."""
        for model in self._models:
            await asyncio.to_thread(warm_up, model.loop.runner, model.program, model.loop.max_batch_rows)
        self._expiring = asyncio.create_task(self._timer.run())

    def models(self) -> list[ModelInfo]:
        """The models, in the order of their names."""
        return [self._info(model) for model in self._models]

    def model(self, name: str) -> ModelInfo:
        """One model.

        Raises:
            ModelNotFound: there is none of that name.
        """
        return self._info(self._directory.model(name))

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
        self._commits.require_room()
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
        self._commits.require_room()
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
        self._commits.require_room()
        self._admit_singles()
        return await self._closing.close(session_id, request_id=request_id, deadline=deadline)

    async def close_sessions(self, session_ids: Sequence[str]) -> int:
        """Delete those of many sessions that are there; return how many they were.

        Raises:
            InvalidInput: there are too many.
            Overloaded: too much waits for the store, and none was deleted; or for one of them.
            Unavailable: the store did not delete all.
        """
        self._commits.require_room()
        self._admit_singles()
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

    def submit(self, frame: Frame) -> None:
        """Take a frame. Its sink gets parts until one is `last`, the first maybe before this returns.

        Raises:
            ServerError: the frame is refused as a whole; its sink gets nothing.
        """
        self._require_accepting()
        if frame.reset:
            self._commits.require_room()  # a step waits for its pass, and passes wait for the store
        self._admit_singles()
        self._take(frame)

    def _take(self, frame: Frame) -> None:
        checked = self._frames.check(frame)
        if len(checked.members):
            self._admission.require_room(checked.call)
        for member, error in checked.errors:
            checked.call.fail(np.array([member]), error)
        if len(checked.members):
            self._admission.admit(checked.call, checked.members)

    def locate(self, session_id: str) -> tuple[int, int]:
        """Where a live session is: its handle and the number of its model. For plain steps.

        Raises:
            SessionGone: there is none.
            Unavailable: the server is stopping.
        """
        self._require_accepting()
        handle = self._directory.find(session_id)
        return handle, int(self._table.model[handle])

    def submit_single(self, single: Single) -> None:
        """Take a step of one session; it is settled later, or at once if it is refused.

        Raises:
            SessionGone, Overloaded, Unavailable: refused; it is not settled.
        """
        self._require_accepting()
        handle = self._directory.find(single.session_id)
        model = self._directory.model_of(handle)
        waiting = self._singles[model.index]
        self._admission.require_rows(model.index, 1, gathered=self.ports[model.index].gathered)
        waiting.add(handle, single)

    async def step(self, single: Single) -> StepReply:
        """Submit a single step and wait for its answer. Sets its `settle`.

        Cancelling the waiting task cancels the step.

        Raises:
            ServerError: the step failed; nothing changed.
        """
        done: asyncio.Future[StepReply | ServerError] = asyncio.get_running_loop().create_future()
        single.settle = lambda answer: None if done.done() else done.set_result(answer)
        self.submit_single(single)
        try:
            answer = await done
        except asyncio.CancelledError:
            self.cancel(single)
            raise
        if isinstance(answer, ServerError):
            raise answer
        return answer

    def cancel(self, request: Frame | Single) -> None:
        """Drop what still waits of a frame or a step, unapplied. It still gets its answers."""
        request.cancelled = True
        if isinstance(request, Single) and request.frame is not None:
            request.frame.cancelled = True

    async def apply(self, frame: Frame) -> Part:
        """Submit a frame of one session and wait for its answer. Sets the frame's sink.

        Cancelling the waiting task cancels the frame.

        Raises:
            ServerError: the change failed; nothing changed.
        """
        done: asyncio.Future[Part] = asyncio.get_running_loop().create_future()
        frame.sink = lambda part: None if done.done() else done.set_result(part)
        self.submit(frame)
        try:
            part = await done
        except asyncio.CancelledError:
            self.cancel(frame)
            raise
        for failure in part.failures:
            raise failure.error
        return part

    async def get_state(self, session_id: str, *, deadline: float = float("inf")) -> StateRead:
        """Read a session's state after what was received before.

        Raises:
            SessionGone, DeadlineExceeded, Overloaded
        """
        self._admit_singles()
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
        self._commits.require_room()
        self._admit_singles()
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
    ) -> Predicted:
        """Run a model without a session.

        Raises:
            ModelNotFound, InvalidInput, DeadlineExceeded, Overloaded
        """
        self._require_accepting()
        served = self._directory.model(model)
        rows = next((len(array) for array in inputs.values() if array.ndim), 0)
        if not rows:
            raise InvalidInput(f"inputs must have at least one row; got {rows}")
        checked = check_inputs(served.program, inputs, rows)
        require_finite("input", checked.arrays, [spec.name for spec in served.program.inputs])
        values = None if state is None else check_state(served.program, state, rows)
        if values is not None:
            require_finite("state", values, [spec.name for spec in served.program.state])
        self._admit_singles()
        byte_count = sum(array.nbytes for array in (*checked.arrays, *(values or ())))
        self._admission.require_rows(served.index, rows)
        self._admission.require_bytes(served.index, byte_count)
        now = self._clock.monotonic()
        call = PredictCall(served, checked, values, rows, deadline=deadline, source=source, now=now)
        self._admission.bytes_waiting += byte_count
        try:
            predicted = await call.run()
        finally:
            self._admission.bytes_waiting -= byte_count
        self._observer.applied(model, "predict", 1, rows * checked.steps)
        return predicted

    def stats(self) -> list[ModelStats]:
        """What each model has and does now."""
        return [
            ModelStats(
                name=model.name,
                sessions=self._directory.count(model),
                resident_rows=model.slots.resident,
                queued=self._admission.waiting(model.index),
                queued_bytes=self._admission.bytes_waiting,
                uncommitted=self._commits.waiting,
            )
            for model in self._models
        ]

    def stop_accepting(self) -> None:
        """From now on refuse new sessions and new changes with `Unavailable`."""
        self._accepting = False

    async def drain(self) -> None:
        """Return when everything that was taken in is finished."""
        while self._is_busy:
            for model in self._models:
                await model.loop.idle()
            await self._commits.idle()
            await asyncio.sleep(0)  # what waits for rows is let in by the event loop

    async def close(self, timeout_s: float = 10.0) -> bool:
        """Stop the threads. Nothing may be under way.

        Returns:
            False if the store did not come back from a commit in time: it must not be used any more then.
        """
        if self._expiring is not None:
            self._expiring.cancel()
        self._pool.shutdown(wait=True)
        return await asyncio.to_thread(self._commits.close, timeout_s)

    @property
    def _is_busy(self) -> bool:
        return (
            self._admission.has_parked
            or not self._commits.is_idle
            or any(model.loop.busy for model in self._models)
        )

    def expire_idle(self) -> int:
        """Delete the sessions that have been idle for too long; return how many. The timer does it by itself."""
        return self._expiry.expire_idle()

    def _port(self, model: ServedModel) -> PlainPort:
        solo = Solo(
            self._table,
            model,
            self._keeper,
            self._admission.claim,
            clock=self._clock,
            observer=self._observer,
        )
        return PlainPort(model, PlainIntake(self._table, self._admission, model), solo)

    def _serve(self, name: str, program: Program, max_batch_rows: int, resident_rows: int) -> ServedModel:
        slots = Slots(resident_rows)
        arena = Arena(program, slots.capacity)
        lanes = [Lane(self._executor(program), arena) for _ in range(self._compute_threads)]
        completion = ModelCompletion(
            self._table, self._admission, self._keeper, clock=self._clock, observer=self._observer
        )
        loop = PassLoop(
            name,
            program,
            slots=slots,
            runner=Runner(lanes, self._pool),
            completion=completion,
            clock=self._clock,
            observer=self._observer,
            max_batch_rows=max_batch_rows,
        )
        replies, texts = Replies(program, self._table, arena), Texts(program.fingerprint, name)
        model = ServedModel(len(self._models), name, program, arena, slots, replies, loop, texts)
        completion.model = model
        loop.pause_while(lambda: self._commits.is_full)
        self._commits.on_room(loop.wake)
        return model

    def _info(self, model: ServedModel) -> ModelInfo:
        return ModelInfo(model.name, model.program, self._directory.count(model))

    def _admit_singles(self) -> None:
        """Single steps that wait came before what comes now: it must not overtake them."""
        for port in self.ports:
            port.take_in()

    def _require_accepting(self) -> None:
        if not self._accepting:
            raise Unavailable("the server is stopping; it was not applied")

    @property
    def max_session_idle_s(self) -> float:
        """Seconds after which an unused session expires; 0: never."""
        return self._max_idle_s
