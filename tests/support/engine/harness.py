"""An engine on a fake executor and a manual clock, and the books it must keep."""

from __future__ import annotations

import asyncio
import atexit
import dataclasses
import itertools
import threading
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any, Literal, TypeVar

import numpy as np
import numpy.typing as npt
import pytest

from stepwell_server.catalog.start import absence
from stepwell_server.clock import Clock
from stepwell_server.core.cost import Cost
from stepwell_server.core.idle import IdleLimits
from stepwell_server.core.model_names import parse_reference
from stepwell_server.core.quotas import QuotaTable
from stepwell_server.engine.api import Observer
from stepwell_server.engine.change import Change, Reply
from stepwell_server.engine.commit.store_policy import EveryChange, PagedOutOnly
from stepwell_server.engine.engine import Engine
from stepwell_server.engine.executors.base import Executor
from stepwell_server.engine.passes.batch import Pass
from stepwell_server.engine.passes.runner import Runner
from stepwell_server.engine.quotas import Quotas
from stepwell_server.engine.state.resident import ResidentRows
from stepwell_server.engine.types import Members
from stepwell_server.errors import ServerError
from stepwell_server.process.readiness import Readiness
from stepwell_server.program import Program
from stepwell_server.store.base import LocalStore, Store
from stepwell_server.store.disk.store import DiskStore
from stepwell_server.store.in_process import InProcessStore
from stepwell_server.store.memory import MemoryStore
from stepwell_server.store.valkey.store import ValkeyStore
from support.clock import ManualClock
from support.engine.fake_executor import PLAIN, WAIT_S, Hooks, load_fake
from support.engine.internals import Internals
from support.servers.valkey_servers import Valkey
from support.stores.fake_shared_store import RemoteStore
from support.stores.gated_valkey import gated_valkey
from support.stores.gates import Gated

Array = npt.NDArray[Any]
E = TypeVar("E", bound=BaseException)

#: Passes run where the loop is, or on threads.
BOTH_WAYS = pytest.mark.parametrize("threads", [False, True], ids=["in place", "on threads"])


def x(*shape: int, seed: int = 0) -> Array:
    """Random inputs of the plain program, with this number of rows and, if given, of time steps."""
    return np.random.default_rng(seed).standard_normal((*shape, 2)).astype(np.float32)


async def fails(call: Awaitable[object], kind: type[E], match: str | None = None) -> E:
    """The error that a call must end with. `match`: a pattern that its text must contain."""
    with pytest.raises(kind, match=match) as caught:
        await call
    return caught.value


class FixedCost(Cost):
    """Estimates `seconds` for every pass and `steps` time steps for a slice."""

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
    """Keeps its reports."""

    def __init__(self) -> None:
        self.sessions: list[tuple[str, str]] = []
        self.passes: list[tuple[int, int]] = []
        """Rows and time steps of each pass."""
        self.changes: list[tuple[str, int, int]] = []

    def session_event(self, event: str, model: str, session_id: str) -> None:
        self.sessions.append((event, session_id))

    def pass_done(self, model: str, rows: int, time_steps: int, seconds: float) -> None:
        self.passes.append((rows, time_steps))

    def stepped(self, model: str, session_id: str, rows: int, seconds: float, now: float) -> None:
        self.pass_done(model, rows, 1, seconds)
        self.applied(model, "step", rows, rows)

    def applied(self, model: str, change: str, count: int, row_steps: int) -> None:
        self.changes.append((change, count, row_steps))


@dataclasses.dataclass(frozen=True)
class Answer:
    """What one member of a frame got."""

    revision: int
    position: int
    outputs: Mapping[str, Array]
    replayed: bool
    states: Mapping[str, Array] = dataclasses.field(default_factory=dict)
    version: int = 1


def kinds(answers: Sequence[Answer | ServerError]) -> list[str]:
    """What each is an instance of."""
    return [type(answer).__name__ for answer in answers]


