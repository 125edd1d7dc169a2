"""The extension fields of a record: what later servers say of a session beside the columns of the header.

Each has a tag of two bytes, a length of two bytes and its value; one stands after the other. A field that is not known
here goes along when the session is written again. One whose tag has the bit `CRITICAL` must be known: a record that has
others is refused.

Tags are never used twice. 4 is the version of the model and the epoch in which that was so, 6 who has made the session,
7 the closes that ended earlier sessions of its id; 0x8005 says that rows and extra are encrypted, and how (`encryption.sealer`). 1 to
3 are not used any more.
"""

from __future__ import annotations

import struct
from collections.abc import Mapping

import numpy as np

CRITICAL = 0x8000
"""A bit of a field's tag: who does not know the field must not use the record."""
VERSION = 4
"""Tag of the version of its model that the session was on: `engine.state.fields.Mark`."""
SEAL = 0x8005
"""Tag of what says how rows and extra are encrypted. It is the first field; the value ends with the key's id."""
KEY_ID_AT = 40
"""Where in that value the id begins."""
OWNER = 6
"""Tag of who has made the session, where that caller has a quota of sessions or rows: `TENANT/NAME` in UTF-8."""
CLOSES = 7
"""Tag of the request ids of the calls that closed earlier sessions of the id: `store.base.pack_closes`."""
KNOWN_TAGS: frozenset[int] = frozenset({VERSION, OWNER, CLOSES, SEAL})
"""Tags of the fields that this server knows."""
NOT_COUNTED = frozenset({VERSION, CLOSES, SEAL})
"""Tags of the fields that do not count for quotas: see `counted_bytes`."""
FIELD = np.dtype([("tag", "<u2"), ("length", "<u2")])
FIELD_HEAD = struct.Struct("<HH")
"""The same, for one."""


def counted_bytes(fields: bytes) -> int:
    """How many bytes of extension fields count for quotas: all but those of version, closes and encryption.

    Those change with moves, keys and earlier sessions of the id, and nobody can make them large. Fields that make no sense count whole.
    """
    try:
        found = unpack_fields(fields)
    except ValueError:
        return len(fields)
    return sum(FIELD_HEAD.size + len(value) for tag, value in found.items() if tag not in NOT_COUNTED)


def pack_fields(fields: Mapping[int, bytes]) -> bytes:
    """Extension fields by tag as a record has them, in the order of their tags.

    Raises:
        ValueError: a tag or a value does not fit into two bytes, or two bytes of length.
    """
    try:
        return b"".join([FIELD_HEAD.pack(tag, len(value)) + value for tag, value in sorted(fields.items())])
    except struct.error as error:
        raise ValueError(f"fields of a record must have tags and lengths below 65536: {error}") from error


def unpack_fields(fields: bytes | bytearray | memoryview) -> dict[int, bytes]:
    """What `pack_fields` was given.

    Raises:
        ValueError: it was not made so.
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
