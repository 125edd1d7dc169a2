"""The boundary of a call: errors become statuses; defects become opaque errors and are logged under an id."""

from __future__ import annotations

import asyncio
import logging
from typing import Any

import pytest

from stepwell.v1 import sessions_pb2 as pb
from stepwell_server.errors import (
    ModelLoading,
    ServerError,
    SessionNotFound,
    Stopping,
    Unavailable,
    VersionElsewhere,
)
from stepwell_server.rpc.boundary import Boundary
from stepwell_server.rpc.fronts.base import CallEnded
from support.rpc.fake_call import FakeCall, Requests


@pytest.fixture
def requests() -> Requests:
    return Requests()


@pytest.fixture
def boundary(requests: Requests) -> Boundary:
    return Boundary(requests, max_message_bytes=1024)


def _unary(boundary: Boundary, behaviour: Any) -> Any:
    return boundary.unary("GetSession", behaviour, pb.GetSessionRequest)


async def test_messages_are_parsed_and_serialized(boundary: Boundary, requests: Requests) -> None:
    async def behaviour(request: pb.GetSessionRequest, _call: object) -> pb.GetSessionResponse:
        return pb.GetSessionResponse(session=pb.Session(session_id=request.session_id))

    raw = await _unary(boundary, behaviour)(FakeCall(b"\n\x01s"))
    assert pb.GetSessionResponse.FromString(raw).session.session_id == "s"
    assert requests.done == [("GetSession", "OK")]


async def _fails(_request: object, _call: object) -> pb.GetSessionResponse:
    raise SessionNotFound("s", "no session 's'")


async def _breaks(_request: object, _call: object) -> pb.GetSessionResponse:
    raise ValueError("secret detail")


async def _awaits_something_cancelled(_request: object, _call: object) -> pb.GetSessionResponse:
    future: asyncio.Future[pb.GetSessionResponse] = asyncio.get_running_loop().create_future()
    future.cancel()
    return await future


async def _answers_too_much(_request: object, _call: object) -> pb.GetSessionResponse:
    return pb.GetSessionResponse(session=pb.Session(session_id="s" * 2000))


@pytest.mark.parametrize(
    ("behaviour", "raw", "code", "message"),
    [
        (_fails, b"", "NOT_FOUND", "no session 's'"),
        (_fails, b"\xff\xff", "INVALID_ARGUMENT", "must be a stepwell.v1.GetSessionRequest; got 2 bytes"),
        (_fails, b"\n\x01\xff", "INVALID_ARGUMENT", "must be a stepwell.v1.GetSessionRequest"),
        (_answers_too_much, b"", "INVALID_ARGUMENT", "the reply must be at most 1024 bytes; it would have"),
    ],
)
async def test_errors_become_statuses(
    boundary: Boundary, requests: Requests, behaviour: Any, raw: bytes, code: str, message: str
) -> None:
    with pytest.raises(CallEnded, match=message) as caught:
        await _unary(boundary, behaviour)(FakeCall(raw))
    assert caught.value.status.code.name == code
    assert requests.done == [("GetSession", code)]
    assert sum(requests.refusals.values()) == 1


@pytest.mark.parametrize(
    ("method", "error", "may_go"),
    [
        ("Step", ModelLoading("m", 1.0), True),
        ("Predict", VersionElsewhere("m", 1.0), True),
        # some of the sessions may be closed by then, the old session of a sequence too
        ("CloseSessions", ModelLoading("m", 1.0), False),
        ("ModelInfer", VersionElsewhere("m", 1.0), False),
        ("CloseSessions", Stopping("m"), True),
        ("Step", Unavailable("m"), False),
    ],
)
async def test_only_calls_without_effect_may_go_elsewhere(
    boundary: Boundary, method: str, error: ServerError, may_go: bool
) -> None:
    async def fails(_request: object, _call: object) -> pb.GetSessionResponse:
        raise error

    with pytest.raises(CallEnded) as caught:
        await boundary.unary(method, fails, pb.GetSessionRequest)(FakeCall())
    assert caught.value.status.may_go_elsewhere is may_go


@pytest.mark.parametrize("behaviour", [_breaks, _awaits_something_cancelled])
async def test_defects_are_opaque_and_logged_under_their_id(
    boundary: Boundary, behaviour: Any, caplog: pytest.LogCaptureFixture
) -> None:
    with pytest.raises(CallEnded) as caught:
        await _unary(boundary, behaviour)(FakeCall())
    assert caught.value.status.code.name == "INTERNAL"
    assert "secret" not in caught.value.status.message
    (record,) = caplog.records
    fields = record.__dict__["fields"]
    assert fields["error_id"] in caught.value.status.message
    assert record.exc_info is not None
    assert record.levelno == logging.ERROR


@pytest.mark.parametrize(("is_late", "code"), [(False, "CANCELLED"), (True, "DEADLINE_EXCEEDED")])
async def test_a_call_that_the_front_cancelled_ends_as_cancelled(
    boundary: Boundary, requests: Requests, is_late: bool, code: str
) -> None:
    began = asyncio.Event()

    async def waits(_request: object, _call: object) -> pb.GetSessionResponse:
        began.set()
        await asyncio.Event().wait()
        raise AssertionError

    task = asyncio.create_task(_unary(boundary, waits)(FakeCall(is_late=is_late)))
    await began.wait()
    idle = asyncio.create_task(boundary.wait_idle())
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert requests.done == [("GetSession", code)]
    await asyncio.wait_for(idle, 60)