class Answers:
    """The replies to a change: what each member got."""

    def __init__(self, sizes: Sequence[int]) -> None:
        self._sizes = self.state_sizes = sizes
        """Rows of each member, and those whose states come back if any do."""
        self.by_member: dict[int, Answer | ServerError] = {}
        self._ended: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self.is_cancelled = False

    def applied(self, members: Members, reply: Reply) -> None:
        outputs, states = reply.outputs, reply.states
        row = state_row = 0
        for place, member in enumerate(members.tolist()):
            end, state_end = row + self._sizes[member], state_row + self.state_sizes[member]
            # copied at once: they may be views that the next pass does not outlive
            own = {name: array[row:end].copy() for name, array in outputs.items()}
            after = {name: array[state_row:state_end].copy() for name, array in states.items()}
            revision, position = int(reply.revisions[place]), int(reply.positions[place])
            self._set(member, Answer(revision, position, own, reply.replayed, after, reply.version))
            row, state_row = end, state_end
        assert all(len(array) == row for array in outputs.values())
        assert all(len(array) == state_row for array in states.values())
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

    def on_end(self, listener: Callable[[], object]) -> None:
        """Call `listener` when every member has its answer."""
        self._ended.add_done_callback(lambda _done: listener())

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

    async def require_all_applied(self) -> None:
        """Raise the first member's error, if there is one."""
        for answer in await self.all():
            if isinstance(answer, ServerError):
                raise answer

    def _set(self, member: int, answer: Answer | ServerError) -> None:
        assert 0 <= member < len(self._sizes)
        assert member not in self.by_member, f"member {member} is answered twice"
        self.by_member[member] = answer

    def _end_if_due(self) -> None:
        if len(self.by_member) == len(self._sizes):
            self._ended.set_result(None)


class CallbackAnswers(Answers):
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
        self.valkey: Valkey | None = None
        """Started when it is first needed; all tests of a process share it, each with a prefix of its own."""
        self._numbers = itertools.count()

    def server(self) -> Valkey:
        """The Valkey of this process."""
        if self.valkey is None:
            self.valkey = Valkey(append="")
            self.valkey.start()
            atexit.register(self.valkey.end)
        return self.valkey

    async def make_shared(self, clock: Clock | None = None) -> Gated:
        """A store of the kind that several servers can use; `clock` is its own, None: that of the first server."""
        if self.kind == "valkey":
            return await gated_valkey(self.server(), clock)
        assert self.kind == "fake_shared", f"one server alone uses a store of the kind {self.kind}"
        return RemoteStore(MemoryStore(), clock)

    async def make(self, clock: ManualClock) -> LocalStore | Store:
        if self.kind in {"fake_shared", "valkey"}:
            return await self.make_shared()
        if self.kind == "memory":
            return MemoryStore()
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
        self.readiness = Readiness()
        self.internals = Internals(engine)
        self.quotas: Quotas | None = None
        runners = self.internals.runners()
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
        if fields.get("state_members") is not None:
            sizes_of = enumerate(sizes or [1] * len(ids))
            answers.state_sizes = [size if i in fields["state_members"] else 0 for i, size in sizes_of]
        if fields.get("state_rows") is not None:
            answers.state_sizes = [len(fields["state_rows"])]
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
        if fields.get("state_rows") is not None:
            answers.state_sizes = [len(fields["state_rows"])]
        change = Change([session_id], answers, inputs=inputs, **fields)
        if expected is not None:
            change.expected = np.array([expected], np.uint64)
        if request_id:
            change.request_ids = np.array([request_id], np.uint64)
        self.engine.submit(change)
        return answers

    async def begin_pass(self, session_ids: Sequence[str] | str, x: Any = None, **fields: Any) -> Answers:
        """Submit a pass that is in flight when this returns, until the gate opens. The fields are those of `submit`."""
        self.hooks.close_gate()
        answers = self.submit(session_ids, x, **fields)
        await self.in_flight()
        return answers

    def cancel(self, answers: Answers) -> None:
        answers.is_cancelled = True

    async def step(self, session_id: str, x: Any, **fields: Any) -> Answer:
        """Step one session and wait."""
        x = np.asarray(x, np.float32)
        return await self.submit(session_id, x, sizes=[len(x)], **fields).only()

    async def open_and_step(self, session_id: str, x: Any, **fields: Any) -> Answer:
        """Open a session, step it and wait."""
        await self.open(session_id)
        return await self.step(session_id, x, **fields)

    async def state(self, session_id: str) -> dict[str, Array]:
        return dict((await self.engine.get_state(session_id)).state)

    async def exported(self, session_id: str) -> bytes:
        """The record of a session that can be exported."""
        (record,) = await self.engine.export_sessions([session_id], deadline=float("inf"))
        assert not isinstance(record, ServerError), record
        return bytes(record)

    async def sessions(self) -> list[int]:
        """How many sessions each model has; a shared store is asked, as a timer does every second."""
        await self.internals.recount()
        found = [stats.sessions for stats in self.engine.stats()]
        assert found == [model.sessions for model in self.engine.models()]
        return found

    async def in_flight(self) -> None:
        """Return when a run waits at the closed gate."""
        assert await asyncio.to_thread(self.hooks.inside.wait, WAIT_S), "no run has begun"

    async def expired_after(self, seconds: float) -> int:
        """How many sessions the timer ends when so much time has passed."""
        self.clock.advance(seconds)
        return await self.internals.expire_idle()

    async def expire(self, after_s: float = 0.0) -> None:
        """End all sessions that are due then, as the timer does; return when the store knows."""
        await self.expired_after(after_s)
        await self.settled()

    def run_in_place(self) -> None:
        """From now on a pass is cheap enough to run in place."""
        for model in self.internals.models:
            model.cost = FixedCost(0.0, 4)

    async def settled(self) -> None:
        """Return when everything that was taken in is finished."""
        await asyncio.wait_for(self.engine.drain(), WAIT_S)

    def slots(self, model: str = "plain") -> Any:
        return self.internals.model(model).slots

    def check_books(self) -> None:
        """Nothing is under way: then everything must add up."""
        self.internals.check_books(self.store)
        assert all(counter.most <= 1 for counter in self.passes), "two passes of a model ran at once"


