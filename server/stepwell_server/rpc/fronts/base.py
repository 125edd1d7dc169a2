"""What a front is, and what a servicer gets of a call: bytes, a caller, a deadline, ways to answer."""

from __future__ import annotations

import dataclasses
from collections.abc import Awaitable, Callable, Coroutine, Mapping, Sequence
from typing import Any, Protocol

from stepwell_server.rpc.status import Status


class BindError(Exception):
    """A front cannot listen where it was told to."""


class CallEnded(Exception):
    """A call ends with this status, and without a reply."""

    def __init__(self, status: Status) -> None:
        super().__init__(status.code.name, status.message)
        self.status = status


class Call(Protocol):
    """A call on its way. It is served by a task, which the front cancels when its client is gone or its time is over."""

    @property
    def caller(self) -> str:
        """Who calls: the same for all calls of one connection. The one place that says so."""

    @property
    def deadline(self) -> float:
        """On the clock's monotonic time; infinity if it has none."""

    @property
    def is_late(self) -> bool:
        """Its deadline has passed."""

    @property
    def metadata(self) -> Mapping[str, str | bytes]:
        """What the client sent beside its messages, by lower-case key; the last value of each."""

    @property
    def request(self) -> bytes:
        """The one request; empty where requests are read."""

    async def read(self) -> bytes | None:
        """The next request of a stream; None when the client has sent its last one."""

    def write(self, reply: bytes) -> Coroutine[Any, Any, None]:
        """Send a reply of a stream. It is begun when the coroutine is, and ends when the reply is on its way."""


@dataclasses.dataclass(frozen=True, slots=True)
class Method:
    """One method of a service."""

    service: str
    """Full name, `stepwell.v1.SessionService`."""
    name: str
    serve: Callable[[Call], Awaitable[bytes]]
    """Answers a call; what it returns is the reply of one that does not stream, and else empty.

    Raises `CallEnded`, and `asyncio.CancelledError` where the front cancelled its task; nothing else.
    """
    streams: bool = False
    """Its requests are read and its replies written; else there is one of each."""


class Front(Protocol):
    """Serves methods on one address. Lives on the event loop; started and stopped once."""

    async def start(self, host: str, port: int, methods: Sequence[Method]) -> int:
        """Listen and serve. Returns the port, which the system chooses if `port` is 0.

        Raises:
            BindError: the address is taken, or not one of this machine's.
        """

    async def stop(self, grace_s: float) -> None:
        """Stop listening; cut off calls that still run after the time given."""
