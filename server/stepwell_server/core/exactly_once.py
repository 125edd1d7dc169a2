"""The rule that applies a change exactly once, even if it is sent again.

For a session at revision r: a change that expects r is applied. One that expects r - 1 with the request id of the
last change is answered with the remembered reply. Anything else is a conflict. A change without an expected
revision is applied, unless its request id is that of the last change: then it is that change, sent again.

A request id stands for one change, so a digest of the change's content is kept with it. A change with the last
request id but another kind or other content is refused; otherwise it would be applied, or answered with another
change's reply.
"""

from __future__ import annotations

import dataclasses
import enum
import functools
import hashlib
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
from isal.isal_zlib import crc32

#: Means "no revision expected" in an array of expected revisions.
ANY_REVISION = 2**64 - 1

Mask = npt.NDArray[np.bool_]
U64 = npt.NDArray[np.uint64]


@dataclasses.dataclass(frozen=True, slots=True)
class Verdict:
    """What to do with each change: exactly one of `apply`, `replay` and `conflict` is true for each."""

    apply: Mask
    replay: Mask
    conflict: Mask
    same_id: Mask
    """Which of the changes without a conflict have the request id of the last change. Those that `mismatches`
    reports are refused."""


def applies(revision: int, last_request: int, expected: int | None, request: int) -> bool:
    """Whether one change is applied, ignoring its content: the rule of `judge` for a single change."""
    return (expected is None or expected == revision) and (not request or request != last_request)


def judge(revision: U64, last_request: U64, expected: U64 | None, request: U64 | None) -> Verdict | None:
    """Judge one change for each of n sessions. None: all of them are applied.

    The content of the changes is not compared here: see `mismatches`.

    Args:
        revision: `(n,)`, the sessions' revisions.
        last_request: `(n,)`, request ids of the sessions' last changes; 0: none.
        expected: `(n,)`, `ANY_REVISION` where none is expected, or None if no change expects any.
        request: `(n,)`, 0 for none, or None if no change has one.
    """
    is_same = request is not None and np.count_nonzero(request == last_request)
    if not is_same and (expected is None or not np.count_nonzero(expected != revision)):
        return None
    same_id = np.zeros(len(revision), np.bool_)
    if request is not None:
        same_id = (request != 0) & (request == last_request)
    if expected is None:
        expected = np.full(len(revision), ANY_REVISION, np.uint64)
    anything = expected == np.uint64(ANY_REVISION)
    apply = (expected == revision) | (anything & ~same_id)
    if np.count_nonzero(apply & ~same_id) == len(apply):
        return None
    # a session with a remembered request id has revision >= 1, so the subtraction cannot wrap for `same_id`
    replay = ~apply & same_id & (anything | (expected == revision - np.uint64(1)))
    conflict = ~(apply | replay)
    return Verdict(apply, replay, conflict, same_id & ~conflict)


class Kind(enum.IntEnum):
    """The kind of change that a request id stands for."""

    STEP = 1
    RESET = 2
    OPEN = 3
    FORK = 4


_KINDS = frozenset(Kind)
#: A digest is the kind in its first bits, then 16 bits for the dtypes of the model that read the content, then the
#: content.
_KIND_BITS, _DTYPE_BITS, _CONTENT_BITS = 4, 16, 44
_KIND_AT = _DTYPE_BITS + _CONTENT_BITS
_TO_KIND, _TO_CONTENT = np.uint64(_KIND_AT), np.uint64(64 - _CONTENT_BITS)
_CONTENT = np.uint64(2**_CONTENT_BITS - 1)
#: Rows of up to this many words are hashed by multiplication. A longer row gets a CRC-32: cheaper per byte, dearer
#: per row.
_MAX_WORDS = 256
WEIGHTS: U64 = np.random.Generator(np.random.PCG64(0)).integers(
    2**64, size=_MAX_WORDS, dtype=np.uint64
) | np.uint64(1)
_FACTOR, _HALF = np.uint64(0x9E3779B97F4A7C15), np.uint64(32)
_ROW_WEIGHTS, _U64 = WEIGHTS[::-1], 2**64 - 1


def prefix_of(kind: Kind, dtypes: Sequence[object]) -> np.uint64:
    """The first bits of a digest: the kind, and the dtypes of the model that read the content."""
    return np.uint64(int(kind) << _KIND_AT | _number(dtypes) >> (64 - _DTYPE_BITS) << _CONTENT_BITS)


def seed_of(*content: object) -> np.uint64:
    """Hash the content that all sessions of a change share. Each item's `repr` must describe it completely."""
    return np.uint64(_number(content))


