"""Finds sessions that have been idle for too long, without scanning the others.

Each session may have its own limit. A session is filed in the time slot in which its limit would end if nobody used
it. When that slot begins, the session is checked: it ends, or moves to a later slot because it was used, or to a
narrower one. A slot is at most a 16th as wide as the remaining time. So each session is checked a few times per
limit, however often `take_due_in_parts` is called, and there are at most a few dozen slots of each width.
"""

from __future__ import annotations

import math
from array import array
from collections.abc import Callable, Iterator

import numpy as np
import numpy.typing as npt

from stepwell_server.core.sessions import Handles, SessionTable

MIN_IDLE_S = 1.0
"""The shortest limit that a caller may set when it opens a session."""
MAX_IDLE_MS = 3650 * 86_400_000
"""The longest limit of a single session: ten years."""
SLOTS = 16
"""The minimum number of slots in a session's remaining time."""
#: The narrowest slot is that of a session with this many seconds left.
_MIN_SLOT_S = 0.5
#: Limits are clamped to this range, in seconds, when a slot is chosen. A slot may then come too early.
_MIN_LIMIT_S, _MAX_LIMIT_S = 2.0**-20, 2.0**40
#: `SessionTable.due` is the slot's number times this, plus the exponent of its width, plus the bias.
_WIDTHS, _BIAS = 128, 64

I64 = npt.NDArray[np.int64]
F64 = npt.NDArray[np.float64]


class IdleLimits:
    """How long sessions may be idle: each session's own limit, and the server's, which is an upper bound."""

    def __init__(self, max_idle_s: float, unnamed_idle_s: float = 0.0) -> None:
        """Set the limits of a server.

        Args:
            max_idle_s: Seconds for every session; 0: no limit.
            unnamed_idle_s: Seconds for sessions opened without an id and without a limit of their own; 0: no limit.
        """
        self.max_s = max_idle_s or math.inf
        """For every session, in seconds; infinity: no limit."""
        self._unnamed_ms = min(MAX_IDLE_MS, round(unnamed_idle_s * 1000))

    def of_new(self, asked_ms: int | None, *, is_named: bool) -> int:
        """The own limit of a new session, in milliseconds; 0: none.

        Args:
            asked_ms: The limit that the caller asks for; 0: no limit; None: the server's default.
            is_named: Whether the caller chose its id.
        """
        if asked_ms is not None:
            return asked_ms
        return 0 if is_named else self._unnamed_ms

    def seconds(self, own_ms: int) -> float:
        """Seconds without use after which a session with this own limit ends; infinity: never."""
        return min(own_ms / 1000, self.max_s) if own_ms else self.max_s

    def seconds_of(self, own_ms: I64) -> F64:
        """`seconds` for many sessions."""
        limits: F64 = np.minimum(np.where(own_ms > 0, own_ms / 1000, np.inf), self.max_s)
        return limits


