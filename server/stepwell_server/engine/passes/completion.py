"""Ends jobs: commits what they changed, and answers their callers."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import numpy as np
import numpy.typing as npt

from stepwell_server.clock import Clock
from stepwell_server.core.sessions import Handles, SessionTable
from stepwell_server.core.slots import Rows
from stepwell_server.engine.api import Made, Observer, Select
from stepwell_server.engine.change import NO_STATES, Change, Reply
from stepwell_server.engine.commit.committer import Committer
from stepwell_server.engine.commit.records import Outcome
from stepwell_server.engine.job import Job
from stepwell_server.engine.passes.batch import Pass, join, outputs_of
from stepwell_server.engine.passes.predict import PredictCall
from stepwell_server.engine.state.model import Model
from stepwell_server.engine.state.replies import ReplyArrays, ReplyForm, named_states
from stepwell_server.engine.types import U64, Mask, Members, Tensors
from stepwell_server.errors import ServerError
from stepwell_server.store.base import SMALL

#: A job is small if it has at most one in this many of the pass's sessions.
_SMALL = 8


class _FinishedJob:
    """A job that has run its last time step."""

    __slots__ = ("change", "job", "kept", "outputs", "place", "states")

    def __init__(self, job: Job, change: Change, outputs: Tensors, states: Tensors, place: int) -> None:
        self.job = job
        self.change = change
        self.outputs = outputs
        self.states = states
        self.place = place
        """Where its sessions begin in the outcome."""
        self.kept = _kept(job)


class _JobsOrigin:
    """Says how the sessions of jobs were stepped. `api.Origin`."""

    __slots__ = ("_ended",)

    def __init__(self, ended: Sequence[_FinishedJob]) -> None:
        self._ended = ended

    def made(self, place: int) -> Made:
        """How the session at a place of the outcome was stepped."""
        each = next(each for each in reversed(self._ended) if each.place <= place)
        job = each.job
        low = int(job.sizes[: place - each.place].sum())
        rows = slice(low, low + int(job.sizes[place - each.place]))
        specs = each.change.model.program.inputs
        return Made(
            job.steps,
            () if job.advancing is None else job.advancing.tolist(),
            [
                array[rows, -1] if spec.temporal and job.steps > 1 else array[rows]
                for spec, array in zip(specs, job.inputs, strict=True)
            ],
        )


class Completion:
    """Ends the jobs of one model. Lives on the event loop."""

    def __init__(
        self,
        model: Model,
        table: SessionTable,
        committer: Committer,
        rejudge: Callable[[Change, Members], None],
        forget_replies: Callable[[Model], None],
        *,
        clock: Clock,
        observer: Observer,
    ) -> None:
        self._model = model
        self._table = table
        self._committer = committer
        self._again = rejudge
        self._forget_replies = forget_replies
        """Limits the memory for remembered replies."""
        self._clock = clock
        self._observer = observer

    def complete(self, work: Pass, jobs: Sequence[tuple[int, Job]]) -> None:
        """Commit and answer jobs (with their index in the pass) that have run their last time step."""
        changes = [(index, job) for index, job in jobs if job.handles is not None]
        is_contended = self._model.ready.is_contended(self._clock.monotonic())
        for some in _split_small(changes) if is_contended else (changes,):
            if some:
                self._commit(work, some)
        for index, job in jobs:
            if isinstance(job.owner, PredictCall):
                job.owner.complete(work, index, job)

    def _commit(self, work: Pass, jobs: Sequence[tuple[int, Job]]) -> None:
        self._exchange_rows([job for _, job in jobs])
        self._keep_outputs(work, jobs)
        ended, place = [], 0
        for index, job in jobs:
            states = NO_STATES if job.states is Select.NONE else self._states_of(job)
            ended.append(_FinishedJob(job, _change(job), outputs_of(work, index, job), states, place))
            place += len(job.members)
        outcome = self._outcome(ended)
        traces = [trace for _, job in jobs if job.owner.traces for trace in job.traces]
        began = self._clock.monotonic() if traces else 0.0

        def answer(error: ServerError | None, places: Members | None) -> None:
            which = None if places is None else _mask(place, places)
            for trace in traces:
                trace.stage("commit", began, self._clock.monotonic())
            traces.clear()
            if error is None:
                self._succeed(outcome, ended, which)
            else:
                for each, own in _by_job(ended, which):
                    each.change.fail(each.job.members if own is None else each.job.members[own], error)

        def rejudge(places: Members) -> None:
            for each, own in _by_job(ended, _mask(place, places)):
                self._again(each.change, each.job.members if own is None else each.job.members[own])

        self._committer.commit(outcome, answer, rejudge)
        if self._model.replies.series and self._model.replies.is_over_limit:
            self._forget_replies(self._model)

    def _states_of(self, job: Job) -> Tensors:
        """The states to return: those after the last time step are in the job's rows."""
        specs, series = self._model.program.state, job.state_series
        if not series:
            rows = job.target_rows if job.state_rows is None else job.target_rows[job.state_rows]
            return named_states(
                specs, self._model.arena.read(rows), job.with_time and job.states is Select.ALL
            )
        return named_states(specs, series, with_time=False)

    def _outcome(self, ended: Sequence[_FinishedJob]) -> Outcome:
        handles = join([each.job.handles for each in ended if each.job.handles is not None])
        arrays: dict[int, ReplyArrays] = {}
        for each in ended:
            if each.kept is ReplyForm.ARRAYS or each.job.state_series:
                arrays.update(enumerate(_arrays_of(each), each.place))
        return Outcome(
            self._model,
            handles,
            self._table.revision[handles] + np.uint64(1),
            self._positions(ended, handles),
            join([each.change.requests_of(each.job.members) for each in ended]),
            join([each.change.digests_of(each.job.members) for each in ended]),
            join([np.full(len(each.job.members), int(each.kept), np.uint8) for each in ended]),
            _JobsOrigin(ended),
            arrays,
            steps=None if self._model.changes is None else join([_steps_of(each.job) for each in ended]),
        )

    def _positions(self, ended: Sequence[_FinishedJob], handles: Handles) -> U64:
        positions: U64 = self._table.position[handles]
        for each in ended:
            own = positions[each.place : each.place + len(each.job.members)]
            if each.change.reset_rows is None:
                own += np.uint64(each.job.steps)
            else:
                each.change.count_from_reset(own, each.job.members)
        return positions

    def _succeed(self, outcome: Outcome, ended: Sequence[_FinishedJob], which: Mask | None) -> None:
        """Answer the sessions of an outcome that were stored; None: all."""
        now, count, row_steps = self._clock.monotonic(), 0, 0
        slowest, queued_at = "", now
        for each, own in _by_job(ended, which):
            job, tensors, states = each.job, each.outputs, each.states
            members, rows, end = job.members, job.row_count, each.place + len(job.members)
            revisions, positions = outcome.revisions[each.place : end], outcome.positions[each.place : end]
            if own is not None:
                kept = job.row_mask(own)
                members, revisions, positions = members[own], revisions[own], positions[own]
                rows, tensors = int(np.count_nonzero(kept)), {name: a[kept] for name, a in tensors.items()}
                kept = kept if job.state_rows is None else kept[job.state_rows]
                states = {name: array[kept] for name, array in states.items()}
            count += len(members)
            row_steps += rows * job.steps
            self._observer.stage(self._model.name, "total", now - job.queued_at, len(members))
            if job.queued_at <= queued_at:
                slowest, queued_at = each.change.session_ids[members[0]], job.queued_at
            each.change.succeed(members, Reply(revisions, positions, tensors, states))
        self._observer.slow(self._model.name, slowest, now - queued_at, now)
        self._observer.applied(self._model.name, "step", count, row_steps)

    def _exchange_rows(self, jobs: Sequence[Job]) -> None:
        slots = self._model.slots
        for job in jobs:
            if job.working is None or job.handles is None:
                continue
            rows = job.working
            if job.advancing is not None:
                rows = self._table.rows_of(job.handles).copy()
                rows[job.advancing] = job.working
            self._table.set_rows_of(job.handles, rows)
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


