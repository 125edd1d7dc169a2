"""A thread that has a store to itself, and what waits for it."""

from __future__ import annotations

import enum
import queue
import threading
from collections.abc import Callable, Sequence
from typing import Generic, Protocol, TypeVar


class Waiting(Protocol):
    """What waits for the thread."""

    size: int
    passes: bool
    """It came here before others."""

    @property
    def is_small(self) -> bool:
        """It takes little time."""


T = TypeVar("T", bound=Waiting)


class _Signal(enum.Enum):
    """What a thread finds in its queue beside items."""

    WAKE = enum.auto()
    END = enum.auto()


class StoreThread(Generic[T]):
    """A thread, once there is something for it, and what waits for it."""

    def __init__(
        self,
        name: str,
        work: Callable[[Sequence[T]], bool],
        goes_along: Callable[[Sequence[T], int, T], bool],
    ) -> None:
        """Both are called on the thread.

        Args:
            name: Of the thread.
            work: Gets what is done together; it returns False to end the thread.
            goes_along: Whether what was found next is done together with what was taken, and what the size of that is.
        """
        self._name = name
        self._work = work
        self._goes_along = goes_along
        self._queue: queue.SimpleQueue[T | _Signal] = queue.SimpleQueue()
        self._is_woken = False
        self._small_put = self._small_taken = 0
        self._next: T | None = None
        """It was found, and is done after what was taken."""
        self._thread: threading.Thread | None = None

    @property
    def has_small(self) -> bool:
        """Something small waits that came here at once."""
        return self._small_put > self._small_taken

    def put(self, item: T) -> None:
        """Have something done."""
        if item.is_small and not item.passes:  # of one thread alone, which so can count
            self._small_put += 1
        self._queue.put(item)
        self._start()

    def wake(self) -> None:
        """Have `work` called soon, maybe with nothing."""
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
        goes_on = True
        while goes_on:
            items, is_end = self._take()
            if items or not is_end:
                goes_on = self._work(items) and not is_end
            else:
                goes_on = False

    def _take(self) -> tuple[list[T], bool]:
        """What is done next, together, and whether it is the end."""
        items: list[T] = []
        size = 0
        while True:
            found = self._next or self._queue.get()
            self._next = None
            if found is _Signal.END:
                return items, True
            if isinstance(found, _Signal):
                self._is_woken = False
            elif items and not self._goes_along(items, size, found):
                self._next = found
                return items, False
            else:
                items.append(found)
                size += found.size
                self._small_taken += found.is_small and not found.passes
            if self._queue.empty():
                return items, False
