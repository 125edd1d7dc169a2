"""A call without gRPC: what a handler reads, writes and ends with."""

from __future__ import annotations

import asyncio
from collections import Counter
from typing import Any

import grpc
import grpc.aio

_Trailers = tuple[tuple[str, bytes], ...]


class Aborted(Exception):
    """What `abort` raises, as gRPC's own does."""

    def __init__(self, code: grpc.StatusCode, details: str, trailers: _Trailers) -> None:
        super().__init__(code, details)
        self.code = code
        self.details = details
        self.trailers = trailers


class Requests:
    """A `RequestObserver` that remembers."""

    def __init__(self) -> None:
        self.done: list[tuple[str, str]] = []
        self.refusals: Counter[str] = Counter()

    def request_done(self, method: str, code: str, seconds: float) -> None:
        assert seconds >= 0
        self.done.append((method, code))

    def refused(self, reason: str, count: int) -> None:
        self.refusals[reason] += count


class FakeContext:
    """Stands in for `grpc.aio.ServicerContext`. The client reads while `client_reads` is set."""

    def __init__(self, remaining_s: float | None = None) -> None:
        self.requests: asyncio.Queue[Any] = asyncio.Queue()
        self.replies: asyncio.Queue[bytes] = asyncio.Queue()
        self.client_reads = asyncio.Event()
        self.client_reads.set()
        self.reads = 0
        self._remaining_s = remaining_s

    def send(self, *messages: Any) -> None:
        """The client sends messages; bytes go as they are."""
        for message in messages:
            raw = message if isinstance(message, bytes) else message.SerializeToString()
            self.requests.put_nowait(raw)

    def half_close(self) -> None:
        """The client has nothing more to send."""
        self.requests.put_nowait(grpc.aio.EOF)

    async def read(self) -> Any:
        message = await self.requests.get()
        self.reads += 1
        return message

    async def write(self, reply: bytes) -> None:
        await self.client_reads.wait()
        self.replies.put_nowait(reply)

    async def abort(self, code: grpc.StatusCode, details: str, trailing_metadata: _Trailers = ()) -> None:
        raise Aborted(code, details, trailing_metadata)

    def peer(self) -> str:
        return "fake:1"

    def time_remaining(self) -> float | None:
        return self._remaining_s
