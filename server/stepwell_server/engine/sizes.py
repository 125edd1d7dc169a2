"""Tracks the sessions' sizes in the store, as `store.counts` counts them, while they change."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from stepwell_server.core.quotas import SESSION_BYTES
from stepwell_server.core.sessions import Handles, SessionTable
from stepwell_server.engine.api import Select
from stepwell_server.engine.change import Change
from stepwell_server.engine.commit.records import Outcome
from stepwell_server.engine.quotas import Quotas
from stepwell_server.engine.state.model import Model
from stepwell_server.store.fields import counted_bytes

_I64 = npt.NDArray[np.int64]


class Sizes:
    """Maintains the table's column `bytes`, and the quotas that depend on it. Lives on the event loop."""

    def __init__(self, table: SessionTable, quotas: Quotas | None) -> None:
        self.table = table
        self.quotas = quotas

    def growth(self, change: Change) -> _I64 | None:
        """The most bytes that a checked change may add to each of its members, `(size,)`; None: none.

        A session grows by the remembered reply of several time steps or of some rows, and by larger rows once it
        has moved to another version of its model.
        """
        model = change.model
        of_arrays = _of_arrays(change)
        if of_arrays is None and not model.epoch:
            return None
        members = change.members
        handles = change.handles[members]
        after = self._without_arrays(model, handles)
        if of_arrays is not None:
            after += of_arrays[0] + of_arrays[1] * change.sizes[members]
        found = np.zeros(change.size, np.int64)
        found[members] = np.maximum(0, after - self.table.bytes[handles])
        return found

    def settle(self, outcome: Outcome) -> None:
        """Count the sessions of an outcome that the store has kept. Call it before the table is updated."""
        after = self._of(outcome)
        more = after - self.table.bytes[outcome.handles]
        places = np.flatnonzero(more)
        if not len(places):
            return
        handles = outcome.handles[places]
        self.table.bytes[handles] = after[places]
        if self.quotas is not None:
            ids = [self.table.session_id(handle) for handle in handles.tolist()]
            self.quotas.resized(zip(ids, more[places].tolist(), strict=True))

    def resized(self, outcome: Outcome) -> frozenset[str]:
        """The sessions whose size changes once an outcome is stored."""
        other = outcome.handles[self._of(outcome) != self.table.bytes[outcome.handles]]
        return frozenset(self.table.session_id(handle) for handle in other.tolist())

    def are_without_arrays(self, model: Model, handles: Handles) -> bool:
        """Whether each session is counted with the rows of this version, and without arrays of its last reply."""
        return np.array_equal(self._without_arrays(model, handles), self.table.bytes[handles])

    def _of(self, outcome: Outcome) -> _I64:
        found = self._without_arrays(outcome.model, outcome.handles)
        for place, arrays in outcome.arrays.items():
            found[place] += outcome.model.replies.packed_bytes(arrays)
        return found

    def _without_arrays(self, model: Model, handles: Handles) -> _I64:
        table = self.table
        found: _I64 = SESSION_BYTES + table.batch_size[handles].astype(np.int64) * model.arena.row_bytes
        if table.have_fields(handles):
            found += [counted_bytes(table.fields.get(handle, b"")) for handle in handles.tolist()]
        return found


def _of_arrays(change: Change) -> tuple[int, int] | None:
    """Bytes per session, and per row, that a change may leave as arrays; None: none."""
    if change.reset:
        return None
    program, several = change.model.program, change.steps > 1
    has_outputs = change.select is Select.ALL and several
    has_outputs |= change.select is not Select.NONE and change.advancing is not None
    has_states = change.states is Select.ALL and several
    if not (has_outputs or has_states):
        return None
    of_session = of_row = 0
    for spec in program.outputs:
        of_session += 1 + 4 * (len(spec.shape) + 1 + spec.temporal)
        steps = change.steps if spec.temporal and change.select is Select.ALL else 1
        of_row += steps * spec.row_bytes if has_outputs else 0
    for state in program.state if has_states else ():
        of_session += 1 + 4 * (len(state.shape) + 2)
        of_row += change.steps * state.row_bytes
    return of_session, of_row
