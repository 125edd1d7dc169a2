"""The end of jobs: sessions advance, replies are remembered, callers are answered."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import TypeVar

import numpy as np
import numpy.typing as npt

from stepwell_server.clock import Clock
from stepwell_server.core.sessions import Handles, SessionTable
from stepwell_server.engine.admission import Admission
from stepwell_server.engine.call import Call
from stepwell_server.engine.calls import Observer
from stepwell_server.engine.job import Job
from stepwell_server.engine.passes import Pass
from stepwell_server.engine.predict import PredictCall
from stepwell_server.engine.served import ServedModel

log = logging.getLogger(__name__)
S = TypeVar("S", bound=np.generic)


class ModelCompletion:
    """See `loop.Completion`. One per model."""

    def __init__(
        self, table: SessionTable, admission: Admission, *, clock: Clock, observer: Observer
    ) -> None:
        self._table = table
        self._admission = admission
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
        handles = _join([job.handles for _, job in jobs])
        self._exchange_rows(model, [job for _, job in jobs])
        self._keep_outputs(model, work, jobs)
        self._advance(handles, jobs)
        started = self._clock.monotonic()
        starts = np.cumsum([0, *(len(job.members) for _, job in jobs)])
        revisions, positions = self._table.revision[handles], self._table.position[handles]
        for (index, job), start, end in zip(jobs, starts[:-1], starts[1:], strict=True):
            outputs = model.replies.outputs(work, index, job)
            model.replies.remember(job, handles[start:end], outputs)
            self._observer.stage(model.name, "total", started - job.queued_at, len(job.members))
            assert isinstance(job.owner, Call), "jobs with sessions come from calls"
            try:
                job.owner.succeed(job.members, revisions[start:end], positions[start:end], outputs)
            except Exception:
                # its caller's loss, and no one else's: the others' answers and the claims are due
                log.exception("an answer for model %s could not be delivered", model.name)
        row_steps = sum(job.row_count * job.steps for _, job in jobs)
        self._observer.applied(model.name, "step", len(handles), row_steps)
        self._admission.release(handles)

    def _exchange_rows(self, model: ServedModel, jobs: Sequence[Job]) -> None:
        for job in jobs:
            if job.working is None or job.handles is None:
                continue
            self._table.set_rows_of(job.handles, job.working)
            model.slots.free_working(job.rows)

    def _keep_outputs(self, model: ServedModel, work: Pass, jobs: Sequence[tuple[int, Job]]) -> None:
        last = [output[-1] for output in work.outputs]
        if len(jobs) == len(work.jobs):
            model.arena.keep_outputs(work.target_rows, last)
            return
        spans = [np.arange(work.starts[i], work.starts[i] + job.row_count) for i, job in jobs]
        rows = np.concatenate(spans)
        model.arena.keep_outputs(work.target_rows[rows], [output[rows] for output in last])

    def _advance(self, handles: Handles, jobs: Sequence[tuple[int, Job]]) -> None:
        table = self._table
        table.revision[handles] += np.uint64(1)
        steps = np.repeat([job.steps for _, job in jobs], [len(job.members) for _, job in jobs])
        table.position[handles] += steps.astype(np.uint64)
        table.request_id[handles] = _join(
            [job.owner.request_ids(job.members) for _, job in jobs if isinstance(job.owner, Call)]
        )
        table.used[handles] = self._clock.monotonic()

    def _model(self) -> ServedModel:
        assert self.model is not None, "the model is put together before its loop runs"
        return self.model


def _join(arrays: Sequence[npt.NDArray[S] | None]) -> npt.NDArray[S]:
    given = [array for array in arrays if array is not None]
    return given[0] if len(given) == 1 else np.concatenate(given)
