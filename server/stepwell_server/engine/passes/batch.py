"""A pass: one run of the program over the rows of many jobs.

Only the executor's buffers change until all of a session's rows have run: a pass is attempted first, and stored
afterwards.
"""

from __future__ import annotations

import dataclasses
import itertools
import time
from collections.abc import Sequence
from typing import TypeAlias, TypeVar

import numpy as np
import numpy.typing as npt

from stepwell_server.core.slots import Rows
from stepwell_server.engine.api import Select
from stepwell_server.engine.executors.base import ExecutionError, Executor
from stepwell_server.engine.executors.windows import WindowExecutor
from stepwell_server.engine.job import Job
from stepwell_server.engine.state.arena import Arena
from stepwell_server.engine.state.rings import StepParts
from stepwell_server.engine.types import Array, Mask
from stepwell_server.program import Program

S = TypeVar("S", bound=np.generic)


@dataclasses.dataclass(frozen=True, slots=True)
class FailedUnit:
    """A session whose rows the program cannot run."""

    job: int
    """Index of the job in the pass."""
    session: int
    """Index of the session in the job."""
    cause: str
    """The executor's message, for the log; a trimmed form is for the caller."""


class Pass:
    """The next time step, or several, of some jobs, packed together."""

    def __init__(self, program: Program, jobs: Sequence[Job], steps: int) -> None:
        self.program = program
        self.jobs = jobs
        self.steps = steps
        self.starts = starts_of(jobs)
        """Where each job's rows begin, followed by the total."""
        self.row_count = self.starts[-1]
        self.source_rows = join([job.source_rows for job in jobs])
        self.target_rows = join([job.target_rows for job in jobs])
        self.inputs = [
            join([job.window(i, spec.temporal, steps) for job in jobs])
            for i, spec in enumerate(program.inputs)
        ]
        self.outputs: list[Array] = [
            np.empty((steps, self.row_count, *spec.shape), spec.dtype) for spec in program.outputs
        ]
        """`(steps, rows, ...)`; filled by the executors."""
        self.is_slice = steps > 1 and any(job.steps_left > steps for job in jobs)
        """Whether it runs only some of a job's time steps."""
        self.resets: list[Mask | None] = []
        """For each time step: rows reset to the initial state, `(rows,)`, or None; empty: no resets at all."""
        self.state_rows: Rows | None = None
        """Rows whose states are kept after every time step; None: none."""
        self.states: list[Array] = []
        """The states of those rows, `(steps, state rows, ...)`; filled by the executors."""
        self.is_in_place = program.has_rings and steps == 1
        """Whether it is one plain time step of rows that it may change: see `Lane`."""
        for job in jobs:
            if not job.is_plain:
                self.is_in_place = False
                self._ask_for_more()
                break
        if self.is_in_place:
            self.is_in_place = all(job.source_rows is job.target_rows for job in jobs)
        self.rows_wanted = 0
        """The rows it would have had without other active models."""
        self.failed: list[FailedUnit] = []
        self.seconds = 0.0

    def _ask_for_more(self) -> None:
        """Set the fields that most passes do not need."""
        self.resets = _resets(self.jobs, self.steps)
        self.state_rows = rows = _state_rows(self.jobs, self.starts)
        if rows is not None:
            self.states = [
                np.empty((self.steps, len(rows), *spec.shape), spec.dtype) for spec in self.program.state
            ]

    def fill(self, inputs: Sequence[Array], low: int, high: int, step: int) -> None:
        """Copy the inputs of rows `low` up to `high` at time step `step` of the pass."""
        for spec, source, target in zip(self.program.inputs, self.inputs, inputs, strict=True):
            if spec.temporal and self.steps > 1:
                target[...] = source[low:high, step]
            else:
                target[...] = source[low:high]

    def units(self) -> tuple[Rows, list[tuple[int, int]]]:
        """Where each session's rows begin, followed by the total; and each session's job and place in it."""
        sizes = np.concatenate([job.sizes for job in self.jobs])
        names = [(j, s) for j, job in enumerate(self.jobs) for s in range(len(job.sizes))]
        return np.concatenate(([0], np.cumsum(sizes))), names


def outputs_of(work: Pass, index: int, job: Job) -> dict[str, Array]:
    """The outputs of a job after its last step, by name; views of the pass's arrays."""
    if job.select is Select.NONE:
        return {}
    start = work.starts[index]
    found: dict[str, Array] = {}
    for i, spec in enumerate(work.program.outputs):
        last = work.outputs[i][-1, start : start + job.row_count]
        series = job.collected[i] if job.collected else None
        if series is not None:
            last = series
        elif spec.temporal and job.has_time:
            last = last[:, None]
        found[spec.name] = last
    return found


def _resets(jobs: Sequence[Job], steps: int) -> list[Mask | None]:
    if all(job.reset_rows is None for job in jobs):
        return []
    nothing = [np.zeros(job.row_count, np.bool_) for job in jobs]
    resets: list[Mask | None] = []
    for step in range(steps):
        of_jobs = [job.resets_at(step) for job in jobs]
        if any(mask is not None and mask.any() for mask in of_jobs):
            masks = zip(of_jobs, nothing, strict=True)
            resets.append(join([none if mask is None else mask for mask, none in masks]))
        else:
            resets.append(None)
    return resets


