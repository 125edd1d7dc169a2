"""Detects what a shared store lost silently: sessions whose keys were deleted or evicted, and emptied partitions.

A session that is listed, but whose key is missing, was lost alone. A partition without its mark and without listed
sessions was emptied, and nobody knows which sessions it had. Its mark is created again with another token, which shows
all servers
what happened.
"""

from __future__ import annotations

import dataclasses
import secrets
from collections.abc import Iterable, Sequence
from datetime import UTC, datetime

from stepwell_server.logs import Log
from stepwell_server.store.valkey import scripts
from stepwell_server.store.valkey.connection.requests import Request, Requests
from stepwell_server.store.valkey.keys import Keys

_log = Log("store.valkey")
_BATCH_SIZE = 256
"""Marks that are checked in one request."""
_MAX_KNOWN = 10_000
"""Maximum of lost sessions that are remembered. Beyond it, sessions may be counted twice."""
_TOKEN_BYTES = 8


@dataclasses.dataclass(frozen=True, slots=True)
class Mark:
    """The mark of a partition."""

    token: bytes
    lost_ms: int
    """When it was found empty, by the store's clock; 0: never."""

    @classmethod
    def of(cls, value: bytes) -> Mark:
        """Parse a value. A corrupt one counts as "nothing was lost"."""
        _, token, lost_ms = (*value.split(b" "), b"", b"0")[:3]
        return cls(token, int(lost_ms) if lost_ms.isdigit() else 0)

    @property
    def lost_at(self) -> str:
        """When it was found empty, as text."""
        return datetime.fromtimestamp(self.lost_ms / 1000, UTC).isoformat(timespec="seconds")


class Losses:
    """Detects losses. Lives on the event loop."""

    def __init__(
        self, requests: Requests, keys: Keys, incarnation: str, store: str, *, may_write: bool = True
    ) -> None:
        """`store` is the URL for messages. Without `may_write` no marks are created."""
        self._may_write = may_write
        self._requests = requests
        self._keys = keys
        self._incarnation = incarnation
        self._store = store
        self._marks: dict[int, Mark] = {}
        """Last known marks, by partition."""
        self._emptied: set[int] = set()
        """Partitions that were emptied since this server started."""
        self._next = 0
        """The first partition of the next check."""
        self._lost: dict[str, None] = {}
        """Known lost sessions."""
        self.count = 0
        """Number of sessions that were lost alone."""
        self._unreported: list[str] = []

    @property
    def damage(self) -> str:
        """What is known about emptied partitions; empty: nothing."""
        if not self._emptied:
            return ""
        if len(self._emptied) == self._keys.partitions:
            return "the store was emptied: the sessions that it had are lost"
        return (
            f"{len(self._emptied)} of {self._keys.partitions} partitions of the store were emptied: the sessions that they"
            " had are lost"
        )

    def damage_of(self, session_id: str) -> str:
        """The same, if it concerns the partition of this session."""
        return self.damage if self._keys.partition(session_id) in self._emptied else ""

    @property
    def warning(self) -> str:
        """A warning for operators; empty: none."""
        alone = f"{self.count} sessions were lost: their keys were deleted or evicted" if self.count else ""
        return "; ".join(each for each in (self.damage, alone) if each)

    async def begin(self, *, must_be_there: bool) -> None:
        """Check all marks and create missing ones. This detects losses from before this server started.

        `must_be_there`: all marks existed before.

        Raises:
            ServerError: the marks cannot be read.
        """
        every = range(self._keys.partitions)
        for at in range(0, len(every), _BATCH_SIZE):
            await self.look(every[at : at + _BATCH_SIZE], must_be_there=must_be_there)
        before = [p for p, mark in self._marks.items() if mark.lost_ms and p not in self._emptied]
        if before:
            last = max((self._marks[p] for p in before), key=lambda mark: mark.lost_ms)
            _log.warning(
                "partitions of the store were emptied before this server started",
                partitions=len(before),
                of=self._keys.partitions,
                last=last.lost_at,
            )

    async def look_again(self) -> None:
        """Check the marks of the next partitions, and report losses.

        Raises:
            ServerError: the marks cannot be read.
        """
        count = self._keys.partitions
        some = [(self._next + i) % count for i in range(min(count, _BATCH_SIZE))]
        self._next = (self._next + len(some)) % count
        await self.look(some)
        self._report()

    async def look(self, partitions: Sequence[int], *, must_be_there: bool = True) -> None:
        """Check the marks of partitions, and create missing ones.

        Raises:
            ServerError: the marks cannot be read.
        """
        values = await self._requests.ask(
            *(Request(p, (b"GET", self._keys.mark(p)), otherwise=None) for p in partitions)
        )
        found = dict(zip(partitions, values, strict=True))
        missing = [p for p, value in found.items() if value is None]
        if missing and not self._may_write:
            found = {p: value for p, value in found.items() if value is not None}
        elif missing:
            requests = [self._creation(p, must_be_there=must_be_there) for p in missing]
            await self._requests.send(requests, waits=True)
            for partition, request in zip(missing, requests, strict=True):
                if request.problem is not None:
                    raise request.problem
                found[partition] = request.reply
        self._know({p: Mark.of(value) for p, value in found.items()}, made=missing)

    def _creation(self, partition: int, *, must_be_there: bool) -> Request:
        known = self._marks.get(partition)
        return Request.of(
            partition,
            scripts.MARK,
            [self._keys.mark(partition), self._keys.ids(partition)],
            self._incarnation,
            b"" if known is None else known.token,
            secrets.token_hex(_TOKEN_BYTES),
            b"1" if must_be_there else b"0",
        )

    def _know(self, marks: dict[int, Mark], *, made: Iterable[int]) -> None:
        emptied = []
        missing = set(made)
        for partition, mark in marks.items():
            known = self._marks.get(partition)
            is_news = partition in missing if known is None else known.token != mark.token
            if mark.lost_ms and is_news:
                emptied.append(partition)
        self._marks.update(marks)
        new = len(set(emptied) - self._emptied)
        self._emptied.update(emptied)
        if new:
            _log.error(
                "the store, or a part of it, was emptied: the sessions that it had are lost",
                store=self._store,
                partitions=len(emptied),
                of=self._keys.partitions,
            )

    def note(self, session_ids: Iterable[str]) -> None:
        """Note lost sessions."""
        for session_id in session_ids:
            if session_id not in self._lost:
                if len(self._lost) >= _MAX_KNOWN:
                    del self._lost[next(iter(self._lost))]
                self._lost[session_id] = None
                self.count += 1
                self._unreported.append(session_id)

    def _report(self) -> None:
        unreported, self._unreported = self._unreported, []
        if unreported:
            _log.error(
                "sessions are lost: their keys were deleted from the store or evicted",
                sessions=len(unreported),
                key=str(self._keys.session(unreported[0]), "utf-8", "replace"),
            )


async def emptied_parts(requests: Requests, keys: Keys) -> list[Mark]:
    """Return the marks of partitions that were ever found empty. Changes nothing.

    Raises:
        ServerError: the marks cannot be read.
    """
    asked = (Request(p, (b"GET", keys.mark(p)), otherwise=None) for p in range(keys.partitions))
    marks = [Mark.of(value) for value in await requests.ask(*asked) if value is not None]
    return [mark for mark in marks if mark.lost_ms]
