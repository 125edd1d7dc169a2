"""A batching window: a pass waits a moment for callers that were just answered, where that saves a pass.

Callers that send their next step when the last is answered fall into two halves that take turns: what comes while one
half runs begins at once when it has ended, and the other half is a moment late. A wide model reads all its weights for
either, so one pass for both takes little longer than one for half of them. What a wait is worth, in seconds: a pass of n
rows takes F + n c (`Cost`). Of N callers, of whom the share s of those answered is back when the next pass begins,
N / (2 - s) are in a pass, and a round of N steps takes (2 - s) F + N c. If the share `there` is back anyway, and s after
a wait of d, the wait pays when

    (2 - s) (F + d) < (2 - there) F,  that is:  d < F (s - there) / (2 - s).

Where steps come by themselves, at some rate, it never does: a pass takes longer than F, so too few of as many as a pass
has come in d. Therefore rows are counted, whoever sent them. A wait takes half of F at most. A few waits that do not
pay end them; then one is tried at times, less and less often.
"""

from __future__ import annotations

import math

from stepwell_server.clock import Clock
from stepwell_server.core.cost import Cost
from stepwell_server.engine.passes.runner import IN_PLACE_S

#: A wait takes at most this part of F, or of as much of it as there is to save yet.
_MAX_PART = 0.5
#: Where F is a smaller part of a pass there is little to save, and many to wait for.
_MIN_PART_OF_PASS = 1 / 3
#: Shorter waits are not worth it, in seconds: to be woken takes about as long.
_MIN_S = 50e-6
#: Of what the formula says that a wait has saved, this part is believed.
_BELIEVED = 0.75
#: What was saved and lost is added up, in F, each time keeping this part of the sum, and never more than 1.
_KEPT = 0.95
#: When the sum is below the first there are no waits for a while, after which it is the second.
_TOO_LOW, _ON_TRIAL = -1.0, -0.9
#: Passes without a wait: the first time, and at most; each time in a row twice as many.
_PAUSE, _MAX_PAUSE = 16, 1024


class BatchingWindow:
    """Says how long the next pass of one model waits for callers that were just answered. Lives on the event loop."""

    def __init__(self, max_rows: int, clock: Clock) -> None:
        """A pass has `max_rows` rows at most."""
        self._max_rows = max_rows
        self._clock = clock
        self.is_open = False
        """Callers were answered and may be waited for. Asked each turn, therefore no property."""
        self._answered = self._before = 0
        """Rows of the last pass that were answered, while it is open; and rows that waited then."""
        self._answered_at = self._fixed_s = 0.0
        self._began: float | None = None
        """When the wait that is on began."""
        self._until = self._there = 0.0
        """Its end, and the share of the answered that was back when it began."""
        self._sum = 0.0
        """What was saved lately, less what was lost."""
        self._skipped = 0
        """Passes without a wait that are left."""
        self._pause = _PAUSE
        """Of the next time."""

    def answered(self, rows: int, waiting: int, cost: Cost, seconds: float) -> None:
        """A pass on threads has ended, and this many of its rows are answered, while others wait: the next may wait.

        `cost` is that of passes; this one took `seconds`.
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
        """The next pass waits for nobody."""
        self.is_open, self._began = False, None

    def left_s(self, waiting: int, deadline: float = math.inf) -> float:
        """Seconds that the next pass waits yet, unless more comes; 0: it begins now.

        Args:
            waiting: Rows that wait for it; at least one.
            deadline: The earliest of theirs: it begins before.
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
        self.close()  # what the wait would have been worth is not known before a deadline
        return 0.0

    def _judge(self, back: float, waited_s: float) -> None:
        saved = _BELIEVED * (back - self._there) / (2 - back) - waited_s / self._fixed_s
        self._sum = min(1.0, _KEPT * self._sum + saved)
        if self._sum > 0:
            self._pause = _PAUSE
        elif self._sum < _TOO_LOW:
            self._skipped, self._pause = self._pause, min(2 * self._pause, _MAX_PAUSE)
            self._sum = _ON_TRIAL
