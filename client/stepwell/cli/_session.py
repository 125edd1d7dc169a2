"""Taking hold of a session that is there already, without ever making one by accident."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from stepwell import Client, ModelInfo, Session


def attach(
    client: Client,
    session_id: str,
    model: str | None = None,
    open_model: str | None = None,
    batch_size: int | None = None,
) -> tuple[Session, ModelInfo]:
    """The session and its model."""
    raise NotImplementedError
