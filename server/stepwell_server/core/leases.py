"""Which sessions end because their client has been gone for too long: one entry for each client, none for each session.

A session has the number of its lease in the table. A client is there while it says so, and while its sessions are
used. Only when a client has not been heard of for as long as its lease are its sessions looked for, all at once.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Callable, Iterator

import numpy as np
import numpy.typing as npt

from stepwell_server.core.remembered import Remembered
from stepwell_server.core.sessions import Handles, SessionTable

SHORTEST_S = 1.0
LONGEST_S = 3650 * 86400.0
"""Ten years."""

#: Clients without a session in the table of which it is remembered when they were heard of.
_HEARD = 65_536
#: Client, and milliseconds.
STORED = struct.Struct("<QQ")

Lease = tuple[int, int]
"""Client, and how many milliseconds it may be gone."""


def pack(lease: Lease) -> bytes:
    """A lease as a record has it."""
    return STORED.pack(*lease)


def unpack(stored: bytes) -> Lease | None:
    """What `pack` was given; None if it was made otherwise."""
    if len(stored) != STORED.size:
        return None
    client, milliseconds = STORED.unpack(stored)
    return client, milliseconds


class Leases:
    """The leases of sessions of a table. Times are seconds on the monotonic clock. Lives on the event loop."""

    def __init__(self, table: SessionTable, started: float) -> None:
        self._table = table
        self._started = started
        self._numbers: dict[Lease, int] = {}
        self._clients: dict[int, list[int]] = {}
        """The numbers of a client's leases: one, unless it has changed its mind about their duration."""
        self._leases: dict[int, Lease] = {}
        self._free: list[int] = []
        self._heard: Remembered[int, float] = Remembered(_HEARD)
        self._check_at = np.full(64, np.inf)
        """When the sessions of a lease are looked for next, by its number."""
        self._seen = np.zeros(64)
        self._duration_s = np.zeros(64)

    def __len__(self) -> int:
        """How many leases sessions of the table have, about."""
        return len(self._numbers)

    def number(self, lease: Lease) -> int:
        """What sessions have in the table that have this lease. If one is given it soon has it."""
        number = self._numbers.get(lease)
        if number is None:
            number = self._numbers[lease] = self._free.pop() if self._free else len(self._numbers) + 1
            if number >= len(self._seen):
                self._seen = np.concatenate([self._seen, np.zeros_like(self._seen)])
                self._duration_s = np.concatenate([self._duration_s, np.zeros_like(self._duration_s)])
                self._check_at = np.concatenate([self._check_at, np.full_like(self._check_at, np.inf)])
            self._leases[number] = lease
            self._clients.setdefault(lease[0], []).append(number)
            self._seen[number] = self.heard(lease[0])
            self._duration_s[number] = lease[1] / 1000
            self._check_at[number] = self._seen[number] + self._duration_s[number]
        return number

    def of(self, number: int) -> Lease:
        """A lease by its number."""
        return self._leases[number]

    def duration_s(self, number: int) -> float:
        """How long a client may be gone; 0 for no lease."""
        return float(self._duration_s[number]) if number else 0.0

    def durations_s(self, numbers: npt.NDArray[np.int32]) -> npt.NDArray[np.float64]:
        """As `duration_s` of many, but infinity for no lease."""
        return np.where(numbers > 0, self._duration_s[numbers], np.inf)

    def of_client_s(self, client: int) -> float:
        """How long a client may be gone before the first of its sessions ends; 0: none of its leases is known."""
        return min((float(self._duration_s[number]) for number in self._clients.get(client, ())), default=0.0)

    @property
    def shortest_s(self) -> float:
        """The shortest time that a client may be gone; infinity if there are no leases."""
        used = self._check_at < np.inf
        return float(self._duration_s[used].min()) if used.any() else math.inf

    def renew(self, client: int, now: float) -> None:
        """A client is there."""
        self._heard.put(client, now)
        for number in self._clients.get(client, ()):
            self._seen[number] = now
            self._check_at[number] = now + self._duration_s[number]

    def heard(self, client: int) -> float:
        """When a client was there last, as far as that is known; the server's start counts."""
        known = max(
            (float(self._seen[number]) for number in self._clients.get(client, ())), default=-math.inf
        )
        return max(self._started, known, self._heard.get(client) or -math.inf)

    def is_over(self, lease: Lease, now: float) -> bool:
        """Whether a session that nobody has used since the server's start has to end."""
        return self.heard(lease[0]) + lease[1] / 1000 <= now

    def next_check_in(self, now: float) -> float:
        """Seconds until `take_due_in_parts` may have something; infinity if there are no leases."""
        return max(0.0, float(self._check_at.min()) - now)

    def take_due_in_parts(self, now: Callable[[], float], most: int) -> Iterator[Handles]:
        """The sessions whose client has been gone for too long, at most so many at a time.

        Between two parts sessions may be used, or go. Where this ends early, the others are due the next time.
        """
        numbers = np.flatnonzero(self._check_at <= now())
        if not len(numbers):
            return
        table = self._table
        is_due = np.zeros(len(self._seen), np.bool_)
        is_due[numbers] = True
        handles = np.flatnonzero(is_due[table.lease[: table.end]])
        births = table.birth[handles]
        for start in range(0, len(handles), most):
            part = slice(start, start + most)
            some = handles[part][table.birth[handles[part]] == births[part]]
            over = some[self._ends(some) <= now()]
            if len(over):
                yield over
        self._look_again(numbers, now())

    def _ends(self, handles: Handles) -> npt.NDArray[np.float64]:
        """When sessions that have leases end if nothing happens."""
        leases = self._table.lease[handles]
        ends = np.maximum(self._seen[leases], self._table.used[handles]) + self._duration_s[leases]
        ends[self._table.claimed[handles]] = np.inf
        return ends

    def _look_again(self, numbers: npt.NDArray[np.intp], now: float) -> None:
        """Say when the sessions of some leases are looked for next; forget leases that none has any more."""
        left = self._table.lease[: self._table.end]
        is_asked = np.zeros(len(self._seen), np.bool_)
        is_asked[numbers] = True
        handles = np.flatnonzero(is_asked[left])
        check_at = np.full(len(self._seen), np.inf)
        ends = self._ends(handles)
        ends = np.where(np.isinf(ends), now + self._duration_s[left[handles]], ends)  # in use just now
        np.minimum.at(check_at, left[handles], ends)
        has_some = np.zeros(len(self._seen), np.bool_)
        has_some[left[handles]] = True
        for number in numbers.tolist():
            if has_some[number]:
                self._check_at[number] = check_at[number]
            elif self._seen[number] + self._duration_s[number] <= now:
                self._forget(number)

    def _forget(self, number: int) -> None:
        lease = self._leases.pop(number)
        self._check_at[number] = np.inf
        del self._numbers[lease]
        self._heard.put(lease[0], float(self._seen[number]))
        self._clients[lease[0]].remove(number)
        if not self._clients[lease[0]]:
            del self._clients[lease[0]]
        self._free.append(number)
