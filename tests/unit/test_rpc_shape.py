"""Limits of a request before it is parsed; `shape.rs` has the same rules."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from google.protobuf.message import Message

from stepwell.v1 import models_pb2, sessions_pb2, tensors_pb2
from stepwell.v1 import sessions_pb2 as pb
from stepwell_server.rpc.fronts.shape import (
    MAX_ENTRIES,
    MAX_NAME_BYTES,
    MAX_SMALL_BYTES,
    MAX_TENSORS,
    Shape,
)
from stepwell_server.rpc.fronts.shape_check import check_shape
from stepwell_server.rpc.triton.inference import service_pb2 as triton_pb

LONG = "x" * (MAX_NAME_BYTES + 1)
TENSOR = tensors_pb2.Tensor(name=LONG)
SERVICES = [
    service
    for file in (sessions_pb2, models_pb2, triton_pb)
    for service in file.DESCRIPTOR.services_by_name.values()
]
UNKNOWN = b"\x9a\x06"
"""The key of a field of bytes, 99, that no message has."""


def _refused(request: Message, more: bytes = b"") -> str | None:
    descriptor: Any = request.DESCRIPTOR
    error = check_shape(Shape(descriptor), request.SerializeToString() + more)
    return None if error is None else error.message


@pytest.mark.parametrize(
    ("request_", "words"),
    [
        (pb.OpenSessionRequest(model=LONG), "model must have at most 1024 bytes; got 1025"),
        (pb.OpenSessionRequest(state=[TENSOR]), "state.name must have at most 1024 bytes; got 1025"),
        (
            pb.ListSessionsRequest(session_id_prefix=LONG),
            "session_id_prefix must have at most 1024 bytes; got 1025",
        ),
        (pb.ListSessionsRequest(page_token=5 * LONG), "page_token must have at most 4096 bytes; got 5125"),
        (pb.StepRequest(output_names=["y", LONG]), "output_names must have at most 1024 bytes; got 1025"),
        (
            pb.StepStreamRequest(step=pb.StepFrame(session_ids=["a", LONG])),
            "step.session_ids must have at most 1024 bytes; got 1025",
        ),
        (
            pb.ImportSessionsRequest(sessions=[pb.ExportedSession(tenant=LONG)]),
            "sessions.tenant must have at most 1024 bytes; got 1025",
        ),
        (models_pb2.GetModelRequest(name=LONG), "name must have at most 1024 bytes; got 1025"),
        (models_pb2.SetLabelRequest(label=LONG), "label must have at most 1024 bytes; got 1025"),
        (triton_pb.ModelInferRequest(id=LONG), "id must have at most 1024 bytes; got 1025"),
        (
            triton_pb.ModelInferRequest(parameters={"a": triton_pb.InferParameter(string_param=LONG)}),
            "parameters.value.string_param must have at most 1024 bytes; got 1025",
        ),
        (
            pb.ForkSessionsRequest(session_ids=["a"] * (MAX_ENTRIES + 1)),
            "session_ids must have at most 65536 entries; got more",
        ),
        (
            pb.CloseSessionsRequest(session_ids=["a"] * 4097),
            "session_ids must have at most 4096 entries; got more",
        ),
        (
            pb.CloseSessionsRequest(session_ids=["a"], uids=range(4097)),
            "uids must have at most 4096 entries; got more",
        ),
        (
            pb.GetStatesRequest(session_ids=["a"] * 4097),
            "session_ids must have at most 4096 entries; got more",
        ),
        (
            pb.ImportSessionsRequest(sessions=[pb.ExportedSession()] * (MAX_ENTRIES + 1)),
            "sessions must have at most 4096 entries; got more",
        ),
        (
            pb.ImportSessionsRequest(sessions=[pb.ExportedSession(tenant="t")] * (MAX_ENTRIES + 1)),
            "sessions must have at most 4096 entries; got more",
        ),
        (
            pb.StepRequest(inputs=[tensors_pb2.Tensor()] * (MAX_TENSORS + 1)),
            "inputs must have at most 1024 entries; got more",
        ),
        (
            triton_pb.ModelInferRequest(
                parameters={str(each): triton_pb.InferParameter() for each in range(MAX_TENSORS + 1)}
            ),
            "parameters must have at most 1024 entries; got more",
        ),
        (
            pb.StepRequest(output_names=["y"] * (MAX_TENSORS + 1)),
            "output_names must have at most 1024 entries; got more",
        ),
        (
            pb.StepRequest(rows=range(MAX_ENTRIES + 1)),
            "rows must have at most 65536 entries; got more",
        ),
    ],
)
def test_the_broken_rule_is_named(request_: Message, words: str) -> None:
    assert _refused(request_) == words


def test_a_list_is_counted_over_the_whole_message() -> None:
    shaped = tensors_pb2.Tensor(shape=[1] * 1000)
    request = pb.StepRequest(inputs=[shaped] * (MAX_ENTRIES // 1000 + 1))
    assert _refused(request) == "inputs.shape must have at most 65536 entries; got more"


@pytest.mark.parametrize(
    "more",
    [
        UNKNOWN + b"\x80\x80\x40" + bytes(MAX_SMALL_BYTES),
        b"\x98\x06\x01" * (MAX_SMALL_BYTES // 3 + 1),
        b"\x0a\x00" * (MAX_SMALL_BYTES // 2 + 1),
    ],
    ids=["one unknown field", "many unknown fields", "a field again and again"],
)
def test_all_other_bytes_together_are_limited(more: bytes) -> None:
    words = f"request must have at most {MAX_SMALL_BYTES} bytes outside lists, tensors, records and files; got more"
    assert _refused(pb.GetSessionRequest(session_id="s"), more) == words


@pytest.mark.parametrize("raw", [bytes(2000), b"\x9b\x06" + bytes(2000), b"\x0a\xff\xff\x7f" + bytes(2000)])
def test_invalid_message_bytes_are_refused(raw: bytes) -> None:
    error = check_shape(Shape(pb.GetSessionRequest.DESCRIPTOR), raw)
    assert error is not None
    assert (
        error.message == f"request must be a stepwell.v1.GetSessionRequest; got {len(raw)} bytes that are not"
    )


def _largest_close() -> Message:
    return pb.CloseSessionsRequest(session_ids=["é" * 256] * 4096, uids=range(4096))


def _largest_fork() -> Message:
    return pb.ForkSessionsRequest(session_ids=["é" * 256] * MAX_ENTRIES)


def _largest_import() -> Message:
    return pb.ImportSessionsRequest(
        sessions=[pb.ExportedSession(session_id="s", record=bytes(40_000))] * 1000
    )


def _large_tensor() -> Message:
    tensor = tensors_pb2.Tensor(name="é" * 256, shape=[1, 1 << 21], data=bytes(8 << 20))
    return pb.StepRequest(
        session_id="é" * 256, inputs=[tensor], rows=range(65_536), reset_mask=[True] * (1 << 20)
    )


def _triton() -> Message:
    contents = triton_pb.InferTensorContents(fp32_contents=[0.0] * (1 << 20))
    inputs = [triton_pb.ModelInferRequest.InferInputTensor(name="x", contents=contents)]
    return triton_pb.ModelInferRequest(model_name="m", inputs=inputs, raw_input_contents=[bytes(8 << 20)])


@pytest.mark.parametrize("make", [_largest_close, _largest_fork, _largest_import, _large_tensor, _triton])
def test_large_data_within_the_limits_passes(make: Callable[[], Message]) -> None:
    assert _refused(make()) is None


@pytest.mark.parametrize(
    "method", [each for service in SERVICES for each in service.methods], ids=lambda each: each.name
)
def test_each_text_of_each_request_has_a_limit(method: Any) -> None:
    """Whoever adds a field of bytes says how large it may be, or that it is a tensor, a record or a file."""
    nodes = Shape(method.input_type).table
    free = [number for node in nodes for number, kind, limit, _ in node if kind == 0 and not limit]
    assert not free
    large = [number for node in nodes for number, kind, _, _ in node if kind == 1]
    assert len(large) <= 3


def test_small_requests_are_not_checked() -> None:
    assert check_shape(Shape(pb.GetSessionRequest.DESCRIPTOR), b"\xff" * MAX_NAME_BYTES) is None
