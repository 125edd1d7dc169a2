"""One process of the load generator: `python -m stepwell.cli.bench.worker`, started by `fleet`.

It reads a plan from the first line of stdin and then one word a line: "go" (begin stepping), "measure"
(count from now on), "stop". It writes one JSON document a line: "ready", "progress" now and then, and
at last "result" or "failed". It stops by itself when stdin ends, so that it never outlives its parent.
Whatever happens, it closes the sessions that it has opened.
"""

from __future__ import annotations

import asyncio
import collections
import json
import signal
import sys
import time
from collections.abc import Sequence
from typing import Any

from stepwell import aio
from stepwell._core.tracker import SessionTracker
from stepwell._transport import channel
from stepwell.cli.bench import inputs as random_inputs
from stepwell.cli.bench import lanes
from stepwell.cli.bench.histogram import Histogram
from stepwell.cli.bench.plan import Plan
from stepwell.cli.bench.ways import Ways
from stepwell.errors import OverloadedError, StepwellError
from stepwell.v1 import sessions_pb2

PROGRESS_S = 0.5
"""How often it says how far it is."""
PAUSE_S = 0.05
"""How long a lane waits after a call that failed, unless the server asks for longer."""
MAX_PAUSE_S = 1.0
FINISH_S = 5.0
"""How long calls that are in flight at the end may take."""
CHUNK = 1024
"""Sessions opened or closed by one call."""
MAX_MESSAGE_BYTES = 2**31 - 1
"""The server's own limit is the one that counts."""


class Counts:
    """What the lanes have done since the measurement began."""

    def __init__(self) -> None:
        self.since = time.perf_counter()
        self.latencies = Histogram()
        self.errors: collections.Counter[str] = collections.Counter()
        self.session_steps = 0


class Worker:
    """Opens the sessions of a plan, steps them until it is told to stop, and closes them."""

    def __init__(self, plan: Plan) -> None:
        self._plan = plan
        config = plan.target.config(max_message_bytes=MAX_MESSAGE_BYTES)
        self._client = aio.AsyncClient(config)
        self._ways = Ways(config, self._client._driver.core.router, channel.tokens(config).metadata())
        self._opened: list[str] = []
        self._lanes: list[lanes.Lane] = []
        self._stopping = False
        self.counts = Counts()
        self.first_error = ""

    async def prepare(self) -> None:
        """Open the sessions and make the inputs."""
        plan = self._plan
        specs = (await self._client.model(plan.model)).inputs
        if plan.mode == "group":
            self._lanes = await self._group_lanes(specs)
            return
        pool = random_inputs.pool(specs, plan.batch_size, plan.steps_per_call, plan.first_session)
        for start in range(0, plan.sessions, CHUNK):
            await self._open_group(plan.ids()[start : start + CHUNK])
        owned = [self._opened[i :: plan.concurrency] for i in range(plan.concurrency)]
        if plan.mode == "frames":
            steps_of = lanes.endless(pool)
            self._lanes = [lanes.SessionLane([*map(self._session, ids)], steps_of) for ids in owned]
            return
        if plan.mode == "unary":
            steps = lanes.endless([lanes.step_request(one) for one in pool])
            self._lanes = [lanes.UnaryLane(self._ways, ids, steps, plan.timeout_s) for ids in owned]
        else:
            frames = lanes.endless([lanes.frame_request(one, plan.batch_size) for one in pool])
            self._lanes = [lanes.StreamLane(self._ways, ids, frames, plan.timeout_s) for ids in owned]

    async def _open_group(self, ids: Sequence[str]) -> aio.AsyncSessionGroup:
        plan = self._plan
        group = await self._client.open_sessions(
            plan.model, len(ids), batch_size=plan.batch_size, session_ids=ids
        )
        self._opened.extend(ids)
        return group

    def _session(self, session_id: str) -> aio.AsyncSession:
        # As `open_session` would make it, without a call for each: there may be a hundred thousand.
        plan = self._plan
        new = sessions_pb2.Session(session_id=session_id, model=plan.model, batch_size=plan.batch_size)
        return aio.AsyncSession(self._client._driver, SessionTracker(new), owned=False)

    async def _group_lanes(self, specs: Sequence[Any]) -> list[lanes.Lane]:
        plan, ids = self._plan, self._plan.ids()
        pools: dict[int, Any] = {}
        owned: list[list[Any]] = [[] for _ in range(plan.concurrency)]
        for number, start in enumerate(range(0, plan.sessions, plan.group_size)):
            group = await self._open_group(ids[start : start + plan.group_size])
            if len(group) not in pools:
                rows = len(group) * plan.batch_size
                pools[len(group)] = random_inputs.pool(specs, rows, plan.steps_per_call, plan.first_session)
            owned[number % plan.concurrency].append((group, lanes.endless(pools[len(group)])))
        return [lanes.GroupLane(groups) for groups in owned]

    async def run(self) -> None:
        """Step until `stop`."""
        tasks = [asyncio.create_task(self._run_lane(lane)) for lane in self._lanes]
        while not self._stopping:
            done, _ = await asyncio.wait(tasks, timeout=PROGRESS_S, return_when=asyncio.FIRST_EXCEPTION)
            for task in done:
                task.result()  # a defect is to be seen
            if not self._stopping:
                say("progress", self.summary())
        _, late = await asyncio.wait(tasks, timeout=FINISH_S)
        for task in late:
            task.cancel()

    async def _run_lane(self, lane: lanes.Lane) -> None:
        clock = time.perf_counter
        while not self._stopping:
            began = clock()
            try:
                sessions = await lane.call()
            except StepwellError as error:
                await self._failed(error)
                continue
            counts = self.counts
            # Calls that began before the measurement do not count.
            if began >= counts.since and not self._stopping:
                counts.latencies.add(clock() - began)
                counts.session_steps += sessions

    async def _failed(self, error: StepwellError) -> None:
        if self._stopping:
            return
        # In a group, each member that failed counts.
        for one in error.failures.values() or (error,):
            self.counts.errors[type(one).__name__] += 1
        self.first_error = self.first_error or str(error)
        wanted = error.retry_after_s if isinstance(error, OverloadedError) else 0.0
        await asyncio.sleep(min(MAX_PAUSE_S, max(PAUSE_S, wanted)))

    def measure(self) -> None:
        """Count from now on."""
        self.counts = Counts()

    def stop(self) -> dict[str, object]:
        """Stop counting and stepping. Returns what was counted."""
        result = self.summary() | {"latencies": self.counts.latencies.to_dict()}
        self._stopping = True
        return result

    def summary(self) -> dict[str, object]:
        """What was counted so far, in few numbers."""
        counts = self.counts
        return {
            "seconds": time.perf_counter() - counts.since,
            "calls": counts.latencies.count,
            "session_steps": counts.session_steps,
            "errors": dict(counts.errors),
            "first_error": self.first_error,
        }

    async def close(self) -> None:
        """Close the sessions and the connection."""
        try:
            for lane in self._lanes:
                await lane.close()
            for start in range(0, len(self._opened), CHUNK):
                await self._client.close_sessions(self._opened[start : start + CHUNK], timeout_s=FINISH_S)
        finally:
            await self._ways.close()
            await self._client.close()


