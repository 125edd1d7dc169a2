"""What the comparison runs on: models, servers, load generators, and pairs of measurements."""

from __future__ import annotations

import contextlib
import dataclasses
import datetime as dt
import json
import os
import platform
import shutil
import statistics
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np

import stepwell
from bench import load as python_load
from stepwell.testing import LocalServer
from stepwell.v1 import sessions_pb2, tensors_pb2

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
OUT = ROOT / "out" / "bench"
"""Models, their programs, the compiled generator and the results."""

MODELS = {"small": (64, 8), "medium": (256, 32), "large": (1024, 128)}
"""Units of the LSTM and features of the input, by name."""
WIDTHS = (16, 32, 64, 128, 256, 512, 1024)
"""Units of the LSTMs of the sweep over width; each with 8 features."""
OUTPUTS = 16

_SAVE = """
import json, sys
from stepwell_server.compile.tensorflow_setup import keras
for path, units, features, outputs in json.loads(sys.argv[1]):
    keras.utils.set_random_seed(units)
    layers = [keras.Input((None, features)), keras.layers.LSTM(units, return_sequences=True)]
    keras.Sequential([*layers, keras.layers.Dense(outputs)]).save(path)
"""

Result = Mapping[str, Any]
Measure = Callable[[], Result]


# --- models and servers ---


def model_path(name: str) -> Path:
    return OUT / "models" / f"{name}.keras"


def save_models() -> None:
    """Make the models that are not there yet, in a process of its own: it needs TensorFlow."""
    wanted = MODELS | {f"width{units}": (units, 8) for units in WIDTHS}
    missing = [
        (str(model_path(name)), units, features, OUTPUTS)
        for name, (units, features) in wanted.items()
        if not model_path(name).exists()
    ]
    if missing:
        model_path("x").parent.mkdir(parents=True, exist_ok=True)
        run_python("-c", _SAVE, json.dumps(missing))


def serve(*names: str, extra_args: Sequence[str] = (), data_dir: Path | None = None) -> LocalServer:
    """A server of some of the models. Without a folder it keeps sessions in memory. Compiles what its cache lacks."""
    paths = {name: model_path(name) for name in names}
    arguments = ["--log-level", "warning", *extra_args]
    return LocalServer(paths, data_dir, extra_args=arguments, cache_dir=OUT / "cache")


def program_path(server: LocalServer, model: str) -> Path:
    """The compiled program of a model that a server serves."""
    with stepwell.connect(server.address) as client:
        fingerprint = client.model(model).fingerprint
    for found in (OUT / "cache").glob("*/program.json"):
        if json.loads(found.read_text())["fingerprint"] == fingerprint:
            return found.parent
    raise LookupError(f"no program of model {model} in the cache")


@contextlib.contextmanager
def script_server(script: str, *arguments: str) -> Iterator[str]:
    """A server that is one of this folder's scripts; gives its address."""
    command = [sys.executable, str(HERE / script), *arguments]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    assert process.stdout is not None
    try:
        address = process.stdout.readline().strip()
        if not address:
            raise RuntimeError(f"{script} did not start")
        yield address
    finally:
        process.kill()
        process.communicate()


def run_python(*arguments: str, timeout_s: float = 300) -> str:
    """The standard output of a Python process."""
    done = subprocess.run(
        [sys.executable, *arguments], capture_output=True, text=True, timeout=timeout_s, check=False
    )
    if done.returncode:
        raise RuntimeError(f"python {arguments[0]} failed:\n{done.stderr[-3000:]}")
    return done.stdout


def run_client(case: str, **arguments: Any) -> Result:
    """One client process; see `sdk_client`."""
    document: Result = json.loads(run_python(str(HERE / "sdk_client.py"), case, json.dumps(arguments)))
    return document


