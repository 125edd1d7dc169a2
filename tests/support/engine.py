"""An engine on a fake executor and a manual clock, and the books it must keep."""

from __future__ import annotations

import asyncio
import dataclasses
import itertools
import threading
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from stepwell_server.engine.api import Observer
from stepwell_server.engine.change import Change
from stepwell_server.engine.cost import Cost
from stepwell_server.engine.engine import Engine
from stepwell_server.engine.executors.base import Executor
from stepwell_server.engine.passes.batch import Pass
from stepwell_server.engine.passes.runner import Runner
from stepwell_server.engine.types import U64, Members
from stepwell_server.errors import ServerError
from stepwell_server.program import Program
from stepwell_server.store.awaited import AwaitedStore
from stepwell_server.store.base import LocalStore
from stepwell_server.store.disk.store import DiskStore
from stepwell_server.store.memory import MemoryStore
from support.awaited import RemoteStore
from support.clock import ManualClock
from support.fake_executor import PLAIN, WAIT_S, FakeExecutor, Hooks

Array = npt.NDArray[Any]


class FixedCost(Cost):
    """Says of every pass that it takes `seconds`, and that `steps` time steps fit into a slice."""

    def __init__(self, seconds: float, steps: int) -> None:
        super().__init__()
        self.seconds = self.one_s = seconds
        self.steps = steps

    def learn(self, items: int, seconds: float, times: int = 1) -> None:
        """It knows."""

    def of(self, items: int, times: int = 1) -> float:
        return self.seconds

    def times_within(self, items: int, seconds: float) -> int:
        return self.steps


class PassCounter:
    """Counts the passes of one model that are on threads at the same time."""

    def __init__(self, runner: Runner) -> None:
        self._run_on_threads = runner.run_on_threads
        self._lock = threading.Lock()
        self._now = 0
        self.most = 0
        self.on_end: Callable[[], None] = lambda: None
        """Called on the thread that ends a pass, before anyone else knows."""

    def run_on_threads(self, work: Pass, done: Callable[[BaseException | None], None]) -> None:
        def ended(broken: BaseException | None) -> None:
            self.on_end()
            self._count(-1)
            done(broken)

        self._count(1)
        self._run_on_threads(work, ended)

    def _count(self, change: int) -> None:
        with self._lock:
            self._now += change
            self.most = max(self.most, self._now)


class Events(Observer):
    """Keeps what it is told."""

    def __init__(self) -> None:
        self.sessions: list[tuple[str, str]] = []
        self.passes: list[tuple[int, int]] = []
        """Rows and time steps of each pass."""
        self.changes: list[tuple[str, int, int]] = []

    def session_event(self, event: str, model: str, session_id: str) -> None:
        self.sessions.append((event, session_id))

    def pass_done(self, model: str, rows: int, time_steps: int, seconds: float) -> None:
        self.passes.append((rows, time_steps))

    def applied(self, model: str, change: str, count: int, row_steps: int) -> None:
        self.changes.append((change, count, row_steps))


@dataclasses.dataclass(frozen=True)
class Answer:
    """What one member of a frame got."""

    revision: int
    position: int
    outputs: Mapping[str, Array]
    replayed: bool


class Answers:
    """The replies to a change: what each member got."""

    def __init__(self, sizes: Sequence[int]) -> None:
        self._sizes = sizes
        self.by_member: dict[int, Answer | ServerError] = {}
        self._ended: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self.is_cancelled = False

    def applied(
        self,
        members: Members,
        revisions: U64,
        positions: U64,
        outputs: Mapping[str, Array],
        *,
        replayed: bool,
    ) -> None:
        row = 0
        for place, member in enumerate(members.tolist()):
            end = row + self._sizes[member]
            # copied at once: they may be views that the next pass does not outlive
            own = {name: array[row:end].copy() for name, array in outputs.items()}
            self._set(member, Answer(int(revisions[place]), int(positions[place]), own, replayed))
            row = end
        assert all(len(array) == row for array in outputs.values())
        self._end_if_due()

    def failed(self, members: Members, error: ServerError) -> None:
        for member in members.tolist():
            self._set(member, error)
        self._end_if_due()

    def cancelled(self, members: Members) -> Members:
        return members if self.is_cancelled else members[:0]

    @property
    def ended(self) -> bool:
        return self._ended.done()

    async def all(self) -> list[Answer | ServerError]:
        """Wait until every member has its answer."""
        await asyncio.wait_for(asyncio.shield(self._ended), WAIT_S)
        return [self.by_member[member] for member in range(len(self._sizes))]

    async def only(self) -> Answer:
        """The answer of a change of one session; raises its error."""
        (answer,) = await self.all()
        if isinstance(answer, ServerError):
            raise answer
        return answer

    def _set(self, member: int, answer: Answer | ServerError) -> None:
        assert 0 <= member < len(self._sizes)
        assert member not in self.by_member, f"member {member} is answered twice"
        self.by_member[member] = answer

    def _end_if_due(self) -> None:
        if len(self.by_member) == len(self._sizes):
            self._ended.set_result(None)


