"""A watch of the sync client."""

from __future__ import annotations

import collections
import threading
import weakref
from collections.abc import Callable, Iterator, Sequence
from types import TracebackType
from typing import Any, Generic, Self, TypeVar

from stepwell._base.flow import drive
from stepwell._base.tracebacks import end_here
from stepwell._core.driver import Driver
from stepwell._watch.core import WatchCore
from stepwell.errors import StepwellError

T = TypeVar("T")
#: Replies that wait for the program before the streams are no longer read. The server then drops events.
_MAX_WAITING = 16


@end_here
class Watch(Iterator[T], Generic[T]):
    """What a watch reports: an iterator that waits for the next event. Close it, or use it in a `with` block.

    It ends when the last of its sessions has ended. After a lost connection it continues where the server is then, and
    `SessionEvent.skipped_revisions` counts what it missed. If your program reads too slowly, the server drops events and
    counts them. Safe to use from many threads at once: each event is returned once.

    Example:
        >>> with client.watch_sessions([session.id], outputs=True) as watch:
        ...     first = next(watch)
        ...     y = session.step(np.ones((1, 3), np.float32))
        ...     event = next(watch)
        >>> first.kind, event.kind, event.outputs["y"].shape
        ('present', 'step', (1, 1))
    """

    def __init__(self, driver: Driver, core: WatchCore[T]) -> None:
        self._reader = _Reader(driver, core)
        # The threads hold no reference to this object, so that a watch which was not closed can be collected. They end then.
        weakref.finalize(self, self._reader.close).atexit = False

    def __iter__(self) -> Self:
        return self

    def __next__(self) -> T:
        return self._reader.next()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Ends the watch. A thread that waits for its next event gets `StopIteration`.

        Example:
            >>> watch = session.watch()
            >>> next(watch).kind
            'present'
            >>> watch.close()
        """
        self._reader.close()


class _Reader(Generic[T]):
    """Reads the streams of a watch in threads. Thread-safe."""

    def __init__(self, driver: Driver, core: WatchCore[T]) -> None:
        self._driver = driver
        self._core = core
        self._changed = threading.Condition()
        self._values: collections.deque[Sequence[T]] = collections.deque()
        self._next: collections.deque[T] = collections.deque()
        self._cancels: dict[int, Callable[[], object]] = {}
        self._streams = 0
        self._error: BaseException | None = None
        self._is_closed = False
        for ids in core.streams():
            self._begin(ids)

    def next(self) -> T:
        """Waits for the next event.

        Raises:
            StopIteration: There is none.
            StepwellError: The server refuses the watch, or cannot be reached.
        """
        with self._changed:
            while not self._next:
                if self._values:
                    self._next.extend(self._values.popleft())
                    self._changed.notify_all()
                    continue
                if self._is_closed:
                    raise StopIteration
                if self._error is not None:
                    error, self._error, self._is_closed = self._error, None, True
                    raise error
                if not self._streams:
                    raise StopIteration
                self._changed.wait()
            return self._next.popleft()

    def close(self) -> None:
        """Ends all streams."""
        with self._changed:
            self._is_closed = True
            self._values.clear()
            cancels = list(self._cancels.values())
            self._changed.notify_all()
        for cancel in cancels:
            cancel()

    def _begin(self, ids: Sequence[str]) -> None:
        """Reads a stream in a thread."""
        with self._changed:
            self._streams += 1
        threading.Thread(target=self._read, args=(ids,), name="stepwell-watch", daemon=True).start()

    def _read(self, ids: Sequence[str]) -> None:
        def opened(cancel: Callable[[], object]) -> None:
            with self._changed:
                self._cancels[me] = cancel
                is_closed = self._is_closed
            if is_closed:
                cancel()

        me, error = threading.get_ident(), None
        try:
            drive(self._core.follow(ids, self._take, opened, self._begin), self._answer)
        except Exception as failed:  # else the program would wait forever
            error = failed
        with self._changed:
            self._cancels.pop(me, None)
            self._streams -= 1
            if not self._is_closed:
                self._error = self._error or error
            self._changed.notify_all()

    def _answer(self, ask: Any) -> Any:
        if self._is_closed:
            raise _Closed("the watch was closed")
        return self._driver.answer(ask)

    def _take(self, reply: Any) -> None:
        with self._changed:
            while len(self._values) >= _MAX_WAITING and not self._is_closed:
                self._changed.wait()
            if self._is_closed:
                raise _Closed("the watch was closed")
            if values := self._core.values(reply):
                self._values.append(values)
                self._changed.notify_all()


class _Closed(StepwellError):
    """The watch was closed. Never raised to users."""
