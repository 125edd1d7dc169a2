"""Runs single steps that the native front has parsed: `Direct`, with the work on sessions in compiled code.

No Python object is made for a session, except for its place in the log. The compiled code checks, claims and
gathers the sessions, and then writes the results and lays out their records. Once a store has these, it writes to the
table and sends the replies. Whatever it declines becomes a `Change`, as do all steps where other servers use the store.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from stepwell_server.core.exactly_once import WEIGHTS, Kind
from stepwell_server.core.scheduler import Source
from stepwell_server.core.sessions import Handles, SessionTable
from stepwell_server.engine.api import (
    OnFailed,
    Select,
    SharedFacts,
    StepBatch,
    StepKernel,
    StepRules,
    StepWrite,
)
from stepwell_server.engine.change import seed_of_single
from stepwell_server.engine.commit.committer import Committer
from stepwell_server.engine.executors.base import ExecutionError
from stepwell_server.engine.intake.validation import output_bytes
from stepwell_server.engine.passes.batch import Lane
from stepwell_server.engine.passes.direct import Direct
from stepwell_server.engine.state.fields import Fields, Mark, joined
from stepwell_server.engine.state.model import Model
from stepwell_server.errors import ServerError
from stepwell_server.logs import Log
from stepwell_server.store.record import Puts

_log = Log("engine.loop")


class CompiledSteps:
    """Runs batches of single steps of one model. Lives on the event loop; only used while no thread has its lane."""

    def __init__(
        self,
        direct: Direct,
        model: Model,
        table: SessionTable,
        lane: Lane,
        committer: Committer,
        watched: Callable[[Model, Sequence[tuple[int, Sequence[bytes]]]], None],
    ) -> None:
        """`watched` is called with the sessions of a batch whose watches may report it, by handle, and their inputs."""
        self._direct = direct
        self.model = model
        self._table = table
        (self._executor, states), self._arena = lane.in_place, model.arena
        has_rings = model.arena.has_rings or model.program.has_rings
        self._committer, self._is_recording = committer, committer.is_recording
        copies_whole_rings = has_rings and states is model.arena
        stores_changes = model.changes is not None and self._is_recording
        self._declines = committer.may_conflict or copies_whole_rings or stores_changes
        self._watched = watched
        self._clock = direct.clock
        self._reply_bytes = output_bytes(model.program, 1, 1)
        """Bytes of a session's outputs."""
        self._kernel: StepKernel | None = None
        self._growths = -1
        """The table's `growths` when its columns were attached."""
        self._marks: tuple[int, bytes, bytes] = (-1, b"", b"")
        """An epoch, and the fields of sessions' records for it: not pinned, and pinned."""

    def run(self, batch: StepBatch, room: int, fail: OnFailed) -> bool:
        """Run a batch, if all of its steps are valid and none must wait; else return False, and nothing changed.

        Args:
            batch: The steps.
            room: The largest number of bytes of its outputs.
            fail: Called if it must be answered with an error. Otherwise compiled code answers it once the store has it.
        """
        model, direct, count = self.model, self._direct, batch.size
        if self._declines or count * self._reply_bytes > room or not direct.may_run(count, batch):
            return False
        started = self._clock.monotonic()
        source = None
        if count > 1 and (source := self._source(batch, started)) is None:
            return False
        kernel = self._kernel
        try:
            if kernel is None or self._growths != self._table.growths:
                kernel = self._attached(batch)
            if not kernel.claim(batch.handle, started):
                return False
            if (model.epoch or model.replies.series) and not self._committer.keeps_sizes(
                model, kernel.claimed()
            ):
                kernel.cancel()  # a change also settles sizes and forgets arrays
                return False
            write = self._run(kernel, batch)
        except Exception as error:
            if kernel is not None:
                kernel.cancel()
            if not isinstance(error, ExecutionError):  # a pass then determines the error of a program
                _log.defect("a batch of steps raised, and is run as a change", error, model=model.name)
            return False
        if self._is_recording:
            self._committer.commit_packed(_Outcome(self, batch, write, started, fail))
        else:
            self.commit(batch, write, started)
            self._committer.applied()
        ended = self._clock.monotonic()
        direct.note_run(source, count, started, ended, batch.connections[0])
        model.work.used(ended - started)
        return True

    def _run(self, kernel: StepKernel, batch: StepBatch) -> StepWrite:
        executor, count, handle = self._executor, batch.size, batch.handle
        began = self._direct.begin_measure(count)
        executor.bind(count)
        version, shared = self.model.version, self._shared_facts() if self._is_recording else None
        if (buffers := executor.buffers()) is None:
            # no array may be referenced while the executor runs
            kernel.gather(handle, kernel.given(executor.inputs(), executor.states()))
            executor.invoke()
            write = kernel.write(
                handle, kernel.results(executor.outputs(), executor.next_states()), version, shared
            )
        else:
            if buffers.known is None:
                given = kernel.given(buffers.inputs, buffers.states)
                buffers.known = given, kernel.results(buffers.outputs, buffers.next_states)
            given, results = buffers.known
            kernel.gather(handle, given)
            executor.invoke()
            write = kernel.write(handle, results, version, shared)
        if began:
            self._direct.end_measure(count, began)
        return write

    def _shared_facts(self) -> SharedFacts:
        """What the records of all sessions share."""
        epoch, unpinned, pinned = self._marks
        if epoch != self.model.epoch:
            epoch, version = self.model.epoch, self.model.version
            unpinned, pinned = (joined(Mark(version, epoch, is_pinned)) for is_pinned in (False, True))
            self._marks = epoch, unpinned, pinned
        return self._clock.now(), unpinned, pinned

    def commit(self, batch: StepBatch, write: StepWrite, started: float) -> None:
        """Apply steps that the store has to the table, and answer them."""
        now = self._clock.monotonic()
        kernel = self._attached(batch)
        kernel.commit(write, now)
        if self._table.watched_ids and (steps := kernel.watched(write, now)):
            self._watched(self.model, steps)
        self._direct.observer.stepped(self.model.name, batch.first_id, batch.size, now - started, now)

    def _source(self, batch: StepBatch, now: float) -> Source | None:
        only, connections = batch.only_source, batch.connections
        if only is None and len(connections) == 1:
            return None
        has_one_of_each = only is None and len(connections) == batch.size
        return self._direct.fair_source(only, has_one_of_each, batch.size, now)

    def _attached(self, batch: StepBatch) -> StepKernel:
        """The compiled code with the present columns of the table."""
        table, kernel = self._table, self._kernel
        if kernel is not None and self._growths == table.growths:
            return kernel
        if kernel is None:
            kernel = self._kernel = batch.new_kernel(self._rules())
        kernel.attach(
            [
                *(table.model, table.batch_size, table.claimed, table.row, table.revision),
                *(table.position, table.request_id, table.digest, table.used, table.reply),
                *(table.watched, table.watch_revision, table.watch_at),
                *(table.opened_with, table.opened_digest, table.created, table.max_idle_ms, table.pinned),
            ]
        )
        self._growths = table.growths
        return kernel

    def _rules(self) -> StepRules:
        model, arena, table, fields = self.model, self._arena, self._table, Fields(self._table)
        return StepRules(
            table.handles,
            model.index,
            model.program.inputs,
            model.program.outputs,
            arena.states,
            [spec.gap for spec in model.program.state],
            arena.outputs,
            arena.steps,
            WEIGHTS.tolist(),
            int(model.digest_prefixes[Kind.STEP]),
            {select: (seed_of_single(select, False), seed_of_single(select, True)) for select in Select},
            (model.texts.data, model.texts.fingerprint_bytes),
            table.fields,
            lambda handle: fields.of(handle, model),
        )


class _Outcome:
    """A batch that ran: see `PackedOutcome`."""

    __slots__ = ("_batch", "_fail", "_run_by", "_started", "model", "puts", "steps")

    def __init__(
        self, steps: CompiledSteps, batch: StepBatch, write: StepWrite, started: float, fail: OnFailed
    ) -> None:
        self._run_by, self._batch, self.steps = steps, batch, write
        self._started, self._fail = started, fail
        self.model = steps.model
        records = write.records()
        assert records is not None, "without a store there are no records"
        ids, sizes, encoded_ids, together, checksums = records
        self.puts = Puts(ids, sizes, together)
        self.puts.encoded_ids, self.puts.checksums = encoded_ids, checksums

    def handles(self) -> Handles:
        return np.frombuffer(self.steps.handles(), np.intp)

    def apply(self) -> None:
        self._run_by.commit(self._batch, self.steps, self._started)

    def fail(self, error: ServerError) -> None:
        if self.steps.withdraw():  # otherwise the log has them
            self._fail(error)
