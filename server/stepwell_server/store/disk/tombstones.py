"""Tombstones of ended sessions, in LMDB; the oldest are dropped first.

tombstones        key of the id -> age, end, at, revision, request ids of closes
tombstone_ages    age -> key of the id
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from typing import Any

from stepwell_server.store.base import CLOSES_BYTES, End, Tombstone, pack_closes, unpack_closes
from stepwell_server.store.disk.keys import key_of

_VALUE = struct.Struct(f"<QBdQ{CLOSES_BYTES}s")  # age, end, at, revision, request ids of closes
_AGE = struct.Struct(">Q")  # big-endian, so that keys are in order of age


def next_age(transaction: Any, ages: Any) -> int:
    """Return the age of the next tombstone."""
    cursor = transaction.cursor(ages)
    return int(_AGE.unpack(cursor.key())[0]) + 1 if cursor.last() else 0


def bury(
    transaction: Any, tombstones: Any, ages: Any, stones: Sequence[Tombstone], age: int, *, limit: int
) -> int:
    """Put tombstones, starting at this age, and drop the oldest beyond `limit`; return the next age."""
    for stone in stones:
        key = key_of(stone.session_id)
        closes = pack_closes(stone.closes)
        transaction.put(key, _VALUE.pack(age, stone.end, stone.at, stone.revision, closes), db=tombstones)
        transaction.put(_AGE.pack(age), key, db=ages)
        age += 1
    surplus = transaction.stat(ages)["entries"] - limit
    cursor = transaction.cursor(ages)
    for _ in range(surplus):
        cursor.first()
        oldest, key = cursor.item()
        stored = transaction.get(key, db=tombstones)
        # if the session has a newer tombstone, that one stays
        if stored is not None and age_of(stored) == _AGE.unpack(oldest)[0]:
            transaction.delete(key, db=tombstones)
        cursor.delete()
    return age


def tombstone(session_id: str, stored: bytes) -> Tombstone:
    """Decode a stored tombstone."""
    _, end, at, revision, closes = _VALUE.unpack(stored)
    return Tombstone(session_id, End(end), at, unpack_closes(closes), revision)


def age_of(stored: bytes) -> int:
    """Return the age of a stored tombstone."""
    return int(_VALUE.unpack(stored)[0])
