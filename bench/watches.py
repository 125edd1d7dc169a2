"""What watches cost the sessions' own steps: processor time of the server per step, in pairs with and without a watch.

    .venv/bin/python -m bench.watches [PAIRS [SESSIONS [CASE ...]]]

Sessions step as fast as they can, each when its last step is answered, over streams of one client. Pairs of short runs
(alone, watched) alternate on one server, so that both see the same machine; the table has medians of the pairs' ratios.
"""

from __future__ import annotations

import asyncio
import json
import statistics
import sys
import threading
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import numpy as np

import stepwell
from bench import harness
from stepwell import aio
from stepwell.testing import LocalServer

_MODEL = "small"
_SESSIONS = {1: 4_000, 64: 40_000, 256: 80_000}
"""Sessions that step, and their steps in one run."""
#: What is watched, by what the table calls it: which of the stepped sessions, and how.
CASES: dict[str, dict[str, Any] | None] = {
    "another session, every change": None,
    "one of them, every 100 ms": {"interval_s": 0.1},
    "one of them, every 1,000 changes": {"every": 1000},
    "64 of them, every 100 ms": {"interval_s": 0.1},
    "64 of them, every 1,000 changes": {"every": 1000},
    "one of them, every change": {"every": 1},
    "64 of them, every change": {"every": 1},
}


@asynccontextmanager
async def _watching(address: str, ids: Sequence[str], **every: Any) -> AsyncIterator[None]:
    """A watch of all that can be watched, read by a process of its own: it must not slow the load down."""
    arguments = json.dumps({"address": address, "session_ids": list(ids), "every": every})
    reader = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "bench.watches", "read", arguments),
        stdin=asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.PIPE,
    )
    assert reader.stdout is not None
    await reader.stdout.readline()
    try:
        yield
    finally:
        await reader.communicate(b"")


def _read(address: str, session_ids: Sequence[str], every: Mapping[str, Any]) -> None:
    """Reads a watch until the standard input ends; writes a line once the first event is there."""
    with (
        stepwell.connect(address) as client,
        client.watch_sessions(session_ids, inputs=True, outputs=True, states=True, **every) as watch,
    ):
        next(watch)
        print("watching", flush=True)

        def close() -> None:
            sys.stdin.read()
            watch.close()

        threading.Thread(target=close, daemon=True).start()
        for _ in watch:
            pass


def _processor_ns(pid: int) -> int:
    """Processor time of all threads of a process. Of the ones that ended, there are few here."""
    return sum(
        int((task / "schedstat").read_text().split()[0]) for task in Path(f"/proc/{pid}/task").iterdir()
    )


async def _run(pid: int, sessions: Sequence[Any]) -> float:
    """Microseconds of the server's processor time per step."""
    steps = _SESSIONS[len(sessions)] // len(sessions)
    x = np.random.default_rng(1).standard_normal((1, 8)).astype(np.float32)

    async def step(session: Any) -> None:
        for _ in range(steps):
            await session.step(x)

    await asyncio.sleep(0.2)  # the same rest before each run: it costs the first steps more
    before = _processor_ns(pid)
    await asyncio.gather(*map(step, sessions))
    return (_processor_ns(pid) - before) / 1e3 / (steps * len(sessions))


async def _measure(server: LocalServer, pairs: int, count: int, cases: Sequence[str]) -> None:
    """Prints by case: microseconds alone, and the median and the spread of the ratios."""
    pid = server.pid
    assert pid is not None
    async with aio.connect(server.address) as client:
        sessions = [await client.open_session(_MODEL) for _ in range(count)]
        other = await client.open_session(_MODEL)
        await _run(pid, sessions)
        for name in cases:
            every = CASES[name]
            ids = [each.id for each in sessions[: 64 if name.startswith("64") else 1]]
            alone, ratios = [], []
            for turn in range(pairs):
                times = {}
                for is_watched in (turn % 2 == 0, turn % 2 == 1):
                    if not is_watched:
                        times[False] = await _run(pid, sessions)
                        continue
                    async with _watching(
                        server.address, [other.id] if every is None else ids, **(every or {})
                    ):
                        times[True] = await _run(pid, sessions)
                alone.append(times[False])
                ratios.append(times[True] / times[False])
            quarters = statistics.quantiles(ratios, n=4)
            numbers = f"{statistics.median(alone):.1f} | {statistics.median(ratios):.3f}"
            print(f"| {count} | {name} | {numbers} | {quarters[2] - quarters[0]:.3f} |", flush=True)


def main() -> None:
    """Prints the table."""
    if sys.argv[1:2] == ["read"]:
        _read(**json.loads(sys.argv[2]))
        return
    pairs = int(sys.argv[1]) if len(sys.argv) > 1 else 9
    counts = [int(each) for each in sys.argv[2:3]] or list(_SESSIONS)
    cases = sys.argv[3:] or list(CASES)
    harness.save_models()
    models = {_MODEL: harness.model_path(_MODEL)}
    print("| sessions | watched | alone, µs a step | watched / alone | quartiles apart |")
    print("| --- | --- | --- | --- | --- |")
    for count in counts:
        with LocalServer(models=models, extra_args=["--store", "memory"]) as server:
            asyncio.run(_measure(server, pairs, count, cases))


if __name__ == "__main__":
    main()
