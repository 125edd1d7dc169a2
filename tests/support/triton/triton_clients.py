"""Triton's real clients against a real server.

The clients have an environment of their own (see scripts/tools.py) and run as processes in it: the
scenarios are in `triton_scenarios`, which imports nothing of ours.
"""

from __future__ import annotations

import functools
import json
import os
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import tools

from support import secured
from support.models import programs, zoo
from support.secured import Server

_SCENARIOS = Path(__file__).with_name("triton_scenarios.py")
#: Model of the zoo by the name it is served under.
ZOO = {
    "lstm": "lstm_dense",
    "multi": "several_inputs_and_outputs",
    "plain": "stateless",
    "tokens": "embedding_mask_zero",
}
#: An accumulator of three integers.
ACC = "acc"
#: Accumulators of one number, by the type of their input: `acc_int64` and so on.
DTYPES = ("bool", "int8", "int16", "int64", "uint8", "uint32", "uint64", "float16", "float32", "float64")
NAMES = (ACC, *ZOO, *(f"acc_{dtype}" for dtype in DTYPES))


def environment() -> Path:
    """The folder of the programs of the clients' environment."""
    return tools.environment("triton")


@functools.cache
def perf_analyzer() -> Path:
    """The program of Triton's load generator. Skips the test where there is no build of it."""
    program = environment() / "perf_analyzer"
    if not program.exists():
        try:
            tools.install("triton", *tools.group("perf"))
        except subprocess.CalledProcessError:
            pytest.skip("there is no build of perf-analyzer for this system")
    done = subprocess.run([program, "--version"], capture_output=True, text=True, timeout=200, check=False)
    if done.returncode:
        pytest.skip(f"perf_analyzer does not run here: {done.stderr.strip()}")
    return program


def run_scenario(name: str, address: str, *arguments: str) -> Any:
    """Run a function of `triton_scenarios` in the clients' environment; returns what it returns."""
    with scenario(name, address, *arguments) as process:
        return result_of(process)


@contextmanager
def scenario(name: str, address: str, *arguments: str) -> Iterator[subprocess.Popen[str]]:
    """A function of `triton_scenarios`, or MODULE.FUNCTION, that runs in the clients' environment while the block does."""
    module, _, function = name.rpartition(".")
    script = _SCENARIOS.with_name(f"{module}.py") if module else _SCENARIOS
    command = [str(environment() / "python"), str(script), function, address, *arguments]
    found = os.environ | {"PYTHONPATH": str(_SCENARIOS.parents[2])}
    pipe = subprocess.PIPE
    with subprocess.Popen(command, stdout=pipe, stderr=pipe, text=True, env=found) as process:
        try:
            yield process
        finally:
            process.kill()


def result_of(process: subprocess.Popen[str]) -> Any:
    """The result of a scenario."""
    stdout, stderr = process.communicate(timeout=200)
    assert process.returncode == 0, f"{stdout}\n{stderr}"
    return json.loads(stdout.splitlines()[-1])


def new_client(address: str) -> str:
    """An expression for a client of a server, in code that imports `tritonclient.grpc` as `triton`."""
    if secured.is_on():
        return f"__import__({_SCENARIOS.stem!r}).connect({address!r})"
    return f"triton.InferenceServerClient({address!r})"


def run_code(code: str) -> str:
    """Run Python code in the clients' environment; returns what it prints."""
    command = [str(environment() / "python"), "-c", code]
    found = os.environ | {"PYTHONPATH": str(_SCENARIOS.parent)} if secured.is_on() else None
    done = subprocess.run(command, capture_output=True, text=True, timeout=200, check=False, env=found)
    assert done.returncode == 0, f"{done.stdout}\n{done.stderr}"
    return done.stdout


def keras_model(name: str) -> Any:
    """The Keras model that is served under a name."""
    if name in ZOO:
        return zoo.build(ZOO[name])
    return accumulator("int32", 3) if name == ACC else accumulator(name.removeprefix("acc_"), 1)


def accumulator(dtype: str, features: int) -> Any:
    """A model that adds up its input; no weights, no Dense layer."""
    from stepwell_server.compile.graph.tensorflow_setup import keras
    from support.models.custom_layers import Accumulator

    # Keras takes int8 as a layer's dtype for a way to quantize it.
    total = "int32" if dtype in {"bool", "int8"} else dtype
    # Named, because Keras's own names depend on what was made before in this process.
    x = keras.Input((None, features), dtype=dtype, name="x")
    cell = Accumulator(features, dtype=total)
    return keras.Model(x, keras.layers.RNN(cell, return_sequences=True, name="sum", dtype=total)(x))


def saved(name: str) -> programs.Saved:
    """The model that is served under a name, and the cache that has its program."""
    imports = ["support.models.custom_layers"]
    build = functools.partial(keras_model, name)
    return programs.saved(ZOO.get(name, name), build, imports, kept=programs.kept_folder())


@contextmanager
def serve(*arguments: str, only: tuple[str, ...] = (), data_dir: Path | None = None) -> Iterator[Server]:
    """Serve the models, or only some of them."""
    found = {name: saved(name) for name in only or NAMES}
    server = Server(
        models={name: one.path for name, one in found.items()},
        data_dir=data_dir,
        cache_dir=programs.cache_dir(),
        extra_args=["--import", "support.models.custom_layers", *arguments],
        env={
            "PYTHONPATH": os.pathsep.join([str(Path(__file__).parents[2]), os.environ.get("PYTHONPATH", "")])
        },
        start_timeout_s=100,
    )
    with server:
        yield server
        assert "internal error" not in server.logs(), "a defect was reported to some caller; see the log"
