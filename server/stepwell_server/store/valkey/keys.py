"""Names of keys, and the encoding of session values.

    PREFIX{p}s:ID      a session: kind (u1), stamp (8 bytes), time of its last use (ms, u8, big-endian), then
                                              1: its record, as encoded by `store.record`
                                              2: a tombstone, with a time to live
    PREFIX{p}e:ID      the earlier records of a session whose record is a change, the oldest first, a list
    PREFIX{p}ids       the ids of the sessions of partition p, a sorted set with equal scores
    PREFIX{p}counts    the counts of the partition (`store.counts`), a hash
    PREFIX{p}mark      the store's incarnation, a token, and when the partition was found empty (ms); 0: never
    PREFIX{p}fence     target of a write without effect
    PREFIX{p}u:STAMP   exists after an opening with this stamp was undone; with a time to live
    PREFIX{meta}store  the description of the store, a hash
    PREFIX{meta}claim:NAME  the holder of a task, with a time to live
    PREFIX{meta}documents  documents by name, a hash: checksum, content
    PREFIX{meta}replicas   the servers that use the store by id, a hash: time of the last report (ms, u8, big-endian),
                                              description (`process.replicas`)

In a Cluster the tag in braces determines the node of a key, so a script may use all keys of one partition.
"""

from __future__ import annotations

import functools
import struct
import zlib
from collections.abc import Sequence

from isal.isal_zlib import crc32

from stepwell_server.errors import StateCorrupt
from stepwell_server.store.base import CLOSES_BYTES, End, Tombstone, pack_closes, unpack_closes

META = -1
"""In place of a partition number: the keys of the whole store."""
RECORD, TOMBSTONE = 1, 2
LOST, OTHER_TYPE, UNMARKED, INCOMPLETE = 3, 4, 5, 6
"""Codes in place of a value: see `scripts.FETCH`."""
LOST_STAMP = 2**64 - 1
"""The stamp of a lost session, which a new session in its place follows."""
STAMP_BYTES = 8
HEAD = struct.Struct(">B8sQ")
"""Kind, stamp, last use."""
# checksum of the following bytes, end, at, revision, request ids of closes
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
        self.replicas = meta + b"replicas"
        self._claims = meta + b"claim:"
        # the same sessions are used again and again
        self.session = functools.lru_cache(_KNOWN_IDS)(self._session)
        """Return the key of a session."""
        self.earlier = functools.lru_cache(_KNOWN_IDS)(self._earlier)
        """Return the key of the earlier records of a session."""

    def _session(self, session_id: str) -> bytes:
        return self._sessions[self.partition(session_id)] + session_id.encode()

    def _earlier(self, session_id: str) -> bytes:
        return b"%se:%s" % (self._tags[self.partition(session_id)], session_id.encode())

    def sessions(self, session_ids: Sequence[str], *, with_earlier: bool) -> list[bytes]:
        """Return the keys of sessions and, if asked for, then those of their earlier records."""
        earlier = map(self.earlier, session_ids) if with_earlier else ()
        return [*map(self.session, session_ids), *earlier]

    def partition(self, session_id: str) -> int:
        """Return the partition of a session."""
        return zlib.crc32(session_id.encode()) % self.partitions

    def id_at(self, partition: int) -> int:
        """Return the offset of the id in the keys of a partition's sessions."""
        return len(self._sessions[partition])

    def ids(self, partition: int) -> bytes:
        """Return the key of the ids of a partition."""
        return self._tags[partition] + b"ids"

    def counts(self, partition: int) -> bytes:
        """Return the key of the counts of a partition."""
        return self._tags[partition] + b"counts"

    def mark(self, partition: int) -> bytes:
        """Return the key of the mark of a partition, which disappears if the partition is emptied."""
        return self._tags[partition] + b"mark"

    def claim(self, name: str) -> bytes:
        """Return the key of a task, which belongs to the whole store."""
        return self._claims + name.encode()

    def tag(self, partition: int) -> bytes:
        """Return the hash tag in the keys of a partition, or of `META`."""
        return b"meta" if partition == META else b"%d" % partition


def store_key(prefix: str) -> bytes:
    """Return the key of a store's description, before its number of partitions is known."""
    return b"%s{meta}store" % prefix.encode()


def pack_tombstone(stone: Tombstone) -> bytes:
    """Encode a tombstone without the head."""
    closes = pack_closes(stone.closes)
    packed = _STONE.pack(0, stone.end, stone.at, stone.revision, closes)[_CHECKSUM_BYTES:]
    checksum = crc32(packed, crc32(stone.session_id.encode()))
    return checksum.to_bytes(_CHECKSUM_BYTES, "little") + packed


def unpack_tombstone(session_id: str, stored: bytes) -> Tombstone:
    """Decode the result of `pack_tombstone`.

    Raises:
        StateCorrupt: it is corrupt.
    """
    checksum = crc32(stored[_CHECKSUM_BYTES:], crc32(session_id.encode()))
    if len(stored) == _STONE.size and int.from_bytes(stored[:_CHECKSUM_BYTES], "little") == checksum:
        _, end, at, revision, closes = _STONE.unpack(stored)
        if end in set(End):
            return Tombstone(session_id, End(end), at, unpack_closes(closes), revision)
    raise StateCorrupt(
        f"the tombstone of session {session_id!r} must be intact; it is corrupt",
        session_id=session_id,
    )
