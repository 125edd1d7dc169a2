"""How much Python a pass runs: 32 unary steps of 32 sessions through the native front, in memory, on LiteRT."""

from __future__ import annotations

import asyncio
import dis
import selectors
import sys
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

import numpy as np
from hyperframe.frame import Frame, PingFrame

import stepwell_server
from stepwell.v1 import sessions_pb2
from stepwell_server.addresses import Address
from stepwell_server.catalog.known_files import KnownFiles
from stepwell_server.clock import SystemClock
from stepwell_server.core.front_limits import FrontLimits
from stepwell_server.engine.executors import load_executor
from stepwell_server.metrics.observer import PrometheusObserver
from stepwell_server.rpc.server import RpcServer
from support.engine.catalog_on_engine import FakeLoads, live_models
from support.engine.harness import running
from support.models import programs
from support.peers import http2
from support.peers.wire import tensor
from support.rpc.no_figures import no_figures
from support.servers.both_fronts import needs_native

MAX_CALLS = 95
MAX_OPERATORS = 76
"""Of a pass. Lower them with every change that needs fewer."""

SESSIONS = 32
PASSES = 3
_WARM_UP = 12
"""Passes of this size until executors and caches have all that they keep."""
_MAX_ROUNDS = 80
"""Most rounds are one pass; in the others the front took the steps in parts."""
_STEP = "/stepwell.v1.SessionService/Step"
_SERVER = Path(stepwell_server.__file__).parent
_OUTSIDE = (str(Path(asyncio.__file__).parent), selectors.__file__, __file__)
"""Files of the event loop and of the test, whose calls do not count."""
_PROBES = "slipcover.probe"
"""Whose functions note the lines that run, for `make coverage`."""
_OPERATORS = {"BINARY_OP", "BINARY_SUBSCR", "BINARY_SLICE", "COMPARE_OP", "STORE_SUBSCR", "STORE_SLICE"}
_OPERATORS |= {"UNARY_INVERT", "UNARY_NEGATIVE"}


class PassCount:
    """What ran on the event loop's thread.

    `calls`: every Python function, and every function in compiled code that Python calls: of numpy, of LiteRT, of the
    front, and builtins. Not counted: constructors of types in compiled code, such as `dict()`, and what compiled code does
    inside, such as the crate and ufuncs.
    `operators`: bytecodes in the server's modules that may work on arrays: arithmetic, comparisons, subscripts, with any
    operands. An operation on an array that is written as an operator is no call.
    """

    def __init__(self) -> None:
        self.calls: Counter[str] = Counter()
        self.operators: Counter[str] = Counter()
        self._is_operator: dict[Any, set[int]] = {}
        """The places of operators, by code."""

    def profile(self, frame: FrameType, event: str, argument: Any) -> None:
        """For `sys.setprofile`."""
        if frame.f_code.co_filename.startswith(_OUTSIDE):
            return
        if event == "call":
            self.calls[f"{_place(frame)} {frame.f_code.co_qualname}"] += 1
        elif event == "c_call" and argument != sys.setprofile and argument.__module__ != _PROBES:
            name = f"{getattr(argument, '__module__', None) or ''}.{argument.__qualname__}".lstrip(".")
            self.calls[f"{_place(frame)}    calls {name}"] += 1

    def trace(self, frame: FrameType, event: str, _argument: Any) -> Any:
        """For `sys.settrace`."""
        code = frame.f_code
        if event == "call":
            if not code.co_filename.startswith(str(_SERVER)):
                return None
            frame.f_trace_lines, frame.f_trace_opcodes = False, True
            if code not in self._is_operator:
                found = {each.offset for each in dis.get_instructions(code) if each.opname in _OPERATORS}
                self._is_operator[code] = found
        elif event == "opcode" and frame.f_lasti in self._is_operator[code]:
            self.operators[f"{_place(frame)} {code.co_qualname}"] += 1
        return self.trace


def _place(frame: FrameType) -> str:
    path = Path(frame.f_code.co_filename)
    return f"{path.relative_to(_SERVER) if path.is_relative_to(_SERVER) else path.name}:{frame.f_lineno}"


@contextmanager
def _counted() -> Iterator[PassCount]:
    count = PassCount()
    before = sys.gettrace()  # of a debugger
    sys.settrace(count.trace)
    sys.setprofile(count.profile)
    try:
        yield count
    finally:
        sys.setprofile(None)
        sys.settrace(before)


