"""Which model is next on the event loop and on the threads, and how long a pass waits for callers."""

from __future__ import annotations

import asyncio
import dataclasses
import heapq
import random
import statistics
import threading
import time
from collections.abc import AsyncIterator, Callable
from typing import Any

import pytest

from stepwell_server.core.cost import Cost
from stepwell_server.core.scheduler import CREDIT_S, LoopQueue, Share, Shares
from stepwell_server.engine.passes.batching_window import BatchingWindow
from stepwell_server.engine.threads import ACTIVE_S, MIN_PASS_S, Then, Threads
from support.clock import ManualClock
from support.engine.fake_executor import PLAIN, WAIT_S
from support.engine.harness import FixedCost, Harness, running, x

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


async def test_a_model_is_alone_a_while_after_the_last_use_of_another() -> None:
    clock = ManualClock()
    shares = shares_of(clock)
    one, other = Share(shares, "one"), Share(shares, "other")

    def alone() -> tuple[bool, bool]:
        return one.is_alone(clock.monotonic()), other.is_alone(clock.monotonic())

    one.used(1e-3)
    assert alone() == (True, False)
    clock.advance(ACTIVE_S)
    one.used(1e-3)
    assert alone() == (True, False)
    other.listen(lambda: False)
    other.ring()
    shares.run_next()
    assert alone() == (False, False)
    clock.advance(ACTIVE_S)
    assert alone() == (True, True)


async def test_a_ring_from_within_a_finished_callback_calls_it_once() -> None:
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


async def test_a_share_that_left_is_not_called() -> None:
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


async def test_a_thread_calls_after_some_time_unless_it_is_cancelled(threads: Threads) -> None:
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


#: Of a wide model, in seconds: a pass, whatever its rows, and each row.
FIXED_S, EACH_S = 1.1e-3, 30e-6
MAX_ROWS = 512
START = PLAIN.initial[0].tobytes()
#: An alarm rings so much too late.
LATE_S = 60e-6

Back = Callable[[random.Random, int], float]
"""Seconds until the k-th of those that a pass has answered sends its next step."""


def one_by_one(first_s: float, each_s: float) -> Back:
    """A client that sends the next steps one after the other."""
    return lambda rng, k: first_s + each_s * k * rng.uniform(0.5, 1.5)


@dataclasses.dataclass
class Run:
    """What came of one."""

    steps: int = 0
    passes: int = 0
    waits: int = 0
    waited_s: float = 0.0
    latencies_s: list[float] = dataclasses.field(default_factory=list)

    @property
    def p50_s(self) -> float:
        return statistics.median(self.latencies_s)


