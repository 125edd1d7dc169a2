"""What a flood of one client costs another: p99 of eight quiet streams beside each flood, as a ratio to alone.

Streams and floods have fixed rates, so a server that slows a flood down gains nothing by that.

    make bench ARGS='floods floods_on_disk'
    chrt -r 1 .venv/bin/python bench/measure.py floods     (on a machine that does other things, too)

Streams and flood are processes of their own, over connections of their own; with tokens they are of two tenants. Each
pair (alone, beside) is measured on a server of its own.
"""

from __future__ import annotations

import contextlib
import json
import struct
import subprocess
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from click.testing import CliRunner

import stepwell
from bench import disk, harness, loads
from bench.harness import HERE, MODELS, OUT, Key, Measure, Point, Result, measured
from bench.loads import Plan, Times
from stepwell.cli import main
from stepwell.testing import LocalServer
from stepwell.v1 import sessions_pb2, tensors_pb2

_MODEL = "small"
_STEPS = "/stepwell.v1.SessionService/"
WATCHED, WATCHED_RATE = 8, 2000.0
FRAMES, FRAME, MANY_STREAMS, LONG, LONG_STEPS = 8, 1024, 64, 8, 10_000
OPENINGS, OPENINGS_OF_MANY, OPEN_BATCH_SIZE = 64, 4, 2000
_BEFORE_S, _AFTER_S = 0.3, 0.5
"""The flood begins before the streams are counted, and ends after them."""


_ON_DISK = (
    "requests of 10,000 steps",
    "frames of 1,024 sessions",
    "new sessions",
    "new sessions, 2,000 at a time",
)
_LARGE_WRITES = "no server: a write of 4 KiB during 2,000 pages at a time"


@dataclass(frozen=True)
class Flood:
    """The calls of a client that sends many."""

    method: str
    kind: str
    """"unary" or "stream"."""
    sessions: int
    """That it needs."""
    requests: Callable[[Sequence[str]], Sequence[bytes]]
    """Those that are under way at a time, of the sessions' ids."""
    rate: float
    """Calls or frames per second with sessions in memory: about half of the most that a server on two cores answers."""
    rate_on_disk: float


def frame(ids: Sequence[str]) -> bytes:
    """A frame with a step of each session."""
    step = sessions_pb2.StepFrame(
        session_ids=ids, inputs=[loads.tensor(len(ids), MODELS[_MODEL][1])], batch_sizes=[1] * len(ids)
    )
    return sessions_pb2.StepStreamRequest(frame_id=1, step=step).SerializeToString()


def long_request(session_id: str) -> bytes:
    """A request of many time steps."""
    values = np.random.default_rng(1).standard_normal((1, LONG_STEPS, MODELS[_MODEL][1]), np.float32)
    tensor = tensors_pb2.Tensor(
        dtype=tensors_pb2.DATA_TYPE_FLOAT32, shape=values.shape, data=values.tobytes()
    )
    return sessions_pb2.StepRequest(
        session_id=session_id, inputs=[tensor], outputs=sessions_pb2.OUTPUT_SELECTION_LAST
    ).SerializeToString()


def _opening() -> bytes:
    return sessions_pb2.OpenSessionRequest(model=_MODEL).SerializeToString()


def _opening_many() -> bytes:
    return sessions_pb2.OpenSessionsRequest(model=_MODEL, count=OPEN_BATCH_SIZE).SerializeToString()


FLOODS = {
    "requests of 10,000 steps": Flood(
        "Step", "unary", LONG, lambda ids: [long_request(one) for one in ids], 6, 6
    ),
    "streams of single steps": Flood(
        "StepStream", "stream", MANY_STREAMS, lambda ids: [frame([one]) for one in ids], 10_000, 5000
    ),
    "frames of 1,024 sessions": Flood(
        "StepStream",
        "stream",
        FRAMES * FRAME,
        lambda ids: [frame(ids[start : start + FRAME]) for start in range(0, FRAMES * FRAME, FRAME)],
        120,
        50,
    ),
    "new sessions": Flood("OpenSession", "unary", 0, lambda _: [_opening()] * OPENINGS, 1200, 600),
    "new sessions, 2,000 at a time": Flood(
        "OpenSessions", "unary", 0, lambda _: [_opening_many()] * OPENINGS_OF_MANY, 25, 8
    ),
}


