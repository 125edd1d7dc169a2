"""Errors of steps that a front refuses itself, and the steps of a server that has no engine yet."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Hashable
from typing import TYPE_CHECKING

from stepwell_server.errors import Overloaded, RequestTooLarge
from stepwell_server.rpc.status import Status, to_status
from stepwell_server.rpc.steps import messages

if TYPE_CHECKING:
    from stepwell_server.engine.api import StepBatch
    from stepwell_server.rpc.boundary import RequestObserver
    from stepwell_server.rpc.fronts.base import Rest, StepColumns, Steps

_RETRY_AFTER_S = 0.2


class Refusals:
    """The part of `base.Steps` that needs no engine."""

    def __init__(self, max_message_bytes: int, observer: RequestObserver) -> None:
        self._max_message_bytes = max_message_bytes
        self._observer = observer

    def too_large(self, size: int, limit: int | None = None) -> Status:
        """See `base.Steps`."""
        error = RequestTooLarge(
            "the request must fit the size limits of client and server (max_message_bytes);"
            f" got a message larger than max: {size} vs. {limit or self._max_message_bytes} bytes"
        )
        self._observer.refused(error.reason, 1)
        return to_status(error)

    def overloaded(self) -> Status:
        """See `base.Steps`."""
        return to_status(
            Overloaded(
                "running calls must fit into the server's memory with their requests and replies; there is no room for this one",
                retry_after_s=_RETRY_AFTER_S,
            )
        )

    def headers_too_large(self, limit: int) -> Status:
        """See `base.Steps`."""
        return to_status(RequestTooLarge(f"the headers of a call must have at most {limit} bytes; got more"))

    def duplicate(self, frame_id: int) -> bytes:
        """See `base.Steps`."""
        error = messages.same_frame_id(frame_id)
        self._observer.refused(error.reason, 1)
        return messages.failed_part(frame_id, None, error, last=True)


class EarlySteps(Refusals):
    """`base.Steps` of a server that has no engine yet. No steps arrive before `go_to`."""

    go: Callable[[], None]
    settle: Callable[[], None]
    add_part: Callable[[tuple[Hashable, ...], Callable[[], None]], object]
    take: Callable[[StepColumns], Rest | None]
    run: Callable[[StepBatch, Callable[[], StepColumns]], bool]

    def __init__(self, max_message_bytes: int, observer: RequestObserver, *, traces: bool) -> None:
        super().__init__(max_message_bytes, observer)
        self.traces = traces
        self.go = self.settle = lambda: None
        self.add_part = lambda _source, part: asyncio.get_running_loop().call_soon(part)

    def go_to(self, steps: Steps) -> None:
        """Pass steps on to these from now on."""
        self.go, self.add_part, self.take = steps.go, steps.add_part, steps.take
        self.run, self.settle = steps.run, steps.settle
