"""One client process of the comparison: `sdk_client.py CASE JSON` makes the load and prints JSON.

gather   N sessions of the async SDK, all stepped in one asyncio.gather, again and again
group    session groups, each with one call in flight
batch    one session of many rows
long     one session that runs requests of many time steps until stdin ends
echo     ready-made bytes through a bare echo of frames, as many in flight as there are groups
"""

from __future__ import annotations

import asyncio
import json
import sys
import time
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import grpc.aio
import numpy as np

from stepwell import aio

Call = Callable[[], Awaitable[object]]


async def measure(calls: list[Call], steps: int, warm_up_s: float, run_s: float) -> dict[str, float]:
    """Make each call again as soon as it is answered; count `steps` for each."""
    began = time.perf_counter()
    counted_from, until = began + warm_up_s, began + warm_up_s + run_s
    latencies: list[float] = []

    async def line(call: Call) -> None:
        while (sent := time.perf_counter()) < until:
            await call()
            now = time.perf_counter()
            if counted_from <= now < until:
                latencies.append(now - sent)

    before = time.process_time()
    await asyncio.gather(*map(line, calls))
    p50, p99 = np.quantile(latencies, [0.5, 0.99]).tolist() if latencies else (0.0, 0.0)
    return {
        "rate": len(latencies) * steps / run_s,
        "p50_ms": p50 * 1e3,
        "p99_ms": p99 * 1e3,
        "client_cpu_s": time.process_time() - before,
    }


async def features(client: aio.AsyncClient, model: str) -> int:
    return (await client.model(model)).inputs[0].shape[0]


async def gather(
    address: str, model: str, sessions: int, coalesce: bool, warm_up_s: float, run_s: float
) -> dict[str, float]:
    async with aio.connect(address, coalesce=coalesce) as client:
        rows = np.random.default_rng(0).standard_normal(
            (sessions, 1, await features(client, model)), np.float32
        )
        opened = [await client.open_session(model) for _ in range(sessions)]
        try:

            async def together() -> None:
                await asyncio.gather(*(one.step(x) for one, x in zip(opened, rows, strict=True)))

            return await measure([together], sessions, warm_up_s, run_s)
        finally:
            await asyncio.gather(*(one.close() for one in opened))


async def group(
    address: str, model: str, sessions: int, groups: int, warm_up_s: float, run_s: float
) -> dict[str, float]:
    async with aio.connect(address) as client:
        size = sessions // groups
        x = np.random.default_rng(0).standard_normal((size, await features(client, model)), np.float32)
        opened = [await client.open_sessions(model, size) for _ in range(groups)]
        try:
            return await measure([lambda one=one: one.step(x) for one in opened], size, warm_up_s, run_s)  # type: ignore[misc]
        finally:
            await asyncio.gather(*(one.close() for one in opened))


async def batch(address: str, model: str, rows: int, warm_up_s: float, run_s: float) -> dict[str, float]:
    async with aio.connect(address) as client:
        x = np.random.default_rng(0).standard_normal((rows, await features(client, model)), np.float32)
        async with client.open_session(model, batch_size=rows) as session:
            return await measure([lambda: session.step(x)], rows, warm_up_s, run_s)


async def long(address: str, model: str, steps: int) -> dict[str, float]:
    async with aio.connect(address, timeout_s=60) as client:
        x = np.random.default_rng(0).standard_normal((1, steps, await features(client, model)), np.float32)
        async with client.open_session(model) as session:
            print("running", flush=True)
            ended = asyncio.create_task(asyncio.to_thread(sys.stdin.read))
            done, began = 0, time.perf_counter()
            while not ended.done():
                await session.step(x, outputs="last")
                done += steps
            return {"rate": done / (time.perf_counter() - began)}


async def echo(address: str, request: str, groups: int, steps: int, warm_up_s: float, run_s: float) -> Any:
    body = Path(request).read_bytes()  # noqa: ASYNC240 - before the run
    options = [("grpc.max_receive_message_length", -1), ("grpc.max_send_message_length", -1)]
    async with grpc.aio.insecure_channel(address, options=options) as channel:
        streams: list[Any] = [channel.stream_stream("/bench.Echo/Frames")() for _ in range(groups)]

        async def exchange(stream: Any) -> None:
            await stream.write(body)
            await stream.read()

        try:
            calls: list[Call] = [lambda one=one: exchange(one) for one in streams]  # type: ignore[misc]
            return await measure(calls, steps, warm_up_s, run_s)
        finally:
            for stream in streams:
                stream.cancel()


CASES: dict[str, Callable[..., Any]] = {
    "gather": gather,
    "group": group,
    "batch": batch,
    "long": long,
    "echo": echo,
}

if __name__ == "__main__":
    print(json.dumps(asyncio.run(CASES[sys.argv[1]](**json.loads(sys.argv[2])))))
