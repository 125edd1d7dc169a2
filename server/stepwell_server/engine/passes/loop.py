"""The pass loop of one model: select jobs, run a pass, complete it.

If nothing runs, what has arrived starts at once; what arrives while a pass runs forms the next one. A pass may wait
for steps that were just answered only if its fixed cost is high and a single connection is active: see
`BatchingWindow`. Everything here happens on the event loop, except passes that the runner puts on threads.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Sequence

import numpy as np

from stepwell_server.clock import Clock
from stepwell_server.core.scheduler import ACTIVE_S
from stepwell_server.core.sessions import Handles
from stepwell_server.engine.api import Observer, Select, Trace
from stepwell_server.engine.change import Change
from stepwell_server.engine.commit.group_commit import GroupCommit
from stepwell_server.engine.intake.admission import Admission
from stepwell_server.engine.intake.queues import Inbox, joined_where_alike
from stepwell_server.engine.job import Job
from stepwell_server.engine.passes.batch import FailedUnit, Pass, starts_of
from stepwell_server.engine.passes.batching_window import BatchingWindow
from stepwell_server.engine.passes.completion import Completion
from stepwell_server.engine.passes.direct import Direct
from stepwell_server.engine.passes.runner import SHORT_SLICE_S, SLICE_S, Runner
from stepwell_server.engine.state.model import Model
from stepwell_server.engine.types import Mask
from stepwell_server.errors import InvalidInput, ServerError
from stepwell_server.logs import Log

_log = Log("engine.loop")
#: Admitting more rows than this takes as long as a short pass.
LARGE_INTAKE = 64
#: One in this many short passes has few rows: only such passes show what a pass costs regardless of its rows. Steps of
#: few rows often run without a pass.
_PROBE_INTERVAL, _PROBE_ROWS = 16, 8


class PassLoop:
    """Runs the ready jobs of one model, pass after pass."""

    def __init__(
        self,
        model: Model,
        inbox: Inbox,
        admission: Admission,
        runner: Runner,
        completion: Completion,
        direct: Direct,
        release: Callable[[Handles], None],
        commits: GroupCommit,
        *,
        clock: Clock,
        observer: Observer,
    ) -> None:
        self._model = model
        self._inbox = inbox
        self._admission = admission
        self.runner = runner
        self._completion = completion
        self._direct = direct
        self._release = release
        """Ends the claims of sessions whose job failed."""
        self._commits = commits
        """No pass begins while too much waits for the store; `model.work` is rung when that has ended."""
        self._clock = clock
        self._observer = observer
        self._pass_began = 0.0
        self._window = BatchingWindow(model.max_batch_rows, clock)
        self._alarm = threading.Event()
        """Rings when the next pass has waited long enough; set: there is no wait, or it is over."""
        self._alarm.set()
        self._unprobed = 0
        """Short passes since the last one that had few rows to measure its cost."""
        self._idle = asyncio.Event()
        self._loop = asyncio.get_running_loop()
        model.work.listen(self._iterate)
        inbox.listen(direct.run_unchecked)

    @property
    def busy(self) -> bool:
        """Whether a pass runs, or something waits for one."""
        return (
            self._model.is_running or self._model.work.is_due or bool(self._inbox) or bool(self._model.ready)
        )

    async def idle(self) -> None:
        """Return when no pass runs and nothing waits for one."""
        while self.busy:
            self._idle.clear()
            await self._idle.wait()

    def _iterate(self) -> bool:
        """Drain the inbox, admit, select, run, and complete what ran in place.

        Returns:
            Whether there is work for another iteration. A pass on threads rings when it ends.
        """
        if (
            self._model.is_running
            or self._commits.is_full
            or (self._window.is_open and self._waits_for_callers())
        ):
            return False
        rows = self._inbox.rows
        came = self._inbox.drain()
        if came and not (len(came) == 1 and self._direct.run(came[0])):
            self._admit(came)
            if rows > LARGE_INTAKE and self._model.ready.is_contended(self._clock.monotonic()):
                return True  # the pass is another iteration, with the steps that arrive before it
        wanted = min(self._model.ready.rows_waiting, self._model.max_batch_rows)
        began = self._clock.monotonic()
        jobs = self._choose() if wanted else ()
        if jobs:
            rows = sum(job.row_count for job in jobs)
            if self._run(jobs, wanted):  # then `_finish`: commit and reply
                return False
            self._model.iteration_cost.learn(rows, self._clock.monotonic() - began)
        has_more = bool(self._inbox) or self._model.ready.rows_waiting > 0
        if not has_more:
            self._idle.set()
        return has_more

    def _admit(self, came: list[Change]) -> None:
        if self._model.ready.rows_waiting:
            self._model.ready.contended_until = self._clock.monotonic() + ACTIVE_S
        self._admission.admit(joined_where_alike(came))

    def _waits_for_callers(self) -> bool:
        """Whether the queued work waits for callers that were just answered. Arrivals ring, or else the alarm does."""
        left_s = 0.0
        if not self._may_wait():
            self._window.close()
        elif self._inbox:
            left_s = self._window.left_s(self._inbox.rows, self._inbox.deadline)
        if left_s:
            if self._alarm.is_set():
                self._alarm = self.runner.wake(left_s, self._wake)
            return True
        self._alarm.set()
        return False

    def _may_wait(self) -> bool:
        """Whether a wait would delay no others: no other connection, model or earlier work is active."""
        ready, now = self._model.ready, self._clock.monotonic()
        source = ready.only_source(now)
        is_alone = source is not None and self._inbox.is_of(source) and not ready
        return is_alone and self.runner.max_s(now) is None

    def _wake(self) -> None:
        """Called from a thread."""
        self._loop.call_soon_threadsafe(self._model.work.ring)

    def _run(self, jobs: Sequence[Job], wanted: int) -> bool:
        """Run a pass; return whether it was put on threads."""
        try:
            now = self._clock.monotonic()
            slice_s = SHORT_SLICE_S if now < self._model.ready.contended_until else SLICE_S
            slice_s = min(slice_s, self.runner.max_s(now) or slice_s)
            budget = self._model.cost.times_within(sum(job.row_count for job in jobs), slice_s)
            work = Pass(self._model.program, jobs, self._model.ready.steps_together(jobs, budget))
        except Exception as error:
            self._fail_all(jobs, error)
            return False
        self._model.is_running, self._pass_began = True, now
        if self.runner.is_small(work):
            broken: BaseException | None = None
            try:
                self.runner.run_in_place(work)
            except Exception as error:
                broken = error
            self._finish(work, broken)
            return False
        work.rows_wanted = wanted
        self.runner.run_on_threads(work, lambda broken: self._wake_loop(work, broken))
        return True

    def _choose(self) -> list[Job]:
        now = self._clock.monotonic()
        chosen: list[Job] = []
        later: list[Job] = []
        ready = self._model.ready
        while ready and not chosen:
            most = (
                ready.max_rows_of_pass(now, self._model.rows_of_a_short_pass)
                if ready.is_contended(now)
                else None
            )
            if most is not None:
                self._unprobed += 1
                if self._unprobed >= _PROBE_INTERVAL:
                    self._unprobed, most = 0, min(most, _PROBE_ROWS)
            max_s = self.runner.max_s(now)
            if max_s is not None:
                rows = self.runner.rows_within(max_s)
                most = rows if most is None and rows < ready.rows_waiting else most and min(most, rows)
            for job in ready.next_pass(now, most):
                self._consider(job, now, chosen, later)
        for job in later:
            self._model.ready.add(job)
        return chosen

    def _consider(self, job: Job, now: float, chosen: list[Job], later: list[Job]) -> None:
        for members, error in job.owner.drop(job.members, now):
            self._drop_members(job, np.isin(job.members, members), error)
        if not job.row_count:
            return
        if job.needs_working_rows:
            rows = self._model.slots.take_working(job.row_count)
            if rows is None:
                later.append(job)
                return
            job.work_on(rows)
        if job.done == 0:
            self._observer.stage(self._model.name, "wait", now - job.queued_at, len(job.members))
            if job.owner.traces:
                for trace in job.traces:
                    trace.stage("queue", job.queued_at, now)
        chosen.append(job)

    def _wake_loop(self, work: Pass, broken: BaseException | None) -> None:
        """Called from a compute thread: one wake-up of the event loop per pass."""
        self._loop.call_soon_threadsafe(self._finish_on_loop, work, broken)

    def _finish_on_loop(self, work: Pass, broken: BaseException | None) -> None:
        began = self._clock.monotonic()
        self.runner.ended()
        self._finish(work, broken)
        answered = sum(job.row_count for job in work.jobs if not job.steps_left) if work.steps == 1 else 0
        self._window.answered(answered, self._inbox.rows, self._model.cost, began - self._pass_began)
        self._model.work.used(self._clock.monotonic() - began)

    def _finish(self, work: Pass, broken: BaseException | None) -> None:
        self._model.is_running = False
        if broken is not None:
            self._fail_all(work.jobs, broken)
        else:
            self._observer.pass_done(self._model.name, work.row_count, work.steps, work.seconds)
            self._trace([trace for job in work.jobs if job.owner.traces for trace in job.traces], work)
            if work.failed:
                self._drop_failed(work)
            self._advance(work)
        self._model.work.ring()

    def _trace(self, traces: Sequence[Trace], work: Pass) -> None:
        if traces:
            now = self._clock.monotonic()
            traces[0].ran(traces, self._model.name, work.row_count, work.steps, now - work.seconds, now)

    def _advance(self, work: Pass) -> None:
        ended: list[tuple[int, Job]] = []
        for index, job in enumerate(work.jobs):
            if not job.row_count:
                continue
            if job.steps > 1:
                _collect(work, index, job)
            job.done += work.steps
            if job.steps_left:
                self._model.ready.add(job)
            else:
                ended.append((index, job))
        if ended:
            self._completion.complete(work, ended)

    def _fail_all(self, jobs: Sequence[Job], broken: BaseException) -> None:
        error = _log.internal("a pass raised", broken, model=self._model.name)
        for job in jobs:
            self._drop_members(job, np.ones(len(job.members), np.bool_), error)

    def _drop_failed(self, work: Pass) -> None:
        by_job: dict[int, list[FailedUnit]] = {}
        for unit in work.failed:
            by_job.setdefault(unit.job, []).append(unit)
        kept_rows = np.ones(work.row_count, np.bool_)
        for index, units in by_job.items():
            job, start = work.jobs[index], work.starts[index]
            dropped = np.zeros(len(job.members), np.bool_)
            dropped[[unit.session for unit in units]] = True
            kept_rows[start : start + job.row_count] = job.row_mask(~dropped)
            _log.debug("inputs refused by the model", model=self._model.name, cause=units[0].cause)
            self._drop_members(job, dropped, _refusal(work, index, units[0]))
        _compact(work, kept_rows)

    def _drop_members(self, job: Job, dropped: Mask, error: ServerError) -> None:
        """Continue without some members; possibly without any."""
        members = job.members[dropped]
        handles = None if job.handles is None else job.handles[dropped]
        freed = job.keep(~dropped)
        if freed is not None:
            self._model.slots.free_working(freed)
        job.owner.fail(members, error)
        if handles is not None:
            self._release(handles)


def _refusal(work: Pass, index: int, unit: FailedUnit) -> ServerError:
    # LiteRT's text continues with details of nodes, and earlier failures
    cause = unit.cause.strip().partition("Node number")[0].strip().splitlines()
    shown = cause[0][:200] if cause else "no reason given"
    sizes = work.jobs[index].sizes
    low = int(work.starts[index] + sizes[: unit.session].sum())
    got = _whole_numbers(work, low, low + int(sizes[unit.session]))
    return InvalidInput(f"inputs must be ones that the model can run{got}; it failed with: {shown}")


def _whole_numbers(work: Pass, low: int, high: int) -> str:
    """The ranges of integer inputs: an index outside an Embedding's range is the usual reason."""
    held = [
        f"input {spec.name!r} holds {array[low:high].min()} to {array[low:high].max()}"
        for spec, array in zip(work.program.inputs, work.inputs, strict=True)
        if array.dtype.kind in "iu"
    ]
    return (
        f" (for example, indexes must be in the range of their Embedding); {', '.join(held)}" if held else ""
    )


