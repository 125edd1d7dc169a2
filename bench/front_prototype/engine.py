"""The bare server: `engine.py BARE_FRONT PROGRAM SESSIONS` prints the address and serves.

It answers each line on standard input with the steps and passes made so far, and ends with standard input.

The least engine behind the bare wire in `src/lib.rs`: gather the states, run the program, scatter them, reply. No rules,
no store. The sessions s0, s1, ... exist from the start, with one row each.
"""

from __future__ import annotations

import asyncio
import importlib.util
import sys
from importlib.machinery import ExtensionFileLoader
from pathlib import Path
from typing import Protocol, cast

import numpy as np
import numpy.typing as npt
import uvloop

from stepwell_server import program_file
from stepwell_server.engine.executors.litert import LiteRTExecutor
from stepwell_server.engine.types import Array
from stepwell_server.program import Program


class Front(Protocol):
    """`Front` of src/lib.rs."""

    def port(self) -> int: ...
    def fd(self) -> int: ...
    def take(self) -> tuple[bytes, bytes]: ...
    def reply(self, outputs: bytes, revisions: list[int]) -> None: ...


class Engine:
    """Runs every step that waits as one pass."""

    def __init__(self, front: Front, program: Program, sessions: int) -> None:
        self._front = front
        self._executor = LiteRTExecutor(program)
        self._features = program.inputs[0].shape[0]
        self._states = [np.zeros((sessions, *spec.shape), spec.dtype) for spec in program.state]
        self._revisions = np.zeros(sessions, np.uint64)
        self._passes = 0

    def run(self) -> None:
        """Take the waiting steps, run them, and reply."""
        handle_bytes, input_bytes = self._front.take()
        handles = np.frombuffer(handle_bytes, np.uint32)
        if not len(handles):
            return
        executor = self._executor
        executor.bind(len(handles))
        self._fill(np.frombuffer(input_bytes, np.float32).reshape(-1, self._features), handles)
        executor.invoke()
        for values, states in zip(executor.next_states(), self._states, strict=True):
            states[handles] = values
        self._revisions[handles] += 1
        self._passes += 1
        self._front.reply(executor.outputs()[0].tobytes(), self._revisions[handles].tolist())

    def report(self) -> None:
        """Answer a line on standard input, whose end ends the process."""
        if not sys.stdin.readline():
            sys.exit()
        print(int(self._revisions.sum()), self._passes, flush=True)

    def _fill(self, inputs: Array, handles: npt.NDArray[np.uint32]) -> None:
        # A function of its own: no view may live while the interpreter runs.
        np.copyto(self._executor.inputs()[0], inputs)
        for values, states in zip(self._executor.states(), self._states, strict=True):
            np.take(states, handles, 0, out=values, mode="clip")


async def serve(front: Front, engine: Engine) -> None:
    """Run a pass whenever steps wait."""
    loop = asyncio.get_running_loop()
    loop.add_reader(front.fd(), engine.run)
    loop.add_reader(sys.stdin, engine.report)
    print(f"127.0.0.1:{front.port()}", flush=True)
    await asyncio.Event().wait()


def load_front(path: str, sessions: int) -> Front:
    """A front of the compiled module at `path`."""
    spec = importlib.util.spec_from_loader("bare_front", ExtensionFileLoader("bare_front", path))
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return cast("Front", module.Front([b"s%d" % number for number in range(sessions)]))


def main(module: str, program: str, sessions: str) -> None:
    """Serve."""
    count = int(sessions)
    front = load_front(module, count)
    uvloop.run(serve(front, Engine(front, program_file.load(Path(program), is_own=True), count)))


if __name__ == "__main__":
    main(*sys.argv[1:4])
