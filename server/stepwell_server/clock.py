"""The source of time, which tests can replace."""

from __future__ import annotations

import time
from typing import Protocol


class Clock(Protocol):
    """A clock for intervals, and one for timestamps."""

    def monotonic(self) -> float:
        """Return seconds that never jump, for intervals and deadlines."""

    def now(self) -> float:
        """Return seconds since the epoch, for timestamps."""


class SystemClock:
    """The machine's clocks. Thread-safe."""

    monotonic = staticmethod(time.monotonic)
    now = staticmethod(time.time)
