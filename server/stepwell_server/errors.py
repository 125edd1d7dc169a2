"""The errors that the server raises.

    ServerError
    ├── InvalidInput          a value of the request breaks a rule
    ├── MessageTooLarge       the request or its reply exceeds the size limit
    ├── SessionGone           the session does not exist, or no longer exists
    │   ├── SessionNotFound   it was closed, or never opened on this server
    │   ├── SessionExpired    it was idle for longer than its limit and was deleted
    │   └── SessionLost       it existed, but its state cannot be recovered
    ├── SessionExists         the session id is in use
    ├── RevisionConflict      the session is at another revision than expected
    ├── ModelNotFound         the server has no model of that name
    │   ├── VersionNotFound   the model has no such version or label
    │   └── ModelLoading      it is being loaded (also a Starting)
    │       └── VersionElsewhere  another server on the same store may have the version
    ├── ModelMismatch         the state belongs to another model
    ├── VersionExists         the model has that version, or it is being loaded
    ├── ModelInUse            the version is the default, or has sessions
    ├── SpecsDiffer           sessions cannot be carried to a version with other states or outputs
    ├── MigrationFailed       the function that converts old states does not exist, or failed
    ├── ModelLoadFailed       the model cannot be loaded or served
    ├── Overloaded            the server has no capacity now; retry after retry_after_s
    │   └── NoRows            all rows are held by sessions with changes in progress
    ├── Unavailable           the server cannot serve the call now
    │   ├── Stopping          the server is shutting down
    │   ├── StoreAway         the store does not answer now; retry after retry_after_s
    │   ├── OutcomeUnknown    the change may have been applied
    │   ├── StoreGone         the store can no longer be reached: the server shuts down
    │   └── Starting          its models are not loaded yet; retry after retry_after_s
    ├── DeadlineExceeded      the call's time limit passed before the change was applied
    ├── StateCorrupt          the stored record is corrupt
    ├── Unauthenticated       the server authenticates callers and does not know this one
    ├── PermissionDenied      the caller's role does not allow the call
    ├── Unsupported           this server does not offer the call
    │   ├── ServiceNotFound   this server does not offer the service
    │   └── UploadOff         the server does not accept model files
    └── Internal              a defect; search the log for error_id

Every message names the argument, the rule and the given value. `rpc.status` converts errors to gRPC statuses.
"""

from __future__ import annotations

from typing import ClassVar

MAX_MESSAGE_CHARACTERS = 4096
MAX_FACT_CHARACTERS = 1024
"""Limits of an error's message and of each of its facts, which may quote a request."""


class StartError(Exception):
    """The server cannot start with these settings and files, or cannot use a file that has changed.

    The message is one line and names the option, or the model.
    """


class ServerError(Exception):
    """Base class of every error that callers receive."""

    reason: ClassVar[str] = "INTERNAL"
    """Machine-readable reason, sent in ErrorInfo."""
    may_go_elsewhere: ClassVar[bool] = False
    """Nothing was done, and another server on the same store may be able to serve the call."""
    model = ""
    """The model of the failed call, if known. For metrics, not for callers."""

    def __init__(self, message: str, **metadata: str) -> None:
        # shortened once, for the status, log lines, metrics and the audit log
        self.message = shorten(message, MAX_MESSAGE_CHARACTERS)
        self.metadata = {key: shorten(value, MAX_FACT_CHARACTERS) for key, value in metadata.items()}
        super().__init__(self.message)


class InvalidInput(ServerError):
    """A value of the request breaks a rule. Nothing changed."""

    reason = "INVALID_INPUT"


class MessageTooLarge(InvalidInput):
    """The request or its reply exceeds the size limit. Nothing changed."""

    reason = "MESSAGE_TOO_LARGE"


class RequestTooLarge(MessageTooLarge):
    """The request exceeds the size limit, and was not read."""


class SessionGone(ServerError):
    """The session does not exist, or no longer exists."""

    reason = "SESSION_NOT_FOUND"

    def __init__(self, session_id: str, message: str, **metadata: str) -> None:
        super().__init__(message, session_id=session_id, **metadata)
        self.session_id = session_id


class SessionNotFound(SessionGone):
    """The session was closed, or was never opened on this server."""


class SessionReplaced(SessionNotFound):
    """The session was closed on another server, possibly long ago, and another one was opened with its id."""


class SessionExpired(SessionGone):
    """The session was idle for longer than its limit and was deleted."""

    reason = "SESSION_EXPIRED"


class SessionLost(SessionGone):
    """The session existed, but its state cannot be recovered."""

    reason = "SESSION_LOST"


class SessionExists(ServerError):
    """The session id is in use."""

    reason = "SESSION_EXISTS"


class RevisionConflict(ServerError):
    """The session is at another revision than the caller expected. Nothing changed."""

    reason = "REVISION_CONFLICT"

    def __init__(self, session_id: str, expected: int, actual: int) -> None:
        super().__init__(
            f"expected_revision of session {session_id!r} must be its revision {actual}; got {expected}",
            session_id=session_id,
            expected_revision=str(expected),
            actual_revision=str(actual),
        )
        self.expected = expected
        self.actual = actual


class ModelNotFound(ServerError):
    """The server has no model of that name."""

    reason = "MODEL_NOT_FOUND"


class ModelMismatch(ServerError):
    """The state belongs to a model with another fingerprint."""

    reason = "MODEL_MISMATCH"


class VersionNotFound(ModelNotFound):
    """The model has no such version or label."""

    reason = "MODEL_VERSION_NOT_FOUND"


