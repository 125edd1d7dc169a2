"""Page tokens: the end of a page of a list, with a checksum that exposes foreign strings."""

from __future__ import annotations

import base64
import binascii
import struct
import zlib

from stepwell_server.engine.sessions.directory import shown
from stepwell_server.errors import InvalidInput

#: Precedes the id in a token with a number. Its first byte never occurs in UTF-8.
_NUMBER = struct.Struct(">Bd")
_MARK = 0xFF


def to_token(session_id: str, number: float = 0.0) -> str:
    """Return the token of the page after the one that ended with this id, and with this number unless it is 0."""
    raw = (_NUMBER.pack(_MARK, number) if number else b"") + session_id.encode()
    checksum = zlib.crc32(raw).to_bytes(4, "big")
    return base64.urlsafe_b64encode(checksum + raw).decode().rstrip("=")


def from_token(token: str) -> tuple[str, float]:
    """Return the id and the number after which the page begins. An empty token means the first page.

    Raises:
        InvalidInput: the token was not made by `to_token`.
    """
    if not token:
        return "", 0.0
    number = 0.0
    try:
        raw = base64.urlsafe_b64decode(token + "=" * (-len(token) % 4))[4:]
        if raw[:1] == bytes([_MARK]) and len(raw) >= _NUMBER.size:
            number, raw = _NUMBER.unpack_from(raw)[1], raw[_NUMBER.size :]
        session_id = raw.decode()
    except (binascii.Error, ValueError):
        session_id = ""
    if to_token(session_id, number) != token:
        raise InvalidInput(f"page_token must be the next_page_token of the previous page; got {shown(token)}")
    return session_id, number
