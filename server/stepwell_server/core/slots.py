"""Which rows of the arena are free."""

from __future__ import annotations

import math
import mmap
from typing import Any

import numpy as np
import numpy.typing as npt

Rows = npt.NDArray[np.intp]


def page_by_page(shape: tuple[int, ...], dtype: np.dtype[Any]) -> npt.NDArray[Any]:
    """Zeros whose memory is allocated in pages of the usual size, each when it is first written.

    For large arrays `numpy.zeros` asks for pages of 2 MiB. The kernel clears a whole one at the first write to it, and
    the event loop waits for that.
    """
    size = max(1, math.prod(shape) * dtype.itemsize)
    memory = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    if hasattr(mmap, "MADV_NOHUGEPAGE"):
        memory.madvise(mmap.MADV_NOHUGEPAGE)
    return np.frombuffer(memory, dtype, math.prod(shape)).reshape(shape)


class Slots:
    """A stack of free rows with two budgets: rows of sessions, and working rows of requests.

    A request of several time steps works on a copy of its sessions' rows, so half of the capacity is reserved for
    copies: sessions can never take it. The last row freed is the first one taken, which keeps the touched memory
    small.
    """

    def __init__(self, resident: int) -> None:
        self.resident_limit = resident
        self.working_limit = resident
        self.resident = 0
        self.working = 0
        self.owner: npt.NDArray[np.intp] = np.zeros(self.capacity, np.intp)
        """The handle of the session that last had this as its first row, or any handle. The session table says
        whether it still does."""
        self.touched = 0
        """Rows from here on were never taken, so their memory was never written: with many models that is much."""
        self._freed: Rows = np.empty(self.capacity, np.intp)
        self._top = 0

    @property
    def capacity(self) -> int:
        """All rows."""
        return self.resident_limit + self.working_limit

    def take_resident(self, count: int) -> Rows | None:
        """Take `count` rows for sessions; None if the budget is exhausted."""
        if self.resident + count > self.resident_limit:
            return None
        self.resident += count
        return self._pop(count)

    def take_working(self, count: int) -> Rows | None:
        """Take `count` working rows for a request; None if the budget is exhausted."""
        if self.working + count > self.working_limit:
            return None
        self.working += count
        return self._pop(count)

    def free_resident(self, rows: Rows) -> None:
        """Return rows of sessions."""
        self.resident -= len(rows)
        self._push(rows)

    def free_working(self, rows: Rows) -> None:
        """Return the working rows of a request: its own, or those exchanged for them at the commit."""
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
