"""What can go wrong, in the server's own terms.

    ServerError
    ├── InvalidInput          a value the caller sent breaks a rule
    ├── MessageTooLarge       so does its size
    ├── SessionGone           there is no such session (any more)
    │   ├── SessionNotFound   closed, or never opened here
    │   ├── SessionExpired    idle for longer than its limit
    │   └── SessionLost       it was there, its state cannot be recovered
    ├── SessionExists         the id is taken
    ├── RevisionConflict      the session is at another revision than expected
    ├── ModelNotFound         no model is served under that name
    │   ├── VersionNotFound   it has no such version, or no such label
    │   └── ModelLoading      not yet: it is being loaded (also a Starting)
    │       └── VersionElsewhere  another server on the same store may have the version
    ├── ModelMismatch         the state belongs to another model
    ├── VersionExists         the model has that version, or it is being loaded
    ├── ModelInUse            the version is the default, or has sessions
    ├── SpecsDiffer           sessions cannot be carried to a version of other states or outputs
    ├── MigrationFailed       the function that makes new states of old ones is not there, or has failed
    ├── ModelLoadFailed       the file cannot be served
    ├── Overloaded            no room now; come back after retry_after_s
    │   └── NoRows            the rows belong to sessions with something under way
    ├── Unavailable           the server cannot do it now (stopping, store away)
    │   ├── Stopping          the server is about to end
    │   ├── StoreAway         the store does not answer now; come back after retry_after_s
    │   ├── OutcomeUnknown    it was tried, and nobody knows whether it was applied
    │   ├── StoreGone         what is kept cannot be reached any more: the server ends
    │   └── Starting          its models are not loaded yet; come back after retry_after_s
    ├── DeadlineExceeded      the caller's time limit passed before the change was applied
    ├── StateCorrupt          the stored record is damaged
    ├── Unauthenticated       the server asks who calls, and does not know this caller
    ├── PermissionDenied      the caller's role does not allow it
    ├── Unsupported           no model and no setting makes it possible
    │   ├── ServiceNotFound   no such service is offered here
    │   └── UploadOff         the server takes no files
    └── Internal              a defect; the log has the details under error_id

Every message names the argument, the rule and what came. How an error travels is `rpc.status`'s affair.
"""

from __future__ import annotations

from typing import ClassVar

MAX_MESSAGE_CHARACTERS = 4096
MAX_FACT_CHARACTERS = 1024
"""Of an error's message, and of each of its facts: what a caller has sent may be part of them."""


class StartError(Exception):
    """A server cannot start with what it was given, or use a file that has changed since.

    The message is one line and names the option, or the model.
    """


class ServerError(Exception):
    """Base of every error that a caller may see."""

    reason: ClassVar[str] = "INTERNAL"
    """Machine-readable reason, sent along as the reason of ErrorInfo."""
    may_go_elsewhere: ClassVar[bool] = False
    """Nothing of the call was done, for a reason that another server on the same store need not have."""
    model = ""
    """Of what failed, where that is known: for metrics, not for callers."""

    def __init__(self, message: str, **metadata: str) -> None:
        # once and here: a status, a log line, a metric and the audit log take it as it is
        self.message = shorten(message, MAX_MESSAGE_CHARACTERS)
        self.metadata = {key: shorten(value, MAX_FACT_CHARACTERS) for key, value in metadata.items()}
        super().__init__(self.message)


class InvalidInput(ServerError):
    """A value the caller sent breaks a rule; nothing changed."""

    reason = "INVALID_INPUT"


class MessageTooLarge(InvalidInput):
    """The request or its reply is over the size limit; nothing changed."""

    reason = "MESSAGE_TOO_LARGE"


class RequestTooLarge(MessageTooLarge):
    """The request is over the size limit, which was seen before it was read."""


class SessionGone(ServerError):
    """There is no such session (any more)."""

    reason = "SESSION_NOT_FOUND"

    def __init__(self, session_id: str, message: str, **metadata: str) -> None:
        super().__init__(message, session_id=session_id, **metadata)
        self.session_id = session_id


class SessionNotFound(SessionGone):
    """Closed, or never opened here."""


class SessionReplaced(SessionNotFound):
    """Closed on another server, where another session was opened under its id, which may have been long ago."""


class SessionExpired(SessionGone):
    """Idle for longer than its limit, and therefore deleted."""

    reason = "SESSION_EXPIRED"


class SessionLost(SessionGone):
    """It was there, and its state cannot be recovered."""

    reason = "SESSION_LOST"


class SessionExists(ServerError):
    """The session id is taken."""

    reason = "SESSION_EXISTS"


class RevisionConflict(ServerError):
    """The session is at another revision than the caller expected; nothing changed."""

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
    """No model is served under that name."""

    reason = "MODEL_NOT_FOUND"


class ModelMismatch(ServerError):
    """The state belongs to a model of another fingerprint."""

    reason = "MODEL_MISMATCH"


class VersionNotFound(ModelNotFound):
    """The model has no such version, or no such label."""

    reason = "MODEL_VERSION_NOT_FOUND"


