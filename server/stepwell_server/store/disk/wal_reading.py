"""The write-ahead log as another process reads it while its server goes on writing.

What was acknowledged before a segment is read is in it, or the store has it already: a segment is truncated only when all
of it was checkpointed. So who reads the log first and the store afterwards misses nothing. A read may meet a write or a
truncation that is under way, and look damaged. What looks the same a second time is damaged.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path

from stepwell_server.store.base import StoreError
from stepwell_server.store.disk import wal_format
from stepwell_server.store.disk.wal_mark import BESIDE, COMMITS, Mark, is_later
from stepwell_server.store.record import HEADER, is_sound, size_of

#: A busy log looks another way each time; so often is it looked at.
_MOST_LOOKS = 100


class LogReplaced(Exception):
    """The segments are another store's: a server that was started meanwhile made new ones."""


@dataclasses.dataclass(slots=True)
class _Segment:
    """What a segment has."""

    generation: int = 0
    base_sequence: int = 0
    sequence: int = 0
    records: dict[str, bytes] = dataclasses.field(default_factory=dict)
    problem: str = ""
    """Why it cannot be read to its end; empty if it can."""
    unsound: frozenset[tuple[str, int]] = frozenset()
    """Records that are not as they were written, with their places."""
    owner: int | None = None


def read_logs(folder: Path, mark: Mark) -> dict[str, bytes]:
    """As `read_log`, of all logs of a store."""
    found = read_log(folder, COMMITS, mark.owner)
    for session_id, record in read_log(folder, BESIDE, mark.owner).items() if mark.beside_size else ():
        if session_id not in found or is_later(session_id, record, found[session_id]):
            found[session_id] = record
    return found


def read_log(folder: Path, names: tuple[str, str], owner: int) -> dict[str, bytes]:
    """The last record of each session that the segments of a store have; those that were damaged as they are.

    Raises:
        LogReplaced: see there.
        StoreError: changes are missing that were acknowledged, or a segment cannot be read.
    """
    try:
        segments = [_read(folder / name) for name in names]
        first, last = sorted(segments, key=lambda segment: (segment.base_sequence, segment.sequence))
        if not first.problem and first.sequence < last.base_sequence:
            # The later one was begun when the earlier had so many. Maybe that was not so yet when it was read.
            path = folder / names[segments.index(first)]
            again = _read(path)
            if again.generation == first.generation and again.sequence < last.base_sequence:
                raise StoreError(
                    f"{path} cannot be read to its end: changes that were acknowledged are missing"
                )
            first = again
    except OSError as error:
        raise StoreError(f"the write-ahead log in {folder} must be readable: {error}") from error
    for segment in (first, last):
        if segment.owner not in (owner, None):
            raise LogReplaced
        if segment.problem:
            raise StoreError(segment.problem)
    if (last.base_sequence, last.sequence) < (first.base_sequence, first.sequence):
        first, last = last, first
    return {**first.records, **last.records}


def _read(path: Path) -> _Segment:
    before = _parse(path)
    for _ in range(_MOST_LOOKS):
        if not before.problem and not before.unsound:
            return before
        found = _parse(path)
        is_same = found.generation == before.generation
        if is_same and found.problem == before.problem and found.unsound == before.unsound:
            return found
        before = found
    raise StoreError(f"{path} must be readable; it was never twice the same")


def _parse(path: Path) -> _Segment:
    data = path.read_bytes()
    start = wal_format.read(data, 0, None)
    if start is None:
        return _Segment(problem=f"{path} cannot be read: it must have a beginning")
    found = _Segment(wal_format.generation_of(data), start.sequence, start.sequence, owner=start.owner)
    end, unsound = start.end, set[tuple[str, int]]()
    for write in wal_format.writes(data, start):
        for entry in write:
            for session_id, at in entry.offsets:
                record = data[at : at + size_of(data[at : at + HEADER.itemsize])]
                found.records[session_id] = record
                if not is_sound(session_id, record):
                    unsound.add((session_id, at))
            end, found.sequence = entry.end, entry.sequence
    behind = wal_format.search(data, end, found.generation)
    if any(entry.sequence > found.sequence + 1 for entry in behind):
        found.problem = (
            f"{path} cannot be read from byte {end} on: changes that were acknowledged are missing"
        )
    found.unsound = frozenset(unsound)
    return found
