"""Writers of the log: the native one if it is installed, else a thread of Python.

The native one never waits for Python's lock. This is the only module of the store that imports `stepwell_front`.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence

from typing_extensions import override

from stepwell._admin.record_file import HEAD
from stepwell_server.process.thread_names import name_thread
from stepwell_server.store.base import LogWrite, LogWriter
from stepwell_server.store.disk.wal.segment import SegmentWrite

try:
    from stepwell_front import LogWriter as _Native

    _Native.withdraw  # noqa: B018
except (ImportError, AttributeError):  # it is not installed, or older
    _Native = None  # type: ignore[assignment, misc]

NATIVE = _Native
"""None: it is not installed."""


def new_writer(descriptors: Sequence[int], on_end: Callable[[], None]) -> LogWriter:
    """Return a writer for some files. `on_end` is called on the running event loop after each write."""
    return ThreadWriter(on_end) if NATIVE is None else NativeWriter(descriptors, on_end)


class NativeWriter(LogWriter):
    """A thread of the native module. Its end of a write wakes the event loop through a descriptor."""

    def __init__(self, descriptors: Sequence[int], on_end: Callable[[], None]) -> None:
        assert NATIVE is not None, "checked before"
        self._loop = asyncio.get_running_loop()
        self._on_end = on_end
        self._writer = NATIVE(descriptors)
        self._loop.add_reader(self._writer.fd(), on_end)

    @override
    def begin(self, write: LogWrite, steps: Sequence[object] = ()) -> None:
        assert isinstance(write, SegmentWrite), "the log makes no others"
        self._writer.write(write.segment.descriptor, write.data, write.at, write.heads, HEAD.size, steps)

    @override
    def withdraw(self) -> bool:
        return self._writer.withdraw()

    @override
    def take(self) -> tuple[Exception | None, float] | None:
        ended = self._writer.take()
        if ended is None:
            return None
        code, seconds = ended
        return OSError(code, os.strerror(code)) if code else None, seconds

    @override
    def close(self, timeout_s: float) -> bool:
        if not self._writer.close(timeout_s):
            return False
        with contextlib.suppress(RuntimeError):  # the event loop was closed
            self._loop.call_soon_threadsafe(self._stop_polling)
        return True

    def _stop_polling(self) -> None:
        self._loop.remove_reader(self._writer.fd())
        self._on_end()


class ThreadWriter(LogWriter):
    """A thread of Python. It answers nobody: the event loop does."""

    def __init__(self, on_end: Callable[[], None]) -> None:
        self._loop = asyncio.get_running_loop()
        self._on_end = on_end
        self._changed = threading.Condition()
        # held while the following are used
        self._waiting: deque[LogWrite] = deque()
        self._ended: deque[tuple[Exception | None, float]] = deque()
        self._is_running = self._is_closed = False
        # a daemon: a disk that hangs must not keep the process from ending
        self._thread = threading.Thread(target=self._run, name="stepwell-store-log", daemon=True)
        self._thread.start()

    @override
    def begin(self, write: LogWrite, steps: Sequence[object] = ()) -> None:
        with self._changed:
            problem = next((error for error, _ in self._ended if error is not None), None)
            if problem is None:
                self._waiting.append(write)
                self._changed.notify()
            else:
                self._ended.append((problem, 0.0))  # the loop has yet to be called for the failed one

    @override
    def withdraw(self) -> bool:
        with self._changed:
            if not self._waiting or (len(self._waiting) == 1 and not self._is_running):
                return False
            self._waiting.pop()
            return True

    @override
    def take(self) -> tuple[Exception | None, float] | None:
        with self._changed:
            return self._ended.popleft() if self._ended else None

    @override
    def close(self, timeout_s: float) -> bool:
        with self._changed:
            self._is_closed = True
            self._changed.notify()
        self._thread.join(timeout_s)
        return not self._thread.is_alive()

    def _run(self) -> None:
        name_thread()
        while (write := self._next()) is not None:
            problem: Exception | None = None
            started = time.perf_counter()
            try:
                write.make()
            except Exception as error:
                problem = error
            self._end(problem, time.perf_counter() - started)
            with contextlib.suppress(RuntimeError):  # the event loop was closed
                self._loop.call_soon_threadsafe(self._on_end)

    def _next(self) -> LogWrite | None:
        with self._changed:
            self._changed.wait_for(lambda: self._waiting or self._is_closed)
            self._is_running = bool(self._waiting)
            return self._waiting.popleft() if self._waiting else None

    def _end(self, problem: Exception | None, seconds: float) -> None:
        with self._changed:
            self._is_running = False
            self._ended.append((problem, seconds))
            if problem is not None:  # the next one would be found behind a gap, as in `begin`
                self._ended.extend((problem, 0.0) for _ in self._waiting)
                self._waiting.clear()
