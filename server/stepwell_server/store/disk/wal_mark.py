"""Which write-ahead logs a store has, as LMDB says it, and which of two records of a session counts."""

from __future__ import annotations

import struct
from typing import NamedTuple, Self

from stepwell_server.store.base import StoreError
from stepwell_server.store.record import is_sound, supersedes

COMMITS, BESIDE = ("0", "1"), ("2", "3")
"""Names of the segments of each log."""

#: Segments for small changes have this part of the size of the others, but not less than so many bytes.
_PART, _LEAST_BYTES = 4, 4096
_MARK = struct.Struct("<IQQ")


class Mark(NamedTuple):
    """What LMDB says of the logs while there may be something in them."""

    owner: int
    """Of the segments, see `Segment`."""
    size: int
    """Of a segment of the log of commits."""
    beside_size: int
    """Of one of the other log; 0 if there is none."""

    def packed(self) -> bytes:
        """As it is stored."""
        return _MARK.pack(*self)

    @classmethod
    def unpacked(cls, stored: bytes) -> Self:
        """Read what `packed` gave.

        Raises:
            StoreError: it was not made so.
        """
        if len(stored) != _MARK.size:
            raise StoreError(
                f"the mark of the write-ahead log must have {_MARK.size} bytes; it is damaged and has {len(stored)}"
            )
        return cls(*_MARK.unpack(stored))


def mark_of(owner: int, size: int, *, has_beside: bool) -> Mark:
    """The mark of new logs, of which the first has segments of `size` bytes."""
    return Mark(owner, size, max(min(size, _LEAST_BYTES), size // _PART) if has_beside else 0)


def is_later(session_id: str, one: bytes, other: bytes) -> bool:
    """Which of two records counts. One that is damaged does, so that its session does not go back silently."""
    if not is_sound(session_id, one):
        return True
    return is_sound(session_id, other) and supersedes(one, other)
