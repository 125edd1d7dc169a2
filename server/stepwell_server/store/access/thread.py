"""A thread that has a store to itself, and what waits for it."""

from __future__ import annotations

import enum
import queue
import threading
from collections.abc import Callable, Sequence

from stepwell_server.store.access.batches import MAX_RECORDS
from stepwell_server.store.base import Write


class _Signal(enum.Enum):
    """What a thread finds in its queue beside writes."""

    WAKE = enum.auto()
    END = enum.auto()


class StoreThread:
    """A thread, once there is something for it, and what waits for it."""

    def __init__(self, name: str, work: Callable[[Sequence[Write]], bool]) -> None:
        """`work` is called on the thread with the writes that are done together; it returns False to end the thread."""
        self._name = name
        self._work = work
        self._queue: queue.SimpleQueue[Write | _Signal] = queue.SimpleQueue()
        self._is_woken = False
        self._thread: threading.Thread | None = None

    def put(self, write: Write) -> None:
        """Add a write to the queue."""
        self._queue.put(write)
        self._start()

    def wake(self) -> None:
        """Call `work` soon, maybe with nothing."""
        if not self._is_woken:
            self._is_woken = True
            self._queue.put(_Signal.WAKE)
            self._start()

    def close(self, timeout_s: float) -> bool:
        """End when all is done that was put before; False if that takes longer."""
        self._queue.put(_Signal.END)
        if self._thread is not None:
            self._thread.join(timeout_s)
        return self._thread is None or not self._thread.is_alive()

    def _start(self) -> None:
        if self._thread is None:
            # a daemon: a store that never comes back must not keep the process from ending
            self._thread = threading.Thread(target=self._run, name=self._name, daemon=True)
            self._thread.start()

    def _run(self) -> None:
        is_end = False
        while not is_end:
            writes, is_end = self._take()
            if (writes or not is_end) and not self._work(writes):
                return

    def _take(self) -> tuple[list[Write], bool]:
        """The writes that are done next, together, and whether this is the end."""
        writes: list[Write] = []
        size = 0
        while True:
            found = self._queue.get()
            if found is _Signal.END:
                return writes, True
            if isinstance(found, Write):
                writes.append(found)
                size += found.size
            else:
                self._is_woken = False
            if size >= MAX_RECORDS or self._queue.empty():
                return writes, False
