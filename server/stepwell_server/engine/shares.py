"""Fair shares for models: of the event loop, and of the threads that run long passes.

Each of the two is given to the model that has used least of it, in seconds (start-time fair queueing: Goyal, Vin, Cheng,
"Start-time fair queuing", SIGCOMM 1996, with equal weights). Who is alone has all of it. Who has not needed it for a
while is taken to have used a little less than the others, but no more than that: it has its turn before them, and does
not catch up. Nothing is taken away from a pass that runs: so passes on threads are short while other models run theirs
there.
"""

from __future__ import annotations

import asyncio
import heapq
import itertools
import threading
import time
from collections import deque
from collections.abc import AsyncIterator, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TypeAlias

from typing_extensions import override

from stepwell_server.clock import Clock
from stepwell_server.core.namespaces import tenant_of
from stepwell_server.logs import Log

_log = Log("engine.shares")
#: After turns of so many seconds together the event loop looks at what has come, before the next turn.
TURNS_S = 400e-6
#: A pass on threads may take so long, in seconds, whoever else is about: shorter ones cost too much.
LEAST_PASS_S = 1e-3
#: So long after its last pass on threads a model counts as one that is about, in seconds.
COMPANY_S = 0.05

Then: TypeAlias = "Callable[[], None] | None"
Piece: TypeAlias = Callable[[], Then]
"""A part of a pass; what it returns is called, on the same thread, when its time is charged."""


