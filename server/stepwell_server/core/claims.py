"""One operation at a time for each session, in the order received.

A session is claimed by the operation that runs on it: a change, a read, a close. Operations that arrive meanwhile
wait in the session's queue. The claim itself is a column of the session table, so a thousand sessions are claimed
in one array operation. Only sessions with waiting operations have a queue.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable
from typing import Generic, TypeVar

import numpy as np

from stepwell_server.core.sessions import Handles, SessionTable

T = TypeVar("T")


class Claims(Generic[T]):
    """Claims on sessions, and the queues of waiting operations. `T` is the type of a waiting operation."""

    def __init__(self, table: SessionTable) -> None:
        self._table = table
        self._waiting: dict[int, deque[T]] = {}

    def claim(self, handles: Handles) -> None:
        """Claim sessions that are free. Each handle appears once."""
        self._table.claimed[handles] = True

    def wait(self, handle: int, item: T) -> None:
        """Append `item` to the session's queue."""
        self._waiting.setdefault(handle, deque()).append(item)

    def waiting(self, handle: int) -> int:
        """The number of items in the session's queue."""
        line = self._waiting.get(handle)
        return 0 if line is None else len(line)

    def release(self, handles: Handles) -> list[tuple[int, T]]:
        """End the claims; return each session with a queue, and the first item of that queue.

        The returned items hold no claim yet: the caller must claim for them before anything else can.
        """
        self._table.claimed[handles] = False
        if not self._waiting:
            return []
        return [(handle, self._next(handle)) for handle in self._with_queue(handles)]

    def drop_queue(self, handle: int) -> Iterable[T]:
        """Remove a session's queue, and return its items."""
        return self._waiting.pop(handle, ())

    def _with_queue(self, handles: Handles) -> list[int]:
        if len(handles) <= len(self._waiting):
            return [handle for handle in handles.tolist() if handle in self._waiting]
        lines = np.fromiter(self._waiting, np.intp, len(self._waiting))
        due: list[int] = lines[np.isin(lines, handles)].tolist()
        return due

    def _next(self, handle: int) -> T:
        line = self._waiting[handle]
        item = line.popleft()
        if not line:
            del self._waiting[handle]
        return item
