"""Runs single steps that the native front has parsed: `Direct`, with the work on sessions in compiled code.

No Python object is made for a session. The compiled code checks, claims and gathers the sessions, and later writes
the results and the replies. Whatever it declines becomes a `Change`, as do all steps where a store must keep them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from stepwell_server.core.exactly_once import WEIGHTS, Kind
from stepwell_server.core.scheduler import Source, source_of
from stepwell_server.core.sessions import SessionTable
from stepwell_server.engine.api import Answered, Select, StepBatch, StepKernel, StepRules
from stepwell_server.engine.change import seed_of_single
from stepwell_server.engine.commit.committer import Committer
from stepwell_server.engine.executors.base import ExecutionError
from stepwell_server.engine.intake.validation import output_bytes
from stepwell_server.engine.passes.batch import Lane
from stepwell_server.engine.passes.direct import Direct
from stepwell_server.engine.state.model import Model
from stepwell_server.logs import Log

_log = Log("engine.loop")


class CompiledSteps:
    """Runs batches of single steps of one model. Lives on the event loop; only used while no pass runs."""

    def __init__(
        self,
        direct: Direct,
        model: Model,
        table: SessionTable,
        lane: Lane,
        committer: Committer,
        watched: Callable[[Model, Sequence[tuple[int, Sequence[bytes]]]], None],
    ) -> None:
        """`watched` is called with the watched sessions of a batch, by handle, and their inputs."""
        self._direct = direct
        self._model = model
        self._table = table
        self._executor, self._arena = lane.executor, model.arena
        self._committer = committer
        self._watched = watched
        self._reply_bytes = output_bytes(model.program, 1, 1)
        """Bytes of a session's outputs."""
        self._kernel: StepKernel | None = None
        self._growths = -1
        """The table's `growths` when its columns were attached."""

    def run(self, batch: StepBatch, room: int) -> Answered | None:
        """Run and answer a batch, if all of its steps are valid and none must wait; else None, and nothing changed.

        `room`: the largest number of bytes of its outputs.
        """
        model, direct, count = self._model, self._direct, batch.size
        if self._committer.is_recording:
            return None
        if count * self._reply_bytes > room or not direct.may_run(count):
            return None
        started = direct.clock.monotonic()
        source = None
        if count > 1 and (source := self._source(batch, started)) is None:
            return None
        kernel = self._kernel
        try:
            if kernel is None or self._growths != self._table.growths:
                kernel = self._attached(batch)
            if not kernel.claim(batch.handle, started):
                return None
            if (model.epoch or model.replies.series) and not self._committer.keeps_sizes(
                model, kernel.claimed()
            ):
                kernel.cancel()  # a change also settles sizes and forgets arrays
                return None
            answered = self._run(kernel, batch, started)
        except Exception as error:
            if kernel is not None:
                kernel.cancel()
            if not isinstance(error, ExecutionError):  # a pass then determines the error of a program
                _log.defect("a batch of steps raised, and is run as a change", error, model=model.name)
            return None
        if self._table.watched_ids and (steps := kernel.watched(batch.handle)):
            self._watched(model, steps)
        self._committer.ended_claims()
        now = direct.clock.monotonic()
        direct.observer.stepped(model.name, batch.first_id, count, now - started, now)
        direct.note_run(source, count, started, batch.connections[0])
        model.work.used(now - started)
        return answered

    def _run(self, kernel: StepKernel, batch: StepBatch, now: float) -> Answered:
        executor, count = self._executor, batch.size
        began = self._direct.begin_measure(count)
        executor.bind(count)
        kernel.gather(batch.handle, executor.inputs(), executor.states())
        executor.invoke()
        answered = kernel.finish(
            batch.handle, executor.outputs(), executor.next_states(), now, self._model.version
        )
        if began:
            self._direct.end_measure(count, began)
        return answered

    def _source(self, batch: StepBatch, now: float) -> Source | None:
        connections, only = batch.connections, None
        if len(connections) == 1:
            if batch.caller is None:
                return None
            only = source_of(batch.caller, connections[0])
        return self._direct.fair_source(only, len(connections) == batch.size, batch.size, now)

    def _attached(self, batch: StepBatch) -> StepKernel:
        """The compiled code with the present columns of the table."""
        table, kernel = self._table, self._kernel
        if kernel is None:
            kernel = self._kernel = batch.new_kernel(self._rules())
        kernel.attach(
            [
                *(table.model, table.batch_size, table.claimed, table.row, table.revision),
                *(table.position, table.request_id, table.digest, table.used, table.reply),
                table.watched,
            ]
        )
        self._growths = table.growths
        return kernel

    def _rules(self) -> StepRules:
        model, arena = self._model, self._arena
        return StepRules(
            self._table.handles,
            model.index,
            model.program.inputs,
            model.program.outputs,
            arena.states,
            arena.outputs,
            WEIGHTS.tolist(),
            int(model.digest_prefixes[Kind.STEP]),
            {select: (seed_of_single(select, False), seed_of_single(select, True)) for select in Select},
        )
