"""Where a pass runs: in place on the event loop if that is cheaper than a hand-over, else on threads."""

from __future__ import annotations

import itertools
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Executor as Pool

from stepwell_server.engine.api import Array
from stepwell_server.engine.executors.base import ExecutionError
from stepwell_server.engine.passes.batch import Lane, Pass

#: A pass expected to take less runs in place: handing it to a thread and back costs about as much.
IN_PLACE_S = 400e-6
#: Rows are split over threads only in pieces expected to take at least this long.
PIECE_S = 200e-6
#: A pass of several time steps is cut so that what arrives meanwhile waits about this long at most.
SLICE_S = 2e-3


class Cost:
    """What a pass takes, learnt from those that ran: a fixed part and one per row and time step."""

    def __init__(self) -> None:
        self._fixed = 20e-6
        self._per_row = 1e-6

    def learn(self, rows: int, steps: int, seconds: float) -> None:
        """Take into account what rows and time steps took on one thread, in processor time."""
        each = seconds / steps
        if rows >= 16:
            self._per_row += 0.2 * (max(0.0, each - self._fixed) / rows - self._per_row)
        else:
            self._fixed += 0.2 * (max(1e-6, each - rows * self._per_row) - self._fixed)

    def of(self, rows: int, steps: int = 1) -> float:
        """Seconds that a pass is expected to take on one thread."""
        return (self._fixed + rows * self._per_row) * steps

    def steps_within(self, rows: int, seconds: float) -> int:
        """How many time steps of so many rows fit into a time, at least 1."""
        return max(1, int(seconds / self.of(rows)))


class Runner:
    """Runs the passes of one model, one at a time, on one lane per compute thread."""

    def __init__(self, lanes: Sequence[Lane], pool: Pool) -> None:
        self._lanes = lanes
        self._pool = pool
        self.cost = Cost()

    def is_small(self, work: Pass) -> bool:
        """Whether the pass should run in place."""
        return self.cost.of(work.row_count, work.steps) <= IN_PLACE_S

    def run_here(self, work: Pass) -> None:
        """Run a pass on the calling thread."""
        started = time.perf_counter()
        lane = self._lanes[0]
        try:
            lane.attempt(work, 0, work.row_count)
        except ExecutionError:
            lane.narrow(work)
        else:
            lane.store(work, 0, work.row_count)
        work.seconds = time.perf_counter() - started
        self.cost.learn(work.row_count, work.steps, lane.spent_s)

    def run_row(self, row: int, inputs: Sequence[Array]) -> list[Array]:
        """Run one time step of one row on the calling thread. See `Lane.run_row`."""
        return self._lanes[0].run_row(row, inputs)

    def try_out(self, work: Pass) -> None:
        """Run a pass on the calling thread for its cost alone; nothing is stored."""
        lane = self._lanes[0]
        lane.attempt(work, 0, work.row_count)
        self.cost.learn(work.row_count, work.steps, lane.spent_s)

    def run_on_threads(self, work: Pass, done: Callable[[BaseException | None], None]) -> None:
        """Run a pass on the pool's threads; `done` is called from one of them, with what it raised."""
        pieces = self._cut(work)
        group = _Pieces(self._lanes, work, pieces, self.cost, done)
        for index in range(len(pieces)):
            self._pool.submit(group.run, index)

    def _cut(self, work: Pass) -> list[tuple[int, int]]:
        worth = int(self.cost.of(work.row_count, work.steps) / PIECE_S)
        count = max(1, min(len(self._lanes), worth, work.row_count))
        edges = [work.row_count * i // count for i in range(count + 1)]
        return list(itertools.pairwise(edges))


class _Pieces:
    """A pass cut into pieces of rows. The last piece to end stores all of them."""

    def __init__(
        self,
        lanes: Sequence[Lane],
        work: Pass,
        pieces: Sequence[tuple[int, int]],
        cost: Cost,
        done: Callable[[BaseException | None], None],
    ) -> None:
        self._lanes = lanes
        self._work = work
        self._pieces = pieces
        self._cost = cost
        self._done = done
        self._lock = threading.Lock()
        self._left = len(pieces)
        self._failed = False
        self._broken: BaseException | None = None
        self._started = time.perf_counter()

    def run(self, index: int) -> None:
        try:
            self._lanes[index].attempt(self._work, *self._pieces[index])
        except ExecutionError:
            self._failed = True
        except BaseException as error:
            self._broken = error
        with self._lock:
            self._left -= 1
            last = self._left == 0
        if last:
            self._finish()

    def _finish(self) -> None:
        try:
            if self._broken is None:
                self._store()
        except BaseException as error:
            self._broken = error
        self._done(self._broken)

    def _store(self) -> None:
        if self._failed:
            self._lanes[0].narrow(self._work)
        else:
            for lane, (low, high) in zip(self._lanes, self._pieces, strict=False):
                lane.store(self._work, low, high)
                self._cost.learn(high - low, self._work.steps, lane.spent_s)
        self._work.seconds = time.perf_counter() - self._started
