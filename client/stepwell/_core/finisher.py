"""Runs flows in the background, such as closing a session whose opening was given up.

The sync client runs them in a thread, the async client in a task: one after the other, so that they add little load
to a server in trouble. This is best effort: a flow that fails is dropped, and closing the client gives the rest
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

from stepwell._base.flow import Flow, Pause, drive, drive_async
from stepwell._core.lanes import Ask
from stepwell._transport.call import Call, Endpoint
from stepwell._transport.channel import SyncTransport, closed
from stepwell.config import ClientConfig
from stepwell.errors import StepwellError

#: How long a flow may retry, in seconds, counted from when the caller gave up: long enough for a server to restart.
TRY_FOR_S = 300.0
#: How much longer closing a client may take because of unfinished flows, in seconds.
GRACE_S = 1.0

_open: weakref.WeakSet[Finisher] = weakref.WeakSet()
# A forked child must not wait for its parent's threads.
os.register_at_fork(after_in_child=_open.clear)


class Finisher:
    """Runs flows one after the other, in a thread that ends when there are none. Thread-safe.

    It has a channel of its own. Ctrl-C may have come while the main thread held a lock of gRPC's channel
    (a Python `threading.Condition`), and then that channel never makes a call again.
    """

    def __init__(self, config: ClientConfig) -> None:
        self._config = config
        self._flows: deque[Flow[None]] = deque()
        self._lock = threading.Lock()
        self._thread: threading.Thread | None = None
        self._transports: dict[Endpoint | None, SyncTransport] = {}
        self._closing = threading.Event()

    def add(self, flow: Flow[None]) -> None:
        """Queues a flow; returns at once."""
        with self._lock:
            if self._closing.is_set():
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
            if self._flows and not self._closing.is_set():
                return self._flows.popleft()
            self._thread = None
            transports, self._transports = self._transports, {}
        for transport in transports.values():
            transport.close()
        return None

    def _answer(self, ask: Ask) -> Any:
        if isinstance(ask, Call):
            return self._channel(ask.to).invoke(ask)
        if isinstance(ask, Pause) and not self._closing.wait(ask.seconds):
            return None
        raise closed()

    def _channel(self, replica: Endpoint | None) -> SyncTransport:
        with self._lock:
            if self._closing.is_set():
                raise closed()
            if replica not in self._transports:
                self._transports[replica] = SyncTransport(self._config, endpoint=replica)
            return self._transports[replica]

    def close(self) -> None:
        """Waits up to `GRACE_S` for the queued flows, then ends them."""
        with self._lock:
            thread = self._thread
            if thread is None:
                self._closing.set()
                return
        thread.join(GRACE_S)
        with self._lock:
            self._closing.set()
            transports = list(self._transports.values())
        for transport in transports:
            transport.close()
        thread.join()


class AsyncFinisher:
    """Runs flows one after the other, in a task that ends when there are none. Belongs to one event loop."""

    def __init__(self, answer: Callable[[Ask], Awaitable[Any]]) -> None:
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
