"""The errors for sessions that ended, built from the store's tombstones."""

from __future__ import annotations

from stepwell_server.errors import SessionExpired, SessionGone, SessionLost, SessionNotFound
from stepwell_server.store.base import End, Tombstone


def expired(session_id: str) -> SessionExpired:
    """The error for a session that expired."""
    return SessionExpired(
        session_id,
        f"session {session_id!r} expired: it was idle for longer than its limit, set by max_idle_s at opening,"
        " unnamed_session_idle_s or max_session_idle_s",
    )


def ended_by(stone: Tombstone) -> SessionGone:
    """The error for a session with a tombstone."""
    if stone.end is End.EXPIRED:
        return expired(stone.session_id)
    if stone.end is End.LOST:
        return SessionLost(
            stone.session_id,
            f"session {stone.session_id!r} was lost by the store: it was neither closed nor expired. Close it to reuse its id",
        )
    return SessionNotFound(stone.session_id, f"session {stone.session_id!r} was closed")
