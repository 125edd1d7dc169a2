"""A frame is settled part by part and round by round; what is unsettled is sent again, and only that."""

from __future__ import annotations

import math
from collections.abc import Iterable

import numpy as np
import pytest

from stepwell import errors
from stepwell._frames import Change, Frame, Gathered
from stepwell._inputs import pack_inputs
from stepwell._retry import Deadline
from stepwell._tensors import Array, pack, to_messages, unpack
from stepwell.v1 import errors_pb2, sessions_pb2

ROWS = [1, 2, 1]
X = np.arange(8, dtype=np.float32).reshape(4, 2)
OVERLOADED = errors_pb2.Error(code=8, reason="OVERLOADED", retry_after_ms=50)
CORRUPT = errors_pb2.Error(code=15, reason="STATE_CORRUPT", message="damaged")


def frame() -> Frame:
    change = Change("step", pack_inputs(X), "last")
    numbers = np.array([10, 20, 30], np.uint64)
    return Frame(change, ["a", "b", "c"], np.array(ROWS), numbers, numbers + np.uint64(1))


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


def test_first_round_holds_everything() -> None:
    message = frame().request(7, Deadline(1.5, lambda: 0.0))
    assert message.frame_id == 7
    assert list(message.step.session_ids) == ["a", "b", "c"]
    assert list(message.step.expected_revisions) == [10, 20, 30]
    assert list(message.step.request_ids) == [11, 21, 31]
    assert message.step.outputs == sessions_pb2.OUTPUT_SELECTION_LAST
    assert message.step.timeout_ms == 1500
    assert list(message.step.batch_sizes) == ROWS
    assert np.array_equal(unpack(message.step.inputs[0]), X)


def test_no_limit_is_zero_and_the_last_millisecond_is_one() -> None:
    assert frame().request(1, Deadline(math.inf)).step.timeout_ms == 0
    assert frame().request(1, Deadline(1e-9, lambda: 0.0)).step.timeout_ms == 1


def test_second_round_holds_what_is_unsettled_with_the_same_ids() -> None:
    one = frame()
    one.request(1, Deadline(1.0))
    part = one.accept(reply([1], last=False))
    assert part.applied.tolist() == [1]
    again = one.request(2, Deadline(1.0)).step
    assert list(again.session_ids) == ["a", "c"]
    assert list(again.expected_revisions) == [10, 30]
    assert list(again.request_ids) == [11, 31]
    assert list(again.batch_sizes) == [1, 1]
    assert np.array_equal(unpack(again.inputs[0]), X[[0, 3]])
    # Indexes of the second reply are those of the second message.
    assert one.accept(reply([1], last=False)).applied.tolist() == [2]


def test_members_of_several_rows_are_resent_whole() -> None:
    one = frame()
    one.request(1, Deadline(1.0))
    one.accept(reply([0, 2], last=False))
    assert np.array_equal(unpack(one.request(2, Deadline(1.0)).step.inputs[0]), X[1:3])


def test_retryable_errors_ask_for_another_round() -> None:
    one = frame()
    one.request(1, Deadline(1.0))
    one.accept(reply([0, 1], last=False))
    part = one.accept(failed([2], OVERLOADED, last=True))
    assert part.failures == {}
    error = one.unsettled_error()
    assert isinstance(error, errors.OverloadedError)
    assert error.retry_after_s == 0.05
    one.request(2, Deadline(1.0))
    one.accept(reply([0], last=True))
    assert one.unsettled_error() is None


def test_final_errors_are_passed_on() -> None:
    one = frame()
    one.request(1, Deadline(1.0))
    part = one.accept(failed([1, 2], CORRUPT, last=False))
    assert {i: type(error) for i, error in part.failures.items()} == dict.fromkeys(
        [1, 2], errors.StateCorruptError
    )
    assert part.failures[1] is not part.failures[2]
    one.accept(reply([0], last=True))
    assert one.unsettled_error() is None


def test_error_of_the_whole_frame() -> None:
    one = frame()
    one.request(1, Deadline(1.0))
    part = one.accept(failed([], CORRUPT, last=True))
    assert sorted(part.failures) == [0, 1, 2]


def test_all_members_at_once() -> None:
    one = frame()
    one.request(1, Deadline(1.0))
    response = reply([], last=True)
    response.all_members = True
    response.revisions.extend([1, 2, 3])
    response.positions.extend([4, 5, 6])
    part = one.accept(response)
    assert part.applied.tolist() == [0, 1, 2]
    assert part.revisions.tolist() == [1, 2, 3]
    assert one.round_over


def test_members_the_server_left_out_are_told() -> None:
    one = frame()
    one.request(1, Deadline(1.0))
    part = one.accept(reply([0], last=True))
    assert {i: type(error) for i, error in part.failures.items()} == dict.fromkeys(
        [1, 2], errors.InternalError
    )


@pytest.mark.parametrize("members", [[3], [0, 1, 2, 3]])
def test_members_outside_of_the_frame(members: list[int]) -> None:
    one = frame()
    one.request(1, Deadline(1.0))
    with pytest.raises(errors.InternalError, match="outside"):
        one.accept(reply(members, last=True))


def test_counts_that_do_not_fit() -> None:
    one = frame()
    one.request(1, Deadline(1.0))
    with pytest.raises(errors.InternalError, match="2 members, 1 revisions"):
        one.accept(sessions_pb2.StepStreamResponse(members=[0, 1], revisions=[1], positions=[1, 2]))


def test_giving_up_settles_the_rest() -> None:
    one = frame()
    one.request(1, Deadline(1.0))
    one.accept(reply([0], last=False))
    part = one.give_up(errors.UnavailableError("gone", outcome="unknown"))
    assert sorted(part.failures) == [1, 2]
    assert one.give_up(errors.UnavailableError("gone")).failures == {}


def test_outputs_are_put_together_in_the_members_order() -> None:
    change = Change("step", pack_inputs(np.zeros((6, 2))))
    counts = np.zeros(3, np.uint64)
    one = Frame(change, ["a", "b", "c"], np.full(3, 2), counts, counts)
    one.request(1, Deadline(1.0))
    whole = Gathered(3, 2)
    y = np.arange(12, dtype=np.float32).reshape(6, 2)
    whole.add(one.accept(reply([1], last=False, y=y[2:4])))
    whole.add(one.accept(reply([0, 2], last=True, y=y[[0, 1, 4, 5]])))
    assert np.array_equal(whole.outputs["y"], y)
