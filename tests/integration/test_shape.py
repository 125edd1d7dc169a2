"""Long names, long lists and unknown fields are refused before they are parsed, by both fronts alike.

A quiet client is stepped beside them, and the server's memory stays where it was.
"""

from __future__ import annotations

import contextlib
import resource
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import grpc
import numpy as np
import pytest
from google.protobuf.duration_pb2 import Duration
from google.protobuf.message import Message

from stepwell.v1 import models_pb2, tensors_pb2
from stepwell.v1 import sessions_pb2 as pb
from stepwell_server.rpc.triton.inference import service_pb2 as triton_pb
from support.peers import wire
from support.peers.malformed_messages import varint
from support.peers.wire import SERVICE, TIMEOUT_S, Wire
from support.servers import both_fronts
from support.servers.both_fronts import FRONTS, called, damaged, needs_native
from support.servers.server_process import FEATURES, connect, serve, tensor

pytestmark = needs_native
MODELS, ADMIN = "stepwell.v1.ModelService", "stepwell.v1.ModelAdminService"
TRITON = "inference.GRPCInferenceService"
HEALTH, REFLECTION = "grpc.health.v1.Health", "grpc.reflection.v1.ServerReflection"
SIZE = 3 << 20
"""Far over each limit. Where a server's memory is to show it, ten times as much."""
LONG = "m" * SIZE
MANY = 300_000


class Large(NamedTuple):
    """A call whose request is too large."""

    service: str
    method: str
    request: Callable[[], Message | bytes]
    """Makes it when a test needs it: together they have hundreds of megabytes."""
    field: str
    """What the error must name."""

    def raw(self) -> bytes:
        request = self.request()
        return request if isinstance(request, bytes) else request.SerializeToString()


MESSAGES = {
    "model of OpenSession": Large(SERVICE, "OpenSession", lambda: pb.OpenSessionRequest(model=LONG), "model"),
    "model of Predict": Large(MODELS, "Predict", lambda: models_pb2.PredictRequest(model=LONG), "model"),
    "model of GetModel": Large(MODELS, "GetModel", lambda: models_pb2.GetModelRequest(name=LONG), "name"),
    "label": Large(ADMIN, "SetLabel", lambda: models_pb2.SetLabelRequest(label=LONG), "label"),
    "session": Large(SERVICE, "GetSession", lambda: pb.GetSessionRequest(session_id=LONG), "session_id"),
    "prefix": Large(
        SERVICE, "ListSessions", lambda: pb.ListSessionsRequest(session_id_prefix=LONG), "session_id_prefix"
    ),
    "page token": Large(
        SERVICE, "ListSessions", lambda: pb.ListSessionsRequest(page_token=LONG), "page_token"
    ),
    "tensor": Large(
        SERVICE, "Step", lambda: pb.StepRequest(inputs=[tensors_pb2.Tensor(name=LONG)]), "inputs.name"
    ),
    "id of a step": Large(SERVICE, "Step", lambda: pb.StepRequest(session_id=LONG), "session_id"),
    "output names": Large(SERVICE, "Step", lambda: pb.StepRequest(output_names=["a"] * MANY), "output_names"),
    "ids to close": Large(
        SERVICE, "CloseSessions", lambda: pb.CloseSessionsRequest(session_ids=["a"] * MANY), "session_ids"
    ),
    "ids to fork": Large(
        SERVICE, "ForkSessions", lambda: pb.ForkSessionsRequest(session_ids=["a"] * MANY), "session_ids"
    ),
    "ids to read": Large(
        SERVICE, "GetStates", lambda: pb.GetStatesRequest(session_ids=["a"] * MANY), "session_ids"
    ),
    "ids to export": Large(
        SERVICE, "ExportSessions", lambda: pb.ExportSessionsRequest(session_ids=["a"] * MANY), "session_ids"
    ),
    "model of Triton": Large(
        TRITON, "ModelInfer", lambda: triton_pb.ModelInferRequest(model_name=LONG), "model_name"
    ),
    "id of Triton": Large(TRITON, "ModelInfer", lambda: triton_pb.ModelInferRequest(id=LONG), "id"),
    "name of Triton": Large(
        TRITON, "ModelMetadata", lambda: triton_pb.ModelMetadataRequest(name=LONG), "name"
    ),
    "parameter of Triton": Large(
        TRITON,
        "ModelInfer",
        lambda: triton_pb.ModelInferRequest(parameters={LONG: triton_pb.InferParameter(bool_param=True)}),
        "parameters.key",
    ),
}


def _cut(call: Large) -> Large:
    """The same with an end that is no message: a parser that came before the rules would refuse that instead."""
    return call._replace(request=lambda: call.raw() + b"\x0f")


def _unknown() -> bytes:
    return b"\x9a\x06" + varint(SIZE) + bytes(SIZE)


