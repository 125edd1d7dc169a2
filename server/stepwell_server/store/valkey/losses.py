"""What a shared store has lost in silence: keys of sessions that were deleted or evicted, and parts that were emptied.

A session whose id is listed and whose key is not there was lost alone. A partition whose mark is not there any more, and
which lists nothing, was emptied: then nobody knows which sessions it had. The mark is made anew with another token, by
which all servers see that it happened.
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
"""Marks, in one look."""
_MAX_KNOWN = 10_000
"""Sessions that are known to be lost: more of them are counted, maybe twice."""
_TOKEN_BYTES = 8


@dataclasses.dataclass(frozen=True, slots=True)
class Mark:
    """Of a partition."""

    token: bytes
    lost_ms: int
    """When it was found to be emptied, by the store's clock; 0: never."""

    @classmethod
    def of(cls, value: bytes) -> Mark:
        """What a key says. One that is damaged says that nothing was lost."""
        _, token, lost_ms = (*value.split(b" "), b"", b"0")[:3]
        return cls(token, int(lost_ms) if lost_ms.isdigit() else 0)

    @property
    def lost_at(self) -> str:
        """When it was found to be emptied, for people."""
        return datetime.fromtimestamp(self.lost_ms / 1000, UTC).isoformat(timespec="seconds")


class Losses:
    """Finds out what was lost. Lives on the event loop."""

    def __init__(
        self, requests: Requests, keys: Keys, incarnation: str, store: str, *, may_write: bool = True
    ) -> None:
        """`store` is its URL, for people. Without `may_write` no marks are made."""
        self._may_write = may_write
        self._requests = requests
        self._keys = keys
        self._incarnation = incarnation
        self._store = store
        self._marks: dict[int, Mark] = {}
        """As they were seen last, by partition."""
        self._emptied: set[int] = set()
        """Partitions that were, since this server began."""
        self._next = 0
        """The first partition of the next look."""
        self._lost: dict[str, None] = {}
        """Sessions of which it is known."""
        self.count = 0
        """Of sessions that were lost alone."""
        self._unsaid: list[str] = []

    @property
    def damage(self) -> str:
        """What is known of parts that were emptied; empty: nothing."""
        if not self._emptied:
            return ""
        if len(self._emptied) == self._keys.partitions:
            return "the store was emptied: sessions that it had are lost"
        return (
            f"{len(self._emptied)} of {self._keys.partitions} parts of the store were emptied: sessions that they"
            " had are lost"
        )

    def damage_of(self, session_id: str) -> str:
        """The same, if the part is concerned in which a session would be."""
        return self.damage if self._keys.partition(session_id) in self._emptied else ""

    @property
    def warning(self) -> str:
        """What people who run the server should know; empty: nothing."""
        alone = f"{self.count} sessions were lost: their keys were deleted, or evicted" if self.count else ""
        return "; ".join(each for each in (self.damage, alone) if each)

    async def begin(self, *, must_be_there: bool) -> None:
        """See all marks, and make those that are missing; what was lost while nobody looked is known then.

        `must_be_there`: they have all been made before.

        Raises:
            ServerError: they cannot be asked for.
        """
        every = range(self._keys.partitions)
        for at in range(0, len(every), _BATCH_SIZE):
            await self.look(every[at : at + _BATCH_SIZE], must_be_there=must_be_there)
        before = [p for p, mark in self._marks.items() if mark.lost_ms and p not in self._emptied]
        if before:
            last = max((self._marks[p] for p in before), key=lambda mark: mark.lost_ms)
            _log.warning(
                "parts of the store were emptied before this server began",
                parts=len(before),
                of=self._keys.partitions,
                last=last.lost_at,
            )

    async def look_again(self) -> None:
        """See whether some more partitions have their marks, and say what was found to be lost.

        Raises:
            ServerError: they cannot be asked for.
        """
        count = self._keys.partitions
        some = [(self._next + i) % count for i in range(min(count, _BATCH_SIZE))]
        self._next = (self._next + len(some)) % count
        await self.look(some)
        self._say()

    async def look(self, partitions: Sequence[int], *, must_be_there: bool = True) -> None:
        """See whether partitions have their marks, and make those that are missing.

        Raises:
            ServerError: they cannot be asked for.
        """
        values = await self._requests.ask(
            *(Request(p, (b"GET", self._keys.mark(p)), otherwise=None) for p in partitions)
        )
        found = dict(zip(partitions, values, strict=True))
        missing = [p for p, value in found.items() if value is None]
        if missing and not self._may_write:
            found = {p: value for p, value in found.items() if value is not None}
        elif missing:
            requests = [self._making(p, must_be_there=must_be_there) for p in missing]
            await self._requests.send(requests, waits=True)
            for partition, request in zip(missing, requests, strict=True):
                if request.problem is not None:
                    raise request.problem
                found[partition] = request.reply
        self._know({p: Mark.of(value) for p, value in found.items()}, made=missing)

    def _making(self, partition: int, *, must_be_there: bool) -> Request:
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
                "the store, or a part of it, was emptied: sessions that it had are lost",
                store=self._store,
                parts=len(emptied),
                of=self._keys.partitions,
            )

    def note(self, session_ids: Iterable[str]) -> None:
        """Sessions were found to be lost."""
        for session_id in session_ids:
            if session_id not in self._lost:
                if len(self._lost) >= _MAX_KNOWN:
                    del self._lost[next(iter(self._lost))]
                self._lost[session_id] = None
                self.count += 1
                self._unsaid.append(session_id)

    def _say(self) -> None:
        unsaid, self._unsaid = self._unsaid, []
        if unsaid:
            _log.error(
                "sessions are lost: their keys were deleted from the store, or evicted",
                sessions=len(unsaid),
                key=str(self._keys.session(unsaid[0]), "utf-8", "replace"),
            )


async def emptied_parts(requests: Requests, keys: Keys) -> list[Mark]:
    """Marks of partitions that have ever been found to be emptied. Nothing is changed.

    Raises:
        ServerError: they cannot be asked for.
    """
    asked = (Request(p, (b"GET", keys.mark(p)), otherwise=None) for p in range(keys.partitions))
    marks = [Mark.of(value) for value in await requests.ask(*asked) if value is not None]
    return [mark for mark in marks if mark.lost_ms]
