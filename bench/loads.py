"""The loads: single steps by the compiled generator, and the SDK's calls by a client process."""

from __future__ import annotations

import contextlib
import itertools
import json
import shutil
import struct
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc
import numpy as np

import stepwell
from bench import harness
from bench.harness import HERE, MODELS, OUT, Result
from stepwell.cli.toolkit.listener import Listener
from stepwell.testing import LocalServer
from stepwell.v1 import sessions_pb2, tensors_pb2
from stepwell_server.rpc.triton.inference import service_pb2

_STEPS = "/stepwell.v1.SessionService/"
_TRITON = "/inference.GRPCInferenceService/"
_LIMIT_S = 60.0
"""What a process may take beyond the time that it is told to."""
_REFUSED_AT_MOST = 0.05
"""Share of the calls that may fail: grpc.aio's server drops some when a thousand come at once. The tables say so."""
_sequences = itertools.count(1)


@dataclass(frozen=True)
class Times:
    """How long a load runs, in seconds: first uncounted, then counted."""

    run_s: float
    warm_up_s: float = 0.4

    @property
    def limit_s(self) -> float:
        return self.warm_up_s + self.run_s + _LIMIT_S


@dataclass(frozen=True)
class Plan:
    """How long, and how often."""

    times: Times
    repeats: int


# --- the generator ---


def generator() -> Path:
    """The program of load.cc, compiled if need be.

    Raises:
        RuntimeError: It cannot be compiled here. Python would be slower than the server that it measures.
    """
    source, binary = HERE / "load.cc", OUT / "load"
    if binary.exists() and binary.stat().st_mtime > source.stat().st_mtime:
        return binary
    if shutil.which("g++") is None or shutil.which("pkg-config") is None:
        raise RuntimeError(f"{source.name} needs g++ and pkg-config (Debian: g++ pkg-config libgrpc++-dev)")
    try:
        flags = harness.run(["pkg-config", "--cflags", "--libs", "grpc++"], 30).split()
    except RuntimeError as error:
        raise RuntimeError(f"{source.name} needs gRPC for C++ (Debian: libgrpc++-dev)") from error
    OUT.mkdir(parents=True, exist_ok=True)
    harness.run(["g++", "-O2", "-std=c++17", str(source), "-o", str(binary), *flags, "-lgpr"], 300)
    return binary


def generate(
    address: str,
    method: str,
    kind: str,
    requests: Sequence[bytes],
    times: Times,
    ca: Path | None = None,
    token: str | None = None,
    rate: float = 0.0,
) -> Result:
    """Send each request again as soon as it is answered, as calls ("unary") or on a stream for each ("stream").

    With a `rate`, this many are sent per second, by all together.
    """
    path = OUT / "requests.bin"
    path.write_bytes(b"".join(struct.pack("<I", len(one)) + one for one in requests))
    command = [str(generator()), address, method, kind, str(path), str(times.warm_up_s), str(times.run_s)]
    options = [] if ca is None else [str(ca)]
    found = json.loads(harness.run(command + options, times.limit_s, token=token, rate=rate))
    tried = found["calls"] + found["errors"]
    if not found["calls"] or found["errors"] > _REFUSED_AT_MOST * tried:
        raise RuntimeError(f"{found['errors']} of {tried} calls failed; the first: {found['first_error']}")
    return {
        "rate": found["rate"],
        "p50_ms": found["p50_ms"],
        "p99_ms": found["p99_ms"],
        "calls": found["calls"],
        "refused": found["errors"] / tried,
        "client_us": found["client_cpu_s"] / found["calls"] * 1e6,
    }


def counted(server: LocalServer, run: Callable[[], Result], made: Callable[[], int]) -> Result:
    """The result with the server's processor time, over all steps that it made, those of the warm-up included.

    Raises:
        RuntimeError: Fewer steps were made than were answered.
    """
    process, before_steps = Listener(() if server.pid is None else (server.pid,)), made()
    before_s = process.cpu_s()
    result = run()
    after_s, steps = process.cpu_s(), made() - before_steps
    if steps < result["calls"]:
        raise RuntimeError(f"{result['calls']} replies came, but only {steps} steps were made")
    kept = {name: value for name, value in result.items() if name != "calls"}
    if before_s is not None and after_s is not None:
        kept["server_us"] = (after_s - before_s) / steps * 1e6
    return kept


# --- single steps ---


def tensor(rows: int, features: int) -> tensors_pb2.Tensor:
    """Random inputs of one time step."""
    values = np.random.default_rng(rows).standard_normal((rows, features), np.float32)
    dtype = tensors_pb2.DATA_TYPE_FLOAT32
    return tensors_pb2.Tensor(dtype=dtype, shape=values.shape, data=values.tobytes())


