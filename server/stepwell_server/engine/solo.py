"""One plain single step when nothing else is there.

The same rules and the same program, without the array work that pays only from a few rows on. It declines whatever is not plain; the step then goes the general way, where every rule and every message
is. That both ways agree bit for bit is tested.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from stepwell_server.clock import Clock
from stepwell_server.core.exactly_once import applies
from stepwell_server.core.sessions import SessionTable
from stepwell_server.engine.calls import Array, Observer, Select, Single, StepReply
from stepwell_server.engine.checks import is_float
from stepwell_server.engine.replies import Kept
from stepwell_server.engine.served import ServedModel


class Solo:
    """Runs single steps of one model in place, one at a time."""

    def __init__(self, table: SessionTable, model: ServedModel, *, clock: Clock, observer: Observer) -> None:
        self._table = table
        self._model = model
        self._clock = clock
        self._observer = observer
        self._temporal = [spec.temporal for spec in model.program.outputs]
        self._names = [spec.name for spec in model.program.outputs]
        self._floats = [is_float(np.dtype(spec.dtype)) for spec in model.program.inputs]

    def run(self, handle: int, single: Single, arrays: Sequence[Array], *, with_time: bool) -> bool:
        """Run a step whose inputs have the model's dtypes and shapes, `(1, ...)` each.

        Returns:
            False if it has to go the general way; nothing has changed then.
        """
        if not self._may_run(handle, single, arrays):
            return False
        row = int(self._table.row[handle])
        started = self._clock.monotonic()
        try:
            outputs = self._model.loop.runner.run_row(row, arrays)
        except Exception:  # the general way finds out what it is, and answers
            return False
        self._model.arena.keep_row_outputs(row, outputs)
        self._settle(handle, single, outputs, with_time=with_time and single.select is Select.ALL)
        self._observe(self._clock.monotonic() - started)
        return True

    def _may_run(self, handle: int, single: Single, arrays: Sequence[Array]) -> bool:
        table = self._table
        if table.claimed[handle] or table.row[handle] < 0 or table.batch_size[handle] != 1:
            return False
        if single.cancelled or self._clock.monotonic() >= single.deadline:
            return False
        revision, last = int(table.revision[handle]), int(table.request_id[handle])
        if not applies(revision, last, single.expected, single.request_id):
            return False
        return all(
            np.isfinite(array).all()
            for array, may_be_infinite in zip(arrays, self._floats, strict=True)
            if may_be_infinite
        )

    def _settle(self, handle: int, single: Single, outputs: Sequence[Array], *, with_time: bool) -> None:
        table = self._table
        revision, position = int(table.revision[handle]) + 1, int(table.position[handle]) + 1
        table.revision[handle] = revision
        table.position[handle] = position
        table.request_id[handle] = single.request_id
        table.used[handle] = self._clock.monotonic()
        kept = Kept.ROWS_WITH_TIME if with_time else Kept.ROWS
        if single.select is Select.NONE:
            kept, outputs = Kept.EMPTY, ()
        self._model.replies.remember_rows(handle, kept)
        found = {
            name: output[:, None] if with_time and temporal else output
            for name, output, temporal in zip(self._names, outputs, self._temporal, strict=False)
        }
        single.settle(StepReply(revision, position, found, replayed=False))

    def _observe(self, seconds: float) -> None:
        name = self._model.name
        self._observer.pass_done(name, 1, 1, seconds)
        self._observer.stage(name, "wait", 0.0, 1)
        self._observer.stage(name, "total", seconds, 1)
        self._observer.applied(name, "step", 1, 1)
