"""Errors in Triton's words, with Triton's status codes if it has one for the case.

Texts that clients match are Triton's, character for character. Other errors keep our text. The reason of a `ServerError` is
sent as ErrorInfo in the trailer of a unary call, so a client can distinguish an expired sequence from one that never started.
"""

from __future__ import annotations

from stepwell_server.errors import (
    DeadlineExceeded,
    InvalidInput,
    ModelMismatch,
    ModelNotFound,
    Overloaded,
    ServerError,
    SessionGone,
    StateCorrupt,
    Unavailable,
)

SequenceId = int | str


def unknown_model(name: str, version: str = "") -> ModelNotFound:
    """Return the error for a model or a version that is not served."""
    which = f"'{name}' version {version}" if version else f"'{name}'"
    return ModelNotFound(f"Request for unknown model: {which} is not found", model=name)


def no_sequence_id(model: str, *, keeps_state: bool) -> InvalidInput:
    """Return the error for a missing, zero or empty id of a request that needs a sequence."""
    rule = f"inference request to model '{model}' must specify a non-zero or non-empty correlation ID"
    if not keeps_state:
        return InvalidInput(rule)
    return InvalidInput(
        f"{rule}: the model keeps state, and sequence_id is missing, 0 or empty. Give each sequence a sequence_id of at"
        " least 1, and set sequence_start on its first request. For a prediction from the initial state that changes"
        " nothing, set the parameter stepwell_stateless to true"
    )


def not_started(sequence_id: SequenceId, model: str, cause: ServerError | None = None) -> InvalidInput:
    """Return the error for a sequence that does not exist: never started, ended, expired or lost."""
    facts = {} if cause is None else {"cause": cause.reason, "detail": cause.message}
    return InvalidInput(
        f"inference request for sequence {sequence_id} to model '{model}' must specify the START flag"
        " on the first request of the sequence",
        **facts,
    )


def on_another_version(sequence_id: SequenceId, model: str, version: int, asked: int) -> InvalidInput:
    """Return the error for a request that names another version than its sequence's. In Triton, versions have own sequences."""
    error = not_started(sequence_id, model)
    error.message += (
        f"; the sequence is on version {version} of the model, and the request asks for version {asked}"
    )
    return error


def about(request_id: str) -> str:
    """Return Triton's prefix of messages about a request's tensors."""
    return f"[request id: {request_id or '<id_unknown>'}] "


def names_sequence(error: ServerError) -> bool:
    """Whether `translated` puts the sequence's id into the text of this error."""
    return isinstance(error, SessionGone | ModelMismatch | StateCorrupt)


def translated(error: ServerError, sequence_id: SequenceId, model: str) -> ServerError:
    """Return an error of the engine in Triton's words, for a request of a sequence (0 or empty: none) and a model."""
    if names_sequence(error) and sequence_id:
        return not_started(sequence_id, model, error)
    if isinstance(error, Overloaded):
        return Unavailable(f"Exceeds maximum queue size: {error.message}", cause=error.reason)
    if isinstance(error, DeadlineExceeded):
        return Unavailable(f"Request timeout expired: {error.message}", cause=error.reason)
    return error
