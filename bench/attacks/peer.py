"""HTTP/2 as an attacker and a sink speak it: precomputed frames, flow control, and no more, so that the peer costs little.

Nothing is compressed or indexed in headers: one block of bytes serves every call of a connection.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence

PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
DATA, HEADERS, RST_STREAM, SETTINGS, PING, GOAWAY, WINDOW_UPDATE = 0, 1, 3, 4, 6, 7, 8
END_STREAM, END_HEADERS, ACK = 0x1, 0x4, 0x1
INITIAL_WINDOW_SIZE = 4
"""A setting: bytes that a stream may send before its peer makes room."""
DEFAULT_WINDOW, LARGEST_WINDOW, FRAME_BYTES = 65_535, (1 << 31) - 1, 16_384
_HEAD = struct.Struct(">BHBBI")
_SETTING = struct.Struct(">HI")


def frame(kind: int, flags: int, stream: int, payload: bytes = b"") -> bytes:
    """A frame as bytes."""
    size = len(payload)
    return _HEAD.pack(size >> 16, size & 0xFFFF, kind, flags, stream) + payload


def settings(initial_window: int) -> bytes:
    """SETTINGS with the window of each stream."""
    return frame(SETTINGS, 0, 0, _SETTING.pack(INITIAL_WINDOW_SIZE, initial_window))


def window_update(stream: int, size: int) -> bytes:
    """Room for `size` more bytes; stream 0 is the connection."""
    return frame(WINDOW_UPDATE, 0, stream, size.to_bytes(4, "big"))


def header_block(fields: Sequence[tuple[str, str]]) -> bytes:
    """Fields as literals that enter no table (RFC 7541, 6.2.2), lengths below 16,384."""
    return b"".join(b"\0" + _text(name) + _text(value) for name, value in fields)


def _text(value: str) -> bytes:
    raw = value.encode()
    if len(raw) < 127:
        return bytes((len(raw),)) + raw
    rest = len(raw) - 127
    return bytes((127, rest & 127 | 128, rest >> 7)) + raw


class Frames:
    """Cuts received bytes into frames."""

    def __init__(self) -> None:
        self._buffer = bytearray()

    def push(self, received: bytes) -> list[tuple[int, int, int, bytes]]:
        """Kind, flags, stream and payload of each frame that is whole by now."""
        buffer = self._buffer
        buffer += received
        found, at = [], 0
        while at + 9 <= len(buffer):
            high, low, kind, flags, stream = _HEAD.unpack_from(buffer, at)
            end = at + 9 + (high << 16 | low)
            if end > len(buffer):
                break
            found.append((kind, flags, stream & LARGEST_WINDOW, bytes(buffer[at + 9 : end])))
            at = end
        del buffer[:at]
        return found


def setting(payload: bytes, wanted: int) -> int | None:
    """The value of one setting in a SETTINGS frame; None where it is absent."""
    return dict(_SETTING.iter_unpack(payload)).get(wanted)