def _step(session_id: str, features: int) -> bytes:
    request = sessions_pb2.StepRequest(session_id=session_id, inputs=[tensor(1, features)])
    return request.SerializeToString()


def _frame(session_id: str, features: int) -> bytes:
    frame = sessions_pb2.StepFrame(session_ids=[session_id], inputs=[tensor(1, features)], batch_sizes=[1])
    return sessions_pb2.StepStreamRequest(frame_id=1, step=frame).SerializeToString()


def step_requests(kind: str, ids: Sequence[str], features: int) -> tuple[str, list[bytes]]:
    """The method and the requests that step each session, as calls ("unary") or frames ("stream")."""
    method, request = ("Step", _step) if kind == "unary" else ("StepStream", _frame)
    return _STEPS + method, [request(one, features) for one in ids]


def singly(
    server: LocalServer,
    model: str,
    kind: str,
    sessions: int,
    times: Times,
    ca: Path | None = None,
    token: str | None = None,
) -> Result:
    """Sessions of a server, each stepped by itself: its next step leaves when its last is answered."""
    features = MODELS[model][1]
    tls = None if ca is None else stepwell.TlsConfig(ca=ca)
    with (
        harness.alive(server),
        stepwell.connect(server.address, tls=tls, token=token) as client,
        client.open_sessions(model, sessions) as group,
    ):
        path, requests = step_requests(kind, group.ids, features)

        def made() -> int:
            group.refresh()
            return int(group.positions.sum())

        return counted(server, lambda: generate(server.address, path, kind, requests, times, ca, token), made)


def triton(server: LocalServer, model: str, kind: str, sequences: int, times: Times) -> Result:
    """The same with Triton's requests: sequences that have begun."""
    with (
        harness.alive(server),
        stepwell.connect(server.address) as client,
        grpc.insecure_channel(server.address) as channel,
    ):
        name = client.model(model).inputs[0].name
        requests = [_inference(model, name) for _ in range(sequences)]
        call: Any = channel.unary_unary(
            f"{_TRITON}ModelInfer", request_serializer=service_pb2.ModelInferRequest.SerializeToString
        )

        def mark(what: str) -> None:
            for request in requests:
                marked = service_pb2.ModelInferRequest()
                marked.CopyFrom(request)
                marked.parameters[what].bool_param = True
                call(marked, timeout=30)

        def made() -> int:
            return sum(session.position for session in client.sessions())

        method = "ModelInfer" if kind == "unary" else "ModelStreamInfer"
        bodies = [request.SerializeToString() for request in requests]
        mark("sequence_start")
        try:
            return counted(
                server, lambda: generate(server.address, _TRITON + method, kind, bodies, times), made
            )
        finally:
            mark("sequence_end")


def _inference(model: str, name: str) -> service_pb2.ModelInferRequest:
    values = np.random.default_rng(1).standard_normal((1, MODELS[model][1]), np.float32)
    request = service_pb2.ModelInferRequest(model_name=model)
    request.inputs.add(name=name, datatype="FP32", shape=values.shape)
    request.raw_input_contents.append(values.tobytes())
    request.parameters["sequence_id"].string_param = f"bench-{next(_sequences)}"
    return request


# --- the SDK ---


def sdk(
    server: LocalServer, case: str, times: Times, *, python: Path | None = None, **arguments: Any
) -> Result:
    """One client process; see `sdk_client`. `python`: the one that has the SDK; None: this one."""
    given = {"address": server.address, "pid": server.pid, "warm_up_s": times.warm_up_s, "run_s": times.run_s}
    document = json.dumps(given | {"model": "small"} | arguments)
    with harness.alive(server):
        command = [str(python or sys.executable), "-I", str(HERE / "sdk_client.py"), case, document]
        output = harness.run(command, times.limit_s)
    found: Result = json.loads(output)
    return found


def in_process(server: LocalServer, model: str, rows: int, threads: int, times: Times) -> Result:
    """The program of a model by itself; see `in_process`."""
    program = str(harness.program_path(server, model))
    arguments = (program, str(rows), str(threads), str(times.run_s))
    found: Result = json.loads(
        harness.run_python(str(HERE / "in_process.py"), *arguments, timeout_s=times.limit_s)
    )
    return found


@contextlib.contextmanager
def long_requests(server: LocalServer, model: str, steps: int) -> Iterator[None]:
    """While the block runs, a session is kept busy with requests of many time steps."""
    arguments = json.dumps({"address": server.address, "model": model, "steps": steps})
    with harness.started(str(HERE / "sdk_client.py"), "long", arguments) as (process, _):
        yield
        output, _ = process.communicate(timeout=90)
    if not json.loads(output)["rate"] > 0:
        raise RuntimeError("the long requests made no progress")
