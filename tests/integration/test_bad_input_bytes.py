"""Bytes that are no message, damaged messages, and messages that are too large."""

from __future__ import annotations

from typing import Any

import grpc
import numpy as np
import pytest
from google.protobuf.message import DecodeError

import stepwell
from stepwell.v1 import models_pb2, sessions_pb2
from support.peers import wire
from support.peers.wire import SERVICE, tensor
from support.servers.served import MAX_MESSAGE_BYTES, Served

pb = sessions_pb2
RPCS = [
    (service.full_name, method.name)
    for service in (
        pb.DESCRIPTOR.services_by_name["SessionService"],
        models_pb2.DESCRIPTOR.services_by_name["ModelService"],
        models_pb2.DESCRIPTOR.services_by_name["ModelAdminService"],
    )
    for method in service.methods
    if not method.client_streaming
]
# Each is no message of any type: a cut-off field, a tag of no field, a wrong wire type's group, text that is no UTF-8.
GARBAGE = {
    "cut off": b"\x0a",
    "a length beyond the end": b"\x0a\xff\xff\xff\xff\x0f",
    "no field": b"\x02\x01",
    "an endless number": b"\xff" * 50,
    "a group that does not begin": b"\x0c",
    "all bytes": bytes(range(256)),
}


@pytest.mark.parametrize("name", GARBAGE)
@pytest.mark.parametrize(("service", "rpc"), RPCS)
def test_bytes_that_are_no_message(served: Served, service: str, rpc: str, name: str) -> None:
    refused = served.wire.refused_bytes(rpc, GARBAGE[name], service)
    refused.expect(
        "INVALID_ARGUMENT",
        "INVALID_INPUT",
        f"request must be a stepwell.v1.{rpc}Request; got {len(GARBAGE[name])} bytes that are not",
    )


def test_text_that_is_no_utf_8(served: Served) -> None:
    with served.nothing_changes():
        refused = served.wire.refused_bytes("GetState", b"\x0a\x02\xff\xfe")
        refused.expect("INVALID_ARGUMENT", "INVALID_INPUT", "GetStateRequest")


@pytest.mark.parametrize("name", GARBAGE)
def test_bytes_that_are_no_frame(served: Served, name: str) -> None:
    """They end their own stream, and no other."""
    with (
        served.session("seq") as session_id,
        served.nothing_changes(session_id),
        wire.Conversation(served.wire) as other,
    ):
        other.send(pb.StepStreamRequest(frame_id=1))
        assert other.receive().frame_id == 1
        call: Any = served.wire.channel.stream_stream(f"/{SERVICE}/StepStream")
        stream = call(iter([GARBAGE[name]]), timeout=200)
        refused = wire.refusal(lambda: list(stream))
        refused.expect("INVALID_ARGUMENT", "INVALID_INPUT", "must be a stepwell.v1.StepStreamRequest")
        other.send(pb.StepStreamRequest(frame_id=2))
        assert other.receive().frame_id == 2


def damaged(message: bytes, rng: np.random.Generator) -> bytes:
    """A message with some bytes changed, cut out or repeated."""
    data = bytearray(message)
    for _ in range(rng.integers(1, 4)):
        at = int(rng.integers(len(data)))
        kind = rng.integers(3)
        if kind == 0:
            data[at] = rng.integers(256)
        elif kind == 1:
            del data[at : at + int(rng.integers(1, 5))]
        else:
            data[at:at] = data[at : at + int(rng.integers(1, 9))]
        if not data:
            break
    return bytes(data)


@pytest.mark.parametrize("seed", range(3))
def test_damaged_frames_of_one_session_are_read_as_protobuf_reads_them(served: Served, seed: int) -> None:
    """The native front reads plain ones by itself: it must do what a Step of the fields does that protobuf finds."""
    rng = np.random.default_rng(seed)
    state = served.wire.state(served.wire.open("seq", f"state-{seed}")).state
    with served.session("seq") as bystander, served.nothing_changes(bystander):
        for nth in range(60):
            x = rng.standard_normal((1, 3) if nth % 2 else (1, 1, 3)).astype(np.float32)
            fields: dict[str, Any] = (
                {"expected_revisions": [0], "request_ids": [2**63 + nth]} if nth % 3 else {}
            )
            # ids that nobody had before, of the same length: one for each way, one for the neighbour
            streamed, called, neighbour = [f"{way}{seed}-{nth:03d}" for way in "abn"]
            for session_id in (streamed, called, neighbour):
                served.wire.open("seq", session_id, state=state)
            good = wire.step_frame(nth + 1, [streamed], [tensor(x)], timeout_ms=60_000, **fields)
            raw = damaged(good.SerializeToString(), rng)
            on_stream = by_stream(served, good, raw, neighbour)
            assert on_stream == by_call(served, raw.replace(streamed.encode(), called.encode())), raw
            served.wire.close(streamed, called, neighbour)
    served.wire.close(f"state-{seed}")


