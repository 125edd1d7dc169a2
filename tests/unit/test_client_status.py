"""Every status that can arrive becomes the right error, with what it carries."""

from __future__ import annotations

import copy
import pickle

import grpc
import grpc.aio
import pytest
from google.protobuf import any_pb2
from google.rpc import error_details_pb2, status_pb2

from stepwell import errors
from stepwell._transport.channel import translate
from stepwell._transport.status import BY_CODE, BY_REASON, DETAILS_KEY, from_message, from_rpc
from stepwell.v1 import errors_pb2
from stepwell_server import errors as server_errors

EXPECTED = {
    "CANCELLED": errors.UnavailableError,
    "UNKNOWN": errors.InternalError,
    "INVALID_ARGUMENT": errors.InvalidInputError,
    "DEADLINE_EXCEEDED": errors.DeadlineExceededError,
    "NOT_FOUND": errors.SessionNotFoundError,
    "ALREADY_EXISTS": errors.SessionExistsError,
    "PERMISSION_DENIED": errors.PermissionDeniedError,
    "RESOURCE_EXHAUSTED": errors.OverloadedError,
    "FAILED_PRECONDITION": errors.ModelMismatchError,
    "ABORTED": errors.RevisionConflictError,
    "OUT_OF_RANGE": errors.InvalidInputError,
    "UNIMPLEMENTED": errors.RefusedError,
    "INTERNAL": errors.InternalError,
    "UNAVAILABLE": errors.UnavailableError,
    "DATA_LOSS": errors.StateCorruptError,
    "UNAUTHENTICATED": errors.UnauthenticatedError,
}


def details(*messages: object) -> list[tuple[str, str | bytes]]:
    status = status_pb2.Status(code=1, message="sent")
    for message in messages:
        packed = any_pb2.Any()
        packed.Pack(message)  # type: ignore[arg-type]
        status.details.append(packed)
    return [("other", "thing"), (DETAILS_KEY, status.SerializeToString())]


@pytest.mark.parametrize("code", list(grpc.StatusCode), ids=lambda code: code.name)
def test_code_without_details(code: grpc.StatusCode) -> None:
    if code is grpc.StatusCode.OK:
        assert code not in BY_CODE
        return
    error = from_rpc(code, "sent", None)
    assert type(error) is EXPECTED[code.name]
    assert error.message == str(error) == "sent"
    assert error.reason == ""


@pytest.mark.parametrize("code", [c for c in grpc.StatusCode if c is not grpc.StatusCode.OK], ids=str)
def test_unknown_reason_falls_back_to_the_code(code: grpc.StatusCode) -> None:
    trailers = details(error_details_pb2.ErrorInfo(reason="FROM_THE_FUTURE"))
    error = from_rpc(code, "sent", trailers)
    assert type(error) is EXPECTED[code.name]
    assert error.reason == "FROM_THE_FUTURE"


def test_every_reason_of_the_server_is_known() -> None:
    kinds = [server_errors.ServerError]
    for kind in kinds:
        kinds.extend(kind.__subclasses__())
    assert {kind.reason for kind in kinds} == set(BY_REASON)


def info(reason: str, **metadata: str) -> error_details_pb2.ErrorInfo:
    return error_details_pb2.ErrorInfo(reason=reason, metadata=metadata)


def delay(milliseconds: int) -> error_details_pb2.RetryInfo:
    retry = error_details_pb2.RetryInfo()
    retry.retry_delay.FromMilliseconds(milliseconds)
    return retry


