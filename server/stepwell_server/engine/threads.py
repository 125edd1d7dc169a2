"""The threads that run passes, and the division of calls on many sessions into pieces.

A running pass is never interrupted, so passes on threads are kept short while other models run theirs there.
"""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import AsyncIterator, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TypeAlias

from typing_extensions import override

from stepwell_server.core.namespaces import tenant_of
from stepwell_server.core.scheduler import FairQueue, LoopQueue, Share
from stepwell_server.process.thread_names import name_thread

#: The shortest limit for a pass on threads, in seconds: shorter passes have too much overhead.
MIN_PASS_S = 1e-3
#: A model counts as active on the threads for this many seconds after its last pass there.
ACTIVE_S = 0.05

Then: TypeAlias = "Callable[[], None] | None"
Piece: TypeAlias = Callable[[], Then]
"""Part of a pass. It returns a function to call on the same thread once its time has been charged."""


class Threads:
    """The threads that run passes, one piece at a time, and the choice of the next model."""

    def __init__(self, count: int) -> None:
        self._pool = ThreadPoolExecutor(count, thread_name_prefix="stepwell-compute", initializer=name_thread)
        self._lock = threading.Lock()
        self._waiting: FairQueue[Piece] = FairQueue(MIN_PASS_S)
        """Pieces, by model."""
        self._active: set[Share] = set()
        """Models that recently had passes on threads; some may no longer be active."""

    def run(self, share: Share, pieces: Sequence[Piece], wanted_s: float, now: float) -> None:
        """Run the pieces of a pass that would take `wanted_s` seconds without contention. On the event loop.

        The functions that the pieces return run on the threads. Call `ended` on the event loop when all pieces have
        run.
        """
        self._active.add(share)
        share.pieces, share.wanted_s, share.last_on_threads = len(pieces), wanted_s, now
        with self._lock:
            for piece in pieces:
                self._waiting.add((share,), piece)
        for _ in pieces:
            self._pool.submit(self._run_next)

    def wake(self, seconds: float, then: Callable[[], None]) -> threading.Event:
        """Call `then` on a thread after this many seconds, unless the returned event is set before.

        The event is set just before `then` is called, so it shows whether the call is still to come. For delays
        shorter than the event loop's timers can measure, which is a millisecond.
        """
        over = threading.Event()

        def wait() -> None:
            if not over.wait(seconds):
                over.set()
                then()

        self._pool.submit(wait)
        return over

    def ended(self, share: Share, now: float) -> None:
        """Report that a pass has run. On the event loop."""
        share.pieces, share.last_on_threads = 0, now

    def max_s(self, share: Share, now: float) -> float | None:
        """The limit of a model's next pass in seconds, because of other models on the threads; None: no limit.

        It is the shortest length that any of the other models prefers. So models that all have long passes need not
        cut them.
        """
        active = self._active
        if not active or (len(active) == 1 and share in active):
            return None
        for one in [one for one in active if not one.pieces and one.last_on_threads < now - ACTIVE_S]:
            active.discard(one)
        wanted = [one.wanted_s for one in active if one is not share]
        return max(MIN_PASS_S, min(wanted)) if wanted else None

    def forget(self, share: Share) -> None:
        """Forget a model that is unloaded and has no active pass."""
        self._active.discard(share)

    def _run_next(self) -> None:
        with self._lock:
            source = self._waiting.next()
            piece = self._waiting.pop(source)
        before = time.thread_time()
        then = piece()
        with self._lock:
            self._waiting.charge(source, time.thread_time() - before)
        if then is not None:
            then()

    def close(self) -> None:
        """Stop the threads once the waiting pieces have run."""
        self._pool.shutdown(wait=True)


#: Sessions of one piece: some 0.1 ms of work.
PIECE_SIZE = 64


class Pieces:
    """Divides calls on many sessions into pieces, which share the loop queue: tenants get equal numbers of them."""

    def __init__(self, loop_queue: LoopQueue) -> None:
        self._loop_queue = loop_queue

    async def turn(self, tenant: str) -> None:
        """Return in an iteration of the event loop that runs no other large work."""
        mine: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._loop_queue.add(("calls", tenant), lambda: None if mine.done() else mine.set_result(None))
        await mine

    def of(self, session_ids: Sequence[str]) -> AsyncIterator[slice]:
        """Slices of many ids of one tenant, each in an iteration of its own; a single piece does not wait."""
        count = len(session_ids)
        return _Parts(self, count, tenant_of(session_ids[0]) if count > PIECE_SIZE else "")

    def parts(self, count: int, tenant: str) -> AsyncIterator[slice]:
        """`of` for `count` items of a tenant."""
        return _Parts(self, count, tenant)


class _Parts(AsyncIterator[slice]):
    """Yields the slices. Not a generator: the event loop keeps a list of those, which costs more than one piece."""

    __slots__ = ("_count", "_pieces", "_start", "_tenant")

    def __init__(self, pieces: Pieces, count: int, tenant: str) -> None:
        self._pieces, self._count, self._tenant = pieces, count, tenant
        self._start = 0

    @override
    async def __anext__(self) -> slice:
        start, count = self._start, self._count
        if start >= count:
            raise StopAsyncIteration
        if count > PIECE_SIZE:
            await self._pieces.turn(self._tenant)
        self._start = start + PIECE_SIZE
        return slice(start, min(self._start, count))