class VersionExists(ServerError):
    """The model has a version of that number, or it is being loaded; nothing changed."""

    reason = "MODEL_VERSION_EXISTS"


class ModelInUse(ServerError):
    """The version cannot be unloaded: it is the default, or has sessions; nothing changed."""

    reason = "MODEL_IN_USE"


class SpecsDiffer(ServerError):
    """Sessions cannot be carried to a version whose states or outputs are others; nothing changed."""

    reason = "MODEL_SPECS_DIFFER"


class MigrationFailed(ServerError):
    """The function that makes new states of old ones is not there, or has failed; nothing changed."""

    reason = "MIGRATION_FAILED"


class ModelLoadFailed(ServerError):
    """The file cannot be served, or was not; nothing changed."""

    reason = "MODEL_LOAD_FAILED"


class Overloaded(ServerError):
    """No room now; nothing changed. Come back after `retry_after_s` seconds."""

    reason = "OVERLOADED"

    def __init__(self, message: str, retry_after_s: float) -> None:
        super().__init__(message)
        self.retry_after_s = retry_after_s


class NoRows(Overloaded):
    """The rows that sessions need belong to others with something under way: a change waits for them. As `Overloaded`."""


class QuotaExceeded(Overloaded):
    """A quota of the tenant or of the caller is used up; nothing changed. As `Overloaded`."""

    reason = "QUOTA_EXCEEDED"

    def __init__(self, message: str, retry_after_s: float, *, quota: str, limit: str) -> None:
        super().__init__(message, retry_after_s)
        self.metadata = {"quota": quota, "limit": limit}
        self.quota = quota


class Unavailable(ServerError):
    """The server cannot do it now; it was not applied."""

    reason = "UNAVAILABLE"


class Stopping(Unavailable):
    """The server is about to end and takes no more of this; nothing of the call was done."""

    may_go_elsewhere = True


class StoreAway(Unavailable):
    """The store does not answer now. Come back after `retry_after_s` seconds."""

    def __init__(self, message: str, retry_after_s: float) -> None:
        super().__init__(message)
        self.retry_after_s = retry_after_s


class StoreRefuses(Unavailable):
    """The store does not do what it is asked, for want of a right say. `why` is for people who run the server."""

    def __init__(self, message: str, why: str) -> None:
        super().__init__(message)
        self.why = why


class StoreGone(Unavailable):
    """What is kept cannot be reached any more, and will not be: changes are refused and the server must end."""


class OutcomeUnknown(Unavailable):
    """The store, which others keep, did not say whether it has the change: it may have been applied."""

    reason = "OUTCOME_UNKNOWN"


class Starting(Unavailable):
    """The server listens, and its models are not loaded yet; nothing changed. Come back after `retry_after_s` seconds."""

    reason = "STARTING"
    may_go_elsewhere = True

    def __init__(self, message: str, retry_after_s: float) -> None:
        super().__init__(message)
        self.retry_after_s = retry_after_s


class ModelLoading(ModelNotFound, Starting):
    """The model, or this version of it, is not served yet: it is being loaded. Come back after `retry_after_s` seconds."""

    reason = "STARTING"

    def __init__(self, message: str, retry_after_s: float, **metadata: str) -> None:
        ServerError.__init__(self, message, **metadata)
        self.retry_after_s = retry_after_s


class VersionElsewhere(ModelLoading):
    """A version is not loaded here, or not known yet, and may be on another server that shares the store.

    Nothing changed. Ask there, or come back after `retry_after_s` seconds.
    """


class DeadlineExceeded(ServerError):
    """The caller's time limit passed while the change waited; it was not applied."""

    reason = "DEADLINE_EXCEEDED"


class StateCorrupt(ServerError):
    """The stored record of this session is damaged; others are not concerned."""

    reason = "STATE_CORRUPT"


class Unauthenticated(ServerError):
    """The server asks who calls, and does not know this caller; nothing changed."""

    reason = "UNAUTHENTICATED"


class PermissionDenied(ServerError):
    """The caller is known, and its role does not allow the call; nothing changed."""

    reason = "PERMISSION_DENIED"


class Unsupported(ServerError):
    """The protocol has it, this server does not; nothing changed."""

    reason = "UNSUPPORTED"


class ServiceNotFound(Unsupported):
    """No service of that name is offered here."""


class UploadOff(Unsupported):
    """The server takes no files (`--allow-model-upload`); nothing changed."""

    reason = "MODEL_UPLOAD_OFF"


class Internal(ServerError):
    """A defect. The text is opaque; the log has the details under the same id."""

    def __init__(self, error_id: str) -> None:
        super().__init__(f"internal error {error_id}; the server's log has the details", error_id=error_id)
        self.error_id = error_id


def reasons() -> list[str]:
    """Every reason that an error may have."""
    kinds, found = [ServerError], {ServerError.reason}
    while kinds:
        more = kinds.pop().__subclasses__()
        found.update(kind.reason for kind in more)
        kinds += more
    return sorted(found)


def shorten(text: str, limit: int) -> str:
    """A text within so many characters; one that is longer has its beginning and says its length."""
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
