"""Changes: records with only what a step changed of rows that have large windows of past values.

A step moves a window by a few elements: the oldest ones leave it, and new ones are appended. Of each window a change has
the new elements only, and everything else of a row. It completes the session's previous record, which may be a change too.
From time to time the engine writes a record with whole rows, so that few changes follow each of them.

The last extension field of a change describes its rows, so that a store can complete them without the model:

    bytes left out of all rows together (u4), then of each window: its offset in a whole row, its size, the size of its new
    elements (u4 each)
"""

from __future__ import annotations

import dataclasses
import itertools
import struct
from collections.abc import Sequence

from stepwell_server.store.fields import CHANGE, CHANGE_HEAD, pack_fields, unpack_fields
from stepwell_server.store.record import (
    RecordBytes,
    fields_at,
    is_change,
    is_sound,
    key_id_of,
    records_of,
    revision_of,
    rows_of,
    supersedes,
    value_of,
    whole,
)

_WINDOW = struct.Struct("<III")


@dataclasses.dataclass(frozen=True, slots=True)
class Window:
    """The place of a window in a whole row, in bytes."""

    start: int
    size: int
    new: int
    """The size of the new elements, which are the last ones."""


def field_of(windows: Sequence[Window], rows: int) -> bytes:
    """Return the extension field of a change of this many rows."""
    left_out = rows * sum(window.size - window.new for window in windows)
    packed = [_WINDOW.pack(window.start, window.size, window.new) for window in windows]
    return pack_fields({CHANGE: b"".join((CHANGE_HEAD.pack(left_out), *packed))})


def merged(session_id: str, newer: Sequence[RecordBytes], stored: RecordBytes | None) -> RecordBytes | None:
    """Return the value of a session, given its newer records, the oldest first, and its value in another place.

    That place may have some of them already, or all.
    """
    if not newer:
        return stored
    if stored is None or not is_change(newer[0]):
        return value_of(newer)
    if not supersedes(newer[-1], stored):
        # a corrupt revision may seem to be an earlier one
        return stored if is_sound(session_id, newer[-1]) else value_of(newer)
    first = revision_of(newer[0])
    return value_of([*(each for each in records_of(stored) if revision_of(each) < first), *newer])


def joined(session_id: str, value: RecordBytes) -> RecordBytes:
    """Return the record of a stored value, with whole rows.

    A value that cannot be completed, or is encrypted, is returned unchanged: decoding it raises `StateCorrupt`.
    """
    if not is_change(value):
        return value
    first, *changes = records_of(value)
    # a record and changes may have been encrypted before and after a new key
    if is_change(first) or not is_sound(session_id, value) or any(map(key_id_of, (first, *changes))):
        return value
    fields = unpack_fields(changes[-1][fields_at(changes[-1]) :])
    try:
        rows = _rows(first, changes)
    except (ValueError, struct.error):
        return value
    del fields[CHANGE]
    return whole(session_id, changes[-1], rows, pack_fields(fields))


def _rows(first: RecordBytes, changes: Sequence[RecordBytes]) -> RecordBytes:
    """Return the rows after changes.

    Raises:
        ValueError, struct.error: the changes do not fit together.
    """
    batch_size, rows = rows_of(first)
    # another version of a model may have the same states, and other windows among them
    for _, found in itertools.groupby(map(_Change.of, changes), lambda change: change.places):
        rows = _rows_after(batch_size, rows, list(found))
    return rows


def _rows_after(batch_size: int, before: memoryview, found: Sequence[_Change]) -> memoryview:
    """Return the rows after changes of the same windows.

    Raises:
        ValueError: the changes do not fit to the rows.
    """
    size, last = len(before) // batch_size, found[-1]
    if any(each.batch_size != batch_size or each.row_bytes + each.left_out != size for each in found):
        raise ValueError("its rows have another size")
    parts: list[RecordBytes] = []
    for row in range(batch_size):
        at = row * size
        rows = [each.rows[row * each.row_bytes : (row + 1) * each.row_bytes] for each in found]
        end = 0
        for index, (start, length) in enumerate(last.places):
            parts.append(rows[-1][end - last.gaps[index] : start - last.gaps[index]])
            end = start + length
            pieces = [before[at + start : at + end]]
            for each, own in zip(found, rows, strict=True):
                low = start - each.gaps[index]
                pieces.append(own[low : low + each.windows[index].new])
            parts.append(b"".join(pieces)[-length:])
        parts.append(rows[-1][end - last.left_out :])
    return memoryview(b"".join(parts))


@dataclasses.dataclass(frozen=True, slots=True)
class _Change:
    """A decoded change."""

    batch_size: int
    rows: memoryview
    row_bytes: int
    windows: Sequence[Window]
    gaps: Sequence[int]
    """For each window the bytes of earlier windows that a row leaves out."""
    left_out: int
    """The bytes that a row leaves out."""

    @property
    def places(self) -> list[tuple[int, int]]:
        """Where its windows are in a whole row."""
        return [(window.start, window.size) for window in self.windows]

    @classmethod
    def of(cls, change: RecordBytes) -> _Change:
        """Decode a change.

        Raises:
            ValueError, struct.error: it has no description, or an impossible one.
        """
        batch_size, rows = rows_of(change)
        packed = unpack_fields(change[fields_at(change) :]).get(CHANGE, b"")[CHANGE_HEAD.size :]
        windows = [Window(*each) for each in _WINDOW.iter_unpack(packed)]
        end = 0
        for window in windows:
            if window.start < end or not 0 < window.new <= window.size:
                raise ValueError(f"its window at {window.start} is impossible")
            end = window.start + window.size
        *gaps, left_out = itertools.accumulate((window.size - window.new for window in windows), initial=0)
        return cls(batch_size, rows, len(rows) // batch_size, windows, gaps, left_out)
