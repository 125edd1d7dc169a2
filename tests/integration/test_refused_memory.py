"""Many refused large calls leave the server's memory where it was, whoever refuses them and for what."""

from __future__ import annotations

import contextlib
import itertools
import resource
from collections.abc import Callable, Iterator
from typing import Any

import grpc
import pytest

from stepwell.v1 import models_pb2, tensors_pb2
from stepwell.v1 import sessions_pb2 as pb
from support import secured
from support.peers.wire import OPTIONS, SERVICE, TIMEOUT_S
from support.samples import ALL
from support.servers.both_fronts import needs_native
from support.servers.server_process import ServerProcess, serve

FRONTS = [pytest.param("native", marks=needs_native), "python"]
LARGE = bytes(8 << 20)
COUNT = 1000 if ALL else 180
"""Of each kind 20, which are more than may stay."""
MAX_GROWTH_BYTES = 100 << 20
"""What a dozen of the requests take."""
TRITON = "inference.GRPCInferenceService"
FLOATS = tensors_pb2.DATA_TYPE_FLOAT32
TENSOR = tensors_pb2.Tensor(name="x", dtype=FLOATS, shape=[1, len(LARGE) // 4], data=LARGE)


def _unary(path: str, message: bytes) -> Callable[[Any], None]:
    def call(channel: Any) -> None:
        with pytest.raises(grpc.RpcError):
            channel.unary_unary(path)(message, timeout=TIMEOUT_S)

    return call


def _stream(path: str, message: bytes) -> Callable[[Any], None]:
    def call(channel: Any) -> None:
        with contextlib.suppress(grpc.RpcError):
            list(channel.stream_stream(path)(iter([message]), timeout=TIMEOUT_S))

    return call


def _calls() -> list[Callable[[Any], None]]:
    """Each is refused by another part of the server."""
    step = pb.StepRequest(session_id="unknown", inputs=[TENSOR])
    masked = pb.StepRequest(session_id="unknown", inputs=[TENSOR], reset_mask=[True])
    frame = pb.StepStreamRequest(frame_id=1, step=pb.StepFrame(session_ids=["unknown"], inputs=[TENSOR]))
    predict = models_pb2.PredictRequest(model="unknown", inputs=[TENSOR])
    reset = pb.ResetStatesRequest(session_id="unknown", state=[TENSOR])
    return [
        _unary(f"/{SERVICE}/Step", step.SerializeToString()),
        _unary(f"/{SERVICE}/Step", masked.SerializeToString()),
        _unary("/stepwell.v1.ModelService/Predict", predict.SerializeToString()),
        _unary(f"/{SERVICE}/ResetStates", reset.SerializeToString()),
        _unary("/stepwell.v1.ModelService/Predict", b"\xff" + LARGE),
        _stream(f"/{SERVICE}/StepStream", frame.SerializeToString()),
        _stream(f"/{SERVICE}/StepStream", b"\xff" + LARGE),
        _unary(f"/{TRITON}/ModelInfer", b"\x3a\x80\x80\x80\x04" + LARGE),  # raw contents without an input
        _stream(f"/{TRITON}/ModelStreamInfer", b"\x3a\x80\x80\x80\x04" + LARGE),
    ]


def _memory(server: ServerProcess) -> int:
    """Bytes that the server has of the machine's memory."""
    with open(f"/proc/{server.process.pid}/statm") as file:
        return int(file.read().split()[1]) * resource.getpagesize()


@pytest.fixture(params=FRONTS)
def server(request: pytest.FixtureRequest) -> Iterator[ServerProcess]:
    with serve("--front", request.param) as found:
        yield found


@pytest.mark.slow
def test_memory_stays_level_over_refused_calls(server: ServerProcess) -> None:
    calls = _calls()
    with secured.channel(server.address, OPTIONS) as channel:
        for call in calls:
            call(channel)
        before, most = _memory(server), 0
        for _, call in zip(range(COUNT), itertools.cycle(calls), strict=False):
            call(channel)
            most = max(most, _memory(server))
    assert most - before < MAX_GROWTH_BYTES
