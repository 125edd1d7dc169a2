"""The earlier records of sessions whose last record is a change, in a database of their own.

    key: digest of the session's id, revision (u8, big-endian)      value: the record

A change that is put moves the record before it here. So each record is written once as the session's last one, and once
here. A record with whole rows leaves what is here behind, and the next change removes it.
"""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Sequence
from typing import Any

from stepwell_server.store.disk.keys import items, key_of, own
from stepwell_server.store.record import (
    Puts,
    RecordBytes,
    is_change,
    is_sound,
    records_of,
    revision_of,
    supersedes,
    value_of,
)

NAME = b"changes"
_REVISION = struct.Struct(">Q")
_DIGEST_BYTES = 16

Pairs = Sequence[tuple[str, RecordBytes]]


def split(puts: Pairs) -> tuple[Pairs, dict[str, list[RecordBytes]]]:
    """Split puts into records with whole rows, and all records, in order, of sessions with changes."""
    if not puts or (isinstance(puts, Puts) and not is_change(puts.together)):
        return puts, {}
    changed = {session_id for session_id, record in puts if is_change(record)}
    if not changed:
        return puts, {}
    records: dict[str, list[RecordBytes]] = {}
    for session_id, value in puts:
        if session_id in changed:
            records.setdefault(session_id, []).extend(records_of(value))
    return [put for put in puts if put[0] not in changed], records


def put(transaction: Any, sessions: Any, earlier: Any, changes: dict[str, list[RecordBytes]]) -> list[bytes]:
    """Put records of sessions, some of which are changes; return the keys of new sessions."""
    added: list[bytes] = []
    puts: list[tuple[str, RecordBytes]] = []
    for session_id, records in changes.items():
        key = key_of(session_id)
        last: RecordBytes | None = own(session_id, key, transaction.get(key, db=sessions))
        if last is None:
            added.append(key)
        for record in records:
            if is_change(record) and last is not None:
                if not supersedes(record, last) and is_sound(session_id, record):
                    continue  # a checkpoint of something that is here already
                if not is_change(last):
                    delete(transaction, earlier, session_id)
                transaction.put(_key(session_id, revision_of(last)), bytes(last), db=earlier)
            last = record
        puts.append((session_id, last or b""))
    for key, value in items(puts):
        transaction.put(key, value, db=sessions)
    return added


def delete(transaction: Any, earlier: Any, session_id: str) -> None:
    """Delete the earlier records of a session."""
    start = _digest(session_id)
    cursor = transaction.cursor(earlier)
    while cursor.set_range(start) and bytes(cursor.key()).startswith(start):
        cursor.delete()


def completed(
    transaction: Any, earlier: Any, session_id: str, record: RecordBytes | None
) -> RecordBytes | None:
    """Return the stored value of a session, given its last record."""
    if record is None or not is_change(record):
        return record
    start = _digest(session_id)
    cursor, found = transaction.cursor(earlier), list[RecordBytes]()
    if cursor.set_range(start):
        for key, value in cursor.iternext():
            if not bytes(key).startswith(start):
                break
            found.append(value)
    return value_of([*found, record])


def all_completed(
    transaction: Any, earlier: Any, session_ids: Sequence[str], records: Sequence[RecordBytes | None]
) -> list[RecordBytes | None]:
    """`completed` for many sessions."""
    return [
        completed(transaction, earlier, session_id, record)
        for session_id, record in zip(session_ids, records, strict=True)
    ]


def _digest(session_id: str) -> bytes:
    return hashlib.sha256(session_id.encode()).digest()[:_DIGEST_BYTES]


def _key(session_id: str, revision: int) -> bytes:
    return _digest(session_id) + _REVISION.pack(revision)
