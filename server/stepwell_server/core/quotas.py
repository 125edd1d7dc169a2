"""How much tenants and callers may have and do: limits, and who is at them."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

SESSION_BYTES = 256
"""What counts of each session beside its rows, its arrays and its fields: header, names and keys, about."""
#: Buckets that are kept of those who have done nothing lately.
_MAX_BUCKETS = 10_000


@dataclasses.dataclass(frozen=True, slots=True)
class Usage:
    """What sessions take: of one, of a tenant, or a difference."""

    sessions: int = 0
    rows: int = 0
    """Their batch sizes together."""
    bytes: int = 0
    """What the store keeps of them: see `store.counts`."""

    def __add__(self, other: Usage) -> Usage:
        return Usage(self.sessions + other.sessions, self.rows + other.rows, self.bytes + other.bytes)

    def __sub__(self, other: Usage) -> Usage:
        return self + other * -1

    def __mul__(self, count: int) -> Usage:
        return Usage(self.sessions * count, self.rows * count, self.bytes * count)

    def positive(self) -> Usage:
        """The same without what is negative."""
        return Usage(max(0, self.sessions), max(0, self.rows), max(0, self.bytes))


NOTHING = Usage()


@dataclasses.dataclass(frozen=True, slots=True)
class Limits:
    """The quotas of a tenant or of a caller; None: none."""

    sessions: int | None = None
    """Sessions at a time."""
    rows: int | None = None
    """Their batch sizes together."""
    bytes: int | None = None
    """What the store keeps of them."""
    steps_per_second: float | None = None
    """Rows times time steps, on average."""
    burst: int | None = None
    """So many of them at once; None: those of one second."""
    bytes_in_flight: int | None = None
    """Bytes of inputs of the requests that are being served."""
    models: int | None = None
    """Versions of models that its admins have loaded while the server ran."""

    @property
    def counts_sessions(self) -> bool:
        """Sessions, rows or bytes are limited."""
        return (self.sessions, self.rows, self.bytes) != (None, None, None)

    @property
    def max_steps(self) -> int:
        """Steps at once."""
        if self.burst is not None:
            return self.burst
        return max(1, int(self.steps_per_second or 0))


NO_LIMITS = Limits()


@dataclasses.dataclass(frozen=True, slots=True)
class QuotaTable:
    """Whose quotas are which."""

    default: Limits = NO_LIMITS
    """Of each tenant that is not named; where nobody is asked, of all callers together."""
    tenants: Mapping[str, Limits] = dataclasses.field(default_factory=dict)
    callers: Mapping[str, Limits] = dataclasses.field(default_factory=dict)
    """By tenant and name, `acme/ann`. Beside those of their tenants."""

    def of_tenant(self, tenant: str) -> Limits:
        """The quotas of a tenant."""
        return self.tenants.get(tenant, self.default)


class TokenBucket:
    """So many a second on average, and so many at once: a token bucket.

    As of J. Turner, "New directions in communications", IEEE Communications Magazine 24 (1986), and RFC 2215, 4.1: tokens
    come at a rate up to a depth, and what is done takes its number of them, or none and has to wait.
    """

    __slots__ = ("_at", "_depth", "_rate", "_tokens")

    def __init__(self, rate: float, depth: int, now: float) -> None:
        """A full one. `rate` is tokens a second, `now` the time on the clock that all calls are told."""
        self._rate, self._depth, self._at = rate, depth, now
        self._tokens = float(depth)

    def take(self, count: int, now: float) -> float:
        """Take tokens; seconds after which there will be enough of them if there are not, and else 0."""
        self._fill(now)
        if count > self._tokens:
            return (count - self._tokens) / self._rate
        self._tokens -= count
        return 0.0

    def give_back(self, count: int) -> None:
        """What was taken was not used."""
        self._tokens = min(float(self._depth), self._tokens + count)

    def change(self, rate: float, depth: int, now: float) -> None:
        """From now on another rate and depth."""
        self._fill(now)
        self._rate, self._depth = rate, depth
        self._tokens = min(self._tokens, float(depth))

    def is_full(self, now: float) -> bool:
        """Nothing is known of its owner that a new one would not say."""
        self._fill(now)
        return self._tokens >= self._depth

    def _fill(self, now: float) -> None:
        self._tokens = min(float(self._depth), self._tokens + max(0.0, now - self._at) * self._rate)
        self._at = max(self._at, now)


class Buckets:
    """The buckets of those whose rate is limited, by name."""

    def __init__(self) -> None:
        self._buckets: dict[str, tuple[Limits, TokenBucket]] = {}

    def of(self, name: str, limits: Limits, now: float) -> TokenBucket:
        """The bucket of somebody whose steps are limited."""
        assert limits.steps_per_second is not None, "only of those who have one"
        known, bucket = self._buckets.get(name, (None, None))
        if bucket is None:
            self._forget_idle(now)
            bucket = TokenBucket(limits.steps_per_second, limits.max_steps, now)
        elif known is not limits:
            bucket.change(limits.steps_per_second, limits.max_steps, now)
        self._buckets[name] = limits, bucket
        return bucket

    def _forget_idle(self, now: float) -> None:
        if len(self._buckets) >= _MAX_BUCKETS:
            kept = {name: each for name, each in self._buckets.items() if not each[1].is_full(now)}
            self._buckets = kept