class Later(Answers):
    """Replies that call `on_answer` with each answer of a change of one session."""

    def __init__(self, on_answer: Callable[[Answer | ServerError], object]) -> None:
        super().__init__([1])
        self._on_answer = on_answer

    def _set(self, member: int, answer: Answer | ServerError) -> None:
        super()._set(member, answer)
        self._on_answer(answer)


#: So small that changes are brought over again and again.
SEGMENT_BYTES = 32 * 1024


class Stores:
    """Makes the stores of engines under test: in memory, unless a test wants another kind."""

    def __init__(self) -> None:
        self.kind = "memory"
        self.folder = Path()
        self._numbers = itertools.count()

    def make(self, clock: ManualClock) -> LocalStore | RemoteStore:
        if self.kind == "memory":
            return MemoryStore()
        if self.kind == "awaited":
            return RemoteStore(MemoryStore())
        folder = self.folder / f"store-{next(self._numbers)}"
        durability: Literal["sync", "async"] = "sync" if self.kind == "sync" else "async"
        return DiskStore(folder, durability=durability, clock=clock, segment_bytes=SEGMENT_BYTES)


STORES = Stores()


class Harness:
    """An engine under test."""

    def __init__(self, engine: Engine, clock: ManualClock, hooks: Hooks, store: Any, events: Events) -> None:
        self.engine = engine
        self.clock = clock
        self.hooks = hooks
        self.store = store
        self.events = events
        runners = [loop.runner for loop in engine._loops.values()]
        self.passes = [PassCounter(runner) for runner in runners]
        for counter, runner in zip(self.passes, runners, strict=True):
            runner.run_on_threads = counter.run_on_threads  # type: ignore[method-assign]

    async def open(self, *session_ids: str, batch_size: int = 1, model: str = "plain") -> None:
        for session_id in session_ids:
            await self.engine.open_session(model, session_id=session_id, batch_size=batch_size)

    def submit(
        self,
        session_ids: Sequence[str] | str,
        x: Any = None,
        *,
        sizes: Sequence[int] | None = None,
        **fields: Any,
    ) -> Answers:
        """Submit a frame; `x` is its only input. `sizes` are the members' rows, 1 each if not given."""
        ids = [session_ids] if isinstance(session_ids, str) else list(session_ids)
        answers = Answers([1] * len(ids) if sizes is None else list(sizes))
        if x is not None:
            fields["inputs"] = {"": np.asarray(x, np.float32)}
        for name in ("expected", "request_ids"):
            if fields.get(name) is not None:
                fields[name] = np.atleast_1d(np.array(fields[name], np.uint64))
        if fields.get("batch_sizes") is not None:
            fields["batch_sizes"] = np.array(fields["batch_sizes"], np.intp)
        self.engine.submit(Change(ids, answers, **fields))
        return answers

    def single(
        self, session_id: str, x: Any, *, expected: int | None = None, request_id: int = 0, **fields: Any
    ) -> Answers:
        """Submit a step of one session as a hand-written client sends it; refusals are answers too."""
        inputs = fields.pop("inputs", None) or {"": np.asarray(x, np.float32)}
        answers = Answers([len(next(iter(inputs.values())))])
        change = Change([session_id], answers, inputs=inputs, **fields)
        if expected is not None:
            change.expected = np.array([expected], np.uint64)
        if request_id:
            change.request_ids = np.array([request_id], np.uint64)
        self.engine.submit(change)
        return answers

    def cancel(self, answers: Answers) -> None:
        answers.is_cancelled = True

    async def step(self, session_id: str, x: Any, **fields: Any) -> Answer:
        """Step one session and wait."""
        x = np.asarray(x, np.float32)
        return await self.submit(session_id, x, sizes=[len(x)], **fields).only()

    async def state(self, session_id: str) -> dict[str, Array]:
        return dict((await self.engine.get_state(session_id)).state)

    async def in_flight(self) -> None:
        """Return when a run waits at the closed gate."""
        assert await asyncio.to_thread(self.hooks.inside.wait, WAIT_S), "no run has begun"

    async def settled(self) -> None:
        """Return when everything that was taken in is finished."""
        await asyncio.wait_for(self.engine.drain(), WAIT_S)

    def slots(self, model: str = "plain") -> Any:
        return next(m.slots for m in self.engine._models if m.name == model)

    def check_books(self) -> None:
        """Nothing is under way: then everything must add up."""
        engine, table = self.engine, self.engine._table
        live = np.array(sorted(handle for _, handle in table.items()), np.intp)
        assert not table.claimed[live].any(), "a session is claimed though nothing is under way"
        assert not engine._turns, "something waits in line"
        assert engine._held.bytes == 0
        for model in engine._models:
            own = live[table.model[live] == model.index]
            resident = own[table.row[own] >= 0]
            slots = model.slots
            assert slots.working == 0, f"{slots.working} working rows were not given back"
            assert slots.resident == int(table.batch_size[resident].sum())
            assert slots._top == slots.capacity - slots.resident
            rows = [*slots._free[: slots._top].tolist(), *table.rows_of(resident).tolist()]
            assert sorted(rows) == list(range(slots.capacity)), "a row is lost or has two owners"
            assert engine._inboxes[model.index].waiting == 0
            assert not engine._loops[model.index].busy
            assert set(model.replies.series) <= set(own.tolist()), "a reply outlives its session"
        assert all(counter.most <= 1 for counter in self.passes), "two passes of a model ran at once"
        away = {session_id for session_id, handle in table.items() if table.row[handle] < 0}
        if self.store.is_volatile:
            assert set(self.store._records) == away, "the store holds the sessions that are paged out"
        assert engine._submission.loading_rows == 0
        assert not engine._arrivals._tails, "something waits for a session to be loaded"