class Simulation:
    """A server of one model, some callers that always have a next step, and steps that come by themselves."""

    def __init__(
        self,
        callers: int,
        back: Back,
        *,
        open_rate: float = 0.0,
        seed: int = 0,
        has_window: bool = True,
    ) -> None:
        self._rng = random.Random(seed)
        self._clock = ManualClock()
        self._back = back
        self._open_rate = open_rate
        self._cost = Cost(FIXED_S, EACH_S)
        self._window = BatchingWindow(MAX_ROWS, self._clock)
        self._has_window = has_window
        self._events: list[tuple[float, int, Callable[[], None]]] = []
        self._number = 0
        self._inbox: list[tuple[float, bool]] = []
        """When each came, and whether its caller will send another when it has its answer."""
        self._is_running = False
        self._began_to_wait: float | None = None
        self.run = Run()
        for _ in range(callers):
            self._after(self._rng.random() * 0.01, lambda: self._come(is_closed=True))
        if open_rate:
            self._after(self._rng.expovariate(open_rate), self._come_by_itself)

    def go_on(self, seconds: float, back: Back | None = None) -> Run:
        """What comes of so many seconds more; `back`: the callers are others from now on."""
        self._back = back or self._back
        self.run = Run()
        end = self._clock.monotonic() + seconds
        while self._events and self._events[0][0] <= end:
            at, _, what = heapq.heappop(self._events)
            self._clock.advance(at - self._clock.monotonic())
            what()
            self._turn()
        self._clock.advance(end - self._clock.monotonic())
        return self.run

    def _after(self, seconds: float, what: Callable[[], None]) -> None:
        self._number += 1
        heapq.heappush(self._events, (self._clock.monotonic() + seconds, self._number, what))

    def _come(self, *, is_closed: bool) -> None:
        self._inbox.append((self._clock.monotonic(), is_closed))

    def _come_by_itself(self) -> None:
        self._come(is_closed=False)
        self._after(self._rng.expovariate(self._open_rate), self._come_by_itself)

    def _turn(self) -> None:
        if self._is_running or not self._inbox:
            return
        now = self._clock.monotonic()
        if self._has_window and self._window.is_open:
            left_s = self._window.left_s(len(self._inbox))
            if left_s:
                if self._began_to_wait is None:
                    self._began_to_wait = now
                    self.run.waits += 1
                    self._after(left_s + LATE_S, lambda: None)
                return
        if self._began_to_wait is not None:
            self.run.waited_s += now - self._began_to_wait
            self._began_to_wait = None
        rows, self._inbox, self._is_running = self._inbox, [], True
        self._after(seconds := FIXED_S + EACH_S * len(rows), lambda: self._end(rows, seconds))

    def _end(self, rows: list[tuple[float, bool]], seconds: float) -> None:
        self._is_running = False
        self.run.passes += 1
        self.run.steps += len(rows)
        self.run.latencies_s += [self._clock.monotonic() - came for came, _ in rows]
        closed = sum(is_closed for _, is_closed in rows)
        for k in range(closed):
            self._after(self._back(self._rng, k), lambda: self._come(is_closed=True))
        self._window.answered(len(rows), len(self._inbox), self._cost, seconds)


def both(callers: int, back: Back, *, open_rate: float = 0.0, seed: int = 0) -> tuple[Run, Run]:
    """Two seconds without a window, and two with one."""
    without, with_one = (
        Simulation(callers, back, open_rate=open_rate, seed=seed, has_window=has).go_on(2.0)
        for has in (False, True)
    )
    return without, with_one


SEEDS = pytest.mark.parametrize("seed", range(2))


@SEEDS
@pytest.mark.parametrize("callers", [2, 8, 32])
def test_callers_that_come_back_soon_have_one_pass_and_not_two_halves(callers: int, seed: int) -> None:
    without, with_one = both(callers, one_by_one(60e-6, 10e-6), seed=seed)
    assert without.steps / without.passes < 0.7 * callers
    assert with_one.steps / with_one.passes > 0.9 * callers
    assert with_one.steps > 1.15 * without.steps
    assert with_one.p50_s < 0.9 * without.p50_s


@SEEDS
def test_a_few_that_come_late_do_not_keep_the_others_from_having_one_pass(seed: int) -> None:
    def back(rng: random.Random, k: int) -> float:
        return 3e-3 if rng.random() < 0.06 else 60e-6 + 10e-6 * k

    without, with_one = both(32, back, seed=seed)
    assert with_one.steps > 1.1 * without.steps
    assert with_one.p50_s < 0.9 * without.p50_s


NEVER_PAYS: dict[str, tuple[int, Back, float]] = {
    "a round trip as long as a pass": (32, one_by_one(1.2 * FIXED_S, 10e-6), 0.0),
    "round trips that are longer still": (32, lambda rng, _: rng.uniform(2e-3, 6e-3), 0.0),
    "more than can come in time": (256, one_by_one(60e-6, 22e-6), 0.0),
    "callers who think": (32, lambda rng, _: rng.expovariate(1 / 20e-3), 0.0),
    "steps that come by themselves": (0, one_by_one(0, 0), 2000.0),
    "many that come by themselves": (0, one_by_one(0, 0), 8000.0),
}


