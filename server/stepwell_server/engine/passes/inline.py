"""One plain single step when nothing else is there.

The same rules and the same program, without the array work that pays only from a few rows on. It declines whatever is not plain; the step then goes the general way, where every rule and every message
is. That both ways agree bit for bit is tested.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from stepwell_server.clock import Clock
from stepwell_server.core.exactly_once import applies
from stepwell_server.core.sessions import Handles, SessionTable
from stepwell_server.engine.api import Array, Observer, Select, StepReply
from stepwell_server.engine.checks import is_float
from stepwell_server.engine.durability.committer import Keeper
from stepwell_server.engine.state.model import ServedModel
from stepwell_server.engine.state.replies import Kept
from stepwell_server.errors import ServerError
from stepwell_server.logs import Log

_log = Log("engine.replies")
Listener = Callable[[ServerError | None], None]


class Later:
    """A step that ran, and whose reply holds if the store keeps it."""

    __slots__ = ("_error", "_is_settled", "_listener", "reply")

    def __init__(self, reply: StepReply) -> None:
        self.reply = reply
        """Not to be shown to anybody before `tell` says so."""
        self._is_settled = False
        self._error: ServerError | None = None
        self._listener: Listener | None = None

    def tell(self, listener: Listener) -> None:
        """Call `listener` once: with None when it is kept, else with why it was not."""
        self._listener = listener
        if self._is_settled:
            listener(self._error)

    def settle(self, error: ServerError | None) -> None:
        """It is kept, or will never be."""
        self._is_settled, self._error = True, error
        if self._listener is not None:
            self._listener(error)


Answered = StepReply | ServerError | Later


class Solo:
    """Runs single steps of one model in place, one at a time."""

    def __init__(
        self,
        table: SessionTable,
        model: ServedModel,
        keeper: Keeper,
        claim: Callable[[Handles], None],
        *,
        clock: Clock,
        observer: Observer,
    ) -> None:
        self._table = table
        self._model = model
        self._keeper = keeper
        self._claim = claim
        self._clock = clock
        self._observer = observer
        self._temporal = [spec.temporal for spec in model.program.outputs]
        self._names = [spec.name for spec in model.program.outputs]
        self._floats = [is_float(np.dtype(spec.dtype)) for spec in model.program.inputs]

    def run(
        self,
        handle: int,
        arrays: Sequence[Array],
        *,
        expected: int | None,
        request_id: int,
        select: Select,
        with_time: bool,
    ) -> Answered | None:
        """Run a step whose inputs have the model's dtypes and shapes, `(1, ...)` each.

        Returns:
            The reply, or `Later` if the store is to be waited for; the session is claimed until then.
            None if it has to go the general way; nothing has changed then. An error if the store did not keep
            the step, or perhaps did: it must not be run again by the server itself.
        """
        if not self._may_run(handle, arrays, expected, request_id):
            return None
        row = int(self._table.row[handle])
        started = self._clock.monotonic()
        try:
            outputs = self._model.loop.runner.run_row(row, arrays)
        except Exception:  # the general way finds out what it is, and answers
            return None
        self._model.arena.keep_row_outputs(row, outputs)
        kept = _kept(select, with_time=with_time)
        revision, position = int(self._table.revision[handle]) + 1, int(self._table.position[handle]) + 1
        reply = StepReply(revision, position, self._outputs(kept, outputs), replayed=False)
        if not self._keeper.may_keep_one_here():
            return self._keep_later(handle, request_id, kept, reply, started)
        error = self._keeper.keep_one(self._model, handle, revision, position, request_id, kept)
        if error is None:
            self._observer.stepped_alone(self._model.name, self._clock.monotonic() - started)
        return error or reply

    def _keep_later(
        self, handle: int, request_id: int, kept: Kept, reply: StepReply, started: float
    ) -> Later:
        self._claim(np.array([handle]))
        later = Later(reply)
        ran = self._clock.monotonic()

        def answer(error: ServerError | None) -> None:
            now = self._clock.monotonic()
            self._observer.stage(self._model.name, "commit", now - ran, 1)
            if error is None:
                self._observer.stepped_alone(self._model.name, now - started)
            try:
                later.settle(error)
            except Exception as raised:
                # its caller's loss, and no one else's: the claim is due
                _log.defect("an answer could not be delivered", raised, model=self._model.name)

        self._keeper.keep_one_later(
            self._model, handle, reply.revision, reply.position, request_id, kept, answer
        )
        return later

    def _may_run(self, handle: int, arrays: Sequence[Array], expected: int | None, request_id: int) -> bool:
        table = self._table
        if table.claimed[handle] or table.row[handle] < 0 or table.batch_size[handle] != 1:
            return False
        if not self._keeper.may_keep_one():
            return False
        revision, last = int(table.revision[handle]), int(table.request_id[handle])
        if not applies(revision, last, expected, request_id):
            return False
        return all(
            np.isfinite(array).all()
            for array, may_be_infinite in zip(arrays, self._floats, strict=True)
            if may_be_infinite
        )

    def _outputs(self, kept: Kept, outputs: Sequence[Array]) -> dict[str, Array]:
        if kept is Kept.EMPTY:
            return {}
        return {
            name: output[:, None] if temporal and kept is Kept.ROWS_WITH_TIME else output
            for name, output, temporal in zip(self._names, outputs, self._temporal, strict=True)
        }


def _kept(select: Select, *, with_time: bool) -> Kept:
    if select is Select.NONE:
        return Kept.EMPTY
    return Kept.ROWS_WITH_TIME if with_time and select is Select.ALL else Kept.ROWS
