"""A job: the same number of time steps for the rows of one or more sessions, or of none (Predict)."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Protocol

import numpy as np

from stepwell_server.core.scheduler import Source
from stepwell_server.core.sessions import Handles
from stepwell_server.core.slots import Rows
from stepwell_server.engine.api import Select, Trace
from stepwell_server.engine.types import Array, Mask, Members
from stepwell_server.errors import ServerError


class Owner(Protocol):
    """The change or call that a job belongs to."""

    traces: Mapping[int, Trace] | None
    """Traces of its sessions whose calls are traced; None: none."""

    def drop(self, members: Members, now: float, /) -> Sequence[tuple[Members, ServerError]]:
        """Members that should not continue, and why: cancelled, or past their deadline."""

    def fail(self, members: Members, error: ServerError, /) -> None:
        """Report that members (indexes into the owner's sessions) failed; nothing changed for them."""


@dataclasses.dataclass(slots=True, eq=False, kw_only=True)
class Job:
    """Work for the pass loop. All its rows are at the same time step.

    A job of one time step reads and writes its sessions' rows in place. One of several works on rows of
    its own and exchanges them for the sessions' when its last step is committed, so that it is applied
    whole or not at all.
    """

    owner: Owner
    members: Members
    """Indexes of its sessions among the owner's."""
    handles: Handles | None
    """Its sessions; None: no sessions."""
    rows: Rows
    """The sessions' rows in the arena, one session after the other. Empty if it has no sessions."""
    sizes: Rows
    """Rows of each session."""
    inputs: Sequence[Array]
    """In the program's order; temporal ones `(rows, steps, ...)` if `steps > 1`, else `(rows, ...)`."""
    steps: int
    with_time: bool
    select: Select
    source: Source
    queued_at: float
    prepare: Callable[[Rows], None] | None = None
    """Writes the initial state to the rows of a job without sessions."""
    reset_rows: Mask | None = None
    """Rows reset to the initial state before the first time step, `(rows, 1)`, or before each of them, `(rows,
    steps)`; None: none."""
    advancing: Rows | None = None
    """For a job of some rows of its one session: those rows; None: all."""
    states: Select = Select.NONE
    """States to return."""
    state_rows: Rows | None = None
    """Indexes of the rows whose states are returned; None: all."""
    row_count: int = dataclasses.field(init=False)
    is_plain: bool = dataclasses.field(init=False)
    """Whether nothing is reset, and states after every time step are not requested."""
    done: int = 0
    """Time steps that have run."""
    working: Rows | None = None
    """Working rows, used instead of the sessions' rows."""
    collected: list[Array | None] = dataclasses.field(default_factory=list)
    """For `steps > 1`: each output so far; temporal ones `(rows, steps, ...)`."""
    state_series: list[Array] = dataclasses.field(default_factory=list)
    """The states after every time step so far, if requested: `(rows whose states are returned, steps, ...)`."""

    def __post_init__(self) -> None:
        self.row_count = int(np.add.reduce(self.sizes))
        self.is_plain = self.reset_rows is None and (self.states is Select.NONE or not self.keeps_states)

    @property
    def traces(self) -> Sequence[Trace]:
        """Traces of its sessions whose calls are traced."""
        known = self.owner.traces
        return [known[member] for member in self.members.tolist() if member in known] if known else ()

    @property
    def steps_left(self) -> int:
        """Time steps still to run."""
        return self.steps - self.done

    @property
    def needs_working_rows(self) -> bool:
        """Whether it still needs working rows."""
        return self.working is None and (self.steps > 1 or self.handles is None)

    @property
    def has_time(self) -> bool:
        """Whether its reply has a time axis."""
        return self.with_time and self.select is Select.ALL

    @property
    def keeps_states(self) -> bool:
        """Whether the states after every time step are kept; those after the last one are in its rows."""
        return self.states is Select.ALL and self.steps > 1

    def resets_at(self, step: int) -> Mask | None:
        """Rows reset before time step `step` of the next pass, `(rows,)`; None: none."""
        resets, at = self.reset_rows, self.done + step
        return None if resets is None or at >= resets.shape[1] else resets[:, at]

    @property
    def source_rows(self) -> Rows:
        """The rows with the state before the next pass."""
        return self.rows if self.working is None or self.done == 0 else self.working

    @property
    def target_rows(self) -> Rows:
        """The rows for the state after the next pass."""
        return self.rows if self.working is None else self.working

    def work_on(self, rows: Rows) -> None:
        """Set its working rows, before the first pass."""
        self.working = rows
        if self.prepare is not None:
            self.prepare(rows)
            self.rows = rows

    def window(self, index: int, temporal: bool, steps: int) -> Array:
        """Input `index` for the next `steps` time steps: `(rows, ...)`, or `(rows, steps, ...)` if > 1."""
        array = self.inputs[index]
        if not temporal or self.steps == 1:
            return array
        if steps == 1:
            return array[:, self.done]
        return array[:, self.done : self.done + steps]

    @property
    def is_splittable(self) -> bool:
        """Whether it has several sessions and has not begun."""
        return self.handles is not None and len(self.handles) > 1 and self.done == 0 and self.working is None

    def split_off(self, rows: int) -> Job:
        """Split off its first sessions as a job of their own: up to `rows` rows, but at least one session.

        Returns the job itself if that is all of it. Only if it `is_splittable`.
        """
        assert self.handles is not None, "a job without sessions has no parts"
        count = max(1, int(np.searchsorted(np.cumsum(self.sizes), rows, side="right")))
        if count == len(self.handles):
            return self
        at = int(self.sizes[:count].sum())
        first, rest = slice(0, count), slice(count, None)
        own, others = slice(0, at), slice(at, None)
        state_rows = self.state_rows
        split_off = dataclasses.replace(
            self,
            members=self.members[first],
            handles=self.handles[first],
            rows=self.rows[own],
            sizes=self.sizes[first],
            inputs=[array[own] for array in self.inputs],
            reset_rows=None if self.reset_rows is None else self.reset_rows[own],
            state_rows=None if state_rows is None else state_rows[state_rows < at],
            collected=[],
            state_series=[],
        )
        self.members, self.handles = self.members[rest], self.handles[rest]
        self.rows, self.sizes = self.rows[others], self.sizes[rest]
        self.inputs = [array[others] for array in self.inputs]
        self.reset_rows = None if self.reset_rows is None else self.reset_rows[others]
        self.state_rows = None if state_rows is None else state_rows[state_rows >= at] - at
        self.row_count -= split_off.row_count
        return split_off

    def row_mask(self, kept: Mask) -> Mask:
        """Expand a mask over sessions to one over rows."""
        return np.repeat(kept, self.sizes)

    def keep(self, kept: Mask) -> Rows | None:
        """Continue with some sessions only; return the working rows of the others, if any."""
        rows = self.row_mask(kept)
        freed = None if self.working is None else self.working[~rows]
        self.members = self.members[kept]
        self.handles = None if self.handles is None else self.handles[kept]
        self.sizes = self.sizes[kept]
        if len(self.rows):  # a job without sessions has no rows before its first pass
            self.rows = self.rows[rows]
        self.row_count = int(np.add.reduce(self.sizes))
        self.working = None if self.working is None else self.working[rows]
        self.inputs = [array[rows] for array in self.inputs]
        self.reset_rows = None if self.reset_rows is None else self.reset_rows[rows]
        self.collected = [None if array is None else array[rows] for array in self.collected]
        if self.state_series:
            own = rows if self.state_rows is None else rows[self.state_rows]
            self.state_series = [array[own] for array in self.state_series]
        if self.state_rows is not None:
            self.state_rows = (np.cumsum(rows) - 1)[self.state_rows[rows[self.state_rows]]]
        return freed
