"""A frame of several versions: what each of the parts has of it, and who is answered for them."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import pytest

from stepwell_server.core.callers import Caller, Role
from stepwell_server.engine.api import Select
from stepwell_server.engine.change import MAX_TRIES, Change, Reply
from stepwell_server.engine.intake.split import split
from stepwell_server.errors import InvalidInput, ServerError
from support.engine.harness import x

pytestmark = pytest.mark.stores("memory")
ANN = Caller("ann", "acme", Role.USER)
SIZES = np.array([2, 1, 3], np.intp)


class Told:
    """Replies that are remembered."""

    def __init__(self) -> None:
        self.told: list[tuple[Any, ...]] = []

    def applied(self, members: Any, reply: Reply) -> None:
        self.told.append((members.tolist(), reply.version, reply.replayed))

    def failed(self, members: Any, error: ServerError) -> None:
        self.told.append((members.tolist(), error))

    def cancelled(self, members: Any) -> Any:
        return members[members == 2]


def frame(replies: Any = None, **values: Any) -> Change:
    """A step of three sessions of six rows."""
    change = Change(["a", "b", "c"], replies or Told(), **{"inputs": {"x": x(6, 4)}, **values})
    change.sizes = SIZES
    return change


def test_each_part_has_its_rows_and_what_is_said_of_its_members() -> None:
    mask = np.arange(24).reshape(6, 4) % 5 == 0
    trace = object()
    change = frame(
        reset_rows=mask.reshape(-1),
        expected=np.array([1, 2, 3], np.uint64),
        request_ids=np.array([4, 5, 6], np.uint64),
        select=Select.LAST,
        output_names=("y",),
        states=Select.LAST,
        state_members=[1, 2],
        deadline=5.0,
        connection="conn",
        caller=ANN,
        traces={0: trace},
        reply_limit=1000,
        reply_bytes=90,
    )
    assert change.inputs is not None
    stay, other = split(change, np.array([1]))
    for part, ids, rows, members in ((stay, ["a", "c"], [0, 1, 3, 4, 5], [0, 2]), (other, ["b"], [2], [1])):
        assert part.session_ids == ids
        assert part.inputs is not None
        assert part.reset_rows is not None
        np.testing.assert_array_equal(part.inputs["x"], change.inputs["x"][rows])
        np.testing.assert_array_equal(part.reset_rows, mask[rows].reshape(-1))
        for own, whole in (
            (part.expected, change.expected),
            (part.request_ids, change.request_ids),
            (part.batch_sizes, SIZES),
        ):
            assert own is not None
            assert whole is not None
            np.testing.assert_array_equal(own, whole[members])
        said = (part.select, part.output_names, part.states, part.deadline, part.connection, part.caller)
        assert said == (Select.LAST, ("y",), Select.LAST, 5.0, "conn", ANN)
        assert part.reply_limit == 1000
    assert (stay.state_members, other.state_members) == ([1], [0])
    assert (stay.traces, other.traces) == ({0: trace}, None)
    assert (stay.reply_bytes, other.reply_bytes) == (60, 30)


def test_a_part_without_members_whose_states_are_asked_for_asks_for_none() -> None:
    stay, other = split(frame(states=Select.ALL, state_members=[0]), np.array([1, 2]))
    assert (stay.states, stay.state_members) == (Select.ALL, [0])
    assert (other.states, other.state_members) == (Select.NONE, None)


def test_a_mask_for_all_time_steps_and_a_state_are_parted_by_rows() -> None:
    state = np.arange(12.0).reshape(6, 2)
    (stay, other) = split(frame(inputs=None, reset=True, state={"h": state}), np.array([0]))
    assert stay.state is not None
    assert other.state is not None
    np.testing.assert_array_equal(stay.state["h"], state[2:])
    np.testing.assert_array_equal(other.state["h"], state[:2])
    assert (stay.reset, other.reset, stay.inputs) == (True, True, None)
    mask = np.array([True, False, False, True, False, True])
    (stay, other) = split(frame(reset_rows=mask), np.array([0]))
    assert stay.reset_rows is not None
    assert stay.reset_rows.tolist() == [False, True, False, True]


def test_answers_are_those_of_the_members_of_the_whole() -> None:
    replies = Told()
    stay, other = split(frame(replies), np.array([1]))
    nothing = np.zeros(1, np.uint64)
    stay.replies.applied(np.array([1]), Reply(nothing, nothing, {}, {}, version=2))
    other.replies.applied(np.array([0]), Reply(nothing, nothing, {}, {}, replayed=True, version=1))
    error = InvalidInput("no")
    stay.replies.failed(np.array([0]), error)
    assert replies.told == [([2], 2, False), ([1], 1, True), ([0], error)]
    assert stay.replies.cancelled(np.array([0, 1])).tolist() == [1]
    assert other.replies.cancelled(np.array([0])).tolist() == []


def test_parts_are_parted_again() -> None:
    replies = Told()
    _, others = split(frame(replies), np.array([1, 2]))
    assert others.batch_sizes is not None
    others.sizes = others.batch_sizes
    _, last = split(others, np.array([1]))
    assert last.session_ids == ["c"]
    nothing = np.zeros(1, np.uint64)
    last.replies.applied(np.array([0]), Reply(nothing, nothing, {}, {}, version=3))
    assert replies.told == [([2], 3, False)]


@pytest.mark.parametrize(
    ("values", "words"),
    [
        (
            {"inputs": {"x": x(5, 4)}},
            "inputs 'x' must have 6 rows, those of the 3 sessions; got shape [5, 4, 2]",
        ),
        (
            {"inputs": {"x": np.array(1.0)}},
            "inputs 'x' must have 6 rows, those of the 3 sessions; got shape []",
        ),
        ({"inputs": None, "reset": True, "state": {"h": x(7)}}, "state 'h' must have 6 rows"),
        ({"states": Select.ALL, "state_members": [2, 1]}, "state_members must be ascending indexes of the 3"),
        ({"states": Select.ALL, "state_members": [3]}, "state_members must be ascending indexes of the 3"),
    ],
)
def test_a_message_that_cannot_be_split_is_refused_as_a_whole(values: dict[str, Any], words: str) -> None:
    with pytest.raises(InvalidInput) as raised:
        split(frame(**values), np.array([1]))
    assert words in raised.value.message


def test_a_part_of_several_messages_keeps_who_asked_for_which_and_until_when() -> None:
    bob, numbers = dataclasses.replace(ANN, name="bob"), np.array([3, 5, 5])
    change = frame(messages=numbers, connections=["c", "d", "d"], callers=[ANN, bob, bob], batch_sizes=SIZES)
    change.deadlines = numbers.astype(np.float64)
    _, last = split(change, np.array([1, 2]))
    messages = None if last.messages is None else last.messages.tolist()
    assert (last.connections, last.callers, last.deadline, messages) == (["d", "d"], [bob, bob], 5.0, [5, 5])


def test_what_cannot_be_taken_holds_back_its_message_and_all_where_a_session_is_named_twice() -> None:
    messages, one = np.array([0, 0, 1, 2, 2]), np.array([3])
    change = Change(["a", "b", "c", "d", "e"], Told(), messages=messages)
    assert change.with_followers(one).tolist() == change.whole_messages(one).tolist() == [3, 4]
    change = Change(["a", "b", "c", "d", "a"], Told(), messages=messages)
    assert (len(change.whole_messages(one)), len(change.with_followers(one))) == (2, 5)


def test_a_session_is_looked_up_again_a_bounded_number_of_times_for_each_member() -> None:
    change, both = frame(), np.array([0, 2])
    assert not any(change.count_try(both).any() for _ in range(MAX_TRIES))
    assert change.count_try(np.arange(3)).tolist() == [True, False, True]
