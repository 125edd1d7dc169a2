"""Page tokens of ListSessions: the last id of a page, so marked that other strings are told from them."""

from __future__ import annotations

import base64
import binascii
import zlib

from stepwell_server.engine.sessions.ids import shown
from stepwell_server.errors import InvalidInput


def to_token(last_id: str) -> str:
    """The token of the page that follows the one which ends with this id."""
    raw = last_id.encode()
    checksum = zlib.crc32(raw).to_bytes(4, "big")
    return base64.urlsafe_b64encode(checksum + raw).decode().rstrip("=")


def from_token(token: str) -> str:
    """The id after which a page begins; no token means the first page.

    Raises:
        InvalidInput: it is no token of `to_token`.
    """
    if not token:
        return ""
    try:
        last_id = base64.urlsafe_b64decode(token + "=" * (-len(token) % 4))[4:].decode()
    except (binascii.Error, ValueError):
        last_id = ""
    if to_token(last_id) != token:
        raise InvalidInput(f"page_token must be the next_page_token of another page; got {shown(token)}")
    return last_id
