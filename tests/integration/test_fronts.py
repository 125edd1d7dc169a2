"""Both fronts answer alike: the same messages to a server of each, and every answer compared.

What one of them reads by itself the other lets protobuf read, so each is the other's oracle.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import grpc
import numpy as np
import pytest

from stepwell.v1 import models_pb2, tensors_pb2
from stepwell.v1 import sessions_pb2 as pb
from support.peers import wire
from support.peers.wire import SERVICE, Wire, tensor
from support.samples import examples, one_in
from support.servers import both_fronts
from support.servers.both_fronts import FRONTS, Outcome, called, damaged, needs_native

pytestmark = needs_native

Metadata = Sequence[tuple[str, str]]


@pytest.fixture(scope="module")
def both() -> Iterator[Mapping[str, Wire]]:
    """A server on each front, and a client of each."""
    with both_fronts.serve("seq", "multi") as wires:
        yield wires


def streamed(
    one: Wire, frames: list[bytes], *, waits: bool = False, metadata: Metadata = ()
) -> tuple[dict[int, Any], object]:
    """What a stream of these frames is answered: by frame the merged parts, and how it ends.

    `waits`: a frame is sent when the one before it has been answered.
    """
    call: Any = one.channel.stream_stream(f"/{SERVICE}/StepStream")
    answered = threading.Semaphore(1 if waits else len(frames))

    def sent() -> Iterator[bytes]:
        for frame in frames:
            assert answered.acquire(timeout=100)
            yield frame

    by_frame: dict[int, dict[int | str, Any]] = {}
    try:
        for raw in call(sent(), timeout=100, metadata=metadata):
            part = pb.StepStreamResponse.FromString(raw)
            _merge(by_frame.setdefault(part.frame_id, {}), part)
            if part.last:
                answered.release()
    except grpc.RpcError as error:
        return by_frame, wire.of_call(error)
    return by_frame, "OK"


def _merge(members: dict[int | str, Any], part: pb.StepStreamResponse) -> None:
    """How a frame is cut into parts is no promise; what each member is answered is."""
    arrays = wire.arrays(part.outputs)
    states = wire.arrays(part.states)
    which: Sequence[int] = part.members
    if part.all_members:
        which = range(len(part.revisions) or len(part.positions) or len(next(iter(arrays.values()), MEMBERS)))
    elif part.member_count:
        which = range(part.first_member, part.first_member + part.member_count)
    for place, member in enumerate(which):
        own = {name: array[place].tobytes() for name, array in arrays.items()}
        own |= {name: array[place].tobytes() for name, array in states.items()}
        replayed = member in part.replayed_members
        revision = part.revision if part.HasField("revision") else part.revisions[place]
        position = part.position if part.HasField("position") else part.positions[place]
        members[member] = (revision, position, own, replayed)
    for error in part.errors:
        for member in error.members or [-1]:
            members[member] = (error.error.code, error.error.reason, error.error.message)


def same(both: Mapping[str, Wire], rpc: str, message: Any, **options: Any) -> Outcome:
    raw = message if isinstance(message, bytes) else message.SerializeToString()
    native, python = (called(both[front], rpc, raw, **options) for front in FRONTS)
    assert native == python, rpc
    return native


def opened(both: Mapping[str, Wire], *session_ids: str, batch_size: int = 1, model: str = "seq") -> None:
    for one in both.values():
        for session_id in session_ids:
            one.open(model, session_id, batch_size)


#: Sessions of each frame that has one number for all of them.
MEMBERS = range(3)
X = np.random.default_rng(5).standard_normal((4, 6, 3)).astype(np.float32)

#: Steps of `one` (a row), one after the other; each is sent to both.
STEPS: dict[str, dict[str, Any]] = {
    "one time step": {"inputs": [tensor(X[:1, 0])]},
    "a time axis of one": {"inputs": [tensor(X[:1, :1])]},
    "several time steps": {"inputs": [tensor(X[:1])]},
    "only the last": {"inputs": [tensor(X[:1])], "outputs": 2},
    "no outputs": {"inputs": [tensor(X[:1])], "outputs": 3},
    "the input by name": {"inputs": [tensor(X[:1, 0], "x")]},
    "another name": {"inputs": [tensor(X[:1, 0], "q")]},
    "the output by name": {"inputs": [tensor(X[:1, 0])], "output_names": ["y"]},
    "an output that is not there": {"inputs": [tensor(X[:1, 0])], "output_names": ["q"]},
    "doubles": {"inputs": [tensor(X[:1, 0].astype(np.float64))]},
    "halves": {"inputs": [tensor(X[:1, 0].astype(np.float16))]},
    "integers": {"inputs": [tensor(np.ones((1, 3), np.int64))]},
    "booleans": {"inputs": [tensor(np.ones((1, 3), np.bool_))]},
    "too large for its dtype": {"inputs": [tensor(np.full((1, 3), 1e300))]},
    "not a number": {"inputs": [tensor(np.array([[1, np.nan, 1]], np.float32))]},
    "rows too many": {"inputs": [tensor(X[:2, 0])]},
    "features too many": {"inputs": [tensor(np.ones((1, 4), np.float32))]},
    "axes too many": {"inputs": [tensor(np.ones((1, 1, 1, 3), np.float32))]},
    "axes too few": {"inputs": [tensor(np.ones(3, np.float32))]},
    "no time step": {"inputs": [tensor(np.ones((1, 0, 3), np.float32))]},
    "no axes": {"inputs": [tensor(np.float32(1))]},
    "no inputs": {},
    "a tensor twice": {"inputs": [tensor(X[:1, 0]), tensor(X[:1, 0])]},
    "data too short": {"inputs": [tensor(X[:1, 0], data=b"123")]},
    "an unknown dtype": {"inputs": [tensor(X[:1, 0], dtype=99)]},
    "a negative axis": {"inputs": [tensor(X[:1, 0], shape=[-1, -3])]},
    "a wrong revision": {"inputs": [tensor(X[:1, 0])], "expected_revision": 900, "request_id": 5},
    "the largest revision": {"inputs": [tensor(X[:1, 0])], "expected_revision": 2**64 - 1},
    "an unknown selection": {"inputs": [tensor(X[:1, 0])], "outputs": 9},
    "the last states": {"inputs": [tensor(X[:1, 0])], "states": 2},
    "all states": {"inputs": [tensor(X[:1])], "states": 3, "outputs": 3},
    "the states of a row": {"inputs": [tensor(X[:1])], "states": 3, "state_rows": [0]},
    "the states of another row": {"inputs": [tensor(X[:1])], "states": 3, "state_rows": [1]},
    "no such states": {"inputs": [tensor(X[:1])], "states": 9},
    "all states again": {"inputs": [tensor(X[:1])], "states": 3, "request_id": 3},
    "and once more": {"inputs": [tensor(X[:1])], "states": 3, "request_id": 3},
    "the only row": {"inputs": [tensor(X[:1])], "rows": [0]},
    "another row": {"inputs": [tensor(X[:1])], "rows": [1]},
    "a mask of time steps": {"inputs": [tensor(X[:1])], "reset_mask": [False, True] * 3},
    "a mask of other time steps": {"inputs": [tensor(X[:1])], "reset_mask": [False, True]},
    "a reset mask": {"inputs": [tensor(X[:1, 0])], "reset_mask": [True]},
    "a mask of others": {"inputs": [tensor(X[:1, 0])], "reset_mask": [True, False]},
    "a request id": {"inputs": [tensor(X[:1, 0])], "request_id": 2**63 + 1},
    "numbers": {"inputs": [tensors_pb2.Tensor(values=[0.5, 1, -2])], "request_id": 9},
    "the request id of numbers again": {"inputs": [tensors_pb2.Tensor(values=[0.5, 1, -2])], "request_id": 9},
    "numbers too few": {"inputs": [tensors_pb2.Tensor(values=[0.5, 1])]},
    "numbers beside data": {"inputs": [tensor(X[:1, 0], values=[0.5, 1, -2])]},
    "numbers back": {"inputs": [tensor(X[:1, 0])], "tensor_format": 2},
    "numbers back from several time steps": {"inputs": [tensor(X[:1])], "tensor_format": 2, "states": 3},
    "an unknown format": {"inputs": [tensor(X[:1, 0])], "tensor_format": 9},
    "the request id again": {"inputs": [tensor(X[1:2, 0])], "request_id": 2**63 + 1},
}


@pytest.mark.parametrize("session", ["there", "not there", "without a name"])
def test_steps_are_answered_alike(both: Mapping[str, Wire], session: str) -> None:
    name = {"there": "one", "not there": "nobody", "without a name": ""}[session]
    if session == "there":
        opened(both, "one")
    for fields in STEPS.values():
        same(both, "Step", pb.StepRequest(session_id=name, **fields))


def test_a_retry_is_answered_alike(both: Mapping[str, Wire]) -> None:
    opened(both, "retried")
    request = pb.StepRequest(session_id="retried", inputs=[tensor(X[:1])], expected_revision=0, request_id=77)
    first = same(both, "Step", request)
    again = pb.StepResponse.FromString(same(both, "Step", request)[1])
    assert again.replayed
    again.replayed = False
    assert again == pb.StepResponse.FromString(first[1])
    request.request_id = 78
    assert same(both, "Step", request)[0] == "ABORTED"


def test_a_request_id_with_another_change_is_refused_alike(both: Mapping[str, Wire]) -> None:
    """Where it would be applied: alone, in a frame, and in one of 1,024 sessions that both know as a set."""
    opened(both, "reused")
    once: dict[str, Any] = {"session_id": "reused", "request_id": 77}
    same(both, "Step", pb.StepRequest(inputs=[tensor(X[:1, 0])], expected_revision=0, **once))
    revisions: list[dict[str, Any]] = [{}, {"expected_revision": 0}, {"expected_revision": 1}]
    for revision in revisions:
        other = pb.StepRequest(inputs=[tensor(X[1:2, 0])], **once, **revision)
        assert same(both, "Step", other)[0] == "INVALID_ARGUMENT"
        assert same(both, "ResetStates", pb.ResetStatesRequest(**once, **revision))[0] == "INVALID_ARGUMENT"
    ids = [f"reused {index}" for index in range(1024)]
    for one in both.values():
        one.sessions.OpenSessions(pb.OpenSessionsRequest(model="seq", session_ids=ids), timeout=100)
    x = np.random.default_rng(5).standard_normal((len(ids), 3)).astype(np.float32)
    some = x.copy()
    some[::3] += 1
    base: dict[str, Any] = {"request_id_base": 500}
    frames = [
        wire.step_frame(1, ids, [tensor(x)], expected_revision=0, **base),
        wire.step_frame(2, ids, [tensor(some)], expected_revision=1, **base),
        wire.step_frame(3, ids, [tensor(some)], **base),
        wire.reset_frame(4, ids, **base),
    ]
    messages = [frame.SerializeToString() for frame in frames]
    native, python = (streamed(both[front], messages, waits=True) for front in FRONTS)
    assert native == python
    assert native[1] == "OK"
    for number in (2, 3):
        refused = {member for member, answer in native[0][number].items() if "INVALID_INPUT" in answer}
        assert refused == set(range(0, 1024, 3))
    (message,) = {answer[2] for answer in native[0][4].values()}
    assert "it belongs to a step; got a reset" in message
    for one in both.values():
        assert {one.session(name).revision for name in ids[:60:3]} == {1}
        assert {one.session(name).revision for name in ids[1:60:3]} == {2}


def test_several_rows_and_several_inputs_are_answered_alike(both: Mapping[str, Wire]) -> None:
    opened(both, "rows", batch_size=3)
    some = pb.StepRequest(session_id="rows", inputs=[tensor(X[:2])], rows=[2, 0], state_rows=[0])
    some.states = pb.STATE_SELECTION_ALL
    code, raw = same(both, "Step", some)[:2]
    answer = pb.StepResponse.FromString(raw)
    assert (code, list(answer.outputs[0].shape), [list(one.shape)[:2] for one in answer.states]) == (
        "OK",
        [2, 6, 2],
        [[1, 6]] * 2,
    )
    same(both, "Step", pb.StepRequest(session_id="rows", inputs=[tensor(X[:3])]))
    same(both, "Step", pb.StepRequest(session_id="rows", inputs=[tensor(X[:2])]))
    opened(both, "many inputs", batch_size=2, model="multi")
    rng = np.random.default_rng(3)
    listed = both["python"].models.ListModels(models_pb2.ListModelsRequest(), timeout=100).models
    (multi,) = [model for model in listed if model.name == "multi"]
    dtypes = {tensors_pb2.DATA_TYPE_FLOAT32: np.float32, tensors_pb2.DATA_TYPE_INT32: np.int32}
    for steps in (0, 1, 4):
        inputs = []
        for spec in multi.inputs:
            shape = (2, *((steps,) if spec.temporal and steps else ()), *spec.shape)
            dtype: Any = dtypes[spec.dtype]
            drawn = rng.integers(0, 9, shape) if dtype is np.int32 else rng.standard_normal(shape)
            inputs.append(tensor(drawn.astype(dtype), spec.name))
        assert same(both, "Step", pb.StepRequest(session_id="many inputs", inputs=inputs))[0] == "OK"
        same(both, "Step", pb.StepRequest(session_id="many inputs", inputs=inputs[:-1]))


@pytest.mark.parametrize("seed", one_in(2, range(6)))
def test_damaged_requests_are_answered_alike(both: Mapping[str, Wire], seed: int) -> None:
    """Bytes changed, left out and added, in requests of every kind."""
    rng = np.random.default_rng(seed)
    opened(both, f"damaged {seed}")
    good = pb.StepRequest(
        session_id=f"damaged {seed}",
        inputs=[tensor(X[:1, :2], "x")],
        request_id=9,
        outputs=pb.OUTPUT_SELECTION_LAST,
    ).SerializeToString()
    for _ in range(60):
        same(both, "Step", damaged(good, rng))


@pytest.mark.parametrize("seed", one_in(2, range(6)))
def test_a_stream_of_all_kinds_of_frames_is_answered_alike(both: Mapping[str, Wire], seed: int) -> None:
    """Sent without waiting: what each session was sent is done in that order, whoever reads which frame."""
    rng = np.random.default_rng(100 + seed)
    ids = [f"{seed} {index}" for index in range(5)]
    opened(both, *ids)
    frames = [_frame(rng, number + 1, ids) for number in range(80)]
    native, python = (streamed(both[front], frames) for front in FRONTS)
    assert native == python
    assert len(native[0]) == len(frames)
    for session_id in ids:
        states = [wire.data(one.state(session_id).state) for one in both.values()]
        assert states[0] == states[1]


def _frame(rng: np.random.Generator, number: int, ids: list[str]) -> bytes:
    some = rng.choice(ids, int(rng.integers(1, len(ids) + 1)), replace=False).tolist()
    kind = int(rng.integers(12))
    steps = int(rng.integers(1, 4))
    x = rng.standard_normal((len(some), steps, 3)).astype(np.float32)
    if kind == 0:
        return wire.reset_frame(number, some).SerializeToString()
    if kind == 1:
        mask = (rng.random(len(some)) < 0.5).tolist()
        return wire.step_frame(number, some, [tensor(x)], reset_mask=mask).SerializeToString()
    if kind == 2:
        return wire.step_frame(
            number, [*some, "nobody"], [tensor(np.concatenate([x, x[:1]]))]
        ).SerializeToString()
    if kind == 3:
        x[0, 0, 0] = np.nan
    if kind == 4:
        expected = rng.integers(0, 3, len(some)).tolist()
        requests = rng.integers(1, 3, len(some)).tolist()
        frame = wire.step_frame(number, some, [tensor(x)], expected_revisions=expected, request_ids=requests)
        return frame.SerializeToString()
    if kind == 5:
        return wire.step_frame(number, some, [tensor(x[:, :, :2])]).SerializeToString()
    if kind == 7:
        mask = (rng.random((len(some), steps)) < 0.3).reshape(-1).tolist()
        return wire.step_frame(number, some, [tensor(x)], reset_mask=mask).SerializeToString()
    if kind == 8:
        selection = int(rng.integers(0, 5))
        return wire.step_frame(number, some, [tensor(x)], states=selection).SerializeToString()
    if kind == 6:
        # a field of a later version
        return wire.step_frame(number, some, [tensor(x)]).SerializeToString() + b"\xf8\x06\x01"
    frame = wire.step_frame(number, some, [tensor(x)], outputs=int(rng.integers(0, 4)), timeout_ms=60_000)
    return frame.SerializeToString()


def _short_frame(rng: np.random.Generator, number: int, ids: list[str]) -> bytes:
    """A frame that has one number for all of its sessions, right or wrong."""
    kind = int(rng.integers(11))
    some = rng.choice(ids, len(MEMBERS), replace=False).tolist()
    x = [tensor(rng.standard_normal((len(MEMBERS), int(rng.integers(1, 3)), 3)).astype(np.float32))]
    if kind == 0:
        return _frame(rng, number, ids)
    if kind == 1:
        return wire.reset_frame(number, some, request_id_base=number).SerializeToString()
    if kind == 2:
        some[-1] = "nobody"
    fields = {
        2: {"expected_revision": 0, "batch_size": 1},
        3: {"expected_revision": int(rng.integers(number))},
        4: {"request_id_base": int(rng.integers(2**63, dtype=np.uint64)) * 2 + 1},
        5: {"request_id_base": 2**64 - int(rng.integers(1, 6))},
        6: {"expected_revision": 0, "expected_revisions": rng.integers(0, number, len(MEMBERS)).tolist()},
        7: {"request_id_base": number, "request_ids": [1] * len(MEMBERS)},
        8: {"batch_size": 1, "batch_sizes": [1] * len(MEMBERS)},
        9: {"expected_revision": 0, "batch_size": int(rng.integers(1, 3))},
    }.get(kind, {"expected_revision": 0, "outputs": int(rng.integers(0, 4))})
    return wire.step_frame(number, some, x, **fields).SerializeToString()


@pytest.mark.parametrize("seed", one_in(2, range(6)))
@pytest.mark.parametrize("waits", [False, True])
def test_frames_of_one_number_for_all_are_answered_alike(
    both: Mapping[str, Wire], seed: int, waits: bool
) -> None:
    """Sent without waiting, and one after the other, when the native front reads those that it can."""
    rng = np.random.default_rng(200 + seed)
    ids = [f"short {seed} {waits} {index}" for index in range(5)]
    opened(both, *ids)
    frames = [_short_frame(rng, number + 1, ids) for number in range(80)]
    native, python = (streamed(both[front], frames, waits=waits) for front in FRONTS)
    assert native == python
    assert len(native[0]) == len(frames)
    for session_id in ids:
        states = [wire.data(one.state(session_id).state) for one in both.values()]
        assert states[0] == states[1]


def test_frames_that_name_one_session_or_use_one_id_twice_are_refused_alike(both: Mapping[str, Wire]) -> None:
    """Beside others of their kind, with which they come at the same time."""
    ids = [f"beside {index}" for index in range(6)]
    opened(both, *ids)
    good = [wire.step_frame(number + 1, [one], [tensor(X[:1, 0])]) for number, one in enumerate(ids[:4])]
    twice = wire.step_frame(10, [ids[4], ids[4]], [tensor(X[:2, 0])])
    frames = [frame.SerializeToString() for frame in (*good, twice)]
    native, python = (streamed(both[front], frames) for front in FRONTS)
    assert native == python
    assert {error for _, error, _ in native[0][10].values()} == {"INVALID_INPUT"}


@pytest.mark.parametrize("front", FRONTS)
@pytest.mark.parametrize("kinds", [(0, 0), (0, 1), (1, 0), (1, 1)])
def test_an_id_is_that_of_one_unanswered_frame(
    both: Mapping[str, Wire], front: str, kinds: tuple[int, int]
) -> None:
    """A long frame is under way; another has its id. Of each kind: plain, and one with a mask of rows to reset.

    On a busy machine the first may be answered before the second is read: both are right then, and they are sent anew.
    """
    x = np.zeros((1, 20_000, 3), np.float16)
    masks: tuple[dict[str, Any], ...] = ({}, {"reset_mask": [False]})
    call: Any = both[front].channel.stream_stream(f"/{SERVICE}/StepStream")
    for attempt in range(20):
        name = f"id {kinds} {attempt}"
        both[front].open("seq", name)
        frames = [
            wire.step_frame(5, [name], [tensor(part)], outputs=pb.OUTPUT_SELECTION_NONE, **masks[kind])
            for part, kind in zip((x, x[:, :1]), kinds, strict=True)
        ]
        raw = call(iter([frame.SerializeToString() for frame in frames]), timeout=100)
        first, second = (pb.StepStreamResponse.FromString(answer) for answer in raw)
        if first.errors:
            assert "frame_id must differ from those of unanswered frames" in first.errors[0].error.message
            assert list(second.revisions) == [1]
            return
        assert [*first.revisions, *second.revisions] == [1, 2]
    pytest.fail("in twenty attempts no second frame was read while the first one was under way")


@pytest.mark.slow
def test_a_message_over_the_limit_ends_a_stream_alike(both: Mapping[str, Wire]) -> None:
    """However it comes: the rest of it is no message."""
    opened(both, "large")
    x = np.zeros((1, (64 << 20) // 4, 3), np.float16)
    frame = wire.step_frame(1, ["large"], [tensor(x)]).SerializeToString()
    for front in FRONTS:
        _, end = streamed(both[front], [frame])
        assert isinstance(end, wire.Refusal)
        assert end.code == "RESOURCE_EXHAUSTED"
        assert "larger than max" in end.message


def test_a_stream_ends_alike(both: Mapping[str, Wire]) -> None:
    opened(both, "ending")
    good = wire.step_frame(1, ["ending"], [tensor(X[:1])]).SerializeToString()
    for frames in ([], [good], [b"\xff\xff"], [good, b"\x07"]):
        native, python = (streamed(both[front], frames) for front in FRONTS)
        assert native[1] == python[1]


def test_metadata_and_encodings_make_no_difference(both: Mapping[str, Wire]) -> None:
    opened(both, "encoded")
    request = pb.StepRequest(session_id="encoded", inputs=[tensor(np.zeros((1, 400, 3), np.float32))])
    for options in (
        {"metadata": (("x-text", "value"), ("x-bytes-bin", bytes(range(256))))},
        {"timeout": 99.5},
    ):
        assert same(both, "Step", request, **options)[0] == "OK"
    for compression in (grpc.Compression.Gzip, grpc.Compression.Deflate):
        raw = request.SerializeToString()
        native, python = (called(both[front], "Step", raw, compression=compression) for front in FRONTS)
        assert native[0] == "OK"
        assert python[0] == "UNIMPLEMENTED", "grpc.aio would inflate it whatever comes of it"


def test_a_tenant_is_refused_alike_where_nobody_is_asked_who_calls(both: Mapping[str, Wire]) -> None:
    opened(both, "of nobody")
    request = pb.StepRequest(session_id="of nobody", inputs=[tensor(X[:1, 0])])
    frame = wire.step_frame(1, ["of nobody"], [tensor(X[:1])]).SerializeToString()
    metadata = (("stepwell-tenant", "acme"),)
    refused = same(both, "Step", request, metadata=metadata)
    assert refused[:2] == ("INVALID_ARGUMENT", "INVALID_INPUT")
    for _ in range(5):  # a stream's first frame may come before the call is refused
        native, python = (streamed(both[front], [frame], metadata=metadata) for front in FRONTS)
        assert native == python
        assert not native[0]
    for one in both.values():
        reply = called(one, "GetSession", pb.GetSessionRequest(session_id="of nobody").SerializeToString())[1]
        assert pb.GetSessionResponse.FromString(reply).session.revision == 0


@pytest.mark.parametrize("path", ["/stepwell.v1.SessionService/None", "/nothing/at/all", "/nothing/"])
def test_what_is_not_served_is_unimplemented_on_both(both: Mapping[str, Wire], path: str) -> None:
    for one in both.values():
        service, _, method = path.strip("/").partition("/")
        assert one.refused_bytes(method, b"", service).code == "UNIMPLEMENTED"


def test_a_step_and_a_reset_keep_their_order_on_streams_that_have_just_begun(
    both: Mapping[str, Wire],
) -> None:
    """One of them is plain and the other is not: what the front does with each differs."""
    opened(both, "in order")
    step = wire.step_frame(1, ["in order"], [tensor(X[:1, 0])])
    reset = wire.reset_frame(2, ["in order"])
    mask = wire.step_frame(3, ["in order"], [tensor(X[:1, 1])], reset_mask=[False])
    frames = [frame.SerializeToString() for frame in (step, reset, mask)]
    for front in FRONTS:
        call: Any = both[front].channel.stream_stream(f"/{SERVICE}/StepStream")
        for stream in (
            one for _ in range(examples(6)) for one in [call(iter(frames), timeout=100) for _ in range(50)]
        ):
            parts = [pb.StepStreamResponse.FromString(raw) for raw in stream]
            assert not any(part.errors for part in parts), parts
            revisions = {part.frame_id: part.revisions[0] for part in parts}
            assert revisions[1] < revisions[2] < revisions[3]


@pytest.mark.slow
def test_calls_that_are_cancelled_together_end_nobody_elses(both: Mapping[str, Wire]) -> None:
    opened(both, "cancelled", "bystander")
    long = wire.step_frame(
        1, ["bystander"], [tensor(np.zeros((1, 300_000, 3), np.float16))], outputs=pb.OUTPUT_SELECTION_NONE
    )
    one = both["native"]
    stream: Any = one.channel.stream_stream(f"/{SERVICE}/StepStream")
    answers = stream(iter([long.SerializeToString()]), timeout=100)
    unary: Any = one.channel.unary_unary(f"/{SERVICE}/GetState")
    request = pb.GetStateRequest(session_id="cancelled").SerializeToString()
    for _ in range(4):
        calls = [unary.future(request, timeout=100) for _ in range(500)]
        for call in calls:
            call.cancel()
    (answer,) = (pb.StepStreamResponse.FromString(raw) for raw in answers)
    assert list(answer.revisions) == [1]
