"""A step of convolutions over time against a dense network of the same weights, in process and as stored bytes.

    .venv/bin/python bench/streaming.py

It prints Markdown tables. In each turn all programs run, one after the other: ratios are of one run.
"""

from __future__ import annotations

import contextlib
import statistics
import sys
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

sys.path.append(str(Path(__file__).resolve().parents[1] / "tests"))

import numpy as np

import stepwell
from stepwell.testing import LocalServer
from stepwell_server import program_file
from stepwell_server.compile.program.pipeline import compile_traced
from stepwell_server.engine.executors import load_executor
from stepwell_server.engine.passes.batch import Lane
from stepwell_server.engine.state.arena import Arena
from stepwell_server.engine.types import Array
from stepwell_server.program import Program
from support.servers.valkey_servers import Valkey

LAYERS, KERNEL, CHANNELS = 8, 3, 64
DENSE, RATES = "dense", {"dilation 1": 1, "dilations 1 to 128": 2}
ROWS, RESIDENT, TURNS = (1, 16, 64, 256), 300, 200
SESSIONS, STEPS = 64, 100


def program(name: str, folder: Path) -> Program:
    """Compile the dense network, or convolutions whose dilation rates grow by a factor."""
    import keras

    x = inputs = keras.Input((None, CHANNELS))
    for layer in range(LAYERS):
        if name == DENSE:
            x = keras.layers.Concatenate()([x] * KERNEL)
            x = keras.layers.Dense(CHANNELS, activation="relu")(x)
        else:
            rate, same = RATES[name] ** layer, {"padding": "causal", "activation": "relu"}
            x = keras.layers.Conv1D(CHANNELS, KERNEL, dilation_rate=rate, **same)(x)
    keras.Model(inputs, x).save(folder / "model.keras")
    return compile_traced(folder / "model.keras")[0]


class Pass:
    """One time step of some rows of an arena, as a pass makes it."""

    def __init__(self, program: Program) -> None:
        arena = Arena(program, RESIDENT)
        arena.reset(np.arange(RESIDENT), program.initial)
        self._executor, self._states = Lane(program, load_executor(program), arena).in_place

    def run(self, rows: Any, x: Array) -> tuple[float, float]:
        """Return the seconds of the program alone, and of the pass."""
        began = time.perf_counter()
        self._executor.bind(len(rows))
        self._fill(rows, x)
        filled = time.perf_counter()
        self._executor.invoke()
        ran = time.perf_counter()
        self._states.write(rows, self._executor.next_states())
        return ran - filled, time.perf_counter() - began

    def _fill(self, rows: Any, x: Array) -> None:  # no view of the executor may exist while it runs
        self._states.gather(rows, self._executor.states())
        np.copyto(self._executor.inputs()[0], x)


def in_process(programs: Mapping[str, Program]) -> None:
    """Print the times of programs and passes, and their ratios to the dense network."""
    rng, passes = np.random.default_rng(1), {name: Pass(each) for name, each in programs.items()}
    print("| rows | model | program, µs | ratio | pass, µs | ratio |\n| --- | --- | --- | --- | --- | --- |")
    for count in ROWS:
        rows, x = rng.permutation(RESIDENT)[:count], rng.standard_normal((count, CHANNELS), np.float32)
        turns: dict[str, list[tuple[float, float]]] = {name: [] for name in passes}
        for _ in range(TURNS):
            for name, each in passes.items():
                turns[name].append(each.run(rows, x))
        medians = {
            name: [statistics.median(kind) * 1e6 for kind in zip(*found, strict=True)]
            for name, found in turns.items()
        }
        for name, (alone, whole) in medians.items():
            usual = medians[DENSE]
            cells = f"{alone:.1f} | {alone / usual[0]:.2f} | {whole:.1f} | {whole / usual[1]:.2f}"
            print(f"| {count} | {name} | {cells} |")


def stored(programs: Mapping[str, Program], folder: Path) -> None:
    """Print the bytes that a step of a session writes to files, on disk and on Valkey, and the time of all sessions' steps."""
    print("\n| store | model | changed, bytes | written, bytes | ratio | 64 sessions, ms |")
    print("| --- | --- | --- | --- | --- | --- |")
    x = np.zeros((SESSIONS, CHANNELS), np.float32)
    for store in ("disk", "Valkey"):
        for name, each in programs.items():
            program_file.save(each, file := folder / f"{name}.stepwell")
            with contextlib.ExitStack() as stack:
                valkey = stack.enter_context(Valkey(append="everysec")) if store == "Valkey" else None
                extra = () if valkey is None else ("--store", valkey.url(), "--durability", "async")
                data = stack.enter_context(tempfile.TemporaryDirectory()) if valkey is None else None
                server = stack.enter_context(LocalServer({"m": file}, data_dir=data, extra_args=extra))
                client = stack.enter_context(stepwell.connect(server.address))
                group, pid = client.open_sessions("m", SESSIONS), (valkey or server).pid
                group.step(x)
                before, seconds = _written(pid), list[float]()
                for _ in range(STEPS):
                    began = time.perf_counter()
                    group.step(x)
                    seconds.append(time.perf_counter() - began)
                written = (_written(pid) - before) / SESSIONS / STEPS
            changed = each.changed_state_row_bytes + sum(spec.row_bytes for spec in each.outputs)
            cells = f"{changed:,} | {written:,.0f} | {written / changed:.1f} | {statistics.median(seconds) * 1e3:.2f}"
            print(f"| {store} | {name} | {cells} |", flush=True)


def _written(pid: int | None) -> int:
    lines = Path(f"/proc/{pid}/io").read_text().splitlines()
    return int(next(line for line in lines if line.startswith("wchar")).split()[1])


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as place:
        made = {name: program(name, Path(place)) for name in (DENSE, *RATES)}
        in_process(made)
        stored(made, Path(place))
