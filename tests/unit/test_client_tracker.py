"""The rule for a change whose answer is missing: the same again is the same change, another is another."""

from __future__ import annotations

import numpy as np

from stepwell._frames import Change, Frame, Gathered, Part
from stepwell._inputs import pack_inputs
from stepwell._retry import Deadline
from stepwell._tracker import GroupTracker, SessionTracker, new_request_ids
from stepwell.errors import RevisionConflictError, StepwellError, UnavailableError
from stepwell.v1 import sessions_pb2


def session() -> SessionTracker:
    return SessionTracker(sessions_pb2.Session(session_id="s", batch_size=1, revision=4))


def change(value: float, outputs: str = "all", dtype: str = "float32") -> Change:
    return Change("step", pack_inputs(np.full((1, 2), value, dtype), 1), outputs)


def test_same_change_keeps_its_request_id() -> None:
    tracker = session()
    first = tracker.begin(change(1))
    assert first != 0
    assert tracker.begin(change(1)) == first


def test_nan_is_the_same_as_itself() -> None:
    tracker = session()
    assert tracker.begin(change(np.nan)) == tracker.begin(change(np.nan))


def test_other_changes_get_another() -> None:
    tracker = session()
    ids = {tracker.begin(c) for c in (change(1), change(2), change(1, "last"), change(1, dtype="float64"))}
    reset = Change("reset", (), rows=(0,))
    ids |= {tracker.begin(reset), tracker.begin(Change("reset", ()))}
    assert len(ids) == 6


def test_an_answer_ends_the_change() -> None:
    tracker = session()
    first = tracker.begin(change(1))
    tracker.applied(5, 7)
    assert (tracker.revision, tracker.position) == (5, 7)
    assert tracker.begin(change(1)) != first


def test_refresh_drops_the_change() -> None:
    tracker = session()
    first = tracker.begin(change(1))
    tracker.refresh(sessions_pb2.Session(session_id="s", revision=9, position=3))
    assert (tracker.revision, tracker.position) == (9, 3)
    assert tracker.begin(change(1)) != first


def conflict() -> RevisionConflictError:
    return RevisionConflictError("revision is 5", expected=4, actual=5, reason="REVISION_CONFLICT")


def test_a_conflict_with_oneself_says_so() -> None:
    tracker = session()
    tracker.begin(change(1))  # cancelled: nobody says what became of it
    tracker.begin(change(2))
    told = tracker.failed(conflict())
    assert isinstance(told, RevisionConflictError)
    assert told.message.startswith("revision is 5; an earlier change of this handle")
    assert "refresh()" in str(told)
    assert (told.expected, told.actual, told.reason) == (4, 5, "REVISION_CONFLICT")
    # It stays so until the tracker is right again.
    tracker.begin(change(3))
    assert "refresh()" in str(tracker.failed(conflict()))
    tracker.refresh(sessions_pb2.Session(session_id="s", revision=5))
    tracker.begin(change(3))
    assert str(tracker.failed(conflict())) == "revision is 5"


def test_a_conflict_with_others_does_not() -> None:
    tracker = session()
    tracker.begin(change(1))
    assert str(tracker.failed(conflict())) == "revision is 5"
    tracker.begin(change(2))
    tracker.failed(UnavailableError("full", outcome="not_applied"))
    tracker.begin(change(3))
    assert str(tracker.failed(conflict())) == "revision is 5"


def test_a_change_of_unknown_outcome_is_in_doubt() -> None:
    tracker = session()
    tracker.begin(change(1))
    tracker.failed(UnavailableError("lost", outcome="unknown"))
    tracker.begin(change(2))
    assert "may have been applied" in str(tracker.failed(conflict()))


def test_changed_arrays_are_not_mistaken_for_the_old_ones() -> None:
    tracker = session()
    x = np.zeros((1, 2))
    first = tracker.begin(Change("step", pack_inputs(x, 1)))
    x += 1
    assert tracker.begin(Change("step", pack_inputs(x, 1))) != first


def test_request_ids_are_not_zero_and_differ() -> None:
    ids = new_request_ids(1000)
    assert len(set(ids.tolist())) == 1000
    assert ids.all()


def group() -> GroupTracker:
    return GroupTracker("m", "f", 1, ["a", "b", "c"])


