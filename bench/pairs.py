"""Ratios of pairs of measurements, with an interval, judged by a bound."""

from __future__ import annotations

import enum
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

_RESAMPLES = 4000
_CONFIDENCE = 0.95


@dataclass(frozen=True)
class Interval:
    """The median of paired ratios, and its 95 % bootstrap interval."""

    median: float
    low: float
    high: float


class Verdict(enum.Enum):
    """Where an interval is, as seen from the bound."""

    WITHIN = "within"
    UNCLEAR = "unclear"
    BEYOND = "beyond"


@dataclass(frozen=True)
class Bound:
    """What a ratio may be: at least the limit if a higher one is better, otherwise at most the limit."""

    limit: float
    higher_is_better: bool

    def judge(self, interval: Interval) -> Verdict:
        """An interval with the bound inside is unclear: the run does not tell."""
        low, high, limit = interval.low, interval.high, self.limit
        if not self.higher_is_better:
            low, high, limit = -high, -low, -limit
        if high < limit:
            return Verdict.BEYOND
        return Verdict.WITHIN if low >= limit else Verdict.UNCLEAR


def interval_of(ratios: Sequence[float]) -> Interval:
    """The interval of these ratios; the same ratios give the same interval."""
    draws = np.random.default_rng(1).choice(np.array(ratios), (_RESAMPLES, len(ratios)))
    tail = (1 - _CONFIDENCE) / 2
    low, high = np.quantile(np.median(draws, axis=1), [tail, 1 - tail]).tolist()
    return Interval(float(np.median(ratios)), low, high)