def _state_rows(jobs: Sequence[Job], starts: Sequence[int]) -> Rows | None:
    if not any(job.keeps_states for job in jobs):
        return None
    return join(
        [
            start + (np.arange(job.row_count) if job.state_rows is None else job.state_rows)
            for job, start in zip(jobs, starts, strict=False)
            if job.keeps_states
        ]
    )


def starts_of(jobs: Sequence[Job]) -> list[int]:
    """Where each job's rows begin, followed by the total."""
    return list(itertools.accumulate([job.row_count for job in jobs], initial=0))


def join(arrays: Sequence[npt.NDArray[S]]) -> npt.NDArray[S]:
    """Concatenate arrays; a single one is not copied."""
    return arrays[0] if len(arrays) == 1 else np.concatenate(arrays)


def _put_initial(program: Program, states: Sequence[Array], where: Mask) -> None:
    """Reset rows of an executor's states. No other view of its buffers may exist."""
    for buffer, value in zip(states, program.initial, strict=True):
        buffer[where] = value


_Way: TypeAlias = tuple[Executor, Arena | StepParts]


class Lane:
    """An executor, and what it does for a pass. For one thread at a time.

    Rings stay in the arena in a pass of one plain time step: only what the step reads and changes is copied. Other passes
    copy whole states.
    """

    def __init__(self, program: Program, executor: Executor, arena: Arena) -> None:
        self._whole: _Way = (executor, arena)
        self.in_place: _Way = self._whole
        """What runs one time step of rows that it may change, and where their states are."""
        parts = arena.parts(program)
        if parts is not None and isinstance(executor, WindowExecutor):
            self.in_place = (executor.parts, parts)
        self._executor: Executor = executor
        self._rows: Arena | StepParts = arena
        self.spent_s = 0.0
        """Processor time of the last `attempt` and `store`, in seconds."""
        self.is_on_thread = False
        """A thread runs a piece of a pass with it. For the event loop, which sets it."""

    def attempt(self, work: Pass, low: int, high: int) -> None:
        """Run rows `low` up to `high`. The new state stays in the executor.

        Raises:
            ExecutionError: the program raised; nothing changed.
        """
        started = time.thread_time()
        self._executor, self._rows = self.in_place if work.is_in_place else self._whole
        executor = self._executor
        executor.bind(high - low)
        self._rows.gather(work.source_rows[low:high], executor.states())
        for step in range(work.steps):
            if step:
                executor.carry()
            if work.resets and (resets := work.resets[step]) is not None:
                _put_initial(work.program, executor.states(), resets[low:high])
            work.fill(executor.inputs(), low, high, step)
            executor.invoke()
            self._collect(work, low, high, step)
        self.spent_s = time.thread_time() - started

    def _collect(self, work: Pass, low: int, high: int, step: int) -> None:
        # a separate function: no view of the executor's buffers may outlive it
        for kept, output in zip(work.outputs, self._executor.outputs(), strict=True):
            kept[step, low:high] = output
        if work.state_rows is not None:
            here = (work.state_rows >= low) & (work.state_rows < high)
            rows = work.state_rows[here] - low
            for kept, state in zip(work.states, self._executor.next_states(), strict=True):
                kept[step, here] = state[rows]

    def store(self, work: Pass, low: int, high: int) -> None:
        """Write the result of the last `attempt` of the same rows to the arena."""
        started = time.thread_time()
        self._rows.write(work.target_rows[low:high], self._executor.next_states())
        self.spent_s += time.thread_time() - started

    def narrow(self, work: Pass, error: ExecutionError | None = None) -> None:
        """Run a failed pass in parts, until each session has either run or been found to fail.

        ``error`` is that of the whole pass, if it ran as a whole: then it is not run again. Nothing is stored before all parts have run: if the executor breaks, nothing has changed.
        """
        starts, names = work.units()
        parts = [(0, len(names))]
        if error is not None:
            parts = self._halves(work, names, 0, len(names), error)
        ran: list[tuple[Rows, list[Array]]] = []
        while parts:
            first, last = parts.pop()
            try:
                self.attempt(work, int(starts[first]), int(starts[last]))
            except ExecutionError as problem:
                parts += self._halves(work, names, first, last, problem)
            else:
                ran.append((work.target_rows[starts[first] : starts[last]], self._next_states()))
        for rows, states in ran:
            self._rows.write(rows, states)

    def _halves(
        self, work: Pass, names: Sequence[tuple[int, int]], first: int, last: int, error: ExecutionError
    ) -> list[tuple[int, int]]:
        """The parts of a failed part; a single session has failed."""
        if last - first == 1:
            work.failed.append(FailedUnit(*names[first], cause=str(error)))
            return []
        middle = (first + last) // 2
        return [(middle, last), (first, middle)]

    def _next_states(self) -> list[Array]:
        return [state.copy() for state in self._executor.next_states()]
