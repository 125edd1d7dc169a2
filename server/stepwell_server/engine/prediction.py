"""Runs models without a session: checks, charges and hands the run to the passes."""

from __future__ import annotations

import sys
from collections.abc import Callable

from stepwell_server.clock import Clock
from stepwell_server.core.callers import ANYBODY, Caller
from stepwell_server.core.scheduler import source_of
from stepwell_server.engine.api import Observer, PredictResult
from stepwell_server.engine.intake.queues import Inboxes
from stepwell_server.engine.intake.validation import (
    check_finite_state,
    check_inputs,
    check_reset,
    require_finite,
    require_reply,
)
from stepwell_server.engine.passes.predict import PredictCall
from stepwell_server.engine.quotas import Quotas
from stepwell_server.engine.types import Mask, Tensors
from stepwell_server.engine.versions.registry import Models
from stepwell_server.errors import InvalidInput


class Prediction:
    """Runs models without sessions. Lives on the event loop."""

    def __init__(
        self,
        models: Models,
        inboxes: Inboxes,
        quotas: Quotas | None,
        *,
        drain: Callable[[], None],
        require_accepting: Callable[[], None],
        clock: Clock,
        observer: Observer,
    ) -> None:
        self._models = models
        self._inboxes = inboxes
        self._quotas = quotas
        self._drain = drain
        self._require_accepting = require_accepting
        self._clock = clock
        self._observer = observer

    async def predict(
        self,
        model: str,
        inputs: Tensors,
        state: Tensors | None = None,
        *,
        reset: Mask | None = None,
        deadline: float = float("inf"),
        source: object = None,
        caller: Caller = ANYBODY,
        reply_limit: int = sys.maxsize,
        reply_bytes: int = 0,
    ) -> PredictResult:
        """Run a model without a session. Reply limit and row resets are as for `Change`.

        Raises:
            ModelNotFound, InvalidInput, MessageTooLarge, DeadlineExceeded, Overloaded (QuotaExceeded too)
        """
        self._require_accepting()
        served = self._models.by_name(model)
        rows = next((len(array) for array in inputs.values() if array.ndim), 0)
        if not rows:
            raise InvalidInput(f"inputs must have at least one row; got {rows}")
        checked = check_inputs(served.program, inputs, rows, any_rows=True)
        resets = check_reset(reset, rows, checked.steps)
        require_reply(served.program, rows, checked.steps, reply_bytes, reply_limit)
        require_finite("input", checked.arrays, [spec.name for spec in served.program.inputs], inputs)
        values = check_finite_state(served.program, state, rows)
        self._drain()
        byte_count = sum(array.nbytes for array in (*checked.arrays, *(values or ())))
        self._inboxes.of[served.index].require_room(rows, byte_count)
        release = (
            None if self._quotas is None else self._quotas.charge(caller, rows * checked.steps, byte_count)
        )
        now = self._clock.monotonic()
        call = PredictCall(
            served,
            checked,
            values,
            rows,
            resets=resets,
            deadline=deadline,
            source=source_of(caller, object() if source is None else source),
            now=now,
        )
        self._inboxes.bytes += byte_count
        try:
            predicted = await call.run()
        finally:
            self._inboxes.bytes -= byte_count
            if release is not None:
                release()
        self._observer.applied(served.name, "predict", 1, rows * checked.steps)
        return predicted
