"""Names of keys, and the form of the values of sessions.

    PREFIX{p}s:ID      a session: kind (u1), stamp (8 bytes), time of its last use (ms, u8, big-endian), then
                       1: its record, as `store.record` has it
                       2: a tombstone; it has a time to live
    PREFIX{p}ids       the ids of the sessions of partition p, a sorted set in which all have the same score
    PREFIX{p}counts    how many sessions there are in it by names (`store.counts`), a hash
    PREFIX{p}mark      incarnation of the store, a token, and when the partition was found to be emptied (ms); 0: never
    PREFIX{p}fence     for a write in any case
    PREFIX{p}u:STAMP   is there if an opening was undone whose records have the stamp; with a time to live
    PREFIX{meta}store  what the store says of itself, a hash
    PREFIX{meta}claim:NAME  who has a task to itself, with a time to live
    PREFIX{meta}documents  documents by name, a hash: checksum, content

What stands in braces decides which node of a Cluster has a key: a script may have all keys of one partition.
"""

from __future__ import annotations

import functools
import struct
import zlib

from isal.isal_zlib import crc32

from stepwell_server.errors import StateCorrupt
from stepwell_server.store.base import CLOSES_BYTES, End, Tombstone, pack_closes, unpack_closes

META = -1
"""In place of a partition: of the keys that are the whole store's."""
RECORD, TOMBSTONE = 1, 2
LOST, OTHER_TYPE, UNMARKED = 3, 4, 5
"""In place of a value: see `scripts.FETCH`."""
LOST_STAMP = 2**64 - 1
"""Of what was lost: a session that begins in its place follows it."""
STAMP_BYTES = 8
HEAD = struct.Struct(">B8sQ")
"""Kind, stamp, last use."""
# checksum of the bytes that follow it, end, at, revision, request ids of closes
_STONE = struct.Struct(f"<IBdQ{CLOSES_BYTES}s")
_CHECKSUM_BYTES = 4
_KNOWN_IDS = 65_536


class Keys:
    """The keys of one store."""

    def __init__(self, prefix: str, partitions: int) -> None:
        self.partitions = partitions
        self._prefix = prefix.encode()
        self._tags = [b"%s{%d}" % (self._prefix, p) for p in range(partitions)]
        self._sessions = [b"%ss:" % tag for tag in self._tags]
        meta = b"%s{meta}" % self._prefix
        self.store, self.documents, self.fence = meta + b"store", meta + b"documents", meta + b"fence"
        self._claims = meta + b"claim:"
        # the same sessions are named again and again
        self.session = functools.lru_cache(_KNOWN_IDS)(self._session)
        """The key of a session."""

    def _session(self, session_id: str) -> bytes:
        return self._sessions[self.partition(session_id)] + session_id.encode()

    def partition(self, session_id: str) -> int:
        """In which partition a session is."""
        return zlib.crc32(session_id.encode()) % self.partitions

    def id_at(self, partition: int) -> int:
        """How many bytes of the keys of a partition's sessions stand before the id."""
        return len(self._sessions[partition])

    def ids(self, partition: int) -> bytes:
        """The key of the ids of a partition."""
        return self._tags[partition] + b"ids"

    def counts(self, partition: int) -> bytes:
        """The key of the counts of a partition."""
        return self._tags[partition] + b"counts"

    def mark(self, partition: int) -> bytes:
        """The key of the mark of a partition: it goes when all is lost that the partition has."""
        return self._tags[partition] + b"mark"

    def claim(self, name: str) -> bytes:
        """The key of a task; of the whole store."""
        return self._claims + name.encode()

    def tag(self, partition: int) -> bytes:
        """What stands in braces in the keys of a partition, or of `META`."""
        return b"meta" if partition == META else b"%d" % partition


def store_key(prefix: str) -> bytes:
    """The key of what a store says of itself, before it is known how many partitions it has."""
    return b"%s{meta}store" % prefix.encode()


def pack_tombstone(stone: Tombstone) -> bytes:
    """What is stored of a tombstone behind the head."""
    closes = pack_closes(stone.closes)
    packed = _STONE.pack(0, stone.end, stone.at, stone.revision, closes)[_CHECKSUM_BYTES:]
    checksum = crc32(packed, crc32(stone.session_id.encode()))
    return checksum.to_bytes(_CHECKSUM_BYTES, "little") + packed


def unpack_tombstone(session_id: str, stored: bytes) -> Tombstone:
    """What `pack_tombstone` was given.

    Raises:
        StateCorrupt: it is damaged.
    """
    checksum = crc32(stored[_CHECKSUM_BYTES:], crc32(session_id.encode()))
    if len(stored) == _STONE.size and int.from_bytes(stored[:_CHECKSUM_BYTES], "little") == checksum:
        _, end, at, revision, closes = _STONE.unpack(stored)
        if end in set(End):
            return Tombstone(session_id, End(end), at, unpack_closes(closes), revision)
    raise StateCorrupt(
        f"the tombstone of session {session_id!r} must be as it was written; it is damaged",
        session_id=session_id,
    )
