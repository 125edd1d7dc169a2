"""Time, chance and turns of event loops, all from one seed: the same seed gives the same run.

Every node (a replica, or the callers) has an event loop of its own, whose clock is the world's. The world decides which
loop has its next turn; within one loop callbacks keep their order, as asyncio promises. Between turns time passes: a
little after each, and up to the next thing that is due where nobody has anything to do. Nothing waits for real.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import heapq
import itertools
import random
import threading
from collections.abc import Callable
from contextvars import Context
from typing import Any, TypeVar

from typing_extensions import TypeVarTuple, Unpack

_T = TypeVar("_T")
_Ts = TypeVarTuple("_Ts")

_TURN_S = 30e-6
"""The approximate length of a turn of an event loop."""


class Hang(AssertionError):
    """Something is waited for that never comes."""


class World:
    """What happens next."""

    def __init__(self, seed: int, *, show: bool = False) -> None:
        self.random = random.Random(seed)
        self.now = 0.0
        self.moments = 0
        """Counts what is written down: a clock that never stands still."""
        self._times: list[float] = []
        self._events: list[tuple[float, int, Callable[..., object], tuple[Any, ...]]] = []
        self._numbers = itertools.count()
        self.loops: list[NodeLoop] = []
        self._hash = hashlib.blake2b(digest_size=16)
        self._show = show
        self.turns = 0

    def moment(self) -> int:
        """The next number on the history's clock."""
        self._times.append(self.now)
        self.moments += 1
        return self.moments - 1

    def time_of(self, moment: int) -> float:
        """When a moment was, in seconds."""
        return self._times[moment]

    def after(self, delay: float, call: Callable[..., object], *args: Any) -> None:
        """Call a function after this many seconds."""
        heapq.heappush(self._events, (self.now + max(0.0, delay), next(self._numbers), call, args))

    def note(self, *words: object) -> None:
        """Write down what happens: the trace of a run."""
        line = f"{self.now:.6f} " + " ".join(map(str, words))
        self._hash.update(line.encode() + b"\n")
        if self._show:
            print(line)

    @property
    def trace(self) -> str:
        """A hash of all that was written down."""
        return self._hash.hexdigest()

    def chance(self, probability: float) -> bool:
        """True as often as that."""
        return self.random.random() < probability

    def run(self, until: Callable[[], bool], limit_s: float, what: str) -> None:
        """Let things happen until it is so.

        Raises:
            Hang: it is not so after `limit_s` seconds, or nothing can happen any more.
        """
        limit = self.now + limit_s
        while not until():
            if self.now > limit:
                raise Hang(f"{what}: not within {limit_s} s")
            events = self._events
            while events and events[0][0] <= self.now:
                _, _, call, args = heapq.heappop(events)
                call(*args)
            due = [loop for loop in self.loops if loop.is_due()]
            if due:
                loop = due[0] if len(due) == 1 else self.random.choice(due)
                loop.turn()
                self.turns += 1
                self.now += self.random.random() * 2 * _TURN_S
                continue
            times = [loop.next_at() for loop in self.loops]
            if events:
                times.append(events[0][0])
            now = min(times, default=float("inf"))
            if now == float("inf"):
                raise Hang(f"{what}: nothing can happen any more")
            self.now = max(self.now, now)


class _Nothing:
    """Files that are never ready."""

    def select(self, _timeout: float | None) -> list[Any]:
        return []

    def close(self) -> None:
        """There is nothing."""


class NodeLoop(asyncio.BaseEventLoop):
    """The event loop of one node. It has turns when the world says so, and none while it is paused or dead."""

    def __init__(self, world: World, name: str) -> None:
        super().__init__()
        own: Any = self
        own._selector = _Nothing()
        self._own = own
        self.name = name
        self.world = world
        self.is_paused = False
        self.is_dead = False
        self._left: set[asyncio.Task[Any]] = set()
        self.defects: list[str] = []
        """What callbacks and tasks raised that nobody took."""
        self.set_exception_handler(self._defect)
        world.loops.append(self)

    def time(self) -> float:
        return self.world.now

    def is_due(self) -> bool:
        """Whether something waits for a turn."""
        if self.is_paused or self.is_dead:
            return False
        return bool(self._own._ready) or self.next_at() <= self.world.now

    def next_at(self) -> float:
        """When its next timer is due."""
        scheduled = self._own._scheduled
        if self.is_paused or self.is_dead or not scheduled:
            return float("inf")
        return float(scheduled[0].when())

    def turn(self) -> None:
        """Run the calls that are due now, and none that they schedule."""
        self._own._thread_id = threading.get_ident()
        asyncio._set_running_loop(self)
        try:
            self._own._run_once()
        finally:
            asyncio._set_running_loop(None)
            self._own._thread_id = None

    def kill(self) -> None:
        """No turn any more. What it had under way is forgotten without a word."""
        self.is_dead = True
        self._left = asyncio.all_tasks(self)  # or the garbage collector would end them, whenever it likes
        if self in self.world.loops:
            self.world.loops.remove(self)

    def bury(self) -> None:
        """Take what is left of its tasks to their end, which changes nothing any more."""
        self.kill()
        asyncio._set_running_loop(self)
        try:
            for task in self._left:
                left: Any = task
                left._log_destroy_pending = False
                with contextlib.suppress(Exception):
                    left.get_coro().close()
        finally:
            asyncio._set_running_loop(None)
        self._left = set()
        self._own._ready.clear()
        self._own._scheduled.clear()
        self.close()

    def _defect(self, _loop: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
        if not self.is_dead:
            self.defects.append(f"{self.name}: {context.get('message')} {context.get('exception')!r}")

    def create_task(self, coro: Any, **options: Any) -> Any:
        if self.is_dead:  # what is being buried begins nothing
            coro.close()
            return self.create_future()
        return super().create_task(coro, **options)

    def call_soon(
        self, callback: Callable[[Unpack[_Ts]], object], *args: *_Ts, context: Context | None = None
    ) -> asyncio.Handle:
        if self.is_dead:
            return asyncio.Handle(callback, args, self, context)
        return super().call_soon(callback, *args, context=context)

    def call_at(
        self,
        when: float,
        callback: Callable[[Unpack[_Ts]], object],
        *args: *_Ts,
        context: Context | None = None,
    ) -> asyncio.TimerHandle:
        if self.is_dead:
            return asyncio.TimerHandle(when, callback, args, self, context)
        return super().call_at(when, callback, *args, context=context)

    def call_soon_threadsafe(
        self, callback: Callable[[Unpack[_Ts]], object], *args: *_Ts, context: Context | None = None
    ) -> asyncio.Handle:
        return self.call_soon(callback, *args, context=context)

    def run_in_executor(
        self, executor: Any, func: Callable[[Unpack[_Ts]], _T], *args: *_Ts
    ) -> asyncio.Future[_T]:
        """What a thread would do is done some time later, at once."""
        answer: asyncio.Future[_T] = self.create_future()

        def work() -> None:
            if answer.cancelled():
                return
            try:
                answer.set_result(func(*args))
            except Exception as error:
                answer.set_exception(error)

        self.call_later(self.world.random.random() * 2e-3, work)
        return answer

    def _process_events(self, _events: Any) -> None:
        """There are none."""

    def _write_to_self(self) -> None:
        """Nobody sleeps."""
