"""The program called in process: LiteRT, no server. `in_process.py PROGRAM ROWS THREADS SECONDS` prints JSON.

Each thread has an executor of its own with its part of the rows, fills in the inputs, carries the state and runs.
"""

from __future__ import annotations

import json
import sys
import threading
import time
from pathlib import Path

import numpy as np

from stepwell_server import program_file
from stepwell_server.engine.executors import load_executor
from stepwell_server.engine.executors.base import Executor
from stepwell_server.program import Program


class Part(threading.Thread):
    """Some of the rows, stepped in a thread."""

    def __init__(self, program: Program, rows: int, warm_up_s: float, run_s: float) -> None:
        super().__init__(daemon=True)
        self._executor: Executor = load_executor(program)
        self._executor.bind(rows)
        rng = np.random.default_rng(0)
        self._inputs = [
            rng.standard_normal((rows, *spec.shape)).astype(spec.dtype) for spec in program.inputs
        ]
        self._rows, self._warm_up_s, self._run_s = rows, warm_up_s, run_s
        self.rate = 0.0

    def run(self) -> None:
        self._step_for(self._warm_up_s)
        self.rate = self._step_for(self._run_s)

    def _step_for(self, seconds: float) -> float:
        executor, count, began = self._executor, 0, time.perf_counter()
        while (passed := time.perf_counter() - began) < seconds:
            self._fill()
            executor.carry()
            executor.invoke()
            count += self._rows
        return count / passed

    def _fill(self) -> None:
        # A function of its own: no view may live while the interpreter runs.
        for view, value in zip(self._executor.inputs(), self._inputs, strict=True):
            np.copyto(view, value)


def main(program: str, rows: str, threads: str, seconds: str) -> None:
    loaded = program_file.load(Path(program), is_own=True)
    count = int(threads)
    sizes = [len(part) for part in np.array_split(np.arange(int(rows)), count)]
    parts = [Part(loaded, size, 0.5, float(seconds)) for size in sizes]
    for part in parts:
        part.start()
    for part in parts:
        part.join()
        if not part.rate:
            sys.exit("a thread failed")
    print(json.dumps({"rate": sum(part.rate for part in parts)}))


if __name__ == "__main__":
    main(*sys.argv[1:5])
