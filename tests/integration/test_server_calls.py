"""Every call of the real server, and what comes back when it goes wrong."""

from __future__ import annotations

import json
import os
import queue
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest
from google.protobuf.descriptor_pb2 import FileDescriptorProto
from google.rpc import error_details_pb2, status_pb2
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc

from stepwell.v1 import models_pb2, models_pb2_grpc, sessions_pb2_grpc
from stepwell.v1 import sessions_pb2 as pb
from support.server_process import (
    FEATURES,
    OUTPUTS,
    ServerProcess,
    array,
    begin_long_step,
    connect,
    random_tensor,
    serve,
    tensor,
)

_TIMEOUT_S = 100.0
_LIMIT = 4 << 20
_LONG = 100_000
"""Time steps that take a while."""

Stub = sessions_pb2_grpc.SessionServiceStub


@pytest.fixture(scope="module")
def server() -> Iterator[ServerProcess]:
    with serve("--max-message-bytes", str(_LIMIT)) as server:
        yield server


@pytest.fixture(scope="module")
def channel(server: ServerProcess) -> Iterator[grpc.Channel]:
    with connect(server)[0] as channel:
        yield channel


@pytest.fixture
def stub(channel: grpc.Channel) -> Any:
    return sessions_pb2_grpc.SessionServiceStub(channel)


@pytest.fixture
def session_id(stub: Stub) -> str:
    return stub.OpenSession(pb.OpenSessionRequest(model="forecast"), timeout=_TIMEOUT_S).session.session_id


def _step(session_id: str, seed: int = 0, steps: int = 1, **more: Any) -> pb.StepRequest:
    return pb.StepRequest(session_id=session_id, inputs=[random_tensor(seed, 1, steps, FEATURES)], **more)


def _revision(stub: Stub, session_id: str) -> int:
    return stub.GetSession(pb.GetSessionRequest(session_id=session_id), timeout=_TIMEOUT_S).session.revision


def _trailers(error: grpc.RpcError) -> dict[str, bytes]:
    call: Any = error
    return dict(call.trailing_metadata())


def _details(error: grpc.RpcError) -> dict[str, Any]:
    status = status_pb2.Status.FromString(_trailers(error)["grpc-status-details-bin"])
    info = error_details_pb2.ErrorInfo()
    assert status.details[0].Unpack(info)
    assert info.domain == "stepwell"
    return {"reason": info.reason, "kinds": [detail.TypeName() for detail in status.details], **info.metadata}


def _raw_call(channel: grpc.Channel, method: str) -> Any:
    """A call that sends bytes as they are."""
    return channel.unary_unary(f"/stepwell.v1.SessionService/{method}")


def test_health_is_said_overall_and_per_service(channel: grpc.Channel) -> None:
    health = health_pb2_grpc.HealthStub(channel)
    services = ("stepwell.v1.SessionService", "stepwell.v1.ModelService", "inference.GRPCInferenceService")
    for service in ("", *services):
        reply = health.Check(health_pb2.HealthCheckRequest(service=service), timeout=_TIMEOUT_S)
        assert reply.status == health_pb2.HealthCheckResponse.SERVING
    with pytest.raises(grpc.RpcError) as caught:
        health.Check(health_pb2.HealthCheckRequest(service="other"), timeout=_TIMEOUT_S)
    assert caught.value.code() is grpc.StatusCode.NOT_FOUND


