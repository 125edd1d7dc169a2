"""Which rows of the arena are free."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

Rows = npt.NDArray[np.intp]


class Slots:
    """A stack of free rows with two budgets: rows that sessions keep and rows that requests work in.

    A request of several time steps works on a copy of its sessions' rows, so half of the capacity is
    kept for copies: sessions alone can never starve them. The last row freed is the first one taken, so
    that the memory touched stays small.
    """

    def __init__(self, resident: int) -> None:
        self.resident_limit = resident
        self.working_limit = resident
        self.resident = 0
        self.working = 0
        self.owner: npt.NDArray[np.intp] = np.full(self.capacity, -1, np.intp)
        """The session (handle) whose first row a row was last. The session table says whether it still is."""
        self._free: Rows = np.arange(self.capacity - 1, -1, -1, dtype=np.intp)
        self._top = self.capacity

    @property
    def capacity(self) -> int:
        """Rows in all."""
        return self.resident_limit + self.working_limit

    def take_resident(self, count: int) -> Rows | None:
        """Take `count` rows for sessions, or None if the budget does not have them."""
        if self.resident + count > self.resident_limit:
            return None
        self.resident += count
        return self._pop(count)

    def take_working(self, count: int) -> Rows | None:
        """Take `count` rows for a request to work in, or None if the budget does not have them."""
        if self.working + count > self.working_limit:
            return None
        self.working += count
        return self._pop(count)

    def free_resident(self, rows: Rows) -> None:
        """Give rows of sessions back."""
        self.resident -= len(rows)
        self._push(rows)

    def free_working(self, rows: Rows) -> None:
        """Give rows of a request back: its own, or those it was exchanged for at the commit."""
        self.working -= len(rows)
        self._push(rows)

    def _pop(self, count: int) -> Rows:
        self._top -= count
        return self._free[self._top : self._top + count][::-1].copy()

    def _push(self, rows: Rows) -> None:
        self._free[self._top : self._top + len(rows)] = rows[::-1]
        self._top += len(rows)
