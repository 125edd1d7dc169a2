"""What is said of sessions that ended, by what the store remembers of them."""

from __future__ import annotations

from stepwell_server.errors import SessionExpired, SessionGone, SessionLost, SessionNotFound
from stepwell_server.store.base import End, Tombstone


class Endings:
    """Makes the answers for sessions that are gone."""

    def __init__(self, max_idle_s: float) -> None:
        self._max_idle_s = max_idle_s

    def expired(self, session_id: str) -> SessionExpired:
        """What is said of a session that expired."""
        return SessionExpired(
            session_id,
            f"session {session_id!r} expired: it was idle for longer than"
            f" max_session_idle_s {self._max_idle_s:g}",
        )

    def of(self, stone: Tombstone) -> SessionGone:
        """What is said of a session of which a tombstone is kept."""
        if stone.end is End.EXPIRED:
            return self.expired(stone.session_id)
        if stone.end is End.LOST:
            return SessionLost(
                stone.session_id,
                f"session {stone.session_id!r} was lost by the store; nobody had ended it. Close it to use its id anew",
            )
        if stone.end is End.LEFT:
            return SessionExpired(
                stone.session_id,
                f"session {stone.session_id!r} expired: its client had been gone for longer than the lease"
                " that it opened it with",
            )
        return SessionNotFound(stone.session_id, f"session {stone.session_id!r} was closed")