def _steps_of(job: Job) -> npt.NDArray[np.int64]:
    """See `Outcome.steps`."""
    is_plain = job.reset_rows is None and job.advancing is None
    return np.full(len(job.members), job.steps if is_plain else 0, np.int64)


def _split_small(
    jobs: Sequence[tuple[int, Job]],
) -> tuple[Sequence[tuple[int, Job]], Sequence[tuple[int, Job]]]:
    """Split off small jobs, which need not wait for the large ones; and the others."""
    most = min(SMALL, sum(len(job.members) for _, job in jobs) // _SMALL)
    few = [(index, job) for index, job in jobs if len(job.members) <= most]
    return few, [(index, job) for index, job in jobs if len(job.members) > most] if few else jobs


def _mask(count: int, places: Members) -> Mask:
    mask = np.zeros(count, np.bool_)
    mask[places] = True
    return mask


def _by_job(ended: Sequence[_FinishedJob], which: Mask | None) -> Iterator[tuple[_FinishedJob, Mask | None]]:
    """Jobs with any of the selected sessions, and which of their sessions; None: all."""
    for each in ended:
        own = None if which is None else which[each.place : each.place + len(each.job.members)]
        if own is None or own.all():
            yield each, None
        elif own.any():
            yield each, own


def _kept(job: Job) -> ReplyForm:
    """How the replies of a job are remembered."""
    if job.select is Select.NONE:
        return ReplyForm.EMPTY
    has_series = job.collected and any(array is not None for array in job.collected)
    if has_series or job.advancing is not None:
        return ReplyForm.ARRAYS
    return ReplyForm.ROWS_WITH_TIME if job.has_time else ReplyForm.ROWS


def _arrays_of(each: _FinishedJob) -> list[ReplyArrays]:
    """A job's outputs, and states of several time steps, by session, if they are remembered as arrays."""
    job = each.job
    outputs = each.outputs if each.kept is ReplyForm.ARRAYS else NO_STATES
    states = each.states if job.state_series else NO_STATES
    sizes = job.sizes
    if states and job.state_rows is not None:
        whose = np.repeat(np.arange(len(sizes)), sizes)[job.state_rows]
        sizes = np.bincount(whose, minlength=len(job.sizes))
    of_outputs, of_states = _parts(outputs, job.sizes), _parts(states, sizes)
    return [ReplyArrays(*own) for own in zip(of_outputs, of_states, strict=True)]


def _parts(tensors: Tensors, sizes: Rows) -> list[Tensors]:
    """Split tensors into parts of these numbers of rows.

    They are copies, so one session does not keep the others' arrays alive.
    """
    ends: Rows = np.cumsum(sizes)
    return [
        {name: array[end - size : end].copy() for name, array in tensors.items()} if size else {}
        for size, end in zip(sizes.tolist(), ends.tolist(), strict=True)
    ]


def _change(job: Job) -> Change:
    assert isinstance(job.owner, Change), "jobs with sessions come from changes"
    return job.owner