def _collect(work: Pass, index: int, job: Job) -> None:
    """Copy a job's part of the pass's outputs and states to the job."""
    if not job.collected:
        job.collected = [
            np.empty((job.row_count, job.steps, *spec.shape), spec.dtype)
            if spec.temporal and job.select is Select.ALL
            else None
            for spec in work.program.outputs
        ]
    start = work.starts[index]
    end, steps = start + job.row_count, slice(job.done, job.done + work.steps)
    for kept, output in zip(job.collected, work.outputs, strict=True):
        if kept is not None:
            kept[:, steps] = output[:, start:end].swapaxes(0, 1)
    if job.keeps_states and work.state_rows is not None:
        own = (work.state_rows >= start) & (work.state_rows < end)
        shares = [states[:, own].swapaxes(0, 1) for states in work.states]
        if not job.state_series:
            job.state_series = [
                np.empty((len(share), job.steps, *share.shape[2:]), share.dtype) for share in shares
            ]
        for kept, share in zip(job.state_series, shares, strict=True):
            kept[:, steps] = share


def _compact(work: Pass, kept: Mask) -> None:
    """Remove the rows of failed sessions from a pass."""
    work.outputs = [output[:, kept] for output in work.outputs]
    if work.state_rows is not None:
        own = kept[work.state_rows]
        work.states = [states[:, own] for states in work.states]
        work.state_rows = (np.cumsum(kept) - 1)[work.state_rows[own]]
    work.starts = starts_of(work.jobs)
    work.row_count = work.starts[-1]
    work.target_rows = work.target_rows[kept]
