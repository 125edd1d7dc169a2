"""The load generator in Python, for machines without a C++ compiler; arguments and result as load.cc has them.

Lines of calls are spread over processes, so that one of them is not the limit.
"""

from __future__ import annotations

import asyncio
import json
import multiprocessing
import struct
import sys
import time
from pathlib import Path
from typing import Any

import grpc.aio
import numpy as np

PROCESSES = 2


def read_requests(path: Path) -> list[bytes]:
    """The requests of a file: each a u32 length and that many bytes."""
    data, start, requests = path.read_bytes(), 0, []
    while start < len(data):
        (size,) = struct.unpack_from("<I", data, start)
        requests.append(data[start + 4 : start + 4 + size])
        start += 4 + size
    return requests


def write_requests(path: Path, requests: list[bytes]) -> None:
    """Write such a file."""
    path.write_bytes(b"".join(struct.pack("<I", len(one)) + one for one in requests))


class Lines:
    """The lines of one process."""

    def __init__(self, method: str, streams: bool, until: float, counted_from: float) -> None:
        self._method, self._streams = method, streams
        self._until, self._counted_from = until, counted_from
        self.latencies: list[float] = []
        self.errors: list[str] = []

    async def run(self, address: str, requests: list[bytes]) -> None:
        options = [("grpc.max_receive_message_length", -1)]
        async with grpc.aio.insecure_channel(address, options=options) as channel:
            line = self._stream if self._streams else self._unary
            await asyncio.gather(*(line(channel, request) for request in requests))

    async def _unary(self, channel: grpc.aio.Channel, request: bytes) -> None:
        call: Any = channel.unary_unary(self._method)
        while (began := time.monotonic()) < self._until:
            try:
                await call(request, timeout=30)
            except grpc.RpcError as error:
                self.errors.append(str(error))
                continue
            self._count(began)

    async def _stream(self, channel: grpc.aio.Channel, request: bytes) -> None:
        stream: Any = channel.stream_stream(self._method)()
        while (began := time.monotonic()) < self._until:
            await stream.write(request)
            if await stream.read() is grpc.aio.EOF:
                self.errors.append("a stream ended")
                return
            self._count(began)
        stream.cancel()

    def _count(self, began: float) -> None:
        now = time.monotonic()
        if self._counted_from <= now < self._until:
            self.latencies.append(now - began)


def run_lines(
    address: str, method: str, streams: bool, requests: list[bytes], times: tuple[float, float]
) -> tuple[list[float], list[str], float]:
    """One process: what it measured, and its processor time."""
    lines = Lines(method, streams, until=times[1], counted_from=times[0])
    asyncio.run(lines.run(address, requests))
    return lines.latencies, lines.errors, time.process_time()


def main(address: str, method: str, kind: str, path: str, warm_up: str, run: str) -> None:
    warm_up_s, run_s = float(warm_up), float(run)
    requests = read_requests(Path(path))
    count = min(PROCESSES, len(requests))
    counted_from = time.monotonic() + 0.5 + warm_up_s  # the processes need a moment to begin
    times = (counted_from, counted_from + run_s)
    work = [(address, method, kind == "stream", requests[i::count], times) for i in range(count)]
    with multiprocessing.get_context("spawn").Pool(count) as pool:
        results = pool.starmap(run_lines, work)
    latencies = np.array([one for result in results for one in result[0]]) * 1e3
    errors = [one for result in results for one in result[1]]
    p50, p90, p99 = np.quantile(latencies, [0.5, 0.9, 0.99]).tolist() if latencies.size else (0.0, 0.0, 0.0)
    document = {
        "calls": latencies.size,
        "seconds": run_s,
        "rate": latencies.size / run_s,
        "p50_ms": p50,
        "p90_ms": p90,
        "p99_ms": p99,
        "errors": len(errors),
        "first_error": errors[0] if errors else "",
        "client_cpu_s": sum(result[2] for result in results),
    }
    print(json.dumps(document))


if __name__ == "__main__":
    main(*sys.argv[1:7])