@asynccontextmanager
async def running(
    programs: Mapping[str, Program] | None = None,
    *,
    max_batch_rows: int = 64,
    resident_rows: int = 64,
    max_session_idle_s: float = 0,
    compute_threads: int = 2,
    threads: bool = False,
    steps: int = 4,
    executor: Callable[[Program], Executor] | None = None,
    check: bool = True,
    store: Any = None,
    clock: ManualClock | None = None,
) -> AsyncIterator[Harness]:
    """An engine whose books are checked at the end. `threads`: passes never run in place."""
    clock, hooks, events = clock or ManualClock(), Hooks(), Events()
    own = store is None
    store = STORES.make(clock) if own else store
    engine = Engine(
        programs or {"plain": PLAIN},
        store=store if isinstance(store, RemoteStore) else AwaitedStore(store),
        clock=clock,
        observer=events,
        max_batch_rows=max_batch_rows,
        resident_rows=resident_rows,
        max_session_idle_s=max_session_idle_s,
        compute_threads=compute_threads,
        executor=executor or (lambda program: FakeExecutor(program, hooks)),
    )
    for model in engine._models:
        model.cost = FixedCost(1.0 if threads else 0.0, steps)
    harness = Harness(engine, clock, hooks, store, events)
    try:
        yield harness
        hooks.open_gate()
        await harness.settled()
        if check:
            harness.check_books()
    finally:
        hooks.open_gate()
        if isinstance(store, RemoteStore):
            store.let_go()
        await harness.settled()
        await engine.close()
        if own and not isinstance(store, RemoteStore):
            store.close()
