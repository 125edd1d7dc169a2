"""A call without a front, as a servicer reads and writes it."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Collection, Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

from stepwell_server.core.callers import ANYBODY
from stepwell_server.errors import ServerError
from stepwell_server.rpc.fronts.base import Durations


class Requests:
    """A `RequestObserver` that remembers."""

    def __init__(self) -> None:
        self.done: list[tuple[str, str]] = []
        self.refusals: Counter[str] = Counter()
        self.refused_models: set[str] = set()
        """Of what was refused, as far as it was said."""
        self.streams: Counter[str] = Counter()
        """Streams that are open."""
        self.messages: list[float] = []
        """Seconds from the coming of each message of a stream to its answer."""
        self._codes: dict[str, Collection[str]] = {}

    def method_served(self, method: str, codes: Collection[str], *, streams: bool) -> None:
        self._codes[method] = codes

    def request_done(self, method: str, code: str, seconds: float) -> None:
        assert seconds >= 0
        self._done(method, code)

    def _done(self, method: str, code: str) -> None:
        assert method not in self._codes or code in self._codes[method], "metrics know of no such end"
        self.done.append((method, code))

    def requests_done(self, method: str, code: str, seconds: npt.NDArray[np.float64]) -> None:
        for each in seconds.tolist():
            self.request_done(method, code, each)

    def stream_began(self, method: str) -> None:
        self.streams[method] += 1

    def stream_done(self, method: str, code: str) -> None:
        self.streams[method] -= 1
        self._done(method, code)

    def messages_done(self, method: str, seconds: npt.NDArray[np.float64]) -> None:
        assert method in {"StepStream", "ModelStreamInfer"}
        assert (seconds >= 0).all()
        self.messages += seconds.tolist()

    def answered(self, method: str, stream_method: str, calls: Durations, messages: Durations) -> None:
        """Not called: only a scrape counts what the native front has answered itself."""

    def refused(self, reason: str, count: int, model: str = "") -> None:
        self.refusals[reason] += count
        self.refused_models.add(model)


class FakeCall:
    """A `fronts.base.Call`. The client reads while `client_reads` is set."""

    def __init__(
        self, request: bytes = b"", *, deadline: float = float("inf"), is_late: bool = False
    ) -> None:
        self.request = request
        self.refusal: ServerError | None = None
        self.who = ANYBODY
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

    @property
    def metadata_keys(self) -> list[str]:
        return list(self.metadata)

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