@SEEDS
@pytest.mark.parametrize("what", NEVER_PAYS)
def test_where_it_does_not_pay_it_is_tried_seldom_and_costs_next_to_nothing(what: str, seed: int) -> None:
    callers, back, open_rate = NEVER_PAYS[what]
    without, with_one = both(callers, back, open_rate=open_rate, seed=seed)
    assert with_one.waits < 0.03 * with_one.passes + 3
    assert with_one.waited_s < 0.01 * 2.0
    assert with_one.steps > 0.985 * without.steps
    assert with_one.p50_s < 1.02 * without.p50_s


@SEEDS
def test_a_lone_caller_never_waits(seed: int) -> None:
    _, with_one = both(1, one_by_one(60e-6, 0), seed=seed)
    assert with_one.passes > 1000
    assert with_one.waits == 0


@SEEDS
def test_callers_that_become_slow_are_given_up_soon_and_found_again_when_they_are_fast(seed: int) -> None:
    fast, slow = one_by_one(60e-6, 10e-6), one_by_one(1.5 * FIXED_S, 10e-6)
    simulation = Simulation(32, fast, seed=seed)
    simulation.go_on(1.0)
    first = simulation.go_on(0.1, slow)
    assert first.waited_s < 10 * FIXED_S
    later = simulation.go_on(3.0)
    assert later.waited_s < 0.01 * 3.0
    simulation.go_on(2.5, fast)  # it is tried again after 1,024 passes at most
    again = simulation.go_on(1.0)
    assert again.steps / again.passes > 0.9 * 32


# --- the rules, one by one ---


class Window:
    """A window after a pass whose callers are waited for."""

    def __init__(self, answered: int = 16, waiting: int = 16) -> None:
        self.clock = ManualClock()
        self.window = BatchingWindow(MAX_ROWS, self.clock)
        self.window.answered(answered, waiting, Cost(FIXED_S, EACH_S), 2 * FIXED_S)

    def left_s(self, waiting: int, **more: float) -> float:
        return self.window.left_s(waiting, **more)


def test_a_pass_waits_for_half_of_its_fixed_part_at_most() -> None:
    at = Window()
    assert at.left_s(16) == pytest.approx(FIXED_S / 2)
    at.clock.advance(FIXED_S / 4)
    assert at.left_s(20) == pytest.approx(FIXED_S / 4)
    at.clock.advance(FIXED_S / 4)
    assert at.left_s(21) == 0
    assert not at.window.is_open


def test_it_begins_at_once_when_all_that_are_waited_for_are_there() -> None:
    at = Window()
    assert at.left_s(16) > 0
    assert at.left_s(31) > 0
    assert at.left_s(32) == 0
    assert not at.window.is_open


def test_who_is_back_before_it_can_begin_is_not_waited_for() -> None:
    at = Window()
    assert at.left_s(24) == pytest.approx(FIXED_S / 4)


def test_a_pass_that_is_full_waits_for_nobody() -> None:
    at = Window(answered=MAX_ROWS, waiting=MAX_ROWS)
    assert at.left_s(MAX_ROWS) == 0


def test_it_does_not_wait_past_a_deadline() -> None:
    at = Window()
    now = at.clock.monotonic()
    assert at.left_s(16, deadline=now + FIXED_S) > 0
    assert at.left_s(17, deadline=now + FIXED_S / 3) == 0, "one that came during the wait"
    at = Window()
    assert at.left_s(16, deadline=now + FIXED_S / 3) == 0


def test_a_caller_long_after_the_answers_does_not_wait_for_others() -> None:
    at = Window()
    at.clock.advance(1.1 * FIXED_S)
    assert at.left_s(16) == 0


def test_nobody_waits_where_most_of_a_pass_is_its_rows() -> None:
    window = BatchingWindow(MAX_ROWS, ManualClock())
    window.answered(256, 0, Cost(FIXED_S, EACH_S), FIXED_S + 256 * EACH_S)
    assert not window.is_open


def test_nobody_waits_where_passes_are_as_short_as_those_that_run_in_place() -> None:
    window = BatchingWindow(MAX_ROWS, ManualClock())
    window.answered(16, 16, Cost(300e-6, 10e-6), 1e-3)
    assert not window.is_open


