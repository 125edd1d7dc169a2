"""A batching window: a pass waits briefly for callers that were just answered, if that saves a pass.

Callers that send their next step after the last answer can split into two alternating halves. What arrives while one half
runs starts as soon as it ends, and the other half is slightly late. A wide model reads all its weights for
each half, so one pass for both takes little longer than one for half of them. A pass of n rows takes F + n c seconds
(`Cost`). Of N callers, let s be the share of those answered that is back when the next pass begins. A pass then
has N / (2 - s) callers, and a round of N steps takes (2 - s) F + N c. If the share `there` is back without waiting, and s
after a wait of d, the wait pays off if
    (2 - s) (F + d) < (2 - there) F,  that is:  d < F (s - there) / (2 - s).
For independent arrivals it never does: a pass takes longer than F, so too few arrive during d. So rows are counted,
regardless of their sender. A wait takes at most half of F. After a few waits that do not pay off there are none for a
while; then one is tried, less and less often.
"""

from __future__ import annotations

import math

from stepwell_server.clock import Clock
from stepwell_server.core.cost import Cost
from stepwell_server.engine.passes.runner import IN_PLACE_S

#: A wait takes at most this share of F, or of the part of F that can still be saved.
_MAX_PART = 0.5
#: If F is a smaller share of a pass, little can be saved, and many callers would wait.
_MIN_PART_OF_PASS = 1 / 3
#: Shorter waits are not worthwhile, in seconds: waking up takes about as long.
_MIN_S = 50e-6
#: The share of the savings predicted by the formula that is credited.
_BELIEVED = 0.75
#: The running sum of savings and losses, in F, decays by this factor each time, and is at most 1.
_KEPT = 0.95
#: Below the first value waits pause; after the pause the sum is set to the second.
_TOO_LOW, _ON_TRIAL = -1.0, -0.9
#: Passes without a wait: the first pause, and the longest; each pause doubles.
_PAUSE, _MAX_PAUSE = 16, 1024


class BatchingWindow:
    """Decides how long one model's next pass waits for callers that were just answered. Lives on the event loop."""

    def __init__(self, max_rows: int, clock: Clock) -> None:
        """A pass has at most `max_rows` rows."""
        self._max_rows = max_rows
        self._clock = clock
        self.is_open = False
        """Callers were answered and may be waited for. A plain attribute, since every iteration reads it."""
        self._answered = self._before = 0
        """Rows of the last pass that were answered, while the window is open; and rows that waited then."""
        self._answered_at = self._fixed_s = 0.0
        self._began: float | None = None
        """When the current wait began."""
        self._until = self._there = 0.0
        """Its end, and the share of answered rows that was back when it began."""
        self._sum = 0.0
        """Recent savings, minus losses."""
        self._skipped = 0
        """Passes without a wait that remain in this pause."""
        self._pause = _PAUSE
        """The length of the next pause."""

    def answered(self, rows: int, waiting: int, cost: Cost, seconds: float) -> None:
        """Note that a pass on threads has ended and `rows` of its rows are answered while `waiting` rows wait.

        `cost` is the cost of passes; this one took `seconds`.
        """
        self.close()
        if not rows or cost.one_s <= IN_PLACE_S or cost.fixed_s < _MIN_PART_OF_PASS * seconds:
            return
        if self._skipped:
            self._skipped -= 1
            return
        self.is_open, self._answered, self._before = True, rows, waiting
        self._answered_at, self._fixed_s = self._clock.monotonic(), cost.fixed_s

    def close(self) -> None:
        """Let the next pass begin without waiting."""
        self.is_open, self._began = False, None

    def left_s(self, waiting: int, deadline: float = math.inf) -> float:
        """Seconds that the next pass still waits unless more arrives; 0: it begins now.

        Args:
            waiting: Rows that wait for it; at least one.
            deadline: The earliest of their deadlines: the pass begins before it.
        """
        now = self._clock.monotonic()
        back = min(1.0, max(0, waiting - self._before) / self._answered)
        is_complete = waiting >= min(self._max_rows, self._before + self._answered)
        if self._began is None:
            limit_s = _MAX_PART * self._fixed_s * (1 - back)
            if is_complete or limit_s < _MIN_S or now - self._answered_at > self._fixed_s:
                self.close()
                return 0.0
            self._began, self._until, self._there = now, now + limit_s, back
        if deadline > self._until:
            if not is_complete and now < self._until:
                return self._until - now
            self._judge(back, now - self._began)
        self.close()  # a wait cut short by a deadline teaches nothing
        return 0.0

    def _judge(self, back: float, waited_s: float) -> None:
        saved = _BELIEVED * (back - self._there) / (2 - back) - waited_s / self._fixed_s
        self._sum = min(1.0, _KEPT * self._sum + saved)
        if self._sum > 0:
            self._pause = _PAUSE
        elif self._sum < _TOO_LOW:
            self._skipped, self._pause = self._pause, min(2 * self._pause, _MAX_PAUSE)
            self._sum = _ON_TRIAL
