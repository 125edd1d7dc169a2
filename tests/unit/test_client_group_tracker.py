"""Groups, sub-groups and handles of members share what is known of the members, what is pending and whose turn it is."""

from __future__ import annotations

import asyncio
import threading

import numpy as np
import pytest

from stepwell._batching.frames import Change, Frame, Gathered, Part
from stepwell._core.group_tracker import GroupTracker, MemberTracker
from stepwell._core.locks import Holder, Locks, Some, TaskHolder, ThreadHolder
from stepwell._state.arguments import pack_inputs
from stepwell._transport.retry import Deadline
from stepwell.errors import RevisionConflictError, StepwellError, UnavailableError
from stepwell.v1 import sessions_pb2
from support.sdk.scripted_model import in_full, message_of

ALL = np.arange(3)
WAIT_S = 100.0


def conflict() -> RevisionConflictError:
    return RevisionConflictError("revision is 5", expected=4, actual=5, reason="REVISION_CONFLICT")


@pytest.fixture
def tracker() -> GroupTracker:
    return GroupTracker("m", "f", 1, ["a", "b", "c"])


def sent(frame: Frame) -> sessions_pb2.StepFrame:
    step: sessions_pb2.StepFrame = in_full(message_of(frame, 1, Deadline(1.0))).step
    return step


def wide(value: float) -> Change:
    return Change("step", pack_inputs(np.full((3, 2), value), 3))


@pytest.mark.parametrize(
    ("value", "expected"), [(1, [0, 0, 0]), (2, [1, 0, 1])], ids=["the same change", "another change"]
)
def test_what_follows_a_change_that_failed_for_one_member(
    tracker: GroupTracker, value: int, expected: list[int]
) -> None:
    first = sent(tracker.begin(wide(1), ALL))
    fails(tracker, wide(1), {1: UnavailableError("lost")})
    assert tracker.revisions.tolist() == [1, 0, 1]
    again = sent(tracker.begin(wide(value), ALL))
    assert list(again.expected_revisions) == expected
    assert (list(again.request_ids) == list(first.request_ids)) is (value == 1)
    assert len({*again.request_ids, *first.request_ids}) == 3 * value


def test_group_change_of_some_members(tracker: GroupTracker) -> None:
    some = np.array([2, 0])
    frame = message_of(tracker.begin(Change("reset", ()), some), 1, Deadline(1.0)).reset
    assert list(frame.session_ids) == ["c", "a"]
    result = Gathered(2, 1)
    result.add(Part(np.array([0, 1]), np.array([8, 9], np.uint64), np.zeros(2, np.uint64), {}, {}))
    tracker.settle(some, result)
    assert tracker.revisions.tolist() == [9, 0, 8]


def fails(
    tracker: GroupTracker, change: Change, failures: dict[int, StepwellError]
) -> dict[int, StepwellError]:
    """Make a change that fails for these; what their callers get."""
    tracker.begin(change, ALL)
    result = Gathered(3, 1)
    applied = np.array([i for i in range(3) if i not in failures], np.intp)
    ones = np.ones(len(applied), np.uint64)
    result.add(Part(applied, ones, ones, {}, failures))
    tracker.settle(ALL, result)
    return result.failures


def test_a_conflict_of_a_member_with_its_own_group_says_so(tracker: GroupTracker) -> None:
    lost = {0: UnavailableError("lost"), 1: UnavailableError("full", outcome="not_applied")}
    assert fails(tracker, wide(1), dict(lost)) == lost
    shown = fails(tracker, wide(2), {0: conflict(), 1: conflict(), 2: conflict()})
    assert str(shown[0]).startswith("revision is 5; an earlier change of this handle")
    assert "refresh()" in str(shown[0])
    assert isinstance(shown[0], RevisionConflictError)
    assert (shown[0].expected, shown[0].actual, shown[0].reason) == (4, 5, "REVISION_CONFLICT")
    assert [str(shown[i]) for i in (1, 2)] == ["revision is 5"] * 2
    # it stays so until the tracker is right again
    assert "refresh()" in str(fails(tracker, wide(3), {0: conflict()})[0])
    tracker.refresh(ALL, *np.zeros((3, 3), np.uint64))
    assert str(fails(tracker, wide(4), {0: conflict()})[0]) == "revision is 5"