# --- in an engine ---


class Wide(FixedCost):
    """Of a model whose passes are long whatever their rows."""

    fixed_s = 0.02

    def __init__(self) -> None:
        super().__init__(1.0, 4)


async def open_wide(at: Harness) -> None:
    for model in at.internals.models:
        model.cost = Wide()
    await at.open(*"abcd")


def rows_of(at: Harness) -> list[int]:
    return [rows for rows, _ in at.events.passes]


async def two_halves(at: Harness, **fields: Any) -> None:
    """Open four sessions and step them in two halves: the first is answered, and the second waits."""
    await open_wide(at)
    first = await at.begin_pass(["a", "b"], x(2), connection="me")
    at.submit(["c", "d"], x(2), connection="me", **fields)
    at.clock.advance(Wide.fixed_s)
    at.hooks.open_gate()
    await first.require_all_applied()


@pytest.mark.engine(threads=True)
async def test_waiting_and_just_answered_callers_share_the_next_pass(at: Harness) -> None:
    await two_halves(at)
    await at.submit(["a", "b"], x(2), connection="me").require_all_applied()
    await at.settled()
    assert rows_of(at) == [2, 4]


@pytest.mark.engine(threads=True)
@pytest.mark.parametrize("is_due", [False, True])
async def test_a_pass_leaves_out_absent_callers_after_the_wait_or_near_a_deadline(
    is_due: bool, at: Harness
) -> None:
    fields = {"deadline": at.clock.monotonic() + 1.3 * Wide.fixed_s} if is_due else {}
    await two_halves(at, **fields)
    if not is_due:
        at.clock.advance(Wide.fixed_s / 2)
    await at.settled()
    assert rows_of(at) == [2, 2]


async def test_an_alarm_that_is_heard_late_has_no_second_one_set_for_the_next_wait(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """It rings on its thread while the others come, and the event loop hears of it in the next wait."""
    wake, rang = Threads.wake, threading.Event()
    alarms = asyncio.Queue[Callable[[], None]]()

    def held_back(threads: Threads, seconds: float, then: Callable[[], None]) -> threading.Event:
        alarms.put_nowait(then)
        return wake(threads, 30.0 if rang.is_set() else seconds, rang.set)

    monkeypatch.setattr(Threads, "wake", held_back)
    async with running(threads=True) as at:
        await two_halves(at)
        heard = await asyncio.wait_for(alarms.get(), WAIT_S)
        assert await asyncio.to_thread(rang.wait, WAIT_S)
        await at.submit(["a", "b"], x(2), connection="me").require_all_applied()
        at.submit(["a", "b"], x(2), connection="me")
        await asyncio.wait_for(alarms.get(), WAIT_S)
        heard()
        for _ in range(5):  # turns of the event loop
            await asyncio.sleep(0)
        await at.submit(["c", "d"], x(2), connection="me").require_all_applied()
        assert alarms.empty()
        assert rows_of(at) == [2, 4, 4]


@pytest.mark.engine(threads=True)
async def test_nobody_waits_for_others(at: Harness) -> None:
    await open_wide(at)
    first = await at.begin_pass(["a", "b"], x(2), connection="me")
    other = at.submit("c", x(1), connection="another")
    at.clock.advance(Wide.fixed_s)
    at.hooks.open_gate()
    await first.require_all_applied()
    await other.require_all_applied()  # the clock stands still: it has not waited
    await at.submit(
        "a", x(1), connection="me"
    ).require_all_applied()  # nor does one in a pass after others were about
    assert rows_of(at) == [2, 1, 1]


@pytest.mark.engine(threads=True)
async def test_a_step_that_a_read_has_let_in_does_not_wait(at: Harness) -> None:
    await two_halves(at)
    state = await at.state("c")
    await at.settled()
    assert state["sum"].tobytes() != START
    assert rows_of(at) == [2, 2]
