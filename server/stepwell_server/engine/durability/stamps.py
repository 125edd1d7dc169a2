"""Stamps: numbers that are drawn for commits to a store that others use, so that no two commits look alike.

64 random bits: that one commit is taken for another, which followed the same record, happens once in 2**64 conflicts.
"""

from __future__ import annotations

import os

import numpy as np

from stepwell_server.engine.types import U64


def new_stamp() -> int:
    """A number from 1 to 2**64-1 that nobody has drawn before, as far as anybody will notice."""
    return int.from_bytes(os.urandom(8), "little") or 1


def stamped(stamp: int, count: int) -> U64:
    """`Batch.stamps` of records that are written together."""
    return np.array([stamp], np.uint64) if count == 1 else np.full(count, stamp, np.uint64)
