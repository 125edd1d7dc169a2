"""The processes of the load generator, as their parent sees them."""

from __future__ import annotations

import dataclasses
import json
import queue
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from types import TracebackType
from typing import Any, Self

from stepwell.cli.bench.cpu import Listener
from stepwell.cli.bench.histogram import Histogram
from stepwell.cli.bench.plan import Plan
from stepwell.cli.toolkit.errors import SERVER_ERROR, Failure

OPEN_S = 600.0
"""How long opening the sessions may take."""
CLOSE_S = 60.0
"""How long a process may take to finish its calls and close its sessions."""
TICK_S = 0.1


@dataclasses.dataclass(frozen=True)
class Progress:
    """How far a run is."""

    phase: str
    """What is under way: "warming up" or "measuring"."""
    done_s: float
    """Seconds since the phase began."""
    calls: int
    """Calls answered in this phase."""
    steps_per_s: float
    """Steps of sessions, each of one time step, per second of this phase."""
    errors: int
    """Calls that failed in this phase."""


@dataclasses.dataclass(frozen=True)
class Measured:
    """What a run has counted."""

    seconds: float
    """How long it counted."""
    calls: int
    """Calls answered."""
    session_steps: int
    """Sessions stepped by them."""
    calls_per_s: float
    """The sum over the processes, each by its own clock."""
    session_steps_per_s: float
    """The same for sessions stepped."""
    latencies: Histogram
    """Of calls answered."""
    errors: Mapping[str, int]
    """Calls that failed, or of a group its members, by the SDK's class of error."""
    first_error: str
    """Text of the first of them; empty if there is none."""
    server_cpu_s: float | None
    """Processor time that the server took meanwhile; None where it cannot be read."""
    interrupted: bool
    """Ctrl-C ended it early."""


