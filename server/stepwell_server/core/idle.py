"""Which sessions have been idle for too long, found without looking at those that cannot be.

Time is cut into slots, some to the time limit. A session stands in the slot in which it will be idle for too long
if nobody uses it, and is looked at when that slot has come: a session that was used meanwhile moves on. So
each is looked at a few times per time limit, however often anybody asks.
"""

from __future__ import annotations

import math
from array import array
from collections.abc import Callable, Iterator

import numpy as np
import numpy.typing as npt

from stepwell_server.core.sessions import Handles, SessionTable

SLOTS = 16
"""Per time limit."""


class IdleWatch:
    """Watches the sessions of a table. Times are seconds on the monotonic clock."""

    def __init__(self, table: SessionTable, max_idle_s: float, started: float) -> None:
        self._table = table
        self._max_idle_s = max_idle_s
        self._started = started
        self._slot_s = max_idle_s / SLOTS
        self._slots: dict[int, array[int]] = {}

    def watch(self, handles: Handles) -> None:
        """Watch sessions from now on; their use is in the table."""
        if self._max_idle_s:
            self._put(handles, self._slot_of(self._table.used[handles]))

    def too_long(self, handles: Handles, now: float) -> npt.NDArray[np.bool_]:
        """Which sessions have been idle for too long and have nothing under way, as a mask.

        A server's start counts as use: time that it was away, and what its clock did meanwhile, end no session.
        """
        since = now - self._max_idle_s
        if not self._max_idle_s or self._started >= since:
            return np.zeros(len(handles), np.bool_)
        idle: npt.NDArray[np.bool_] = (self._table.used[handles] < since) & ~self._table.claimed[handles]
        return idle

    def take_due_in_parts(self, now: Callable[[], float], most: int) -> Iterator[Handles]:
        """The sessions that have been idle for too long, at most so many at a time; they are not watched any more.

        Between two parts sessions may be used, or go. Where this ends early, the others are due the next time.
        """
        if not self._max_idle_s:
            return
        current = math.floor(now() / self._slot_s)
        for slot in [slot for slot in self._slots if slot <= current]:
            watched = self._slots.pop(slot, array("q"))
            at = 0
            try:
                while at < len(watched):
                    some = watched[at : at + most]
                    at += most
                    yield self._take(some, slot, current, now())
            finally:
                if at < len(watched):
                    self._slots.setdefault(slot, array("q")).extend(watched[at:])

    def _take(self, watched: array[int], slot: int, current: int, now: float) -> Handles:
        handles = np.frombuffer(watched, np.intp)
        # a handle may have been given to another session, which is in a slot of its own, or in this one once more
        handles = np.unique(handles[self._table.due[handles] == slot])
        idle = self.too_long(handles, now)
        stay = handles[~idle]
        self._put(stay, np.maximum(self._slot_of(self._table.used[stay]), current))
        self._table.due[handles[idle]] = -1
        due: Handles = handles[idle]
        return due

    def _slot_of(self, used: npt.NDArray[np.float64]) -> npt.NDArray[np.int64]:
        until = np.maximum(used, self._started) + self._max_idle_s
        return np.floor(until / self._slot_s).astype(np.int64)

    def _put(self, handles: Handles, slots: npt.NDArray[np.int64]) -> None:
        self._table.due[handles] = slots
        for slot in np.unique(slots).tolist():
            self._slots.setdefault(slot, array("q")).frombytes(
                handles[slots == slot].astype(np.int64).tobytes()
            )
