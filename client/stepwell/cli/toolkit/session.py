"""Attach to a session that exists, or with `--open` to one that may be new."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from stepwell import Client, Session, SessionInfo


def attach(client: Client, session_id: str, model: str | None = None) -> Session:
    """Attach to an existing session, of a model if one is named. It never opens one.

    Raises:
        SessionGoneError: The session does not exist.
        ModelMismatchError: It has another model.
    """
    from stepwell import ModelMismatchError

    known = client.session_info(session_id)
    if model is not None and not fits(model, known):
        version = f"@{known.model_version}" if "@" in model else ""
        raise ModelMismatchError(f"--model must be the session's model, {known.model}{version}; got {model}")
    session = client.open_session(known.model, batch_size=known.batch_size, session_id=session_id)
    # If the session was closed after the lookup, this one is new, and must not replace it.
    if client.session_info(session_id).created_time != known.created_time:
        session.close()
        client.session_info(session_id)
    return session


def fits(model: str, known: SessionInfo) -> bool:
    """Whether a session is one of `NAME`, or of `NAME@VERSION`."""
    name, mark, version = model.partition("@")
    return name == known.model and (not mark or version == str(known.model_version))


def attach_or_open(
    client: Client, session_id: str, model: str, batch_size: int | None, max_idle_s: float | None
) -> Session:
    """Attach to a session, or open it if it never existed or was closed.

    Without `batch_size` an existing session keeps its own, and a new one has 1. `max_idle_s` is as in
    `Client.open_session`.

    Raises:
        StepwellError: It expired or was lost, or has another model or batch size.
    """
    from stepwell import SessionNotFoundError

    if batch_size is None:
        try:
            batch_size = client.session_info(session_id).batch_size
        except SessionNotFoundError:
            batch_size = 1
    return client.open_session(model, batch_size=batch_size, session_id=session_id, max_idle_s=max_idle_s)
