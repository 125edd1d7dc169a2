"""Who is here: sessions in the table, or about to be, and how one of them leaves."""

from __future__ import annotations

import asyncio

from stepwell_server.core.sessions import SessionTable
from stepwell_server.engine.api import Observer
from stepwell_server.engine.intake.turns import Turns
from stepwell_server.engine.models import Models
from stepwell_server.engine.state.model import Model
from stepwell_server.errors import ServerError


class Removal:
    """Knows the sessions that are here, and lets them go. Lives on the event loop."""

    def __init__(self, table: SessionTable, models: Models, turns: Turns, observer: Observer) -> None:
        self._table = table
        self._models = models
        self._turns = turns
        self._observer = observer
        self.opening: dict[str, asyncio.Future[None]] = {}
        """Sessions that are being made: nobody else sees them before they are kept."""

    def __contains__(self, session_id: str) -> bool:
        return session_id in self._table or session_id in self.opening

    def model_of(self, handle: int) -> Model:
        """The model of a session."""
        return self._models.by_handle(handle)

    def remove(self, handle: int, event: str, error: ServerError) -> None:
        """Forget a session that ended and is claimed or idle, and refuse what waits for it."""
        session_id, model = self._table.session_id(handle), self.model_of(handle)
        self.forget(handle, error)
        self._observer.session_event(event, model.name, session_id)

    def forget(self, handle: int, error: ServerError) -> None:
        """As `remove`, of a session that has not ended."""
        model = self.model_of(handle)
        if self._table.row[handle] >= 0:
            model.slots.free_resident(self._table.rows(handle))
        model.replies.forget(handle)
        self._table.claimed[handle] = False
        self._table.remove(handle)
        # last: whoever is refused may ask again at once, and must not get into the line of a session that is gone
        self._turns.close_line(handle, model.index, error)
