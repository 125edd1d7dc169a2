"""What takes a native front's steps where no engine is behind it: a test says how it answers."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from stepwell_server.addresses import Address
from stepwell_server.clock import SystemClock
from stepwell_server.core.front_limits import FrontLimits
from stepwell_server.core.scheduler import Source
from stepwell_server.engine.api import StepBatch
from stepwell_server.rpc.fronts.base import HttpDoor, HttpListener, Method, StepColumns
from stepwell_server.rpc.status import Code, Status
from support import secured

if TYPE_CHECKING:
    from stepwell_server.rpc.fronts.native import NativeFront


def _refused(message: str) -> Status:
    return Status(Code.RESOURCE_EXHAUSTED, message, ())


class NativeSteps:
    """`base.Steps` with a native front of its own. Subclasses have `take` and the handlers of the methods."""

    traces = False

    def __init__(self, limits: FrontLimits | None = None) -> None:
        from stepwell_server.rpc.fronts import native

        self.front: NativeFront = native.NativeFront(SystemClock(), limits or FrontLimits(1 << 20))
        self.address = ""

    async def serve(self, methods: Sequence[Method], door: HttpDoor | None = None) -> None:
        """Start the front; it takes plain requests as columns. With a door it serves HTTP on another port."""
        here = Address("127.0.0.1", 0)
        http = None if door is None else HttpListener(here, door)
        listening = await self.front.start(here, methods, self, secured.certificates(), http)
        self.address = secured.named(listening)
        self.front.set_fast_path(enabled=True)

    def take(self, columns: StepColumns) -> None:
        raise NotImplementedError

    def run(self, _batch: StepBatch, _columns: Callable[[], StepColumns]) -> bool:
        """Decline: the tests look at columns."""
        return False

    def settle(self) -> None:
        """Do nothing: there is no store."""

    def go(self) -> None:
        """Do nothing: `take` has answered, or the test will."""

    def add_part(self, _source: Source, part: Callable[[], None]) -> None:
        asyncio.get_running_loop().call_soon(part)

    def too_large(self, size: int, limit: int | None = None) -> Status:
        return _refused(f"{size} bytes")

    def overloaded(self) -> Status:
        return _refused("overloaded")

    def headers_too_large(self, limit: int) -> Status:
        return _refused(f"{limit} bytes of headers")

    def duplicate(self, frame_id: int) -> bytes:
        raise AssertionError(f"no test sends a frame with a used id, but {frame_id} came")
