"""The limits that a front sets for its clients. docs/reference/limits.md describes each."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

_MIN_BUDGET_BYTES = 256 << 20
_MAX_BYTES = 1 << 62  # the native front takes it twice, in 64 bits
#: 30 years: the longest timeout that timers accept.
_MAX_S = 1e9
#: The budgets leave room for this many of the largest messages: in all, and per connection.
_MESSAGES, _MESSAGES_OF_CONNECTION = 4, 2


@dataclasses.dataclass(frozen=True)
class FrontLimits:
    """Limits of a front. Sizes in bytes, times in seconds."""

    message_bytes: int
    """A single request or reply."""
    streams: int = 1000
    """Concurrent calls of one connection; further calls wait at the client."""
    header_bytes: int = 16 << 10
    """The headers of a call."""
    keepalive_s: float = 40.0
    """A client that is silent for this long is pinged."""
    keepalive_timeout_s: float = 20.0
    """A pinged client must answer within this time."""
    age_s: float = 0.0
    """A connection accepts calls for this long, plus or minus a tenth. Then its client is asked to reconnect. 0: no
    limit."""
    age_grace_s: float = 0.0
    """How long running calls may continue after that."""
    handshake_s: float = 10.0
    """A new connection must complete TLS within this time, and begin HTTP/2 within as much again."""

    # Only the native front has the limits below: gRPC offers no such settings.
    connections: int = 16_384
    """Concurrent connections. Beyond this, the front closes connections that are idle or whose callers are unknown;
    if there are none, it closes the new one."""
    address_connections: int = 0
    """Concurrent connections from one address, which may be a proxy's. 0: no limit."""
    calls: int = 65_536
    """Concurrent calls of all connections; more are refused. No connection may hold more than it leaves for the
    others."""
    unknown_calls: int = 16_384
    """Concurrent calls of unknown callers, where callers are checked."""
    health_calls: int = 1024
    """Concurrent health checks. No other call counts against this limit."""
    watches: int = 4096
    """Concurrent health watches, which have no end."""
    open_message_bytes: int = 4 << 10
    """A message of a method that needs no authentication: it names a service or a model, or is empty."""
    receive_s: float = 10.0
    """A message that has begun to arrive may pause for this long."""
    receive_bytes_per_s: int = 64 << 10
    """After that time it must arrive at least at this rate."""
    budget_bytes: int = 0
    """Memory for the messages and replies of all calls. Beyond it, calls that hold over 64 KiB are refused; beyond
    twice as much, all calls. 0: enough for a few of the largest messages."""
    connection_bytes: int = 0
    """Memory for the messages and replies of one connection. 0: enough for a few of the largest messages."""
    connection_steps: int = 2048
    """Unanswered steps of one connection before the front stops reading it; a message that is not a plain step
    counts as 8."""
    frames: int = 1024
    """Unanswered frames of one stream before the front stops reading it."""
    unread_s: float = 60.0
    """A call ends if its client makes no room for a reply for this long. Meanwhile its stream is not read."""
    queued_bytes: int = 2 << 20
    """Plain messages waiting for the event loop before the front stops reading streams."""

    @property
    def values(self) -> Mapping[str, float]:
        """All limits by name, with the computed ones filled in."""
        given = dataclasses.asdict(self)
        budget = min(_MAX_BYTES, self.budget_bytes or max(_MIN_BUDGET_BYTES, _MESSAGES * self.message_bytes))
        own = self.connection_bytes or _MESSAGES_OF_CONNECTION * self.message_bytes
        ages = {name: min(given[name], _MAX_S) for name in ("age_s", "age_grace_s")}
        return given | ages | {"budget_bytes": budget, "connection_bytes": min(budget, own)}
