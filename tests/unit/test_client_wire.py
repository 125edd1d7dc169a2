"""Steps are encoded by hand: each message must be the one that the generated code encodes."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from stepwell._base.wire import varint
from stepwell._batching.frames import SELECTIONS, STATES, Change, Counts, Frame
from stepwell._batching.one_step import OneStep
from stepwell._batching.sender import WaitingStep
from stepwell._batching.sets import SessionSet
from stepwell._batching.step_arguments import step_change
from stepwell._batching.steps import Step, framed
from stepwell._state.tensors import pack, to_messages
from stepwell._transport.retry import Deadline
from stepwell.errors import InvalidInputError, StepwellError
from stepwell.v1 import errors_pb2
from stepwell.v1 import sessions_pb2 as pb
from support.sdk.scripted_model import message_of

FROZEN = Deadline(1.5, lambda: 0.0)
X = np.arange(24, dtype=np.float32).reshape(2, 3, 4)
STEPS: dict[str, dict[str, Any]] = {
    "one array": {"inputs": X},
    "one time step": {"inputs": X[:, 0]},
    "named arrays": {"inputs": {"x": X, "größe": np.ones((2, 3), np.int64), "on": np.ones((2, 1), np.bool_)}},
    "half floats": {"inputs": X.astype(np.float16)},
    "big-endian": {"inputs": X.astype(">f8")},
    "not contiguous": {"inputs": X.transpose(0, 2, 1)},
    "long": {"inputs": np.ones((2, 5000), np.float32)},
    "no outputs": {"inputs": X, "outputs": "none"},
    "some outputs": {"inputs": X, "outputs": ["y", "z"], "time": "last"},
    "states": {"inputs": X, "states": "all"},
    "rows that restart": {"inputs": X, "reset": [True, False]},
    "times that restart": {"inputs": X, "reset": np.eye(2, 3, dtype=np.bool_)},
}
SAMPLED = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"
NUMBERS = [0, 1, 127, 128, 300, 2**32 - 1, 2**32, 2**63, 2**64 - 1]


def options(change: Change) -> dict[str, Any]:
    """The fields of a step that describe its change, for the generated code."""
    return {
        "inputs": to_messages(change.tensors),
        "outputs": SELECTIONS[change.outputs],
        "output_names": change.output_names,
        "reset_mask": np.frombuffer(change.reset, np.bool_).tolist() if change.reset else [],
        "states": STATES[change.states] if change.states != "none" else 0,
    }


def encoded(step: Step) -> pb.StepRequest:
    request = step.call(1 << 20).request
    assert isinstance(request, bytes)
    return pb.StepRequest.FromString(request)


@pytest.mark.parametrize("number", NUMBERS)
def test_numbers(number: int) -> None:
    assert varint(number) == pb.Session(revision=number).SerializeToString()[1:] or not number
    step = Step("m", "a", step_change(X, 2), 2, number, number or 1, FROZEN)
    message = encoded(step)
    assert (message.expected_revision, message.request_id) == (number, number or 1)
    assert message.HasField("expected_revision")


@pytest.mark.parametrize("name", STEPS)
@pytest.mark.parametrize("session_id", ["a", "ü" * 128])
def test_a_step(name: str, session_id: str) -> None:
    change = step_change(row_count=2, **STEPS[name])
    expected = pb.StepRequest(session_id=session_id, expected_revision=300, request_id=7, **options(change))
    assert encoded(Step("m", session_id, change, 2, 300, 7, FROZEN)) == expected


def test_a_step_of_some_rows() -> None:
    change = step_change(X, 2, rows=(3, 300))
    expected = pb.StepRequest(
        session_id="a", expected_revision=1, request_id=7, rows=(3, 300), **options(change)
    )
    assert encoded(Step("m", "a", change, 2, 1, 7, FROZEN)) == expected


def test_the_limit_of_a_message() -> None:
    step = Step("m", "a", step_change(X, 2), 2, 1, 7, FROZEN)
    request = step.call(1 << 20).request
    assert isinstance(request, bytes)
    step.call(len(request))
    rule = f"the message of Step must be at most max_message_bytes = {len(request) - 1}; got {len(request)} bytes"
    with pytest.raises(InvalidInputError, match=rule):
        step.call(len(request) - 1)


@pytest.mark.parametrize("name", STEPS)
def test_a_frame_of_one_step(name: str) -> None:
    change = step_change(row_count=2, **STEPS[name])
    step = Step("m", "ü" * 70, change, 2, 300, 2**64 - 1, FROZEN, trace=(("traceparent", SAMPLED),))
    member = WaitingStep(step)
    one = OneStep(step, lambda: framed([member]))
    expected = pb.StepFrame(
        session_ids=["ü" * 70],
        batch_sizes=[2],
        expected_revisions=[300],
        request_ids=[2**64 - 1],
        timeout_ms=1500,
        traceparent=SAMPLED,
        **options(change),
    )
    message = pb.StepStreamRequest.FromString(one.encode(300, FROZEN))
    assert message == pb.StepStreamRequest(frame_id=300, step=expected)
    assert message == message_of(framed([member]), 300, FROZEN)


OVERLOADED = errors_pb2.Error(code=8, reason="OVERLOADED", message="full", retry_after_ms=50)
CORRUPT = errors_pb2.Error(code=15, reason="STATE_CORRUPT", message="damaged")
Y = to_messages([pack("y", "y", np.ones((2, 3), np.float32))])
REPLIES: dict[str, list[pb.StepStreamResponse]] = {
    "applied": [pb.StepStreamResponse(members=[0], revisions=[5], positions=[6], outputs=Y, last=True)],
    "all": [
        pb.StepStreamResponse(all_members=True, revisions=[5], positions=[6], model_version=2, last=True)
    ],
    "in two parts": [
        pb.StepStreamResponse(members=[0], revisions=[5], positions=[6], outputs=Y, states=Y),
        pb.StepStreamResponse(last=True),
    ],
    "one number for all": [
        pb.StepStreamResponse(member_count=1, revision=5, position=6, outputs=Y, last=True)
    ],
    "failed": [pb.StepStreamResponse(errors=[pb.MemberError(members=[0], error=CORRUPT)], last=True)],
    "failed as a whole": [pb.StepStreamResponse(errors=[pb.MemberError(error=CORRUPT)], last=True)],
    "to be sent again": [
        pb.StepStreamResponse(errors=[pb.MemberError(members=[0], error=OVERLOADED)], last=True)
    ],
    "another member": [pb.StepStreamResponse(members=[1], revisions=[5], positions=[6], last=True)],
    "two members": [pb.StepStreamResponse(members=[0, 0], revisions=[5, 5], positions=[6, 6], last=True)],
    "no position": [pb.StepStreamResponse(members=[0], revisions=[5], last=True)],
    "nothing": [pb.StepStreamResponse(last=True)],
}


def outcome(frame: Frame | OneStep, replies: list[pb.StepStreamResponse]) -> list[str]:
    """What a caller learns from the replies to a frame."""
    seen = []
    try:
        seen += [repr(frame.accept(reply)) for reply in replies]
        seen.append(repr(frame.round_over))
        seen.append(repr(frame.fail_retryable()))
    except StepwellError as error:
        seen.append(repr(error))
    return seen


@pytest.mark.parametrize("name", REPLIES)
def test_replies_to_one_step(name: str) -> None:
    step = Step("m", "a", step_change(X, 2), 2, 4, 7, FROZEN)
    full = framed([WaitingStep(step)])
    full.encode(1, FROZEN)
    assert outcome(OneStep(step, lambda: framed([WaitingStep(step)])), REPLIES[name]) == outcome(
        full, REPLIES[name]
    )


def frame_of(change: Change, count: int, numbers: Counts, request_ids: Counts, *, is_set: bool) -> Frame:
    ids, rows = [f"session-{i}" for i in range(count)], np.full(count, 2 // count)
    return Frame(change, ids, rows, numbers, request_ids, SessionSet(ids, rows) if is_set else None)


@pytest.mark.parametrize("name", STEPS)
@pytest.mark.parametrize("count", [1, 2])
@pytest.mark.parametrize("is_set", [False, True])
def test_a_frame_of_steps(name: str, count: int, is_set: bool) -> None:
    change = step_change(row_count=2, **STEPS[name])
    numbers = np.array([300, 2**63], np.uint64)[:count]
    frame = frame_of(change, count, numbers, numbers + np.uint64(1), is_set=is_set)
    frame.traceparent = "00-trace"
    expected = pb.StepFrame(
        session_ids=frame.ids,
        batch_sizes=[2] if count == 1 else [],
        batch_size=1 if count == 2 else 0,
        expected_revisions=numbers.tolist(),
        request_ids=(numbers + np.uint64(1)).tolist(),
        timeout_ms=1500,
        traceparent="00-trace",
        **options(change),
    )
    assert message_of(frame, 300, FROZEN) == pb.StepStreamRequest(frame_id=300, step=expected)


@pytest.mark.parametrize("is_set", [False, True])
def test_a_frame_whose_members_are_alike(is_set: bool) -> None:
    change = step_change(X, 2)
    alike = np.array([5, 5], np.uint64)
    frame = frame_of(change, 2, alike, np.array([8, 9], np.uint64), is_set=is_set)
    expected = pb.StepFrame(
        session_ids=frame.ids,
        batch_size=1,
        expected_revision=5,
        request_id_base=8,
        timeout_ms=1500,
        **options(change),
    )
    assert message_of(frame, 1, FROZEN) == pb.StepStreamRequest(frame_id=1, step=expected)


@pytest.mark.parametrize("states", [(), step_change({"h": X[:, 0], "c": X[:, 1]}, 2).tensors])
@pytest.mark.parametrize(
    ("request_ids", "encoded_ids"),
    [((8, 9), {"request_id_base": 8}), ((2**64 - 1, 1), {"request_ids": (2**64 - 1, 1)})],
)
def test_a_frame_of_resets(states: Any, request_ids: tuple[int, int], encoded_ids: dict[str, Any]) -> None:
    alike = np.array([5, 5], np.uint64)
    frame = frame_of(Change("reset", states), 2, alike, np.array(request_ids, np.uint64), is_set=False)
    expected = pb.ResetFrame(
        session_ids=frame.ids,
        state=to_messages(states),
        batch_size=1,
        expected_revision=5,
        timeout_ms=1500,
        **encoded_ids,
    )
    assert message_of(frame, 1, FROZEN) == pb.StepStreamRequest(frame_id=1, reset=expected)


@pytest.mark.parametrize(("rows", "revisions"), [((2, 2), (2**64 - 1,) * 2), ((2, 1), (2**63, 0))])
def test_a_frame_of_single_steps(rows: tuple[int, int], revisions: tuple[int, int]) -> None:
    steps = [
        Step("m", name, step_change(X[:count], count), count, revision, number, FROZEN)
        for name, count, revision, number in zip("ab", rows, revisions, (7, 2**64 - 1), strict=True)
    ]
    frame = message_of(framed([WaitingStep(step) for step in steps]), 1, FROZEN).step
    assert frame.request_ids == [7, 2**64 - 1]
    assert tuple(frame.batch_sizes or [frame.batch_size] * 2) == rows
    assert tuple(frame.expected_revisions or [frame.expected_revision] * 2) == revisions
