"""A frame is settled part by part; what is unsettled is sent again, and only that."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable
from typing import Any

import numpy as np
import pytest

from stepwell import errors
from stepwell._batching.frames import Change, Frame, Gathered, Part
from stepwell._batching.step_arguments import step_change
from stepwell._batching.steps import Member, Step, Stepped, answer, facts, framed, in_frames
from stepwell._state.arguments import pack_inputs
from stepwell._state.tensors import Array, pack, to_messages, unpack
from stepwell._transport.retry import Deadline
from stepwell.v1 import errors_pb2, sessions_pb2
from support.sdk.scripted_model import message_of

ROWS = [1, 2, 1]
X = np.arange(8, dtype=np.float32).reshape(4, 2)
OVERLOADED = errors_pb2.Error(code=8, reason="OVERLOADED", retry_after_ms=50)
CORRUPT = errors_pb2.Error(code=15, reason="STATE_CORRUPT", message="damaged")


def frame() -> Frame:
    change = Change("step", pack_inputs(X), "last")
    numbers = np.array([10, 20, 30], np.uint64)
    return Frame(change, ["a", "b", "c"], np.array(ROWS), numbers, numbers + np.uint64(1))


@pytest.fixture
def one() -> Frame:
    """A frame that was sent."""
    sent = frame()
    message_of(sent, 1, Deadline(1.0))
    return sent


def reply(members: Iterable[int], *, last: bool, y: Array | None = None) -> sessions_pb2.StepStreamResponse:
    members = list(members)
    response = sessions_pb2.StepStreamResponse(
        members=members, revisions=[1] * len(members), positions=[2] * len(members), last=last
    )
    if y is not None:
        response.outputs.extend(to_messages([pack("y", "y", y)]))
    return response


def failed(members: list[int], error: errors_pb2.Error, *, last: bool) -> sessions_pb2.StepStreamResponse:
    response = sessions_pb2.StepStreamResponse(last=last)
    response.errors.add(members=members, error=error)
    return response


def test_a_frame_holds_everything() -> None:
    message = message_of(frame(), 7, Deadline(1.5, lambda: 0.0))
    assert (message.frame_id, list(message.step.session_ids)) == (7, ["a", "b", "c"])
    assert list(message.step.expected_revisions) == [10, 20, 30]
    assert list(message.step.request_ids) == [11, 21, 31]
    assert (message.step.outputs, message.step.timeout_ms) == (sessions_pb2.OUTPUT_SELECTION_LAST, 1500)
    assert list(message.step.batch_sizes) == ROWS
    assert np.array_equal(unpack(message.step.inputs[0]), X)


def test_no_limit_is_zero_and_the_last_millisecond_is_one() -> None:
    assert message_of(frame(), 1, Deadline(math.inf)).step.timeout_ms == 0
    assert message_of(frame(), 1, Deadline(1e-9, lambda: 0.0)).step.timeout_ms == 1


def again_of(one: Frame) -> Frame:
    """The frame of the members that are unsettled."""
    return one.part(one.open_members(), None)


def test_the_next_frame_holds_what_is_unsettled_with_the_same_ids(one: Frame) -> None:
    part = one.accept(reply([1], last=False))
    assert part.applied.tolist() == [1]
    left = again_of(one)
    again = message_of(left, 2, Deadline(1.0)).step
    assert (list(again.session_ids), list(again.expected_revisions)) == (["a", "c"], [10, 30])
    assert list(again.request_ids) == [11, 31]
    assert (again.batch_size, list(again.batch_sizes)) == (1, [])
    assert np.array_equal(unpack(again.inputs[0]), X[[0, 3]])
    # Indexes of its reply are those of its own message.
    assert left.accept(reply([1], last=False)).applied.tolist() == [1]


def test_members_of_several_rows_are_resent_whole(one: Frame) -> None:
    one.accept(reply([0, 2], last=False))
    assert np.array_equal(unpack(message_of(again_of(one), 2, Deadline(1.0)).step.inputs[0]), X[1:3])


def test_retryable_errors_ask_for_another_frame(one: Frame) -> None:
    one.accept(reply([0, 1], last=False))
    part = one.accept(failed([2], OVERLOADED, last=True))
    assert part.failures == {}
    [(error, members)] = one.unsettled()
    assert isinstance(error, errors.OverloadedError)
    assert (error.retry_after_s, members.tolist()) == (0.05, [2])
    left = again_of(one)
    message_of(left, 2, Deadline(1.0))
    left.accept(reply([0], last=True))
    assert left.unsettled() == []


def test_final_errors_are_passed_on(one: Frame) -> None:
    part = one.accept(failed([1, 2], CORRUPT, last=False))
    assert {i: type(error) for i, error in part.failures.items()} == dict.fromkeys(
        [1, 2], errors.StateCorruptError
    )
    assert part.failures[1] is not part.failures[2]
    one.accept(reply([0], last=True))
    assert one.unsettled() == []


def test_error_of_the_whole_frame(one: Frame) -> None:
    part = one.accept(failed([], CORRUPT, last=True))
    assert sorted(part.failures) == [0, 1, 2]


def test_all_members_at_once(one: Frame) -> None:
    response = reply([], last=True)
    response.all_members = True
    response.revisions.extend([1, 2, 3])
    response.positions.extend([4, 5, 6])
    part = one.accept(response)
    assert (part.applied.tolist(), part.revisions.tolist()) == ([0, 1, 2], [1, 2, 3])
    assert one.round_over


def test_members_the_server_left_out_are_named(one: Frame) -> None:
    part = one.accept(reply([0], last=True))
    assert {i: type(error) for i, error in part.failures.items()} == dict.fromkeys(
        [1, 2], errors.InternalError
    )


@pytest.mark.parametrize("members", [[3], [0, 1, 2, 3]])
def test_members_outside_of_the_frame(one: Frame, members: list[int]) -> None:
    with pytest.raises(errors.InternalError, match="outside"):
        one.accept(reply(members, last=True))


def test_counts_that_do_not_fit(one: Frame) -> None:
    with pytest.raises(errors.InternalError, match="2 members, 1 revisions"):
        one.accept(sessions_pb2.StepStreamResponse(members=[0, 1], revisions=[1], positions=[1, 2]))


def test_outputs_are_put_together_in_the_members_order() -> None:
    change = Change("step", pack_inputs(np.zeros((6, 2))))
    counts = np.zeros(3, np.uint64)
    one = Frame(change, ["a", "b", "c"], np.full(3, 2), counts, counts)
    message_of(one, 1, Deadline(1.0))
    whole = Gathered(3, 2)
    y = np.arange(12, dtype=np.float32).reshape(6, 2)
    whole.add(one.accept(reply([1], last=False, y=y[2:4])))
    whole.add(one.accept(reply([0, 2], last=True, y=y[[0, 1, 4, 5]])))
    assert np.array_equal(whole.outputs["y"], y)


MASK = np.array([[1, 0], [0, 0], [1, 1], [0, 1]], np.bool_)


def test_a_frame_of_some_members_has_their_rows_of_the_mask_and_says_all_else_again() -> None:
    numbers = np.array([10, 20, 30], np.uint64)
    change = step_change(
        np.zeros((4, 2, 3), np.float32), 4, reset=MASK, outputs=["y"], time="last", states="all"
    )
    one = Frame(change, ["a", "b", "c"], np.array(ROWS), numbers, numbers)
    message = message_of(one, 1, Deadline(1.0)).step
    assert list(message.reset_mask) == MASK.reshape(-1).tolist()
    part = reply([1], last=False)
    part.states.extend(to_messages([pack("h", "h", np.ones((2, 2, 5), np.float32))]))
    assert one.accept(part).states["h"].shape == (2, 2, 5)
    again = message_of(again_of(one), 2, Deadline(1.0)).step
    assert list(again.reset_mask) == MASK[[0, 3]].reshape(-1).tolist()
    for each in (message, again):
        assert (list(each.output_names), each.outputs) == (["y"], sessions_pb2.OUTPUT_SELECTION_LAST)
        assert each.states == sessions_pb2.STATE_SELECTION_ALL


def test_states_of_members_are_put_together_like_outputs() -> None:
    whole = Gathered(3, 2)
    none: dict[int, errors.StepwellError] = {}
    for members in ([1], [0, 2]):
        rows = np.concatenate([np.full((2, 5), member + 1.0) for member in members])
        numbers = np.array(members, np.uint64)
        whole.add(Part(np.array(members), numbers, numbers, {}, none, {"h": rows}))
    assert whole.states["h"].tolist() == np.repeat([1.0, 2.0, 3.0], 2)[:, None].repeat(5, 1).tolist()


def of_session(name: str, **said: Any) -> Step:
    rows = said.pop("rows", ())
    change = step_change(
        np.full((len(rows) or 2, 3), ord(name), np.float32), len(rows) or 2, rows=rows, **said
    )
    return Step("m", name, change, len(rows) or 2, 0, 1, Deadline(1.0))


class Waiting(Member):
    """A step that was handed over."""

    __slots__ = ("answer",)

    def __init__(self, step: Step) -> None:
        super().__init__(*facts(step))
        self.answer: Stepped | BaseException | None = None

    def settle(self, stepped: Stepped) -> None:
        self.answer = stepped

    def fail(self, error: BaseException) -> None:
        self.answer = error


def as_form(step: Step) -> Step:
    """The same step with its data apart, as `AsyncSession.step` makes it."""
    [tensor] = step.change.tensors
    form = step.change._replace(tensors=(tensor._replace(data=b""),))
    return dataclasses.replace(step, form=form, data=tensor.data)


@pytest.mark.parametrize("sizes", [(2, 2, 2), (1, 3, 2)])
@pytest.mark.parametrize("forms", [(True, True, True), (True, False, True), (False, True, True)])
def test_steps_with_their_data_apart_make_the_same_frame(
    sizes: tuple[int, ...], forms: tuple[bool, ...]
) -> None:
    random = np.random.default_rng()
    whole = []
    for name, rows in zip("abc", sizes, strict=True):
        change = step_change(random.standard_normal((rows, 3), np.float32), rows)
        whole.append(Step("m", name, change, rows, 0, 1, Deadline(1.0)))
    mixed = [as_form(step) if is_form else step for step, is_form in zip(whole, forms, strict=True)]
    assert [step.change for step in mixed] == [step.change for step in whole]
    frames = []
    for steps in (whole, mixed):
        [members] = in_frames([Waiting(step) for step in steps], 1 << 20)
        frames.append(message_of(framed(members), 1, Deadline(math.inf)))
    assert frames[0] == frames[1]
    largest = max(step.input_bytes() for step in whole) + 100
    parts = [list(in_frames([Waiting(step) for step in steps], largest)) for steps in (whole, mixed)]
    assert [len(part) for part in parts[0]] == [len(part) for part in parts[1]]


def test_steps_that_ask_for_the_same_share_a_frame() -> None:
    kinds: list[dict[str, Any]] = [
        {},
        {"reset": [True, False]},
        {"outputs": ["y"]},
        {"outputs": ["y", "z"]},
        {"states": "last"},
        {"states": "all"},
        {"time": "last"},
    ]
    assert len({of_session("a", **said).kind() for said in kinds}) == len(kinds)
    for said in kinds:
        assert of_session("a", **said).kind() == of_session("b", **said).kind()
        assert of_session("a", **said).may_share()
    assert not of_session("a", rows=(1,)).may_share()
    members = [Waiting(of_session("a", reset=[True, False])), Waiting(of_session("b", reset=[False, True]))]
    one = framed(members)
    assert list(message_of(one, 1, Deadline(1.0)).step.reset_mask) == [True, False, False, True]
    part = reply([0, 1], last=True, y=np.arange(4.0)[:, None])
    part.states.extend(to_messages([pack("h", "h", np.arange(4, 8.0)[:, None])]))
    answer(members, one.accept(part))
    for place, member in enumerate(members):
        assert isinstance(member.answer, tuple)
        _, _, _, names, [y], states = member.answer
        assert names == ("y",)
        assert y.reshape(-1).tolist() == [2 * place, 2 * place + 1]
        assert states["h"].reshape(-1).tolist() == [2 * place + 4, 2 * place + 5]