def sent(frame: Frame) -> sessions_pb2.StepFrame:
    return frame.request(1, Deadline(1.0)).step


def wide(value: float) -> Change:
    return Change("step", pack_inputs(np.full((3, 2), value), 3))


def gathered(failed: set[int]) -> Gathered:
    result = Gathered(3, 1)
    applied = np.array([i for i in range(3) if i not in failed])
    ones = np.ones(len(applied), np.uint64)
    result.add(Part(applied, ones, ones, {}, {i: UnavailableError("lost") for i in failed}))
    return result


def test_group_takes_over_what_was_applied() -> None:
    tracker = group()
    tracker.begin(wide(1))
    tracker.settle(wide(1), gathered({1}))
    assert tracker.revisions.tolist() == [1, 0, 1]


def test_group_finishes_the_same_change_for_all_members() -> None:
    tracker = group()
    first = sent(tracker.begin(wide(1)))
    tracker.settle(wide(1), gathered({1}))
    again = sent(tracker.begin(wide(1)))
    assert list(again.request_ids) == list(first.request_ids)
    assert list(again.expected_revisions) == [0, 0, 0]


def test_group_sends_another_change_at_the_revisions_it_knows() -> None:
    tracker = group()
    first = sent(tracker.begin(wide(1)))
    tracker.settle(wide(1), gathered({1}))
    other = sent(tracker.begin(wide(2)))
    assert not set(other.request_ids) & set(first.request_ids)
    assert list(other.expected_revisions) == [1, 0, 1]


def test_group_change_of_some_members() -> None:
    tracker = group()
    change = Change("reset", (), rows=(2, 0))
    frame = tracker.begin(change).request(1, Deadline(1.0)).reset
    assert list(frame.session_ids) == ["c", "a"]
    result = Gathered(2, 1)
    result.add(Part(np.array([0, 1]), np.array([8, 9], np.uint64), np.zeros(2, np.uint64), {}, {}))
    tracker.settle(change, result)
    assert tracker.revisions.tolist() == [9, 0, 8]


def fails(
    tracker: GroupTracker, change: Change, failures: dict[int, StepwellError]
) -> dict[int, StepwellError]:
    """Make a change that fails for these; what their callers get."""
    tracker.begin(change)
    result = Gathered(3, 1)
    applied = np.array([i for i in range(3) if i not in failures], np.intp)
    ones = np.ones(len(applied), np.uint64)
    result.add(Part(applied, ones, ones, {}, failures))
    tracker.settle(change, result)
    return result.failures


def test_a_conflict_of_a_member_with_its_own_group_says_so() -> None:
    tracker = group()
    lost = {0: UnavailableError("lost"), 1: UnavailableError("full", outcome="not_applied")}
    assert fails(tracker, wide(1), dict(lost)) == lost
    told = fails(tracker, wide(2), {0: conflict(), 1: conflict(), 2: conflict()})
    assert str(told[0]).startswith("revision is 5; an earlier change of this handle")
    assert "refresh()" in str(told[0])
    assert isinstance(told[0], RevisionConflictError)
    assert (told[0].expected, told[0].actual, told[0].reason) == (4, 5, "REVISION_CONFLICT")
    assert [str(told[i]) for i in (1, 2)] == ["revision is 5"] * 2
    # it stays so until the tracker is right again
    assert "refresh()" in str(fails(tracker, wide(3), {0: conflict()})[0])
    tracker.refresh([sessions_pb2.Session(session_id=one) for one in tracker.ids])
    assert str(fails(tracker, wide(4), {0: conflict()})[0]) == "revision is 5"


def test_a_groups_change_that_nobody_settled_is_in_doubt() -> None:
    tracker = group()
    tracker.begin(Change("reset", (), rows=(2, 0)))  # cancelled
    told = fails(tracker, wide(1), {i: conflict() for i in range(3)})
    assert ["refresh()" in str(told[i]) for i in range(3)] == [True, False, True]


def test_an_answered_change_of_a_group_leaves_no_doubt() -> None:
    tracker = group()
    fails(tracker, wide(1), {0: UnavailableError("lost")})
    fails(tracker, wide(1), {})
    assert str(fails(tracker, wide(2), {0: conflict()})[0]) == "revision is 5"