LARGE = {
    **MESSAGES,
    **{
        f"{name}, then bytes that are no message": _cut(MESSAGES[name])
        for name in ("model of GetModel", "ids to close", "name of Triton")
    },
    "entries to import": Large(SERVICE, "ImportSessions", lambda: b"\x0a\x00" * MANY, "sessions"),
    "inputs of Triton": Large(TRITON, "ModelInfer", lambda: b"\x2a\x00" * MANY, "inputs"),
    "unknown field": Large(SERVICE, "GetSession", _unknown, "request"),
    "unknown fields": Large(MODELS, "ListModels", lambda: b"\x98\x06\x01" * (SIZE // 3), "request"),
    "health": Large(HEALTH, "Check", lambda: b"\x0a\xd0\x0f" + bytes(2000), "service"),
    "shared memory": Large(TRITON, "SystemSharedMemoryStatus", _unknown, "request"),
}


@pytest.fixture(scope="module")
def both() -> Iterator[Mapping[str, Wire]]:
    """A server on each front, and a client of each."""
    with both_fronts.serve("seq") as wires:
        yield wires


@pytest.mark.parametrize("name", LARGE)
def test_both_fronts_refuse_it_alike(both: Mapping[str, Wire], name: str) -> None:
    large = LARGE[name]
    raw = large.raw()
    native, python = (called(both[front], large.method, raw, service=large.service) for front in FRONTS)
    assert native == python
    code, reason, message, _ = native
    assert (code, reason) == ("INVALID_ARGUMENT", "INVALID_INPUT")
    assert message.startswith(f"{large.field} must have at most ")
    assert len(message) < 200


STREAMED = {
    "many": Large(
        SERVICE,
        "StepStream",
        lambda: pb.StepStreamRequest(step=pb.StepFrame(session_ids=["a"] * MANY)),
        "step.session_ids",
    ),
    "long": Large(
        SERVICE,
        "StepStream",
        lambda: pb.StepStreamRequest(reset=pb.ResetFrame(session_ids=[LONG])),
        "reset.session_ids",
    ),
    "triton": Large(
        TRITON, "ModelStreamInfer", lambda: triton_pb.ModelInferRequest(model_name=LONG), "model_name"
    ),
    "upload": Large(ADMIN, "UploadModel", lambda: models_pb2.UploadModelRequest(filename=LONG), "filename"),
    "reflection": Large(
        REFLECTION, "ServerReflectionInfo", lambda: b"\x0a" + varint(SIZE) + bytes(SIZE), "host"
    ),
}


@pytest.mark.parametrize("name", STREAMED)
def test_a_message_of_a_stream_is_refused_alike(both: Mapping[str, Wire], name: str) -> None:
    large = STREAMED[name]
    message = large.raw()
    for front in FRONTS:
        call: Any = both[front].channel.stream_stream(f"/{large.service}/{large.method}")
        with pytest.raises(grpc.RpcError) as ended:
            list(call(iter([message]), timeout=TIMEOUT_S))
        refused = wire.of_call(ended.value)
        assert refused.code == "INVALID_ARGUMENT"
        assert refused.message.startswith(f"{large.field} must have at most ")


def test_damaged_requests_end_alike(both: Mapping[str, Wire]) -> None:
    """What the two checks think of bytes that are nearly a request."""
    rng = np.random.default_rng(7)
    request = pb.OpenSessionsRequest(
        model="none", session_ids=["a" * 100] * 30, max_idle=Duration(seconds=60)
    ).SerializeToString()
    for _ in range(200):
        raw = damaged(request, rng)
        native, python = (called(both[front], "OpenSessions", raw) for front in FRONTS)
        assert native == python


def _memory(pid: int) -> int:
    with open(f"/proc/{pid}/statm") as file:
        return int(file.read().split()[1]) * resource.getpagesize()


@pytest.mark.slow
def test_memory_stays_level_beside_them(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, larger in {"SIZE": 10 * SIZE, "LONG": 10 * LONG, "MANY": 10 * MANY}.items():
        monkeypatch.setitem(globals(), name, larger)
    x = tensor(np.zeros((1, FEATURES), np.float32))
    with serve("--front", "native") as server:
        channel, stub = connect(server)
        with channel, Wire(server.address) as other:
            session_id = stub.OpenSession(
                pb.OpenSessionRequest(model="forecast"), timeout=TIMEOUT_S
            ).session.session_id
            before, most = _memory(server.process.pid), 0
            for _ in range(2):
                for large in LARGE.values():
                    call: Any = other.channel.unary_unary(f"/{large.service}/{large.method}")
                    with contextlib.suppress(grpc.RpcError):
                        call(large.raw(), timeout=TIMEOUT_S)
                    stub.Step(pb.StepRequest(session_id=session_id, inputs=[x]), timeout=TIMEOUT_S)
                    most = max(most, _memory(server.process.pid))
    assert most - before < 100 << 20
