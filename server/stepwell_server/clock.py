"""Where time comes from, so that tests can turn it."""

from __future__ import annotations

import time
from typing import Protocol


class Clock(Protocol):
    """Two clocks: one for intervals, one for people."""

    def monotonic(self) -> float:
        """Seconds that never jump; for intervals and deadlines."""

    def now(self) -> float:
        """Seconds since the epoch; for timestamps that people read."""


class SystemClock:
    """The machine's clocks. Thread-safe."""

    monotonic = staticmethod(time.monotonic)
    now = staticmethod(time.time)
