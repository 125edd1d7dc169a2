"""The answers for sessions that ended, by what the store remembers of them."""

from __future__ import annotations

from stepwell_server.errors import SessionExpired, SessionGone, SessionLost, SessionNotFound
from stepwell_server.store.base import End, Tombstone


def expired(session_id: str) -> SessionExpired:
    """The answer for a session that expired."""
    return SessionExpired(
        session_id,
        f"session {session_id!r} expired: it was idle for longer than its limit, which max_idle_s of its opening,"
        " unnamed_session_idle_s or max_session_idle_s sets",
    )


def ended_by(stone: Tombstone) -> SessionGone:
    """The answer for a session that has a tombstone."""
    if stone.end is End.EXPIRED:
        return expired(stone.session_id)
    if stone.end is End.LOST:
        return SessionLost(
            stone.session_id,
            f"session {stone.session_id!r} was lost by the store; nobody had ended it. Close it to use its id anew",
        )
    return SessionNotFound(stone.session_id, f"session {stone.session_id!r} was closed")
