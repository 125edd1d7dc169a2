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
    status = status_pb2.Status(code=1, message="told")
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
    error = from_rpc(code, "told", None)
    assert type(error) is EXPECTED[code.name]
    assert error.message == str(error) == "told"
    assert error.reason == ""


@pytest.mark.parametrize("code", [c for c in grpc.StatusCode if c is not grpc.StatusCode.OK], ids=str)
def test_unknown_reason_falls_back_to_the_code(code: grpc.StatusCode) -> None:
    trailers = details(error_details_pb2.ErrorInfo(reason="FROM_THE_FUTURE"))
    error = from_rpc(code, "told", trailers)
    assert type(error) is EXPECTED[code.name]
    assert error.reason == "FROM_THE_FUTURE"


def test_every_reason_of_the_server_is_known() -> None:
    kinds = [server_errors.ServerError]
    for kind in kinds:
        kinds.extend(kind.__subclasses__())
    assert {kind.reason for kind in kinds} == set(BY_REASON)


@pytest.mark.parametrize(
    ("reason", "kind"),
    [
        ("SESSION_NOT_FOUND", errors.SessionNotFoundError),
        ("SESSION_EXPIRED", errors.SessionExpiredError),
        ("SESSION_LOST", errors.SessionLostError),
    ],
)
def test_three_ways_for_a_session_to_be_gone(reason: str, kind: type[errors.SessionGoneError]) -> None:
    info = error_details_pb2.ErrorInfo(reason=reason, metadata={"session_id": "user-42"})
    error = from_rpc(grpc.StatusCode.NOT_FOUND, "told", details(info))
    assert type(error) is kind
    assert isinstance(error, errors.SessionGoneError)
    assert error.session_id == "user-42"


def test_model_not_found_shares_a_code_with_sessions() -> None:
    info = error_details_pb2.ErrorInfo(reason="MODEL_NOT_FOUND")
    assert type(from_rpc(grpc.StatusCode.NOT_FOUND, "", details(info))) is errors.ModelNotFoundError


def test_conflict_carries_both_revisions() -> None:
    info = error_details_pb2.ErrorInfo(
        reason="REVISION_CONFLICT", metadata={"expected_revision": "7", "actual_revision": str(2**63)}
    )
    error = from_rpc(grpc.StatusCode.ABORTED, "told", details(info))
    assert isinstance(error, errors.RevisionConflictError)
    assert (error.expected, error.actual) == (7, 2**63)


def test_conflict_with_unreadable_revisions() -> None:
    info = error_details_pb2.ErrorInfo(reason="REVISION_CONFLICT", metadata={"actual_revision": "-x"})
    error = from_rpc(grpc.StatusCode.ABORTED, "told", details(info))
    assert isinstance(error, errors.RevisionConflictError)
    assert (error.expected, error.actual) == (None, None)


def test_overload_carries_its_delay() -> None:
    retry = error_details_pb2.RetryInfo()
    retry.retry_delay.FromMilliseconds(1250)
    trailers = details(error_details_pb2.ErrorInfo(reason="OVERLOADED"), retry)
    error = from_rpc(grpc.StatusCode.RESOURCE_EXHAUSTED, "told", trailers)
    assert isinstance(error, errors.OverloadedError)
    assert error.retry_after_s == 1.25


def test_internal_error_carries_its_id() -> None:
    info = error_details_pb2.ErrorInfo(reason="INTERNAL", metadata={"error_id": "abc"})
    error = from_rpc(grpc.StatusCode.INTERNAL, "told", details(info))
    assert isinstance(error, errors.InternalError)
    assert error.error_id == "abc"


def test_grpc_own_message_limit_is_no_overload() -> None:
    text = "CLIENT: Sent message larger than max (70 vs. 64)"
    error = from_rpc(grpc.StatusCode.RESOURCE_EXHAUSTED, text, None)
    assert isinstance(error, errors.InvalidInputError)
    assert text in error.message


