"""Runs a pass: in place on the event loop if that is cheaper than handing it over, otherwise on threads."""

from __future__ import annotations

import functools
import itertools
import threading
import time
from collections.abc import Callable, Mapping, Sequence

import numpy as np

from stepwell_server.clock import Clock
from stepwell_server.core.slots import Rows
from stepwell_server.engine.api import Select, Trace
from stepwell_server.engine.executors.base import ExecutionError
from stepwell_server.engine.job import Job
from stepwell_server.engine.passes.batch import Lane, Pass
from stepwell_server.engine.state.model import Model
from stepwell_server.engine.threads import Then, Threads
from stepwell_server.errors import ServerError
from stepwell_server.program import Program

#: A pass expected to take less than this runs in place: handing it to a thread and back costs about as much.
IN_PLACE_S = 400e-6
#: Rows are split over threads only in pieces expected to take at least this long.
PIECE_S = 200e-6
#: A pass of several time steps is cut so that arrivals wait about this long at most: under contention, and alone,
#: where longer slices lose less.
SHORT_SLICE_S, SLICE_S = 0.25e-3, 2e-3


class Runner:
    """Runs the passes of one model, one at a time, on one lane per compute thread.

    Threads take the lanes from the last one on. The event loop uses the first, if no thread has it.
    """

    def __init__(self, model: Model, lanes: Sequence[Lane], threads: Threads, clock: Clock) -> None:
        self._model = model
        self._lanes = lanes
        self._threads = threads
        self._clock = clock

    def is_small(self, work: Pass) -> bool:
        """Whether the pass should run in place.

        A slice of a longer job never does: the event loop would do little else.
        """
        return not work.is_slice and self._model.cost.of(work.row_count, work.steps) <= IN_PLACE_S

    def run_in_place(self, work: Pass) -> None:
        """Run a pass on the calling thread."""
        started = time.perf_counter()
        lane = self._lanes[0]
        try:
            lane.attempt(work, 0, work.row_count)
        except ExecutionError as error:
            lane.narrow(work, error)
        else:
            lane.store(work, 0, work.row_count)
        work.seconds = time.perf_counter() - started
        self._model.cost.learn(work.row_count, lane.spent_s, work.steps)

    def measure(self, work: Pass) -> None:
        """Run a pass on the calling thread to measure its cost; nothing is stored."""
        lane = self._lanes[0]
        lane.attempt(work, 0, work.row_count)
        self._model.cost.learn(work.row_count, lane.spent_s, work.steps)

    def run_on_threads(self, work: Pass, done: Callable[[BaseException | None], None]) -> None:
        """Run a pass on threads; `done` is called from one of them with the error, or None. Then call `ended`."""
        pieces = self._cut(work)
        lanes = self._lanes[: -len(pieces) - 1 : -1]
        for lane in lanes:
            lane.is_on_thread = True
        group = _Pieces(lanes, work, pieces, self._model, done)
        run = [functools.partial(group.run, index) for index in range(len(pieces))]
        cost = self._model.cost
        wanted_s = max(cost.of(work.rows_wanted), cost.of(work.row_count, work.steps))
        self._threads.run(self._model.work, run, wanted_s, self._clock.monotonic())

    def wake(self, seconds: float, then: Callable[[], None]) -> threading.Event:
        """See `Threads.wake`."""
        return self._threads.wake(seconds, then)

    def ended(self) -> None:
        """Report that a pass on threads has ended. On the event loop."""
        for lane in self._lanes:
            lane.is_on_thread = False
        self._threads.ended(self._model.work, self._clock.monotonic())

    def max_s(self, now: float) -> float | None:
        """See `Threads.max_s`."""
        return self._threads.max_s(self._model.work, now)

    def rows_within(self, seconds: float) -> int:
        """The rows of a pass that takes this many seconds on all threads."""
        return self._model.rows_within(seconds) * len(self._lanes)

    def _cut(self, work: Pass) -> list[tuple[int, int]]:
        worth = int(self._model.cost.of(work.row_count, work.steps) / PIECE_S)
        count = max(1, min(len(self._lanes), worth, work.row_count))
        edges = [work.row_count * i // count for i in range(count + 1)]
        return list(itertools.pairwise(edges))


class _Pieces:
    """A pass cut into pieces of rows. The last piece to finish stores all of them."""

    def __init__(
        self,
        lanes: Sequence[Lane],
        work: Pass,
        pieces: Sequence[tuple[int, int]],
        model: Model,
        done: Callable[[BaseException | None], None],
    ) -> None:
        self._lanes = lanes
        self._work = work
        self._pieces = pieces
        self._model = model
        self._done = done
        self._lock = threading.Lock()
        self._left = len(pieces)
        self._failed = False
        self._error: ExecutionError | None = None
        """That of the whole pass, if it is one piece."""
        self._broken: BaseException | None = None
        self._started = time.perf_counter()

    def run(self, index: int) -> Then:
        try:
            self._lanes[index].attempt(self._work, *self._pieces[index])
        except ExecutionError as error:
            self._failed = True
            self._error = error if len(self._pieces) == 1 else None
        except BaseException as error:
            self._broken = error
        with self._lock:
            self._left -= 1
            last = self._left == 0
        return self._finish() if last else None

    def _finish(self) -> Then:
        try:
            if self._broken is None:
                self._store()
        except BaseException as error:
            self._broken = error
        return lambda: self._done(self._broken)

    def _store(self) -> None:
        if self._failed:
            self._lanes[0].narrow(self._work, self._error)
        else:
            for lane, (low, high) in zip(self._lanes, self._pieces, strict=True):
                lane.store(self._work, low, high)
                self._model.cost.learn(high - low, lane.spent_s, self._work.steps)
        self._work.seconds = time.perf_counter() - self._started


#: No larger sizes: an executor keeps buffers for the largest batch it ever had.
_WARM_UP_SIZES = (1, 8, 64)
_WARM_UP_TIMES = 3


class _NoOwner:
    traces: Mapping[int, Trace] | None = None

    def drop(self, _members: Rows, _now: float) -> Sequence[tuple[Rows, ServerError]]:
        return ()

    def fail(self, _members: Rows, error: ServerError) -> None:
        raise error


def warm_up(runner: Runner, program: Program, max_rows: int) -> None:
    """Run zeros through a program at several batch sizes; no session's rows are written.

    Call it before the model serves: it uses the runner's first lane.
    """
    for size in _WARM_UP_SIZES:
        for _ in range(_WARM_UP_TIMES):
            if size <= max_rows:
                runner.measure(Pass(program, [_zeros(program, size)], 1))


def _zeros(program: Program, size: int) -> Job:
    rows = np.zeros(size, np.intp)
    return Job(
        owner=_NoOwner(),
        members=np.arange(size),
        handles=None,
        rows=rows,
        sizes=np.ones(size, np.intp),
        inputs=[np.zeros((size, *spec.shape), spec.dtype) for spec in program.inputs],
        steps=1,
        with_time=False,
        select=Select.LAST,
        source=(None,),
        queued_at=0.0,
    )
