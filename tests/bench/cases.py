"""The cases of the comparison. Each returns its lines of the table."""

from __future__ import annotations

import contextlib
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import grpc
import numpy as np

import stepwell
from bench import harness, stores
from bench.harness import HERE, MODELS, OUT, Generator, Line, Result, compared, interleave, run_client
from stepwell.testing import LocalServer
from stepwell.v1 import sessions_pb2, sessions_pb2_grpc

AT_MOST, AT_LEAST = "at most", "at least"
GROUP = 1024
GATHERED = 1000
LARGE_SESSIONS = 256
LONG_STEPS = 10_000
SINGLE_SESSIONS = 8
"""Sessions whose single steps are watched while another runs long requests."""
MANY_SESSIONS = 50_000
GROUPS_OF_MANY = 10_000


@dataclass(frozen=True)
class Lab:
    """What all cases share."""

    server: LocalServer
    """Serves all models of the comparison."""
    echo: str
    """A bare echo on the same event loop as the server, uvloop."""
    plain_echo: str
    """A bare echo on asyncio's own loop."""
    generator: Generator
    repeats: int
    run_s: float
    warm_up_s: float = 0.5

    @property
    def address(self) -> str:
        return self.server.address

    @property
    def times(self) -> dict[str, float]:
        return {"warm_up_s": self.warm_up_s, "run_s": self.run_s}


Case = Callable[[Lab], list[Line]]


# --- single steps ---


def single(lab: Lab, kind: str, sessions: int) -> dict[str, list[Result]]:
    """Steps of sessions, each by itself, against the bare echoes."""
    times = (lab.warm_up_s, lab.run_s)

    def echo(address: str) -> Result:
        return harness.echo_singly(lab.generator, address, kind, sessions, *times)

    measures = {
        "stepwell": lambda: harness.step_singly(lab.generator, lab.address, "small", kind, sessions, *times),
        "echo, uvloop": lambda: echo(lab.echo),
        "echo, asyncio": lambda: echo(lab.plain_echo),
    }
    return interleave(measures, lab.repeats)


def one_session(lab: Lab) -> list[Line]:
    """One session, one step at a time."""
    lines = []
    for kind in ("stream", "unary"):
        targets = {"echo, uvloop": (AT_MOST, 1.3), "echo, asyncio": None}
        results = single(lab, kind, 1)
        lines += compared(f"1 session, {kind}: p50", "ms", results, "p50_ms", targets)
    return lines


def many_sessions(lab: Lab) -> list[Line]:
    """256 sessions, each in ping-pong."""
    lines = []
    for kind in ("stream", "unary"):
        targets = {"echo, uvloop": (AT_LEAST, 0.85), "echo, asyncio": None}
        lines += compared(f"256 sessions, {kind}", "steps/s", single(lab, kind, 256), "rate", targets)
    return lines


# --- frames ---


def gathered(lab: Lab) -> list[Line]:
    """The async SDK with its coalescing and without."""
    shared: dict[str, Any] = {"address": lab.address, "model": "small", "sessions": GATHERED, **lab.times}
    results = interleave(
        {
            "stepwell": lambda: run_client("gather", coalesce=True, **shared),
            "coalescing off": lambda: run_client("gather", coalesce=False, **shared),
        },
        lab.repeats,
    )
    targets = {"coalescing off": (AT_LEAST, 10.0)}
    return compared(f"async SDK, {GATHERED:,} sessions in gather", "steps/s", results, "rate", targets)


def group_frame(lab: Lab, sessions: int) -> tuple[bytes, int]:
    """A frame as a group sends it, and the size of its reply."""
    with stepwell.connect(lab.address) as client, client.open_sessions("small", sessions) as group:
        request = sessions_pb2.StepStreamRequest.FromString(
            harness.frame_request(group.ids, MODELS["small"][1])
        )
        request.step.expected_revisions.extend([0] * sessions)
        ids = np.random.default_rng(0).integers(1, 2**63, sessions, np.uint64)
        request.step.request_ids.extend(ids.tolist())
        request.step.timeout_ms = 30_000
        with grpc.insecure_channel(lab.address) as channel:
            stub: Any = sessions_pb2_grpc.SessionServiceStub(channel)
            replies = list(stub.StepStream(iter([request]), timeout=30))
        if any(reply.errors for reply in replies):
            raise RuntimeError(f"the frame failed: {replies[0].errors[0].error.message}")
        # Revisions of a session that has lived for a while take two bytes, not one.
        return request.SerializeToString(), sum(reply.ByteSize() for reply in replies)


