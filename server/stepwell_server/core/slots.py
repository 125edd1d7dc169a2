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
        self.owner: npt.NDArray[np.intp] = np.zeros(self.capacity, np.intp)
        """The session (handle) whose first row a row was last, or any. The session table says whether it still is."""
        self.touched = 0
        """Rows from here on were never taken, and no memory that is kept of them was written: many models have many."""
        self._freed: Rows = np.empty(self.capacity, np.intp)
        self._top = 0

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
        again = min(count, self._top)
        self._top -= again
        rows = self._freed[self._top : self._top + again][::-1].copy()
        if again == count:
            return rows
        end = self.touched + count - again
        fresh, self.touched = np.arange(self.touched, end, dtype=np.intp), end
        return np.concatenate([rows, fresh]) if again else fresh

    def _push(self, rows: Rows) -> None:
        self._freed[self._top : self._top + len(rows)] = rows[::-1]
        self._top += len(rows)