@contextlib.contextmanager
def flooding(
    server: LocalServer, flood: Flood, token: str | None, run_s: float, rate: float
) -> Iterator[Result]:
    """While the block runs a client floods; afterwards what came of it is in the result."""
    found: dict[str, float] = {}
    with stepwell.connect(server.address, token=token) as client:
        ids = client.open_sessions(_MODEL, flood.sessions).ids if flood.sessions else []
    path = OUT / "flood.bin"
    path.write_bytes(b"".join(struct.pack("<I", len(one)) + one for one in flood.requests(ids)))
    command = [str(loads.generator()), server.address, _STEPS + flood.method, flood.kind, str(path)]
    with subprocess.Popen(
        [*command, str(_BEFORE_S), str(run_s)],
        stdout=subprocess.PIPE,
        text=True,
        env=harness.of_load(token, rate),
    ) as process:
        try:
            yield found
        except BaseException:
            process.kill()
            raise
        output, _ = process.communicate(timeout=60)
    said = json.loads(output)
    if not said["calls"]:
        raise RuntimeError(f"the flood had no reply: {said['errors']} errors, {said['first_error']}")
    found["flood_rate"] = said["rate"]


def pair(
    flood: Flood,
    times: Times,
    *,
    options: Sequence[str] = (),
    tokens: tuple[str, str] | None = None,
    data_dir: Path | None = None,
) -> Result:
    """Latencies of the streams, alone and beside a flood.

    Args:
        flood: Which.
        times: How long each is measured.
        options: Of the server.
        tokens: Of the streams' client and of the one that floods; None: nobody is asked.
        data_dir: Where sessions are; None: in memory.
    """
    own, other = tokens or (None, None)
    with (
        harness.serve(_MODEL, extra_args=options, data_dir=data_dir) as server,
        stepwell.connect(server.address, token=own) as client,
    ):
        requests = [frame([one]) for one in client.open_sessions(_MODEL, WATCHED).ids]

        def look() -> Result:
            return loads.generate(
                server.address, f"{_STEPS}StepStream", "stream", requests, times, token=own, rate=WATCHED_RATE
            )

        alone = look()
        run_s = times.warm_up_s + times.run_s + _AFTER_S
        rate = flood.rate if data_dir is None else flood.rate_on_disk
        with flooding(server, flood, other, run_s, rate) as found:
            beside = look()
    return {
        "alone_p50_ms": alone["p50_ms"],
        "alone_p99_ms": alone["p99_ms"],
        "beside_p50_ms": beside["p50_ms"],
        "beside_p99_ms": beside["p99_ms"],
        "p50_ratio": beside["p50_ms"] / alone["p50_ms"],
        "p99_ratio": beside["p99_ms"] / alone["p99_ms"],
        **found,
    }


def _disk_alone(times: Times) -> Result:
    """A small write that is flushed, as a step is, alone and beside a process that flushes 2,000 pages at a time."""
    with disk.data_folder() as folder:
        alone = disk.flushes_ms(folder, times.run_s)
        with harness.started(str(HERE / "large_writes.py"), str(folder / "large")):
            beside = disk.flushes_ms(folder, times.run_s)
    result = {
        f"{when}_{name}_ms": float(np.quantile(taken, share))
        for when, taken in (("alone", alone), ("beside", beside))
        for name, share in (("p50", 0.5), ("p99", 0.99))
    }
    return result | {
        f"{name}_ratio": result[f"beside_{name}_ms"] / result[f"alone_{name}_ms"] for name in ("p50", "p99")
    }


def new_token(file: Path, name: str) -> str:
    """A token of a user of a tenant of its own, added to a file."""
    arguments = ["tokens", "add", name, "--tenant", name, "--file", str(file), "--json"]
    added = CliRunner().invoke(main, arguments, catch_exceptions=False)
    token: str = json.loads(added.stdout)["token"]
    return token


def floods(plan: Plan) -> list[Point]:
    """A few streams beside each flood of another client: of nobody, and of another tenant."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "callers.tokens"
        tokens = new_token(file, "watched"), new_token(file, "flooding")
        options = ("--auth-tokens", str(file))
        measures: dict[Key, Measure] = {}
        for name, flood in FLOODS.items():
            measures["nobody is asked", name] = lambda flood=flood: pair(flood, plan.times)  # type: ignore[misc]
            measures["two tenants", name] = lambda flood=flood: pair(  # type: ignore[misc]
                flood, plan.times, options=options, tokens=tokens
            )
        return measured(("callers", "flood"), measures, plan.repeats)


def floods_on_disk(plan: Plan) -> list[Point]:
    """The same with sessions on disk; and a durable write beside large ones."""

    def beside(flood: Flood, durability: str) -> Result:
        with disk.data_folder() as folder:
            return pair(flood, plan.times, options=("--durability", durability), data_dir=folder)

    measures: dict[Key, Measure] = {}
    for durability in ("async", "sync"):
        for name in _ON_DISK:
            measures[durability, name] = lambda flood=FLOODS[name], durability=durability: beside(  # type: ignore[misc]
                flood, durability
            )
    measures["sync", _LARGE_WRITES] = lambda: _disk_alone(plan.times)
    return measured(("durability", "flood"), measures, plan.repeats)
