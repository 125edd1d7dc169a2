"""A store in memory: it ends with the process."""

from __future__ import annotations

import heapq
import secrets
from collections import Counter
from collections.abc import Sequence

from typing_extensions import override

from stepwell_server.core.recent_values import RecentValues
from stepwell_server.store.base import TOMBSTONES, Batch, LocalStore, StoreHealth, Tombstone
from stepwell_server.store.changes import joined, merged
from stepwell_server.store.heads import Heads, heads_of
from stepwell_server.store.record import RecordBytes


class MemoryStore(LocalStore):
    """Keeps encoded records in host memory. For one thread."""

    for_one_thread = True
    waits_for_disk = False
    needs_checkpoint = False
    damage = ""
    first_revision = 0

    def __init__(self, *, tombstones: int = TOMBSTONES) -> None:
        self.incarnation = secrets.token_hex(4)
        self.secret = secrets.token_bytes(32)
        self._records: dict[str, bytes] = {}
        self._tombstones: RecentValues[str, Tombstone] = RecentValues(tombstones)
        self._counts: Counter[str] = Counter()
        self._documents: dict[str, bytes] = {}

    @override
    def commit(self, batch: Batch) -> None:
        for session_id, record in batch.puts:
            # a copy: one record must not keep the buffer of a whole pass alive
            value = merged(session_id, [record], self._records.get(session_id)) or b""
            self._records[session_id] = bytes(joined(session_id, value))
        for session_id in batch.deletes:
            self._records.pop(session_id, None)
        for session_id in batch.forgets if self._tombstones else ():
            self._tombstones.forget(session_id)
        for stone in batch.tombstones:
            self._tombstones.put(stone.session_id, stone)
        for name, change in (*batch.counts, *batch.tenant_counts):
            self._counts[name] += change
        for name, content in batch.documents:
            if content is None:
                self._documents.pop(name, None)
            else:
                self._documents[name] = bytes(content)

    @override
    def checkpoint(self, *, briefly: bool = False) -> None:
        """Nothing to do."""

    @override
    def get(self, session_id: str) -> bytes | None:
        return self._records.get(session_id)

    @override
    def get_many(self, session_ids: Sequence[str]) -> list[RecordBytes | None]:
        return [self._records.get(session_id) for session_id in session_ids]

    @override
    def heads(self, *, after: str = "", prefix: str = "", limit: int) -> Heads:
        ids = heapq.nsmallest(limit, (i for i in self._records if i.startswith(prefix) and i > after))
        return heads_of([i.encode() for i in ids], [self._records[i] for i in ids])

    @override
    def count(self) -> int:
        return len(self._records)

    @override
    def count_of(self, model: str) -> int:
        return self._counts[model]

    @override
    def tombstones(self, session_ids: Sequence[str]) -> list[Tombstone | None]:
        return [self._tombstones.get(session_id) for session_id in session_ids]

    @override
    def documents(self, prefix: str = "") -> dict[str, bytes]:
        return {name: self._documents[name] for name in sorted(self._documents) if name.startswith(prefix)}

    @override
    def announce(self, listen: str) -> None:
        """Nobody can inspect this store."""

    @override
    def check(self) -> StoreHealth:
        """Memory does not fail."""
        return StoreHealth()

    @override
    def close(self) -> None:
        self._records.clear()
