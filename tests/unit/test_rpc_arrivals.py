"""What has come over the wire: connections take turns, and nothing of one overtakes."""

from __future__ import annotations

from collections.abc import Collection

import pytest
from hypothesis import given
from hypothesis import strategies as st

from stepwell_server.rpc.fronts.arrivals import LARGE, Arrivals, Kind
from support.clock import ManualClock

Made = tuple[Kind, frozenset[str], int, int]
"""What it is, over which connections, its size, its number."""


class Wire:
    """Arrivals whose tasks look in the next turn."""

    def __init__(self) -> None:
        self.done: list[Made] = []
        self.looking: list[str] = []
        self.whose: dict[str, tuple[str, str]] = {}
        self.clock = ManualClock()
        self.arrivals = Arrivals(self._do, self.clock.monotonic, lambda peer: self.whose.get(peer, ("", "")))
        self.count = 0
        self.was_large = False

    def _do(self, what: Made) -> None:
        self.done.append(what)
        if what[0] is Kind.TASK:
            (peer,) = what[1]
            self.arrivals.looking(peer)
            self.looking.append(peer)
        elif what[0] is Kind.BATCH:
            assert what[1].isdisjoint(self.looking), "it overtook what a task has not looked at"

    def add(self, kind: Kind, peers: Collection[str], size: int = 1, *, is_all: bool = False) -> None:
        self.count += 1
        what = (kind, frozenset(peers), size, self.count)
        self.arrivals.add(kind, peers, what, size, is_all=is_all)

    def turn(self, *, is_extra: bool = False) -> list[int]:
        """The numbers of what is done in a turn of the event loop."""
        looking, self.looking = self.looking, []
        for peer in looking:
            self.arrivals.looked(peer)
        before = len(self.done)
        self.was_large = self.arrivals.go_on(is_extra=is_extra)
        return [what[3] for what in self.done[before:]]


def test_who_is_alone_does_not_wait() -> None:
    wire = Wire()
    for _ in range(5):
        wire.add(Kind.TASK, "a")
    assert wire.turn() == [1, 2, 3, 4, 5]
    for _ in range(3):
        wire.add(Kind.BATCH, "a", 1000)
    assert wire.turn() == [6, 7, 8], "the tasks have looked"
    assert not wire.arrivals
    assert not wire.arrivals.has_company


def test_after_a_long_turn_connections_that_wait_still_take_turns() -> None:
    """Else all that waits would begin in one turn, which takes long, too: so it would go on for ever."""
    wire = Wire()
    for _ in range(100):
        wire.add(Kind.TASK, "a")
        wire.add(Kind.TASK, "b")
    wire.clock.advance(1.0)
    assert [len(wire.turn()) for _ in range(3)] == [1, 1, 1]


def test_the_tasks_of_one_connection_do_not_begin_all_in_one_turn() -> None:
    wire = Wire()
    for _ in range(100):
        wire.add(Kind.TASK, "a")
    assert [len(wire.turn()) for _ in range(4)] == [32, 32, 32, 4]


def test_what_comes_alone_is_done_at_once_unless_something_is_before_it() -> None:
    wire = Wire()
    wire.add(Kind.BATCH, "a", LARGE, is_all=True)
    wire.add(Kind.TASK, "a", is_all=True)
    assert [what[3] for what in wire.done] == [1, 2]
    wire.add(Kind.BATCH, "a", is_all=True)
    assert len(wire.done) == 2, "a task has to look first"
    wire.turn()
    wire.add(Kind.BATCH, "b", is_all=True)
    assert len(wire.done) == 3, "others are about"
    assert wire.turn() == [4]


def test_a_flood_of_calls_or_of_large_batches_is_done_a_little_at_a_time() -> None:
    wire = Wire()
    for _ in range(20):
        wire.add(Kind.TASK, ("flood",))
    wire.add(Kind.BATCH, "b")
    wire.add(Kind.TASK, "c")
    assert wire.arrivals.has_company
    assert wire.turn() == [1, 21], "a plain step does not wait for calls"
    assert wire.turn() == [22], "and a call of another for one of them"
    assert wire.turn() == [2]
    wire = Wire()
    for _ in range(4):
        wire.add(Kind.BATCH, ("flood",), LARGE)
    wire.add(Kind.BATCH, "b")
    assert wire.turn() == [1, 5]
    wire.add(Kind.BATCH, "b")
    assert sorted(wire.turn()) == [2, 6]


def test_large_batches_have_turns_of_their_own_while_others_are_about() -> None:
    wire = Wire()
    wire.add(Kind.BATCH, ("alone",), LARGE)
    assert wire.turn(is_extra=True) == [1]
    assert not wire.was_large, "nobody waits for it"
    wire.add(Kind.BATCH, ("flood",), LARGE)
    wire.add(Kind.BATCH, ("other",))
    wire.add(Kind.TASK, ("third",))
    assert wire.turn(is_extra=True) == [3, 4]
    assert not wire.was_large
    assert wire.turn() == [2]
    assert wire.was_large


@pytest.mark.parametrize("kind", [Kind.TASK, Kind.BATCH])
def test_tenants_take_turns_and_then_their_callers_however_many_connections_they_have(kind: Kind) -> None:
    wire = Wire()
    for place in range(6):
        for peer in ("greedy", "other"):
            wire.whose[f"{peer}-{place}"] = ("many", peer)
            wire.add(kind, (f"{peer}-{place}",), LARGE)
    wire.whose["few"] = ("few", "one")
    for _ in range(3):
        wire.add(kind, ("few",), LARGE)
    wire.add(kind, ("late",), LARGE)
    while wire.arrivals:
        assert len(wire.turn()) == 1
    order = [next(iter(what[1])) for what in wire.done]
    assert sorted(order[:3]) == ["few", "greedy-0", "late"], (
        "each tenant has its turn, and those that nobody knows"
    )
    assert [wire.whose.get(peer, ("late",))[0] for peer in order[3:7]] == ["many", "few"] * 2
    callers = [peer.partition("-")[0] for peer in order if "-" in peer]
    assert callers == ["greedy", "other"] * 6


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
def test_what_came_over_a_connection_stays_in_its_order_and_all_is_done(
    asked: list[tuple[Kind, set[str], int, bool]], at_once: int
) -> None:
    wire = Wire()
    for place, (kind, peers, size, is_all) in enumerate(asked):
        some = sorted(peers)[:1] if kind is not Kind.BATCH else sorted(peers)
        wire.add(kind, some, size, is_all=is_all)
        if place % at_once == 0:
            wire.turn()
    turns = 0
    while wire.arrivals:
        wire.turn()
        turns += 1
        assert turns <= 3 * len(asked), "it goes on"
    assert sorted(what[3] for what in wire.done) == list(range(1, len(asked) + 1))
    for peer in "abcd":
        numbers = [what[3] for what in wire.done if peer in what[1]]
        assert numbers == sorted(numbers)


def test_what_comes_over_a_held_connection_waits_and_other_connections_do_not() -> None:
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
