"""What can go wrong, as a tree. Every error the SDK raises for a call derives from `StepwellError`.

    StepwellError
    ├── InvalidInputError          an argument breaks a rule: shape, dtype, name, value, size
    │   └── ReplyTooLargeError     the reply is over a size limit: see .outcome
    ├── SessionGoneError           there is no such session (any more)
    │   ├── SessionNotFoundError   closed, or never opened on this server
    │   ├── SessionExpiredError    idle for too long, therefore deleted
    │   └── SessionLostError       it was there, its state cannot be recovered
    ├── SessionExistsError         the id is taken
    ├── RevisionConflictError      someone else changed the session: see .expected and .actual
    ├── ModelNotFoundError         no model is served under that name, or not that version or label of it
    ├── ModelMismatchError         the state belongs to a model of another fingerprint, or cannot be carried to it
    ├── OverloadedError            no room now: see .retry_after_s
    ├── UnavailableError           the server cannot be reached, or cannot do it now: see .outcome
    ├── DeadlineExceededError      the time limit passed: see .outcome
    ├── StateCorruptError          the stored record of the session is damaged
    ├── RefusedError               the server does not offer this, or does not allow it
    │   ├── UnauthenticatedError   the server asks who calls, and does not know this client
    │   ├── PermissionDeniedError  it knows this client, whose role does not allow it
    │   ├── ModelVersionExistsError  the model has that version, or it is being loaded
    │   ├── ModelInUseError        the version is the default, or has sessions
    │   ├── ModelLoadError         the file cannot be served
    │   └── MigrationFailedError   the function that makes new states of old ones is not there, or failed
    ├── InternalError              a defect of the server: its log has the details under .error_id
    ├── ServerStartError           a server that this process starts did not start: `stepwell.local`, `LocalServer`
    └── ClosedError                the client or session was closed on this side

| class | gRPC status | retried by the SDK |
| --- | --- | --- |
| InvalidInputError | INVALID_ARGUMENT, OUT_OF_RANGE | no |
| ReplyTooLargeError | RESOURCE_EXHAUSTED of gRPC's own | no |
| SessionNotFoundError, SessionExpiredError, SessionLostError, ModelNotFoundError | NOT_FOUND, by reason | no |
| SessionExistsError | ALREADY_EXISTS | no |
| RevisionConflictError | ABORTED | no |
| ModelMismatchError | FAILED_PRECONDITION | no |
| OverloadedError | RESOURCE_EXHAUSTED | after its delay; not where `quota` is `sessions`, `bytes` or `models` |
| UnavailableError | UNAVAILABLE, CANCELLED | yes |
| DeadlineExceededError | DEADLINE_EXCEEDED | no; the caller may |
| StateCorruptError | DATA_LOSS | no |
| RefusedError | UNIMPLEMENTED | no |
| ModelVersionExistsError | ALREADY_EXISTS, by reason | no |
| ModelInUseError, ModelLoadError, MigrationFailedError | FAILED_PRECONDITION, by reason | no |
| UnauthenticatedError | UNAUTHENTICATED | once, where the token is a function: see `stepwell.connect` |
| PermissionDeniedError | PERMISSION_DENIED | no |
| InternalError | INTERNAL, UNKNOWN | no |
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    import numpy.typing as npt

Outcome = Literal["not_applied", "unknown"]


class StepwellError(Exception):
    """Base of every error of this package.

    Example:
        >>> try:
        ...     client.session_info("nobody")
        ... except stepwell.StepwellError as error:
        ...     print(type(error).__name__)
        SessionNotFoundError
    """

    message: str
    """Names the argument, the rule and what came."""
    reason: str
    """Machine-readable reason the server gave, e.g. SESSION_EXPIRED; empty for errors of this side."""
    failures: Mapping[int, StepwellError]
    """Of a `SessionGroup`'s change: the error of each member that failed, by index. Else empty."""
    outputs: npt.NDArray[Any] | dict[str, npt.NDArray[Any]] | None
    """Of a `SessionGroup`'s step: the outputs of the members that were applied; zeros for the others."""

    def __init__(self, message: str, *, reason: str = "") -> None:
        super().__init__(message)
        self.message = message
        self.reason = reason
        self.failures = {}
        self.outputs = None


class InvalidInputError(StepwellError):
    """An argument breaks a rule: shape, dtype, name, range, size, NaN or infinity. Nothing changed."""


class ReplyTooLargeError(InvalidInputError):
    """The reply is over a size limit, so it did not arrive; a change may have been applied all the same.

    The same call by a client with a larger `max_message_bytes` is answered, and applies nothing twice. To
    do something else instead, call `refresh()` on the session first.
    """

    outcome: Outcome
    """ "unknown": a change may have been applied."""

    def __init__(self, message: str, *, reason: str = "") -> None:
        super().__init__(message, reason=reason)
        self.outcome = "unknown"


class SessionGoneError(StepwellError):
    """There is no such session (any more)."""

    session_id: str
    """The id asked for; empty if the server did not say."""

    def __init__(self, message: str, *, session_id: str = "", reason: str = "") -> None:
        super().__init__(message, reason=reason)
        self.session_id = session_id


class SessionNotFoundError(SessionGoneError):
    """The session was closed, or never opened on this server."""


