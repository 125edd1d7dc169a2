"""What the cases run on: models, servers, processes with time limits, turns back and forth, and the machine."""

from __future__ import annotations

import contextlib
import datetime as dt
import importlib.util
import json
import os
import platform
import statistics
import subprocess
import sys
import threading
import zipfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

import stepwell
from stepwell.testing import LocalServer

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent
OUT = ROOT / "out" / "bench"
"""Models, their programs, the compiled generator and the results."""

MODELS = {"small": (64, 8), "medium": (256, 32), "large": (1024, 128)}
"""Units of the LSTM and features of the input, by name."""
OUTPUTS = 16
START_LIMIT_S = 60.0
"""How long a process may take to say that it is ready."""

_SAVE = """
import json, sys
from stepwell_server.compile.graph.tensorflow_setup import keras
for path, units, features, outputs in json.loads(sys.argv[1]):
    keras.utils.set_random_seed(units)
    layers = [keras.Input((None, features)), keras.layers.LSTM(units, return_sequences=True)]
    keras.Sequential([*layers, keras.layers.Dense(outputs)]).save(path)
"""

Result = Mapping[str, Any]
Measure = Callable[[], Result]
Key = tuple[Any, ...]
"""What tells a measurement from the others of its case: one value for each of the case's labels."""
Point = dict[str, Any]
"""A measurement as it is kept: labels, medians, `ratios` to its baseline; or labels and `error`."""


class ServerEndedError(RuntimeError):
    """The server ended before it was told to. Nothing of its case can be measured any more."""


# --- models and servers ---


def model_path(name: str) -> Path:
    return OUT / "models" / f"{name}.keras"


def save_models() -> None:
    """Make the models that are not there yet, in a process of its own: it needs TensorFlow."""
    missing = [
        (str(model_path(name)), units, features, OUTPUTS)
        for name, (units, features) in MODELS.items()
        if not model_path(name).exists()
    ]
    if missing:
        model_path("x").parent.mkdir(parents=True, exist_ok=True)
        run_python("-c", _SAVE, json.dumps(missing))


def fronts() -> tuple[str, ...]:
    """The fronts that this installation has, the faster one first."""
    return ("native", "python") if importlib.util.find_spec("stepwell_front") else ("python",)


@contextlib.contextmanager
def serve(
    *names: str,
    models: Mapping[str, Path] | None = None,
    front: str = "auto",
    extra_args: Sequence[str] = (),
    data_dir: Path | None = None,
    pause_s: float | None = None,
) -> Iterator[LocalServer]:
    """A server of some of the models, or of others. Without a folder it keeps sessions in memory. Compiles what its cache lacks.

    With `pause_s` its log pauses instead of flushing.

    Raises:
        ServerEndedError: It ended before the block did; with its last log lines.
    """
    paths = {name: model_path(name) for name in names} | dict(models or {})
    arguments = ["--log-level", "warning", "--front", front, *extra_args]
    made = PausedServer(paths, data_dir, extra_args=arguments, cache_dir=OUT / "cache", pause_s=pause_s)
    with made as server, alive(server):
        yield server


class PausedServer(LocalServer):
    """A server whose log pauses instead of flushing, unless `pause_s` is None: see `paused_server`."""

    def __init__(self, *arguments: Any, pause_s: float | None, **more: Any) -> None:
        super().__init__(*arguments, **more)
        self._pause_s = pause_s

    def _command(self) -> list[str]:
        command = super()._command()
        if self._pause_s is not None:
            place = command.index("-m")
            command[place : place + 2] = [str(HERE / "paused_server.py"), str(self._pause_s)]
        return command


@contextlib.contextmanager
def alive(server: LocalServer) -> Iterator[None]:
    """Whatever goes wrong in the block is the server's end, if it has ended.

    Raises:
        ServerEndedError: It ended, even if nothing went wrong.
    """
    try:
        yield
    except ServerEndedError:
        raise
    except Exception as error:
        if server.pid is None:
            raise _ended(server) from error
        raise
    if server.pid is None:
        raise _ended(server)


def _ended(server: LocalServer) -> ServerEndedError:
    return ServerEndedError(f"the server ended early; its last log lines:\n{server.logs()[-2000:]}")


def program_path(server: LocalServer, model: str) -> Path:
    """The compiled program of a model that a server serves."""
    with stepwell.connect(server.address) as client:
        fingerprint = client.model(model).fingerprint
    for found in (OUT / "cache").glob("*.stepwell"):
        with zipfile.ZipFile(found) as archive:
            if json.loads(archive.read("stepwell.json"))["fingerprint"] == fingerprint:
                return found
    raise LookupError(f"no program of model {model} in the cache")


# --- processes ---


def of_load(token: str | None, rate: float) -> dict[str, str]:
    """The environment of the generator: see load.cc."""
    more = ({} if token is None else {"STEPWELL_TOKEN": token}) | ({"LOAD_RATE": str(rate)} if rate else {})
    return {**os.environ, **more}


