"""Assigns sessions to replicas by rendezvous hashing (highest random weight), the same in every client. No I/O.

Source: D. G. Thaler and C. V. Ravishankar, "Using Name-Based Mappings to Increase Hit Rates", IEEE/ACM Transactions
on Networking 6(1), 1998.

The algorithm does not change between releases, so that all clients send a session to the same replica:

- the key of a session is BLAKE2b of its id in UTF-8, with a digest of 8 bytes, read as a little-endian number;
- the seed of a replica is the same hash of its address, HOST:PORT in lower case or unix:PATH;
- the weight of a replica for a session is `mix(key ^ seed)`, where `mix` is the finalizer of SplitMix64;
- a session prefers the replicas in the order of their weights, greatest first.

So a replica that leaves moves only its own sessions, each to the next replica in that session's order. A replica that
comes back gets these sessions and no others.
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Sequence
from typing import TypeAlias

import numpy as np
import numpy.typing as npt

Keys: TypeAlias = npt.NDArray[np.uint64]

_MASK = 2**64 - 1
_FIRST, _SECOND = 0xBF58476D1CE4E5B9, 0x94D049BB133111EB


def key_of(text: str) -> int:
    """The 64-bit hash of a session's id, or of a replica's address."""
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little")


def keys_of(ids: Sequence[str]) -> Keys:
    """The keys of sessions, (n,)."""
    digest = hashlib.blake2b
    joined = b"".join([digest(each.encode(), digest_size=8).digest() for each in ids])
    return np.frombuffer(joined, "<u8").astype(np.uint64, copy=False)


def weight(key: int, seed: int) -> int:
    """The weight of a replica for a session."""
    mixed = key ^ seed
    mixed = ((mixed ^ (mixed >> 30)) * _FIRST) & _MASK
    mixed = ((mixed ^ (mixed >> 27)) * _SECOND) & _MASK
    return mixed ^ (mixed >> 31)


def weights(keys: Keys, seed: int) -> Keys:
    """The weight of a replica for each of many sessions, (n,)."""
    mixed = keys ^ np.uint64(seed)
    mixed = (mixed ^ (mixed >> np.uint64(30))) * np.uint64(_FIRST)
    mixed = (mixed ^ (mixed >> np.uint64(27))) * np.uint64(_SECOND)
    return mixed ^ (mixed >> np.uint64(31))


def key_of_request(request: object, home: int) -> int:
    """The key of a request's session, of the first of its sessions, or `home` if it has none.

    A request that opens sessions without naming them has a new random key each time.
    """
    session_id: str = getattr(request, "session_id", "")
    if session_id:
        return key_of(session_id)
    ids: Sequence[str] = getattr(request, "session_ids", ())
    if ids:
        return key_of(ids[0])
    return random.getrandbits(64) if getattr(request, "request_id", 0) else home