def test_reflection_shows_services_and_messages(channel: grpc.Channel) -> None:
    requests = [
        reflection_pb2.ServerReflectionRequest(list_services=""),
        reflection_pb2.ServerReflectionRequest(file_containing_symbol="stepwell.v1.SessionService"),
        reflection_pb2.ServerReflectionRequest(file_containing_symbol="inference.ModelInferRequest"),
        reflection_pb2.ServerReflectionRequest(file_by_filename="inference/service.proto"),
    ]
    stub = reflection_pb2_grpc.ServerReflectionStub(channel)
    listed, described, *triton = stub.ServerReflectionInfo(iter(requests), timeout=_TIMEOUT_S)
    assert {service.name for service in listed.list_services_response.service} == {
        "grpc.health.v1.Health",
        "grpc.reflection.v1.ServerReflection",
        "grpc.reflection.v1alpha.ServerReflection",
        "inference.GRPCInferenceService",
        "stepwell.v1.ModelService",
        "stepwell.v1.SessionService",
    }
    file = FileDescriptorProto.FromString(described.file_descriptor_response.file_descriptor_proto[0])
    assert file.name == "stepwell/v1/sessions.proto"
    for reply in triton:
        file = FileDescriptorProto.FromString(reply.file_descriptor_response.file_descriptor_proto[0])
        assert file.service[0].name == "GRPCInferenceService"


@pytest.mark.parametrize("version", ["v1", "v1alpha"])
def test_a_client_that_knows_nothing_calls_by_reflection(
    version: str, server: ServerProcess, tmp_path: Path
) -> None:
    """`buf curl` asks for messages and services by the one version, as grpcurl and Postman do."""

    def curl(*arguments: str) -> str:
        command = [str(Path(sys.executable).with_name("buf")), "curl", "--protocol", "grpc"]
        command += ["--http2-prior-knowledge", "--reflect-protocol", f"grpc-{version}", *arguments]
        environment = {"PATH": os.environ["PATH"], "HOME": str(tmp_path)}
        done = subprocess.run(
            command, capture_output=True, text=True, timeout=_TIMEOUT_S, env=environment, check=False
        )
        assert done.returncode == 0, done.stderr
        return done.stdout

    url = f"http://{server.address}"
    named = curl("--list-methods", url).splitlines()
    for method in (
        "stepwell.v1.SessionService/Step",
        "inference.GRPCInferenceService/ModelInfer",
        "grpc.health.v1.Health/Check",
        "grpc.reflection.v1.ServerReflection/ServerReflectionInfo",
    ):
        assert method in named
    listed = json.loads(curl(f"{url}/stepwell.v1.ModelService/ListModels"))
    assert [model["name"] for model in listed["models"]] == ["forecast"]
    assert json.loads(curl(f"{url}/inference.GRPCInferenceService/ServerLive")) == {"live": True}


def test_models_are_described(channel: grpc.Channel) -> None:
    stub = models_pb2_grpc.ModelServiceStub(channel)
    (listed,) = stub.ListModels(models_pb2.ListModelsRequest(), timeout=_TIMEOUT_S).models
    got = stub.GetModel(models_pb2.GetModelRequest(name="forecast"), timeout=_TIMEOUT_S).model
    assert got == listed
    assert (got.name, got.executor, got.state_row_bytes) == ("forecast", "litert", 64)
    assert list(got.inputs[0].shape) == [FEATURES]


def test_predict_gives_the_bits_of_a_session(channel: grpc.Channel, stub: Stub, session_id: str) -> None:
    x = random_tensor(3, 1, 5, FEATURES)
    predicted = models_pb2_grpc.ModelServiceStub(channel).Predict(
        models_pb2.PredictRequest(model="forecast", inputs=[x]), timeout=_TIMEOUT_S
    )
    stepped = stub.Step(pb.StepRequest(session_id=session_id, inputs=[x]), timeout=_TIMEOUT_S)
    state = stub.GetState(pb.GetStateRequest(session_id=session_id), timeout=_TIMEOUT_S).state
    assert predicted.outputs[0] == stepped.outputs[0]
    assert list(predicted.state) == list(state)


