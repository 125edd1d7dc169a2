"""One replica of a server, as a client knows it. No I/O."""

from __future__ import annotations

import dataclasses
import math

from stepwell._routing.ranking import key_of
from stepwell._transport.call import Endpoint
from stepwell.errors import StepwellError


class Replica(Endpoint):
    """The state of a replica, which its `Router` changes. Compared by identity."""

    __slots__ = (
        "back_s",
        "checked_s",
        "due_s",
        "error",
        "failures",
        "generation",
        "is_checked",
        "is_down",
        "parts",
        "seed",
    )

    def __init__(self, address: str, host: str = "", name: str = "") -> None:
        super().__init__(address, host, name)
        self.seed = key_of(address if address.startswith("unix:") else address.lower())
        self.is_down = False
        self.error: StepwellError | None = None
        """Why it is down."""
        self.generation = 0
        """Increases when the replica goes down or comes back, so that earlier results are recognized as old."""
        self.failures = 0
        """Number of consecutive failed checks since it went down."""
        self.is_checked = False
        """Whether a check is running."""
        self.checked_s = -math.inf
        """Time of the last check."""
        self.due_s = math.inf
        """Time of the next check."""
        self.back_s = -math.inf
        """Time when it came back."""
        self.parts = 8
        """How many of the eight parts of its sessions it has."""

    def __repr__(self) -> str:
        return f"Replica({self.address!r}, {'down' if self.is_down else 'up'})"


@dataclasses.dataclass(frozen=True, slots=True)
class ReplicaInfo:
    """A replica as a client sees it now.

    Example:
        >>> [(replica.address == client.address, replica.is_up) for replica in client.replicas]
        [(True, True)]
    """

    address: str
    """HOST:PORT or unix:PATH."""
    is_up: bool
    """Whether the client sends calls to it. If not, the next replica in their order serves its sessions until it is
    back.
    """
    error: StepwellError | None = None
    """Why the client sends no calls to it; None if it does."""
