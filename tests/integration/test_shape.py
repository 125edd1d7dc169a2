"""Long names, long lists and unknown fields are refused before they are parsed, by both fronts alike.

A quiet client is stepped beside them, and the server's memory stays where it was.
"""

from __future__ import annotations

import contextlib
import resource
from collections.abc import Iterator, Mapping
from typing import Any

import grpc
import numpy as np
import pytest
from google.protobuf.duration_pb2 import Duration

from stepwell.v1 import models_pb2, tensors_pb2
from stepwell.v1 import sessions_pb2 as pb
from stepwell_server.rpc.triton.inference import service_pb2 as triton_pb
from support.peers import wire
from support.peers.wire import SERVICE, TIMEOUT_S, Wire
from support.servers import both_fronts
from support.servers.both_fronts import FRONTS, called, damaged, needs_native
from support.servers.server_process import FEATURES, connect, serve, tensor

pytestmark = needs_native
MODELS, ADMIN = "stepwell.v1.ModelService", "stepwell.v1.ModelAdminService"
TRITON = "inference.GRPCInferenceService"
HEALTH, REFLECTION = "grpc.health.v1.Health", "grpc.reflection.v1.ServerReflection"
SIZE = 30 << 20
LONG = "m" * SIZE
MANY = 3_000_000


def _large() -> dict[str, tuple[str, str, bytes, str]]:
    """By name: service, method, request, and what the error must name."""
    unknown = b"\x9a\x06\x80\x80\x80\x0f" + bytes(SIZE)
    pairs = {
        "model of OpenSession": (SERVICE, "OpenSession", pb.OpenSessionRequest(model=LONG), "model"),
        "model of Predict": (MODELS, "Predict", models_pb2.PredictRequest(model=LONG), "model"),
        "model of GetModel": (MODELS, "GetModel", models_pb2.GetModelRequest(name=LONG), "name"),
        "label": (ADMIN, "SetLabel", models_pb2.SetLabelRequest(label=LONG), "label"),
        "session": (SERVICE, "GetSession", pb.GetSessionRequest(session_id=LONG), "session_id"),
        "prefix": (
            SERVICE,
            "ListSessions",
            pb.ListSessionsRequest(session_id_prefix=LONG),
            "session_id_prefix",
        ),
        "page token": (SERVICE, "ListSessions", pb.ListSessionsRequest(page_token=LONG), "page_token"),
        "tensor": (SERVICE, "Step", pb.StepRequest(inputs=[tensors_pb2.Tensor(name=LONG)]), "inputs.name"),
        "id of a step": (SERVICE, "Step", pb.StepRequest(session_id=LONG), "session_id"),
        "output names": (SERVICE, "Step", pb.StepRequest(output_names=["a"] * MANY), "output_names"),
        "ids to close": (
            SERVICE,
            "CloseSessions",
            pb.CloseSessionsRequest(session_ids=["a"] * MANY),
            "session_ids",
        ),
        "ids to fork": (
            SERVICE,
            "ForkSessions",
            pb.ForkSessionsRequest(session_ids=["a"] * MANY),
            "session_ids",
        ),
        "ids to read": (SERVICE, "GetStates", pb.GetStatesRequest(session_ids=["a"] * MANY), "session_ids"),
        "ids to export": (
            SERVICE,
            "ExportSessions",
            pb.ExportSessionsRequest(session_ids=["a"] * MANY),
            "session_ids",
        ),
        "model of Triton": (TRITON, "ModelInfer", triton_pb.ModelInferRequest(model_name=LONG), "model_name"),
        "id of Triton": (TRITON, "ModelInfer", triton_pb.ModelInferRequest(id=LONG), "id"),
        "name of Triton": (TRITON, "ModelMetadata", triton_pb.ModelMetadataRequest(name=LONG), "name"),
        "parameter of Triton": (
            TRITON,
            "ModelInfer",
            triton_pb.ModelInferRequest(parameters={LONG: triton_pb.InferParameter(bool_param=True)}),
            "parameters.key",
        ),
    }
    found = {name: (*call[:2], call[2].SerializeToString(), call[3]) for name, call in pairs.items()}
    # The end of these is no message: a parser that came before the rules would refuse that instead.
    cut = {
        f"{name}, then bytes that are no message": (
            *found[name][:2],
            found[name][2] + b"\x0f",
            found[name][3],
        )
        for name in ("model of GetModel", "ids to close", "name of Triton")
    }
    return {
        **found,
        **cut,
        "entries to import": (SERVICE, "ImportSessions", b"\x0a\x00" * MANY, "sessions"),
        "inputs of Triton": (TRITON, "ModelInfer", b"\x2a\x00" * MANY, "inputs"),
        "unknown field": (SERVICE, "GetSession", unknown, "request"),
        "unknown fields": (MODELS, "ListModels", b"\x98\x06\x01" * MANY, "request"),
        "health": (HEALTH, "Check", b"\x0a\xd0\x0f" + bytes(2000), "service"),
        "shared memory": (TRITON, "SystemSharedMemoryStatus", unknown, "request"),
    }


