"""A lone step, when nothing else is there: the same change by the same rules, without the array work of a pass.

A pass costs some 150 microseconds beside its rows, whatever their number, and a step that comes alone would pay all of
it. What is not plain here (a session that has something under way or is paged out, a retry, a conflict, several rows
or time steps, states that come back) is declined, and goes through a pass.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from stepwell_server.clock import Clock
from stepwell_server.core.exactly_once import applies
from stepwell_server.core.sessions import SessionTable
from stepwell_server.engine.api import Observer, Select, Trace
from stepwell_server.engine.change import NO_STATES, Change, Reply, may_join
from stepwell_server.engine.durability.committer import Committer
from stepwell_server.engine.durability.records import Outcome
from stepwell_server.engine.executors.base import ExecutionError, Executor
from stepwell_server.engine.passes.runner import IN_PLACE_S
from stepwell_server.engine.state.model import Model
from stepwell_server.engine.state.replies import Kept
from stepwell_server.engine.types import Array, Members
from stepwell_server.errors import ServerError
from stepwell_server.logs import Log

_log = Log("engine.loop")
#: So many steps of one turn are run one by one: they cost less than one pass for all of them.
MOST = 4


class Inline:
    """Runs lone steps of one model on the event loop. Only while no pass runs."""

    def __init__(
        self,
        model: Model,
        table: SessionTable,
        executor: Executor,
        committer: Committer,
        again: Callable[[Change, Members], None],
        *,
        clock: Clock,
        observer: Observer,
    ) -> None:
        self._model = model
        self._table = table
        self._executor = executor
        self._committer = committer
        self._again = again
        self._clock = clock
        self._observer = observer
        self._names = [spec.name for spec in model.program.outputs]

    def run_few(self, changes: list[Change]) -> list[Change]:
        """Run the first of some changes, as long as they are few and plain; return the others."""
        if len(changes) > MOST or self._model.ready.rows_waiting or self._model.cost.one_s > IN_PLACE_S:
            return changes
        for place, change in enumerate(changes):
            if not self._run(change):
                return changes[place:]
        return []

    def _run(self, change: Change) -> bool:
        """Whether the step has run; it is answered as soon as it is committed."""
        if not may_join(change) or change.reset_rows is not None or change.states is not Select.NONE:
            return False
        if not self._may_run(change):
            return False
        table, handle = self._table, int(change.handles[0])
        row, started = int(table.row[handle]), self._clock.monotonic()
        try:
            outputs = self._invoke(row, change.arrays)
        except ExecutionError:  # the pass says what it is
            return False
        except Exception as error:
            change.fail(change.members, _log.internal("a pass raised", error, model=self._model.name))
            return True
        kept = _kept(change)
        outcome = Outcome(
            self._model,
            change.handles,
            table.revision[change.handles] + np.uint64(1),
            table.position[change.handles] + np.uint64(1),
            change.requests_of(change.members),
            change.digests_of(change.members),
            np.array([kept], np.uint8),
            is_hurried=True,  # what is large and waits for the store is of others
        )
        table.claimed[handle] = True
        if change.traces:
            self._trace(list(change.traces.values()), started)
        ran = self._clock.monotonic() if change.traces else started

        def answer(error: ServerError | None, _places: Members | None) -> None:
            if error is not None:
                change.fail(change.members, error)
            else:
                if change.traces:
                    for trace in change.traces.values():
                        trace.stage("commit", ran, self._clock.monotonic())
                now = self._clock.monotonic()
                self._observer.stepped_alone(self._model.name, change.session_ids[0], now - started, now)
                named = self._named(kept, outputs)
                reply = Reply(outcome.revisions, outcome.positions, named, NO_STATES)
                change.succeed(change.members, reply)

        self._committer.commit(outcome, answer, lambda _places: self._again(change, change.members))
        return True

    def _trace(self, traces: Sequence[Trace], started: float) -> None:
        traces[0].ran(traces, self._model.name, 1, 1, started, self._clock.monotonic())

    def _may_run(self, change: Change) -> bool:
        table, handle = self._table, int(change.handles[0])
        if not len(change.members) or table.birth[handle] != change.births[0]:
            return False
        if table.claimed[handle] or table.row[handle] < 0:
            return False
        if self._clock.monotonic() >= change.deadline or len(change.replies.cancelled(change.members)):
            return False
        expected = None if change.expected is None else int(change.expected[0])
        request = 0 if change.request_ids is None else int(change.request_ids[0])
        return applies(int(table.revision[handle]), int(table.request_id[handle]), expected, request)

    def _invoke(self, row: int, inputs: Sequence[Array]) -> list[Array]:
        """Run the program over one row of the arena, and write what it gives there.

        Raises:
            ExecutionError: the program raised; nothing changed.
        """
        executor, arena = self._executor, self._model.arena
        executor.bind(1)
        self._fill(row, inputs)
        executor.invoke()
        for state, after in zip(arena.states, executor.next_states(), strict=True):
            state[row] = after[0]
        outputs: list[Array] = []
        for last, output in zip(arena.outputs, executor.outputs(), strict=True):
            last[row] = output[0]
            outputs.append(output.copy())
        return outputs

    def _fill(self, row: int, inputs: Sequence[Array]) -> None:
        # a function of its own: no view of the executor's buffers may be left when it is invoked
        executor = self._executor
        for state, buffer in zip(self._model.arena.states, executor.states(), strict=True):
            buffer[0] = state[row]
        for view, array in zip(executor.inputs(), inputs, strict=True):
            view[...] = array

    def _named(self, kept: Kept, outputs: Sequence[Array]) -> dict[str, Array]:
        if kept is Kept.EMPTY:
            return {}
        if kept is Kept.ROWS_WITH_TIME:
            outputs = [
                output[:, None] if spec.temporal else output
                for spec, output in zip(self._model.program.outputs, outputs, strict=True)
            ]
        return dict(zip(self._names, outputs, strict=True))


def _kept(change: Change) -> Kept:
    if change.select is Select.NONE:
        return Kept.EMPTY
    return Kept.ROWS_WITH_TIME if change.with_time and change.select is Select.ALL else Kept.ROWS