def say(kind: str, document: object = None) -> None:
    """Write one line for the parent."""
    print(json.dumps({"kind": kind, "body": document}), flush=True)


async def words() -> asyncio.StreamReader:
    """The lines of stdin."""
    reader = asyncio.StreamReader()
    protocol = asyncio.StreamReaderProtocol(reader)
    await asyncio.get_running_loop().connect_read_pipe(lambda: protocol, sys.stdin)
    return reader


async def obey(worker: Worker, stdin: asyncio.StreamReader) -> None:
    """Follow the parent's commands until "stop" or the end of stdin."""
    running: asyncio.Task[None] | None = None
    try:
        while (word := (await stdin.readline()).decode().strip()) not in ("stop", ""):
            if word == "go":
                running = asyncio.create_task(worker.run())
            elif word == "measure":
                worker.measure()
    finally:
        result = worker.stop()
        if running is not None:
            await running
    say("result", result)


async def serve() -> None:
    """Read the plan, open the sessions, follow the parent, close the sessions."""
    stdin = await words()
    worker = Worker(Plan.from_json((await stdin.readline()).decode()))
    try:
        preparing = asyncio.create_task(worker.prepare())
        order = asyncio.create_task(stdin.readline())
        await asyncio.wait([preparing, order], return_when=asyncio.FIRST_COMPLETED)
        if order.done():  # the parent has changed its mind, or is gone
            preparing.cancel()
            await asyncio.wait([preparing])
            return
        await preparing
        order.cancel()
        await asyncio.wait([order])
        say("ready")
        await obey(worker, stdin)
    except StepwellError as error:
        say("failed", {"type": type(error).__name__, "message": str(error)})
    finally:
        await worker.close()


def main() -> None:
    """Run, and ignore Ctrl-C: the parent process says when to stop."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        asyncio.run(serve())
    except BrokenPipeError:
        sys.exit(1)


if __name__ == "__main__":
    main()
