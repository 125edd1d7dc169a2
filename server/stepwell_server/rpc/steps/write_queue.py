"""Writes the replies of one stream to the client, without a task.

gRPC's write is a coroutine that hands over the bytes when it starts, and then only waits until they are sent. A task that
awaits it costs more than the write. So this module starts a write by hand and checks it when the next reply arrives. It
watches a write only if something waits for its end: queued replies, a reader that waits for room, the end of the stream.
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
        """Create an empty queue.

        Args:
            write: gRPC's write.
            on_written: Called with the size given for a reply, once the reply is written.
            on_progress: Called when a watched write has ended or failed.
        """
        self._write = write
        self._on_written = on_written
        self._on_progress = on_progress
        self._waiting: deque[tuple[bytes, int]] = deque()
        self._begun: Coroutine[Any, Any, None] | None = None
        self._held = 0
        self._end: asyncio.Future[object] | None = None
        """The future that the running write waits for."""
        self._is_watched = False
        self.error: Exception | None = None
        """The error that ended the writing."""

    def put(self, reply: bytes, held: int) -> None:
        """Write a reply after the earlier ones."""
        if self._begun is None or self.look():
            self._begin(reply, held)
        else:
            self._waiting.append((reply, held))
            self.watch()

    def look(self) -> bool:
        """Process the writes that have ended, and return whether everything is written."""
        while self._end is not None and self._end.done():
            self._advance()
        return self._begun is None

    def watch(self) -> None:
        """Call `on_progress` when the running write ends, if there is one."""
        if self._end is not None and not self._is_watched:
            self._is_watched = True
            self._end.add_done_callback(self._ended)

    def close(self) -> None:
        """Drop the unwritten replies, and stop calling the callbacks."""
        self._waiting.clear()
        if not self.look() and self._begun is not None and self._end is not None:
            self._end.cancel()
            self._begun.close()
            self._begun = self._end = None
        self._on_written, self._on_progress = (
            _ignore_size,
            _ignore,
        )  # breaks a cycle: they refer to the stream, which refers to this queue

    def _begin(self, reply: bytes, held: int) -> None:
        if self.error is not None:
            return
        self._held = held
        self._begun = self._write(reply)
        self._advance()

    def _advance(self) -> None:
        """Resume the running write, and start the next ones until one has to wait."""
        while self._begun is not None:
            try:
                self._end = self._begun.send(None)
                self._is_watched = False
                return
            except StopIteration:
                self._begun = self._end = None
            except Exception as error:  # the client has left, or the call has ended
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
