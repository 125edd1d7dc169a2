"""The store that lives and dies with the process."""

from __future__ import annotations

import heapq
import secrets
from collections.abc import Sequence

from stepwell_server.core.remembered import Remembered
from stepwell_server.errors import StateCorrupt
from stepwell_server.store.base import Batch, Record, Tombstone
from stepwell_server.store.record import Header, Stored, decode_header

TOMBSTONES = 100_000


class MemoryStore:
    """Keeps paged-out sessions in host memory. See `base.Store`."""

    is_volatile = True

    def __init__(self) -> None:
        self._records: dict[str, Record] = {}

    def __len__(self) -> int:
        return len(self._records)

    def put(self, records: Sequence[Record]) -> None:
        """See `base.Store`."""
        for record in records:
            self._records[record.session_id] = record

    def get(self, session_id: str) -> Record | None:
        """See `base.Store`."""
        return self._records.get(session_id)

    def delete(self, session_ids: Sequence[str]) -> None:
        """See `base.Store`."""
        for session_id in session_ids:
            self._records.pop(session_id, None)


class MemoryRecords:
    """Keeps encoded records in host memory. See `base.RecordStore`. For one thread."""

    is_volatile = True

    def __init__(self, *, tombstones: int = TOMBSTONES) -> None:
        self.incarnation = secrets.token_hex(4)
        self._records: dict[str, bytes] = {}
        self._tombstones: Remembered[Tombstone] = Remembered(tombstones)

    def commit(self, batch: Batch) -> None:
        """See `base.RecordStore`."""
        for session_id, record in batch.puts:
            # a copy: one record must not keep the buffer of a whole pass alive
            self._records[session_id] = bytes(record)
        for session_id in batch.deletes:
            self._records.pop(session_id, None)
        for session_id in batch.forgets:
            self._tombstones.forget(session_id)
        for stone in batch.tombstones:
            self._tombstones.put(stone.session_id, stone)

    def get(self, session_id: str) -> bytes | None:
        """See `base.RecordStore`."""
        return self._records.get(session_id)

    def get_many(self, session_ids: Sequence[str]) -> list[Stored | None]:
        """See `base.RecordStore`."""
        return [self._records.get(session_id) for session_id in session_ids]

    def scan(self, *, after: str = "", prefix: str = "", limit: int) -> list[tuple[str, Header | None]]:
        """See `base.RecordStore`."""
        fitting = (i for i in self._records if i.startswith(prefix) and i > after)
        return [(i, _header_or_none(i, self._records[i])) for i in heapq.nsmallest(limit, fitting)]

    def count(self) -> int:
        """See `base.RecordStore`."""
        return len(self._records)

    def tombstone(self, session_id: str) -> Tombstone | None:
        """See `base.RecordStore`."""
        return self._tombstones.get(session_id)

    def sync(self) -> None:
        """See `base.RecordStore`: there is nothing to do."""

    def close(self) -> None:
        """See `base.RecordStore`."""
        self._records.clear()


def _header_or_none(session_id: str, record: Stored) -> Header | None:
    try:
        return decode_header(session_id, record)
    except StateCorrupt:
        return None
