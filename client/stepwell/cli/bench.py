"""`stepwell bench`: load a server through the SDK, from processes with an event loop each, and measure the result."""

from __future__ import annotations

import asyncio
import collections
import contextlib
import dataclasses
import itertools
import math
import multiprocessing
import os
import secrets
import signal
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from multiprocessing.connection import Connection, wait
from typing import TYPE_CHECKING, Any, Literal, cast

import click

from stepwell.cli.toolkit import complete, render
from stepwell.cli.toolkit.errors import INTERRUPTED, SERVER_ERROR, Failure
from stepwell.cli.toolkit.help import Command
from stepwell.cli.toolkit.target import Target, json_option, server_options
from stepwell.cli.toolkit.types import Duration

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

    from stepwell import StepwellError, TensorInfo
    from stepwell.aio import AsyncClient, AsyncSession, AsyncSessionGroup
    from stepwell.cli.toolkit.listener import Listener

    Inputs = Mapping[str, npt.NDArray[Any]]
    Unit = tuple[AsyncSession | AsyncSessionGroup, int]  # what one call steps, and how many sessions that is

Mode = Literal["unary", "frames", "group"]
MODES: tuple[Mode, ...] = ("unary", "frames", "group")
MAX_SESSIONS = 1_000_000
MAX_CONCURRENCY = 65_536
DEFAULT_CONCURRENCY = DEFAULT_GROUP_SIZE = 1024
MAX_PROCESSES = 64
MAX_SECONDS = 3600.0
QUANTILES = {"p50": 0.5, "p90": 0.9, "p99": 0.99, "p99.9": 0.999}
BUSY_CLIENT = 0.9
"""Busy share of an event loop above which the client, not the server, is the bottleneck."""
OPEN_S = 600.0
"""Time limit for opening the sessions."""
CLOSE_S = 60.0
"""Time limit for a process to finish its calls and close its sessions."""
FINISH_S = 5.0
"""Time limit for calls that are in flight at the end."""
IDLE_S = 3600.0
"""How long sessions remain, beyond the length of the run, if every process of the run was killed."""
MIN_PAUSE_S, MAX_PAUSE_S = 0.05, 1.0
"""How long a lane waits after a call that failed; in between, the server chooses."""
STOP_SIGNALS = [getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name)]
"""Signals that end the run early: it reports and closes its sessions. Windows has no SIGHUP."""
SESSIONS_OF_CALL = 1024
"""Sessions that one call opens or closes."""
MAX_MESSAGE_BYTES = 2**31 - 1
"""No limit of the client's own: the server's limit applies."""
MAX_POOL, MAX_POOL_BYTES, MAX_INPUT_BYTES = 16, 64 << 20, 1 << 30
"""Bounds of the inputs of each size: how many different ones, their bytes, and the bytes of a single call."""