@pytest.mark.parametrize("text", ["CLIENT: Received", "SERVER: Sent", "Stream removed (CLIENT: Received"])
def test_a_reply_over_the_limit_does_not_say_that_nothing_changed(text: str) -> None:
    text += " message larger than max (70 vs. 64)"
    error = from_rpc(grpc.StatusCode.RESOURCE_EXHAUSTED, text, None)
    assert isinstance(error, errors.ReplyTooLargeError)
    assert error.outcome == "unknown"
    assert "max_message_bytes" in error.message
    assert "may have applied the change" in error.message
    assert text in error.message


@pytest.mark.parametrize("code", [grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.DEADLINE_EXCEEDED], ids=str)
def test_outcome_is_settled_only_where_the_server_says_so(code: grpc.StatusCode) -> None:
    lost = from_rpc(code, "socket closed", None)
    told = from_rpc(code, "stopping", details(error_details_pb2.ErrorInfo(reason=code.name)))
    assert isinstance(lost, errors.UnavailableError | errors.DeadlineExceededError)
    assert isinstance(told, errors.UnavailableError | errors.DeadlineExceededError)
    assert (lost.outcome, told.outcome) == ("unknown", "not_applied")


def test_a_server_may_say_that_it_does_not_know_the_outcome() -> None:
    told = from_rpc(
        grpc.StatusCode.UNAVAILABLE,
        "no answer",
        details(error_details_pb2.ErrorInfo(reason="OUTCOME_UNKNOWN")),
    )
    assert isinstance(told, errors.UnavailableError)
    assert (told.outcome, told.reason) == ("unknown", "OUTCOME_UNKNOWN")


def test_garbled_details_do_not_hide_the_error() -> None:
    error = from_rpc(grpc.StatusCode.DATA_LOSS, "told", [(DETAILS_KEY, b"\xff\xff\xff")])
    assert type(error) is errors.StateCorruptError


def test_empty_message_is_replaced() -> None:
    assert "UNAVAILABLE" in from_rpc(grpc.StatusCode.UNAVAILABLE, "", None).message
    assert "UNAVAILABLE" in from_rpc(grpc.StatusCode.UNAVAILABLE, None, None).message


def test_error_of_a_stream_says_the_same_as_trailers() -> None:
    error = from_message(
        errors_pb2.Error(
            code=10,
            message="told",
            reason="REVISION_CONFLICT",
            metadata={"expected_revision": "1", "actual_revision": "2"},
        )
    )
    assert isinstance(error, errors.RevisionConflictError)
    assert (error.expected, error.actual, error.message) == (1, 2, "told")


def test_overload_on_a_stream() -> None:
    error = from_message(errors_pb2.Error(code=8, reason="OVERLOADED", retry_after_ms=40))
    assert isinstance(error, errors.OverloadedError)
    assert error.retry_after_s == 0.04


def test_code_outside_of_grpc_on_a_stream() -> None:
    assert type(from_message(errors_pb2.Error(code=99, message="told"))) is errors.InternalError


@pytest.mark.parametrize("make", [copy.copy, lambda error: pickle.loads(pickle.dumps(error))])  # noqa: S301
def test_errors_can_be_copied_and_sent_between_processes(make: object) -> None:
    error = errors.RevisionConflictError("told", expected=1, actual=2, reason="REVISION_CONFLICT")
    other = make(error)  # type: ignore[operator]
    assert type(other) is type(error)
    assert (other.message, other.expected, other.actual, str(other)) == ("told", 1, 2, "told")


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


def test_a_stream_that_a_proxy_cuts_off_is_a_lost_connection() -> None:
    words = "Stream removed (RST_STREAM (Received RST_STREAM with error code 2))"
    error = from_rpc(grpc.StatusCode.INTERNAL, words, None)
    assert isinstance(error, errors.UnavailableError)
    assert (error.outcome, str(error)) == ("unknown", words)
    info = error_details_pb2.ErrorInfo(reason="INTERNAL", metadata={"error_id": "abc"})
    assert isinstance(
        from_rpc(grpc.StatusCode.INTERNAL, f"RST_STREAM: {words}", details(info)), errors.InternalError
    )
