"""The end of jobs: what they changed is kept, and their callers are answered."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeVar

import numpy as np
import numpy.typing as npt

from stepwell_server.clock import Clock
from stepwell_server.core.sessions import Handles, SessionTable
from stepwell_server.engine.api import Observer
from stepwell_server.engine.call import Call
from stepwell_server.engine.durability.committer import Change, Keeper
from stepwell_server.engine.intake.admission import Admission
from stepwell_server.engine.job import Job
from stepwell_server.engine.passes.batch import Pass
from stepwell_server.engine.passes.predict import PredictCall
from stepwell_server.engine.state.model import ServedModel
from stepwell_server.engine.state.replies import Kept, Outputs
from stepwell_server.errors import ServerError
from stepwell_server.logs import Log

_log = Log("engine.replies")
S = TypeVar("S", bound=np.generic)


class ModelCompletion:
    """See `loop.Completion`. One per model."""

    def __init__(
        self,
        table: SessionTable,
        admission: Admission,
        keeper: Keeper,
        *,
        clock: Clock,
        observer: Observer,
    ) -> None:
        self._table = table
        self._admission = admission
        self._keeper = keeper
        self._clock = clock
        self._observer = observer
        self.model: ServedModel | None = None
        """Set once the model is put together."""

    def release(self, handles: Handles) -> None:
        """See `loop.Completion`."""
        self._admission.release(handles)

    def complete(self, work: Pass, jobs: Sequence[tuple[int, Job]]) -> None:
        """See `loop.Completion`."""
        changes = [(index, job) for index, job in jobs if job.handles is not None]
        if changes:
            self._complete_changes(work, changes)
        for index, job in jobs:
            if isinstance(job.owner, PredictCall):
                job.owner.complete(work, index, job)

    def _complete_changes(self, work: Pass, jobs: Sequence[tuple[int, Job]]) -> None:
        model = self._model()
        self._exchange_rows(model, [job for _, job in jobs])
        self._keep_outputs(model, work, jobs)
        outputs = [model.replies.outputs(work, index, job) for index, job in jobs]
        change = self._change(model, [job for _, job in jobs], outputs)
        ended = self._clock.monotonic()

        def answer(error: ServerError | None) -> None:
            now = self._clock.monotonic()
            if self._keeper.is_durable:
                self._observer.stage(model.name, "commit", now - ended, len(change.handles))
            self._answer(change, [job for _, job in jobs], outputs, error, now)

        free = self._keeper.keep(change, answer)
        if len(free):
            self._admission.release(free)

    def _change(self, model: ServedModel, jobs: Sequence[Job], outputs: Sequence[Outputs]) -> Change:
        handles = _join([job.handles for job in jobs])
        counts = [len(job.members) for job in jobs]
        steps = np.repeat(np.array([job.steps for job in jobs], np.uint64), counts)
        kept = [model.replies.kept(job) for job in jobs]
        arrays: dict[int, Outputs] = {}
        for job, how, given, start in zip(jobs, kept, outputs, np.cumsum([0, *counts]), strict=False):
            if how is Kept.ARRAYS:
                arrays.update(enumerate(model.replies.arrays_of(job, given), int(start)))
        return Change(
            model,
            handles,
            self._table.revision[handles] + np.uint64(1),
            self._table.position[handles] + steps,
            _join([_call(job).request_ids(job.members) for job in jobs]),
            np.repeat(np.array(kept, np.uint8), counts),
            arrays,
        )

    def _answer(
        self,
        change: Change,
        jobs: Sequence[Job],
        outputs: Sequence[Outputs],
        error: ServerError | None,
        now: float,
    ) -> None:
        start = 0
        for job, given in zip(jobs, outputs, strict=True):
            end = start + len(job.members)
            try:
                if error is not None:
                    _call(job).fail(job.members, error)
                else:
                    self._observer.stage(change.model.name, "total", now - job.queued_at, end - start)
                    _call(job).succeed(
                        job.members, change.revisions[start:end], change.positions[start:end], given
                    )
            except Exception as raised:
                # its caller's loss, and no one else's: the others' answers and the claims are due
                _log.defect("an answer could not be delivered", raised, model=change.model.name)
            start = end
        if error is None:
            row_steps = sum(job.row_count * job.steps for job in jobs)
            self._observer.applied(change.model.name, "step", len(change.handles), row_steps)

    def _exchange_rows(self, model: ServedModel, jobs: Sequence[Job]) -> None:
        for job in jobs:
            if job.working is None or job.handles is None:
                continue
            self._table.set_rows_of(job.handles, job.working)
            model.slots.owner[self._table.row[job.handles]] = job.handles
            model.slots.free_working(job.rows)

    def _keep_outputs(self, model: ServedModel, work: Pass, jobs: Sequence[tuple[int, Job]]) -> None:
        last = [output[-1] for output in work.outputs]
        if len(jobs) == len(work.jobs):
            model.arena.keep_outputs(work.target_rows, last)
            return
        spans = [np.arange(work.starts[i], work.starts[i] + job.row_count) for i, job in jobs]
        rows = np.concatenate(spans)
        model.arena.keep_outputs(work.target_rows[rows], [output[rows] for output in last])

    def _model(self) -> ServedModel:
        assert self.model is not None, "the model is put together before its loop runs"
        return self.model


def _join(arrays: Sequence[npt.NDArray[S] | None]) -> npt.NDArray[S]:
    given = [array for array in arrays if array is not None]
    return given[0] if len(given) == 1 else np.concatenate(given)


def _call(job: Job) -> Call:
    assert isinstance(job.owner, Call), "jobs with sessions come from calls"
    return job.owner
