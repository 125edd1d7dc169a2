"""What a run does, and each process's share of it. Plain values that travel as JSON."""

from __future__ import annotations

import dataclasses
import json
from typing import Literal, Self

from stepwell.cli.toolkit.target import Target

Mode = Literal["unary", "stream", "frames", "group"]
MODES: tuple[Mode, ...] = ("unary", "stream", "frames", "group")

MAX_SESSIONS = 1_000_000
MAX_CONCURRENCY = 65_536
MOST_BY_DEFAULT = 1024
"""Calls in flight at once unless told otherwise."""
MAX_PROCESSES = 64
MAX_SECONDS = 3600.0
GROUP_SIZE = 1024
"""Sessions of one group unless told otherwise."""


@dataclasses.dataclass(frozen=True)
class Plan:
    """What a process of the load generator does: its own share, or the whole before it is shared out."""

    address: str
    """HOST:PORT or unix:PATH of the server; those of replicas with commas between."""
    timeout_s: float
    """Time limit of each call."""
    model: str
    """Name of the model."""
    mode: Mode
    """How steps travel."""
    first_session: int
    """Number of its first session."""
    sessions: int
    """How many sessions it opens."""
    concurrency: int
    """Calls in flight at once."""
    group_size: int
    """Sessions of one group; for mode "group"."""
    steps_per_call: int
    """Time steps of a call."""
    batch_size: int
    """Rows of each session."""
    prefix: str
    """What the ids of this run's sessions begin with; no other run's do."""
    tls: dict[str, str] | None = None
    """Arguments of `TlsConfig`; None: no TLS."""
    token_file: str | None = None
    tenant: str | None = None
    allow_insecure_token: bool = False
    """As those of `Target`."""

    @property
    def target(self) -> Target:
        """The server."""
        return Target(
            self.address, self.timeout_s, self.tls, self.token_file, self.tenant, self.allow_insecure_token
        )

    def ids(self) -> list[str]:
        """The ids of its sessions."""
        return [f"{self.prefix}{self.first_session + i}" for i in range(self.sessions)]

    @property
    def units(self) -> int:
        """How many things can have a call in flight at once: sessions, or groups of them."""
        return -(-self.sessions // self.group_size) if self.mode == "group" else self.sessions

    def with_concurrency(self, concurrency: int | None, processes: int) -> Plan:
        """The same with so many calls in flight at once, as far as there are sessions or groups for them.

        Args:
            concurrency: As the user wants it; None: one for each session, 1,024 at most, or with groups one for
                each process.
            processes: How many processes there are.
        """
        wanted = concurrency or (processes if self.mode == "group" else MOST_BY_DEFAULT)
        return dataclasses.replace(self, concurrency=min(wanted, self.units))

    def shares(self, processes: int) -> list[Plan]:
        """Split it over processes as evenly as whole sessions, or groups of them, allow."""
        size = self.group_size if self.mode == "group" else 1
        processes = min(processes, self.units, self.concurrency)
        units, lanes = parts(self.units, processes), parts(self.concurrency, processes)
        shares, first = [], 0
        for unit, lane in zip(units, lanes, strict=True):
            sessions = min(unit * size, self.sessions - first)
            shares.append(dataclasses.replace(self, first_session=first, sessions=sessions, concurrency=lane))
            first += sessions
        return shares

    def to_json(self) -> str:
        """One line of JSON."""
        return json.dumps(dataclasses.asdict(self))

    @classmethod
    def from_json(cls, text: str) -> Self:
        """Read what `to_json` wrote."""
        return cls(**json.loads(text))


def parts(total: int, count: int) -> list[int]:
    """Split a number into `count` whole ones that differ by one at most; a smaller number has no larger part."""
    each, more = divmod(total, count)
    return [each + 1] * more + [each] * (count - more)
