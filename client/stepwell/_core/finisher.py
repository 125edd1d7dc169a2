"""Runs flows in the background, such as closing a session that was abandoned while it was opened.

The sync client runs them in a thread, the async client in a task, one after the other, so that they add little load
to a server in trouble. This is best effort: a flow that fails is dropped. Closing the client gives the rest
`GRACE_S`, then ends them.
"""

from __future__ import annotations

import asyncio
import atexit
import contextlib
import os
import threading
import weakref
from collections import deque
from collections.abc import Awaitable, Callable
from typing import Any

from stepwell._base.flow import Flow, drive, drive_async
from stepwell.errors import StepwellError

#: How long a flow may retry, in seconds, counted from when the caller gave up: long enough for a server to restart.
TRY_FOR_S = 300.0
#: How much longer closing a client may take because of unfinished flows, in seconds.
GRACE_S = 1.0

_open: weakref.WeakSet[Finisher] = weakref.WeakSet()
# A forked child must not wait for its parent's threads.
os.register_at_fork(after_in_child=_open.clear)


class Finisher:
    """Runs flows one after the other, in a thread that ends when there are none. Thread-safe."""

    def __init__(self, answer: Callable[[Any], Any], end: Callable[[], None]) -> None:
        """The finisher of a client.

        Args:
            answer: Answers the asks of a flow.
            end: Ends the client's connections, so that the running flow ends too.
        """
        self._answer = answer
        self._end = end
        self._flows: deque[Flow[None]] = deque()
        self._lock = threading.Lock()
        self._thread: threading.Thread | None = None
        self._is_closed = False

    def add(self, flow: Flow[None]) -> None:
        """Queues a flow; returns at once."""
        with self._lock:
            if self._is_closed:
                return
            self._flows.append(flow)
            if self._thread is None:
                self._thread = threading.Thread(target=self._work, name="stepwell-finisher", daemon=True)
                self._thread.start()
                _open.add(self)

    def _work(self) -> None:
        while (flow := self._next()) is not None:
            with contextlib.suppress(StepwellError):
                drive(flow, self._answer)

    def _next(self) -> Flow[None] | None:
        with self._lock:
            if self._flows and not self._is_closed:
                return self._flows.popleft()
            self._thread = None
            return None

    def close(self) -> None:
        """Waits up to `GRACE_S` for the queued flows, then ends them and the client's connections."""
        thread = self._thread
        if thread is not None:
            thread.join(GRACE_S)
        with self._lock:
            self._is_closed = True
        self._end()
        if thread is not None:
            thread.join()


class AsyncFinisher:
    """Runs flows one after the other, in a task that ends when there are none. Belongs to one event loop."""

    def __init__(self, answer: Callable[[Any], Awaitable[Any]]) -> None:
        self._answer = answer
        self._flows: deque[Flow[None]] = deque()
        self._task: asyncio.Task[None] | None = None
        self._closed = False

    def add(self, flow: Flow[None]) -> None:
        """Queues a flow; returns at once."""
        if not self._closed:
            self._flows.append(flow)
            if self._task is None or self._task.done():
                self._task = asyncio.create_task(self._work(), name="stepwell-finisher")

    async def _work(self) -> None:
        while self._flows and not self._closed:
            with contextlib.suppress(StepwellError):
                await drive_async(self._flows.popleft(), self._answer)

    async def close(self) -> None:
        """Waits up to `GRACE_S` for the queued flows, then ends them."""
        if self._task is not None:
            await asyncio.wait([self._task], timeout=GRACE_S)
        self._closed = True
        if self._task is not None:
            self._task.cancel()
            await asyncio.wait([self._task])


@atexit.register
def _close_finishers() -> None:
    for finisher in list(_open):
        finisher.close()
