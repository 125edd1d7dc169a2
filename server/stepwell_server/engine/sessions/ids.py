"""What may be a session id, and the ids that the server makes."""

from __future__ import annotations

import asyncio
import base64
import hashlib
import hmac
import re
import secrets
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from stepwell_server.core.namespaces import own, tenant_of
from stepwell_server.engine.shares import Pieces
from stepwell_server.errors import InvalidInput
from stepwell_server.store.base import Store

MAX_ID_LENGTH = 256
MAX_SESSIONS_PER_CALL = 65_536
MAX_IDS_PER_CALL = 4096
"""Ids of one call that closes or reads sessions, each for itself. Parsing and naming them takes about 1 ms."""
#: The second form is of one of many sessions; the third was before, and they are still there.
_MADE_BY_A_SERVER = re.compile(r"s-([0-9a-f]{8})-[A-Za-z0-9_-]{22}([A-Za-z0-9_-]{4}|-[0-9a-f]{4})?")
_TOKEN_BYTES, _TOKEN_LENGTH, _DIGITS = 16, 22, 24
#: Of what the ids of one call have in common.
_GROUP_BYTES = 3
#: More sessions than these are looked for in a store before a call on them begins, and ids for more are drawn by a thread.
PIECE = 4096


class IdMaker:
    """Makes ids that nobody can guess who was not told them.

    The id for a call that says its request id follows from that and the store's secret (HMAC, RFC 2104), so
    that the call sent again means the same session, after a restart too, and nothing needs to be remembered. It is in
    the namespace that is given, of which it follows as well: the same request id is another one there.
    """

    def __init__(self, store: Store) -> None:
        self._incarnation = store.incarnation
        self._secret = store.secret

    def make(self, request_id: int, source: str = "", *, namespace: str = "") -> str:
        """An id for what a call makes; `source` is the session that it is made from, if there is one."""
        (made,) = self._named(_digits(self._token(request_id, source, namespace)), namespace)
        return made

    async def make_many(
        self, request_id: int, count: int, pieces: Pieces, sources: Sequence[str] = (), *, namespace: str = ""
    ) -> list[str]:
        """Ids for what one call makes: neighbours in the store, ascending. Who knows some cannot guess another one.

        `sources` are the sessions that they are made from, if there are any.
        """
        wanted = request_id, count, sources, namespace
        # most of it needs no lock of Python's
        group, digits = (
            self._drawn(*wanted) if count <= PIECE else await asyncio.to_thread(self._drawn, *wanted)
        )
        made: list[str] = []
        async for part in pieces.parts(count, tenant_of(namespace)):
            made += self._named(digits[part], namespace, group)
        return made

    def _drawn(
        self, request_id: int, count: int, sources: Sequence[str], namespace: str
    ) -> tuple[str, npt.NDArray[np.bytes_]]:
        """What the ids of one call have in common, and the digits of each, ascending. For any thread."""
        seed = self._token(request_id, "\n".join(["many", *sources]), namespace)
        # as far as it is read, and nothing of it tells what else it has: FIPS 202
        drawn = hashlib.shake_256(self._secret + seed).digest(_GROUP_BYTES + count * _TOKEN_BYTES)
        group = base64.urlsafe_b64encode(drawn[:_GROUP_BYTES]).decode()
        return group, np.sort(_digits(drawn[_GROUP_BYTES:]))

    def _named(self, digits: npt.NDArray[np.bytes_], namespace: str, group: str = "") -> list[str]:
        begin = f"{namespace}s-{self._incarnation}-{group}"
        return [begin + token.decode() for token in digits.tolist()]

    def _token(self, request_id: int, source: str, namespace: str) -> bytes:
        if not request_id:
            return secrets.token_bytes(_TOKEN_BYTES)
        said = f"{namespace}{request_id} {source}".encode()
        return hmac.digest(self._secret, said, "sha256")[:_TOKEN_BYTES]

    @staticmethod
    def is_made_by_a_server(session_id: str) -> bool:
        """Whether it is one of the ids that servers make: nobody may choose it for a session of theirs."""
        return _MADE_BY_A_SERVER.fullmatch(own(session_id)) is not None

    def is_from_elsewhere(self, session_id: str) -> bool:
        """Whether a server made the id with a store that is not there any more."""
        made = _MADE_BY_A_SERVER.fullmatch(own(session_id))
        return made is not None and made[1] != self._incarnation


def _digits(tokens: bytes) -> npt.NDArray[np.bytes_]:
    """Tokens that stand one after the other in base64, `(n,)`."""
    # in one go: 18 bytes are 24 digits, of which those of the last two bytes are left out
    padded = np.zeros((len(tokens) // _TOKEN_BYTES, 18), np.uint8)
    padded[:, :_TOKEN_BYTES] = np.frombuffer(tokens, np.uint8).reshape(-1, _TOKEN_BYTES)
    digits = np.frombuffer(base64.urlsafe_b64encode(padded.tobytes()), f"S{_DIGITS}")
    return digits.astype(f"S{_TOKEN_LENGTH}")


def require_session_id(field: str, session_id: str) -> None:
    """Refuse what cannot be a session id in its namespace.

    Raises:
        InvalidInput: it is empty, too long, not printable, or begins or ends with a space.
    """
    name = own(session_id)
    is_id = 0 < len(name) <= MAX_ID_LENGTH and name.isprintable()
    if not is_id or name.strip() != name:
        raise InvalidInput(
            f"{field} must be 1 to {MAX_ID_LENGTH} printable characters without leading or trailing space;"
            f" got {shown(session_id)}"
        )


def shown(session_id: str) -> str:
    """An id as it may stand in a message, however long it is."""
    name = own(session_id)
    if len(name) <= MAX_ID_LENGTH:
        return repr(session_id)
    return f"{len(name)} characters, {name[:32]!r}..."
