"""A local store behind the face of those that must be waited for."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

from stepwell_server.store.base import ALL_KEPT, Batch, Committed, LocalStore, StoreHealth, Tombstone
from stepwell_server.store.record import Header, Stored


class AwaitedStore:
    """See `base.Store`. What may wait for a disk is done by a thread, one at a time; all else in place."""

    def __init__(self, local: LocalStore) -> None:
        self.local = local
        self.secret = local.secret
        self.incarnation = local.incarnation
        self._writing = asyncio.Lock()

    async def commit(self, batch: Batch) -> Committed:
        """See `base.Store`."""
        async with self._writing:
            if self.local.waits_for_disk:
                await asyncio.to_thread(self.local.commit, batch)
            else:
                self.local.commit(batch)
            if self.local.needs_checkpoint:
                await asyncio.to_thread(self.local.checkpoint)
        return ALL_KEPT

    async def get(self, session_id: str) -> Stored | None:
        """See `base.Store`."""
        return self.local.get(session_id)

    async def get_many(self, session_ids: Sequence[str]) -> list[Stored | None]:
        """See `base.Store`."""
        return self.local.get_many(session_ids)

    async def scan(self, *, after: str = "", prefix: str = "", limit: int) -> list[tuple[str, Header | None]]:
        """See `base.Store`."""
        return self.local.scan(after=after, prefix=prefix, limit=limit)

    async def count(self) -> int:
        """See `base.Store`."""
        return self.local.count()

    async def count_of(self, model: str) -> int:
        """See `base.Store`."""
        return self.local.count_of(model)

    async def count_some(self, *, after: str = "", prefix: str = "", limit: int) -> tuple[int, str]:
        """See `base.Store`."""
        return self.local.count_some(after=after, prefix=prefix, limit=limit)

    async def tombstones(self, session_ids: Sequence[str]) -> list[Tombstone | None]:
        """See `base.Store`."""
        return self.local.tombstones(session_ids)

    async def announce(self, listen: str) -> None:
        """See `base.Store`."""
        self.local.announce(listen)

    async def check(self) -> StoreHealth:
        """See `base.Store`: a disk that does not answer must not keep everybody else waiting."""
        return await asyncio.to_thread(self.local.check)

    async def close(self) -> None:
        """See `base.Store`."""
        async with self._writing:
            await asyncio.to_thread(self.local.close)
