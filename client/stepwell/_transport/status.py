"""Converts a gRPC status, or an `Error` on a stream, to an error of `stepwell.errors`. No other module does."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Iterable, Mapping

import grpc
from google.protobuf.message import DecodeError
from google.rpc import error_details_pb2, status_pb2

from stepwell import errors
from stepwell._transport.connecting import HandshakeError, connect_error
from stepwell.v1 import errors_pb2

DETAILS_KEY = "grpc-status-details-bin"
Code = grpc.StatusCode


@dataclasses.dataclass(frozen=True, slots=True)
class Status:
    """A status as it arrived, in either form."""

    code: grpc.StatusCode
    message: str
    reason: str = ""
    metadata: Mapping[str, str] = dataclasses.field(default_factory=dict)
    retry_after_s: float = 0.0


# gRPC's text if the answer, and not the request, exceeded a limit.
_REPLY_OVER_LIMIT = re.compile(r"(CLIENT: Received|SERVER: Sent) message larger than max")

#: gRPC's text if something answered that speaks HTTP/2 and not gRPC.
_NOT_GRPC = "Received http2 header with status: 404"

#: gRPC's text if HTTP/2 ended a call without a status.
_CUT_OFF = "RST_STREAM"

Maker = Callable[[Status], errors.StepwellError]


def _plain(kind: type[errors.StepwellError]) -> Maker:
    return lambda status: kind(status.message, reason=status.reason)


def _gone(kind: type[errors.SessionGoneError]) -> Maker:
    return lambda status: kind(
        status.message, session_id=status.metadata.get("session_id", ""), reason=status.reason
    )


def _unavailable(status: Status) -> errors.StepwellError:
    if not status.reason and (error := connect_error(status.message)):
        return error
    return _open_ended(errors.UnavailableError)(status)


def _unimplemented(status: Status) -> errors.StepwellError:
    if not status.reason and _NOT_GRPC in status.message:
        return HandshakeError(
            "what answers there is not gRPC: perhaps the port of --http-listen, or a proxy without a route for gRPC; "
            f"{status.message}"
        )
    return _plain(errors.RefusedError)(status)


def _open_ended(kind: type[errors.UnavailableError | errors.DeadlineExceededError]) -> Maker:
    # A reason means that the server itself answered, which it does only for changes that it did not apply; see OUTCOME_UNKNOWN.
    return lambda status: kind(
        status.message, outcome="not_applied" if status.reason else "unknown", reason=status.reason
    )


def _number(status: Status, key: str) -> int | None:
    text = status.metadata.get(key, "")
    return int(text) if text.isdecimal() else None


def _conflict(status: Status) -> errors.StepwellError:
    return errors.RevisionConflictError(
        status.message,
        expected=_number(status, "expected_revision"),
        actual=_number(status, "actual_revision"),
        reason=status.reason,
    )


def _exhausted(status: Status) -> errors.StepwellError:
    # gRPC itself reports a message over the limit with this code; waiting would not make it smaller.
    if not status.reason and _REPLY_OVER_LIMIT.search(status.message):
        return errors.ReplyTooLargeError(
            "the reply must fit the client's max_message_bytes (an argument of connect) and the server's "
            f"limit: {status.message}; the server may have applied the change"
        )
    if not status.reason and "larger than max" in status.message:
        return errors.InvalidInputError(
            f"the message must fit the size limits of both sides (max_message_bytes): {status.message}"
        )
    return errors.OverloadedError(
        status.message,
        retry_after_s=status.retry_after_s,
        quota=status.metadata.get("quota", ""),
        reason=status.reason,
    )


def _internal(status: Status) -> errors.StepwellError:
    return errors.InternalError(
        status.message, error_id=status.metadata.get("error_id", ""), reason=status.reason
    )


BY_REASON: Mapping[str, Maker] = {
    "INVALID_INPUT": _plain(errors.InvalidInputError),
    "MESSAGE_TOO_LARGE": _plain(errors.InvalidInputError),
    "SESSION_NOT_FOUND": _gone(errors.SessionNotFoundError),
    "SESSION_EXPIRED": _gone(errors.SessionExpiredError),
    "SESSION_LOST": _gone(errors.SessionLostError),
    "SESSION_EXISTS": _plain(errors.SessionExistsError),
    "REVISION_CONFLICT": _conflict,
    "MODEL_NOT_FOUND": _plain(errors.ModelNotFoundError),
    "MODEL_VERSION_NOT_FOUND": _plain(errors.ModelNotFoundError),
    "MODEL_MISMATCH": _plain(errors.ModelMismatchError),
    "MODEL_VERSION_EXISTS": _plain(errors.ModelVersionExistsError),
    "MODEL_IN_USE": _plain(errors.ModelInUseError),
    "MODEL_SPECS_DIFFER": _plain(errors.ModelMismatchError),
    "MIGRATION_FAILED": _plain(errors.MigrationFailedError),
    "MODEL_LOAD_FAILED": _plain(errors.ModelLoadError),
    "MODEL_UPLOAD_OFF": _plain(errors.RefusedError),
    "OVERLOADED": _exhausted,
    "QUOTA_EXCEEDED": _exhausted,
    "UNAVAILABLE": _open_ended(errors.UnavailableError),
    "OUTCOME_UNKNOWN": lambda status: errors.UnavailableError(
        status.message, outcome="unknown", reason=status.reason
    ),
    "STARTING": _open_ended(errors.UnavailableError),
    "UNAUTHENTICATED": _plain(errors.UnauthenticatedError),
    "PERMISSION_DENIED": _plain(errors.PermissionDeniedError),
    "UNSUPPORTED": _plain(errors.RefusedError),
    "DEADLINE_EXCEEDED": _open_ended(errors.DeadlineExceededError),
    "STATE_CORRUPT": _plain(errors.StateCorruptError),
    "INTERNAL": _internal,
}

BY_CODE: Mapping[grpc.StatusCode, Maker] = {
    Code.CANCELLED: _open_ended(errors.UnavailableError),
    Code.UNKNOWN: _internal,
    Code.INVALID_ARGUMENT: _plain(errors.InvalidInputError),
    Code.DEADLINE_EXCEEDED: _open_ended(errors.DeadlineExceededError),
    Code.NOT_FOUND: _gone(errors.SessionNotFoundError),
    Code.ALREADY_EXISTS: _plain(errors.SessionExistsError),
    Code.PERMISSION_DENIED: _plain(errors.PermissionDeniedError),
    Code.RESOURCE_EXHAUSTED: _exhausted,
    Code.FAILED_PRECONDITION: _plain(errors.ModelMismatchError),
    Code.ABORTED: _conflict,
    Code.OUT_OF_RANGE: _plain(errors.InvalidInputError),
    Code.UNIMPLEMENTED: _unimplemented,
    Code.INTERNAL: _internal,
    Code.UNAVAILABLE: _unavailable,
    Code.DATA_LOSS: _plain(errors.StateCorruptError),
    Code.UNAUTHENTICATED: _plain(errors.UnauthenticatedError),
}

_CODES: Mapping[int, grpc.StatusCode] = {code.value[0]: code for code in Code}


def to_error(status: Status) -> errors.StepwellError:
    """The error of a status: by its reason, otherwise by its code."""
    make = BY_REASON.get(status.reason) or BY_CODE.get(status.code, _internal)
    return make(status)


def from_rpc(
    code: grpc.StatusCode, message: str | None, trailers: Iterable[tuple[str, str | bytes]] | None
) -> errors.StepwellError:
    """The error of a failed call, from its code, text and trailing metadata."""
    text = message or f"the call failed with {code.name} and no message"
    for key, value in trailers or ():
        if key == DETAILS_KEY and isinstance(value, bytes):
            return to_error(_with_details(Status(code, text), value))
    if code is Code.INTERNAL and _CUT_OFF in text:
        # A proxy ends streams like this if their server is gone. Without a proxy the connection would have been lost.
        code = Code.UNAVAILABLE
    return to_error(Status(code, text))


def from_message(error: errors_pb2.Error) -> errors.StepwellError:
    """The error of a member of a frame."""
    code = _CODES.get(error.code, Code.UNKNOWN)
    return to_error(
        Status(
            code,
            error.message or f"the change failed with {code.name} and no message",
            error.reason,
            dict(error.metadata),
            error.retry_after_ms / 1000,
        )
    )


def _with_details(status: Status, encoded: bytes) -> Status:
    try:
        details = status_pb2.Status.FromString(encoded).details
        for detail in details:
            status = _with_detail(status, detail.type_url.rpartition("/")[2], detail.value)
    except DecodeError:
        # Details are optional: a proxy that garbles them must not hide the error itself.
        return status
    return status


def _with_detail(status: Status, name: str, value: bytes) -> Status:
    if name == "google.rpc.ErrorInfo":
        info = error_details_pb2.ErrorInfo.FromString(value)
        return dataclasses.replace(status, reason=info.reason, metadata=dict(info.metadata))
    if name == "google.rpc.RetryInfo":
        delay = error_details_pb2.RetryInfo.FromString(value).retry_delay
        return dataclasses.replace(status, retry_after_s=delay.seconds + delay.nanos / 1e9)
    return status
