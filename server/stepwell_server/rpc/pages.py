"""Page tokens: where a page ended, so marked that other strings are told from them."""

from __future__ import annotations

import base64
import binascii
import struct
import zlib

from stepwell_server.engine.sessions.directory import shown
from stepwell_server.errors import InvalidInput

#: Before the id where a number belongs to it; its first byte stands in no UTF-8.
_NUMBER = struct.Struct(">Bd")
_MARK = 0xFF


def to_token(session_id: str, number: float = 0.0) -> str:
    """The token of the page that follows the one which ended with this id, and this number if it is not 0."""
    raw = (_NUMBER.pack(_MARK, number) if number else b"") + session_id.encode()
    checksum = zlib.crc32(raw).to_bytes(4, "big")
    return base64.urlsafe_b64encode(checksum + raw).decode().rstrip("=")


def from_token(token: str) -> tuple[str, float]:
    """The id, and the number, after which a page begins; no token means the first page.

    Raises:
        InvalidInput: it is no token of `to_token`.
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
        raise InvalidInput(f"page_token must be the next_page_token of another page; got {shown(token)}")
    return session_id, number