Code = grpc.StatusCode
OVER_LIMIT = "CLIENT: Sent message larger than max (70 vs. 64)"
CUT_OFF = "Stream removed (RST_STREAM (Received RST_STREAM with error code 2))"
CARRIED: dict[str, tuple[errors.StepwellError, type[errors.StepwellError], dict[str, object]]] = {
    **{
        reason: (
            from_rpc(Code.NOT_FOUND, "sent", details(info(reason, session_id="user-42"))),
            kind,
            {"session_id": "user-42"},
        )
        for reason, kind in (
            ("SESSION_NOT_FOUND", errors.SessionNotFoundError),
            ("SESSION_EXPIRED", errors.SessionExpiredError),
            ("SESSION_LOST", errors.SessionLostError),
        )
    },
    "a model's absence, which has the code of a session's": (
        from_rpc(Code.NOT_FOUND, "", details(info("MODEL_NOT_FOUND"))),
        errors.ModelNotFoundError,
        {},
    ),
    "a conflict": (
        from_rpc(
            Code.ABORTED,
            "sent",
            details(info("REVISION_CONFLICT", expected_revision="7", actual_revision=str(2**63))),
        ),
        errors.RevisionConflictError,
        {"expected": 7, "actual": 2**63},
    ),
    "a conflict of unreadable revisions": (
        from_rpc(Code.ABORTED, "sent", details(info("REVISION_CONFLICT", actual_revision="-x"))),
        errors.RevisionConflictError,
        {"expected": None, "actual": None},
    ),
    "a conflict on a stream": (
        from_message(
            errors_pb2.Error(
                code=10,
                message="sent",
                reason="REVISION_CONFLICT",
                metadata={"expected_revision": "1", "actual_revision": "2"},
            )
        ),
        errors.RevisionConflictError,
        {"expected": 1, "actual": 2, "message": "sent"},
    ),
    "an overload": (
        from_rpc(Code.RESOURCE_EXHAUSTED, "sent", details(info("OVERLOADED"), delay(1250))),
        errors.OverloadedError,
        {"retry_after_s": 1.25},
    ),
    "an overload on a stream": (
        from_message(errors_pb2.Error(code=8, reason="OVERLOADED", retry_after_ms=40)),
        errors.OverloadedError,
        {"retry_after_s": 0.04},
    ),
    "a defect": (
        from_rpc(Code.INTERNAL, "sent", details(info("INTERNAL", error_id="abc"))),
        errors.InternalError,
        {"error_id": "abc"},
    ),
    "a code outside of gRPC on a stream": (
        from_message(errors_pb2.Error(code=99, message="sent")),
        errors.InternalError,
        {},
    ),
    "gRPC's own limit of messages, which is no overload": (
        from_rpc(Code.RESOURCE_EXHAUSTED, OVER_LIMIT, None),
        errors.InvalidInputError,
        {"message": f"the message must fit the size limits of both sides (max_message_bytes): {OVER_LIMIT}"},
    ),
    **{
        f"{kind.__name__} {how}": (from_rpc(code, "sent", trailers), kind, {"outcome": outcome})
        for code, kind in (
            (Code.UNAVAILABLE, errors.UnavailableError),
            (Code.DEADLINE_EXCEEDED, errors.DeadlineExceededError),
        )
        for how, trailers, outcome in (
            ("of the connection", None, "unknown"),
            ("of the server, which settles it", details(info(code.name)), "not_applied"),
        )
    },
    "a server that does not know the outcome": (
        from_rpc(Code.UNAVAILABLE, "no answer", details(info("OUTCOME_UNKNOWN"))),
        errors.UnavailableError,
        {"outcome": "unknown", "reason": "OUTCOME_UNKNOWN"},
    ),
    "garbled details, which do not hide the error": (
        from_rpc(Code.DATA_LOSS, "sent", [(DETAILS_KEY, b"\xff\xff\xff")]),
        errors.StateCorruptError,
        {},
    ),
    "a stream that a proxy cuts off, which is a lost connection": (
        from_rpc(Code.INTERNAL, CUT_OFF, None),
        errors.UnavailableError,
        {"outcome": "unknown", "message": CUT_OFF},
    ),
    "the same words from the server": (
        from_rpc(Code.INTERNAL, f"RST_STREAM: {CUT_OFF}", details(info("INTERNAL", error_id="abc"))),
        errors.InternalError,
        {"error_id": "abc"},
    ),
}


@pytest.mark.parametrize("name", CARRIED)
def test_what_arrives_becomes_an_error_with_what_it_carries(name: str) -> None:
    error, kind, carried = CARRIED[name]
    assert type(error) is kind
    assert {key: getattr(error, key) for key in carried} == carried


@pytest.mark.parametrize("text", ["CLIENT: Received", "SERVER: Sent", "Stream removed (CLIENT: Received"])
def test_a_reply_over_the_limit_does_not_say_that_nothing_changed(text: str) -> None:
    text += " message larger than max (70 vs. 64)"
    error = from_rpc(grpc.StatusCode.RESOURCE_EXHAUSTED, text, None)
    assert isinstance(error, errors.ReplyTooLargeError)
    assert error.outcome == "unknown"
    assert "max_message_bytes" in error.message
    assert "may have applied the change" in error.message
    assert text in error.message


def test_empty_message_is_replaced() -> None:
    assert "UNAVAILABLE" in from_rpc(grpc.StatusCode.UNAVAILABLE, "", None).message
    assert "UNAVAILABLE" in from_rpc(grpc.StatusCode.UNAVAILABLE, None, None).message


@pytest.mark.parametrize("make", [copy.copy, lambda error: pickle.loads(pickle.dumps(error))])  # noqa: S301
def test_errors_can_be_copied_and_sent_between_processes(make: object) -> None:
    error = errors.RevisionConflictError("sent", expected=1, actual=2, reason="REVISION_CONFLICT")
    other = make(error)  # type: ignore[operator]
    assert type(other) is type(error)
    assert (other.message, other.expected, other.actual, str(other)) == ("sent", 1, 2, "sent")


@pytest.mark.parametrize(
    ("debug", "kind"),
    [
        ('Failed "execute_batch": (<grpc._cython.cygrpc.SendMessageOperation object at 0x7f>,)', "broken"),
        ("INTERNAL:Internal error from Core", "sent"),
        ('INTERNAL:Failed "execute_batch"', "sent"),
        ("", "sent"),
        (None, "sent"),
    ],
)
def test_a_failed_write_is_a_broken_connection(debug: str | None, kind: str) -> None:
    """grpc.aio makes a status of its own of it; what a server sent, with whatever text, is the server's."""
    failed = grpc.aio.AioRpcError(
        grpc.StatusCode.INTERNAL,
        grpc.aio.Metadata(),
        grpc.aio.Metadata(),
        "Internal error from Core",
        debug,
    )
    error = translate(failed)
    if kind == "broken":
        assert isinstance(error, errors.UnavailableError)
        assert error.outcome == "unknown"
    else:
        assert isinstance(error, errors.InternalError)
