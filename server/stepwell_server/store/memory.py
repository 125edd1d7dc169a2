"""The store that lives and dies with the process."""

from __future__ import annotations

from collections.abc import Sequence

from stepwell_server.store.base import Record


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
