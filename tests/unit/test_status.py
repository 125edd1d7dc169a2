"""Every error has its status code and its reason, the same in calls and in frames."""

from __future__ import annotations

import grpc
import pytest
from google.rpc import error_details_pb2, status_pb2

from stepwell_server import errors
from stepwell_server.rpc.status import Status, code_of, to_proto, to_status

_CODES = [
    (errors.InvalidInput("m"), "INVALID_ARGUMENT", "INVALID_INPUT"),
    (errors.MessageTooLarge("m"), "INVALID_ARGUMENT", "MESSAGE_TOO_LARGE"),
    (errors.RequestTooLarge("m"), "RESOURCE_EXHAUSTED", "MESSAGE_TOO_LARGE"),
    (errors.SessionNotFound("s", "m"), "NOT_FOUND", "SESSION_NOT_FOUND"),
    (errors.SessionReplaced("s", "m"), "NOT_FOUND", "SESSION_NOT_FOUND"),
    (errors.SessionExpired("s", "m"), "NOT_FOUND", "SESSION_EXPIRED"),
    (errors.SessionLost("s", "m"), "NOT_FOUND", "SESSION_LOST"),
    (errors.SessionExists("m"), "ALREADY_EXISTS", "SESSION_EXISTS"),
    (errors.RevisionConflict("s", 3, 5), "ABORTED", "REVISION_CONFLICT"),
    (errors.ModelNotFound("m"), "NOT_FOUND", "MODEL_NOT_FOUND"),
    (errors.ModelLoading("m", 1.0), "UNAVAILABLE", "STARTING"),
    (errors.VersionElsewhere("m", 1.0), "UNAVAILABLE", "STARTING"),
    (errors.ServiceNotFound("m"), "NOT_FOUND", "UNSUPPORTED"),
    (errors.ModelMismatch("m"), "FAILED_PRECONDITION", "MODEL_MISMATCH"),
    (errors.VersionNotFound("m"), "NOT_FOUND", "MODEL_VERSION_NOT_FOUND"),
    (errors.VersionExists("m"), "ALREADY_EXISTS", "MODEL_VERSION_EXISTS"),
    (errors.ModelInUse("m"), "FAILED_PRECONDITION", "MODEL_IN_USE"),
    (errors.SpecsDiffer("m"), "FAILED_PRECONDITION", "MODEL_SPECS_DIFFER"),
    (errors.MigrationFailed("m"), "FAILED_PRECONDITION", "MIGRATION_FAILED"),
    (errors.ModelLoadFailed("m"), "FAILED_PRECONDITION", "MODEL_LOAD_FAILED"),
    (errors.UploadOff("m"), "UNIMPLEMENTED", "MODEL_UPLOAD_OFF"),
    (errors.Overloaded("m", 0.25), "RESOURCE_EXHAUSTED", "OVERLOADED"),
    (errors.NoRows("m", 0.25), "RESOURCE_EXHAUSTED", "OVERLOADED"),
    (errors.QuotaExceeded("m", 0.5, quota="rows", limit="3"), "RESOURCE_EXHAUSTED", "QUOTA_EXCEEDED"),
    (errors.Unavailable("m"), "UNAVAILABLE", "UNAVAILABLE"),
    (errors.Stopping("m"), "UNAVAILABLE", "UNAVAILABLE"),
    (errors.StoreAway("m", 0.25), "UNAVAILABLE", "UNAVAILABLE"),
    (errors.StoreRefuses("m", why="w"), "UNAVAILABLE", "UNAVAILABLE"),
    (errors.StoreGone("m"), "UNAVAILABLE", "UNAVAILABLE"),
    (errors.OutcomeUnknown("m"), "UNAVAILABLE", "OUTCOME_UNKNOWN"),
    (errors.Starting("m", 0.25), "UNAVAILABLE", "STARTING"),
    (errors.DeadlineExceeded("m"), "DEADLINE_EXCEEDED", "DEADLINE_EXCEEDED"),
    (errors.StateCorrupt("m"), "DATA_LOSS", "STATE_CORRUPT"),
    (errors.Unauthenticated("m"), "UNAUTHENTICATED", "UNAUTHENTICATED"),
    (errors.PermissionDenied("m"), "PERMISSION_DENIED", "PERMISSION_DENIED"),
    (errors.Unsupported("m"), "UNIMPLEMENTED", "UNSUPPORTED"),
    (errors.Internal("1d"), "INTERNAL", "INTERNAL"),
]


