"""One replica of a server, as a client knows it. No I/O."""

from __future__ import annotations

import dataclasses
import math

from stepwell._routing.ranking import key_of
from stepwell._transport.call import Endpoint
from stepwell.errors import StepwellError


class Replica(Endpoint):
    """What is known of a replica. Changed by the `Router` that has it. Equal only to itself."""

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
        """Counts up when it goes down or comes back, so that what came before is known as old."""
        self.failures = 0
        """Checks that failed, one after the other, since it is down."""
        self.is_checked = False
        """A check is under way."""
        self.checked_s = -math.inf
        """When it was checked last."""
        self.due_s = math.inf
        """When it is to be checked."""
        self.back_s = -math.inf
        """When it came back."""
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
    """It is asked. False: its sessions go to the next replica in their order until it is there again."""
    error: StepwellError | None = None
    """Why it is not asked."""