class _Client:
    """Sends rounds of steps. It reads on the event loop's thread, in a blocking way: the wire has a thread of its own."""

    def __init__(self, address: str, requests: list[bytes]) -> None:
        self._connection = http2.Http2(address)
        self._requests = requests
        self._unanswered: set[int] = set()

    def send(self) -> None:
        """Send a step of each session, and wait until the front has them all."""
        parts = []
        for request in self._requests:
            stream, head = self._connection.begin(_STEP)
            self._unanswered.add(stream)
            parts += [head, http2.data(stream, http2.framed(request), end=True)]
        self._connection.send(*parts)
        for _ in range(
            2
        ):  # the front answers the first once it has read the steps, the second once it has parsed them
            self._connection.send(http2.ping())
            while not (isinstance(frame := self._read(), PingFrame) and "ACK" in frame.flags):
                pass

    def close(self) -> None:
        self._connection.socket.close()

    def wait(self) -> None:
        """Wait for all replies. On another thread."""
        while self._unanswered:
            self._read()

    def _read(self) -> Frame:
        frame = self._connection.frame()
        if "END_STREAM" in frame.flags:
            self._unanswered.discard(frame.stream_id)
        return frame


class _Passes(PrometheusObserver):
    """The observer of a server, which also keeps the rows of each pass."""

    def __init__(self) -> None:
        super().__init__()
        self.rows: list[int] = []

    def pass_done(self, model: str, rows: int, time_steps: int, seconds: float) -> None:
        super().pass_done(model, rows, time_steps, seconds)
        self.rows.append(rows)

    def stepped(self, model: str, session_id: str, rows: int, seconds: float, now: float) -> None:
        super().stepped(model, session_id, rows, seconds, now)
        self.rows.append(rows)


@needs_native
async def test_a_pass_of_32_steps_runs_few_calls_and_operators() -> None:
    from stepwell_server.rpc.fronts.native import NativeFront

    program, observer = programs.program("lstm_dense"), _Passes()
    x = np.random.default_rng(1).standard_normal((SESSIONS, 1, *program.inputs[0].shape), np.float32)
    ids = [f"user-{number}" for number in range(SESSIONS)]
    requests = [
        sessions_pb2.StepRequest(session_id=one, inputs=[tensor(values)]).SerializeToString()
        for one, values in zip(ids, x, strict=True)
    ]
    async with running({"forecast": program}, observer=observer, executor=load_executor) as at:
        await at.open(*ids, model="forecast")
        front = NativeFront(SystemClock(), FrontLimits(1 << 20))
        server = RpcServer(front, clock=at.clock, observer=observer, max_message_bytes=1 << 20)
        address = await server.start(Address("127.0.0.1", 0))
        server.serve(
            at.engine,
            live_models(at.engine, at.clock, FakeLoads()),
            known_files=KnownFiles(at.engine, {}, None),
            figures=no_figures(),
        )
        client = await asyncio.to_thread(_Client, str(address), requests)
        counts: list[PassCount] = []
        warmed_up = 0
        for _ in range(_MAX_ROUNDS):
            observer.rows.clear()
            client.send()
            answered = asyncio.get_running_loop().run_in_executor(None, client.wait)
            with _counted() as count:
                await answered
            if observer.rows == [SESSIONS]:
                warmed_up += 1
                if warmed_up > _WARM_UP:
                    counts.append(count)
            if len(counts) == PASSES:
                break
        else:
            raise AssertionError(f"of {_MAX_ROUNDS} rounds, {len(counts)} were one pass")
        client.close()
        await server.close()
    calls = min((count.calls for count in counts), key=Counter.total)
    operators = min((count.operators for count in counts), key=Counter.total)
    assert calls.total() <= MAX_CALLS, _listed("calls", MAX_CALLS, calls)
    assert operators.total() <= MAX_OPERATORS, _listed("operators", MAX_OPERATORS, operators)


def _listed(name: str, bound: int, found: Counter[str]) -> str:
    lines = [f"{count:4} {where}" for where, count in found.items()]  # as they ran
    return "\n".join([f"a pass may have {bound} {name}; it has {found.total()}:", *lines])
