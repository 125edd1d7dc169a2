"""Arrivals over the wire: connections alternate, and arrivals of a connection keep their order."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st

from stepwell_server.rpc.fronts.arrivals import LARGE, Arrivals, Kind
from support.clock import ManualClock

Made = tuple[Kind, frozenset[str], int, int]
"""What it is, over which connections, its size, its number."""


class Wire:
    """Arrivals whose tasks look in the next iteration of an event loop, which has one part of large work, too."""

    def __init__(self) -> None:
        self.done: list[Made] = []
        self.looking: list[str] = []
        self.clock = ManualClock()
        self.parts: deque[tuple[Kind, Callable[[], None]]] = deque()
        self.arrivals = Arrivals(
            self._do, lambda kind, _, part: self.parts.append((kind, part)), self.clock.monotonic
        )
        self.count = 0

    def _do(self, what: Made) -> None:
        self.done.append(what)
        if what[0] is Kind.TASK:
            (peer,) = what[1]
            self.arrivals.task_started(peer)
            self.looking.append(peer)
        elif what[0] is Kind.BATCH:
            assert what[1].isdisjoint(self.looking), "it overtook what a task has not looked at"

    def add(self, kind: Kind, peers: Sequence[str], size: int = 1, *, is_all: bool = False) -> None:
        self.count += 1
        what = (kind, frozenset(peers), size, self.count)
        self.arrivals.add(kind, peers, what, size, is_all=is_all)

    def seen(self) -> list[int]:
        """The numbers of what is done before anything that is large."""
        looking, self.looking = self.looking, []
        for peer in looking:
            self.arrivals.task_ended(peer)
        before = len(self.done)
        self.arrivals.run_due()
        return [what[3] for what in self.done[before:]]

    def turn(self) -> list[int]:
        """The numbers of what is done in an iteration of the event loop."""
        seen, before = self.seen(), len(self.done)
        if self.parts:
            self.parts.popleft()[1]()
            self.arrivals.run_due()
        return seen + [what[3] for what in self.done[before:]]


def test_a_lone_connection_does_not_wait() -> None:
    wire = Wire()
    for _ in range(5):
        wire.add(Kind.TASK, "a")
    assert wire.seen() == [1, 2, 3, 4, 5]
    for _ in range(3):
        wire.add(Kind.BATCH, "a", 1000)
    assert wire.seen() == [6, 7, 8], "the tasks have looked"
    assert not wire.arrivals.is_contended


def test_what_happens_to_a_call_makes_no_connection_active() -> None:
    wire = Wire()
    for _ in range(3):
        wire.add(Kind.BATCH, "a", LARGE, is_all=True)
        wire.add(Kind.EVENT, "b", is_all=True)  # such as the end of a write to a watch
        assert not wire.arrivals.is_contended
    assert [number for _, _, _, number in wire.done] == [1, 2, 3, 4, 5, 6], "nothing waits"
    wire.add(Kind.TASK, "b")
    assert wire.arrivals.is_contended


def test_tasks_of_a_connection_start_gradually() -> None:
    wire = Wire()
    for _ in range(100):
        wire.add(Kind.TASK, "a")
    assert len(wire.seen()) == 32
    assert len(wire.parts) == 1


def test_a_lone_arrival_runs_at_once_unless_others_are_queued() -> None:
    wire = Wire()
    wire.add(Kind.BATCH, "a", LARGE, is_all=True)
    wire.add(Kind.TASK, "a", is_all=True)
    assert [what[3] for what in wire.done] == [1, 2]
    wire.add(Kind.BATCH, "a", is_all=True)
    assert len(wire.done) == 2, "a task has to look first"
    wire.turn()
    wire.add(Kind.BATCH, "b", is_all=True)
    assert len(wire.done) == 3, "others are active"
    assert wire.turn() == [4]


def test_large_batches_and_calls_run_one_per_iteration_and_small_batches_at_once() -> None:
    wire = Wire()
    for _ in range(20):
        wire.add(Kind.TASK, ("flood",))
    wire.add(Kind.BATCH, "b")
    wire.add(Kind.TASK, "c")
    assert wire.arrivals.is_contended
    assert wire.seen() == [21], "a plain step does not wait for calls"
    assert [wire.turn() for _ in range(3)] == [[1], [22], [2]], "and a call of another for one of them"
    for _ in range(4):
        wire.add(Kind.BATCH, ("other",), LARGE)
    wire.add(Kind.BATCH, "b")
    assert wire.seen() == [27]
    assert {kind for kind, _ in wire.parts} == {Kind.TASK, Kind.BATCH}


def test_arrivals_after_a_defect_run() -> None:
    wire = Wire()
    wire.arrivals.hold({"a"})
    for kind in (Kind.BATCH, Kind.EVENT):
        wire.add(kind, "a")
    wire.arrivals.release({"a"})
    wire.looking.append("a")  # a batch must not come now
    with pytest.raises(AssertionError):
        wire.arrivals.run_due()
    assert wire.arrivals.due
    wire.arrivals.run_due()
    assert [what[3] for what in wire.done] == [1, 2]


@given(
    st.lists(
        st.tuples(
            st.sampled_from(Kind),
            st.sets(st.sampled_from("abcd"), min_size=1),
            st.sampled_from([1, LARGE]),
            st.booleans(),
        ),
        max_size=40,
    ),
    st.integers(1, 7),
)
def test_arrivals_of_a_connection_keep_their_order_and_all_run(
    asked: list[tuple[Kind, set[str], int, bool]], at_once: int
) -> None:
    wire = Wire()
    for place, (kind, peers, size, is_all) in enumerate(asked):
        some = sorted(peers)[:1] if kind is not Kind.BATCH else sorted(peers)
        wire.add(kind, some, size, is_all=is_all)
        if place % at_once == 0:
            wire.turn()
    turns = 0
    while len(wire.done) < len(asked):
        wire.turn()
        turns += 1
        assert turns <= 3 * len(asked), "it goes on"
    assert sorted(what[3] for what in wire.done) == list(range(1, len(asked) + 1))
    for peer in "abcd":
        numbers = [what[3] for what in wire.done if peer in what[1]]
        assert numbers == sorted(numbers)


def test_arrivals_of_a_held_connection_wait_and_others_do_not() -> None:
    wire = Wire()
    wire.add(Kind.BATCH, "a", is_all=True)
    wire.arrivals.hold({"a"})
    wire.add(Kind.BATCH, "a", is_all=True)
    wire.add(Kind.TASK, "a")
    wire.add(Kind.EVENT, "a")
    wire.add(Kind.BATCH, "ab")
    wire.add(Kind.EVENT, "c")
    assert wire.turn() == [6]
    wire.arrivals.release({"a"})
    assert [number for _ in range(3) for number in wire.turn()] == [2, 3, 4, 5]
