"""The extension fields of a record: facts that the columns of its header do not have.

Each field has a tag of two bytes, a length of two bytes, and a value. Unknown fields are preserved when the session is
written again. A tag with the bit `CRITICAL` must be known: a record with an unknown critical field is refused.

Tags are never reused: 4 is the model's version and its epoch, 6 the caller that created the session, 7 the closes that
ended earlier sessions of the id, 0x8005 the encryption of rows and extra (`encryption.sealer`), and 0x8008 what a change
leaves out (`changes`). 1 to 3 are retired.
"""

from __future__ import annotations

import struct
from collections.abc import Mapping

import numpy as np

CRITICAL = 0x8000
"""A bit of a tag: a server that does not know the field must not use the record."""
VERSION = 4
"""Tag of the version of its model that the session was on: `engine.state.fields.Mark`."""
SEAL = 0x8005
"""Tag of the encryption of rows and extra. It is always the first field; its value ends with the id of the key."""
KEY_ID_AT = 40
"""Offset of the id in that value."""
OWNER = 6
"""Tag of the caller that created the session, if it has a quota of sessions or rows: `TENANT/NAME` in UTF-8."""
CLOSES = 7
"""Tag of the request ids of calls that closed earlier sessions of this id: `store.base.pack_closes`."""
CHANGE = 0x8008
"""Tag of what a change leaves out of its rows: `changes`. It is always the last field."""
CHANGE_HEAD = struct.Struct("<I")
"""The first part of that value: the number of bytes left out."""
KNOWN_TAGS: frozenset[int] = frozenset({VERSION, OWNER, CLOSES, SEAL, CHANGE})
"""Tags that this server knows."""
NOT_COUNTED = frozenset({VERSION, CLOSES, SEAL})
"""Tags that do not count for quotas: see `counted_bytes`."""
FIELD = np.dtype([("tag", "<u2"), ("length", "<u2")])
FIELD_HEAD = struct.Struct("<HH")
"""The same, for a single field."""


def counted_bytes(fields: bytes) -> int:
    """Return how many bytes of extension fields count for quotas: all except version, closes and encryption.

    Those change with moves, keys and earlier sessions of the id, and callers cannot make them large. Of a change, the
    bytes that it leaves out count. Unreadable fields count in full.
    """
    try:
        found = unpack_fields(fields)
    except ValueError:
        return len(fields)
    change = found.pop(CHANGE, b"")
    left_out = CHANGE_HEAD.unpack_from(change)[0] if len(change) >= CHANGE_HEAD.size else len(change)
    own = sum(FIELD_HEAD.size + len(value) for tag, value in found.items() if tag not in NOT_COUNTED)
    return int(left_out + own)


def pack_fields(fields: Mapping[int, bytes]) -> bytes:
    """Encode extension fields in the order of their tags.

    Raises:
        ValueError: a tag or a length does not fit into two bytes.
    """
    try:
        return b"".join([FIELD_HEAD.pack(tag, len(value)) + value for tag, value in sorted(fields.items())])
    except struct.error as error:
        raise ValueError(f"fields of a record must have tags and lengths below 65536: {error}") from error


def unpack_fields(fields: bytes | bytearray | memoryview) -> dict[int, bytes]:
    """Decode the result of `pack_fields`.

    Raises:
        ValueError: the bytes are malformed.
    """
    view, found, at = memoryview(fields), dict[int, bytes](), 0
    while at < len(view):
        if at + FIELD_HEAD.size > len(view):
            raise ValueError(f"a field must have a tag and a length; {len(view) - at} bytes are left")
        tag, length = FIELD_HEAD.unpack_from(view, at)
        at += FIELD_HEAD.size
        if at + length > len(view):
            raise ValueError(f"field {tag:#06x} must have {length} bytes; {len(view) - at} are left")
        found[tag] = bytes(view[at : at + length])
        at += length
    return found
