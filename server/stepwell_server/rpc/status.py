"""Converts a `ServerError` to the status of a call, or to a `stepwell.v1.Error` in the reply to a frame.

Both carry the same: a code, the message, the reason with its facts, and the delay of a retry. In a status, the reason is a
``google.rpc.ErrorInfo`` and the delay a ``google.rpc.RetryInfo``, in the standard trailer.
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
#: Header of a failed call that had no effect, so that a proxy may send it to another replica. The native front (`grpc.rs`)
#: and Envoy's configuration (`stepwell envoy-config`) use it too.
GO_ELSEWHERE = ("stepwell-retry", "other-replica")


class Code(enum.IntEnum):
    """The gRPC status codes that the server uses: `google.rpc.Code`."""

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


#: The status code by class of error. A class that is missing here has the code of its nearest base class.
CODES: dict[type[errors.ServerError], Code] = {
    errors.InvalidInput: Code.INVALID_ARGUMENT,
    errors.RequestTooLarge: Code.RESOURCE_EXHAUSTED,  # like gRPC itself
    # Also for impossible ids: only calls that open sessions check the form of an id.
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
#: Names of the codes that a call may end with: any call; a call that only names a model or a service.
ANY_CODE = frozenset(_EVERYWHERE | {code.name for code in Code} - {Code.UNIMPLEMENTED.name})
NAMING_CODES = frozenset(_EVERYWHERE | {Code.NOT_FOUND.name})
#: Calls that load models or select versions; those that depend on an option of the server; unsupported methods.
ADMIN_CODES = NAMING_CODES | {Code.ALREADY_EXISTS.name, Code.FAILED_PRECONDITION.name}
UPLOAD_CODES = ADMIN_CODES | {Code.UNIMPLEMENTED.name}
UNSUPPORTED_CODES = frozenset({"CANCELLED", Code.UNIMPLEMENTED.name, Code.INTERNAL.name})

_WITH_DELAY = (errors.Overloaded, errors.Starting, errors.StoreAway)
# Clients may refuse trailers over 8 KiB, and a message can contain text from the caller, such as a session id. A
# percent-encoded character takes at most 12 bytes.
_MESSAGE_BYTES = 2048
_FACT_CHARACTERS = 256


@dataclasses.dataclass(frozen=True, slots=True)
class Status:
    """The status that ends a call."""

    code: Code
    message: str
    trailers: tuple[tuple[str, bytes], ...]
    may_go_elsewhere: bool = False
    """Whether another replica may serve the call. A front then sends `GO_ELSEWHERE`, if it has not sent a reply yet."""


def code_of(error: errors.ServerError) -> Code:
    """Return the gRPC status code of an error."""
    return next(CODES[kind] for kind in type(error).__mro__ if kind in CODES)


def to_status(error: errors.ServerError) -> Status:
    """Return the status of a call that failed with ``error``, and release the frames that the error refers to."""
    errors.release_frames(error)
    # Imported here, not at the start, because a server may run long before its first error.
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
    """Return the error message for a frame or its members, and release the frames that the error refers to."""
    errors.release_frames(error)
    return errors_pb2.Error(
        code=int(code_of(error)),
        message=message_of(error),
        reason=error.reason,
        metadata=_facts(error),
        retry_after_ms=_retry_after_ms(error) if isinstance(error, _WITH_DELAY) else 0,
    )


def message_of(error: errors.ServerError) -> str:
    """Return the error's text for the caller: with external ids, and short enough for a trailer."""
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
