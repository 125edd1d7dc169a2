"""Protobuf's wire format, as far as plain steps need it: numbers and fields.

See protobuf.dev/programming-guides/encoding.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

VARINT, FIXED64, LENGTH = 0, 1, 2


@dataclasses.dataclass(frozen=True, slots=True)
class Span:
    """A stretch of a message."""

    start: int
    stop: int


class Malformed(Exception):
    """The bytes are no message, or have another form than the one that is looked for."""


def fields(raw: bytes, start: int, stop: int) -> Iterator[tuple[int, int, Span]]:
    """Number, wire type and value of each field.

    Raises:
        Malformed: the fields do not fill the stretch, or one is of a group.
    """
    at = start
    while at < stop:
        tag, at = walk_varint(raw, at, stop)
        wire = tag & 7
        if wire == VARINT:
            _, end = walk_varint(raw, at, stop)
        elif wire == FIXED64:
            end = at + 8
        elif wire == LENGTH:
            size, at = walk_varint(raw, at, stop)
            end = at + size
        else:
            raise Malformed
        if end > stop:
            raise Malformed
        yield tag >> 3, wire, Span(at, end)
        at = end


def walk_varint(raw: bytes, at: int, stop: int) -> tuple[int, int]:
    """As `read_varint`, in a stretch that ends at `stop`.

    Raises:
        Malformed: the stretch ends first, or the number goes on for longer than any may.
    """
    value = shift = 0
    while True:
        if at >= stop or shift > 63:
            raise Malformed
        byte = raw[at]
        at += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value, at
        shift += 7


def read_varint(raw: bytes, at: int) -> tuple[int, int]:
    """The number at a place, and where it ends.

    Raises:
        IndexError: the message ends first, or the number goes on for longer than any may.
    """
    byte = raw[at]
    if byte < 0x80:
        return byte, at + 1
    value = shift = 0
    while byte & 0x80:
        value |= (byte & 0x7F) << shift
        shift += 7
        at += 1
        if shift > 63:
            raise IndexError
        byte = raw[at]
    return value | byte << shift, at + 1


def _encode(value: int) -> bytes:
    out = bytearray()
    while value > 0x7F:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    out.append(value)
    return bytes(out)


_SMALL = tuple(_encode(value) for value in range(1 << 14))


def varint(value: int) -> bytes:
    """A number as protobuf writes it."""
    return _SMALL[value] if value < len(_SMALL) else _encode(value)
