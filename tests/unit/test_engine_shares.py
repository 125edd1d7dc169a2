"""Whose turn it is on the event loop, and who has the threads next."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import AsyncIterator, Callable

import pytest

from stepwell_server.core.scheduler import CREDIT_S, LoopQueue, Share, Shares
from stepwell_server.engine.threads import ACTIVE_S, MIN_PASS_S, Then, Threads
from support.clock import ManualClock
from support.engine.fake_executor import WAIT_S

pytestmark = pytest.mark.stores("memory")


def busy(seconds: float) -> None:
    """Use the event loop, or a thread, for some time."""
    until = time.perf_counter() + seconds
    while time.perf_counter() < until:
        pass


def loop_queue() -> LoopQueue:
    """Of the running event loop."""
    return LoopQueue(asyncio.get_running_loop().call_soon)


def shares_of(clock: ManualClock, queue: LoopQueue | None = None) -> Shares:
    """Shares of models that do not raise."""

    def raised(_model: str, error: Exception) -> None:
        raise error

    return Shares(clock.monotonic, queue or loop_queue(), raised)


class Flood:
    """Models that always have more to do, on an event loop whose time is that of their turns."""

    def __init__(self) -> None:
        self.clock = ManualClock()
        self.shares = shares_of(self.clock)
        self.turns: list[str] = []
        """Whose they were."""
        self._enough = 0
        self._ended = asyncio.Event()

    def add(self, label: str, seconds: float) -> Share:
        """One whose turns take so long."""
        share = Share(self.shares, label)

        def turn() -> bool:
            self.turns.append(label)
            self.clock.advance(seconds)
            if len(self.turns) == self._enough:
                self._ended.set()
            return len(self.turns) < self._enough

        share.listen(turn)
        return share

    async def run(self, *shares: Share, turns: int) -> list[str]:
        """So many turns, from when these are rung, too, until all have ended."""
        self.turns, self._enough = [], turns
        self._ended.clear()
        for share in shares:
            share.ring()
        await asyncio.wait_for(self._ended.wait(), WAIT_S)
        return self.turns


async def test_however_often_it_is_rung_there_is_one_turn_between_two_looks_at_the_network() -> None:
    turns: list[int] = []
    shares = shares_of(ManualClock())
    share = Share(shares, "m")

    def turn() -> bool:
        turns.append(1)
        share.ring()  # it says nothing
        return True  # there is always more to do

    share.listen(turn)
    share.ring()
    for _ in range(5):  # as a front does with what has come
        share.ring()
        shares.run_next()
    turns.clear()
    for _ in range(10):
        await asyncio.sleep(0)
    assert len(turns) == 10
    share.leave()


async def test_what_is_done_in_a_turn_needs_no_other() -> None:
    turns: list[int] = []
    share = Share(shares_of(ManualClock()), "m")

    def turn() -> bool:
        turns.append(1)
        share.ring()
        return False

    share.listen(turn)
    share.ring()
    for _ in range(5):
        await asyncio.sleep(0)
    assert turns == [1]
    assert not share.is_due


async def test_models_have_the_event_loop_for_equal_times_however_long_their_turns_are() -> None:
    flood = Flood()
    turns = await flood.run(flood.add("long", CREDIT_S), flood.add("short", CREDIT_S / 8), turns=900)
    assert turns.count("long") == pytest.approx(100, abs=2)


async def test_who_comes_anew_is_before_all_that_had_turns_and_has_no_credit_for_the_past() -> None:
    flood = Flood()
    models = [flood.add(name, CREDIT_S) for name in "abcdefgh"]
    late = flood.add("late", CREDIT_S)
    await flood.run(*models, turns=80)
    turns = await flood.run(*models, late, turns=90)
    assert turns.index("late") <= 1, "it need not wait for a whole round"
    assert turns.count("late") == pytest.approx(10, abs=1), "nor does it catch up"


async def test_one_model_runs_between_two_looks_at_the_network() -> None:
    flood = Flood()
    for name in "abcd":
        flood.add(name, CREDIT_S / 8).ring()
    for count in range(1, 5):
        await asyncio.sleep(0)
        assert len(flood.turns) == count


async def test_who_has_left_has_no_turn() -> None:
    flood = Flood()
    share = flood.add("gone", 0)
    share.ring()
    share.leave()
    share.ring()
    for _ in range(5):
        await asyncio.sleep(0)
    assert flood.turns == []


@pytest.fixture
async def threads() -> AsyncIterator[Threads]:
    """One thread."""
    threads = Threads(1)
    yield threads
    threads.close()


class Gate:
    """Keeps a thread busy until it is opened."""

    def __init__(self) -> None:
        self.begun, self.opened = threading.Event(), threading.Event()

    def piece(self) -> None:
        self.begun.set()
        assert self.opened.wait(WAIT_S)


async def test_the_thread_goes_to_the_model_that_has_used_it_least(threads: Threads) -> None:
    shares, order, ended = shares_of(ManualClock()), list[str](), threading.Event()
    first, much, little = (Share(shares, name) for name in ("first", "much", "little"))

    def piece(name: str, seconds: float, then: Then = None) -> Callable[[], Then]:
        def run() -> Then:
            order.append(name)
            busy(seconds)
            return then

        return run

    threads.run(much, [piece("much", 0.02, ended.set)], 0.02, 0.0)
    assert await asyncio.to_thread(ended.wait, WAIT_S)
    gate, last = Gate(), threading.Event()
    threads.run(first, [gate.piece], 1.0, 0.0)
    assert await asyncio.to_thread(gate.begun.wait, WAIT_S)
    threads.run(much, [piece("much", 0, last.set), piece("much", 0)], 0.02, 0.0)
    threads.run(little, [piece("little", 0)], 0.02, 0.0)
    order.clear()
    gate.opened.set()
    assert await asyncio.to_thread(last.wait, WAIT_S)
    assert order[0] == "little", "it came last, and has used least"


async def test_a_thread_calls_after_some_time_unless_it_is_told_not_to(threads: Threads) -> None:
    called, never, last = threading.Event(), threading.Event(), threading.Event()
    threads.wake(1e-4, called.set)
    assert await asyncio.to_thread(called.wait, WAIT_S)
    threads.wake(WAIT_S, never.set).set()
    threads.wake(1e-4, last.set)  # the only thread has nothing else to wait for
    assert await asyncio.to_thread(last.wait, WAIT_S / 2)
    assert not never.is_set()


def no_piece() -> None:
    """Nothing to do."""


async def test_passes_are_short_while_other_models_have_theirs_on_threads(threads: Threads) -> None:
    shares = shares_of(ManualClock())
    one, other = Share(shares, "one"), Share(shares, "other")
    assert threads.max_s(one, 0.0) is None
    threads.run(one, [no_piece], 0.1, 0.0)
    assert threads.max_s(one, 0.0) is None, "it is alone"
    threads.run(other, [no_piece], MIN_PASS_S / 2, 0.0)
    assert threads.max_s(one, 0.0) == MIN_PASS_S
    threads.run(other, [no_piece], 0.03, 0.0)
    assert threads.max_s(one, 0.0) == 0.03, "as long as the other's, which waits no longer than for its own"
    assert threads.max_s(other, 0.0) == 0.1
    assert threads.max_s(one, 9.0) == 0.03, "it is under way"
    threads.ended(other, 10.0)
    threads.ended(one, 10.0)
    assert threads.max_s(one, 10.0 + ACTIVE_S) == 0.03
    assert threads.max_s(one, 10.0 + 2 * ACTIVE_S) is None


async def test_a_model_that_is_gone_is_no_company(threads: Threads) -> None:
    shares = shares_of(ManualClock())
    one, other = Share(shares, "one"), Share(shares, "other")
    threads.run(one, [no_piece], 0.1, 0.0)
    threads.run(other, [no_piece], 0.1, 0.0)
    threads.ended(other, 0.0)
    threads.forget(other)
    assert threads.max_s(one, 0.0) is None


async def test_a_turn_of_the_event_loop_has_one_part_of_large_work() -> None:
    turns, order = loop_queue(), list[str]()

    def ask(name: str, left: int) -> None:
        def work() -> None:
            order.append(name)
            if left > 1:
                ask(name, left - 1)

        turns.add((name,), work)

    for name in "abc":
        ask(name, 3)
    for count in range(1, 10):
        await asyncio.sleep(0)
        assert len(order) == count
    assert order == list("abcabcabc")
    await asyncio.sleep(0)
    assert len(order) == 9


async def test_large_work_goes_on_after_a_defect() -> None:
    turns, after, told = loop_queue(), asyncio.Event(), list[str]()
    loop = asyncio.get_running_loop()
    loop.set_exception_handler(lambda _, context: told.append(str(context["exception"])))

    def broken() -> None:
        raise RuntimeError("a defect")

    turns.add(("a",), broken)
    turns.add(("a",), after.set)
    await after.wait()
    assert told == ["a defect"]


async def test_models_have_their_turns_among_other_large_work() -> None:
    turns, order = loop_queue(), list[str]()
    shares = shares_of(ManualClock(), turns)
    share = Share(shares, "m")

    def run() -> bool:
        order.append("pass")
        return True

    def other() -> None:
        order.append("other")
        turns.add(("other",), other)

    share.listen(run)
    share.ring()
    turns.add(("other",), other)
    for count in range(1, 9):
        await asyncio.sleep(0)
        assert len(order) == count
    assert order == ["pass", "other"] * 4
    shares.run_next()
    assert order[8:] == ["pass"]
    share.leave()
