"""Latencies in bounded memory: counts in buckets whose bounds grow by one per cent."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Self

GROWTH = 1.01
LOWEST_S = 1e-6
"""Everything below counts as this."""
BUCKETS = 1 + math.ceil(math.log(3600 / LOWEST_S) / math.log(GROWTH))
"""From a microsecond to an hour; what took longer counts as an hour."""

_PER_BUCKET = 1 / math.log(GROWTH)


class Histogram:
    """Counts latencies; quantiles are exact to half a per cent, the largest is exact."""

    def __init__(self) -> None:
        self._counts = [0] * BUCKETS
        self.count = 0
        self.sum_s = 0.0
        self.max_s = 0.0

    def add(self, seconds: float) -> None:
        """Count one."""
        bucket = int(math.log(seconds / LOWEST_S) * _PER_BUCKET) if seconds > LOWEST_S else 0
        self._counts[min(bucket, BUCKETS - 1)] += 1
        self.count += 1
        self.sum_s += seconds
        self.max_s = max(self.max_s, seconds)

    def quantile_s(self, q: float) -> float | None:
        """The latency that the share `q` of all calls did not exceed; None if there are no calls."""
        wanted, seen = max(1, math.ceil(q * self.count)), 0
        for bucket, count in enumerate(self._counts):
            seen += count
            if seen >= wanted:
                return min(LOWEST_S * math.exp((bucket + 0.5) / _PER_BUCKET), self.max_s)
        return None

    @property
    def mean_s(self) -> float | None:
        """The mean; None if there are no calls."""
        return self.sum_s / self.count if self.count else None

    def to_dict(self) -> dict[str, object]:
        """What JSON can hold: only the buckets that are not empty."""
        counts = {str(i): count for i, count in enumerate(self._counts) if count}
        return {"counts": counts, "sum_s": self.sum_s, "max_s": self.max_s}

    @classmethod
    def merged(cls, documents: Iterable[Mapping[str, object]]) -> Self:
        """All that several have counted, each given as `to_dict` made it."""
        merged = cls()
        for document in documents:
            counts, sum_s, max_s = document["counts"], document["sum_s"], document["max_s"]
            assert isinstance(counts, Mapping)
            assert isinstance(sum_s, float)
            assert isinstance(max_s, float)
            for bucket, count in counts.items():
                merged._counts[int(bucket)] += count
                merged.count += count
            merged.sum_s += sum_s
            merged.max_s = max(merged.max_s, max_s)
        return merged
