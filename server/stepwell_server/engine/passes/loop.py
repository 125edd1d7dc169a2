"""The pass loop of one model: choose, run, complete.

No waiting for company: when nothing runs, what has arrived goes at once; what arrives while a pass runs
forms the next one. Everything here happens on the event loop, but for the passes that the runner puts
on threads.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from typing import Protocol

import numpy as np

from stepwell_server.clock import Clock
from stepwell_server.core.scheduler import Scheduler
from stepwell_server.core.sessions import Handles
from stepwell_server.core.slots import Slots
from stepwell_server.engine.api import Observer
from stepwell_server.engine.job import Job, Mask
from stepwell_server.engine.passes.batch import FailedUnit, Pass
from stepwell_server.engine.passes.runner import IN_PLACE_S, SLICE_S, Runner
from stepwell_server.errors import InvalidInput, ServerError
from stepwell_server.logs import Log
from stepwell_server.program import Program

_log = Log("engine.loop")


class Completion(Protocol):
    """What happens to jobs when they end."""

    def complete(self, work: Pass, jobs: Sequence[tuple[int, Job]]) -> None:
        """Jobs (with their index in the pass) have run their last time step."""

    def release(self, handles: Handles) -> None:
        """Sessions that a job no longer holds."""


class PassLoop:
    """Runs the ready jobs of one model, pass after pass."""

    def __init__(
        self,
        name: str,
        program: Program,
        *,
        slots: Slots,
        runner: Runner,
        completion: Completion,
        clock: Clock,
        observer: Observer,
        max_batch_rows: int,
    ) -> None:
        self._name = name
        self._program = program
        self._slots = slots
        self.runner = runner
        self._completion = completion
        self._clock = clock
        self._observer = observer
        self._scheduler: Scheduler[Job] = Scheduler(max_batch_rows)
        self._running = False
        self._turn_due = False
        self._feed: Callable[[], None] = lambda: None
        self._must_wait: Callable[[], bool] = lambda: False
        self._idle: asyncio.Future[None] | None = None
        self._loop = asyncio.get_running_loop()
        self.max_batch_rows = max_batch_rows

    @property
    def rows_waiting(self) -> int:
        """Rows of jobs that wait for a pass."""
        return self._scheduler.rows_waiting

    @property
    def busy(self) -> bool:
        """A pass runs or jobs wait for one."""
        return self._running or self._turn_due or bool(self._scheduler)

    async def idle(self) -> None:
        """Return when no pass runs and nothing waits for one."""
        while self.busy:
            self._idle = self._idle or self._loop.create_future()
            await asyncio.shield(self._idle)

    def expected_wait_s(self) -> float:
        """About how long what waits now will take."""
        return self.runner.cost.of(self._scheduler.rows_waiting)

    @property
    def is_free(self) -> bool:
        """No pass runs and nothing waits for one, and one row is cheap enough to run in place."""
        return not self._running and not self._scheduler and self.runner.cost.of(1) <= IN_PLACE_S

    @property
    def is_turn_due(self) -> bool:
        """A turn comes as soon as the event loop is at it."""
        return self._turn_due

    def feed(self, source: Callable[[], None]) -> None:
        """Call `source` at the beginning of each turn: it adds jobs made of what has come meanwhile."""
        self._feed = source

    def pause_while(self, must_wait: Callable[[], bool]) -> None:
        """Begin no pass while this is true. Whoever makes it false wakes the loop."""
        self._must_wait = must_wait

    def wake(self) -> None:
        """Something waits at the source: take a turn as soon as no pass runs."""
        self._wake()

    def add(self, job: Job) -> None:
        """Put a job in line; it runs in one of the next turns."""
        self._scheduler.add(job)
        self._wake()

    def _wake(self) -> None:
        if not self._running and not self._turn_due:
            self._turn_due = True
            self._loop.call_soon(self._turn)

    def _turn(self) -> None:
        # before the feed: what it answers may bring new steps at once, and they must wake the loop
        self._turn_due = False
        if self._running or self._must_wait():  # the turn before began a pass, after this one was asked for
            return
        self._feed()
        jobs = self._choose()
        if not jobs:
            self._tell_if_idle()
            return
        try:
            work = self._pack(jobs)
        except Exception as error:
            self._fail_all(jobs, error)
            return
        self._running = True
        if self.runner.is_small(work):
            self._run_here(work)
        else:
            self.runner.run_on_threads(work, lambda broken: self._tell(work, broken))

    def _pack(self, jobs: Sequence[Job]) -> Pass:
        rows = sum(job.row_count for job in jobs)
        budget = self.runner.cost.steps_within(rows, SLICE_S)
        return Pass(self._program, jobs, self._scheduler.steps_together(jobs, budget))

    def _tell(self, work: Pass, broken: BaseException | None) -> None:
        """From a compute thread: one wake-up of the event loop per pass."""
        self._loop.call_soon_threadsafe(self._finish, work, broken)

    def _run_here(self, work: Pass) -> None:
        broken: BaseException | None = None
        try:
            self.runner.run_here(work)
        except Exception as error:
            broken = error
        self._finish(work, broken)

    def _tell_if_idle(self) -> None:
        if self._idle is not None and not self.busy:
            self._idle.set_result(None)
            self._idle = None

    def _choose(self) -> list[Job]:
        now = self._clock.monotonic()
        chosen: list[Job] = []
        later: list[Job] = []
        while self._scheduler and not chosen:
            for job in self._scheduler.next_pass():
                self._consider(job, now, chosen, later)
        for job in later:
            self._scheduler.add(job)
        return chosen

    def _consider(self, job: Job, now: float, chosen: list[Job], later: list[Job]) -> None:
        for members, error in job.owner.drop(job.members, now):
            self._drop_members(job, np.isin(job.members, members), error)
        if not job.row_count:
            return
        if job.needs_working_rows and not self._take_working_rows(job):
            later.append(job)
        else:
            if job.done == 0:
                self._observer.stage(self._name, "wait", now - job.queued_at, len(job.members))
            chosen.append(job)

    def _take_working_rows(self, job: Job) -> bool:
        rows = self._slots.take_working(job.row_count)
        if rows is None:
            return False
        job.work_on(rows)
        return True

    def _finish(self, work: Pass, broken: BaseException | None) -> None:
        self._running = False
        if broken is not None:
            self._fail_all(work.jobs, broken)
        else:
            self._observer.pass_done(self._name, work.row_count, work.steps, work.seconds)
            if work.failed:
                self._drop_failed(work)
            self._advance(work)
        # what came while the pass ran wakes the loop too: `wake` does nothing in the meantime
        self._wake()

    def _advance(self, work: Pass) -> None:
        ended: list[tuple[int, Job]] = []
        for index, job in enumerate(work.jobs):
            if not job.row_count:
                continue
            if job.steps > 1:
                _collect(work, index, job)
            job.done += work.steps
            if job.steps_left:
                self._scheduler.add(job)
            else:
                ended.append((index, job))
        if ended:
            self._completion.complete(work, ended)

    def _fail_all(self, jobs: Sequence[Job], broken: BaseException) -> None:
        error = _log.internal("a pass raised", broken, model=self._name)
        for job in jobs:
            self._drop_members(job, np.ones(len(job.members), np.bool_), error)

    def _drop_failed(self, work: Pass) -> None:
        by_job: dict[int, list[FailedUnit]] = {}
        for unit in work.failed:
            by_job.setdefault(unit.job, []).append(unit)
        kept_rows = np.ones(work.row_count, np.bool_)
        for index, units in by_job.items():
            start = work.starts[index]
            kept = self._drop_units(work, index, units)
            kept_rows[start : start + len(kept)] = kept
        _compact(work, kept_rows)

    def _drop_units(self, work: Pass, index: int, units: Sequence[FailedUnit]) -> Mask:
        job = work.jobs[index]
        dropped = np.zeros(len(job.members), np.bool_)
        _log.debug("inputs refused by the model", model=self._name, cause=units[0].cause)
        dropped[[unit.session for unit in units]] = True
        rows = job.row_mask(~dropped)
        self._drop_members(job, dropped, _refusal(work, index, units[0]))
        return rows

    def _drop_members(self, job: Job, dropped: Mask, error: ServerError) -> None:
        """Go on without some members; all of them may go."""
        members = job.members[dropped]
        handles = None if job.handles is None else job.handles[dropped]
        freed = job.keep(~dropped)
        if freed is not None:
            self._slots.free_working(freed)
        job.owner.fail(members, error)
        if handles is not None:
            self._completion.release(handles)


def _refusal(work: Pass, index: int, unit: FailedUnit) -> ServerError:
    # LiteRT's text goes on about nodes, and about failures before this one
    cause = unit.cause.strip().partition("Node number")[0].strip().splitlines()
    said = cause[0][:200] if cause else "no reason given"
    sizes = work.jobs[index].sizes
    low = int(work.starts[index] + sizes[: unit.session].sum())
    got = _whole_numbers(work, low, low + int(sizes[unit.session]))
    return InvalidInput(f"inputs must be ones that the model can run{got}; it refused them: {said}")


def _whole_numbers(work: Pass, low: int, high: int) -> str:
    """What integer inputs hold: an index out of an Embedding's range is the usual reason."""
    held = [
        f"input {spec.name!r} holds {array[low:high].min()} to {array[low:high].max()}"
        for spec, array in zip(work.program.inputs, work.inputs, strict=True)
        if array.dtype.kind in "iu"
    ]
    return f" (an Embedding's indexes within its range, for one); {', '.join(held)}" if held else ""


def _collect(work: Pass, index: int, job: Job) -> None:
    """Copy a job's share of the pass's outputs to the job."""
    if not job.collected:
        job.collected = [
            np.empty((job.row_count, job.steps, *spec.shape), spec.dtype)
            if spec.temporal and job.select.value == "all"
            else None
            for spec in work.program.outputs
        ]
    start = work.starts[index]
    for kept, output in zip(job.collected, work.outputs, strict=True):
        if kept is not None:
            share = output[:, start : start + job.row_count]
            kept[:, job.done : job.done + work.steps] = share.swapaxes(0, 1)


def _compact(work: Pass, kept: Mask) -> None:
    """Take the rows of failed sessions out of a pass."""
    work.outputs = [output[:, kept] for output in work.outputs]
    work.starts = np.cumsum([0, *(job.row_count for job in work.jobs)], dtype=np.intp)
    work.row_count = int(work.starts[-1])
    work.target_rows = work.target_rows[kept]
