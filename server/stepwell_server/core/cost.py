"""Estimates a duration from earlier measurements: a fixed part and a part per item."""

from __future__ import annotations

#: Measurements of at least this many items refine the cost per item; smaller ones refine the fixed part.
_MANY_ITEMS = 16
#: Weight of the latest measurement.
_WEIGHT = 0.2
_MIN_S = 1e-6


class Cost:
    """The seconds that a pass takes by its rows, or a commit by its records."""

    def __init__(self, fixed_s: float = 20e-6, each_s: float = 1e-6, *, min_fixed_s: float = _MIN_S) -> None:
        """Start with an estimate, whose fixed part never falls below ``min_fixed_s``."""
        self._min_fixed_s = min_fixed_s
        self._fixed_s = max(fixed_s, min_fixed_s)
        self._each_s = each_s
        self.one_s = self._fixed_s + each_s
        """Expected seconds for a single item."""

    @property
    def fixed_s(self) -> float:
        """Expected seconds regardless of the number of items."""
        return self._fixed_s

    def learn(self, items: int, seconds: float, times: int = 1) -> None:
        """Update the estimate: `items` items took `seconds`, done `times` times in a row."""
        once = seconds / times
        if items >= _MANY_ITEMS:
            more = once - self._fixed_s
            self._each_s += _WEIGHT * ((more / items if more > 0 else 0.0) - self._each_s)
        else:
            self._fixed_s += _WEIGHT * (max(self._min_fixed_s, once - items * self._each_s) - self._fixed_s)
        self.one_s = self._fixed_s + self._each_s

    def of(self, items: int, times: int = 1) -> float:
        """Expected seconds for this many items, `times` times in a row."""
        return (self._fixed_s + items * self._each_s) * times

    def items_within(self, seconds: float, max_fixed_share: float) -> int:
        """How many items fit into `seconds`, or how many keep the fixed part within `max_fixed_share` of the total."""
        worth = self._fixed_s * (1 / max_fixed_share - 1)
        return max(1, int(max(seconds - self._fixed_s, worth) / max(self._each_s, 1e-9)))

    def times_within(self, items: int, seconds: float) -> int:
        """How many times this many items fit into `seconds`; at least 1."""
        return max(1, int(seconds / self.of(items)))
