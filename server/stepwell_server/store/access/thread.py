"""A thread with a queue of writes."""

from __future__ import annotations

import enum
import queue
import threading
from collections.abc import Callable, Sequence

from stepwell_server.process.thread_names import name_thread
from stepwell_server.store.access.batches import MAX_RECORDS
from stepwell_server.store.base import Write


class _Signal(enum.Enum):
    """Entries of the queue that are not writes."""

    WAKE = enum.auto()
    END = enum.auto()


class StoreThread:
    """A thread and its queue. It starts with the first entry."""

    def __init__(self, name: str, work: Callable[[Sequence[Write]], bool]) -> None:
        """`work` runs on the thread, with the writes to process together; it returns False to end the thread."""
        self._name = name
        self._work = work
        self._queue: queue.SimpleQueue[Write | _Signal] = queue.SimpleQueue()
        self._is_woken = False
        self._thread: threading.Thread | None = None
        self._closing = threading.Lock()
        self._is_closed = False

    def put(self, write: Write) -> bool:
        """Add a write to the queue; return False if the thread takes no more, because `close` was called."""
        with self._closing:
            if self._is_closed:
                return False
            self._queue.put(write)
        self._start()
        return True

    def wake(self) -> None:
        """Call `work` soon, possibly without writes."""
        if not self._is_woken:
            self._is_woken = True
            self._queue.put(_Signal.WAKE)
            self._start()

    def close(self, timeout_s: float) -> bool:
        """End after all writes put so far; return False if that takes longer than `timeout_s`."""
        with self._closing:
            self._is_closed = True
            self._queue.put(_Signal.END)
        if self._thread is not None:
            self._thread.join(timeout_s)
        return self._thread is None or not self._thread.is_alive()

    def _start(self) -> None:
        if self._thread is None:
            # a daemon: a store that hangs must not keep the process from ending
            self._thread = threading.Thread(target=self._run, name=self._name, daemon=True)
            self._thread.start()

    def _run(self) -> None:
        name_thread()
        is_end = False
        while not is_end:
            writes, is_end = self._take()
            if (writes or not is_end) and not self._work(writes):
                return

    def _take(self) -> tuple[list[Write], bool]:
        """Return the next writes to process together, and whether the thread ends after them."""
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