@asynccontextmanager
async def running(
    programs: Mapping[str, Program] | None = None,
    *,
    max_batch_rows: int = 64,
    resident_rows: int | ResidentRows = 64,
    max_session_idle_s: float = 0,
    unnamed_session_idle_s: float = 0,
    compute_threads: int = 2,
    threads: bool = False,
    steps: int = 4,
    executor: Callable[[Program], Executor] | None = None,
    check: bool = True,
    store: Any = None,
    clock: ManualClock | None = None,
    observer: Observer | None = None,
    quotas: QuotaTable | None = None,
    migrations: Mapping[str, Any] | None = None,
) -> AsyncIterator[Harness]:
    """An engine whose books are checked at the end. `threads`: passes never run in place.

    `observer`: who is told of everything, in place of the harness's `events`.
    """
    clock, hooks, events, readiness = clock or ManualClock(), Hooks(), Events(), Readiness()
    own = store is None
    if own:
        store = await STORES.make(clock)
    is_shared = isinstance(store, Gated | ValkeyStore)
    if isinstance(store, Gated):
        store.serve(clock)
    engine = Engine(
        store=store if is_shared else InProcessStore(store, clock),
        clock=clock,
        observer=observer or events,
        max_batch_rows=max_batch_rows,
        resident_rows=resident_rows
        if isinstance(resident_rows, ResidentRows)
        else ResidentRows(resident_rows),
        idle_limits=IdleLimits(max_session_idle_s, unnamed_session_idle_s),
        compute_threads=compute_threads,
        executor=executor or (lambda program: load_fake(program, hooks)),
        quotas=(counted := None if quotas is None else Quotas(quotas, clock)),
        migrations=migrations,
        policy=PagedOutOnly if isinstance(store, MemoryStore) and store.for_one_thread else EveryChange,
        absent=absence(readiness, shows_reason=True),
    )
    for ref, program in sorted((programs or {"plain": PLAIN}).items()):
        named = parse_reference(ref)
        engine.begin_with(named.name, named.version or 1, program)
    if counted is not None:
        await counted.count(store if is_shared else InProcessStore(store, clock))
    harness = Harness(engine, clock, hooks, store, events)
    harness.quotas, harness.readiness = counted, readiness
    for model in harness.internals.models:
        model.cost = FixedCost(1.0 if threads else 0.0, steps)
    try:
        yield harness
        hooks.open_gate()
        await harness.settled()
        if check:
            harness.check_books()
    finally:
        hooks.open_gate()
        if isinstance(store, Gated):
            store.release()
        await harness.settled()
        await engine.close()
        if own and isinstance(store, Gated):
            await store.close()
        elif own:
            store.close()
