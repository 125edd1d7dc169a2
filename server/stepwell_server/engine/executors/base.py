"""The interface between the engine and whatever runs a program."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np

from stepwell_server.engine.types import Array


class ExecutionError(Exception):
    """The program raised for this batch, for example because an Embedding index is out of range.

    The error concerns the batch as a whole: the caller narrows it down to the failing rows. Nothing outside the
    executor's own buffers has changed.
    """


@dataclasses.dataclass(slots=True, eq=False)
class Buffers:
    """All rows of an executor's buffers, in the order of the program's specs; a batch has the first ones."""

    inputs: Sequence[Array]
    states: Sequence[Array]
    outputs: Sequence[Array]
    next_states: Sequence[Array]
    known: Any = None
    """What compiled code keeps about them."""


class Executor(Protocol):
    """One program with buffers of its own. For one thread at a time; independent of every other.

    The order of calls for one time step: `bind`, fill `inputs` and `states`, `invoke`, read `outputs`
    and `next_states`. For the next time step of the same rows: fill `inputs` again, `carry`, `invoke`.

    The arrays that the accessors return are views of the executor's buffers, `(rows, *spec.shape)`, in
    the order of the program's specs. They are valid until the next `bind` or `invoke`, and no reference
    to one may be kept over either.
    """

    def bind(self, rows: int) -> None:
        """Make the buffers exactly `rows` long (`rows >= 1`). Cheap when the number is unchanged."""

    def buffers(self) -> Buffers | None:
        """The buffers of the bound batch, if they stay where they are while this returns the same object; else None."""
        return None

    def inputs(self) -> Sequence[Array]:
        """Writable views of the inputs of one time step."""

    def states(self) -> Sequence[Array]:
        """Writable views of the state before the step."""

    def carry(self) -> None:
        """Copy the state after the last step to the state before the next one."""
        for state, after in zip(self.states(), self.next_states(), strict=True):
            np.copyto(state, after)

    def invoke(self) -> None:
        """Run one time step. Releases the GIL while it computes.

        Raises:
            ExecutionError: the program raised.
        """

    def outputs(self) -> Sequence[Array]:
        """Views of the outputs of the last step."""

    def next_states(self) -> Sequence[Array]:
        """Views of the state after the last step."""
