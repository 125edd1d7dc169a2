"""How a `ServerError` travels: as the status of a call, or as a `stepwell.v1.Error` inside a frame's reply.

Both say the same: a code, the message, the reason with its facts, and when to come back. On a call the
reason is a ``google.rpc.ErrorInfo`` and the delay a ``google.rpc.RetryInfo``, in the standard trailer.
"""

from __future__ import annotations

import dataclasses
import enum
import math

from stepwell.v1 import errors_pb2
from stepwell_server import errors
from stepwell_server.core.namespaces import own, without_tenants

#: Domain of every ErrorInfo.
DOMAIN = "stepwell"
_DETAILS_KEY = "grpc-status-details-bin"
#: In the headers of a call that ends without an answer: nothing of it was done, and a proxy may send it to another replica.
#: The native front (`grpc.rs`) and Envoy's configuration (`stepwell envoy-config`) know it too.
GO_ELSEWHERE = ("stepwell-retry", "other-replica")


class Code(enum.IntEnum):
    """gRPC's status codes, those that are used here: `google.rpc.Code`."""

    INVALID_ARGUMENT = 3
    DEADLINE_EXCEEDED = 4
    NOT_FOUND = 5
    ALREADY_EXISTS = 6
    PERMISSION_DENIED = 7
    RESOURCE_EXHAUSTED = 8
    FAILED_PRECONDITION = 9
    ABORTED = 10
    UNIMPLEMENTED = 12
    INTERNAL = 13
    UNAVAILABLE = 14
    DATA_LOSS = 15
    UNAUTHENTICATED = 16


#: The table. An error has the code of the nearest of its classes that is in here.
CODES: dict[type[errors.ServerError], Code] = {
    errors.InvalidInput: Code.INVALID_ARGUMENT,
    errors.RequestTooLarge: Code.RESOURCE_EXHAUSTED,  # as gRPC itself would say it
    # Also for what no session's id can be: only where a session gets its id is it looked at as such.
    errors.SessionGone: Code.NOT_FOUND,
    errors.SessionExists: Code.ALREADY_EXISTS,
    errors.RevisionConflict: Code.ABORTED,
    errors.ModelNotFound: Code.NOT_FOUND,
    errors.ModelLoading: Code.UNAVAILABLE,
    errors.ServiceNotFound: Code.NOT_FOUND,
    errors.ModelMismatch: Code.FAILED_PRECONDITION,
    errors.VersionExists: Code.ALREADY_EXISTS,
    errors.ModelInUse: Code.FAILED_PRECONDITION,
    errors.SpecsDiffer: Code.FAILED_PRECONDITION,
    errors.MigrationFailed: Code.FAILED_PRECONDITION,
    errors.ModelLoadFailed: Code.FAILED_PRECONDITION,
    errors.Overloaded: Code.RESOURCE_EXHAUSTED,
    errors.Unavailable: Code.UNAVAILABLE,
    errors.DeadlineExceeded: Code.DEADLINE_EXCEEDED,
    errors.StateCorrupt: Code.DATA_LOSS,
    errors.Unauthenticated: Code.UNAUTHENTICATED,
    errors.PermissionDenied: Code.PERMISSION_DENIED,
    errors.Unsupported: Code.UNIMPLEMENTED,
    errors.ServerError: Code.INTERNAL,
}

_EVERYWHERE = {"OK", "CANCELLED"} | {
    code.name
    for code in (
        *(Code.INVALID_ARGUMENT, Code.DEADLINE_EXCEEDED, Code.RESOURCE_EXHAUSTED, Code.INTERNAL),
        *(Code.UNAVAILABLE, Code.UNAUTHENTICATED, Code.PERMISSION_DENIED),
    )
}
#: Names of the codes that a call may end with: any call; one that names a model, or a service, that may not be there; one
#: that is never done.
ANY_CODE = frozenset(_EVERYWHERE | {code.name for code in Code} - {Code.UNIMPLEMENTED.name})
NAMING_CODES = frozenset(_EVERYWHERE | {Code.NOT_FOUND.name})
#: Of calls that load models and choose among them; of those that may need an option of the server.
ADMIN_CODES = NAMING_CODES | {Code.ALREADY_EXISTS.name, Code.FAILED_PRECONDITION.name}
UPLOAD_CODES = ADMIN_CODES | {Code.UNIMPLEMENTED.name}
UNSUPPORTED_CODES = frozenset({"CANCELLED", Code.UNIMPLEMENTED.name, Code.INTERNAL.name})

_WITH_DELAY = (errors.Overloaded, errors.Starting, errors.StoreAway)
# Trailers over 8 KiB may be refused by the client's gRPC, and what a caller sent (a session id, say) can be
# part of a message. A character takes at most 12 bytes there, percent-encoded.
_MESSAGE_BYTES = 2048
_FACT_CHARACTERS = 256


@dataclasses.dataclass(frozen=True, slots=True)
class Status:
    """What ends a call."""

    code: Code
    message: str
    trailers: tuple[tuple[str, bytes], ...]
    may_go_elsewhere: bool = False
    """As of errors. A front says it where the call ends before it had an answer, by `GO_ELSEWHERE`."""


def code_of(error: errors.ServerError) -> Code:
    """The gRPC status code of an error."""
    return next(CODES[kind] for kind in type(error).__mro__ if kind in CODES)


def to_status(error: errors.ServerError) -> Status:
    """The status of a call that failed with ``error``, which lets go of its frames."""
    errors.release_frames(error)
    # A server may live long before its first error, so this is not imported at the start.
    from google.rpc import error_details_pb2, status_pb2

    code = code_of(error)
    message = message_of(error)
    details = status_pb2.Status(code=int(code), message=message)
    info = error_details_pb2.ErrorInfo(reason=error.reason, domain=DOMAIN, metadata=_facts(error))
    details.details.add().Pack(info)
    if isinstance(error, _WITH_DELAY):
        retry = error_details_pb2.RetryInfo()
        retry.retry_delay.FromMilliseconds(_retry_after_ms(error))
        details.details.add().Pack(retry)
    trailers = ((_DETAILS_KEY, details.SerializeToString()),)
    return Status(code, message, trailers, error.may_go_elsewhere)


def to_proto(error: errors.ServerError) -> errors_pb2.Error:
    """The error of a frame or of its members. It lets go of its own frames."""
    errors.release_frames(error)
    return errors_pb2.Error(
        code=int(code_of(error)),
        message=message_of(error),
        reason=error.reason,
        metadata=_facts(error),
        retry_after_ms=_retry_after_ms(error) if isinstance(error, _WITH_DELAY) else 0,
    )


def message_of(error: errors.ServerError) -> str:
    """What its caller is told: with ids as it knows them, and not too long for a trailer."""
    return _bounded(without_tenants(error.message))


def _retry_after_ms(error: errors.Overloaded | errors.Starting | errors.StoreAway) -> int:
    return max(1, math.ceil(error.retry_after_s * 1000))


def _facts(error: errors.ServerError) -> dict[str, str]:
    return {
        key: (own(value) if key == "session_id" else without_tenants(value))[:_FACT_CHARACTERS]
        for key, value in error.metadata.items()
    }


def _bounded(message: str) -> str:
    """Cut a message so that its percent-encoded form stays under `_MESSAGE_BYTES`."""
    if len(message) * 12 <= _MESSAGE_BYTES:
        return message
    size = 0
    for end, character in enumerate(message):
        size += 1 if " " <= character <= "~" and character != "%" else 3 * len(character.encode())
        if size > _MESSAGE_BYTES:
            return message[:end] + "..."
    return message