def _all_subclasses(kind: type[errors.ServerError]) -> set[type[errors.ServerError]]:
    return {kind}.union(*(_all_subclasses(child) for child in kind.__subclasses__()))


def _details(status: Status) -> status_pb2.Status:
    ((key, value),) = status.trailers
    assert key == "grpc-status-details-bin"
    return status_pb2.Status.FromString(value)


def test_the_table_knows_every_error() -> None:
    abstract = {errors.ServerError, errors.SessionGone}
    assert {type(error) for error, _, _ in _CODES} == _all_subclasses(errors.ServerError) - abstract


def test_only_what_is_refused_before_it_began_may_go_elsewhere() -> None:
    found = {type(error) for error, _, _ in _CODES if to_status(error).may_go_elsewhere}
    assert found == {errors.Starting, errors.Stopping, errors.ModelLoading, errors.VersionElsewhere}


@pytest.mark.parametrize(("error", "code", "reason"), _CODES, ids=lambda value: type(value).__name__)
def test_calls_and_frames_say_the_same(error: errors.ServerError, code: str, reason: str) -> None:
    status = to_status(error)
    details = _details(status)
    info = error_details_pb2.ErrorInfo()
    assert details.details[0].Unpack(info)
    proto = to_proto(error)
    assert status.code.name == code == code_of(error).name
    assert details.code == proto.code == grpc.StatusCode[code].value[0]
    assert status.message == details.message == proto.message == error.message
    assert info.domain == "stepwell"
    assert info.reason == proto.reason == reason
    assert dict(info.metadata) == dict(proto.metadata) == error.metadata


def test_only_what_passes_by_itself_comes_with_a_delay() -> None:
    passing = errors.Overloaded | errors.Starting | errors.StoreAway
    for error, _, _ in _CODES:
        kinds = [detail.TypeName() for detail in _details(to_status(error)).details]
        assert ("google.rpc.RetryInfo" in kinds) is isinstance(error, passing)
    retry = error_details_pb2.RetryInfo()
    assert _details(to_status(errors.Overloaded("m", 0.25))).details[1].Unpack(retry)
    assert retry.retry_delay.ToMilliseconds() == 250
    assert to_proto(errors.Overloaded("m", 0.25)).retry_after_ms == 250
    assert to_proto(errors.Starting("m", 1.0)).retry_after_ms == 1000
    assert to_proto(errors.Overloaded("m", 1e-9)).retry_after_ms == 1


@pytest.mark.parametrize("character", ["a", "%", "\n", "é", "\N{WATER WAVE}"])
def test_long_messages_are_cut_to_what_trailers_can_hold(character: str) -> None:
    status = to_status(errors.InvalidInput(character * 10_000, given=character * 10_000))
    assert status.message.endswith(character + "...")
    assert len(status.trailers[0][1]) < 4096
    assert len(to_proto(errors.InvalidInput(character * 10_000)).message) < 2100


def test_what_a_caller_sent_is_cut_once_in_the_error_itself() -> None:
    long = "x" * 1_000_000
    error = errors.SessionNotFound(long, f"no session {long!r}", model=long)
    assert len(error.message) < errors.MAX_MESSAGE_CHARACTERS + 50
    assert error.message.endswith("... (1000013 characters)")
    assert str(error) == error.message
    assert max(map(len, error.metadata.values())) < errors.MAX_FACT_CHARACTERS + 50
    status, member = to_status(error), to_proto(error)
    assert len(status.message) < 2100
    assert len(_details(status).SerializeToString()) < 4096
    assert member.ByteSize() < 4096
