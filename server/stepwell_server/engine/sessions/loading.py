"""Sessions come back from the store into the table, without their states: those come when they are needed."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from stepwell_server.core.sessions import Handles, SessionTable
from stepwell_server.engine.models import Models
from stepwell_server.engine.sessions.expiry import Expiry
from stepwell_server.engine.sessions.removal import Removal
from stepwell_server.engine.state.model import Model
from stepwell_server.errors import ModelMismatch, ModelNotFound, StateCorrupt
from stepwell_server.store.base import LocalStore
from stepwell_server.store.record import Header, decode_header


class Loader:
    """Takes the store's sessions into the table when they are named. Lives on the event loop."""

    def __init__(
        self, table: SessionTable, models: Models, removal: Removal, expiry: Expiry, store: LocalStore
    ) -> None:
        self._table = table
        self._models = models
        self._removal = removal
        self._expiry = expiry
        self._store = store

    def load(self, session_id: str) -> int | None:
        """The handle of a session that was only in the store; None if it is not there."""
        if self._store.is_volatile or not self._is_only_stored(session_id):
            return None
        stored = self._store.get(session_id)
        if stored is None:
            return None
        header = decode_header(session_id, stored)
        return int(self._adopt([(session_id, header, self._served(session_id, header))])[0])

    def _is_only_stored(self, session_id: str) -> bool:
        """If it is anywhere, it is in the store and nowhere else, to stay."""
        return session_id != "" and session_id not in self._removal and session_id not in self._expiry.burying

    def load_all(self, session_ids: Sequence[str]) -> tuple[int, list[str]]:
        """Take those sessions into the table that are in the store and can be stepped.

        Returns:
            How many they are, and those that are there and cannot be stepped.

        Raises:
            Unavailable: the store cannot be read.
        """
        wanted = [session_id for session_id in dict.fromkeys(session_ids) if self._is_only_stored(session_id)]
        found: list[tuple[str, Header, Model]] = []
        unusable: list[str] = []
        for session_id, stored in zip(wanted, self._store.get_many(wanted), strict=True):
            if stored is None:
                continue
            try:
                header = decode_header(session_id, stored)
                found.append((session_id, header, self._served(session_id, header)))
            except (StateCorrupt, ModelMismatch, ModelNotFound):
                unusable.append(session_id)  # `find` says why
        if found:
            self._adopt(found)
        return len(found), unusable

    def _served(self, session_id: str, header: Header) -> Model:
        """The model of a stored session."""
        model = self._models.find(header.model)
        if model is None:
            raise ModelNotFound(
                f"session {session_id!r} belongs to model {header.model!r}, which is not served;"
                f" model must be one of {self._models.names()}. Serve it again, or close the session",
                model=header.model,
            )
        if model.program.fingerprint != header.fingerprint:
            raise ModelMismatch(
                f"session {session_id!r} belongs to model {header.model!r} with fingerprint"
                f" {header.fingerprint}; the one that is served has {model.program.fingerprint}."
                " Serve that model file again, or close the session",
                model=header.model,
            )
        return model

    def _adopt(self, sessions: Sequence[tuple[str, Header, Model]]) -> Handles:
        headers = [header for _, header, _ in sessions]
        handles = self._table.add(
            [session_id for session_id, _, _ in sessions],
            rows=None,
            model=[model.index for _, _, model in sessions],
            batch_size=[header.batch_size for header in headers],
            revision=np.array([header.revision for header in headers], np.uint64),
            position=np.array([header.position for header in headers], np.uint64),
            request_id=np.array([header.request_id for header in headers], np.uint64),
            opened_with=np.array([header.opened_with for header in headers], np.uint64),
            created=[header.created for header in headers],
            used=[self._expiry.take_use(session_id, header) for session_id, header, _ in sessions],
            reply=[header.reply for header in headers],
        )
        for handle, header in zip(handles.tolist(), headers, strict=True):
            if header.fields:
                self._table.fields[handle] = header.fields
        self._expiry.watch(handles)
        return handles