def groups(lab: Lab) -> list[Line]:
    """A group of 1,024 and one session of as many rows, against the same bytes through a bare echo."""
    request, reply_bytes = group_frame(lab, GROUP)
    path = OUT / "frame.bin"
    path.write_bytes(request)
    shared: dict[str, Any] = {"address": lab.address, "model": "small", **lab.times}
    with (
        harness.script_server("echo_server.py", "--uvloop", "--reply-bytes", str(reply_bytes)) as fast,
        harness.script_server("echo_server.py", "--reply-bytes", str(reply_bytes)) as plain,
    ):

        def echo(address: str) -> Result:
            return run_client("echo", address=address, request=str(path), groups=1, steps=GROUP, **lab.times)

        results = interleave(
            {
                "stepwell": lambda: run_client("group", sessions=GROUP, groups=1, **shared),
                f"session of {GROUP:,} rows": lambda: run_client("batch", rows=GROUP, **shared),
                "echo of frames, uvloop": lambda: echo(fast),
                "echo of frames, asyncio": lambda: echo(plain),
            },
            lab.repeats,
        )
    targets = {"echo of frames, uvloop": (AT_LEAST, 0.6), "echo of frames, asyncio": None}
    lines = compared(f"group of {GROUP:,}, one time step", "steps/s", results, "rate", targets)
    batch = f"session of {GROUP:,} rows"
    return lines + compared(
        batch,
        "row steps/s",
        results | {"the group": results["stepwell"]},
        "rate",
        {"the group": (AT_LEAST, 1.0)},
        batch,
    )


def large(lab: Lab) -> list[Line]:
    """LSTM(1024), where the model itself is the cost, against the program in process."""
    program = str(harness.program_path(lab.server, "large"))
    shared: dict[str, Any] = {
        "address": lab.address,
        "model": "large",
        "sessions": LARGE_SESSIONS,
        **lab.times,
    }

    def in_process(threads: int) -> Result:
        arguments = (program, str(LARGE_SESSIONS), str(threads), str(lab.run_s))
        return json.loads(harness.run_python(str(HERE / "in_process.py"), *arguments))  # type: ignore[no-any-return]

    results = interleave(
        {
            "stepwell": lambda: run_client("group", groups=2, **shared),
            "one frame at a time": lambda: run_client("group", groups=1, **shared),
            "in process, 2 threads": lambda: in_process(2),
            "in process, 1 thread": lambda: in_process(1),
        },
        lab.repeats,
    )
    targets = {"in process, 2 threads": (AT_LEAST, 0.85), "in process, 1 thread": None}
    case = f"LSTM(1024), {LARGE_SESSIONS} sessions, 2 frames in flight"
    lines = compared(case, "steps/s", results, "rate", targets)
    case = f"LSTM(1024), {LARGE_SESSIONS} sessions, 1 frame in flight"
    return lines + compared(
        case, "steps/s", results, "rate", {"in process, 2 threads": None}, "one frame at a time"
    )


def small_in_process(lab: Lab) -> list[Line]:
    """The small program in process: how far the server is from what the processor could do."""
    program = str(harness.program_path(lab.server, "small"))
    shared: dict[str, Any] = {"address": lab.address, "model": "small", "sessions": GROUP, **lab.times}

    def in_process(threads: int) -> Result:
        arguments = (program, str(GROUP), str(threads), str(lab.run_s))
        return json.loads(harness.run_python(str(HERE / "in_process.py"), *arguments))  # type: ignore[no-any-return]

    results = interleave(
        {
            "stepwell": lambda: run_client("group", groups=2, **shared),
            "in process, 2 threads": lambda: in_process(2),
            "in process, 1 thread": lambda: in_process(1),
        },
        lab.repeats,
    )
    targets = {"in process, 2 threads": None, "in process, 1 thread": None}
    return compared(f"LSTM(64), {GROUP:,} sessions, 2 frames in flight", "steps/s", results, "rate", targets)


# --- long requests ---


def long_beside_short(lab: Lab) -> list[Line]:
    """Single steps of some sessions, alone and while another session runs requests of 10,000 time steps."""

    def singles() -> Result:
        times = (lab.warm_up_s, lab.run_s)
        return harness.step_singly(lab.generator, lab.address, "small", "stream", SINGLE_SESSIONS, *times)

    def beside() -> Result:
        with harness.long_requests(lab.address, "small", LONG_STEPS):
            return singles()

    results = interleave({"stepwell": beside, "without them": singles}, lab.repeats)
    case = f"{SINGLE_SESSIONS} sessions, stream, beside {LONG_STEPS:,}-step requests"
    return [
        *compared(f"{case}: p99", "ms", results, "p99_ms", {"without them": (AT_MOST, 3.0)}),
        *compared(f"{case}: p50", "ms", results, "p50_ms", {"without them": None}),
    ]


# --- memory and start ---