class IdleWatch:
    """Watches the sessions of a table. Times are seconds on the monotonic clock."""

    def __init__(self, table: SessionTable, limits: IdleLimits, started: float) -> None:
        """Time before `started` does not count as idle."""
        self.table = self._table = table
        self.limits = self._limits = limits
        self.since = started
        """Time before this moment does not count as idle. May be set at any time."""
        self._slots: dict[int, array[int]] = {}
        """Handles by the slot in their column `SessionTable.due`."""

    def watch(self, handles: Handles) -> None:
        """Start to watch sessions. Their last use and their limits are in the table."""
        if len(handles) == 1:  # every new session takes this path
            self._put_one(int(handles[0]))
        else:
            self._put(handles, None)

    def too_long(self, handles: Handles, now: float) -> npt.NDArray[np.bool_]:
        """Which sessions have been idle for too long and have nothing active, as a mask.

        Time before `since` never counts as idle. So an outage, or a clock that jumped during it, ends no session.
        """
        table = self._table
        since = now - self._limits.seconds_of(table.max_idle_ms[handles])
        idle: npt.NDArray[np.bool_] = np.maximum(table.used[handles], self.since) < since
        return idle & ~table.claimed[handles]

    def is_too_long(self, handle: int, now: float) -> bool:
        """`too_long` for one session: every step asks it."""
        table = self._table
        since = now - self._limits.seconds(int(table.max_idle_ms[handle]))
        return since > self.since and bool(table.used[handle] < since) and not table.claimed[handle]

    def next_in(self, now: float) -> float:
        """Seconds until `take_due_in_parts` has sessions to check; infinity if none is watched."""
        return max(0.0, self._table.next_end - now)

    def take_due_in_parts(self, now: Callable[[], float], most: int) -> Iterator[Handles]:
        """Stop to watch the sessions that have been idle for too long, and return them in parts of at most `most`.

        Sessions may be used or removed between two parts. If the caller stops early, the remaining sessions are due
        next time.
        """
        began = now()
        for due in [due for due in self._slots if _start(due) <= began]:
            watched = self._slots.pop(due, array("q"))
            at = 0
            try:
                while at < len(watched):
                    some = watched[at : at + most]
                    at += most
                    yield self._take(some, due, began, now())
            finally:
                if at < len(watched):
                    self._slots.setdefault(due, array("q")).extend(watched[at:])
                self._table.next_end = min(map(_start, self._slots), default=math.inf)

    def _take(self, watched: array[int], due: int, began: float, now: float) -> Handles:
        handles = np.frombuffer(watched, np.intp)
        # a handle may have been reused by another session, which is in a slot of its own, or in this one again
        handles = np.unique(handles[self._table.due[handles] == due])
        idle = self.too_long(handles, now)
        self._put(handles[~idle], began)
        self._table.due[handles[idle]] = -1
        ended: Handles = handles[idle]
        return ended

    def _put_one(self, handle: int) -> None:
        """`_put` for one session, as if it were used now."""
        table = self._table
        limit = self._limits.seconds(int(table.max_idle_ms[handle]))
        if limit == math.inf:
            return
        limit = min(max(limit, _MIN_LIMIT_S), _MAX_LIMIT_S)
        exponent = math.frexp(limit / SLOTS)[1] - 1
        end = max(float(table.used[handle]), self.since) + limit
        due = math.floor(math.ldexp(end, -exponent)) * _WIDTHS + exponent + _BIAS
        table.due[handle] = due
        self._slots.setdefault(due, array("q")).append(handle)
        table.next_end = min(table.next_end, _start(due))

    def _put(self, handles: Handles, now: float | None) -> None:
        """File sessions that have a limit in slots that begin at `now` or later; None: as if they were used now."""
        table = self._table
        limits = self._limits.seconds_of(table.max_idle_ms[handles])
        is_limited = np.isfinite(limits)
        if not is_limited.all():
            handles, limits = handles[is_limited], limits[is_limited]
        if not len(handles):
            return
        limits = np.clip(limits, _MIN_LIMIT_S, _MAX_LIMIT_S)
        ends, left = np.maximum(table.used[handles], self.since) + limits, limits
        if now is not None:
            ends = np.maximum(ends, now)
            left = np.maximum(ends - now, _MIN_SLOT_S)
        exponents = np.frexp(left / SLOTS)[1].astype(np.int64) - 1
        dues = np.floor(np.ldexp(ends, -exponents)).astype(np.int64) * _WIDTHS + exponents + _BIAS
        table.due[handles] = dues
        for due in np.unique(dues).tolist():
            self._slots.setdefault(due, array("q")).frombytes(handles[dues == due].astype(np.int64).tobytes())
            table.next_end = min(table.next_end, _start(due))


def _start(due: int) -> float:
    """When a slot begins, in seconds."""
    number, exponent = divmod(due, _WIDTHS)
    return math.ldexp(number, exponent - _BIAS)
