"""How far a plain unary step goes: the modules that it visits, and how often it crosses from rpc into the engine."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

import grpc.aio
import numpy as np
import pytest

import stepwell_server
from stepwell.v1 import sessions_pb2 as pb
from stepwell.v1.sessions_pb2_grpc import SessionServiceStub
from stepwell_server.addresses import Address
from stepwell_server.catalog.known_files import KnownFiles
from stepwell_server.clock import Clock, SystemClock
from stepwell_server.core.front_limits import FrontLimits
from stepwell_server.metrics.observer import PrometheusObserver
from stepwell_server.rpc.fronts.base import Front
from stepwell_server.rpc.fronts.python import PythonFront
from stepwell_server.rpc.server import RpcServer
from support.engine.catalog_on_engine import FakeLoads, live_models
from support.engine.harness import running
from support.peers.wire import tensor
from support.rpc.no_figures import no_figures
from support.servers.both_fronts import needs_native

_ROOT = Path(stepwell_server.__file__).parent
#: The tests' executor stands for one of the server's.
_EXECUTOR = 1


def _native(_clock: Clock, limits: FrontLimits) -> Front:
    from stepwell_server.rpc.fronts.native import NativeFront

    return NativeFront(SystemClock(), limits)  # the wire keeps the first clock that a process gives it


def _module(frame: FrameType | None) -> str:
    path = Path(frame.f_code.co_filename) if frame is not None else Path()
    return str(path.relative_to(_ROOT)) if path.is_relative_to(_ROOT) else ""


class _Visits:
    def __init__(self) -> None:
        self.modules: set[str] = set()
        self.entries: set[str] = set()
        """Functions of the engine that rpc calls. The constructor of a `Change` is none: it is generated."""

    def note(self, frame: FrameType, event: str, _argument: Any) -> None:
        module = _module(frame)
        if event != "call" or not module:
            return
        self.modules.add(module)
        if module.startswith("engine/") and _module(frame.f_back).startswith("rpc/"):
            self.entries.add(frame.f_code.co_qualname)


@contextmanager
def _watched() -> Iterator[_Visits]:
    visits = _Visits()
    sys.setprofile(visits.note)
    try:
        yield visits
    finally:
        sys.setprofile(None)


@pytest.mark.parametrize("session_id", ["a", "\U0001f463" * 256], ids=["small", "above 1 KiB"])
@pytest.mark.parametrize(
    ("front", "entries"),
    [
        pytest.param(PythonFront, {"Awaited.__init__", "Submission.submit", "Awaited.get"}, id="python"),
        pytest.param(_native, {"Submission.run_batch"}, id="native", marks=needs_native),
    ],
)
@pytest.mark.usefixtures("without_collector")
async def test_a_plain_unary_step_visits_few_modules_and_enters_the_engine_a_few_times(
    front: Callable[[Clock, FrontLimits], Front], entries: set[str], session_id: str
) -> None:
    observer = PrometheusObserver()
    async with running(observer=observer) as at:
        await at.open(session_id)
        server = RpcServer(
            front(at.clock, FrontLimits(1 << 20)),
            clock=at.clock,
            observer=observer,
            max_message_bytes=1 << 20,
        )
        address = await server.start(Address("127.0.0.1", 0))
        server.serve(
            at.engine,
            live_models(at.engine, at.clock, FakeLoads()),
            known_files=KnownFiles(at.engine, {}, None),
            figures=no_figures(),
        )
        async with grpc.aio.insecure_channel(str(address)) as channel:
            stub: Any = SessionServiceStub(channel)

            def request(revision: int) -> pb.StepRequest:
                x = np.random.default_rng(revision).random((1, 2), np.float32)
                return pb.StepRequest(
                    session_id=session_id,
                    expected_revision=revision,
                    request_id=revision + 1,
                    inputs=[tensor(x)],
                )

            for revision in range(3):
                await stub.Step(request(revision))
            with _watched() as visits:
                reply = await stub.Step(request(3))
            assert reply.revision == 4
        await server.close()
    # the native front checks the shape of a message itself
    most = 17 if front is PythonFront else 16
    assert len(visits.modules) + _EXECUTOR <= most, sorted(visits.modules)
    assert sum(module.startswith("engine/") for module in visits.modules) + _EXECUTOR <= 7
    assert visits.entries == entries  # and a change is made


async def test_steps_that_the_store_has_answered_are_counted_before_the_metrics_are_read() -> None:
    async with running(observer=PrometheusObserver()) as at:
        settled: list[bool] = []
        at.engine.settle = lambda: settled.append(True)
        server = RpcServer(
            PythonFront(at.clock, FrontLimits(1 << 20)),
            clock=at.clock,
            observer=PrometheusObserver(),
            max_message_bytes=1 << 20,
        )
        await server.start(Address("127.0.0.1", 0))
        server.count_answered()
        assert not settled, "there is no engine yet"
        server.serve(
            at.engine,
            live_models(at.engine, at.clock, FakeLoads()),
            known_files=KnownFiles(at.engine, {}, None),
            figures=no_figures(),
        )
        server.count_answered()
        assert settled
        await server.close()
