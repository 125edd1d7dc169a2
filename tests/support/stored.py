"""Records for tests of stores."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from stepwell_server.errors import StateCorrupt
from stepwell_server.store.record import Puts, Record, Sheet, Stored, decode


def record(
    session_id: str,
    revision: int = 0,
    size: int = 20,
    *,
    created: float = 0.0,
    opened_with: int = 0,
    content: int | None = None,
) -> bytes:
    """A record of a session; rows of another `content` than the revision tell it from one that is as late."""
    return Record(
        fingerprint="f" * 8,
        model="m",
        batch_size=1,
        revision=revision,
        position=revision,
        request_id=0,
        opened_with=opened_with,
        created=created,
        last_used=0.0,
        reply=0,
        rows=bytes([(revision if content is None else content) % 256]) * size,
    ).encode(session_id)


def sheet(session_ids: Sequence[str], revision: int = 0, size: int = 20) -> Puts:
    """The same records, laid out one after the other."""
    made = Sheet(session_ids, fingerprint="f" * 8, model="m", opened_with=0, created=0.0, row_bytes=size)
    made.rows[:] = np.uint8(revision % 256)
    return made.fill(revisions=revision, positions=revision, request_ids=0, last_used=0.0, replies=0)


def is_damaged(session_id: str, stored: Stored) -> bool:
    """Whether whoever reads a record is told that it is not as it was written."""
    try:
        decode(session_id, stored)
    except StateCorrupt:
        return True
    return False


def put_all(parts: Sequence[Any]) -> dict[str, bytes]:
    """What is there when the records of some parts were put one after the other."""
    return {session_id: bytes(stored) for part in parts for session_id, stored in part}
