"""What a call says of each of the sessions that it opens, as a digest: see `core.exactly_once`."""

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
    """What a call says of each of the sessions that it opens, `(count,)`: a digest without its prefix.

    Args:
        model: As the call names it.
        batch_size: Of each.
        max_idle_ms: Of each, as the call asks for it.
        values: Initial states of one session, `(batch_size, ...)` each.
        count: How many there are.
    """
    seed = seed_of(model, batch_size, max_idle_ms)
    if not values:
        return digests(_NO_PREFIX, seed, np.zeros(count, np.uint64))
    return digests(_NO_PREFIX, seed, row_numbers(values, batch_size), np.array([batch_size], np.intp))


def content_of_fork(session_ids: Sequence[str], max_idle_ms: int | None) -> U64:
    """What a call says of each of the sessions that it makes of others: as `content_of_open`."""
    rows = np.fromiter(
        (crc32(session_id.encode()) for session_id in session_ids), np.uint64, len(session_ids)
    )
    return digests(_NO_PREFIX, seed_of(max_idle_ms), rows)


def require_same_opening(
    model: Model, session_ids: Sequence[str], stored: U64, kind: Kind, content: U64
) -> None:
    """Refuse a call that comes again with the request id that opened sessions, and is another call.

    Args:
        model: Of the first session now.
        session_ids: Of the sessions.
        stored: The digests of the calls that opened them, `(n,)`.
        kind: Of the call.
        content: What it says of each, `(n,)`.

    Raises:
        InvalidInput: it is another one.
    """
    other_kind, other_content = mismatches(stored, content | model.digest_prefixes[kind])
    for place in np.flatnonzero(other_kind | other_content)[:1].tolist():
        raise reused_request(session_ids[place], kind_of(int(stored[place])), kind)


def reused_request(session_id: str, known: Kind | None, own: Kind) -> InvalidInput:
    """The answer to a change whose request id stands for another one, of kind `known`, of the session."""
    noun = "another kind of change" if known is None else _NOUNS[known]
    differs = f"it stands for {noun}, and {_NOUNS[own]} came"
    if known is own:
        differs = (
            f"it stands for {_NOUNS[own]} with other content (values, rows, masks or what is to be returned)"
        )
    return InvalidInput(
        f"request_id must be another one for another change of session {session_id!r}: {differs}; nothing changed"
    )