@contextlib.contextmanager
def long_requests(address: str, model: str, steps: int) -> Iterator[None]:
    """While the block runs, a session is kept busy with requests of many time steps."""
    arguments = json.dumps({"address": address, "model": model, "steps": steps})
    process = subprocess.Popen(
        [sys.executable, str(HERE / "sdk_client.py"), "long", arguments],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    try:
        assert process.stdout is not None
        process.stdout.readline()
        yield
    finally:
        output, _ = process.communicate(timeout=90)
    rate = json.loads(output)["rate"]
    if not rate > 0:
        raise RuntimeError("the long requests made no progress")


# --- single steps, by the load generator ---


class Generator:
    """Sends ready-made requests: compiled from load.cc where that is possible, else load.py."""

    def __init__(self, compiled: bool = True) -> None:
        self._command = [sys.executable, str(HERE / "load.py")]
        self.description = f"Python, {python_load.PROCESSES} processes (no g++ with libgrpc++-dev here)"
        binary = self._compile() if compiled else None
        if binary is not None:
            self._command = [str(binary)]
            self.description = "C++, one thread (load.cc)"
        self.is_compiled = binary is not None

    @staticmethod
    def _compile() -> Path | None:
        source, binary = HERE / "load.cc", OUT / "load"
        compiler, finder = shutil.which("g++"), shutil.which("pkg-config")
        if compiler is None or finder is None:
            return None
        if binary.exists() and binary.stat().st_mtime > source.stat().st_mtime:
            return binary
        found = subprocess.run(
            [finder, "--cflags", "--libs", "grpc++"], capture_output=True, text=True, check=False
        )
        if found.returncode:
            return None
        OUT.mkdir(parents=True, exist_ok=True)
        command = [
            compiler,
            "-O2",
            "-std=c++17",
            str(source),
            "-o",
            str(binary),
            *found.stdout.split(),
            "-lgpr",
        ]
        built = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
        return None if built.returncode else binary

    def run(
        self, address: str, method: str, kind: str, requests: Sequence[bytes], warm_up_s: float, run_s: float
    ) -> Result:
        """Send each request again and again, and count."""
        path = OUT / "requests.bin"
        python_load.write_requests(path, list(requests))
        command = [*self._command, address, method, kind, str(path), str(warm_up_s), str(run_s)]
        done = subprocess.run(command, capture_output=True, text=True, timeout=200, check=False)
        if done.returncode:
            raise RuntimeError(f"the load generator failed: {done.stderr[-1000:]}")
        result: Result = json.loads(done.stdout)
        if result["errors"]:
            raise RuntimeError(f"{result['errors']} calls failed; the first: {result['first_error']}")
        return result


def tensor(rows: int, features: int) -> tensors_pb2.Tensor:
    """Random inputs of one time step."""
    values = np.random.default_rng(rows).standard_normal((rows, features), np.float32)
    dtype = tensors_pb2.DATA_TYPE_FLOAT32
    return tensors_pb2.Tensor(dtype=dtype, shape=values.shape, data=values.tobytes())


def step_request(session_id: str, features: int) -> bytes:
    """A step as a call of its own."""
    request = sessions_pb2.StepRequest(session_id=session_id, inputs=[tensor(1, features)])
    return request.SerializeToString()


def frame_request(session_ids: Sequence[str], features: int) -> bytes:
    """One step of each session as a message of a stream."""
    frame = sessions_pb2.StepFrame(
        session_ids=session_ids,
        inputs=[tensor(len(session_ids), features)],
        batch_sizes=[1] * len(session_ids),
    )
    return sessions_pb2.StepStreamRequest(frame_id=1, step=frame).SerializeToString()


def step_singly(
    generator: Generator, address: str, model: str, kind: str, sessions: int, warm_up_s: float, run_s: float
) -> Result:
    """Sessions of a server, each stepped by itself; checks that the steps were really made."""
    features = MODELS[model][1]
    with stepwell.connect(address) as client, client.open_sessions(model, sessions) as group:
        if kind == "unary":
            method, requests = "Step", [step_request(one, features) for one in group.ids]
        else:
            method, requests = "StepStream", [frame_request([one], features) for one in group.ids]
        result = generator.run(
            address, f"/stepwell.v1.SessionService/{method}", kind, requests, warm_up_s, run_s
        )
        group.refresh()
        made = int(group.positions.sum())
        if made < result["calls"]:
            raise RuntimeError(f"{result['calls']} replies came, but only {made} steps were made")
        return result


def echo_singly(
    generator: Generator, address: str, kind: str, sessions: int, warm_up_s: float, run_s: float
) -> Result:
    """The same requests through a bare echo."""
    session_id, features = "x" * 22, MODELS["small"][1]
    one = step_request(session_id, features) if kind == "unary" else frame_request([session_id], features)
    method = "/bench.Echo/Unary" if kind == "unary" else "/bench.Echo/Stream"
    return generator.run(address, method, kind, [one] * sessions, warm_up_s, run_s)


# --- pairs ---


def interleave(measures: Mapping[str, Measure], repeats: int) -> dict[str, list[Result]]:
    """Measure each in turn, again and again, back and forth, so that all meet the same machine."""
    results: dict[str, list[Result]] = {name: [] for name in measures}
    for turn in range(repeats):
        names = list(measures)
        for name in names if turn % 2 == 0 else reversed(names):
            results[name].append(measures[name]())
    return results


def median(results: Sequence[Result], key: str) -> float:
    return float(statistics.median(one[key] for one in results))


def ratio(ours: Sequence[Result], theirs: Sequence[Result], key: str) -> float:
    """The median over the turns of ours divided by theirs."""
    pairs = zip(ours, theirs, strict=True)
    return float(statistics.median(a[key] / b[key] for a, b in pairs))


@dataclasses.dataclass(frozen=True)
class Line:
    """A line of the table."""

    case: str
    unit: str
    ours: float
    baseline: str
    """What it is compared with; empty for nothing."""
    theirs: float | None
    ratio: float | None
    """Ours divided by theirs, or ours by itself; the target is about this number."""
    target: tuple[str, float] | None
    """"at most" or "at least", and the number. None: shown for comparison only."""
    section: str = ""
    """The table of docs/performance.md that it belongs to; empty for the first ones."""

    @property
    def reached(self) -> bool | None:
        """Whether the target is reached; None without one."""
        if self.target is None:
            return None
        value = self.ours if self.ratio is None else self.ratio
        return value <= self.target[1] if self.target[0] == "at most" else value >= self.target[1]


def compared(
    case: str,
    unit: str,
    results: Mapping[str, Sequence[Result]],
    key: str,
    targets: Mapping[str, tuple[str, float] | None],
    ours: str = "stepwell",
) -> list[Line]:
    """A line for each of the baselines, given with their targets."""
    mine = results[ours]
    return [
        Line(
            case,
            unit,
            median(mine, key),
            name,
            median(results[name], key),
            ratio(mine, results[name], key),
            target,
        )
        for name, target in targets.items()
    ]


# --- the machine ---


def resident_bytes(pid: int) -> int:
    """Resident memory of a process."""
    return status_bytes(pid, "VmRSS")


def status_bytes(pid: int, name: str) -> int:
    """What the kernel says of a process's memory, under one of its names for that."""
    status = Path(f"/proc/{pid}/status").read_text()
    return next(int(line.split()[1]) * 1024 for line in status.splitlines() if line.startswith(f"{name}:"))


def describe_machine(generator: Generator) -> dict[str, str]:
    """What the numbers were measured on."""
    packages = ("ai-edge-litert", "grpcio", "numpy", "protobuf", "tensorflow", "keras", "uvloop")
    commit = subprocess.run(
        ["git", "describe", "--always", "--dirty"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    return {
        "date": dt.datetime.now(dt.UTC).date().isoformat(),
        "processor": _processor(),
        "cores": str(len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()),
        "system": f"{platform.system()} {platform.machine()}, Python {platform.python_version()}",
        "packages": ", ".join(f"{name} {metadata.version(name)}" for name in packages),
        "generator": generator.description,
        "commit": commit.stdout.strip(),
    }


def _processor() -> str:
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or "unknown"