def test_the_life_of_a_session(stub: Stub) -> None:
    opened = stub.OpenSession(
        pb.OpenSessionRequest(model="forecast", session_id="life", request_id=5), timeout=_TIMEOUT_S
    )
    assert (opened.session.session_id, opened.session.batch_size, opened.resumed) == ("life", 1, False)
    first = stub.Step(_step("life", expected_revision=0, request_id=9), timeout=_TIMEOUT_S)
    assert (first.revision, first.position, list(first.outputs[0].shape)) == (1, 1, [1, 1, OUTPUTS])
    again = stub.Step(_step("life", expected_revision=0, request_id=9), timeout=_TIMEOUT_S)
    assert again.replayed
    assert again.outputs == first.outputs
    fork = stub.ForkSession(
        pb.ForkSessionRequest(session_id="life", new_session_id="life-2", expected_revision=1),
        timeout=_TIMEOUT_S,
    )
    assert (fork.session.session_id, fork.session.revision) == ("life-2", 1)
    assert stub.ResetStates(pb.ResetStatesRequest(session_id="life"), timeout=_TIMEOUT_S).revision == 2
    assert (
        stub.CloseSessions(pb.CloseSessionsRequest(session_ids=["life", "x"]), timeout=_TIMEOUT_S).closed == 1
    )
    stub.CloseSession(pb.CloseSessionRequest(session_id="life-2"), timeout=_TIMEOUT_S)


def test_sessions_are_listed_page_by_page(stub: Stub) -> None:
    ids = [f"page-{number:02}" for number in range(7)]
    stub.OpenSessions(pb.OpenSessionsRequest(model="forecast", session_ids=ids), timeout=_TIMEOUT_S)
    seen: list[str] = []
    request = pb.ListSessionsRequest(session_id_prefix="page-", page_size=3)
    while True:
        page = stub.ListSessions(request, timeout=_TIMEOUT_S)
        assert page.total == 7
        seen += [session.session_id for session in page.sessions]
        if not page.next_page_token:
            break
        request.page_token = page.next_page_token
    assert seen == ids
    with pytest.raises(grpc.RpcError) as caught:
        stub.ListSessions(pb.ListSessionsRequest(page_token="page-03"), timeout=_TIMEOUT_S)
    assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT
    assert "page_token must be the next_page_token of another page; got 'page-03'" in str(caught.value)
    with pytest.raises(grpc.RpcError, match="page_size must be at most 10000; got 10001"):
        stub.ListSessions(pb.ListSessionsRequest(page_size=10_001), timeout=_TIMEOUT_S)


