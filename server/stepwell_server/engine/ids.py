"""What may be a session id."""

from __future__ import annotations

from stepwell_server.errors import InvalidInput

MAX_ID_LENGTH = 256


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
