"""Which replicas a client takes for down, when it looks at them again, and how their sessions come back: by a clock of the test's own."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest

from stepwell import errors
from stepwell._base.flow import Notify
from stepwell._routing.lookup import Lookup
from stepwell._routing.ranking import key_of, keys_of
from stepwell._routing.replica import Replica
from stepwell._routing.router import LOOKUP_S, MAX_PROBE_S, PROBE_S, RETURN_S, Route, Router
from stepwell._transport.connecting import ConnectError
from stepwell._transport.retry import RepliesTooLargeError

REFUSED = ConnectError("Connection refused")
KEYS = keys_of([f"user-{i}" for i in range(2000)])


class At:
    """A router, its clock, and what it has told."""

    def __init__(self, *targets: str, draw: Any = max, hooks: Any = None) -> None:
        self.now_s = 100.0
        self.woken = 0
        self.dropped: list[Replica] = []
        self.router = Router(targets, lambda: self.now_s, watch=lambda _: self, draw=draw, hooks=hooks)

    def wake(self) -> None:
        self.woken += 1

    def drop(self, replica: Replica) -> None:
        self.dropped.append(replica)

    @property
    def a(self) -> Replica:
        return self.router.replicas[0]

    def shares(self) -> list[int]:
        replicas, of = self.router.choose_all(KEYS)
        counts = np.bincount(of, minlength=len(replicas))
        return [int(count) for count in counts]

    def check(self, error: errors.StepwellError | None = None) -> list[str]:
        """Look at what is due, with this outcome; which replicas were."""
        replicas, _ = self.router.due()
        for replica in replicas:
            self.router.checked(replica, error)
        return [replica.address for replica in replicas]


@pytest.fixture
def at() -> At:
    return At("a:1", "b:1", "c:1")


def test_a_refused_connection_moves_all_sessions_at_once(at: At) -> None:
    _, of = at.router.choose_all(KEYS)
    epoch = at.router.epoch
    assert at.router.failed(at.a, 0, REFUSED)
    assert at.a.is_down
    assert at.router.epoch > epoch
    assert (at.woken, at.shares()[0]) == (1, 0)
    _, now = at.router.choose_all(KEYS)
    moved = now != of
    assert np.array_equal(moved, of == 0)
    # again says nothing new
    epoch = at.router.epoch
    assert at.router.failed(at.a, at.a.generation, REFUSED)
    assert (at.router.epoch, at.woken) == (epoch, 1)


@pytest.mark.parametrize(
    ("error", "is_about_it"),
    [
        (errors.UnavailableError("stopping", reason="UNAVAILABLE"), True),
        (errors.UnavailableError("starting", reason="STARTING"), True),
        (errors.UnavailableError("Socket closed"), True),
        (errors.DeadlineExceededError("late"), False),
    ],
)
def test_what_is_not_clear_has_it_checked(at: At, error: errors.StepwellError, is_about_it: bool) -> None:
    assert at.router.failed(at.a, 0, error) is is_about_it
    assert not at.a.is_down
    assert at.check() == ["a:1"]
    assert not at.a.is_down
    # not more often than now and then
    at.router.failed(at.a, 0, error)
    assert at.check() == []
    at.now_s += 1
    assert at.check(errors.UnavailableError("no calls")) == ["a:1"]
    assert at.a.is_down


@pytest.mark.parametrize(
    "error",
    [
        errors.OverloadedError("too much"),
        RepliesTooLargeError.of(3, errors.UnavailableError("large")),
        errors.SessionNotFoundError("gone"),
        errors.InvalidInputError("wrong"),
    ],
)
def test_what_another_replica_would_not_do_either(at: At, error: errors.StepwellError) -> None:
    assert not at.router.failed(at.a, 0, error)
    assert at.check() == []


def test_a_replica_that_is_down_is_looked_at_ever_more_seldom(at: At) -> None:
    at.router.failed(at.a, 0, REFUSED)
    waits = []
    for _ in range(8):
        waits.append(round(at.router.wait_s(), 6))
        at.now_s += waits[-1]
        assert at.check(REFUSED) == ["a:1"]
    assert (waits[:3], waits[-1]) == ([PROBE_S, 2 * PROBE_S, 4 * PROBE_S], MAX_PROBE_S)


def test_a_replica_that_hangs_is_down_without_a_check(at: At) -> None:
    assert at.router.failed(at.a, 0, errors.UnavailableError("Stream removed (ping timeout)"))
    assert at.a.is_down


def test_delays_are_spread() -> None:
    early, late = At("a:1", "b:1", draw=min), At("a:1", "b:1", draw=max)
    for one in (early, late):
        one.router.failed(one.a, 0, REFUSED)
    assert early.router.wait_s() == late.router.wait_s() / 2


def test_a_replica_that_is_back_gets_its_sessions_in_parts(at: At) -> None:
    full = at.shares()
    at.router.failed(at.a, 0, REFUSED)
    at.now_s += 10
    assert at.check() == ["a:1"]
    assert not at.a.is_down
    shares = []
    for _ in range(9):
        shares.append(at.shares()[0])
        at.now_s += RETURN_S / 8
    assert 0 < shares[0] < full[0] / 4
    assert (shares, len(set(shares))) == (sorted(shares), 8)
    assert (at.shares(), at.router.wait_s()) == (full, math.inf)


def test_no_session_is_without_a_replica_while_one_is_back() -> None:
    at = At("a:1", "b:1")
    for replica in at.router.replicas:
        at.router.failed(replica, 0, REFUSED)
    assert sum(at.shares()) == len(KEYS)  # all are down: each is asked in its order
    at.now_s += 10
    replicas, _ = at.router.due()
    at.router.checked(replicas[0], None)
    at.router.checked(replicas[1], REFUSED)
    assert at.shares() == [len(KEYS), 0]


def test_what_was_begun_before_it_was_back_does_not_count(at: At) -> None:
    old = at.a.generation
    at.router.failed(at.a, old, REFUSED)
    at.router.up(at.a)
    assert at.router.failed(at.a, old, REFUSED)
    assert not at.a.is_down


def drive(flow: Any, answer: Any = None) -> Any:
    """The result of a flow whose asks all have this answer."""
    try:
        flow.send(None)
        while True:
            flow.send(answer)
    except StopIteration as stop:
        return stop.value


def test_a_call_goes_from_replica_to_replica(at: At) -> None:
    key = key_of("user-7")
    route = Route(at.router, key)
    asked = []
    for left in (True, True, False):
        asked.append(drive(route.next()))
        assert drive(route.failed(errors.UnavailableError("stopping", reason="UNAVAILABLE"))) is left
    assert set(asked) == set(at.router.replicas)
    assert drive(route.next()) is asked[0]  # and from the beginning, after a pause


def test_of_those_that_are_down_each_is_asked_in_turn(at: At) -> None:
    for replica in at.router.replicas:
        at.router.failed(replica, 0, REFUSED)
    route = Route(at.router, key_of("user-7"))
    asked = []
    for _ in range(3):
        asked.append(drive(route.next()))
        assert drive(route.failed(REFUSED)) is False
    assert set(asked) == set(at.router.replicas)
    drive(route.next())
    route.answered()
    assert [replica.is_down for replica in at.router.replicas].count(False) == 1


def test_hooks_are_called_once() -> None:
    at = At("a:1", "b:1", hooks={"replica": [print]})
    at.router.failed(at.a, 0, REFUSED)
    at.router.up(at.a)
    told = list(at.router.notifications())
    assert all(isinstance(each, Notify) for each in told)
    events: list[Any] = [each.event for each in told if isinstance(each, Notify)]
    assert [(event.address, event.is_up, event.error) for event in events] == [
        ("a:1", False, REFUSED),
        ("a:1", True, None),
    ]
    assert list(at.router.notifications()) == []


def test_why_they_are_down_is_said_of_several(at: At) -> None:
    at.router.failed(at.a, 0, REFUSED)
    assert at.router.reasons() == ""
    at.router.failed(at.router.replicas[1], 0, ConnectError("it says nothing"))
    assert at.router.reasons() == "a:1: Connection refused; b:1: it says nothing"


# Names.


@pytest.fixture
def named() -> At:
    at = At("dns:///h.example:7")
    flow = at.router.ready()
    assert next(flow) == Lookup("h.example", 7)
    with pytest.raises(StopIteration):
        flow.send(["10.0.0.1:7", "[::1]:7"])
    return at


def test_each_address_of_a_name_is_a_replica(named: At) -> None:
    assert [(one.address, one.host, one.authority) for one in named.router.replicas] == [
        ("10.0.0.1:7", "h.example", "h.example:7"),
        ("[::1]:7", "h.example", "h.example:7"),
    ]
    assert list(named.router.ready()) == []


def test_a_name_that_cannot_be_looked_up_is_a_connection_that_cannot_be_made() -> None:
    flow = At("dns:///h.example:7").router.ready()
    next(flow)
    with pytest.raises(ConnectError):
        flow.throw(ConnectError("no such name"))
    # one address is enough
    flow = At("dns:///h.example:7", "b:1").router.ready()
    assert list(flow) == []


def test_a_name_is_looked_up_again_now_and_then(named: At) -> None:
    named.router.choose(1)
    assert (named.woken, named.router.due()) == (0, ([], []))
    named.now_s += LOOKUP_S
    named.router.choose(1)
    assert named.woken == 1
    _, (name,) = named.router.due()
    assert named.router.due() == ([], [])
    kept = named.a
    named.router.found(name, ["10.0.0.1:7", "10.0.0.2:7"])
    assert [one.address for one in named.router.replicas] == ["10.0.0.1:7", "10.0.0.2:7"]
    assert named.a is kept
    # the new one gets its sessions in parts, and the old one's connection ends one look later
    assert named.shares()[1] < len(KEYS) / 8
    assert named.dropped == []
    named.now_s += LOOKUP_S
    _, (name,) = named.router.due()
    named.router.found(name, ["10.0.0.1:7", "10.0.0.2:7"])
    assert [one.address for one in named.dropped] == ["[::1]:7"]


def test_a_name_is_looked_up_again_where_a_replica_of_it_is_down(named: At) -> None:
    named.router.failed(named.a, 0, REFUSED)
    named.now_s += 1
    _, (name,) = named.router.due()
    named.router.not_found(name)  # what was known stays
    assert (len(named.router.replicas), named.router.due()[1]) == (2, [])
    named.now_s += 2
    assert named.router.due()[1] == [name]
