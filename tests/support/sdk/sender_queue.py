"""What the sync client's sender does not tell, for tests that must know when a step has joined its line."""

from __future__ import annotations

import collections
import threading
from typing import Any, Self


class SenderQueue(collections.deque[Any]):
    """Takes the place of a sender's own; `arrived` is released by each step that joins.

    It is the sender's private affair, and only here is it reached for: nothing outside says that a step waits, nor
    how old the frame under way is, nor which thread sends.
    """

    def __init__(self, sender: Any) -> None:
        super().__init__()
        self._sender = sender
        self.arrived = threading.Semaphore(0)

    @classmethod
    def of(cls, sender: Any) -> Self:
        """Give the sender such a line."""
        sender._waiting = line = cls(sender)
        return line

    @classmethod
    def of_client(cls, client: Any) -> Self:
        """Give the sender of a client such a line, and a clock that stands: the frame under way stays young."""
        line = cls.of(client._driver.connections.to(None).sender)
        client._driver.connections.to(None).sender._clock = lambda: 0.0
        return line

    def append(self, member: Any) -> None:
        super().append(member)
        self.arrived.release()

    def limit_frames(self, most_bytes: int) -> None:
        """Set the largest size of a frame in bytes."""
        self._sender._max_frame_bytes = most_bytes

    @property
    def thread(self) -> threading.Thread | None:
        """What sends frames."""
        thread: threading.Thread | None = self._sender._thread
        return thread
