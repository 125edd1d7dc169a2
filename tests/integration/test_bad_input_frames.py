"""Frames that contradict themselves or name what is not there: refused as a whole or member by member."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from stepwell.v1 import sessions_pb2
from support import wire
from support.served import Served
from support.wire import Answer, Array, Refusal, tensor

pb = sessions_pb2


def ones(*shape: int) -> Any:
    return np.ones(shape, np.float32)


def refusal_of(answers: list[Answer]) -> Refusal:
    """The one refusal of a whole frame."""
    (answer,) = answers
    (entry,) = answer.errors
    assert answer.last
    assert not entry.members
    return wire.of_members(answers, 1)[0]


@pytest.fixture
def pair(served: Served) -> Any:
    with served.session("seq", 1) as one, served.session("seq", 2) as two:
        yield one, two


# With A a session of one row and B a session of two; fields are those of StepFrame.
BAD_FRAMES: dict[str, tuple[dict[str, Any], str]] = {
    "no sessions": ({"session_ids": []}, "session_ids must be 1 to 65536; got 0"),
    "too many sessions": (
        {"session_ids": [str(i) for i in range(65_537)]},
        "session_ids must be 1 to 65536; got 65537",
    ),
    "a session twice": ({"session_ids": ["A", "A"]}, "session_ids must name each session once;"),
    "nobody twice": ({"session_ids": ["A", "nobody", "B", "nobody"]}, "once; 'nobody' came twice"),
    "one revision for two": ({"expected_revisions": [1]}, "expected_revisions must be empty or one"),
    "three revisions for two": ({"expected_revisions": [1, 1, 1]}, "expected_revisions must be empty or one"),
    "one request id for two": ({"request_ids": [1]}, "request_ids must be empty or one"),
    "three request ids for two": ({"request_ids": [1, 2, 3]}, "request_ids must be empty or one"),
    "one batch size for two": ({"batch_sizes": [1]}, "batch_sizes must be empty or one"),
    "three batch sizes for two": ({"batch_sizes": [1, 2, 3]}, "batch_sizes must be empty or one"),
    "more rows than said": ({"batch_sizes": [1, 2], "inputs": ones(4, 3)}, "(3, 3) or (3, T, 3); got (4, 3)"),
    "fewer rows than said": (
        {"batch_sizes": [1, 2], "inputs": ones(2, 3)},
        "(3, 3) or (3, T, 3); got (2, 3)",
    ),
    "more rows than there are": ({"inputs": ones(4, 3)}, "(3, 3) or (3, T, 3); got (4, 3)"),
    "fewer rows than there are": ({"inputs": ones(2, 3)}, "(3, 3) or (3, T, 3); got (2, 3)"),
    "no such selection": ({"outputs": 9}, "outputs must be one of stepwell.v1.OutputSelection; got 9"),
    "no inputs": ({"inputs": None}, "inputs must name each of ['x'] once; got []"),
    "a batch size of 0": ({"batch_sizes": [1, 0], "inputs": ones(1, 3)}, "batch_sizes must be 1 to "),
    "a batch size of 0 and NaN": (
        {"batch_sizes": [0, 1], "inputs": ones(1, 3) * np.nan},
        "batch_sizes must be 1 to ",
    ),
    "a last batch size of 0 and NaN": (
        {"batch_sizes": [1, 0], "inputs": ones(1, 3) * np.nan},
        "batch_sizes must be 1 to ",
    ),
    "the largest batch sizes": (
        {"batch_sizes": [2**32 - 1, 2**32 - 1]},
        "batch_sizes must be 1 to ",
    ),
}


@pytest.mark.parametrize("name", BAD_FRAMES)
def test_a_frame_that_is_refused_as_a_whole(served: Served, pair: tuple[str, str], name: str) -> None:
    changes, words = BAD_FRAMES[name]
    names = dict(zip("AB", pair, strict=True))
    fields: dict[str, Any] = {"session_ids": ["A", "B"], "inputs": ones(3, 3)} | changes
    fields["session_ids"] = [names.get(one, one) for one in fields["session_ids"]]
    fields["inputs"] = [] if fields["inputs"] is None else [tensor(fields["inputs"])]
    with served.nothing_changes(*pair):
        answers = served.wire.exchange(
            pb.StepStreamRequest(frame_id=4, step=pb.StepFrame(**fields)),
            pb.StepStreamRequest(frame_id=5),
        )
        assert [answer.frame_id for answer in answers] == [4, 5], "the stream goes on"
        refusal_of(answers[:1]).expect("INVALID_ARGUMENT", "INVALID_INPUT", words)


@pytest.mark.parametrize(
    "name", [name for name in BAD_FRAMES if "selection" not in name and name != "no inputs"]
)
def test_a_reset_frame_that_is_refused_as_a_whole(served: Served, pair: tuple[str, str], name: str) -> None:
    changes, words = BAD_FRAMES[name]
    names = dict(zip("AB", pair, strict=True))
    fields: dict[str, Any] = {"session_ids": ["A", "B"], "inputs": ones(3, 3)} | changes
    fields["session_ids"] = [names.get(one, one) for one in fields["session_ids"]]
    inputs = fields.pop("inputs")
    values = np.repeat(inputs[:, :1], 8, axis=1)
    fields["state"] = [tensor(values, "lstm/h"), tensor(values, "lstm/c")]
    words = words.split("(")[0].replace("must have shape ", "")  # the shapes are those of states
    with served.nothing_changes(*pair):
        frame = pb.StepStreamRequest(frame_id=4, reset=pb.ResetFrame(**fields))
        refusal_of(served.wire.exchange(frame)).expect("INVALID_ARGUMENT", "INVALID_INPUT", words)


def test_a_frame_without_a_change(served: Served) -> None:
    with served.nothing_changes():
        (answer,) = served.wire.exchange(pb.StepStreamRequest(frame_id=2**64 - 1))
        assert answer.frame_id == 2**64 - 1
        refusal_of([answer]).expect(
            "INVALID_ARGUMENT", "INVALID_INPUT", "change must be step or reset; got neither"
        )


def test_a_frame_over_sessions_of_two_models(served: Served) -> None:
    with served.session("seq") as one, served.session("gru") as other, served.nothing_changes(one, other):
        for frame in (
            wire.step_frame(1, [one, other], [tensor(ones(2, 3))]),
            wire.reset_frame(1, [other, one]),
        ):
            refusal_of(served.wire.exchange(frame)).expect(
                "INVALID_ARGUMENT", "INVALID_INPUT", "session_ids must be sessions of one model"
            )


def test_frame_ids_are_not_reused_before_the_answer(served: Served) -> None:
    """The second frame is refused, the first is answered as if it were alone."""
    with served.session("seq", steps=0) as session_id, served.session("seq") as other:
        inputs = served.draw("seq", 1, 40_000)
        known = wire.data(served.predicted(session_id, inputs))
        with served.nothing_changes(other):
            answers = served.wire.exchange(
                wire.step_frame(7, [session_id], wire.tensors(inputs)),
                wire.step_frame(7, [other], [tensor(ones(1, 3))]),
            )
            refused, answered = answers
            refusal_of([refused]).expect(
                "INVALID_ARGUMENT", "INVALID_INPUT", "frame_id must not be that of an unanswered frame; got 7"
            )
            assert wire.data(answered.outputs) == known
        assert served.wire.session(session_id).revision == 1


def test_frame_ids_are_free_after_the_answer(served: Served) -> None:
    with served.session("seq", steps=0) as session_id, wire.Conversation(served.wire) as stream:
        for revision in (1, 2):
            stream.send(wire.step_frame(7, [session_id], [tensor(ones(1, 3))]))
            answer = stream.receive()
            assert (answer.frame_id, list(answer.revisions)) == (7, [revision])


# Members at fault beside good ones. A and B as above; "gone" is a session that is not there.
MEMBERS: dict[str, tuple[list[str], list[int], dict[str, Any], dict[int, tuple[str, ...]]]] = {
    "one is gone": (["A", "gone", "B"], [1, 2, 2], {}, {1: ("NOT_FOUND", "SESSION_NOT_FOUND", "'gone'")}),
    "the first is gone": (
        ["gone", "A", "B"],
        [3, 1, 2],
        {},
        {0: ("NOT_FOUND", "SESSION_NOT_FOUND", "'gone'")},
    ),
    "several are gone": (
        ["gone", "A", "gone too", "B", ""],
        [2, 1, 3, 2, 1],
        {},
        {
            0: ("NOT_FOUND", "SESSION_NOT_FOUND", "'gone'"),
            2: ("NOT_FOUND", "SESSION_NOT_FOUND", "'gone too'"),
            4: ("INVALID_ARGUMENT", "INVALID_INPUT", "session_id is missing"),
        },
    ),
    "one of another batch size": (
        ["A", "B"],
        [2, 2],
        {},
        {0: ("INVALID_ARGUMENT", "INVALID_INPUT", "batch_sizes must be the sessions' own;", "has 1, got 2")},
    ),
    "one at another revision": (
        ["A", "B"],
        [1, 2],
        {"expected_revisions": [9, 1], "request_ids": [5, 6]},
        {0: ("ABORTED", "REVISION_CONFLICT", "must be its revision 1; got 9")},
    ),
    "one that was never there and one at another revision": (
        ["B", "x\n" * 5_000, "A"],
        [2, 1, 1],
        {"expected_revisions": [0, 0, 1], "request_ids": [5, 6, 8]},
        {
            0: ("ABORTED", "REVISION_CONFLICT", "must be its revision 1; got 0"),
            1: ("NOT_FOUND", "SESSION_NOT_FOUND", "got 10000 characters"),
        },
    ),
}


@pytest.mark.parametrize("steps", [0, 4])
@pytest.mark.parametrize("name", MEMBERS)
def test_members_at_fault_beside_good_ones(
    served: Served, pair: tuple[str, str], name: str, steps: int
) -> None:
    ids, sizes, fields, failing = MEMBERS[name]
    names = dict(zip("AB", pair, strict=True))
    session_ids = [names.get(one, one) for one in ids]
    inputs = served.draw("seq", sum(sizes), steps)
    starts = np.cumsum([0, *sizes]).tolist()
    good = [i for i in range(len(ids)) if i not in failing]
    known = {i: _known(served, session_ids[i], inputs, starts[i], starts[i + 1]) for i in good}
    victims = [session_ids[i] for i in failing if ids[i] in names]
    with served.nothing_changes(*victims):
        frame = wire.step_frame(1, session_ids, wire.tensors(inputs), batch_sizes=sizes, **fields)
        answers = served.wire.exchange(frame)
    refusals = wire.of_members(answers, len(ids))
    assert sorted(refusals) == sorted(failing)
    for i, expected in failing.items():
        refusals[i].expect(*expected)
    found = wire.rows_of(answers, sizes)
    assert {i: found[i]["y"].tobytes() for i in good} == known


def _known(served: Served, session_id: str, inputs: dict[str, Array], start: int, end: int) -> bytes:
    outputs = served.predicted(session_id, {name: array[start:end] for name, array in inputs.items()})
    data: bytes = outputs[0].data
    return data


# A frame of one session goes a way of its own through the server; the session is one of two rows.
SINGLES: dict[str, tuple[dict[str, Any], str]] = {
    "two revisions": (
        {"expected_revisions": [1, 1]},
        "expected_revisions must be empty or one per session (1); got 2",
    ),
    "two request ids": ({"request_ids": [1, 2]}, "request_ids must be empty or one per session (1); got 2"),
    "two batch sizes": ({"batch_sizes": [1, 1]}, "batch_sizes must be empty or one per session (1); got 2"),
    "a batch size of 0": ({"batch_sizes": [0]}, "batch_sizes must be 1 to "),
    "another batch size": (
        {"batch_sizes": [3], "inputs": ones(3, 3)},
        "batch_sizes must be the sessions' own;",
    ),
    "another batch size than the rows": ({"batch_sizes": [3]}, "must have shape (3, 3) or (3, T, 3); got ("),
}


@pytest.mark.parametrize("rows", [1, 2])
@pytest.mark.parametrize("name", SINGLES)
def test_a_frame_of_one_session(served: Served, name: str, rows: int) -> None:
    changes, words = SINGLES[name]
    with served.session("seq", rows) as session_id, served.nothing_changes(session_id):
        fields: dict[str, Any] = {"inputs": ones(rows, 3)} | changes
        fields["inputs"] = [tensor(fields["inputs"])]
        answers = served.wire.exchange(wire.step_frame(1, [session_id], **fields))
        wire.of_members(answers, 1)[0].expect("INVALID_ARGUMENT", "INVALID_INPUT", words)


@pytest.mark.parametrize("count", [1, 2])
def test_an_id_that_is_missing(served: Served, count: int) -> None:
    """A frame of one session and one of several say what a unary call says."""
    ids = ["", "gone"][:count]
    reset = pb.StepStreamRequest(frame_id=2, reset=pb.ResetFrame(session_ids=ids))
    for frame in (wire.step_frame(1, ids, [tensor(ones(count, 3))], batch_sizes=[1] * count), reset):
        refusals = wire.of_members(served.wire.exchange(frame), count)
        refusals[0].expect("INVALID_ARGUMENT", "INVALID_INPUT", "session_id is missing; ")
        for i in range(1, count):
            refusals[i].expect("NOT_FOUND", "SESSION_NOT_FOUND", "'gone'")


def test_all_gone(served: Served) -> None:
    answers = served.wire.exchange(wire.step_frame(1, ["gone", "too"], [tensor(ones(9, 9))]))
    refusals = wire.of_members(answers, 2)
    for i, name in enumerate(("gone", "too")):
        refusals[i].expect("NOT_FOUND", "SESSION_NOT_FOUND", repr(name))


def test_rows_of_several_that_are_gone_must_be_said(served: Served, pair: tuple[str, str]) -> None:
    """Without batch_sizes it is only certain whose rows are whose if each of the gone had one."""
    with served.nothing_changes(*pair):
        frame = wire.step_frame(1, ["gone", pair[0], "too"], [tensor(ones(5, 3))])
        refusal_of(served.wire.exchange(frame)).expect(
            "INVALID_ARGUMENT", "INVALID_INPUT", "batch_sizes must be given", "'gone', 'too'"
        )


def test_a_frame_of_one_session_that_is_another_by_now(served: Served) -> None:
    """The rows suit what the client knows; the session has as many more."""
    with served.session("seq", 2) as session_id, served.nothing_changes(session_id):
        frame = wire.step_frame(1, [session_id], [tensor(ones(1, 3))], batch_sizes=[1])
        refusal = wire.of_members(served.wire.exchange(frame), 1)[0]
        refusal.expect(
            "INVALID_ARGUMENT", "INVALID_INPUT", "batch_sizes must be the sessions' own;", "has 2, got 1"
        )


def test_a_frame_of_one_session_that_says_its_batch_size(served: Served) -> None:
    for rows in (1, 2):
        with served.session("seq", rows) as session_id:
            frame = wire.step_frame(1, [session_id], [tensor(ones(rows, 3))], batch_sizes=[rows])
            (answer,) = served.wire.exchange(frame)
            assert list(answer.revisions) == [2]