class VersionExists(ServerError):
    """The model has a version of that number, or it is being loaded. Nothing changed."""

    reason = "MODEL_VERSION_EXISTS"


class ModelInUse(ServerError):
    """The version cannot be unloaded: it is the default, or has sessions. Nothing changed."""

    reason = "MODEL_IN_USE"


class SpecsDiffer(ServerError):
    """Sessions cannot be carried to a version with other states or outputs. Nothing changed."""

    reason = "MODEL_SPECS_DIFFER"


class MigrationFailed(ServerError):
    """The function that converts old states does not exist, or failed. Nothing changed."""

    reason = "MIGRATION_FAILED"


class ModelLoadFailed(ServerError):
    """The model cannot be loaded or served. Nothing changed."""

    reason = "MODEL_LOAD_FAILED"


class Overloaded(ServerError):
    """The server has no capacity now. Nothing changed. Retry after `retry_after_s` seconds."""

    reason = "OVERLOADED"

    def __init__(self, message: str, retry_after_s: float) -> None:
        super().__init__(message)
        self.retry_after_s = retry_after_s


class NoRows(Overloaded):
    """All rows are held by sessions with changes in progress, so a change must wait. Nothing changed."""


class QuotaExceeded(Overloaded):
    """A quota of the tenant or of the caller is used up. Nothing changed."""

    reason = "QUOTA_EXCEEDED"

    def __init__(self, message: str, retry_after_s: float, *, quota: str, limit: str) -> None:
        super().__init__(message, retry_after_s)
        self.metadata = {"quota": quota, "limit": limit}
        self.quota = quota


class Unavailable(ServerError):
    """The server cannot serve the call now. Nothing changed."""

    reason = "UNAVAILABLE"


class Stopping(Unavailable):
    """The server is shutting down and did not start the call."""

    may_go_elsewhere = True


class StoreAway(Unavailable):
    """The store does not answer now. Retry after `retry_after_s` seconds."""

    def __init__(self, message: str, retry_after_s: float) -> None:
        super().__init__(message)
        self.retry_after_s = retry_after_s


class StoreRefuses(Unavailable):
    """The store rejects a request, for example because a permission is missing. `why` is for operators."""

    def __init__(self, message: str, why: str) -> None:
        super().__init__(message)
        self.why = why


class StoreGone(Unavailable):
    """The store can no longer be reached: the server refuses changes and must shut down."""


class OutcomeUnknown(Unavailable):
    """The external store did not confirm the change: it may have been applied."""

    reason = "OUTCOME_UNKNOWN"


class Starting(Unavailable):
    """The server's models are not loaded yet. Nothing changed. Retry after `retry_after_s` seconds."""

    reason = "STARTING"
    may_go_elsewhere = True

    def __init__(self, message: str, retry_after_s: float) -> None:
        super().__init__(message)
        self.retry_after_s = retry_after_s


class ModelLoading(ModelNotFound, Starting):
    """The model, or this version of it, is being loaded. Retry after `retry_after_s` seconds."""

    reason = "STARTING"

    def __init__(self, message: str, retry_after_s: float, **metadata: str) -> None:
        ServerError.__init__(self, message, **metadata)
        self.retry_after_s = retry_after_s


class VersionElsewhere(ModelLoading):
    """The version is not loaded or not known on this server. Another server on the same store may have it.

    Nothing changed. Ask that server, or retry after `retry_after_s` seconds.
    """


class DeadlineExceeded(ServerError):
    """The call's time limit passed while the change waited. It was not applied."""

    reason = "DEADLINE_EXCEEDED"


class StateCorrupt(ServerError):
    """The stored record of this session is corrupt. Other sessions are not affected."""

    reason = "STATE_CORRUPT"


class Unauthenticated(ServerError):
    """The server authenticates callers and does not know this one. Nothing changed."""

    reason = "UNAUTHENTICATED"


class PermissionDenied(ServerError):
    """The role of this caller does not allow the call. Nothing changed."""

    reason = "PERMISSION_DENIED"


class Unsupported(ServerError):
    """The protocol has this call, but this server does not offer it. Nothing changed."""

    reason = "UNSUPPORTED"


class ServiceNotFound(Unsupported):
    """This server does not offer the service."""


class UploadOff(Unsupported):
    """The server does not accept model files (see `--allow-model-upload`). Nothing changed."""

    reason = "MODEL_UPLOAD_OFF"


class Internal(ServerError):
    """A defect. The caller gets only an id; the log has the details under it."""

    def __init__(self, error_id: str) -> None:
        super().__init__(f"internal error {error_id}; the server's log has the details", error_id=error_id)
        self.error_id = error_id


def reasons() -> list[str]:
    """All reasons of errors."""
    kinds, found = [ServerError], {ServerError.reason}
    while kinds:
        more = kinds.pop().__subclasses__()
        found.update(kind.reason for kind in more)
        kinds += more
    return sorted(found)


def shorten(text: str, limit: int) -> str:
    """Shorten a text to `limit` characters, followed by its full length. Shorter texts stay as they are."""
    return text if len(text) <= limit else f"{text[:limit]}... ({len(text)} characters)"


def release_frames(error: BaseException | None) -> None:
    """Drop the tracebacks of an error, its causes and its contexts.

    A traceback holds frames, and they hold requests, tensors and often the error itself. Without this, that cycle keeps
    a refused request in memory until Python looks for cycles, which it seldom does for old objects.
    """
    seen: set[int] = set()
    left = [error]
    while left:
        each = left.pop()
        if each is not None and id(each) not in seen:
            seen.add(id(each))
            each.__traceback__ = None
            left += [each.__cause__, each.__context__]
