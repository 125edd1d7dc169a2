"""Keys and values of session records, for ids of any length."""

from __future__ import annotations

import hashlib
import itertools
import operator
import struct
from collections.abc import Iterator, Sequence
from typing import Any

from stepwell_server.store.record import RecordBytes

_MAX_KEY_BYTES = 511
_DIGEST_BYTES = 32
_KEPT_BYTES = _MAX_KEY_BYTES - _DIGEST_BYTES - 1
_ID_LENGTH = struct.Struct("<H")
_first = operator.itemgetter(0)


def key_of(session_id: str) -> bytes:
    """Return the key of an id: the id itself or, if it is long, its beginning and a digest.

    UTF-8 never contains 0xFF, so no id equals the key of another. The value of a long id begins with the id.
    """
    key = session_id.encode()
    if len(key) <= _MAX_KEY_BYTES:
        return key
    return key[:_KEPT_BYTES] + b"\xff" + hashlib.sha256(key).digest()


def is_digest(key: RecordBytes) -> bool:
    """Whether a key is that of a long id."""
    return len(key) == _MAX_KEY_BYTES and key[_KEPT_BYTES] == 0xFF


def items(puts: Sequence[tuple[str, RecordBytes]]) -> list[tuple[bytes, RecordBytes]]:
    """Return keys and values in key order, so that a cursor usually stays on its page. The sort is stable."""
    found = [(session_id.encode(), record) for session_id, record in puts]
    if max(map(len, map(_first, found))) > _MAX_KEY_BYTES:
        found = [_item(put) for put in puts]
    found.sort(key=_first)
    return found


def _item(put: tuple[str, RecordBytes]) -> tuple[bytes, RecordBytes]:
    """Return the key and value of a record."""
    session_id, record = put
    key = key_of(session_id)
    if not is_digest(key):
        return key, record
    name = session_id.encode()
    return key, b"".join((_ID_LENGTH.pack(len(name)), name, record))


def own(session_id: str, key: bytes, value: bytes | None) -> bytes | None:
    """Return the record in a value; empty bytes if it belongs to another session."""
    if value is None or len(key) < _MAX_KEY_BYTES or not is_digest(key):
        return value
    name, record = _split(value)
    return bytes(record) if bytes(name) == session_id.encode() else b""


def _split(value: RecordBytes) -> tuple[memoryview, memoryview]:
    """Split the value of a long id into id and record; both are empty if the value is too short."""
    view = memoryview(value)
    if len(view) < _ID_LENGTH.size:
        return view[:0], view[:0]
    end = _ID_LENGTH.size + _ID_LENGTH.unpack_from(view)[0]
    return view[_ID_LENGTH.size : end], view[end:]


def is_gap(cursor: Any, keys: Sequence[bytes]) -> bool:
    """Whether nothing lies between the lowest and the highest of these keys: a single search for all of them."""
    return not cursor.set_range(min(keys)) or bytes(cursor.key()) > max(keys)


def values(cursor: Any, after: str, prefix: str, limit: int) -> tuple[list[bytes], list[RecordBytes]]:
    """Return ids, as UTF-8, and records after `after`. The cursor returns bytes, which is faster than views."""
    start, shared = key_of(after), prefix.encode()[:_KEPT_BYTES]
    if limit <= 0 or not cursor.set_range(max(start, shared) or b"\0"):
        return [], []
    some = list(itertools.islice(cursor.iternext(), limit + 1))
    some = some[1:] if some[0][0] == start else some[:limit]
    some = [each for each in some if each[0].startswith(shared)]
    keys: list[bytes] = [key for key, _ in some]
    records: list[RecordBytes] = [value for _, value in some]
    if max(map(len, keys), default=0) >= _MAX_KEY_BYTES:
        for place in [place for place, key in enumerate(keys) if is_digest(key)]:
            name, record = _split(records[place])
            keys[place], records[place] = bytes(name), bytes(record)
    return keys, records


def all_entries(cursor: Any) -> Iterator[tuple[bytes, bytes]]:
    """Iterate over all keys and values as stored, which works for a corrupt store too."""
    return iter(cursor.iternext()) if cursor.first() else iter(())


def named(key: bytes, value: bytes) -> tuple[str, bytes]:
    """Return the id and record of an entry."""
    if not is_digest(key):
        return str(key, "utf-8", "replace"), value
    name, record = _split(value)
    return str(name, "utf-8", "replace"), bytes(record)
