"""Converts batches into requests, and their replies into results.

The request for a step is a script with few, large arguments: stamps and records are one blob each, as they usually
lie in one buffer already (`record.Puts`).
"""

from __future__ import annotations

import dataclasses
import secrets
from collections.abc import Iterable, Sequence

import numpy as np

from stepwell_server.errors import ServerError
from stepwell_server.store.base import ALL_KEPT, Batch, CommitResult, Tombstone
from stepwell_server.store.record import F64, U64, Puts, RecordBytes, is_change
from stepwell_server.store.valkey import scripts
from stepwell_server.store.valkey.connection.requests import Request
from stepwell_server.store.valkey.keys import META, STAMP_BYTES, Keys, pack_tombstone

MAX_KEYS = 512
"""Maximum of sessions in one script: it blocks the server while it runs, and Lua's stack has room for 8000 values."""
MAX_BYTES = 4 * 2**20
"""Maximum of bytes of records in one script, unless a single record is larger."""
_NO_STAMP = bytes(STAMP_BYTES)
_ANY_IDLE_MS = 2**53
"""A number that Lua represents exactly, longer than any idle time."""


@dataclasses.dataclass(slots=True, eq=False)
class Part:
    """A request and its sessions, in the order of its keys."""

    request: Request
    session_ids: Sequence[str]

    @property
    def is_unmarked(self) -> bool:
        """The mark of its partition is missing, so that it may have been emptied: no session was created."""
        return bool(self.request.is_answered and self.request.reply and not self.request.reply[0])

    @property
    def refused(self) -> list[str]:
        """Sessions that did not match."""
        return [self.session_ids[number - 1] for number in self.request.reply if number]


@dataclasses.dataclass(frozen=True, slots=True)
class _Change:
    """The change of one session in a script: see `scripts.COMMIT`."""

    letter: str
    session_id: str
    follows: bytes = _NO_STAMP
    stamp: bytes = _NO_STAMP
    content: RecordBytes = b""
    min_idle_ms: int = 0
    max_idle_ms: int = _ANY_IDLE_MS
    """It only ends if its idle time is between these two."""


