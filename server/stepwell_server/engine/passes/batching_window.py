"""A batching window: a pass waits a moment for those who were just answered, where that saves a pass.

Callers who send their next step when the last is answered fall into two halves that take turns: what comes while one
half runs goes at once when it has, and the other half is a moment late. A wide model reads all its weights for either,
so that one pass for both takes little longer than one for half of them. What a wait is worth, in seconds: a pass of n
rows takes F + n c (`Cost`). Of N callers, of whom the share s of those answered is back when the next pass begins,
N / (2 - s) are in a pass, and a round of N steps takes (2 - s) F + N c. If the share `there` is back anyway, and s after
a wait of d, the wait pays when

    (2 - s) (F + d) < (2 - there) F,  that is:  d < F (s - there) / (2 - s).

Where steps come by themselves, at some rate, it never does: a pass takes longer than F, so too few of as many as a pass
has come in d. Therefore rows are counted, and nobody need know whose they are. The share that is waited for is learned
from those that came. A wait takes half of F at most. If nobody comes, a few such waits end them; then one is tried at
times, ever more seldom.
"""

from __future__ import annotations

import math

from stepwell_server.clock import Clock
from stepwell_server.core.cost import Cost
from stepwell_server.engine.passes.runner import IN_PLACE_S

#: A wait takes at most this part of F, or of as much of it as there is to save yet.
_MOST = 0.5
#: Where F is less of a pass there is little to save, and many to wait for.
_LEAST_PART = 1 / 3
#: Shorter ones are not worth it, in seconds: to be woken takes about as long.
_LEAST_S = 50e-6
#: Of what the formula says that a wait has saved, so much is believed.
_BELIEVED = 0.75
#: When as many came as were waited for, so much of the rest is waited for as well the next time; when not, the share goes
#: so far towards the one that came, but not below the least.
_MORE, _LESS, _LEAST_SHARE = 0.02, 0.3, 1 / 3
#: What was saved and lost is added up, in F, each time keeping so much of the sum, and never more than 1.
_KEPT = 0.95
#: When the sum is below the first there are no waits for a while, after which it is the second.
_TOO_LOW, _ON_TRIAL = -1.0, -0.9
#: Passes without a wait: the first time, and at most; each time in a row twice as many.
_PAUSE, _LONGEST_PAUSE = 16, 1024
#: Weight of the latest pass in what is known of passes; and how far apart their rows must be, in parts of the mean, for
#: their times to say what a row takes.
_WEIGHT, _APART = 1 / 16, 0.1


class _Fixed:
    """F, from rows and seconds of passes: where the line through them (least squares) meets no rows.

    `Cost` knows what a thread needs; but here the question is what a pass saves that others have with it, at their size.
    """

    def __init__(self) -> None:
        self._rows = self._seconds = self._variance = self._covariance = 0.0
        self._known: float | None = None

    def learn(self, rows: int, seconds: float) -> None:
        if not self._rows:
            self._rows, self._seconds = rows, seconds
        more, longer = rows - self._rows, seconds - self._seconds
        self._rows += _WEIGHT * more
        self._seconds += _WEIGHT * longer
        self._variance = (1 - _WEIGHT) * (self._variance + _WEIGHT * more * more)
        self._covariance = (1 - _WEIGHT) * (self._covariance + _WEIGHT * more * longer)
        if self._variance > (_APART * self._rows) ** 2:
            self._known = max(0.0, self._seconds - self._rows * self._covariance / self._variance)

    def of(self, cost: Cost) -> float:
        """F in seconds; `cost` is asked as long as all passes are alike."""
        return min(self._seconds, cost.fixed_s if self._known is None else self._known)


class BatchingWindow:
    """Says how long the next pass of one model waits for those who were just answered. Lives on the event loop."""

    def __init__(self, max_rows: int, clock: Clock) -> None:
        """A pass has `max_rows` rows at most."""
        self._max_rows = max_rows
        self._clock = clock
        self.is_open = False
        """Somebody was answered and may be waited for. Asked each turn, therefore no property."""
        self._answered = 0
        """Rows of the last pass that were answered, while it is open."""
        self._answered_at = 0.0
        self._fixed, self._fixed_s = _Fixed(), 0.0
        self._before = 0
        """Rows that waited then."""
        self._is_waiting = False
        self._began = self._until = 0.0
        """Of the wait that is on."""
        self._there = 0.0
        """Share of the answered that was back when it began."""
        self._share = 1.0
        """The share that is expected back."""
        self._sum = 0.0
        """What was saved of late, less what was lost."""
        self._pause = _PAUSE
        """Of the next time."""
        self._skipped = 0
        """Passes without a wait that are left of this time."""

    def answered(self, rows: int, waiting: int, cost: Cost, seconds: float) -> None:
        """A pass on threads has ended, and so many of its rows are answered, while others wait: the next may wait.

        `cost` is that of passes; this one took `seconds`.
        """
        self.close()
        if cost.one_s > IN_PLACE_S and rows:
            self._fixed.learn(rows, seconds)
            self._fixed_s = self._fixed.of(cost)
            if self._fixed_s >= _LEAST_PART * seconds:
                self.is_open, self._answered, self._before = True, rows, waiting
                self._answered_at = self._clock.monotonic()

    def close(self) -> None:
        """The next pass waits for nobody."""
        self.is_open = self._is_waiting = False

    def left_s(self, waiting: int, deadline: float = math.inf) -> float:
        """Seconds that the next pass waits yet, unless more comes; 0: it begins now.

        Args:
            waiting: Rows that wait for it; at least one.
            deadline: The earliest of theirs: it begins before.
        """
        now = self._clock.monotonic()
        if not self._is_waiting and not self._begin(waiting, now):
            self.close()
            return 0.0
        if deadline <= self._until:  # what the wait would have been worth is not known
            self.close()
            return 0.0
        if waiting < self._target and now < self._until:
            return self._until - now
        self._learn(waiting, now)
        self.close()
        return 0.0

    @property
    def _target(self) -> int:
        return min(self._max_rows, self._before + math.ceil(self._share * self._answered))

    def _back(self, waiting: int) -> float:
        """Share of the answered that is back."""
        return min(1.0, max(0, waiting - self._before) / self._answered)

    def _begin(self, waiting: int, now: float) -> bool:
        """Begin to wait, if that promises enough."""
        if waiting >= self._target:
            self._share += _MORE * (1 - self._share)
            return False
        fixed_s, there = self._fixed_s, self._back(waiting)
        most_s = _MOST * fixed_s * (1 - there)
        if most_s < _LEAST_S or now - self._answered_at > fixed_s:
            return False  # there is too little to save; or they are in no hurry
        if self._skipped:
            self._skipped -= 1
            return False
        self._is_waiting, self._there = True, there
        self._began, self._until = now, now + most_s
        return True

    def _learn(self, waiting: int, now: float) -> None:
        back = self._back(waiting)
        if waiting >= self._target:
            self._share += _MORE * (1 - self._share)
        else:
            self._share = max(_LEAST_SHARE, self._share + _LESS * (back - self._share))
        saved = _BELIEVED * (back - self._there) / (2 - back) - (now - self._began) / self._fixed_s
        self._sum = min(1.0, _KEPT * self._sum + saved)
        if self._sum > 0:
            self._pause = _PAUSE
        elif self._sum < _TOO_LOW:
            self._skipped, self._pause = self._pause, min(2 * self._pause, _LONGEST_PAUSE)
            self._share, self._sum = 1.0, _ON_TRIAL