LARGE = _large()


@pytest.fixture(scope="module")
def both() -> Iterator[Mapping[str, Wire]]:
    """A server on each front, and a client of each."""
    with both_fronts.serve("seq") as wires:
        yield wires


@pytest.mark.parametrize("name", LARGE)
def test_both_fronts_refuse_it_alike(both: Mapping[str, Wire], name: str) -> None:
    service, method, raw, field = LARGE[name]
    native, python = (called(both[front], method, raw, service=service) for front in FRONTS)
    assert native == python
    code, reason, message, _ = native
    assert (code, reason) == ("INVALID_ARGUMENT", "INVALID_INPUT")
    assert message.startswith(f"{field} must have at most ")
    assert len(message) < 200


@pytest.mark.parametrize(
    ("path", "raw", "field"),
    [
        (
            f"/{SERVICE}/StepStream",
            pb.StepStreamRequest(step=pb.StepFrame(session_ids=["a"] * MANY)),
            "step.session_ids",
        ),
        (
            f"/{SERVICE}/StepStream",
            pb.StepStreamRequest(reset=pb.ResetFrame(session_ids=[LONG])),
            "reset.session_ids",
        ),
        (f"/{TRITON}/ModelStreamInfer", triton_pb.ModelInferRequest(model_name=LONG), "model_name"),
        (f"/{ADMIN}/UploadModel", models_pb2.UploadModelRequest(filename=LONG), "filename"),
        (f"/{REFLECTION}/ServerReflectionInfo", b"\x0a\x80\x80\x80\x0f" + bytes(SIZE), "host"),
    ],
    ids=["many", "long", "triton", "upload", "reflection"],
)
def test_a_message_of_a_stream_is_refused_alike(
    both: Mapping[str, Wire], path: str, raw: Any, field: str
) -> None:
    message = raw if isinstance(raw, bytes) else raw.SerializeToString()
    for front in FRONTS:
        call: Any = both[front].channel.stream_stream(path)
        with pytest.raises(grpc.RpcError) as ended:
            list(call(iter([message]), timeout=TIMEOUT_S))
        refused = wire.of_call(ended.value)
        assert refused.code == "INVALID_ARGUMENT"
        assert refused.message.startswith(f"{field} must have at most ")


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
def test_memory_stays_level_beside_them() -> None:
    x = tensor(np.zeros((1, FEATURES), np.float32))
    with serve("--front", "native") as server:
        channel, stub = connect(server)
        with channel, Wire(server.address) as other:
            session_id = stub.OpenSession(
                pb.OpenSessionRequest(model="forecast"), timeout=TIMEOUT_S
            ).session.session_id
            before, most = _memory(server.process.pid), 0
            for _ in range(2):
                for service, method, raw, _ in LARGE.values():
                    call: Any = other.channel.unary_unary(f"/{service}/{method}")
                    with contextlib.suppress(grpc.RpcError):
                        call(raw, timeout=TIMEOUT_S)
                    stub.Step(pb.StepRequest(session_id=session_id, inputs=[x]), timeout=TIMEOUT_S)
                    most = max(most, _memory(server.process.pid))
    assert most - before < 100 << 20
