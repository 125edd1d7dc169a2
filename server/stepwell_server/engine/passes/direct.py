"""Runs single time steps on the event loop, by the same rules, without jobs and the array work of a pass.

A pass through jobs and the scheduler costs some 150 microseconds, whatever its rows. When nothing else waits, all
of that only confirms that a change of single steps may run as it is. Here the checks are a few array operations, or
a few comparisons for one session. A few rows also run while others wait for a pass, or during a pass that leaves a lane
free: a pass would make them wait for the others' work, and cost the event loop three times as much. Whatever is not plain is declined, and goes through a pass: a retry, a conflict, a
busy or absent session, several rows or time steps, returned states, an error of the program.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence

import numpy as np

from stepwell_server.clock import Clock
from stepwell_server.core.exactly_once import ANY_REVISION, applies, judge
from stepwell_server.core.scheduler import ACTIVE_S, ALL_CALLERS, Source
from stepwell_server.core.sessions import Handles, SessionTable
from stepwell_server.core.slots import Rows
from stepwell_server.engine.api import Observer, Select, StepBatch
from stepwell_server.engine.change import NO_STATES, Change, Reply, SimpleOrigin
from stepwell_server.engine.commit.committer import Committer
from stepwell_server.engine.commit.group_commit import GroupCommit
from stepwell_server.engine.commit.records import Outcome
from stepwell_server.engine.executors.base import ExecutionError
from stepwell_server.engine.intake.validation import check_inputs, finite_rows, output_bytes
from stepwell_server.engine.passes.batch import Lane
from stepwell_server.engine.passes.runner import IN_PLACE_S
from stepwell_server.engine.state.model import Model
from stepwell_server.engine.state.replies import ReplyForm
from stepwell_server.engine.types import Array, Members
from stepwell_server.errors import InvalidInput, ServerError
from stepwell_server.logs import Log

_log = Log("engine.loop")
_ONE, _ANY = np.uint64(1), np.uint64(ANY_REVISION)
_FIRST: Members = np.zeros(1, np.intp)
_FIRST.flags.writeable = False
#: Of the runs of more than one row, every so many measures the cost: the processor time of a thread is a system call.
_MEASURE_INTERVAL = 16
#: While nobody else is active, a run of up to this many seconds is on the event loop. Threads divide the time, but jobs
#: and hand-overs cost half a millisecond more.
_ALONE_S = 0.8e-3


class Direct:
    """Runs changes of single steps of one model. Lives on the event loop; only used while no thread has its lane."""

    def __init__(
        self,
        model: Model,
        table: SessionTable,
        lane: Lane,
        committer: Committer,
        commits: GroupCommit,
        rejudge: Callable[[Change, Members], None],
        *,
        clock: Clock,
        observer: Observer,
    ) -> None:
        self._model = model
        self._table = table
        self._lane, (self._executor, self._states), self._arena = lane, lane.in_place, model.arena
        self._has_rings = model.arena.has_rings
        self._committer = committer
        self._commits = commits
        self._again = rejudge
        self.clock = clock
        self.observer = observer
        self._names = [spec.name for spec in model.program.outputs]
        self._unmeasured = 0

    def run_unchecked(self, change: Change, handles: Handles) -> bool:
        """`run` for a change that `Validation` has not seen, of sessions in the table; nothing waits in the inbox.

        If it does not run, it must be checked: it may be wrong, or wait, or be of several models.
        """
        count, work = len(handles), self._model.work
        if not self.may_run(count, change) or not self._has_plain_shape(change, count):
            return False
        model, table, sizes = self._model, self._table, change.batch_sizes
        if count == 1:
            handle = handles[0]
            is_own = table.batch_size[handle] == 1 and (sizes is None or sizes[0] == 1)
        else:
            is_own = not (
                np.count_nonzero(table.model[handles] != model.index)
                or np.count_nonzero(table.batch_size[handles] != 1)
                or (sizes is not None and np.count_nonzero(sizes != 1))
            )
        if not is_own:
            return False
        change.handles, change.births, change.model = handles, table.birth[handles], model
        change.row_count, change.members = count, _FIRST if count == 1 else np.arange(count)
        change.sizes = np.ones(count, np.intp) if sizes is None else sizes
        began = self.clock.monotonic()
        has_run = self._run(change, count)
        if has_run:
            work.used(self.clock.monotonic() - began)
        return has_run

    def may_run(self, count: int, change: Change | StepBatch) -> bool:
        """Whether a run of this many rows may be on the event loop now."""
        model = self._model
        if self._lane.is_on_thread or self._commits.is_full or model.work.must_wait:
            return False
        return self._is_short(change, count)

    def _has_plain_shape(self, change: Change, count: int) -> bool:
        """Whether a change is a step of one row each, with inputs as the program takes them; else `Validation` decides."""
        program, inputs = self._model.program, change.inputs
        if inputs is None or change.reset or change.continued_model or change.rows or change.output_names:
            return False
        if change.reset_rows is not None or change.states is not Select.NONE:
            return False
        try:
            checked = check_inputs(program, inputs, count)
        except InvalidInput:
            return False
        if checked.steps > 1 or finite_rows(checked.arrays) is not None:
            return False
        expected = change.expected
        if expected is not None and (expected[0] if count == 1 else np.maximum.reduce(expected)) == _ANY:
            return False
        if change.reply_bytes + output_bytes(program, count, 1) > change.reply_limit:
            return False
        change.arrays, change.steps, change.with_time = checked
        return True

    def run(self, change: Change) -> bool:
        """Run a change, if it may run now. Returns whether it ran. It is answered once it is committed."""
        count = len(change.members)
        return self._is_short(change, count) and _is_plain(change, count) and self._run(change, count)

    def _run(self, change: Change, count: int) -> bool:
        model, started = self._model, self.clock.monotonic()
        try:
            rows = self._rows(change, started)
            source = None if count == 1 else self._source(change, count, started)
            if rows is None or (count > 1 and source is None):
                return False
            # whatever may fail comes before the new state is written
            outcome = self._outcome(change, count)
            outputs = self._invoke(rows, change.arrays)
        except ExecutionError:  # a pass then determines the error
            return False
        except Exception as error:
            change.fail(change.members, _log.internal("a pass raised", error, model=model.name))
            return True
        self._commit(change, outcome, outputs, started)
        connection = change.connections or change.connection
        self.note_run(source, count, started, self.clock.monotonic(), connection)
        return True

    def note_run(
        self, source: Source | None, count: int, started: float, ended: float, connection: object
    ) -> None:
        """Note for the scheduler what has just run; `connection` sent it, if it is a single step without a source."""
        model, ready = self._model, self._model.ready
        if model.is_running or ready.rows_waiting:
            ready.contended_until = started + ACTIVE_S
        if source is None:
            ready.alone_until, ready.alone_by = started + ACTIVE_S, connection
            return
        ready.ran(source, count, started)
        if started >= ready.contended_until:  # a pass through jobs, which now run too, has another fixed cost
            model.iteration_cost.learn(count, ended - started)

    def _is_short(self, change: Change | StepBatch, count: int) -> bool:
        """Whether nothing waits that so many rows may not overtake, and their run may be on the event loop."""
        model = self._model
        if count > model.max_batch_rows:
            return False
        if model.ready.rows_waiting and not model.ready.may_overtake(count, model.rows_of_a_short_pass):
            return False
        seconds = model.cost.one_s if count == 1 else model.cost.of(count)
        if seconds <= IN_PLACE_S:
            return True
        if seconds > _ALONE_S or change.only_source is None:
            return False
        now = self.clock.monotonic()
        return model.work.is_alone(now) and not model.ready.is_contended(now)

    def _source(self, change: Change, count: int, now: float) -> Source | None:
        """The source of a run, for the scheduler; None: it must divide the rows among their callers."""
        only = change.only_source
        return self.fair_source(only, only is None and change.has_one_step_of_each, count, now)

    def fair_source(
        self, only: Source | None, has_one_of_each: bool, count: int, now: float
    ) -> Source | None:
        """`_source` of steps that have an only source, or come from as many connections."""
        model = self._model
        if only is not None:
            is_fair = not model.ready.is_contended(now) or count <= model.rows_of_a_short_pass
            return only if is_fair else None
        return ALL_CALLERS if has_one_of_each or count <= model.rows_of_a_short_pass else None

    def _rows(self, change: Change, now: float) -> Rows | None:
        """The rows of sessions that are all free, resident and at the revision before the change; None: not all are."""
        if now >= change.deadline or len(change.replies.cancelled(change.members)):
            return None
        table, handles = self._table, change.handles
        expected, requests = change.expected, change.request_ids
        if len(handles) == 1:
            return self._row(change, int(handles[0]))
        if np.count_nonzero(table.claimed[handles]) or np.count_nonzero(
            table.birth[handles] != change.births
        ):
            return None
        rows: Rows = table.row[handles]
        if np.minimum.reduce(rows) < 0:
            return None
        if change.connections is not None and len(set(handles.tolist())) < len(handles):
            return None
        last = (table.revision[handles], table.request_id[handles])
        return rows if judge(*last, expected, requests) is None else None

    def _row(self, change: Change, handle: int) -> Rows | None:
        """`_rows` of one session: comparisons of numbers cost less than array operations."""
        table = self._table
        if table.birth[handle] != change.births[0] or table.claimed[handle] or table.row[handle] < 0:
            return None
        expected = None if change.expected is None else int(change.expected[0])
        request = 0 if change.request_ids is None else int(change.request_ids[0])
        if not applies(int(table.revision[handle]), int(table.request_id[handle]), expected, request):
            return None
        return table.row[handle : handle + 1].copy()

    def _invoke(self, rows: Rows, inputs: Sequence[Array]) -> list[Array]:
        """Run the program over rows of the arena, and write the new state there.

        Raises:
            ExecutionError: the program raised; nothing changed.
        """
        executor, arena = self._executor, self._arena
        began = self.begin_measure(len(rows))
        executor.bind(len(rows))
        self._fill(rows, inputs)
        executor.invoke()
        outputs = [output.copy() for output in executor.outputs()]
        after = executor.next_states()
        if len(rows) == 1 and not self._has_rings:  # an index costs a third of an array of indexes
            row = int(rows[0])
            for array, values in zip((*arena.states, *arena.outputs), (*after, *outputs), strict=True):
                array[row] = values[0]
        else:
            self._states.write(rows, after)
            arena.keep_outputs(rows, outputs)
        if began:
            self.end_measure(len(rows), began)
        return outputs

    def begin_measure(self, count: int) -> float:
        """The thread's processor time, if the cost of a run of so many rows is to be measured; else 0."""
        self._unmeasured += count > 1
        return time.thread_time() if self._unmeasured >= _MEASURE_INTERVAL else 0.0

    def end_measure(self, count: int, began: float) -> None:
        """Learn the cost of a run for which `begin_measure` returned a time."""
        self._unmeasured = 0
        self._model.cost.learn(count, time.thread_time() - began)

    def _fill(self, rows: Rows, inputs: Sequence[Array]) -> None:
        # a separate function: no view of the executor's buffers may exist while it runs
        states = self._executor.states()
        if len(rows) == 1 and not self._has_rings:
            row = int(rows[0])
            for state, buffer in zip(self._arena.states, states, strict=True):
                buffer[0] = state[row]
        else:
            self._states.gather(rows, states)
        for view, array in zip(self._executor.inputs(), inputs, strict=True):
            view[...] = array

    def _outcome(self, change: Change, count: int) -> Outcome:
        table, handles, kept = self._table, change.handles, _kept(change)
        return Outcome(
            self._model,
            handles,
            table.revision[handles] + _ONE,
            table.position[handles] + _ONE,
            change.requests_of(change.members),
            change.digests_of(change.members),
            np.array([kept], np.uint8) if count == 1 else np.full(count, int(kept), np.uint8),
            SimpleOrigin(change, change.members),
            steps=None if self._model.changes is None else np.ones(count, np.int64),
        )

    def _commit(self, change: Change, outcome: Outcome, outputs: Sequence[Array], started: float) -> None:
        clock = self.clock
        self._table.claimed[outcome.handles] = True
        traces = list(change.traces.values()) if change.traces else []
        if traces:
            count = len(outcome.handles)
            traces[0].ran(traces, self._model.name, count, 1, started, clock.monotonic())
        ran = clock.monotonic() if traces else started

        def answer(error: ServerError | None, places: Members | None) -> None:
            members = change.members if places is None else change.members[places]
            for trace in traces:
                trace.stage("commit", ran, clock.monotonic())
            traces.clear()
            if error is not None:
                change.fail(members, error)
                return
            now = clock.monotonic()
            first = change.session_ids[int(members[0])]
            self.observer.stepped(self._model.name, first, len(members), now - started, now)
            own = outputs if places is None else [output[places] for output in outputs]
            revisions, positions = outcome.revisions, outcome.positions
            if places is not None:
                revisions, positions = revisions[places], positions[places]
            named = self._named(_kept(change), own)
            change.succeed(members, Reply(revisions, positions, named, NO_STATES))

        def rejudge(places: Members) -> None:
            self._again(change, change.members[places])

        self._committer.commit(outcome, answer, rejudge)

    def _named(self, kept: ReplyForm, outputs: Sequence[Array]) -> dict[str, Array]:
        if kept is ReplyForm.EMPTY:
            return {}
        if kept is ReplyForm.ROWS_WITH_TIME:
            outputs = [
                output[:, None] if spec.temporal else output
                for spec, output in zip(self._model.program.outputs, outputs, strict=True)
            ]
        return dict(zip(self._names, outputs, strict=True))


def _is_plain(change: Change, count: int) -> bool:
    """Whether a checked change is one time step of one row of each of its sessions, and nothing else."""
    return (
        change.steps == 1
        and not change.reset
        and change.row_count == count == len(change.handles)
        and count > 0
        and change.advancing is None
        and change.reset_rows is None
        and change.states is Select.NONE
    )


def _kept(change: Change) -> ReplyForm:
    if change.select is Select.NONE:
        return ReplyForm.EMPTY
    return ReplyForm.ROWS_WITH_TIME if change.with_time and change.select is Select.ALL else ReplyForm.ROWS
