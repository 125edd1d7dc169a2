"""The end of jobs: what they changed is committed, and their callers are answered."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import numpy as np
import numpy.typing as npt

from stepwell_server.clock import Clock
from stepwell_server.core.sessions import SessionTable
from stepwell_server.core.slots import Rows
from stepwell_server.engine.api import Observer, Select
from stepwell_server.engine.change import Change
from stepwell_server.engine.durability.committer import Committer
from stepwell_server.engine.durability.records import Outcome
from stepwell_server.engine.job import Job
from stepwell_server.engine.passes.batch import Pass, join, outputs_of
from stepwell_server.engine.passes.predict import PredictCall
from stepwell_server.engine.state.model import Model
from stepwell_server.engine.state.replies import Kept
from stepwell_server.engine.types import Mask, Members, Tensors
from stepwell_server.errors import ServerError


class Completion:
    """Ends the jobs of one model. Lives on the event loop."""

    def __init__(
        self,
        model: Model,
        table: SessionTable,
        committer: Committer,
        again: Callable[[Change, Members], None],
        *,
        clock: Clock,
        observer: Observer,
    ) -> None:
        self._model = model
        self._table = table
        self._committer = committer
        self._again = again
        self._clock = clock
        self._observer = observer

    def complete(self, work: Pass, jobs: Sequence[tuple[int, Job]]) -> None:
        """Commit and answer jobs (with their index in the pass) that have run their last time step."""
        changes = [(index, job) for index, job in jobs if job.handles is not None]
        if changes:
            self._commit(work, changes)
        for index, job in jobs:
            if isinstance(job.owner, PredictCall):
                job.owner.complete(work, index, job)

    def _commit(self, work: Pass, ended: Sequence[tuple[int, Job]]) -> None:
        jobs = [job for _, job in ended]
        self._exchange_rows(jobs)
        self._keep_outputs(work, ended)
        outputs = [outputs_of(work, index, job) for index, job in ended]
        outcome = self._outcome(jobs, outputs)

        def answer(error: ServerError | None, places: Members | None) -> None:
            self._answer(outcome, jobs, outputs, error, _mask(len(outcome.handles), places))

        def again(places: Members) -> None:
            for job, _, own in _by_job(jobs, _mask(len(outcome.handles), places)):
                self._again(_change(job), job.members[own])

        self._committer.commit(outcome, answer, again)

    def _outcome(self, jobs: Sequence[Job], outputs: Sequence[Tensors]) -> Outcome:
        handles = join([job.handles for job in jobs if job.handles is not None])
        counts = [len(job.members) for job in jobs]
        kept = [_kept(job) for job in jobs]
        arrays: dict[int, Tensors] = {}
        for job, how, given, start in zip(jobs, kept, outputs, np.cumsum([0, *counts]), strict=False):
            if how is Kept.ARRAYS:
                arrays.update(enumerate(_arrays_of(job, given), int(start)))
        return Outcome(
            self._model,
            handles,
            self._table.revision[handles] + np.uint64(1),
            self._positions(jobs, handles, counts),
            join([_change(job).requests_of(job.members) for job in jobs]),
            np.repeat(np.array(kept, np.uint8), counts),
            arrays,
        )

    def _positions(
        self, jobs: Sequence[Job], handles: npt.NDArray[np.intp], counts: Sequence[int]
    ) -> npt.NDArray[np.uint64]:
        steps = np.repeat(np.array([job.steps for job in jobs], np.uint64), counts)
        before = self._table.position[handles]
        if any(job.reset_rows is not None for job in jobs):
            anew = [_change(job).begins_anew(job.members) for job in jobs]
            nobody = [np.zeros(count, np.bool_) for count in counts]
            begins = [none if some is None else some for some, none in zip(anew, nobody, strict=True)]
            before[np.concatenate(begins)] = 0
        return before + steps

    def _answer(
        self,
        outcome: Outcome,
        jobs: Sequence[Job],
        outputs: Sequence[Tensors],
        error: ServerError | None,
        which: Mask,
    ) -> None:
        """Answer those sessions of an outcome that share a fate."""
        now, row_steps = self._clock.monotonic(), 0
        given = {id(job): tensors for job, tensors in zip(jobs, outputs, strict=True)}
        for job, start, own in _by_job(jobs, which):
            if error is not None:
                _change(job).fail(job.members[own], error)
                continue
            count, end, tensors = int(np.count_nonzero(own)), start + len(own), given[id(job)]
            self._observer.stage(self._model.name, "total", now - job.queued_at, count)
            revisions, positions = outcome.revisions[start:end], outcome.positions[start:end]
            if count == len(own):
                _change(job).succeed(job.members, revisions, positions, tensors)
                row_steps += job.row_count * job.steps
            else:
                rows = job.row_mask(own)
                some = {name: array[rows] for name, array in tensors.items()}
                _change(job).succeed(job.members[own], revisions[own], positions[own], some)
                row_steps += int(np.count_nonzero(rows)) * job.steps
        if error is None:
            self._observer.applied(self._model.name, "step", int(np.count_nonzero(which)), row_steps)

    def _exchange_rows(self, jobs: Sequence[Job]) -> None:
        slots = self._model.slots
        for job in jobs:
            if job.working is None or job.handles is None:
                continue
            self._table.set_rows_of(job.handles, job.working)
            slots.owner[self._table.row[job.handles]] = job.handles
            slots.free_working(job.rows)

    def _keep_outputs(self, work: Pass, jobs: Sequence[tuple[int, Job]]) -> None:
        last = [output[-1] for output in work.outputs]
        if len(jobs) == len(work.jobs):
            self._model.arena.keep_outputs(work.target_rows, last)
            return
        spans = [np.arange(work.starts[i], work.starts[i] + job.row_count) for i, job in jobs]
        rows = np.concatenate(spans)
        self._model.arena.keep_outputs(work.target_rows[rows], [output[rows] for output in last])


def _mask(count: int, places: Members | None) -> Mask:
    if places is None:
        return np.ones(count, np.bool_)
    mask = np.zeros(count, np.bool_)
    mask[places] = True
    return mask


def _by_job(jobs: Sequence[Job], which: Mask) -> Iterator[tuple[Job, int, Mask]]:
    """Jobs some of whose sessions are meant: where theirs begin in the outcome, and which of them."""
    start = 0
    for job in jobs:
        own = which[start : start + len(job.members)]
        if own.any():
            yield job, start, own
        start += len(own)


def _kept(job: Job) -> Kept:
    """How the replies of a job are remembered."""
    if job.select is Select.NONE:
        return Kept.EMPTY
    if any(array is not None for array in job.collected):
        return Kept.ARRAYS
    return Kept.ROWS_WITH_TIME if job.has_time else Kept.ROWS


def _arrays_of(job: Job, outputs: Tensors) -> list[Tensors]:
    """A job's outputs by session: copies, so that one session does not keep the arrays of all alive."""
    ends: Rows = np.cumsum(job.sizes)
    return [
        {name: array[end - size : end].copy() for name, array in outputs.items()}
        for size, end in zip(job.sizes.tolist(), ends.tolist(), strict=True)
    ]


def _change(job: Job) -> Change:
    assert isinstance(job.owner, Change), "jobs with sessions come from changes"
    return job.owner