class Fleet:
    """Processes that step the sessions of a plan. Leaving the block ends them and closes their sessions."""

    def __init__(self, plan: Plan, processes: int) -> None:
        self._steps_per_call = plan.steps_per_call
        self._lines: queue.SimpleQueue[tuple[int, Mapping[str, Any] | None]] = queue.SimpleQueue()
        self._latest: dict[int, Mapping[str, Any]] = {}
        self._results: dict[int, Mapping[str, Any]] = {}
        self._workers = [_start(share) for share in plan.shares(processes)]
        for number, worker in enumerate(self._workers):
            threading.Thread(target=self._read, args=(number, worker), daemon=True).start()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        # The end of stdin tells them to finish, and the kernel closes it even when this process is killed.
        for worker in self._workers:
            _close(worker)
        until = time.monotonic() + CLOSE_S
        for worker in self._workers:
            try:
                worker.wait(max(0.0, until - time.monotonic()))
            except subprocess.TimeoutExpired:
                worker.kill()
                worker.wait()

    @property
    def size(self) -> int:
        """How many processes there are."""
        return len(self._workers)

    def wait_ready(self) -> None:
        """Wait until all have opened their sessions.

        Raises:
            Failure: One of them could not.
        """
        ready, until = 0, time.monotonic() + OPEN_S
        while ready < self.size:
            for _, line in self._receive(TICK_S):
                ready += line["kind"] == "ready"
            if time.monotonic() > until:
                raise Failure(f"opening the sessions took longer than {OPEN_S:g} s", SERVER_ERROR)

    def run(
        self, warm_up_s: float, duration_s: float, listener: Listener, show: Callable[[Progress], None]
    ) -> Measured:
        """Step for a while, count for a while, and stop."""
        interrupted = False
        cpu_before, began = None, time.monotonic()
        self._tell("go")
        try:
            self._watch("warming up", warm_up_s, show)
            self._latest.clear()
            self._tell("measure")
            cpu_before, began = listener.cpu_s(), time.monotonic()
            self._watch("measuring", duration_s, show)
        except KeyboardInterrupt:
            interrupted = True
        cpu_after, seconds = listener.cpu_s(), time.monotonic() - began
        self._tell("stop")
        self._collect()
        known = cpu_before is not None and cpu_after is not None
        return self._measured(seconds, cpu_after - cpu_before if known else None, interrupted)  # type: ignore[operator]

    def _watch(self, phase: str, seconds: float, show: Callable[[Progress], None]) -> None:
        began = time.monotonic()
        while (done_s := time.monotonic() - began) < seconds:
            for number, line in self._receive(min(TICK_S, seconds - done_s)):
                self._latest[number] = line["body"]
            show(self._progress(phase, min(done_s, seconds)))

    def _progress(self, phase: str, done_s: float) -> Progress:
        latest = self._latest.values()
        rate = sum(one["session_steps"] / one["seconds"] for one in latest) * self._steps_per_call
        calls, errors = (
            sum(one["calls"] for one in latest),
            sum(sum(one["errors"].values()) for one in latest),
        )
        return Progress(phase, done_s, calls, rate, errors)

    def _collect(self) -> None:
        until = time.monotonic() + CLOSE_S
        while len(self._results) < self.size:
            for number, line in self._receive(TICK_S):
                if line["kind"] == "result":
                    self._results[number] = line["body"]
            if time.monotonic() > until:
                raise Failure("a process of the load generator did not stop", SERVER_ERROR)

    def _measured(self, seconds: float, server_cpu_s: float | None, interrupted: bool) -> Measured:
        results = list(self._results.values())
        errors: dict[str, int] = {}
        for kind, count in (item for one in results for item in one["errors"].items()):
            errors[kind] = errors.get(kind, 0) + count
        return Measured(
            seconds=seconds,
            calls=sum(one["calls"] for one in results),
            session_steps=sum(one["session_steps"] for one in results),
            calls_per_s=sum(one["calls"] / one["seconds"] for one in results),
            session_steps_per_s=sum(one["session_steps"] / one["seconds"] for one in results),
            latencies=Histogram.merged(one["latencies"] for one in results),
            errors=dict(sorted(errors.items(), key=lambda item: -item[1])),
            first_error=next((one["first_error"] for one in results if one["first_error"]), ""),
            server_cpu_s=server_cpu_s,
            interrupted=interrupted,
        )

    def _tell(self, word: str) -> None:
        for number, worker in enumerate(self._workers):
            assert worker.stdin is not None
            try:
                worker.stdin.write(f"{word}\n")
                worker.stdin.flush()
            except OSError:
                raise _died(number) from None

    def _receive(self, timeout_s: float) -> Iterator[tuple[int, Mapping[str, Any]]]:
        """What the processes have said: waits for the first line, then takes those that are there."""
        try:
            number, line = self._lines.get(timeout=max(timeout_s, 0.001))
        except queue.Empty:
            return
        while True:
            if line is None:
                if number not in self._results:
                    raise _died(number)
            elif line["kind"] == "failed":
                raise Failure(line["body"]["message"], SERVER_ERROR)
            else:
                yield number, line
            try:
                number, line = self._lines.get_nowait()
            except queue.Empty:
                return

    def _read(self, number: int, worker: subprocess.Popen[str]) -> None:
        assert worker.stdout is not None
        with worker.stdout as lines:
            for line in lines:
                self._lines.put((number, json.loads(line)))
        self._lines.put((number, None))


def _start(share: Plan) -> subprocess.Popen[str]:
    # -P: the folder that the user happens to be in is no place to import from. A process group of its own:
    # Ctrl-C is this process's to handle.
    worker = subprocess.Popen(
        [sys.executable, "-P", "-m", "stepwell.cli.bench.worker"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        process_group=0,
    )
    assert worker.stdin is not None
    worker.stdin.write(share.to_json() + "\n")
    worker.stdin.flush()
    return worker


def _close(worker: subprocess.Popen[str]) -> None:
    assert worker.stdin is not None
    try:
        worker.stdin.close()
    except OSError:
        return  # it is gone already, and what was left to write with it


def _died(number: int) -> Failure:
    return Failure(f"process {number} of the load generator ended by itself", SERVER_ERROR)
