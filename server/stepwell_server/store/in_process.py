"""The store of one server, in memory or on a disk, as the engine asks it."""

from __future__ import annotations

import asyncio
import math
from collections.abc import Callable, Sequence

from typing_extensions import override

from stepwell_server.store.access.lanes import Lanes
from stepwell_server.store.base import (
    KNOWN,
    NO_LIMITS,
    NO_STAMPS,
    SOLE,
    Answer,
    Fetched,
    LocalStore,
    Store,
    StoreHealth,
    Unused,
    Write,
)
from stepwell_server.store.heads import Heads, heads_of
from stepwell_server.store.record import Header

_NOTHING = Fetched()


class InProcessStore(Store):
    """Commits go through `Lanes`; a look after the store is a thread's; all else is done in place."""

    def __init__(self, local: LocalStore) -> None:
        self.local = local
        self.secret = local.secret
        self.incarnation = local.incarnation
        self.first_revision = local.first_revision
        self._lanes = Lanes(local)

    @property
    @override
    def damage(self) -> str:
        return self.local.damage

    @override
    def commit(self, write: Write) -> Answer | None:
        return self._lanes.commit(write)

    @override
    async def end_commits(self, timeout_s: float) -> bool:
        return await asyncio.to_thread(self._lanes.close, timeout_s)

    @override
    async def fetch(self, session_ids: Sequence[str], known: Sequence[int] = ()) -> list[Fetched]:
        if len(known) and all(known):
            return [KNOWN] * len(known)
        known = known if len(known) else [0] * len(session_ids)
        unknown = [i for i, stamp in zip(session_ids, known, strict=True) if not stamp]
        found = iter(fetched(self.local, unknown))
        return [KNOWN if stamp else next(found) for stamp in known]

    @override
    def new_stamp(self) -> int:
        return SOLE

    @override
    async def touch(self, session_ids: Sequence[str], stamps: Sequence[int]) -> None:
        """Who serves them knows it."""

    @override
    async def unused(self, cursor: str = "", *, idle_s: float, limit: int) -> Unused:
        """Who serves them knows it."""
        return Unused(heads_of([], []), NO_STAMPS, NO_LIMITS, "")

    @override
    async def claim(self, name: str, whose: str, for_s: float) -> float | None:
        """Nobody else is there."""
        return math.inf

    @override
    async def scan(self, *, after: str = "", prefix: str = "", limit: int) -> list[tuple[str, Header | None]]:
        return self.local.scan(after=after, prefix=prefix, limit=limit)

    @override
    async def heads(self, *, after: str = "", limit: int) -> Heads:
        return self.local.heads(after=after, limit=limit)

    @override
    async def count(self) -> int:
        return self.local.count()

    @override
    async def count_of(self, model: str) -> int:
        return self.local.count_of(model)

    @override
    async def documents(self, prefix: str = "") -> dict[str, bytes]:
        return self.local.documents(prefix)

    @override
    def tell_of_documents(self, changed: Callable[[], None]) -> None:
        """Nobody else writes one."""

    @override
    async def announce(self, listen: str) -> None:
        self.local.announce(listen)

    @override
    async def check(self) -> StoreHealth:
        """A disk that does not answer must not keep everybody else waiting."""
        return await asyncio.to_thread(self.local.check)

    @override
    async def close(self) -> None:
        await asyncio.to_thread(self.local.close)


def fetched(local: LocalStore, session_ids: Sequence[str]) -> list[Fetched]:
    """What a store that answers in place has of sessions.

    Raises:
        Unavailable: the store cannot be read now.
    """
    records = local.get_many(session_ids)
    missing = [i for i, record in zip(session_ids, records, strict=True) if record is None]
    stones = iter(local.tombstones(missing)) if missing else iter(())
    found: list[Fetched] = []
    for record in records:
        stone = next(stones) if record is None else None
        found.append(_NOTHING if record is None and stone is None else Fetched(record, stone, SOLE))
    return found