class LoopTurns:
    """Large work takes turns on the event loop: one part of it between two looks at what has come over the network.

    So what is small, and runs as soon as it is seen, waits for one part of large work at most, however many kinds of it
    are under way: passes, the intake of large batches, pieces of calls on many sessions. Lives on the event loop.
    """

    def __init__(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._waiting: deque[Callable[[], None]] = deque()

    def soon(self, work: Callable[[], None]) -> None:
        """Call `work` in a turn of its own; who asks again before that has two."""
        self._waiting.append(work)
        if len(self._waiting) == 1:
            self._loop.call_soon(self._next)

    def _next(self) -> None:
        try:
            self._waiting[0]()
        finally:  # whatever was raised is the loop's to tell
            self._waiting.popleft()
            if self._waiting:
                self._loop.call_soon(self._next)


class Share:
    """What one model has of the event loop and of the threads. Lives on the event loop."""

    __slots__ = (
        "_has_turn",
        "_listener",
        "_shares",
        "is_due",
        "label",
        "last_on_threads",
        "loop_s",
        "pieces",
        "threads_s",
        "wanted_s",
    )

    def __init__(self, shares: Shares, label: str) -> None:
        self._shares = shares
        self._listener: Callable[[], None] | None = None
        self._has_turn = False
        self.label = label
        """The model's name, for the log."""
        self.is_due = False
        """The listener will be called."""
        self.loop_s = self.threads_s = 0.0
        """Seconds that it has used, or as if it had: who comes anew begins close to where the others are."""
        self.last_on_threads = 0.0
        """When it began or ended a pass on threads."""
        self.pieces = 0
        """Of its pass that wait or run."""
        self.wanted_s = 0.0
        """Seconds of its last pass there, if it had been as long as the model likes."""

    def listen(self, listener: Callable[[], None]) -> None:
        """Call `listener` when the model has its turn."""
        self._listener = listener

    def ring(self) -> None:
        """Have a turn, soon: one, however often this is called before."""
        if not self.is_due and self._listener is not None:
            self.is_due = True
            if not self._has_turn:
                self._shares.line_up(self)

    def done(self) -> None:
        """For the listener: what it has been rung for since it was called is done already."""
        assert self._has_turn, "only the listener knows"
        self.is_due = False

    def leave(self) -> None:
        """The model is gone: it has no turn any more."""
        self._listener = None
        self.is_due = False

    def take(self) -> None:
        """Call the listener; for `Shares`."""
        if self._listener is None:
            return
        self.is_due, self._has_turn = False, True
        try:
            self._listener()
        except Exception as error:  # a defect: the other models must have their turn
            _log.defect("a turn raised", error, model=self.label)
        finally:
            self._has_turn = False


class Shares:
    """Whose turn it is on the event loop. Lives there."""

    def __init__(self, clock: Clock, turns: LoopTurns) -> None:
        self._clock = clock
        self._loop_turns = turns
        self._due: list[tuple[float, int, Share]] = []
        """A heap: used seconds, order of coming."""
        self._numbers = itertools.count()
        self._used_s = 0.0
        """What who had the latest turn had used before."""
        self._is_held = False
        """Nothing is scheduled: whoever holds it will look."""
        self._is_scheduled = False
        """The event loop will call: once, or several turns would follow each other without a look at what has come."""

    def line_up(self, share: Share) -> None:
        """Give a model a turn; for `Share`."""
        share.loop_s = max(self._used_s - TURNS_S, share.loop_s)
        heapq.heappush(self._due, (share.loop_s, next(self._numbers), share))
        if not self._is_held:
            self._schedule()

    def hold(self) -> None:
        """Give nobody a turn until `go`: more comes at once."""
        self._is_held = True

    def go(self) -> None:
        """Give who is due their turns now, which saves a turn of the event loop."""
        self._is_held = False
        if self._due:
            self._turns()

    def go_soon(self) -> None:
        """Give who is due their turns in another turn of the event loop: this one has had its large work."""
        self._is_held = False
        if self._due:
            self._schedule()

    def _schedule(self) -> None:
        if not self._is_scheduled:
            self._is_scheduled = True
            self._loop_turns.soon(self._scheduled)

    def _scheduled(self) -> None:
        self._is_scheduled = False
        if self._due and not self._is_held:
            self._turns()

    def _turns(self) -> None:
        """Turns of those that are due, until the time is over.

        Or until one that is rung meanwhile would come first: its next turn is after a look at what has come.
        """
        due, self._due = self._due, []
        self._is_held = True
        began = now = self._clock.monotonic()
        while due and now - began < TURNS_S and not (self._due and self._due[0] < due[0]):
            used_s, _, share = heapq.heappop(due)
            if used_s > self._used_s:
                self._used_s = used_s
            share.take()
            before, now = now, self._clock.monotonic()
            share.loop_s += now - before
            if share.is_due:
                self.line_up(share)
        self._is_held = False
        for one in due:
            heapq.heappush(self._due, one)
        if self._due:
            self._schedule()


class Threads:
    """The threads that run passes, a piece each at a time, and who has them next."""

    def __init__(self, count: int) -> None:
        self._pool = ThreadPoolExecutor(count, thread_name_prefix="stepwell-compute")
        self._lock = threading.Lock()
        self._waiting: list[tuple[float, int, Share, Piece]] = []
        """A heap, as that of `Shares`."""
        self._numbers = itertools.count()
        self._used_s = 0.0
        self._about: set[Share] = set()
        """Models that had passes on threads lately, and maybe others."""

    def run(self, share: Share, pieces: Sequence[Piece], wanted_s: float, now: float) -> None:
        """Run the pieces of a pass, which would have taken `wanted_s` without others. On the event loop.

        Its `Then`s run on the threads. Call `ended` on the event loop when all of it has run.
        """
        self._about.add(share)
        share.pieces, share.wanted_s, share.last_on_threads = len(pieces), wanted_s, now
        with self._lock:
            share.threads_s = used_s = max(self._used_s - LEAST_PASS_S, share.threads_s)
            for piece in pieces:
                heapq.heappush(self._waiting, (used_s, next(self._numbers), share, piece))
        for _ in pieces:
            self._pool.submit(self._run_next)

    def wake(self, seconds: float, then: Callable[[], None]) -> threading.Event:
        """Call `then` on a thread after so many seconds, unless the event that is returned is set before.

        The event is set before `then` is called, so it tells whether the call is still to come.

        For moments: the event loop's own timers know milliseconds.
        """
        over = threading.Event()

        def wait() -> None:
            if not over.wait(seconds):
                over.set()
                then()

        self._pool.submit(wait)
        return over

    def ended(self, share: Share, now: float) -> None:
        """A pass has run. On the event loop."""
        share.pieces, share.last_on_threads = 0, now

    def most_s(self, share: Share, now: float) -> float | None:
        """Seconds of a model's next pass at most, for the sake of others that have theirs on threads; None: any.

        As many as the shortest of theirs would like to take, so that those who all have long ones need not be cut.
        """
        about = self._about
        if not about or (len(about) == 1 and share in about):
            return None
        for one in [one for one in about if not one.pieces and one.last_on_threads < now - COMPANY_S]:
            about.discard(one)
        wanted = [one.wanted_s for one in about if one is not share]
        return max(LEAST_PASS_S, min(wanted)) if wanted else None

    def forget(self, share: Share) -> None:
        """The model is gone, and has no pass under way."""
        self._about.discard(share)

    def _run_next(self) -> None:
        with self._lock:
            used_s, _, share, piece = heapq.heappop(self._waiting)
            self._used_s = max(self._used_s, used_s)
        before = time.thread_time()
        then = piece()
        with self._lock:
            share.threads_s += time.thread_time() - before
        if then is not None:
            then()

    def close(self) -> None:
        """End the threads, when what waits has run."""
        self._pool.shutdown(wait=True)


#: Sessions of one piece: some 0.1 ms of work.
TURN = 64


class Pieces:
    """Calls on many sessions are done in pieces, one piece in each turn of the event loop. Lives on one event loop.

    However many such calls run, each turn has one piece of one of them, so that single steps wait for one piece and not
    for one of each call. Tenants take turns, then the calls of a tenant.
    """

    def __init__(self, turns: LoopTurns) -> None:
        self._turns = turns
        self._waiting: dict[str, deque[asyncio.Future[None]]] = {}
        """By tenant, in the order of their turns."""
        self._is_due = False
        """`_next` will be called."""

    async def turn(self, tenant: str) -> None:
        """Return in a turn of the event loop in which no other piece is done."""
        mine: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._waiting.setdefault(tenant, deque()).append(mine)
        self._come_again()
        await mine

    def of(self, session_ids: Sequence[str]) -> AsyncIterator[slice]:
        """Parts of many ids of one tenant, each in its turn; what is one piece needs none."""
        return self.parts(len(session_ids), tenant_of(session_ids[0]) if len(session_ids) > TURN else "")

    def parts(self, count: int, tenant: str) -> AsyncIterator[slice]:
        """As `of`, of as many things of a tenant."""
        return _Whole(count) if count <= TURN else self._in_turns(count, tenant)

    async def _in_turns(self, count: int, tenant: str) -> AsyncIterator[slice]:
        for start in range(0, count, TURN):
            await self.turn(tenant)
            yield slice(start, min(start + TURN, count))

    def _come_again(self) -> None:
        if not self._is_due:
            self._is_due = True
            self._turns.soon(self._next)

    def _next(self) -> None:
        self._is_due = False
        while self._waiting:
            tenant = next(iter(self._waiting))
            line = self._waiting.pop(tenant)
            first = line.popleft()
            if line:
                self._waiting[tenant] = line  # at the end
            if not first.done():  # else whoever waited was cancelled
                first.set_result(None)
                break
        if self._waiting:
            self._come_again()


class _Whole(AsyncIterator[slice]):
    """All of a few things at once: this takes a tenth of the time of an asynchronous generator."""

    def __init__(self, count: int) -> None:
        self._left = count

    @override
    async def __anext__(self) -> slice:
        if not self._left:
            raise StopAsyncIteration
        count, self._left = self._left, 0
        return slice(0, count)
