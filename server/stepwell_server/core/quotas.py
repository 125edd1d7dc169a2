"""Quotas of tenants and callers: limits, usage and token buckets."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

SESSION_BYTES = 256
"""Estimated bytes of each session besides its rows, arrays and fields: header, names and keys."""
#: Buckets kept for tenants and callers that have been idle.
_MAX_BUCKETS = 10_000


@dataclasses.dataclass(frozen=True, slots=True)
class Usage:
    """The resources that sessions use: of one session, of a tenant, or a difference."""

    sessions: int = 0
    rows: int = 0
    """The sum of their batch sizes."""
    bytes: int = 0
    """Their size in the store: see `store.counts`."""

    def __add__(self, other: Usage) -> Usage:
        return Usage(self.sessions + other.sessions, self.rows + other.rows, self.bytes + other.bytes)

    def __sub__(self, other: Usage) -> Usage:
        return self + other * -1

    def __mul__(self, count: int) -> Usage:
        return Usage(self.sessions * count, self.rows * count, self.bytes * count)

    def positive(self) -> Usage:
        """The same, with negative values replaced by 0."""
        return Usage(max(0, self.sessions), max(0, self.rows), max(0, self.bytes))


NOTHING = Usage()


@dataclasses.dataclass(frozen=True, slots=True)
class Limits:
    """The quotas of a tenant or of a caller; None: no limit."""

    sessions: int | None = None
    """Concurrent sessions."""
    rows: int | None = None
    """The sum of their batch sizes."""
    bytes: int | None = None
    """Their size in the store."""
    steps_per_second: float | None = None
    """Rows times time steps, on average."""
    burst: int | None = None
    """How many of these steps may come at once; None: those of one second."""
    bytes_in_flight: int | None = None
    """Input bytes of the requests being served."""
    models: int | None = None
    """Versions of models that the tenant's admins have loaded since the server started."""

    @property
    def counts_sessions(self) -> bool:
        """Whether sessions, rows or bytes are limited."""
        return (self.sessions, self.rows, self.bytes) != (None, None, None)

    @property
    def max_steps(self) -> int:
        """The largest number of steps that can be taken at once."""
        if self.burst is not None:
            return self.burst
        return max(1, int(self.steps_per_second or 0))


NO_LIMITS = Limits()


@dataclasses.dataclass(frozen=True, slots=True)
class QuotaTable:
    """The quotas of all tenants and callers."""

    default: Limits = NO_LIMITS
    """For each tenant without an entry. Where callers are not checked: for all callers together."""
    tenants: Mapping[str, Limits] = dataclasses.field(default_factory=dict)
    callers: Mapping[str, Limits] = dataclasses.field(default_factory=dict)
    """By tenant and name, such as `acme/ann`. They apply in addition to the tenant's quotas."""

    def of_tenant(self, tenant: str) -> Limits:
        """The quotas of a tenant."""
        return self.tenants.get(tenant, self.default)


class TokenBucket:
    """Limits a rate: tokens per second on average, and a number of tokens at once.

    See J. Turner, "New directions in communications", IEEE Communications Magazine 24 (1986), and RFC 2215, 4.1.
    Tokens arrive at a rate, up to a depth. Work takes a number of them, or takes none and waits.
    """

    __slots__ = ("_at", "_depth", "_rate", "_tokens")

    def __init__(self, rate: float, depth: int, now: float) -> None:
        """Make a full bucket. `rate` is in tokens per second; `now` is on the clock that every later call uses."""
        self._rate, self._depth, self._at = rate, depth, now
        self._tokens = float(depth)

    def take(self, count: int, now: float) -> float:
        """Take tokens and return 0, or take none and return the seconds after which there will be enough."""
        self._fill(now)
        if count > self._tokens:
            return (count - self._tokens) / self._rate
        self._tokens -= count
        return 0.0

    def give_back(self, count: int) -> None:
        """Return tokens that were taken but not used."""
        self._tokens = min(float(self._depth), self._tokens + count)

    def change(self, rate: float, depth: int, now: float) -> None:
        """Change rate and depth from now on."""
        self._fill(now)
        self._rate, self._depth = rate, depth
        self._tokens = min(self._tokens, float(depth))

    def is_full(self, now: float) -> bool:
        """Whether the bucket is full, so a new one would behave the same."""
        self._fill(now)
        return self._tokens >= self._depth

    def _fill(self, now: float) -> None:
        self._tokens = min(float(self._depth), self._tokens + max(0.0, now - self._at) * self._rate)
        self._at = max(self._at, now)


class Buckets:
    """The buckets of tenants and callers with a limited rate, by name."""

    def __init__(self) -> None:
        self._buckets: dict[str, tuple[Limits, TokenBucket]] = {}

    def of(self, name: str, limits: Limits, now: float) -> TokenBucket:
        """The bucket of a tenant or caller whose rate is limited."""
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