def run(command: Sequence[str], timeout_s: float, *, token: str | None = None, rate: float = 0.0) -> str:
    """The standard output of a process, which may have a token and a rate; it is killed when its time is over."""
    environment = of_load(token, rate)
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=timeout_s, check=False, env=environment
    )
    if done.returncode:
        name = " ".join(Path(part).name for part in command[:2])
        raise RuntimeError(f"{name} failed with {done.returncode}:\n{done.stderr[-3000:]}")
    return done.stdout


def run_python(*arguments: str, timeout_s: float = 300) -> str:
    """The standard output of a Python process."""
    return run([sys.executable, *arguments], timeout_s)


@contextlib.contextmanager
def started(*arguments: str, limit_s: float = START_LIMIT_S) -> Iterator[tuple[subprocess.Popen[str], str]]:
    """A Python process and its first line, which says that it is ready. It is killed when the block ends."""
    command = [sys.executable, *arguments]
    process = subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
    )
    watchdog = threading.Timer(limit_s, process.kill)
    watchdog.start()
    try:
        assert process.stdout is not None
        line = process.stdout.readline().strip()
        watchdog.cancel()
        if not line:
            raise RuntimeError(f"{' '.join(arguments[:2])} was not ready within {limit_s:g} s, or ended")
        yield process, line
    finally:
        watchdog.cancel()
        process.kill()
        process.communicate()


# --- turns ---


def interleave(
    measures: Mapping[Key, Measure], repeats: int
) -> tuple[dict[Key, list[Result]], dict[Key, str]]:
    """Measure each in turn, again and again, back and forth, so that all meet the same machine.

    Returns:
        The results of those that never failed, and why the others did; what failed once is not tried again.
    """
    results: dict[Key, list[Result]] = {key: [] for key in measures}
    failed: dict[Key, str] = {}
    for turn in range(repeats):
        keys = list(measures)
        for key in keys if turn % 2 == 0 else reversed(keys):
            if key in failed:
                continue
            try:
                results[key].append(measures[key]())
            except ServerEndedError:
                raise
            except Exception as error:
                failed[key] = f"{type(error).__name__}: {error}"
    return {key: found for key, found in results.items() if key not in failed}, failed


def measured(
    labels: Sequence[str],
    measures: Mapping[Key, Measure],
    repeats: int,
    baseline: Callable[[Key], Key] | None = None,
) -> list[Point]:
    """Points of medians over the turns; `ratios` are medians, too, of what was measured in the same turn.

    Args:
        labels: Names of what the keys hold.
        measures: What is measured, by its key.
        repeats: Turns.
        baseline: The key that another is compared with.
    """
    results, failed = interleave(measures, repeats)
    points: list[Point] = []
    for key in measures:
        point = dict(zip(labels, key, strict=True))
        points.append(point)
        if key in failed:
            point["error"] = failed[key]
            continue
        mine = results[key]
        point |= {name: statistics.median(one[name] for one in mine) for name in mine[0]}
        other = None if baseline is None else baseline(key)
        if other in results and other != key:
            theirs = results[other]
            point["ratios"] = {
                name: statistics.median(a[name] / b[name] for a, b in zip(mine, theirs, strict=True))
                for name in mine[0].keys() & theirs[0].keys()
                if all(one[name] for one in theirs)
            }
    return points


# --- the machine ---


def resident_bytes(pid: int) -> int:
    """Resident memory of a process."""
    return status_bytes(pid, "VmRSS")


def status_bytes(pid: int, name: str) -> int:
    """What the kernel says of a process's memory, under one of its names for that."""
    status = Path(f"/proc/{pid}/status").read_text()
    return next(int(line.split()[1]) * 1024 for line in status.splitlines() if line.startswith(f"{name}:"))


def taken_by(pid: int) -> Result:
    """Memory, threads and open files of a process."""
    folder = Path("/proc") / str(pid)
    sizes = (line.split() for line in (folder / "smaps_rollup").read_text().splitlines()[1:])
    kib = {words[0]: int(words[1]) for words in sizes}
    return {
        "resident_mib": kib["Rss:"] / 1024,
        "pss_mib": kib["Pss:"] / 1024,
        "threads": len(list((folder / "task").iterdir())),
        "files": len(list((folder / "fd").iterdir())),
    }


def describe_machine() -> dict[str, str]:
    """What the numbers were measured on."""
    packages = ("ai-edge-litert", "grpcio", "numpy", "protobuf", "uvloop")
    commit = subprocess.run(
        ["git", "describe", "--always", "--dirty"],
        cwd=ROOT, capture_output=True, text=True, timeout=30, check=False,
    )  # fmt: skip
    return {
        "date": dt.datetime.now(dt.UTC).date().isoformat(),
        "processor": processor(),
        "cores": str(len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()),
        "system": f"{platform.system()} {platform.machine()}, Python {platform.python_version()}",
        "packages": ", ".join(f"{name} {metadata.version(name)}" for name in packages),
        "commit": commit.stdout.strip() or "unknown",
    }


def processor() -> str:
    """What the system calls the processor."""
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or "unknown"
