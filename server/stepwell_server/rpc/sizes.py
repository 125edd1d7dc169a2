"""How large a reply will be, known before anything is changed.

A reply over the limit could not be sent after its change was applied. The sizes follow from the specs,
the rows and the time steps.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np

from stepwell_server.engine.api import Select
from stepwell_server.engine.types import Array
from stepwell_server.errors import MessageTooLarge, SessionGone
from stepwell_server.program import Program, TensorSpec

if TYPE_CHECKING:
    from stepwell_server.engine.engine import Engine

#: Bytes that a member of a frame takes beside its outputs: index, revision, position, replayed index.
_MEMBER_BYTES = 32
#: Bytes that a reply takes beside members and elements, with names and shapes of an ordinary model.
_REPLY_BYTES = 512
#: So many sessions of a frame are asked for their model: were they all gone, each would be looked for in the store.
_LOOKED_AT = 8
#: Bounds up to here are good enough as they are; beyond, the exact size is worth a look at the session.
_COARSE_BYTES = 64 * 1024


@dataclasses.dataclass(frozen=True, slots=True)
class _OutputSizes:
    """What one row of a model's outputs takes."""

    per_step: int
    """Bytes for each time step, of the temporal outputs."""
    per_call: int
    """Bytes once, of the others."""

    @classmethod
    def of(cls, program: Program) -> _OutputSizes:
        temporal = sum(_row_bytes(spec) for spec in program.outputs if spec.temporal)
        return cls(temporal, sum(_row_bytes(spec) for spec in program.outputs) - temporal)

    def of_rows(self, rows: int, time_steps: int) -> int:
        return rows * (self.per_step * time_steps + self.per_call)


class ReplySizes:
    """Sizes of replies against the limit. Not thread-safe, like the engine it asks."""

    def __init__(self, engine: Engine, limit: int) -> None:
        self._engine = engine
        self._limit = limit
        # The models of a server stay the same. Not asked for each call: the engine counts sessions to describe one.
        self._programs = {model.name: model.program for model in engine.models()}
        self._outputs = {name: _OutputSizes.of(program) for name, program in self._programs.items()}
        largest = [sizes.of_rows(1, 1) for sizes in self._outputs.values()]
        self._largest_row = max(largest, default=0)
        self.harmless_bytes = (limit - _MEMBER_BYTES - _REPLY_BYTES) // max(1, self._largest_row)
        """Requests of one session up to this size need no look: a row of inputs at one time step is a byte at least."""

    def step(self, session_ids: Sequence[str], inputs: Mapping[str, Array], select: Select) -> int:
        """Bytes that the reply to a step takes at most.

        Raises:
            MessageTooLarge: more than the limit.
        """
        fixed = len(session_ids) * _MEMBER_BYTES + _REPLY_BYTES
        if select is Select.NONE:
            return fixed
        # Taking the features of a (rows, features) array for time steps errs on the safe side.
        bound = max((math.prod(array.shape[:2]) for array in inputs.values()), default=0) * self._largest_row
        if bound > _COARSE_BYTES:
            bound = self._exact(session_ids, inputs, select)
            self._check(bound + fixed, "the step")
        return bound + fixed

    def predict(self, model: str, inputs: Mapping[str, Array]) -> None:
        """Check the reply to a run without a session.

        Raises:
            MessageTooLarge: more than the limit.
            ModelNotFound: no such model.
        """
        program = self._program(model)
        rows, time_steps = _extent(program, inputs)
        outputs = self._outputs[model].of_rows(rows, time_steps)
        self._check(outputs + rows * program.state_row_bytes + _REPLY_BYTES, "the prediction")

    def _exact(self, session_ids: Sequence[str], inputs: Mapping[str, Array], select: Select) -> int:
        model = self._model_of(session_ids)
        if model is None:
            return 0  # none of them is there: there will be no outputs
        rows, time_steps = _extent(self._program(model), inputs)
        return self._outputs[model].of_rows(rows, time_steps if select is Select.ALL else 1)

    def _program(self, model: str) -> Program:
        program = self._programs.get(model)
        return self._engine.model(model).program if program is None else program  # says that there is none

    def _model_of(self, session_ids: Sequence[str]) -> str | None:
        """The model of the frame: that of its first session which is there."""
        for session_id in session_ids[:_LOOKED_AT]:
            try:
                return self._engine.model_of(session_id)
            except SessionGone:
                continue  # the engine will say so, for this member
        return None

    def _check(self, size: int, what: str) -> None:
        if size > self._limit:
            raise MessageTooLarge(
                f"the reply to {what} must be at most {self._limit} bytes; it would be about {size}: "
                "ask for fewer time steps at once, or for outputs LAST or NONE",
                limit_bytes=str(self._limit),
                reply_bytes=str(size),
            )


def _row_bytes(spec: TensorSpec) -> int:
    return math.prod(spec.shape) * np.dtype(spec.dtype).itemsize


def _extent(program: Program, inputs: Mapping[str, Array]) -> tuple[int, int]:
    """Rows and time steps of inputs, as far as they suit the model: if they do not, the engine refuses them."""
    rows, time_steps = 0, 1
    for spec in program.inputs:
        array = inputs.get(spec.name, inputs.get(""))
        if array is None or array.ndim == 0:
            continue
        rows = max(rows, array.shape[0])
        if spec.temporal and array.ndim == len(spec.shape) + 2:
            time_steps = max(time_steps, array.shape[1])
    return rows, time_steps
