"""A call without a front: what a servicer reads and writes."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

from stepwell_server.rpc.fronts.base import SessionSet


class Requests:
    """A `RequestObserver` that remembers."""

    def __init__(self) -> None:
        self.done: list[tuple[str, str]] = []
        self.refusals: Counter[str] = Counter()

    def request_done(self, method: str, code: str, seconds: float) -> None:
        assert seconds >= 0
        self.done.append((method, code))

    def requests_done(self, method: str, code: str, seconds: npt.NDArray[np.float64]) -> None:
        for each in seconds.tolist():
            self.request_done(method, code, each)

    def refused(self, reason: str, count: int) -> None:
        self.refusals[reason] += count


class FakeCall:
    """A `fronts.base.Call`. The client reads while `client_reads` is set."""

    def __init__(
        self, request: bytes = b"", *, deadline: float = float("inf"), is_late: bool = False
    ) -> None:
        self.request = request
        self.caller = "fake:1"
        self.deadline = deadline
        self.is_late = is_late
        self.certificate_names: list[str] = []
        self.metadata: Mapping[str, str | bytes] = {}
        self.requests: asyncio.Queue[bytes | None] = asyncio.Queue()
        self.replies: asyncio.Queue[bytes] = asyncio.Queue()
        self.client_reads = asyncio.Event()
        self.client_reads.set()
        self.reads = 0
        self.sets: dict[int, SessionSet] = {}

    def send(self, *messages: Any) -> None:
        """The client sends messages; bytes go as they are."""
        for message in messages:
            raw = message if isinstance(message, bytes) else message.SerializeToString()
            self.requests.put_nowait(raw)

    def half_close(self) -> None:
        """The client has nothing more to send."""
        self.requests.put_nowait(None)

    async def read(self) -> bytes | None:
        message = await self.requests.get()
        self.reads += 1
        return message

    async def write(self, reply: bytes) -> None:
        await self.client_reads.wait()
        self.replies.put_nowait(reply)

    def know_set(self, number: int, known: SessionSet | None) -> None:
        if known is None:
            del self.sets[number]
        else:
            self.sets[number] = known