def digest_of_one(prefix: np.uint64, seed: np.uint64, arrays: Iterable[npt.NDArray[Any]]) -> int:
    """The digest of one session of one row: the same as `digests`, in a third of the time."""
    row = 0
    for array in arrays:
        number = int(_numbers(np.ascontiguousarray(array).reshape(1, -1))[0])
        row = (_mixed_one(row) if row else 0) + number & _U64
    return _mixed_one(row + int(seed) & _U64) >> (64 - _CONTENT_BITS) | int(prefix)


def row_numbers(arrays: Iterable[npt.NDArray[Any]], count: int) -> U64:
    """A hash of the bytes of each row, `(count,)`. Every array has one entry for each row, of any shape."""
    rows: U64 | None = None
    for array in arrays:
        numbers = _numbers(np.ascontiguousarray(array).reshape(count, -1))
        if rows is not None:
            numbers += _mixed(rows)
        rows = numbers
    return np.zeros(count, np.uint64) if rows is None else rows


def digests(
    prefix: np.uint64, seeds: U64 | np.uint64, rows: U64, sizes: npt.NDArray[np.intp] | None = None
) -> U64:
    """Digests of the content of changes to n sessions. Different content gets the same digest once in four billion.

    Args:
        prefix: See `prefix_of`.
        seeds: See `seed_of`; `(n,)`, or one for all.
        rows: See `row_numbers`; the rows of all sessions, one after the other. Overwritten.
        sizes: `(n,)`, the number of rows of each session, at least 1. None: 1.
    """
    if sizes is not None and len(sizes) != len(rows):
        starts = np.cumsum(sizes) - sizes
        places = np.arange(len(rows)) - np.repeat(starts, sizes)
        weights = _ROW_WEIGHTS[places % _MAX_WORDS] * np.asarray(2 * (places // _MAX_WORDS) + 1, np.uint64)
        rows = np.add.reduceat(np.where(places, _mixed(rows) * weights, rows), starts)
    found = np.add(rows, seeds, out=rows)
    found ^= found >> _HALF
    found *= _FACTOR
    found >>= _TO_CONTENT
    found |= prefix
    return found


def mask_numbers(mask: Mask) -> U64:
    """A hash of each row of a mask, `(n, T)`, to be added to its `row_numbers`; 0 where nothing is masked.

    Trailing columns without a mark make no difference.
    """
    columns = np.arange(mask.shape[1])
    weights = WEIGHTS[columns % _MAX_WORDS] * np.asarray(2 * (columns // _MAX_WORDS) + 1, np.uint64)
    found: U64 = mask @ weights
    return found


def kind_of(digest: int) -> Kind | None:
    """The kind of a digest; None: an unknown one, which an imported record may have."""
    kind = digest >> _KIND_AT
    return Kind(kind) if kind in _KINDS else None


def mismatches(stored: U64, own: U64) -> tuple[Mask, Mask]:
    """Which changes differ from the stored ones in kind, and which of the others differ in content.

    `(n,)` each. A digest of 0 means none, and matches any. Content read by models of different dtypes also matches.
    """
    differs = stored ^ own
    known = (stored != 0) & (own != 0)
    other_kind = known & (differs >> _TO_KIND != 0)
    is_comparable = known & (differs >> np.uint64(_CONTENT_BITS) == 0)
    return other_kind, is_comparable & (differs & _CONTENT != 0)


def _number(content: Sequence[object]) -> int:
    return int.from_bytes(hashlib.blake2b(repr(content).encode(), digest_size=8).digest(), "little")


def _mixed_one(number: int) -> int:
    return (number ^ number >> 32) * int(_FACTOR) & _U64


def _mixed(numbers: U64) -> U64:
    found: U64 = (numbers ^ (numbers >> _HALF)) * _FACTOR
    return found


def _numbers(rows: npt.NDArray[Any]) -> U64:
    """A hash of the bytes of each row: its words, each times the weight of its position, or its CRC-32."""
    byte_count = rows.shape[1] * rows.itemsize
    if not byte_count:
        return np.zeros(len(rows), np.uint64)
    words = rows.view(_words_of(byte_count))
    if words.shape[1] > _MAX_WORDS:
        data = rows.tobytes()
        parts = [data[at : at + byte_count] for at in range(0, len(data), byte_count)]
        return np.fromiter(map(crc32, parts), np.uint64, len(parts))
    if words.itemsize == 8:  # otherwise the high bits of a word would affect no other bits
        words = words ^ (words >> _HALF)
    found: U64 = words @ WEIGHTS[: words.shape[1]]
    return found


@functools.cache
def _words_of(byte_count: int) -> type[np.unsignedinteger[Any]]:
    return next(
        (word for word, size in ((np.uint64, 8), (np.uint32, 4), (np.uint16, 2)) if byte_count % size == 0),
        np.uint8,
    )