class Commits:
    """Converts batches into requests."""

    def __init__(self, keys: Keys, *, is_cluster: bool, tombstone_s: float) -> None:
        self._keys = keys
        self._is_cluster = is_cluster
        self._live_ms = int(tombstone_s * 1000)

    def of(self, batch: Batch) -> list[Part]:
        """Return the requests of a batch, except those for its documents. The batch's buffers are not used afterwards.

        Raises:
            ValueError: the batch lacks the stamps of its records.
        """
        puts = batch.puts
        for name, column in (("follows", batch.follows), ("stamps", batch.stamps)):
            if len(column) != len(puts):
                raise ValueError(
                    f"{name} must have one stamp for each of {len(puts)} puts; it has {len(column)}"
                )
        nothing_ends = not (batch.deletes or batch.tombstones or batch.forgets)
        nothing_ends = nothing_ends and not batch.resized
        if nothing_ends and len(puts) == 1 and batch.follows[0]:  # the common case
            return [self._one(*puts[0], batch.follows, batch.stamps)]
        if nothing_ends and batch.follows.all():
            if isinstance(puts, Puts) and not self._is_cluster and _fits(puts):
                return [self._together(puts, batch.follows, batch.stamps)]
            return self._follow(list(puts), batch.follows, batch.stamps)
        return self._mixed(batch)

    def _mixed(self, batch: Batch) -> list[Part]:
        """Put sessions that begin, end or change their counts into scripts per partition, and the others as usual."""
        apart = {
            *batch.resized,
            *batch.deletes,
            *batch.forgets,
            *(stone.session_id for stone in batch.tombstones),
        }
        follows, stamps = _bytes(batch.follows), _bytes(batch.stamps)
        changes: dict[str, _Change] = {}
        others: list[int] = []
        puts = list(batch.puts)
        for place, (session_id, record) in enumerate(puts):
            if follows[place] == _NO_STAMP or session_id in apart:
                changes[session_id] = _Change("P", session_id, follows[place], stamps[place], record)
            else:
                others.append(place)
        nonce = secrets.token_bytes(STAMP_BYTES)
        stones = {stone.session_id: pack_tombstone(stone) for stone in batch.tombstones}
        # no stamps: delete any record
        delete_follows = _bytes(batch.delete_follows) or [_NO_STAMP] * len(batch.deletes)
        undoes = set(batch.undoes)
        lowest, highest = _milliseconds(batch.min_idle_s), _milliseconds(batch.max_idle_s)
        for place, (session_id, follow) in enumerate(zip(batch.deletes, delete_follows, strict=True)):
            letter, content = "U" if session_id in undoes else "D", stones.pop(session_id, b"")
            min_ms, max_ms = lowest[place] if lowest else 0, highest[place] if highest else _ANY_IDLE_MS
            changes[session_id] = _Change(letter, session_id, follow, nonce, content, min_ms, max_ms)
        for session_id, content in stones.items():
            changes.setdefault(session_id, _Change("T", session_id, stamp=nonce, content=content))
        for session_id in batch.forgets:
            changes.setdefault(session_id, _Change("F", session_id))
        parts = self._scripts(changes.values())
        if others:
            parts += self._follow([puts[i] for i in others], batch.follows[others], batch.stamps[others])
        return parts

    def burying(self, stones: Sequence[Tombstone]) -> list[Part]:
        """Return requests that put tombstones for lost sessions, unless they have come back."""
        nonce = secrets.token_bytes(STAMP_BYTES)
        changes = [
            _Change("L", each.session_id, stamp=nonce, content=pack_tombstone(each)) for each in stones
        ]
        return self._scripts(changes)

    def _together(self, puts: Puts, follows: U64, stamps: U64) -> Part:
        """Put records of the same size that lie in one buffer."""
        session_ids = puts.session_ids
        request = Request.of(
            self._keys.partition(session_ids[0]),
            scripts.REPLACE,
            self._keys.sessions(session_ids, with_earlier=is_change(puts.together)),
            follows.tobytes(),
            stamps.tobytes(),
            b"=%d" % puts.sizes[0],
            bytes(puts.together),
        )
        return Part(request, session_ids)

    def _one(self, session_id: str, record: RecordBytes, follows: U64, stamps: U64) -> Part:
        request = Request.of(
            self._keys.partition(session_id),
            scripts.REPLACE,
            self._keys.sessions((session_id,), with_earlier=is_change(record)),
            follows.tobytes(),
            stamps.tobytes(),
            b"=%d" % len(record),
            bytes(record),
        )
        return Part(request, (session_id,))

    def _follow(self, puts: Sequence[tuple[str, RecordBytes]], follows: U64, stamps: U64) -> list[Part]:
        parts = []
        for partition, places in self._groups([session_id for session_id, _ in puts]):
            for some in _pieces(places, [len(puts[place][1]) for place in places]):
                sizes = [len(puts[place][1]) for place in some]
                one_size = len(set(sizes)) == 1
                request = Request.of(
                    partition,
                    scripts.REPLACE,
                    self._keys.sessions(
                        [puts[place][0] for place in some],
                        with_earlier=any(is_change(puts[place][1]) for place in some),
                    ),
                    follows[some].tobytes(),
                    stamps[some].tobytes(),
                    b"=%d" % sizes[0] if one_size else b"~" + _packed(sizes),
                    b"".join([puts[place][1] for place in some]),
                )
                parts.append(Part(request, [puts[place][0] for place in some]))
        return parts

    def _groups(self, session_ids: Sequence[str]) -> Iterable[tuple[int, list[int]]]:
        """Group sessions that may be in one script, by index. Without a Cluster all may."""
        if not self._is_cluster:
            return [(META, list(range(len(session_ids))))] if session_ids else []
        groups: dict[int, list[int]] = {}
        for place, session_id in enumerate(session_ids):
            groups.setdefault(self._keys.partition(session_id), []).append(place)
        return groups.items()

    def _scripts(self, changes: Iterable[_Change]) -> list[Part]:
        groups: dict[int, list[_Change]] = {}
        for change in changes:
            groups.setdefault(self._keys.partition(change.session_id), []).append(change)
        parts = []
        for partition, members in groups.items():
            sizes = [len(change.content) for change in members]
            for places in _pieces(range(len(members)), sizes):
                some = [members[place] for place in places]
                request = Request.of(
                    partition,
                    scripts.COMMIT,
                    [
                        self._keys.ids(partition),
                        self._keys.counts(partition),
                        self._keys.mark(partition),
                        *self._keys.sessions([change.session_id for change in some], with_earlier=True),
                    ],
                    "".join([change.letter for change in some]),
                    b"".join([change.follows for change in some]),
                    b"".join([change.stamp for change in some]),
                    b"".join([change.content for change in some]),
                    _packed([len(change.content) for change in some]),
                    self._keys.id_at(partition),
                    self._live_ms,
                    _limits([change.min_idle_ms for change in some], 0),
                    _limits([change.max_idle_ms for change in some], _ANY_IDLE_MS),
                )
                parts.append(Part(request, [change.session_id for change in some]))
        return parts


