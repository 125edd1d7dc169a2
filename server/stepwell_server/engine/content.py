"""Digests of the content of calls that open sessions: see `core.exactly_once`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
from isal.isal_zlib import crc32

from stepwell_server.core.exactly_once import (
    Kind,
    digests,
    kind_of,
    mismatches,
    row_numbers,
    seed_of,
)
from stepwell_server.engine.types import U64, Array
from stepwell_server.errors import InvalidInput

if TYPE_CHECKING:
    from stepwell_server.engine.state.model import Model

_NOUNS = {
    Kind.STEP: "a step",
    Kind.RESET: "a reset",
    Kind.OPEN: "an opening",
    Kind.FORK: "a fork",
}
_NO_PREFIX = np.uint64(0)


def content_of_open(
    model: str, batch_size: int, max_idle_ms: int | None, values: Sequence[Array] = (), count: int = 1
) -> U64:
    """A digest of an open call's content for each of its sessions, `(count,)`, without the prefix.

    Args:
        model: The model as the call names it.
        batch_size: Of each session.
        max_idle_ms: Of each session, as requested.
        values: Initial states of one session, `(batch_size, ...)` each.
        count: The number of sessions.
    """
    seed = seed_of(model, batch_size, max_idle_ms)
    if not values:
        return digests(_NO_PREFIX, seed, np.zeros(count, np.uint64))
    return digests(_NO_PREFIX, seed, row_numbers(values, batch_size), np.array([batch_size], np.intp))


def content_of_fork(session_ids: Sequence[str], max_idle_ms: int | None) -> U64:
    """A digest of a fork call's content for each of its sessions: see `content_of_open`."""
    rows = np.fromiter(
        (crc32(session_id.encode()) for session_id in session_ids), np.uint64, len(session_ids)
    )
    return digests(_NO_PREFIX, seed_of(max_idle_ms), rows)


def require_same_opening(
    model: Model, session_ids: Sequence[str], stored: U64, kind: Kind, content: U64
) -> None:
    """Refuse a call whose request id opened sessions with other content.

    Args:
        model: Of the first session now.
        session_ids: The sessions.
        stored: The digests of the calls that opened them, `(n,)`.
        kind: The kind of this call.
        content: The digests of this call's content, `(n,)`.

    Raises:
        InvalidInput: the request id was used by another call.
    """
    other_kind, other_content = mismatches(stored, content | model.digest_prefixes[kind])
    for place in np.flatnonzero(other_kind | other_content)[:1].tolist():
        raise reused_request(session_ids[place], kind_of(int(stored[place])), kind)


def reused_request(session_id: str, known: Kind | None, own: Kind) -> InvalidInput:
    """The error for a change whose request id belongs to another change of the session, of kind `known`."""
    noun = "another kind of change" if known is None else _NOUNS[known]
    differs = f"it belongs to {noun}; got {_NOUNS[own]}"
    if known is own:
        differs = f"it belongs to {_NOUNS[own]} with other content (values, rows, masks or requested results)"
    return InvalidInput(
        f"request_id must be new for a different change of session {session_id!r}: {differs}; nothing changed"
    )