def by_stream(served: Served, good: Any, raw: bytes, neighbour: str) -> tuple[object, ...]:
    """Send a good frame of a neighbour, from which the layout can be learnt, and then the damaged one."""
    first = pb.StepStreamRequest()
    first.CopyFrom(good)
    first.frame_id += 1 << 20  # it may not be answered yet when the other comes
    first.step.session_ids[:] = [neighbour]
    call: Any = served.wire.channel.stream_stream(f"/{SERVICE}/StepStream")
    try:
        answers = [
            pb.StepStreamResponse.FromString(a)
            for a in call(iter([first.SerializeToString(), raw]), timeout=200)
        ]
    except grpc.RpcError as error:
        return wire.of_call(error).code, "no frame"
    (answer,) = answers[1:]
    if answer.errors:
        return answer.errors[0].error.reason, wire.data(answer.outputs)
    return answer.revisions[0], answer.positions[0], answer.frame_id, wire.data(answer.outputs)


def by_call(served: Served, raw: bytes) -> tuple[object, ...]:
    """What protobuf reads in the damaged frame, as a Step."""
    try:
        frame = pb.StepStreamRequest.FromString(raw)
    except DecodeError:
        return "INVALID_ARGUMENT", "no frame"
    step = frame.step
    if not frame.HasField("step") or not step.session_ids:
        return "INVALID_INPUT", {}
    several = [
        len(step.session_ids),
        len(step.expected_revisions),
        len(step.request_ids),
        len(step.batch_sizes),
    ]
    if max(several) > 1 or (step.batch_sizes and step.batch_sizes[0] != 1):
        return "INVALID_INPUT", {}
    request = pb.StepRequest(session_id=step.session_ids[0], inputs=step.inputs, outputs=step.outputs)
    if step.expected_revisions:
        request.expected_revision = step.expected_revisions[0]
    if step.request_ids:
        request.request_id = step.request_ids[0]
    try:
        answer = served.wire.sessions.Step(request, timeout=200)
    except grpc.RpcError as error:
        return wire.of_call(error).reason, {}
    return answer.revision, answer.position, frame.frame_id, wire.data(answer.outputs)


#: The reason beside the status, by front: gRPC's own refusal has none.
TOO_LARGE = {"native": "MESSAGE_TOO_LARGE", "python": ""}


def _too_large(served: Served, session_id: str) -> dict[str, tuple[str, Any]]:
    x = np.zeros((1, MAX_MESSAGE_BYTES // 12 + 1, 3), np.float32)
    state = [
        tensor(np.zeros((MAX_MESSAGE_BYTES // 32, 8), np.float32), name) for name in ("lstm/h", "lstm/c")
    ]
    return {
        "Step": ("Step", pb.StepRequest(session_id=session_id, inputs=[tensor(x)])),
        "Predict": ("Predict", models_pb2.PredictRequest(model="seq", inputs=[tensor(x)])),
        "ResetStates": ("ResetStates", pb.ResetStatesRequest(session_id=session_id, state=state)),
        "OpenSession": (
            "OpenSession",
            pb.OpenSessionRequest(model="seq", session_id="x" * MAX_MESSAGE_BYTES),
        ),
    }


@pytest.mark.parametrize("rpc", ["Step", "Predict", "ResetStates", "OpenSession"])
def test_a_request_over_the_limit(served: Served, rpc: str) -> None:
    """The front refuses it before anything is read of it; the SDK makes an InvalidInputError of it."""
    with served.session("seq") as session_id, served.nothing_changes(session_id):
        refused = served.wire.refused(*_too_large(served, session_id)[rpc])
        refused.expect(
            "RESOURCE_EXHAUSTED", TOO_LARGE[served.front], "larger than max", str(MAX_MESSAGE_BYTES)
        )


def test_a_frame_over_the_limit(served: Served) -> None:
    with served.session("seq") as session_id, served.nothing_changes(session_id):
        frame = wire.step_frame(1, [session_id], _too_large(served, session_id)["Step"][1].inputs)
        refused = wire.refusal(lambda: served.wire.exchange(frame))
        refused.expect("RESOURCE_EXHAUSTED", TOO_LARGE[served.front], "larger than max")


def test_a_state_over_the_limit(served: Served) -> None:
    """A session may have more state than a message holds; reading it says so, and stepping it goes on."""
    rows = MAX_MESSAGE_BYTES // 64  # each has 64 bytes of state
    with served.client.open_session("seq", batch_size=rows) as session:
        refused = served.wire.refused("GetState", pb.GetStateRequest(session_id=session.id))
        refused.expect("INVALID_ARGUMENT", "MESSAGE_TOO_LARGE", f"must be at most {MAX_MESSAGE_BYTES} bytes")
        with pytest.raises(stepwell.InvalidInputError, match="must be at most"):
            session.get_state()
        session.step(np.zeros((rows, 3), np.float16), outputs="none")
        assert session.revision == 1
