"""The replies of one stream on their way to the client, written without a task of their own.

gRPC's write is a coroutine that hands over the bytes when it is begun, and waits for nothing but the news
that they went out. A task that awaits it costs more than the write. So a write is begun by hand and looked
at when the next reply comes; it is watched only where someone waits for its end: when replies queue up
behind it, when a reader waits for room, when the stream ends.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable, Coroutine
from typing import Any

Write = Callable[[bytes], Coroutine[Any, Any, None]]


class WriteQueue:
    """Writes replies one at a time, in their order. Lives on the event loop."""

    def __init__(
        self, write: Write, on_written: Callable[[int], None], on_progress: Callable[[], None]
    ) -> None:
        """Nothing is on its way.

        Args:
            write: gRPC's own.
            on_written: Called with the size that was given with a reply, once it is written.
            on_progress: Called when what was watched has come to an end, well or not.
        """
        self._write = write
        self._on_written = on_written
        self._on_progress = on_progress
        self._waiting: deque[tuple[bytes, int]] = deque()
        self._begun: Coroutine[Any, Any, None] | None = None
        self._held = 0
        self._end: asyncio.Future[object] | None = None
        """What the write that has begun waits for."""
        self._is_watched = False
        self.error: Exception | None = None
        """Why nothing is written any more."""

    def put(self, reply: bytes, held: int) -> None:
        """Write a reply as soon as those before it are written."""
        if self._begun is None or self.look():
            self._begin(reply, held)
        else:
            self._waiting.append((reply, held))
            self.watch()

    def look(self) -> bool:
        """Take note of what has been written by now; True if that is everything."""
        while self._end is not None and self._end.done():
            self._go_on()
        return self._begun is None

    def watch(self) -> None:
        """Call `on_progress` when the write that has begun ends, if one has."""
        if self._end is not None and not self._is_watched:
            self._is_watched = True
            self._end.add_done_callback(self._ended)

    def close(self) -> None:
        """Give up what is not written, and call nobody any more."""
        self._waiting.clear()
        if not self.look() and self._begun is not None and self._end is not None:
            self._end.cancel()
            self._begun.close()
            self._begun = self._end = None
        self._on_written, self._on_progress = (
            _ignore_size,
            _ignore,
        )  # they hold the stream, and that this queue

    def _begin(self, reply: bytes, held: int) -> None:
        if self.error is not None:
            return
        self._held = held
        self._begun = self._write(reply)
        self._go_on()

    def _go_on(self) -> None:
        """Take the write that has begun further, and begin those behind it as far as none of them waits."""
        while self._begun is not None:
            try:
                self._end = self._begun.send(None)
                self._is_watched = False
                return
            except StopIteration:
                self._begun = self._end = None
            except Exception as error:  # the client is gone, or the call is over
                self._begun = self._end = None
                self.error = error
                self._waiting.clear()
                return
            self._on_written(self._held)
            if self._waiting and self._begun is None:
                reply, self._held = self._waiting.popleft()
                self._begun = self._write(reply)

    def _ended(self, end: asyncio.Future[object]) -> None:
        if end is self._end and not self.look():
            self.watch()
        self._on_progress()


def _ignore() -> None:
    pass


def _ignore_size(_: int) -> None:
    pass