def test_a_groups_change_that_nobody_settled_is_in_doubt(tracker: GroupTracker) -> None:
    tracker.begin(Change("reset", ()), np.array([2, 0]))  # cancelled
    shown = fails(tracker, wide(1), {i: conflict() for i in range(3)})
    assert ["refresh()" in str(shown[i]) for i in range(3)] == [True, False, True]


def test_an_answered_change_of_a_group_leaves_no_doubt(tracker: GroupTracker) -> None:
    fails(tracker, wide(1), {0: UnavailableError("lost")})
    fails(tracker, wide(1), {})
    assert str(fails(tracker, wide(2), {0: conflict()})[0]) == "revision is 5"


def some(value: float, rows: int) -> Change:
    return Change("step", pack_inputs(np.full((rows, 2), value), rows))


def lose(tracker: GroupTracker, change: Change, members: list[int]) -> list[int]:
    """Make a change whose answer is lost; the request ids with which it was sent."""
    where = np.array(members)
    frame = sent(tracker.begin(change, where))
    result = Gathered(len(members), 1)
    result.failures = {i: UnavailableError("lost", outcome="unknown") for i in range(len(members))}
    tracker.settle(where, result)
    return list(frame.request_ids)


def test_changes_of_different_members_are_pending_at_the_same_time(tracker: GroupTracker) -> None:
    first, second = lose(tracker, some(1, 1), [0]), lose(tracker, some(2, 2), [2, 1])
    assert (lose(tracker, some(1, 1), [0]), lose(tracker, some(2, 2), [2, 1])) == (first, second)
    assert lose(tracker, some(2, 2), [1, 2]) != second, "its rows are those of others"


def test_another_change_of_one_member_ends_what_was_pending_for_all_of_its_members(
    tracker: GroupTracker,
) -> None:
    first = lose(tracker, wide(1), [0, 1, 2])
    member = MemberTracker(tracker, 1)
    member.begin(some(3, 1))
    member.applied(7, 9)
    again = sent(tracker.begin(wide(1), ALL))
    assert not set(again.request_ids) & set(first)
    assert list(again.expected_revisions) == [0, 7, 0]


def test_a_member_is_tracked_with_its_group(tracker: GroupTracker) -> None:
    member, other = MemberTracker(tracker, 1), MemberTracker(tracker, 1)
    request_id = member.begin(some(1, 1)).request_id
    assert other.begin(some(1, 1)).request_id == request_id, "another handle finishes the same change"
    assert lose(tracker, some(1, 1), [1]) == [request_id]
    shown = other.failed(conflict())
    assert "refresh()" in str(shown)
    other.applied(4, 6)
    assert (tracker.revisions.tolist(), tracker.positions.tolist()) == ([0, 4, 0], [0, 6, 0])
    assert (member.revision, member.position) == (4, 6)
    assert str(fails(tracker, wide(1), {1: conflict()})[1]) == "revision is 5"
    member.refresh(sessions_pb2.Session(session_id="b", revision=8))
    assert tracker.revisions[1] == 8
    assert other.begin(some(1, 1)).request_id != request_id


