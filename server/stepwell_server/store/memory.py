"""The store that lives and dies with the process."""

from __future__ import annotations

import heapq
import secrets
from collections import Counter
from collections.abc import Sequence

from stepwell_server.core.remembered import Remembered
from stepwell_server.store.base import Batch, StoreHealth, Tombstone
from stepwell_server.store.record import Header, Stored, header_or_none

TOMBSTONES = 100_000


class MemoryStore:
    """Keeps encoded records in host memory. See `base.LocalStore`. For one thread."""

    is_volatile = True
    for_one_thread = True
    waits_for_disk = False
    needs_checkpoint = False

    def __init__(self, *, tombstones: int = TOMBSTONES) -> None:
        self.incarnation = secrets.token_hex(4)
        self.secret = secrets.token_bytes(32)
        self._records: dict[str, bytes] = {}
        self._tombstones: Remembered[Tombstone] = Remembered(tombstones)
        self._counts: Counter[str] = Counter()

    def commit(self, batch: Batch) -> None:
        """See `base.LocalStore`."""
        for session_id, record in batch.puts:
            # a copy: one record must not keep the buffer of a whole pass alive
            self._records[session_id] = bytes(record)
        for session_id in batch.deletes:
            self._records.pop(session_id, None)
        for session_id in batch.forgets:
            self._tombstones.forget(session_id)
        for stone in batch.tombstones:
            self._tombstones.put(stone.session_id, stone)
        for model, change in batch.counts:
            self._counts[model] += change

    def checkpoint(self) -> None:
        """See `base.LocalStore`: there is nothing to do."""

    def get(self, session_id: str) -> bytes | None:
        """See `base.LocalStore`."""
        return self._records.get(session_id)

    def get_many(self, session_ids: Sequence[str]) -> list[Stored | None]:
        """See `base.LocalStore`."""
        return [self._records.get(session_id) for session_id in session_ids]

    def scan(self, *, after: str = "", prefix: str = "", limit: int) -> list[tuple[str, Header | None]]:
        """See `base.LocalStore`."""
        fitting = (i for i in self._records if i.startswith(prefix) and i > after)
        return [(i, header_or_none(i, self._records[i])) for i in heapq.nsmallest(limit, fitting)]

    def count(self) -> int:
        """See `base.LocalStore`."""
        return len(self._records)

    def count_of(self, model: str) -> int:
        """See `base.LocalStore`."""
        return self._counts[model]

    def count_some(self, *, after: str = "", prefix: str = "", limit: int) -> tuple[int, str]:
        """See `base.LocalStore`."""
        fitting = (i for i in self._records if i.startswith(prefix) and i > after)
        found = heapq.nsmallest(limit, fitting)
        return len(found), found[-1] if found else ""

    def tombstone(self, session_id: str) -> Tombstone | None:
        """See `base.LocalStore`."""
        return self._tombstones.get(session_id)

    def tombstones(self, session_ids: Sequence[str]) -> list[Tombstone | None]:
        """See `base.LocalStore`."""
        return [self._tombstones.get(session_id) for session_id in session_ids]

    def announce(self, listen: str) -> None:
        """See `base.LocalStore`: nobody finds it."""

    def check(self) -> StoreHealth:
        """See `base.LocalStore`: nothing can happen to it."""
        return StoreHealth()

    def sync(self) -> None:
        """See `base.LocalStore`: there is nothing to do."""

    def close(self) -> None:
        """See `base.LocalStore`."""
        self._records.clear()
