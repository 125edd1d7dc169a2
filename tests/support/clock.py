"""A clock that stands still until a test moves it."""

from __future__ import annotations


class ManualClock:
    """See `stepwell_server.clock.Clock`."""

    def __init__(self, monotonic: float = 1000.0, now: float = 1_700_000_000.0) -> None:
        self._monotonic = monotonic
        self._now = now

    def monotonic(self) -> float:
        return self._monotonic

    def now(self) -> float:
        return self._now

    def advance(self, seconds: float) -> None:
        self._monotonic += seconds
        self._now += seconds

    def jump(self, seconds: float) -> None:
        """Somebody sets the wall clock."""
        self._now += seconds
