"""Reads the write-ahead log in another process, while its server writes it.

A change acknowledged before a segment is read is in the segment or already in the store, because a segment is truncated
only after everything in it was checkpointed. So a process that reads the log first and the store afterwards misses
nothing.
A segment may look corrupt if it is read during a write or a truncation. It is corrupt if it looks the same twice.
"""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

from stepwell_server.store.base import StoreError
from stepwell_server.store.disk.wal.layout import Content, content_of
from stepwell_server.store.disk.wal.log import SEGMENTS
from stepwell_server.store.record import (
    HEADER,
    RecordBytes,
    follows,
    is_change,
    is_sound,
    size_of,
    value_of,
)

#: A busy log differs each time; this is the maximum of reads.
_MAX_LOOKS = 100


class LogReplaced(Exception):
    """The segments belong to another store, because a server that started meanwhile created new ones."""


def read_log(folder: Path, owner: int) -> dict[str, list[RecordBytes]]:
    """Return the last record of each session in the segments of a store, including corrupt ones, and those that it needs.

    The oldest comes first. If it is a change, LMDB has the records before it.

    Raises:
        LogReplaced: the segments belong to another store.
        StoreError: acknowledged changes are missing, or a segment cannot be read.
    """
    try:
        first, last = sorted((_read(folder / name) for name in SEGMENTS), key=_order)
        for _ in range(_MAX_LOOKS):
            if first.content.problem or first.content.sequence >= last.content.base_sequence:
                break
            # The earlier segment may have been read before its last writes, and the later one started after them.
            again = _read(first.path)
            is_same = again.content.generation == first.content.generation
            if is_same and again.content.sequence < last.content.base_sequence:
                raise StoreError(f"{first.path} cannot be read to its end: acknowledged changes are missing")
            # if it was truncated meanwhile, the other one has had later writes
            first, last = sorted((again, last), key=_order)
        else:
            raise StoreError(f"{folder} must be readable; its segments rotated between all reads")
    except OSError as error:
        raise StoreError(f"the write-ahead log in {folder} must be readable: {error}") from error
    for path, content, _ in (first, last):
        if content.owner not in (owner, None):
            raise LogReplaced
        if content.problem:
            raise StoreError(f"{path} {content.problem}: acknowledged changes are missing")
    for session_id, records in last.records.items():
        before = first.records.get(session_id, [])
        # if others are between them, LMDB has those
        is_next = bool(before) and is_change(records[0]) and follows(records[0], before[-1])
        first.records[session_id] = [*before, *records] if is_next else records
    return first.records


class _Segment(NamedTuple):
    """A segment as read."""

    path: Path
    content: Content
    records: dict[str, list[RecordBytes]]


def _order(segment: _Segment) -> tuple[int, int]:
    return segment.content.base_sequence, segment.content.sequence


def _read(path: Path) -> _Segment:
    before: object = None
    for _ in range(_MAX_LOOKS):
        data = path.read_bytes()
        found = content_of(data)
        records: dict[str, list[RecordBytes]] = {
            session_id: [
                data[at : at + size_of(data[at : at + HEADER.itemsize])] for at in found.places.of(session_id)
            ]
            for session_id in found.places.last
        }
        unsound = {
            (i, found.places.last[i]) for i, each in records.items() if not is_sound(i, value_of(each))
        }
        seen = found.generation, found.problem, unsound
        if seen == before or not (found.problem or unsound):
            return _Segment(path, found, records)
        before = seen
    raise StoreError(f"{path} must be readable; it changed between all reads")
