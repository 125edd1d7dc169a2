"""What clients may take of a front, in one place. docs/reference/limits.md describes each limit."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

_MIN_BUDGET_BYTES = 256 << 20
_MAX_BYTES = 1 << 62  # the native front takes it twice, in 64 bits
#: 30 years: the longest time that timers are asked for.
_MAX_S = 1e9
#: Messages of the largest size for which there is room at the same time: in all, and of one connection.
_MESSAGES, _MESSAGES_OF_CONNECTION = 4, 2


@dataclasses.dataclass(frozen=True)
class FrontLimits:
    """Limits of a front. Sizes in bytes, times in seconds."""

    message_bytes: int
    """A request or reply."""
    streams: int = 1000
    """Calls of one connection at the same time; more of them wait at the client."""
    header_bytes: int = 16 << 10
    """Headers of a call."""
    keepalive_s: float = 40.0
    """A client that is silent for so long is asked whether it is there."""
    keepalive_timeout_s: float = 20.0
    """And has so long to answer."""
    age_s: float = 0.0
    """A connection takes calls for so long, give or take a tenth; then its client is asked to make a new one. 0: for ever."""
    age_grace_s: float = 0.0
    """After that, how long calls that run may go on."""
    handshake_s: float = 10.0
    """A connection has so long to begin to speak HTTP/2, and so long before that for TLS."""

    # The native front's alone: gRPC has no such limits.
    connections: int = 16_384
    """At the same time: for more of them, others are closed that do nothing or whose callers are not known, else they are."""
    address_connections: int = 0
    """The same, from one address, which may be that of a proxy. 0: no limit."""
    calls: int = 65_536
    """Of all connections at the same time; more are refused. Nobody holds more than what is left for the others."""
    unknown_calls: int = 16_384
    """The same, of callers that are not known, where callers are asked."""
    health_calls: int = 1024
    """The same, of calls that ask how the server is: nobody else's."""
    watches: int = 4096
    """The same, of those that ask for as long as they like."""
    open_message_bytes: int = 4 << 10
    """A message of a method that everybody may call: it names a service or a model, or says nothing."""
    receive_s: float = 10.0
    """A message that has begun to come may pause for so long."""
    receive_bytes_per_s: int = 64 << 10
    """And must come at this rate or faster, after this time."""
    budget_bytes: int = 0
    """Messages and replies of all calls in memory. Beyond, calls that hold over 64 KiB are refused; beyond twice as
    much, all. 0: as much as a few of the largest messages need."""
    connection_bytes: int = 0
    """The same, of one connection."""
    connection_steps: int = 2048
    """Steps of one connection that are not answered, before it is read no further; what is no plain step counts 8."""
    frames: int = 1024
    """Frames of one stream that are not answered, before it is read no further."""
    unread_s: float = 60.0
    """A call ends whose client makes no room for a reply for so long. Meanwhile it is not read."""
    queued_bytes: int = 2 << 20
    """Plain messages that wait for the event loop, before streams are read no further."""

    @property
    def values(self) -> Mapping[str, float]:
        """All of them by name, with none left open."""
        given = dataclasses.asdict(self)
        budget = min(_MAX_BYTES, self.budget_bytes or max(_MIN_BUDGET_BYTES, _MESSAGES * self.message_bytes))
        own = self.connection_bytes or _MESSAGES_OF_CONNECTION * self.message_bytes
        ages = {name: min(given[name], _MAX_S) for name in ("age_s", "age_grace_s")}
        return given | ages | {"budget_bytes": budget, "connection_bytes": min(budget, own)}
