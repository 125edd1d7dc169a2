"""What may be a session id, and the ids that the server makes."""

from __future__ import annotations

import asyncio
import base64
import hmac
import re
import secrets
from collections.abc import AsyncIterator, Sequence

from stepwell_server.errors import InvalidInput
from stepwell_server.store.base import Store

MAX_ID_LENGTH = 256
MAX_SESSIONS_PER_CALL = 65_536
_MADE_BY_A_SERVER = re.compile(r"s-([0-9a-f]{8})-[A-Za-z0-9_-]{22}(-[0-9a-f]{4})?")
_TOKEN_BYTES = 16
#: Sessions that one call works on before others get a turn of the event loop.
PIECE = 4096


class IdMaker:
    """Makes ids that nobody can guess who was not told them.

    The id for a call that says its request id follows from that and the store's secret (HMAC, RFC 2104), so
    that the call sent again means the same session, after a restart too, and nothing needs to be remembered.
    """

    def __init__(self, store: Store) -> None:
        self._incarnation = store.incarnation
        self._secret = store.secret

    def make(self, request_id: int, source: str = "") -> str:
        """An id for what a call makes; `source` is the session that it is made from, if there is one."""
        if not request_id:
            token = secrets.token_bytes(_TOKEN_BYTES)
        else:
            said = f"{request_id} {source}".encode()
            token = hmac.digest(self._secret, said, "sha256")[:_TOKEN_BYTES]
        return f"s-{self._incarnation}-{base64.urlsafe_b64encode(token).decode().rstrip('=')}"

    def make_many(self, request_id: int, count: int, sources: Sequence[str] = ()) -> list[str]:
        """Ids for what one call makes, at most 65,536: neighbours in the store, which writes them together.

        `sources` are the sessions that they are made from, if there are any.
        """
        first = self.make(request_id, "\n".join(sources))
        return [f"{first}-{number:04x}" for number in range(count)]

    @staticmethod
    def is_made_by_a_server(session_id: str) -> bool:
        """Whether it is one of the ids that servers make: nobody may choose it for a session of theirs."""
        return _MADE_BY_A_SERVER.fullmatch(session_id) is not None

    def is_from_elsewhere(self, session_id: str) -> bool:
        """Whether a server made the id with a store that is not there any more."""
        made = _MADE_BY_A_SERVER.fullmatch(session_id)
        return made is not None and made[1] != self._incarnation


async def in_pieces(session_ids: Sequence[str]) -> AsyncIterator[slice]:
    """Parts of many ids, with a turn of the event loop between them: a large call must not stop everybody."""
    for start in range(0, len(session_ids), PIECE):
        if start:
            await asyncio.sleep(0)
        yield slice(start, start + PIECE)


def require_session_id(name: str, session_id: str) -> None:
    """Refuse what cannot be a session id.

    Raises:
        InvalidInput: it is empty, too long, not printable, or begins or ends with a space.
    """
    is_id = 0 < len(session_id) <= MAX_ID_LENGTH and session_id.isprintable()
    if not is_id or session_id.strip() != session_id:
        raise InvalidInput(
            f"{name} must be 1 to {MAX_ID_LENGTH} printable characters without leading or trailing space;"
            f" got {shown(session_id)}"
        )


def shown(session_id: str) -> str:
    """An id as it may stand in a message, however long it is."""
    if len(session_id) <= MAX_ID_LENGTH:
        return repr(session_id)
    return f"{len(session_id)} characters, {session_id[:32]!r}..."
