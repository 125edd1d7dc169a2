"""What a store keeps of a session, and what the engine asks of a store."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Protocol


@dataclasses.dataclass(frozen=True, slots=True)
class Record:
    """The part of a session that lies in the arena: its state and the last outputs beside it."""

    session_id: str
    fingerprint: str
    """Of the model that the rows belong to."""
    rows: bytes
    """The session's rows one after the other, each as `Arena.pack` lays it out."""


class Store(Protocol):
    """Keeps records by session id. Called on the event loop."""

    @property
    def is_volatile(self) -> bool:
        """What it keeps is gone when the process ends."""

    def put(self, records: Sequence[Record]) -> None:
        """Keep records; one of the same session is replaced."""

    def get(self, session_id: str) -> Record | None:
        """The record of a session, or None."""

    def delete(self, session_ids: Sequence[str]) -> None:
        """Forget the records of sessions, where there are any."""