def outcome_of(parts: Sequence[Part], stale: frozenset[str], *, documents_kept: bool) -> CommitResult:
    """Return the result of a batch after its requests were sent.

    Raises:
        Unavailable, Overloaded: nothing was kept.
    """
    conflicts: list[str] = []
    unknown: list[str] = []
    refusal: ServerError | None = None
    is_refused = not documents_kept
    for part in parts:
        request = part.request
        if request.problem is not None:
            refusal = refusal or request.problem
            is_refused &= not request.is_sent
            unknown += part.session_ids
            continue
        failed = part.refused
        # an earlier, unanswered attempt may have been kept, and another change may have followed it
        (unknown if request.is_sent else conflicts).extend(failed)
        is_refused &= len(failed) == len(part.session_ids) and not request.is_sent
        if not request.is_durable:
            unknown += set(part.session_ids).difference(failed)
    if refusal is not None and is_refused:
        raise refusal
    if not (conflicts or unknown or stale):
        return ALL_KEPT
    return CommitResult(frozenset(conflicts), frozenset(unknown), stale)


def _milliseconds(seconds: F64) -> list[int]:
    limits: list[int] = np.minimum(seconds * 1000, _ANY_IDLE_MS).astype(np.int64).tolist()
    return limits


def _limits(limits_ms: Sequence[int], none: int) -> bytes:
    """Pack limits in milliseconds; empty if all are `none`."""
    return b"" if all(each == none for each in limits_ms) else np.array(limits_ms, ">u8").tobytes()


def _fits(puts: Puts) -> bool:
    return 0 < len(puts) <= MAX_KEYS and len(puts.together) <= MAX_BYTES


def _bytes(stamps: U64) -> list[bytes]:
    data = stamps.tobytes()
    return [data[at : at + STAMP_BYTES] for at in range(0, len(data), STAMP_BYTES)]


def _packed(sizes: Sequence[int]) -> bytes:
    return np.array(sizes, np.dtype("<u4")).tobytes()


def _pieces(places: Sequence[int], sizes: Sequence[int]) -> Iterable[list[int]]:
    """Split indices into pieces that fit into one script each."""
    piece: list[int] = []
    size = 0
    for place, own in zip(places, sizes, strict=True):
        if piece and (len(piece) == MAX_KEYS or size + own > MAX_BYTES):
            yield piece
            piece, size = [], 0
        piece.append(place)
        size += own
    if piece:
        yield piece