@dataclasses.dataclass(frozen=True)
class Plan:
    """The work of one process of the load generator, or of all before it is divided."""

    target: Target
    model: str
    mode: Mode
    sessions: int
    concurrency: int
    """Concurrent calls."""
    group_size: int
    """Sessions that one call steps; 1 without groups."""
    steps_per_call: int
    batch_size: int
    prefix: str
    """Prefix of this run's session ids, different in every run."""
    first_session: int = 0
    max_idle_s: float = IDLE_S
    """Idle limit of the sessions."""

    def ids(self) -> list[str]:
        """The ids of its sessions."""
        return [f"{self.prefix}{self.first_session + number}" for number in range(self.sessions)]

    @property
    def units(self) -> int:
        """Number of sessions or groups, each of which makes one call at a time."""
        return -(-self.sessions // self.group_size)

    def shares(self, processes: int) -> list[Plan]:
        """Divides the plan among processes as evenly as whole sessions, or groups of them, allow."""
        processes = min(processes, self.units, self.concurrency)
        shares, first = [], 0
        for units, lanes in zip(
            parts(self.units, processes), parts(self.concurrency, processes), strict=True
        ):
            sessions = min(units * self.group_size, self.sessions - first)
            shares.append(
                dataclasses.replace(self, first_session=first, sessions=sessions, concurrency=lanes)
            )
            first += sessions
        return shares


def parts(total: int, count: int) -> list[int]:
    """Divides a number into `count` whole numbers that differ by at most one."""
    each, more = divmod(total, count)
    return [each + 1] * more + [each] * (count - more)


class Latencies:
    """Latencies in bounded memory: counts in buckets that grow by one per cent, from a microsecond to an hour."""

    def __init__(self) -> None:
        import numpy as np

        self._bounds = np.geomspace(1e-6, 3600, 2212)
        self._counts = np.zeros(len(self._bounds) - 1, np.int64)
        self._recent: list[float] = []
        self.sum_s = self.max_s = 0.0

    def add(self, seconds: float) -> None:
        """Counts one latency."""
        self._recent.append(seconds)
        if len(self._recent) == 4096:
            self._count()

    def _count(self) -> None:
        import numpy as np

        recent, self._recent = np.array(self._recent), []
        self.sum_s += float(recent.sum())
        self.max_s = float(recent.max(initial=self.max_s))
        self._counts += np.histogram(recent.clip(self._bounds[0], self._bounds[-1]), self._bounds)[0]

    def merge(self, other: Latencies) -> None:
        """Adds all counts of another one."""
        self._count()
        other._count()
        self._counts += other._counts
        self.sum_s += other.sum_s
        self.max_s = max(self.max_s, other.max_s)

    @property
    def count(self) -> int:
        """Number of latencies."""
        return int(self._counts.sum()) + len(self._recent)

    def quantile_s(self, q: float) -> float:
        """The latency that the share `q` of all calls did not exceed, to half a per cent. There must be at least one."""
        self._count()
        bucket = int(self._counts.cumsum().searchsorted(max(1, math.ceil(q * self.count))))
        return min(float((self._bounds[bucket] * self._bounds[bucket + 1]) ** 0.5), self.max_s)

    def in_ms(self) -> dict[str, float | None]:
        """Mean, quantiles and maximum in milliseconds; None if there is no latency."""
        if not self.count:
            return dict.fromkeys(("mean", *QUANTILES, "max"))
        quantiles = {name: self.quantile_s(q) for name, q in QUANTILES.items()}
        values = {"mean": self.sum_s / self.count, **quantiles, "max": self.max_s}
        return {name: round(value * 1e3, 4) for name, value in values.items()}


class Counts:
    """The measurements of one process, which it sends to the parent."""

    def __init__(self) -> None:
        self.began_s, self.began_cpu_s = time.perf_counter(), time.thread_time()
        self.seconds = self.busy = 0.0
        self.latencies = Latencies()
        self.session_steps = 0
        self.errors: collections.Counter[str] = collections.Counter()
        self.first_error = ""
        self.unanswered: list[float] = []
        """How long each call without an answer at the end had waited, in seconds."""

    @property
    def calls(self) -> int:
        """Number of answered calls."""
        return self.latencies.count - len(self.unanswered)

    def end(self) -> None:
        """Ends the measurement. Call it in the thread that began it."""
        self.seconds = time.perf_counter() - self.began_s
        self.busy = (time.thread_time() - self.began_cpu_s) / self.seconds


class Worker:
    """Opens the sessions of a share, steps them, and closes them. Belongs to one event loop."""

    def __init__(self, plan: Plan, client: AsyncClient) -> None:
        self._plan = plan
        self._client = client
        self._opened: list[str] = []
        self._lanes: list[asyncio.Task[None]] = []
        self._pools: dict[int, list[Inputs]] = {}
        self._unanswered: list[float] = []
        self.is_stopping = False
        self.counts = Counts()

    async def open(self) -> list[list[Unit]]:
        """Opens the sessions. Returns the sessions or groups that each lane steps in turn."""
        plan, ids = self._plan, self._plan.ids()
        specs = (await self._client.model(plan.model)).inputs
        units: list[Unit] = []
        size = plan.group_size if plan.mode == "group" else SESSIONS_OF_CALL
        for start in range(0, plan.sessions, size):
            some = ids[start : start + size]
            group = await self._client.open_sessions(
                plan.model,
                len(some),
                batch_size=plan.batch_size,
                session_ids=some,
                max_idle_s=plan.max_idle_s,
            )
            self._opened += some
            units += [(group, len(group))] if plan.mode == "group" else [(session, 1) for session in group]
        for count in {count for _, count in units}:
            rows = count * plan.batch_size
            self._pools[count] = random_inputs(specs, rows, plan.steps_per_call, plan.first_session)
        return [units[lane :: plan.concurrency] for lane in range(plan.concurrency)]

    def start(self, lanes: Sequence[Sequence[Unit]]) -> None:
        """Starts stepping."""
        self.measure()
        self._lanes = [asyncio.create_task(self._run(units)) for units in lanes]

    async def _run(self, units: Sequence[Unit]) -> None:
        from stepwell import OverloadedError, StepwellError

        inputs = {count: itertools.cycle(pool) for count, pool in self._pools.items()}
        for unit, count in itertools.cycle(units):
            began = time.perf_counter()
            try:
                await unit.step(next(inputs[count]))
            except asyncio.CancelledError:
                self._unanswered.append(time.perf_counter() - began)
                raise
            except StepwellError as error:
                self._failed(error, time.perf_counter() - began)
                wanted = error.retry_after_s if isinstance(error, OverloadedError) else 0.0
                await asyncio.sleep(min(MAX_PAUSE_S, max(MIN_PAUSE_S, wanted)))
            else:
                counts = self.counts
                if began >= counts.began_s and not self.is_stopping:  # all of the call is in the measurement
                    counts.latencies.add(time.perf_counter() - began)
                    counts.session_steps += count
            if self.is_stopping:
                return

    def _failed(self, error: StepwellError, waited_s: float) -> None:
        from stepwell import DeadlineExceededError, UnavailableError

        causes = error.failures.values() or (error,)  # of a group, each member that failed counts
        if not self.is_stopping:
            self.counts.errors.update(type(one).__name__ for one in causes)
            self.counts.first_error = self.counts.first_error or str(error)
        elif any(isinstance(one, UnavailableError | DeadlineExceededError) for one in causes):
            self._unanswered.append(waited_s)

    def measure(self) -> None:
        """Starts counting."""
        first_error = self.counts.first_error
        self.counts = Counts()
        self.counts.first_error = first_error

    def stop(self) -> None:
        """Stops stepping and counting."""
        if not self.is_stopping:
            self.is_stopping = True
            self.counts.end()

    async def finish(self) -> None:
        """Waits for active calls; counts those without an answer that have waited longer than any other."""
        self.stop()
        if any(not lane.done() for lane in self._lanes):
            _, late = await asyncio.wait(self._lanes, timeout=FINISH_S)
            for lane in late:
                lane.cancel()
            if late:
                await asyncio.wait(late, timeout=FINISH_S)
            longest_s = self.counts.latencies.quantile_s(1.0) if self.counts.latencies.count else 0.0
            self.counts.unanswered = [waited for waited in self._unanswered if waited > longest_s]
            for waited in self.counts.unanswered:
                self.counts.latencies.add(waited)

    async def close(self) -> None:
        """Finishes active calls and closes the sessions."""
        from stepwell import StepwellError

        await self.finish()
        try:
            await self._client.close_sessions(self._opened, timeout_s=FINISH_S)
        except StepwellError as error:
            click.echo(f"stepwell: note: sessions {self._plan.prefix}... may be left: {error}", err=True)
        for lane in self._lanes:
            if lane.done() and not lane.cancelled():
                lane.result()  # a defect must be seen


def random_inputs(specs: Sequence[TensorInfo], rows: int, steps: int, seed: int) -> list[Inputs]:
    """Inputs of some calls: normal numbers, or integers 0 and 1, which are indexes into any vocabulary.

    Args:
        specs: The model's inputs.
        rows: Rows per call, over all its sessions.
        steps: Time steps per call; a single one has no time axis.
        seed: Seed of the random numbers.

    Raises:
        InvalidInputError: The inputs of one call exceed a gibibyte.
    """
    import numpy as np

    from stepwell import InvalidInputError

    kinds: dict[str, tuple[tuple[int, ...], np.dtype[Any]]] = {}
    for spec in specs:
        time_axis = (steps,) if spec.temporal and steps > 1 else ()
        # numpy has no bfloat16; the server takes any float
        dtype = np.dtype("float32" if spec.dtype == "bfloat16" else spec.dtype)
        kinds[spec.name] = (rows, *time_axis, *spec.shape), dtype
    size = sum(math.prod(shape) * dtype.itemsize for shape, dtype in kinds.values())
    if size > MAX_INPUT_BYTES:
        raise InvalidInputError(
            f"the inputs of a call must be {MAX_INPUT_BYTES} bytes at most; batch size, group size and steps per "
            f"call make them {size}"
        )
    rng = np.random.default_rng(seed)

    def draw(shape: tuple[int, ...], dtype: np.dtype[Any]) -> npt.NDArray[Any]:
        is_float = dtype.kind == "f"
        return np.asarray(
            rng.standard_normal(shape, np.float32) if is_float else rng.integers(0, 2, shape), dtype
        )

    count = max(1, min(MAX_POOL, MAX_POOL_BYTES // max(size, 1)))
    return [{name: draw(*kind) for name, kind in kinds.items()} for _ in range(count)]


def work(plan: Plan, parent: Connection) -> None:
    """Runs one process of the load generator.

    It sends "ready" when the sessions are open, follows "start", "measure" and "stop", and sends its `Counts`, or a
    `Failure`. It also closes the sessions if the connection ends because the parent has died.
    """
    os.environ.setdefault("GRPC_VERBOSITY", "NONE")
    with contextlib.suppress(BrokenPipeError, asyncio.CancelledError):
        asyncio.run(_work(plan, parent))


async def _work(plan: Plan, parent: Connection) -> None:
    from stepwell import StepwellError
    from stepwell.aio import AsyncClient

    words: asyncio.Queue[str] = asyncio.Queue()
    loop, this = asyncio.get_running_loop(), asyncio.current_task()
    assert this is not None
    config = plan.target.config(max_message_bytes=MAX_MESSAGE_BYTES)
    async with AsyncClient(config, coalesce=plan.mode != "unary") as client:
        worker = Worker(plan, client)

        def end() -> None:
            if not worker.is_stopping:  # the parent has ended
                this.cancel()

        def listen() -> None:
            with contextlib.suppress(RuntimeError):  # the loop has ended
                try:
                    while True:
                        loop.call_soon_threadsafe(words.put_nowait, parent.recv())
                except (EOFError, OSError):
                    loop.call_soon_threadsafe(end)

        threading.Thread(target=listen, daemon=True).start()
        try:
            lanes = await worker.open()
            parent.send("ready")
            while (word := await words.get()) != "stop":
                if word == "start":
                    worker.start(lanes)
                else:
                    worker.measure()
            await worker.finish()
            parent.send(worker.counts)
        except StepwellError as error:
            parent.send(Failure(str(error), SERVER_ERROR))
        finally:
            await worker.close()


@contextlib.contextmanager
def stop_signals() -> Iterator[None]:
    """Let SIGTERM and SIGHUP end the block as Ctrl-C does. One that is ignored stays so, as `nohup` wants it."""
    ours = [one for one in STOP_SIGNALS if signal.getsignal(one) == signal.SIG_DFL]

    def stop(*_: object) -> None:
        for one in ours:
            signal.signal(one, signal.SIG_IGN)  # `timeout` sends it twice
        raise KeyboardInterrupt

    try:
        for one in ours:
            signal.signal(one, stop)
        yield
    finally:
        for one in ours:
            signal.signal(one, signal.SIG_DFL)


@contextlib.contextmanager
def processes_of(shares: Sequence[Plan]) -> Iterator[list[Connection]]:
    """Processes, one for each share, as connections to them. At the end of the block they close their sessions."""
    context = multiprocessing.get_context("spawn")
    connections: list[Connection] = []
    processes = []
    try:
        handlers = {one: signal.signal(one, signal.SIG_IGN) for one in STOP_SIGNALS}  # they inherit it
        try:
            for share in shares:
                ours, theirs = context.Pipe()
                connections.append(ours)
                process = context.Process(target=work, args=(share, theirs))
                process.start()
                processes.append(process)
                theirs.close()
        finally:
            for one, handler in handlers.items():
                signal.signal(one, handler)
        yield connections
    finally:
        for connection in connections:
            connection.close()
        until = time.monotonic() + CLOSE_S
        for process in processes:
            process.join(max(0.0, until - time.monotonic()))
            if process.is_alive():
                process.kill()


def receive(connections: Sequence[Connection], timeout_s: float) -> list[Any]:
    """Receives one message from each process.

    Raises:
        Failure: A process has failed, or the time is over.
    """
    waiting, until, found = list(connections), time.monotonic() + timeout_s, []
    while waiting:
        ready = wait(waiting, max(0.0, until - time.monotonic()))
        if not ready:
            raise Failure(
                f"a process of the load generator did not answer within {timeout_s:g} s", SERVER_ERROR
            )
        for connection in cast("list[Connection]", ready):
            try:
                message = connection.recv()
            except (EOFError, OSError):
                raise Failure("a process of the load generator ended by itself", SERVER_ERROR) from None
            if isinstance(message, Failure):
                raise message
            found.append(message)
            waiting.remove(connection)
    return found


def send(connections: Sequence[Connection], word: str) -> None:
    """Sends a word to each process. A process that has ended is noticed when it should answer."""
    for connection in connections:
        with contextlib.suppress(OSError):
            connection.send(word)


def pause(connections: Sequence[Connection], seconds: float) -> None:
    """Waits, unless a process fails meanwhile.

    Raises:
        Failure: A process has failed.
    """
    if failed := wait(connections, seconds):
        receive(cast("list[Connection]", failed), 0.0)


@dataclasses.dataclass(frozen=True)
class Measured:
    """The measurements of all processes of a run."""

    plan: Plan
    counts: Sequence[Counts]
    seconds: float
    server_cpu_s: float | None
    """Processor time of the server during the run; None if it cannot be read."""
    listener: Listener
    is_interrupted: bool

    def document(self) -> dict[str, Any]:
        """The result as JSON."""
        plan, counts, cpu_s = self.plan, self.counts, self.server_cpu_s
        latencies, errors, unanswered = Latencies(), collections.Counter[str](), list[float]()
        for one in counts:
            latencies.merge(one.latencies)
            errors += one.errors
            unanswered += one.unanswered
        steps = sum(one.session_steps for one in counts) * plan.steps_per_call
        steps_per_s = sum(one.session_steps / one.seconds for one in counts) * plan.steps_per_call
        busy = max(one.busy for one in counts)
        return {
            "server": plan.target.address,
            "model": plan.model,
            "mode": plan.mode,
            "sessions": plan.sessions,
            "concurrency": plan.concurrency,
            "group_size": plan.group_size if plan.mode == "group" else None,
            "steps_per_call": plan.steps_per_call,
            "batch_size": plan.batch_size,
            "processes": len(counts),
            "seconds": round(self.seconds, 4),
            "interrupted": self.is_interrupted,
            "calls": sum(one.calls for one in counts),
            "steps": steps,
            "calls_per_s": round(sum(one.calls / one.seconds for one in counts), 2),
            "steps_per_s": round(steps_per_s, 2),
            "row_steps_per_s": round(steps_per_s * plan.batch_size, 2),
            "latency_ms": latencies.in_ms(),
            "client_busy": round(busy, 3),
            "client_is_limit": busy >= BUSY_CLIENT,
            "server_pid": self.listener.pid,
            "server_cpu_s": None if cpu_s is None else round(cpu_s, 3),
            "server_cpu_ms_per_1000_steps": None
            if cpu_s is None or not steps
            else round(cpu_s / steps * 1e6, 4),
            "server_cpu_note": self.listener.reason,
            "unanswered": len(unanswered),
            "longest_wait_s": round(max(unanswered), 3) if unanswered else None,
            "errors": dict(errors.most_common()),
            "first_error": next((one.first_error for one in counts if one.first_error), ""),
        }


def measure(plan: Plan, processes: int, warm_up_s: float, duration_s: float) -> Measured:
    """Opens sessions, steps for a while, counts for a while, closes the sessions. A stop signal ends the counting early.

    Raises:
        Failure: A process failed.
    """
    from stepwell.cli.toolkit.listener import find_listener

    listener = find_listener(plan.target.address)
    with stop_signals(), processes_of(plan.shares(processes)) as connections:
        with render.working(f"Opening {plan.sessions:,} sessions at {plan.target.address}"):
            receive(connections, OPEN_S)
        cpu_before, began, is_interrupted = None, time.monotonic(), False
        with render.working(f"Stepping for {warm_up_s + duration_s:g} s"):
            try:
                send(connections, "start")
                pause(connections, warm_up_s)
                send(connections, "measure")
                cpu_before, began = listener.cpu_s(), time.monotonic()
                pause(connections, duration_s)
            except KeyboardInterrupt:
                is_interrupted = True
            cpu_after, seconds = listener.cpu_s(), time.monotonic() - began
            send(connections, "stop")
            counts = receive(connections, CLOSE_S)
    cpu_s = None if cpu_before is None or cpu_after is None else cpu_after - cpu_before
    return Measured(plan, counts, seconds, cpu_s, listener, is_interrupted)


def facts(found: Mapping[str, Any]) -> list[tuple[str, str]]:
    """The result for people, from the JSON document."""
    rate, batch_size, cpu_s = found["steps_per_s"], found["batch_size"], found["server_cpu_s"]
    if cpu_s is None:
        server = f"not available: {found['server_cpu_note'] or 'its process has ended'}"
    else:
        each = found["server_cpu_ms_per_1000_steps"]
        server = f"{cpu_s / found['seconds']:.2f} cores" + (
            f", {each:,.2f} ms for 1,000 steps" if each else ""
        )
    client = f"{found['client_busy']:.0%} of the time of the busiest event loop"
    if found["client_is_limit"]:
        client += "; the client is the bottleneck: use more --processes, or more machines"
    errors = ", ".join(f"{kind} {count:,}" for kind, count in found["errors"].items())
    unanswered = [("unanswered", unanswered_text(found))] if found["unanswered"] else []
    return [
        ("load", load_text(found)),
        ("measured", f"{found['seconds']:.1f} s, {found['calls']:,} calls, {found['steps']:,} steps"),
        ("steps/s", f"{rate:,.0f}" + (f" ({rate * batch_size:,.0f} rows/s)" if batch_size > 1 else "")),
        ("calls/s", f"{found['calls_per_s']:,.0f}"),
        *((f"{name} ms", "" if ms is None else f"{ms:,.3f}") for name, ms in found["latency_ms"].items()),
        ("client CPU", client),
        ("server CPU", server),
        *unanswered,
        ("errors", f"{errors}; the first: {found['first_error']}" if errors else "none"),
    ]


def unanswered_text(found: Mapping[str, Any]) -> str:
    """The number of calls without an answer at the end."""
    return f"{found['unanswered']:,}, the longest for {found['longest_wait_s']:.1f} s"


def load_text(found: Mapping[str, Any]) -> str:
    """A description of the load."""
    sessions, concurrency, size = found["sessions"], found["concurrency"], found["group_size"]
    if size is not None:
        what = f"{concurrency:,} of {-(-sessions // size):,} groups of {size:,} at once"
    else:
        what = f"{'all' if concurrency == sessions else f'{concurrency:,}'} at once"
    batch_size, steps, processes = found["batch_size"], found["steps_per_call"], found["processes"]
    sizes = f", batch size {batch_size}" if batch_size > 1 else ""
    times = f", {steps} time steps a call" if steps > 1 else ""
    by = f"{processes} process{'es' if processes > 1 else ''}"
    return f"{found['mode']}: {sessions:,} sessions, {what}{sizes}{times}, by {by}"


@click.command(
    cls=Command,
    short_help="Load a server and measure steps/s and latencies.",
    examples=(
        "stepwell bench forecast",
        "stepwell bench forecast --mode unary --sessions 256 --duration-s 10",
        "stepwell bench forecast --mode group --sessions 100000 --processes 2 --json",
        "stepwell bench forecast --mode unary --sessions 4 --steps-per-call 1000",
        "stepwell bench forecast --server a:50051,b:50051,c:50051",
    ),
    values=(
        ("unary", "one call per step"),
        ("frames", "a stream: steps awaited at the same time share messages"),
        ("group", "session groups: one message per group, on a stream"),
    ),
    json_keys=(
        ("server, model, mode", "what was measured"),
        ("sessions, concurrency", "open sessions; concurrent calls"),
        ("group_size", "sessions per group; null in other modes"),
        ("steps_per_call, batch_size", "time steps per call, rows per session"),
        ("processes", "processes that generated the load"),
        (
            "seconds, interrupted",
            "length of the measurement; whether Ctrl-C, SIGTERM or SIGHUP ended it early",
        ),
        ("calls, steps", "answered calls; time steps of sessions in them"),
        ("calls_per_s, steps_per_s", "the same per second"),
        ("row_steps_per_s", "steps per second times the batch size"),
        (
            "latency_ms",
            "per call: mean, p50, p90, p99, p99.9, max, including the waits of unanswered calls; null without calls",
        ),
        (
            "client_busy, client_is_limit",
            "busy share of the client's busiest event loop; whether the client is the bottleneck (0.9 or more)",
        ),
        (
            "server_pid, server_cpu_s",
            "the server's process id (null for replicas) and processor time (the sum for replicas)",
        ),
        ("server_cpu_ms_per_1000_steps", "processor time in ms per 1,000 steps; null if not known"),
        ("server_cpu_note", "why the processor time is not known; else empty"),
        (
            "unanswered, longest_wait_s",
            "calls without an answer at the end that waited longer than any other; the longest wait, or null",
        ),
        ("errors, first_error", "number of errors by class; the text of the first"),
    ),
)
@click.argument("model", shell_complete=complete.models)
@click.option(
    "--mode",
    type=click.Choice(MODES),
    default="frames",
    show_default=True,
    help="How steps are sent; see Values.",
)
@click.option(
    "--sessions",
    metavar="N",
    type=click.IntRange(1, MAX_SESSIONS),
    default=64,
    show_default=True,
    help="Sessions to open.",
)
@click.option(
    "--concurrency",
    metavar="N",
    type=click.IntRange(1, MAX_CONCURRENCY),
    help="Concurrent calls. If there are more sessions, or groups, they take turns. Default: one per session, "
    "at most 1,024; with groups, one per process.",
)
@click.option(
    "--group-size",
    metavar="N",
    type=click.IntRange(1, MAX_CONCURRENCY),
    help=f"With --mode group: sessions per group. Default: {DEFAULT_GROUP_SIZE:,}, or fewer so that each process "
    "has a group.",
)
@click.option(
    "--steps-per-call",
    metavar="T",
    type=click.IntRange(1, 1_000_000),
    default=1,
    show_default=True,
    help="Time steps per call.",
)
@click.option(
    "--batch-size",
    metavar="B",
    type=click.IntRange(min=1),
    default=1,
    show_default=True,
    help="Rows per session.",
)
@click.option(
    "--duration-s",
    metavar="TIME",
    type=Duration(0.1, MAX_SECONDS),
    default=10.0,
    show_default=True,
    help="How long to measure.",
)
@click.option(
    "--warm-up-s",
    metavar="TIME",
    type=Duration(0.0, MAX_SECONDS),
    default=2.0,
    show_default=True,
    help="How long to step before measuring.",
)
@click.option(
    "--processes",
    metavar="P",
    type=click.IntRange(1, MAX_PROCESSES),
    help="Processes that generate the load. Default: half the cores, at least 1.",
)
@json_option
@server_options
def bench(
    target: Target,
    mode: Mode,
    concurrency: int | None,
    group_size: int | None,
    duration_s: float,
    warm_up_s: float,
    processes: int | None,
    as_json: bool,
    **load: Any,
) -> None:
    """Load a server with steps of many sessions, and measure throughput and latency.

    The command opens its own sessions and steps them with random inputs made before the run. Each call follows as soon
    as the previous one is answered. At the end the sessions are closed, also after Ctrl-C, SIGTERM and SIGHUP, which all
    exit with 130. A step is one time step of one session. Other users of the server will notice the load.

    If the server does not answer the calls that are active at the end, the result counts them as unanswered, and the
    exit code is 1.

    With several addresses, those of replicas, each session is stepped on the replica that the SDK chooses, and on
    another one if that fails.

    The SDK generates the load and needs processors too: the result shows whether the client was the bottleneck. If
    so, use more processes, or measure from another machine.
    """
    if group_size is not None and mode != "group":
        raise click.UsageError("--group-size must be given with --mode group")
    sessions, processes = load["sessions"], processes or max(1, (os.cpu_count() or 2) // 2)
    if mode == "group":
        group_size = min(group_size or min(DEFAULT_GROUP_SIZE, -(-sessions // processes)), sessions)
        concurrency = concurrency or processes
    plan = Plan(
        target=target,
        mode=mode,
        concurrency=concurrency or DEFAULT_CONCURRENCY,
        group_size=group_size or 1,
        prefix=f"bench-{secrets.token_hex(8)}-",
        max_idle_s=IDLE_S + warm_up_s + duration_s,
        **load,
    )
    plan = dataclasses.replace(plan, concurrency=min(plan.concurrency, plan.units))
    with target.connect("Reading the model") as client:
        client.model(plan.model)
    measured = measure(plan, processes, warm_up_s, duration_s)
    found = measured.document()
    if not found["calls"] and not measured.is_interrupted:
        calls = f" (unanswered: {unanswered_text(found)})" if found["unanswered"] else ""
        why = found["first_error"] or f"no call was answered in time{calls}; a longer --duration-s may help"
        raise Failure(f"no step was answered: {why}", SERVER_ERROR)
    if as_json:
        render.print_json(found)
    else:
        render.print_facts(facts(found))
    if measured.is_interrupted:
        raise click.exceptions.Exit(INTERRUPTED)
    if found["unanswered"]:
        raise Failure(f"the server did not answer calls at the end: {unanswered_text(found)}", SERVER_ERROR)