def test_one_number_stands_for_those_of_all_members_where_they_are_alike(tracker: GroupTracker) -> None:
    first = message_of(tracker.begin(wide(1), ALL), 1, Deadline(1.0)).step
    assert list(first.session_ids) == ["a", "b", "c"]
    assert (first.batch_size, list(first.batch_sizes)) == (1, [])
    assert (first.expected_revision, list(first.expected_revisions)) == (0, [])
    assert first.request_id_base
    assert not first.request_ids
    MemberTracker(tracker, 1).applied(7, 9)
    again = message_of(tracker.begin(wide(2), ALL), 2, Deadline(1.0)).step
    assert list(again.expected_revisions) == [0, 7, 0]
    assert not again.HasField("expected_revision")
    alone = message_of(tracker.begin(some(3, 1), np.array([1])), 3, Deadline(1.0)).step
    assert (list(alone.expected_revisions), len(alone.request_ids)) == ([7], 1)


class Named(Holder):
    """A holder that notes when it is woken."""

    def __init__(self, name: str, members: Some, woken: list[str]) -> None:
        self.members, self.is_holding = members, False
        self._name, self._woken = name, woken

    def prepare(self) -> None:
        pass

    def wake(self) -> None:
        self._woken.append(self._name)


def are_free(locks: Locks, members: slice) -> bool:
    holder = Named("", members, [])
    is_free = locks.acquire(holder)
    locks.release(holder)
    return is_free


def test_locks_are_acquired_in_order_and_only_changes_of_the_same_members_wait() -> None:
    locks, woken = Locks(4), list[str]()
    first, last = Named("first", np.array([0, 1]), woken), Named("last", slice(3, 4), woken)
    assert locks.acquire(first)
    assert locks.acquire(last)
    everyone = Named("all", slice(0, 4), woken)
    assert not locks.acquire(everyone)
    one = Named("2", slice(2, 3), woken)
    assert not locks.acquire(one), "those who came before are not overtaken for ever"
    locks.release(first)
    locks.release(first)
    assert woken == []
    locks.release(last)
    assert woken == ["all"]
    locks.release(first)
    assert woken == ["all"], "what is over releases nobody else's locks"
    locks.release(everyone)
    assert woken == ["all", "2"]
    locks.release(one)
    assert are_free(locks, slice(0, 4)), "who gives up in the moment of waking releases the locks"


def test_a_cancelled_request_frees_those_behind_it() -> None:
    locks, woken = Locks(2), list[str]()
    assert locks.acquire(Named("0", slice(0, 1), woken))
    everyone = Named("all", slice(0, 2), woken)
    assert not locks.acquire(everyone)
    assert not locks.acquire(Named("1", slice(1, 2), woken))
    locks.release(everyone)
    assert woken == ["1"]


def test_a_thread_waits_for_the_locks_of_its_members() -> None:
    locks = Locks(3)
    ours, theirs, others = ThreadHolder(slice(0, 2)), ThreadHolder(ALL), ThreadHolder(slice(2, 3))
    assert locks.acquire(ours)
    assert locks.acquire(others)
    late = ThreadHolder(ALL)
    assert not locks.acquire(late)
    assert not late.wait(0)
    locks.release(late)
    got = threading.Event()

    def wait() -> None:
        assert not locks.acquire(theirs)
        queued.set()
        assert theirs.wait(WAIT_S)
        got.set()

    queued = threading.Event()
    waiting = threading.Thread(target=wait)
    waiting.start()
    assert queued.wait(WAIT_S)
    locks.release(others)
    locks.release(ours)
    assert got.wait(WAIT_S)
    waiting.join()
    locks.release(theirs)
    assert are_free(locks, slice(0, 3))


async def test_a_task_that_is_cancelled_while_it_waits_gives_way() -> None:
    locks = Locks(2)
    first, both = TaskHolder(slice(0, 1)), TaskHolder(slice(0, 2))
    assert locks.acquire(first)
    assert not locks.acquire(both)
    waiting = asyncio.create_task(both.wait())
    await asyncio.sleep(0)
    waiting.cancel()
    await asyncio.gather(waiting, return_exceptions=True)
    locks.release(first)
    assert not are_free(locks, slice(0, 1))
    locks.release(both)
    assert are_free(locks, slice(0, 2))
