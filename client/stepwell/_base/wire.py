"""Fields of protobuf messages as bytes.

Steps are encoded with these: to build message objects would take several times as long. Tests compare each message
with the generated code. Source: the encoding guide at protobuf.dev, "Message Structure".
"""

from __future__ import annotations

import struct

_VARINT, _I64, _LENGTH_DELIMITED = 0, 1, 2
_FIXED64 = struct.Struct("<Q")
_TAG_AND_FIXED64 = struct.Struct("<BQ")


def varint(number: int) -> bytes:
    """A number below 2**64."""
    if number < 0x80:
        return number.to_bytes(1)
    encoded = bytearray()
    while number >= 0x80:
        encoded.append(number & 0x7F | 0x80)
        number >>= 7
    encoded.append(number)
    return bytes(encoded)


def varint_tag(field: int) -> bytes:
    """What precedes the value of an integer field."""
    return varint(field << 3 | _VARINT)


def bytes_tag(field: int) -> bytes:
    """What precedes the length of a field of bytes, of a string, of a message or of packed numbers."""
    return varint(field << 3 | _LENGTH_DELIMITED)


def fixed64_field(field: int, number: int) -> bytes:
    """A whole field of type fixed64, of a number below 16."""
    return _TAG_AND_FIXED64.pack(field << 3 | _I64, number)


def fixed64(number: int) -> bytes:
    """A number of eight bytes, as in a packed field."""
    return _FIXED64.pack(number)
