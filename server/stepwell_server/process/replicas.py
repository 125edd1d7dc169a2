"""The servers that share a store, as they describe themselves in it."""

from __future__ import annotations

import dataclasses
import enum
import json
from typing import Any

EXPIRY_S = 600.0
"""A description that its server does not renew is removed after this time."""
MAX_REPLICAS = 512
"""Maximum of descriptions in a store."""
MAX_BYTES = 2048
"""Maximum of bytes of a description."""
MAX_ID_BYTES = 64
"""Maximum of bytes of a server's id."""
_MAX_TEXT = 255
_MAX_TIME_S = 2.0**37
"""Times beyond this, in the year 6325, are wrong."""
_MAX_COUNT = 2**53


class ReplicaState(enum.Enum):
    """Whether a server answers calls."""

    READY = "ready"
    NOT_READY = "not ready"
    STOPPING = "stopping"
    MISSING = "missing"
    """It stopped renewing its description without leaving. No server writes this."""


@dataclasses.dataclass(frozen=True, slots=True)
class StoredReplica:
    """A description in the store."""

    replica_id: str
    document: bytes
    age_s: float
    """The time since it was written, by the store's clock."""


@dataclasses.dataclass(frozen=True, slots=True)
class Replica:
    """A server that uses the store."""

    id: str
    """Random id of the process."""
    host: str
    """Name of its machine or container."""
    address: str
    """The address on which it listens for gRPC."""
    http_address: str
    """The URL of its JSON over HTTP; empty: none."""
    version: str
    """Version of Stepwell."""
    started: float
    """Time of its start, in seconds since the epoch."""
    state: ReplicaState
    resident_sessions: int
    """Sessions whose state is in its memory."""
    seen: float = 0.0
    """The time at which it described itself, in seconds since the epoch. Not stored: the store's clock decides."""


def encode(replica: Replica) -> bytes:
    """Encode a description, as JSON, since people may read it."""
    fields = dataclasses.asdict(replica)
    fields["state"] = replica.state.value
    return json.dumps({name: fields[name] for name in _STORED}, separators=(",", ":")).encode()


def decode(stored: StoredReplica, now: float) -> Replica:
    """Decode a description. Fields of later releases are ignored.

    Raises:
        ValueError: it is none. The message says why.
    """
    try:
        fields = json.loads(stored.document)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"it must be JSON; {error}") from None
    if not isinstance(fields, dict):
        raise ValueError(f"it must be an object; got {type(fields).__name__}")

    def text(name: str) -> str:
        return _require_text(name, fields.get(name))

    return Replica(
        _require_text("id", stored.replica_id),
        text("host"),
        text("address"),
        text("http_address"),
        text("version"),
        started=float(_require_number("started", fields.get("started"), _MAX_TIME_S)),
        state=_STATES.get(text("state"), ReplicaState.NOT_READY),
        resident_sessions=int(
            _require_number("resident_sessions", fields.get("resident_sessions"), _MAX_COUNT)
        ),
        seen=now - stored.age_s,
    )


_STORED = ("host", "address", "http_address", "version", "started", "state", "resident_sessions")
_STATES = {each.value: each for each in ReplicaState if each is not ReplicaState.MISSING}


def _require_text(name: str, value: Any) -> str:
    """Refuse texts that a terminal or a page should not show."""
    if not isinstance(value, str) or len(value) > _MAX_TEXT or not value.isprintable():
        raise ValueError(f"{name} must be a printable text of at most {_MAX_TEXT} characters")
    return value


def _require_number(name: str, value: Any, limit: float) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value <= limit:
        raise ValueError(f"{name} must be a number from 0 to {limit:g}")
    return value
