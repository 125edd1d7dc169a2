"""What a real server serves beside sessions: health, reflection, models; and calls and replies that cannot be."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import grpc
import pytest
from google.protobuf.descriptor_pb2 import FileDescriptorProto
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc

from stepwell.v1 import models_pb2, models_pb2_grpc
from support.servers.server_process import (
    FEATURES,
    ServerProcess,
    connect,
    serve,
)

_TIMEOUT_S = 100.0


@pytest.fixture(scope="module")
def server() -> Iterator[ServerProcess]:
    with serve() as server:
        yield server


@pytest.fixture(scope="module")
def channel(server: ServerProcess) -> Iterator[grpc.Channel]:
    with connect(server)[0] as channel:
        yield channel


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
        "stepwell.v1.ModelAdminService",
        "stepwell.v1.ModelService",
        "stepwell.v1.SessionService",
        "stepwell.v1.WatchService",
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
    with pytest.raises(grpc.RpcError, match="got 2 bytes that are not") as caught:
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