class SessionExpiredError(SessionGoneError):
    """The session was idle for longer than its limit, and is deleted."""


class SessionLostError(SessionGoneError):
    """The session was there; its state cannot be recovered."""


class SessionExistsError(StepwellError):
    """The session id is taken."""


class RevisionConflictError(StepwellError):
    """The session is at another revision than this handle expected; nothing changed.

    Someone else changed the session, or an earlier change of this handle got through after it was given up
    here (cancelled, timed out). `session.refresh()` takes over the server's revision.
    """

    expected: int | None
    """Revision this side expected."""
    actual: int | None
    """Revision the session is at."""

    def __init__(
        self, message: str, *, expected: int | None = None, actual: int | None = None, reason: str = ""
    ) -> None:
        super().__init__(message, reason=reason)
        self.expected = expected
        self.actual = actual


class ModelNotFoundError(StepwellError):
    """No model is served under that name, or it has not that version or label."""


class ModelMismatchError(StepwellError):
    """The state belongs to a model of another fingerprint, or to a version whose states or outputs are others."""


class OverloadedError(StepwellError):
    """The server has no room now; nothing changed. Raised once the time limit leaves no room to wait."""

    retry_after_s: float
    """Seconds the server asks to wait; 0.0 if it gave no advice."""
    quota: str
    """The quota that is used up: ``sessions``, ``rows``, ``bytes``, ``steps_per_second`` or ``bytes_in_flight``; ``""`` if it is none."""

    def __init__(
        self, message: str, *, retry_after_s: float = 0.0, quota: str = "", reason: str = ""
    ) -> None:
        super().__init__(message, reason=reason)
        self.retry_after_s = retry_after_s
        self.quota = quota


class _OpenEndedError(StepwellError):
    """Base of the errors after which a change may have been applied all the same."""

    outcome: Outcome
    """ "not_applied": it is settled that nothing changed. "unknown": the change may have been applied or
    may still be. Make the same call again: it finishes the change and never applies it twice."""

    def __init__(self, message: str, *, outcome: Outcome = "unknown", reason: str = "") -> None:
        super().__init__(message, reason=reason)
        self.outcome = outcome


class UnavailableError(_OpenEndedError):
    """The server cannot be reached, or cannot do it now, and the time limit left no room to try again."""


class DeadlineExceededError(_OpenEndedError):
    """The time limit passed."""


class StateCorruptError(StepwellError):
    """The stored record of this session is damaged; other sessions are not concerned."""


class RefusedError(StepwellError):
    """The server does not offer this call, does not allow it, or cannot do it as things are: `reason` says which."""


class UnauthenticatedError(RefusedError):
    """The server asks who calls, and does not know this client: no token, a wrong or a revoked one, no certificate.

    Where the token is a function, it was asked for another one, and that was refused as well.
    """

    outcome: Outcome
    """ "not_applied": nothing changed. "unknown": what the call changes may have been applied before the token was
    refused; made again, with a token that is known, it is never applied twice."""

    def __init__(self, message: str, *, outcome: Outcome = "not_applied", reason: str = "") -> None:
        super().__init__(message, reason=reason)
        self.outcome = outcome


class PermissionDeniedError(RefusedError):
    """The server knows this client, whose role does not allow the call."""


class ModelVersionExistsError(RefusedError):
    """The model has a version of that number, or one is being loaded. Versions do not change; nothing changed."""


class ModelInUseError(RefusedError):
    """The version was not unloaded, for it is the default, or has sessions; nothing changed."""


class ModelLoadError(RefusedError):
    """The file is no model, or one that cannot be served, or it took too long; the message says why. Nothing changed."""


class MigrationFailedError(RefusedError):
    """The function that makes new states of old ones is not there, raised, or returned what cannot be states."""


class InternalError(StepwellError):
    """A defect of the server; its log has the details."""

    error_id: str
    """Find it in the server's log. Empty if the server gave none."""

    def __init__(self, message: str, *, error_id: str = "", reason: str = "") -> None:
        super().__init__(message, reason=reason)
        self.error_id = error_id


class ServerStartError(StepwellError):
    """A server that this process starts refused to start, or was not ready in time.

    Raised by `stepwell.local` and `stepwell.testing.LocalServer`.
    """

    refusal: str
    """What the server says about it, in one line. Empty if it says nothing: the message has its last log lines."""

    def __init__(self, message: str, *, refusal: str = "") -> None:
        super().__init__(message)
        self.refusal = refusal


class ClosedError(StepwellError):
    """The client, session or group was closed on this side."""


__all__ = [
    "ClosedError",
    "DeadlineExceededError",
    "InternalError",
    "InvalidInputError",
    "MigrationFailedError",
    "ModelInUseError",
    "ModelLoadError",
    "ModelMismatchError",
    "ModelNotFoundError",
    "ModelVersionExistsError",
    "OverloadedError",
    "PermissionDeniedError",
    "RefusedError",
    "ReplyTooLargeError",
    "RevisionConflictError",
    "ServerStartError",
    "SessionExistsError",
    "SessionExpiredError",
    "SessionGoneError",
    "SessionLostError",
    "SessionNotFoundError",
    "StateCorruptError",
    "StepwellError",
    "UnauthenticatedError",
    "UnavailableError",
]
