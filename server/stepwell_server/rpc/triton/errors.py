"""Errors as Triton's users know them: its wording, and its status codes where it has one for the case.

Wording that clients match on is Triton's, character for character. What Triton has no word for keeps
ours. The reason that a `ServerError` carries travels as ErrorInfo in the trailer of a unary call, so that a
client that looks there can distinguish an expired sequence from one that never began.
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
    """No model is served under that name, or not in that version."""
    which = f"'{name}' version {version}" if version else f"'{name}'"
    return ModelNotFound(f"Request for unknown model: {which} is not found", model=name)


def no_sequence_id(model: str, *, keeps_state: bool) -> InvalidInput:
    """No id, or the id 0 or an empty one, which mean none, where a sequence is meant or needed."""
    rule = f"inference request to model '{model}' must specify a non-zero or non-empty correlation ID"
    if not keeps_state:
        return InvalidInput(rule)
    return InvalidInput(
        f"{rule}: the model keeps state, and sequence_id is missing, 0 or empty. Give each sequence a sequence_id from"
        " 1 on, and sequence_start with its first request; or, for an answer from the initial state that changes"
        " nothing, the parameter stepwell_stateless (true)"
    )


def not_started(sequence_id: SequenceId, model: str, cause: ServerError | None = None) -> InvalidInput:
    """A request of a sequence that is not there: never begun, ended, expired or lost."""
    facts = {} if cause is None else {"cause": cause.reason, "detail": cause.message}
    return InvalidInput(
        f"inference request for sequence {sequence_id} to model '{model}' must specify the START flag"
        " on the first request of the sequence",
        **facts,
    )


def on_another_version(sequence_id: SequenceId, model: str, version: int, asked: int) -> InvalidInput:
    """A request that names a version on which its sequence is not: in Triton each version has sequences of its own."""
    error = not_started(sequence_id, model)
    error.message += (
        f"; the sequence is on version {version} of the model, and the request asks for version {asked}"
    )
    return error


def about(request_id: str) -> str:
    """What Triton puts in front of messages about a request's tensors."""
    return f"[request id: {request_id or '<id_unknown>'}] "


def names_sequence(error: ServerError) -> bool:
    """Whether what `translated` makes of an error of a sequence's request names the sequence."""
    return isinstance(error, SessionGone | ModelMismatch | StateCorrupt)


def translated(error: ServerError, sequence_id: SequenceId, model: str) -> ServerError:
    """An error of the engine in this protocol's words, for a request of a sequence (0 or empty: none) and a model."""
    if names_sequence(error) and sequence_id:
        return not_started(sequence_id, model, error)
    if isinstance(error, Overloaded):
        return Unavailable(f"Exceeds maximum queue size: {error.message}", cause=error.reason)
    if isinstance(error, DeadlineExceeded):
        return Unavailable(f"Request timeout expired: {error.message}", cause=error.reason)
    return error
