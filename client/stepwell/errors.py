"""The errors that calls raise. All of them derive from `StepwellError`.

::

    StepwellError
    ├── InvalidInputError          an argument breaks a rule: shape, dtype, name, value or size
    │   └── ReplyTooLargeError     the reply exceeds a size limit: see .outcome
    ├── SessionGoneError           the session does not exist, or no longer exists
    │   ├── SessionNotFoundError   it was closed, or never opened on this server
    │   ├── SessionExpiredError    it was idle for too long and was deleted
    │   └── SessionLostError       it existed, but its state cannot be recovered
    ├── SessionExistsError         the session id is in use
    ├── RevisionConflictError      someone else changed the session: see .expected and .actual
    ├── ModelNotFoundError         the server has no such model, version or label
    ├── ModelMismatchError         the state belongs to another model, or cannot be carried to the new version
    ├── OverloadedError            the server has no capacity now: see .retry_after_s
    ├── UnavailableError           the server cannot be reached, or cannot serve the call now: see .outcome
    ├── DeadlineExceededError      the time limit passed: see .outcome
    ├── StateCorruptError          the stored record of the session is corrupt
    ├── RefusedError               the server does not offer or allow the call
    │   ├── UnauthenticatedError   the server does not know this client
    │   ├── PermissionDeniedError  the role of this client does not allow the call
    │   ├── ModelVersionExistsError  the model has that version, or it is being loaded
    │   ├── ModelInUseError        the version is the default, or has sessions
    │   ├── ModelLoadError         the model cannot be loaded or served
    │   └── MigrationFailedError   the function that converts old states does not exist, or failed
    ├── InternalError              a defect of the server: search its log for .error_id
    ├── ServerStartError           `stepwell.local` or `LocalServer` could not start a server
    └── ClosedError                the client, session or group was closed by this program

=======================  ===============================  ========================================================
class                    gRPC status                      retried by the SDK
=======================  ===============================  ========================================================
InvalidInputError        INVALID_ARGUMENT, OUT_OF_RANGE   no
ReplyTooLargeError       RESOURCE_EXHAUSTED by gRPC       no
SessionNotFoundError     NOT_FOUND, by reason             no
SessionExpiredError      NOT_FOUND, by reason             no
SessionLostError         NOT_FOUND, by reason             no
SessionExistsError       ALREADY_EXISTS                   no
RevisionConflictError    ABORTED                          no
ModelNotFoundError       NOT_FOUND, by reason             no
ModelMismatchError       FAILED_PRECONDITION              no
OverloadedError          RESOURCE_EXHAUSTED               after `retry_after_s`; not for the quotas `sessions`,
                                                          `bytes` and `models`
UnavailableError         UNAVAILABLE, CANCELLED           yes
DeadlineExceededError    DEADLINE_EXCEEDED                no; you may repeat the call
StateCorruptError        DATA_LOSS                        no
RefusedError             UNIMPLEMENTED                    no
ModelVersionExistsError  ALREADY_EXISTS, by reason        no
ModelInUseError          FAILED_PRECONDITION, by reason   no
ModelLoadError           FAILED_PRECONDITION, by reason   no
MigrationFailedError     FAILED_PRECONDITION, by reason   no
UnauthenticatedError     UNAUTHENTICATED                  once, if the token is a function: see `stepwell.connect`
PermissionDeniedError    PERMISSION_DENIED                no
InternalError            INTERNAL, UNKNOWN                no
=======================  ===============================  ========================================================
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    import numpy.typing as npt

Outcome = Literal["not_applied", "unknown"]
"""Whether a change that failed may have been applied: it was not, or the client cannot know."""


class StepwellError(Exception):
    """Base class of every error of this package.

    Example:
        >>> try:
        ...     client.session_info("nobody")
        ... except stepwell.StepwellError as error:
        ...     print(type(error).__name__)
        SessionNotFoundError
    """

    message: str
    """The message. It names the argument, the rule and the given value."""
    reason: str
    """Machine-readable reason from the server, such as SESSION_EXPIRED; empty for errors that the client raises itself."""
    failures: Mapping[int, StepwellError]
    """Errors of the failed members of a `SessionGroup`, by index; otherwise empty."""
    outputs: npt.NDArray[Any] | dict[str, npt.NDArray[Any]] | None
    """Outputs of the members of a `SessionGroup` that applied a step, with zeros for the others; otherwise None."""

    def __init__(self, message: str, *, reason: str = "") -> None:
        super().__init__(message)
        self.message = message
        self.reason = reason
        self.failures = {}
        self.outputs = None


class InvalidInputError(StepwellError):
    """An argument breaks a rule: shape, dtype, name, range, size, NaN or infinity. Nothing changed."""


class ReplyTooLargeError(InvalidInputError):
    """The reply exceeds a size limit, so the client did not receive it. The server may have applied the change.

    A client with a larger `max_message_bytes` can repeat the same call to get the reply; the change is not applied
    twice. To make another change instead, call `Session.refresh()` first.
    """

    outcome: Outcome
    """Always "unknown": the server may have applied the change."""

    def __init__(self, message: str, *, reason: str = "") -> None:
        super().__init__(message, reason=reason)
        self.outcome = "unknown"


class SessionGoneError(StepwellError):
    """The session does not exist, or no longer exists. The subclass tells why."""

    session_id: str
    """Id of the session; empty if the server did not report it."""

    def __init__(self, message: str, *, session_id: str = "", reason: str = "") -> None:
        super().__init__(message, reason=reason)
        self.session_id = session_id


class SessionNotFoundError(SessionGoneError):
    """The session was closed, or was never opened on this server."""


class SessionExpiredError(SessionGoneError):
    """The session was idle for longer than its limit and was deleted."""


class SessionLostError(SessionGoneError):
    """The session existed, but its state cannot be recovered."""


class SessionExistsError(StepwellError):
    """The session id is in use."""


class RevisionConflictError(StepwellError):
    """The session is at another revision than this handle expected. Nothing changed.

    Someone else changed the session, or the server applied an earlier change that this handle had given up, for
    example after a timeout. Call `session.refresh()` to adopt the server's revision.
    """

    expected: int | None
    """Revision that this handle expected."""
    actual: int | None
    """Revision of the session on the server."""

    def __init__(
        self, message: str, *, expected: int | None = None, actual: int | None = None, reason: str = ""
    ) -> None:
        super().__init__(message, reason=reason)
        self.expected = expected
        self.actual = actual


class ModelNotFoundError(StepwellError):
    """The server has no model of that name, or the model has no such version or label."""


class ModelMismatchError(StepwellError):
    """The state belongs to another model, or the new version of a model has other states or outputs."""


class OverloadedError(StepwellError):
    """The server has no capacity now, and there was no time left to wait. Nothing changed."""

    retry_after_s: float
    """Seconds that the server asks you to wait; 0.0 if it gave no advice."""
    quota: str
    """The exhausted quota: "sessions", "rows", "bytes", "steps_per_second", "bytes_in_flight" or "models". Empty if it
    is not a quota.
    """

    def __init__(
        self, message: str, *, retry_after_s: float = 0.0, quota: str = "", reason: str = ""
    ) -> None:
        super().__init__(message, reason=reason)
        self.retry_after_s = retry_after_s
        self.quota = quota


class _OpenEndedError(StepwellError):
    """Base class of errors after which a change may have been applied."""

    outcome: Outcome
    """ "not_applied": nothing changed, for certain. "unknown": the server may have applied the change, or may still apply
    it. Repeat the same call: it completes the change and never applies it twice.
    """

    def __init__(self, message: str, *, outcome: Outcome = "unknown", reason: str = "") -> None:
        super().__init__(message, reason=reason)
        self.outcome = outcome


class UnavailableError(_OpenEndedError):
    """The server cannot be reached or cannot serve the call now, and there was no time left to retry."""


class DeadlineExceededError(_OpenEndedError):
    """The time limit passed."""


class StateCorruptError(StepwellError):
    """The stored record of this session is corrupt. Other sessions are not affected."""


class RefusedError(StepwellError):
    """The server does not offer this call, does not allow it, or cannot carry it out now; `reason` tells which."""


class UnauthenticatedError(RefusedError):
    """The server authenticates callers and does not know this client.

    Its token or certificate is missing, wrong or revoked. If the token is a function, the client has already called
    it again, and the server rejected that token too.
    """

    outcome: Outcome
    """ "not_applied": nothing changed. "unknown": the server may have applied the change before it rejected the token.
    Repeat the call with a valid token: the change is never applied twice.
    """

    def __init__(self, message: str, *, outcome: Outcome = "not_applied", reason: str = "") -> None:
        super().__init__(message, reason=reason)
        self.outcome = outcome


class PermissionDeniedError(RefusedError):
    """The server knows this client, but its role does not allow the call."""


class ModelVersionExistsError(RefusedError):
    """The model has a version of that number, or one is being loaded. A version never changes. Nothing changed."""


class ModelInUseError(RefusedError):
    """The version was not unloaded because it is the default or has sessions. Nothing changed."""


class ModelLoadError(RefusedError):
    """The file is not a model, or the model cannot be served, or loading it took too long.

    The message tells why. Nothing changed.
    """


class MigrationFailedError(RefusedError):
    """The function that converts old states does not exist, raised an exception, or returned invalid states."""


class InternalError(StepwellError):
    """A defect of the server. Its log has the details."""

    error_id: str
    """Search the server's log for this id. Empty if the server gave none."""

    def __init__(self, message: str, *, error_id: str = "", reason: str = "") -> None:
        super().__init__(message, reason=reason)
        self.error_id = error_id


class ServerStartError(StepwellError):
    """A server that this process starts refused to start, or was not ready in time.

    Raised by `stepwell.local` and `stepwell.testing.LocalServer`.
    """

    refusal: str
    """The server's explanation, in one line. If it gave none, this is empty and the message has its last log lines."""

    def __init__(self, message: str, *, refusal: str = "") -> None:
        super().__init__(message)
        self.refusal = refusal


class ClosedError(StepwellError):
    """The client, session or group was closed by this program."""


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
