"""One client process: `sdk_client.py CASE JSON` makes the load and prints JSON.

sync     one session of the blocking SDK, `session.step` in a loop
stub     one session, its steps sent by a bare stub of grpcio with the message that the SDK sends
async    one session of the async SDK, `await session.step` in a loop
aio_stub as stub, with grpc.aio
gather   N sessions of the async SDK, all stepped in one asyncio.gather, again and again
group    a SessionGroup of the blocking SDK, `group.step` in a loop
long     one session that runs requests of many time steps until stdin ends; prints a line when it begins

With "profile" `gather` says where the client's processor time went: shares by file, from samples.
"""

from __future__ import annotations

import asyncio
import collections
import json
import secrets
import signal
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

import grpc
import grpc.aio
import numpy as np

import stepwell
from stepwell import aio
from stepwell.cli.toolkit.listener import Listener
from stepwell.v1 import sessions_pb2, tensors_pb2

_SAMPLE_S = 0.002
_SHOWN = 9
"""Parts of a profile."""


class Meter:
    """Counts steps and times; processor time is over all steps, those of the warm-up included."""

    def __init__(self, pid: int, steps: int, warm_up_s: float, run_s: float) -> None:
        self._server, self._steps, self._run_s = Listener((pid,)), steps, run_s
        self._latencies: list[float] = []
        self._calls = 0
        self._server_before, self._client_before = self._server.cpu_s(), time.process_time()
        self._counted_from = time.perf_counter() + warm_up_s
        self._until = self._counted_from + run_s
        self._sent = time.perf_counter()

    def more(self) -> bool:
        """Whether to make another call, which begins now."""
        self._sent = time.perf_counter()
        return self._sent < self._until

    def answered(self) -> None:
        """The call is answered."""
        now = time.perf_counter()
        self._calls += 1
        if self._counted_from <= now < self._until:
            self._latencies.append(now - self._sent)

    def result(self) -> dict[str, Any]:
        if not self._latencies:
            raise RuntimeError("no call was answered in the counted time")
        steps = self._calls * self._steps
        p50, p99 = np.quantile(self._latencies, [0.5, 0.99]).tolist()
        found = {
            "rate": len(self._latencies) * self._steps / self._run_s,
            "p50_ms": p50 * 1e3,
            "p99_ms": p99 * 1e3,
            "client_us": (time.process_time() - self._client_before) / steps * 1e6,
        }
        after = self._server.cpu_s()
        if self._server_before is not None and after is not None:
            found["server_us"] = (after - self._server_before) / steps * 1e6
        return found


@contextmanager
def sampled(counts: collections.Counter[str]) -> Iterator[None]:
    """Count, at each few milliseconds of the process's processor time, the file that the main thread is in.

    What a C function takes counts for the file that has called it.
    """

    def sample(_signal: int, frame: FrameType | None) -> None:
        if frame is not None:
            counts[frame.f_code.co_filename] += 1

    signal.signal(signal.SIGPROF, sample)
    signal.setitimer(signal.ITIMER_PROF, _SAMPLE_S, _SAMPLE_S)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)


def part_of(path: str) -> str:
    """What a file belongs to: a module of the SDK by its name, else a package."""
    parts = Path(path).parts
    if "stepwell" in parts:
        return "/".join(("client", *parts[len(parts) - 1 - parts[::-1].index("stepwell") :]))
    if "site-packages" in parts:
        return parts[parts.index("site-packages") + 1]
    if path == __file__:
        return "the program that steps"
    if parts[-1] == "selectors.py":
        return "selectors.py: waiting, or gRPC's own threads"
    if len(parts) == 1:
        return "code that dataclasses generate" if path == "<string>" else path
    return parts[-1] if parts[-2].startswith("python") else parts[-2]


def rows(features: int, count: int) -> Any:
    return np.random.default_rng(0).standard_normal((count, features), np.float32)


def sync(address: str, model: str, pid: int, warm_up_s: float, run_s: float) -> dict[str, Any]:
    with stepwell.connect(address) as client, client.open_session(model) as session:
        x = rows(client.model(model).inputs[0].shape[0], 1)
        meter = Meter(pid, 1, warm_up_s, run_s)
        while meter.more():
            session.step(x)
            meter.answered()
        return meter.result()


_STEP = "/stepwell.v1.SessionService/Step"


class Steps:
    """The messages of a session's steps."""

    def __init__(self, session_id: str, x: Any) -> None:
        self._session_id, self._x, self._revision = session_id, x, 0

    def next(self) -> sessions_pb2.StepRequest:
        x = self._x
        inputs = [tensors_pb2.Tensor(dtype=tensors_pb2.DATA_TYPE_FLOAT32, shape=x.shape, data=x.tobytes())]
        self._revision += 1
        return sessions_pb2.StepRequest(
            session_id=self._session_id,
            inputs=inputs,
            expected_revision=self._revision - 1,
            request_id=secrets.randbits(64) or 1,
            outputs=sessions_pb2.OUTPUT_SELECTION_ALL,
        )

    @staticmethod
    def outputs(reply: sessions_pb2.StepResponse) -> Any:
        output = reply.outputs[0]
        return np.frombuffer(output.data, np.float32).reshape(output.shape)


