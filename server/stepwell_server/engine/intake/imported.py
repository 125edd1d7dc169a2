"""Whether an imported record can be that of a session, and what of its extension fields is kept.

Whoever made the record may have made its checksum, too. What no record may say, however it got into the store, `store.record` refuses.
"""

from __future__ import annotations

import itertools

import numpy as np

from stepwell_server.core.sessions import MOST_COUNTED
from stepwell_server.engine.intake.validation import require_finite
from stepwell_server.engine.state.model import Model
from stepwell_server.engine.state.replies import check_reply
from stepwell_server.errors import InvalidInput
from stepwell_server.store.fields import KNOWN_TAGS, pack_fields, unpack_fields
from stepwell_server.store.record import Header

MAX_UNKNOWN_FIELD_BYTES = 1024
"""Extension fields of an imported session that are not known here: they are for later servers, not for callers."""
#: Seconds by which the clock of the server that exported a session may be ahead.
_AHEAD_S = 86_400.0


def check_header(session_id: str, header: Header, now: float) -> None:
    """Refuse what no session has, though the record is intact: whoever made it can have made its checksum, too.

    `now` is in seconds since the epoch.

    Raises:
        InvalidInput: with the field, the rule and what came.
    """
    if max(header.revision, header.position) > MOST_COUNTED:
        raise InvalidInput(
            f"revision and position of session {session_id!r} must be at most 2**62, {MOST_COUNTED};"
            f" got {header.revision} and {header.position}"
        )
    latest = now + _AHEAD_S
    if max(header.created, header.last_used) > latest:
        raise InvalidInput(
            f"created and last_used of session {session_id!r} must be at most a day after now by this server's clock,"
            f" {latest:.0f} seconds since the epoch; got {header.created:.0f} and {header.last_used:.0f}"
        )


def check_state(session_id: str, header: Header, model: Model, rows: bytes, extra: bytes) -> None:
    """Refuse rows and a reply that no session of a model has, and states that `ResetStates` would refuse.

    Raises:
        InvalidInput: it says which.
    """
    program, row_bytes = model.program, model.arena.row_bytes
    if len(rows) != header.batch_size * row_bytes:
        raise InvalidInput(
            f"the rows of session {session_id!r} must have {header.batch_size * row_bytes} bytes, {row_bytes} for each"
            f" of batch_size {header.batch_size}; got {len(rows)}"
        )
    try:
        check_reply(header.reply, header.batch_size, extra, program.outputs, program.state)
    except ValueError as error:
        raise InvalidInput(
            f"the last reply of session {session_id!r} must be one of its model: {error}"
        ) from error
    if not row_bytes:
        return
    packed = np.frombuffer(rows, np.uint8).reshape(header.batch_size, row_bytes)
    states = list(itertools.islice(model.arena.unpacked(packed), len(program.state)))
    require_finite(f"session {session_id!r}: state", states, [spec.name for spec in program.state])


def imported_fields(session_id: str, fields: bytes) -> bytes:
    """The extension fields that an imported session keeps: those that are not known here.

    What the known ones say of a session, its owner for example, only this server knows.

    Raises:
        InvalidInput: they are more than later servers need.
    """
    kept = {tag: value for tag, value in unpack_fields(fields).items() if tag not in KNOWN_TAGS}
    packed = pack_fields(kept)
    if len(packed) > MAX_UNKNOWN_FIELD_BYTES:
        raise InvalidInput(
            f"extension fields of session {session_id!r} that this server does not know must have at most"
            f" {MAX_UNKNOWN_FIELD_BYTES} bytes together; got {len(packed)}"
        )
    return packed