def memory(lab: Lab) -> list[Line]:
    """Memory of a server with one small model, and what a session adds."""
    at_start, opened, stepped = [], [], []
    for _ in range(lab.repeats):
        with harness.serve("small") as server, stepwell.connect(server.address, timeout_s=120) as client:
            assert server.pid is not None
            with client.open_sessions("small", GROUP) as warm:
                warm.step(np.zeros((GROUP, MODELS["small"][1]), np.float32))
            before = harness.resident_bytes(server.pid)
            at_start.append(before / 2**20)
            state = client.model("small").state_row_bytes
            with contextlib.ExitStack() as stack:
                count = MANY_SESSIONS // GROUPS_OF_MANY
                groups = [client.open_sessions("small", GROUPS_OF_MANY) for _ in range(count)]
                for group in groups:
                    stack.enter_context(group)
                opened.append(beyond_state(server.pid, before, state))
                for group in groups:
                    group.step(np.zeros((GROUPS_OF_MANY, MODELS["small"][1]), np.float32))
                stepped.append(beyond_state(server.pid, before, state))
    per_session = f"memory per session beyond its state, {MANY_SESSIONS:,} sessions"
    return [
        # The rows of sessions that were only opened may not have been written yet, so these are the ones that count.
        Line(
            f"{per_session}, stepped once", "KiB", statistics.median(stepped), "", None, None, (AT_MOST, 1.5)
        ),
        Line(f"{per_session}, opened", "KiB", statistics.median(opened), "", None, None, None),
        Line(
            "resident memory, one LSTM(64)",
            "MiB",
            statistics.median(at_start),
            "",
            None,
            None,
            (AT_MOST, 150.0),
        ),
    ]


def beyond_state(pid: int, before: int, state_bytes: int) -> float:
    """What each of the many sessions takes beyond its state, in KiB."""
    return ((harness.resident_bytes(pid) - before) / MANY_SESSIONS - state_bytes) / 1024


def start(lab: Lab) -> list[Line]:
    """From exec to ready, with the program in the cache."""
    command = [sys.executable, "-m", "stepwell_server", f"small={harness.model_path('small')}"]
    command += ["--listen", "127.0.0.1:0", "--store", "memory", "--cache-dir", str(OUT / "cache")]
    taken = []
    for _ in range(max(3, lab.repeats)):
        began = time.perf_counter()
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
        try:
            assert process.stdout is not None
            line = process.stdout.readline()
            taken.append(time.perf_counter() - began)
        finally:
            process.kill()
            process.communicate()
        if "listening" not in line:
            raise RuntimeError("the server did not start")
    return [Line("exec to ready, warm cache", "s", statistics.median(taken), "", None, None, (AT_MOST, 1.5))]


# --- the seed's way, and the models ---


def seed(lab: Lab) -> list[Line]:
    """A stateful Keras model for each session, called eagerly in a grpc.aio server."""
    times = (lab.warm_up_s, lab.run_s)
    lines = []
    with harness.script_server("seed_server.py", str(harness.model_path("small"))) as address:
        for sessions in (1, 32):
            body = np.zeros(MODELS["small"][1], np.float32).tobytes()

            def seed_way(sessions: int = sessions, body: bytes = body) -> Result:
                return lab.generator.run(address, "/bench.Seed/Stream", "stream", [body] * sessions, *times)

            def ours(sessions: int = sessions) -> Result:
                return harness.step_singly(lab.generator, lab.address, "small", "stream", sessions, *times)

            seed_way()  # its models are made in the first calls
            results = interleave({"stepwell": ours, "the seed's way": seed_way}, lab.repeats)
            case = f"{sessions} session{'s' if sessions > 1 else ''}, stream"
            lines += compared(case, "steps/s", results, "rate", {"the seed's way": None})
    return lines


def models(lab: Lab) -> list[Line]:
    """Single steps of every model, for comparison with other servers."""
    times = (lab.warm_up_s, lab.run_s)
    measures: dict[str, Callable[[], Result]] = {}
    for model in MODELS:
        for sessions in (1, 32, 256):
            name = f"{model}, {sessions} session{'s' if sessions > 1 else ''}, stream"
            measures[name] = lambda model=model, sessions=sessions: harness.step_singly(  # type: ignore[misc]
                lab.generator, lab.address, model, "stream", sessions, *times
            )
    results = interleave(measures, lab.repeats)
    return [
        Line(name, "steps/s", harness.median(found, "rate"), "", None, None, None)
        for name, found in results.items()
    ]


# --- stores ---


def kept(lab: Lab) -> list[Line]:
    """The stores against each other."""
    return stores.measure(lab.generator, lab.repeats, lab.times)


CASES: dict[str, Case] = {
    "one": one_session,
    "many": many_sessions,
    "gather": gathered,
    "groups": groups,
    "large": large,
    "small": small_in_process,
    "long": long_beside_short,
    "memory": memory,
    "start": start,
    "seed": seed,
    "models": models,
    "stores": kept,
}
