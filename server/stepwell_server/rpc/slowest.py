"""The sessions with the slowest steps of late: few, and cheap to keep."""

from __future__ import annotations

from typing import NamedTuple

#: Sessions that are kept, and for how long.
MOST, KEPT_S = 100, 60.0


class SlowStep(NamedTuple):
    """The slowest step of a session in the time that is looked at."""

    seconds: float
    session_id: str
    model: str
    when: float
    """It was answered then, on the clock's monotonic time."""


class Slowest:
    """What is told of steps, one for each session. Lives on the event loop."""

    def __init__(self) -> None:
        self._found: dict[str, SlowStep] = {}
        self._least = 0.0
        """What is quicker is not among the slowest, as long as nothing has become old."""
        self._look = 0.0

    def note(self, model: str, session_id: str, seconds: float, now: float) -> None:
        """A step of a session was answered."""
        if seconds <= self._least and now < self._look:
            return
        known = self._found.get(session_id)
        if known is None or known.seconds < seconds or known.when <= now - KEPT_S:
            self._found[session_id] = SlowStep(seconds, session_id, model, now)
        if len(self._found) >= 2 * MOST or now >= self._look:
            self._keep(now)

    def _keep(self, now: float) -> None:
        kept = self.list(now)[:MOST]
        self._found = {step.session_id: step for step in kept}
        self._least = kept[-1].seconds if len(kept) == MOST else 0.0
        self._look = min((step.when for step in kept), default=now) + KEPT_S

    def list(self, now: float) -> list[SlowStep]:
        """The slowest first."""
        return sorted((step for step in self._found.values() if step.when > now - KEPT_S), reverse=True)
