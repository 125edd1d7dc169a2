"""The line of the sync client's sender, for tests that must know when a step has joined it."""

from __future__ import annotations

import collections
import threading
from typing import Any, Self


class WaitingLine(collections.deque[Any]):
    """Takes the place of a sender's own; `arrived` is released by each step that joins.

    It is the sender's private affair, and only here is it reached for: nothing outside says that a step waits.
    """

    def __init__(self) -> None:
        super().__init__()
        self.arrived = threading.Semaphore(0)

    @classmethod
    def of(cls, sender: Any) -> Self:
        """Give the sender such a line."""
        sender._waiting = line = cls()
        return line

    def append(self, member: Any) -> None:
        super().append(member)
        self.arrived.release()