def stub_of(channel: Any) -> Any:
    """The method of a bare stub, on a channel of either kind."""
    return channel.unary_unary(
        _STEP,
        request_serializer=sessions_pb2.StepRequest.SerializeToString,
        response_deserializer=sessions_pb2.StepResponse.FromString,
    )


def stub(address: str, model: str, pid: int, warm_up_s: float, run_s: float) -> dict[str, Any]:
    with (
        stepwell.connect(address) as client,
        client.open_session(model) as session,
        grpc.insecure_channel(address) as channel,
    ):
        steps = Steps(session.id, rows(client.model(model).inputs[0].shape[0], 1))
        call = stub_of(channel)
        meter = Meter(pid, 1, warm_up_s, run_s)
        while meter.more():
            steps.outputs(call(steps.next()))
            meter.answered()
        return meter.result()


async def aio_stub(address: str, model: str, pid: int, warm_up_s: float, run_s: float) -> dict[str, Any]:
    async with (
        aio.connect(address) as client,
        client.open_session(model) as session,
        grpc.aio.insecure_channel(address) as channel,
    ):
        steps = Steps(session.id, rows((await client.model(model)).inputs[0].shape[0], 1))
        call = stub_of(channel)
        meter = Meter(pid, 1, warm_up_s, run_s)
        while meter.more():
            steps.outputs(await call(steps.next()))
            meter.answered()
        return meter.result()


def group(
    address: str, model: str, pid: int, sessions: int, warm_up_s: float, run_s: float
) -> dict[str, Any]:
    with stepwell.connect(address) as client, client.open_sessions(model, sessions) as opened:
        x = rows(client.model(model).inputs[0].shape[0], sessions)
        meter = Meter(pid, sessions, warm_up_s, run_s)
        while meter.more():
            opened.step(x)
            meter.answered()
        return meter.result()


async def async_(address: str, model: str, pid: int, warm_up_s: float, run_s: float) -> dict[str, Any]:
    async with aio.connect(address) as client, client.open_session(model) as session:
        x = rows((await client.model(model)).inputs[0].shape[0], 1)
        meter = Meter(pid, 1, warm_up_s, run_s)
        while meter.more():
            await session.step(x)
            meter.answered()
        return meter.result()


async def gather(
    address: str,
    model: str,
    pid: int,
    sessions: int,
    warm_up_s: float,
    run_s: float,
    profile: bool = False,
) -> dict[str, Any]:
    async with aio.connect(address) as client:
        x = rows((await client.model(model)).inputs[0].shape[0], sessions)[:, None]
        opened = [await client.open_session(model) for _ in range(sessions)]
        try:
            meter = Meter(pid, sessions, warm_up_s, run_s)
            counts: collections.Counter[str] = collections.Counter()

            async def load() -> None:
                while meter.more():
                    await asyncio.gather(*(one.step(row) for one, row in zip(opened, x, strict=True)))
                    meter.answered()

            if not profile:
                await load()
                return meter.result()
            with sampled(counts):
                await load()
            parts: collections.Counter[str] = collections.Counter()
            for path, count in counts.items():
                parts[part_of(path)] += count
            total, most = parts.total(), dict(parts.most_common(_SHOWN))
            most["all others"] = total - sum(most.values())
            return meter.result() | {"shares": {name: count / total for name, count in most.items()}}
        finally:
            await asyncio.gather(*(one.close() for one in opened))


async def long(address: str, model: str, steps: int) -> dict[str, Any]:
    async with aio.connect(address, timeout_s=60) as client:
        features = (await client.model(model)).inputs[0].shape[0]
        x = np.random.default_rng(0).standard_normal((1, steps, features), np.float32)
        async with client.open_session(model) as session:
            print("running", flush=True)
            ended = asyncio.create_task(asyncio.to_thread(sys.stdin.read))
            done, began = 0, time.perf_counter()
            while not ended.done():
                await session.step(x, outputs="last")
                done += steps
            return {"rate": done / (time.perf_counter() - began)}


CASES: dict[str, Callable[..., Any]] = {
    "sync": sync,
    "stub": stub,
    "async": async_,
    "aio_stub": aio_stub,
    "gather": gather,
    "group": group,
    "long": long,
}

if __name__ == "__main__":
    outcome = CASES[sys.argv[1]](**json.loads(sys.argv[2]))
    print(json.dumps(asyncio.run(outcome) if asyncio.iscoroutine(outcome) else outcome))
