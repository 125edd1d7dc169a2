"""Predict: a run without a session, through the same passes as everything else."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence

import numpy as np
from typing_extensions import override

from stepwell_server.core.scheduler import Source
from stepwell_server.core.slots import Rows
from stepwell_server.engine.api import PredictResult, Select, Trace
from stepwell_server.engine.change import cancelled, too_late
from stepwell_server.engine.intake.validation import CheckedInputs
from stepwell_server.engine.job import Job, Owner
from stepwell_server.engine.passes.batch import Pass, outputs_of
from stepwell_server.engine.state.model import Model
from stepwell_server.engine.types import Array, Mask, Members
from stepwell_server.errors import ServerError

#: Rows per job: a job without sessions cannot be split, and must not delay others.
_MAX_ROWS = 256


class PredictCall(Owner):
    """One run over any number of rows, in jobs of at most `max_batch_rows`. It owns those jobs."""

    traces: Mapping[int, Trace] | None = None

    def __init__(
        self,
        model: Model,
        checked: CheckedInputs,
        state: tuple[Array, ...] | None,
        rows: int,
        *,
        resets: Mask | None = None,
        deadline: float,
        source: Source,
        now: float,
    ) -> None:
        self._model = model
        self._state = state
        self._resets = resets
        self._deadline = deadline
        self._done: asyncio.Future[PredictResult] = asyncio.get_running_loop().create_future()
        self._left = rows
        self._outputs: list[Array | None] = [None] * len(model.program.outputs)
        self._final = [np.empty((rows, *s.shape), s.dtype) for s in model.program.state]
        self._rows = rows
        self._error: ServerError | None = None
        limit = min(model.max_batch_rows, model.slots.working_limit, _MAX_ROWS)
        self._jobs = [
            self._make_job(checked, low, min(low + limit, rows), source, now) for low in range(0, rows, limit)
        ]

    async def run(self) -> PredictResult:
        """Queue the jobs and wait for all of them."""
        jobs, self._jobs = self._jobs, []  # each job references this as its owner: break the cycle
        for job in jobs:
            self._model.ready.add(job)
        self._model.work.ring()
        return await self._done

    @override
    def drop(self, members: Members, now: float) -> Sequence[tuple[Members, ServerError]]:
        if self._error is not None:
            return [(members, self._error)]
        if self._done.cancelled():
            return [(members, cancelled())]
        return [(members, too_late())] if now >= self._deadline else ()

    def fail(self, _members: Members, error: ServerError) -> None:
        """See `job.Owner`. One failing row fails the whole run."""
        self._error = error
        if not self._done.done():
            self._done.set_exception(error)

    def complete(self, work: Pass, index: int, job: Job) -> None:
        """A job has run its last step: collect its results and free its rows."""
        low = int(job.members[0]) if len(job.members) else 0
        rows = job.working
        assert rows is not None, "a run without a session works on rows of its own"
        self._take_outputs(work, index, job)
        for final, values in zip(self._final, self._model.arena.read(rows), strict=True):
            final[low : low + job.row_count] = values
        self._model.slots.free_working(rows)
        self._left -= job.row_count
        if self._left == 0 and not self._done.done():
            self._done.set_result(self._result())

    def _take_outputs(self, work: Pass, index: int, job: Job) -> None:
        outputs = outputs_of(work, index, job)
        for i, array in enumerate(outputs.values()):
            whole = self._outputs[i]
            if whole is None:
                whole = self._outputs[i] = np.empty((self._rows, *array.shape[1:]), array.dtype)
            whole[job.members] = array

    def _result(self) -> PredictResult:
        program = self._model.program
        named = zip(program.outputs, self._outputs, strict=True)
        return PredictResult(
            outputs={spec.name: array for spec, array in named if array is not None},
            state={spec.name: array for spec, array in zip(program.state, self._final, strict=True)},
            version=self._model.version,
        )

    def _make_job(self, checked: CheckedInputs, low: int, high: int, source: Source, now: float) -> Job:
        members = np.arange(low, high, dtype=np.intp)
        return Job(
            owner=self,
            members=members,
            handles=None,
            rows=np.zeros(0, np.intp),
            sizes=np.ones(high - low, np.intp),
            inputs=[array[low:high] for array in checked.arrays],
            steps=checked.steps,
            with_time=checked.with_time,
            select=Select.ALL,
            source=source,
            queued_at=now,
            reset_rows=None if self._resets is None else self._resets[low:high],
            prepare=lambda rows: self._prepare(rows, low, high),
        )

    def _prepare(self, rows: Rows, low: int, high: int) -> None:
        if self._state is None:
            self._model.arena.reset(rows, self._model.program.initial)
        else:
            self._model.arena.write(rows, [array[low:high] for array in self._state])