def test_a_stream_gives_the_bits_of_single_calls(stub: Stub) -> None:
    ids = list(
        stub.OpenSessions(pb.OpenSessionsRequest(model="forecast", count=4), timeout=_TIMEOUT_S).session_ids
    )
    x = random_tensor(5, 4, 2, FEATURES)
    frames = [
        pb.StepStreamRequest(frame_id=number, step=pb.StepFrame(session_ids=ids, inputs=[x]))
        for number in range(2)
    ]
    rows: dict[int, list[Any]] = {0: [], 1: []}
    for reply in stub.StepStream(iter(frames), timeout=_TIMEOUT_S):
        assert not reply.errors
        rows[reply.frame_id] += [*zip(reply.members or range(4), array(reply.outputs[0]), strict=True)]
    single = stub.OpenSession(pb.OpenSessionRequest(model="forecast"), timeout=_TIMEOUT_S).session.session_id
    for number in range(2):
        row = pb.StepRequest(session_id=single)
        row.inputs.add(dtype=x.dtype, shape=[1, 2, FEATURES], data=x.data[: len(x.data) // 4])
        alone = array(stub.Step(row, timeout=_TIMEOUT_S).outputs[0])[0]
        assert dict(rows[number])[0].tobytes() == alone.tobytes()


@pytest.mark.parametrize(
    ("call", "request_", "code", "expected"),
    [
        ("GetSession", pb.GetSessionRequest(session_id="no"), "NOT_FOUND", {"reason": "SESSION_NOT_FOUND"}),
        ("OpenSession", pb.OpenSessionRequest(model="no"), "NOT_FOUND", {"reason": "MODEL_NOT_FOUND"}),
        (
            "OpenSession",
            pb.OpenSessionRequest(model="forecast", model_fingerprint="x"),
            "FAILED_PRECONDITION",
            {"reason": "MODEL_MISMATCH"},
        ),
        ("OpenSession", pb.OpenSessionRequest(model="forecast", session_id="a\nb"), "INVALID_ARGUMENT", {}),
        (
            "OpenSession",
            pb.OpenSessionRequest(model="forecast", session_id="x" * 10_000),
            "INVALID_ARGUMENT",
            {},
        ),
        ("Step", _step("no"), "NOT_FOUND", {"reason": "SESSION_NOT_FOUND", "session_id": "no"}),
        ("Step", pb.StepRequest(session_id="no", outputs=9), "INVALID_ARGUMENT", {"reason": "INVALID_INPUT"}),  # type: ignore[arg-type]
    ],
)
def test_errors_come_with_their_facts(
    stub: Stub, call: str, request_: Any, code: str, expected: dict[str, str]
) -> None:
    with pytest.raises(grpc.RpcError) as caught:
        getattr(stub, call)(request_, timeout=_TIMEOUT_S)
    assert caught.value.code() is grpc.StatusCode[code]
    assert expected.items() <= _details(caught.value).items()


def test_a_stale_revision_says_both(stub: Stub, session_id: str) -> None:
    with pytest.raises(grpc.RpcError) as caught:
        stub.Step(_step(session_id, expected_revision=7, request_id=1), timeout=_TIMEOUT_S)
    assert caught.value.code() is grpc.StatusCode.ABORTED
    facts = {"reason": "REVISION_CONFLICT", "expected_revision": "7", "actual_revision": "0"}
    assert facts.items() <= _details(caught.value).items()


def test_an_unanswered_deadline_changes_nothing(stub: Stub, session_id: str) -> None:
    long = begin_long_step(stub, session_id, _LONG)
    with pytest.raises(grpc.RpcError) as caught:
        stub.Step(_step(session_id), timeout=0.05)
    assert caught.value.code() is grpc.StatusCode.DEADLINE_EXCEEDED
    assert long.result().revision == 1
    assert _revision(stub, session_id) == 1


def test_a_time_limit_of_a_frame_changes_nothing(stub: Stub, session_id: str) -> None:
    long = begin_long_step(stub, session_id, _LONG)
    frame = pb.StepFrame(session_ids=[session_id], inputs=[random_tensor(1, 1, 1, FEATURES)], timeout_ms=20)
    (reply,) = stub.StepStream(iter([pb.StepStreamRequest(step=frame)]), timeout=_TIMEOUT_S)
    assert reply.errors[0].error.reason == "DEADLINE_EXCEEDED"
    assert long.result().revision == 1


def test_a_cancelled_long_step_changes_nothing(stub: Stub, session_id: str) -> None:
    state = stub.GetState(pb.GetStateRequest(session_id=session_id), timeout=_TIMEOUT_S).state
    call = begin_long_step(stub, session_id, _LONG)
    call.cancel()
    read = stub.GetState(pb.GetStateRequest(session_id=session_id), timeout=_TIMEOUT_S)
    assert (read.session.revision, read.state) == (0, state)


def test_a_stream_that_is_cancelled_drops_what_waits(stub: Stub, session_id: str) -> None:
    long = begin_long_step(stub, session_id, _LONG)
    sent, taken = queue.SimpleQueue[pb.StepStreamRequest | None](), threading.Event()

    def requests() -> Iterator[pb.StepStreamRequest]:
        yield from iter(sent.get, None)
        taken.set()

    stream = stub.StepStream(requests(), timeout=_TIMEOUT_S)
    waiting = pb.StepFrame(session_ids=[session_id], inputs=[random_tensor(1, 1, 1, FEATURES)])
    sent.put(pb.StepStreamRequest(frame_id=1, step=waiting))
    sent.put(pb.StepStreamRequest(frame_id=2))  # refused at once: then the first one is in the queue
    assert next(stream).frame_id == 2
    stream.cancel()
    sent.put(None)
    assert long.result().revision == 1
    assert stub.Step(_step(session_id), timeout=_TIMEOUT_S).revision == 2


@pytest.mark.parametrize("raw", [b"\xff", b"\xff" * 50, bytes(range(256)), b"\x12\x04\n\x02\xff\xfe"])
def test_bytes_that_are_no_message(channel: grpc.Channel, raw: bytes) -> None:
    for method in ("Step", "OpenSession", "ResetStates"):
        with pytest.raises(grpc.RpcError, match=f"must be a stepwell.v1.{method}Request") as caught:
            _raw_call(channel, method)(raw, timeout=_TIMEOUT_S)
        assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT
        assert _details(caught.value)["reason"] == "INVALID_INPUT"
    open_stream: Any = channel.stream_stream("/stepwell.v1.SessionService/StepStream")
    stream = open_stream(iter([raw]), timeout=_TIMEOUT_S)
    with pytest.raises(grpc.RpcError, match=r"must be a stepwell.v1.StepStreamRequest") as caught:
        next(stream)
    assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT


@pytest.mark.parametrize(
    "method",
    [
        "grpc.health.v1.Health/Check",
        "grpc.health.v1.Health/Watch",
        "grpc.reflection.v1alpha.ServerReflection/ServerReflectionInfo",
    ],
)
def test_bytes_that_are_no_message_for_health_and_reflection(channel: grpc.Channel, method: str) -> None:
    call: Any = channel.stream_stream(f"/{method}")
    with pytest.raises(grpc.RpcError, match="got 2 bytes that are none") as caught:
        list(call(iter([b"\xff\xff"]), timeout=_TIMEOUT_S))
    assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT


def test_health_is_watched(channel: grpc.Channel) -> None:
    watch = health_pb2_grpc.HealthStub(channel).Watch(
        health_pb2.HealthCheckRequest(service="stepwell.v1.ModelService"), timeout=_TIMEOUT_S
    )
    assert next(watch).status == health_pb2.HealthCheckResponse.SERVING
    watch.cancel()
    unknown = health_pb2_grpc.HealthStub(channel).Watch(
        health_pb2.HealthCheckRequest(service="other"), timeout=_TIMEOUT_S
    )
    assert next(unknown).status == health_pb2.HealthCheckResponse.SERVICE_UNKNOWN
    unknown.cancel()


def test_a_request_over_the_limit_is_no_overload(stub: Stub, session_id: str) -> None:
    request = _step(session_id, steps=_LIMIT // 4 // FEATURES + 1)
    frame = pb.StepStreamRequest(step=pb.StepFrame(session_ids=[session_id], inputs=request.inputs))
    for call in (
        lambda: stub.Step(request, timeout=_TIMEOUT_S),
        lambda: next(stub.StepStream(iter([frame]), timeout=_TIMEOUT_S)),
    ):
        with pytest.raises(grpc.RpcError, match=r"message larger than max") as caught:
            call()
        assert caught.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
        assert "grpc-status-details-bin" not in _trailers(caught.value)
    assert _revision(stub, session_id) == 0


def test_a_reply_over_the_limit_changes_nothing(stub: Stub) -> None:
    stub.OpenSession(pb.OpenSessionRequest(model="forecast", session_id="wide"), timeout=_TIMEOUT_S)
    x = tensor(np.zeros((1, _LIMIT // 8, FEATURES), np.float16))
    request = pb.StepRequest(session_id="wide", inputs=[x])
    with pytest.raises(grpc.RpcError, match="the reply to the step must be at most") as caught:
        stub.Step(request, timeout=_TIMEOUT_S)
    assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT
    assert _details(caught.value)["reason"] == "MESSAGE_TOO_LARGE"
    assert _revision(stub, "wide") == 0


def test_unknown_calls_are_unimplemented(channel: grpc.Channel) -> None:
    with pytest.raises(grpc.RpcError) as caught:
        _raw_call(channel, "Fly")(b"", timeout=_TIMEOUT_S)
    assert caught.value.code() is grpc.StatusCode.UNIMPLEMENTED
