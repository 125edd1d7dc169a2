"""The write-ahead log as another process reads it while its server writes it.

What was acknowledged before a segment is read is in it, or the store has it already: a segment is truncated only when all
of it was checkpointed. So a reader of the log first and the store afterwards misses nothing. A read may meet a write or a
truncation that is under way, and look damaged. What looks the same a second time is damaged.
"""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

from stepwell_server.store.base import StoreError
from stepwell_server.store.disk.wal.layout import Content, content_of
from stepwell_server.store.disk.wal.log import SEGMENTS
from stepwell_server.store.record import HEADER, is_sound, size_of

#: A busy log differs at each read; it is read at most this often.
_MAX_LOOKS = 100


class LogReplaced(Exception):
    """The segments are another store's: a server that was started meanwhile made new ones."""


def read_log(folder: Path, owner: int) -> dict[str, bytes]:
    """The last record of each session that the segments of a store have; those that were damaged as they are.

    Raises:
        LogReplaced: see there.
        StoreError: changes are missing that were acknowledged, or a segment cannot be read.
    """
    try:
        segments = [_read(folder / name) for name in SEGMENTS]
        first, last = sorted(segments, key=_order)
        if not first.content.problem and first.content.sequence < last.content.base_sequence:
            # The earlier segment may have been read before its last writes, after which the later one was begun.
            again = _read(first.path)
            is_same = again.content.generation == first.content.generation
            if is_same and again.content.sequence < last.content.base_sequence:
                raise StoreError(
                    f"{first.path} cannot be read to its end: changes that were acknowledged are missing"
                )
            first = again
    except OSError as error:
        raise StoreError(f"the write-ahead log in {folder} must be readable: {error}") from error
    for path, content, _ in (first, last):
        if content.owner not in (owner, None):
            raise LogReplaced
        if content.problem:
            raise StoreError(f"{path} {content.problem}: changes that were acknowledged are missing")
    first, last = sorted((first, last), key=_order)
    return {**first.records, **last.records}


class _Segment(NamedTuple):
    """A segment that was read."""

    path: Path
    content: Content
    records: dict[str, bytes]


def _order(segment: _Segment) -> tuple[int, int]:
    return segment.content.base_sequence, segment.content.sequence


def _read(path: Path) -> _Segment:
    before: object = None
    for _ in range(_MAX_LOOKS):
        data = path.read_bytes()
        found = content_of(data)
        records = {
            session_id: data[at : at + size_of(data[at : at + HEADER.itemsize])]
            for session_id, at in found.offsets.items()
        }
        unsound = {(i, found.offsets[i]) for i, record in records.items() if not is_sound(i, record)}
        seen = found.generation, found.problem, unsound
        if seen == before or not (found.problem or unsound):
            return _Segment(path, found, records)
        before = seen
    raise StoreError(f"{path} must be readable; it was never twice the same")
