"""The operations of a group of sessions, without their I/O."""

from __future__ import annotations

import copy

import numpy as np

from stepwell import _inputs
from stepwell._core import Core
from stepwell._flow import Flow, each
from stepwell._frames import Change, Gathered
from stepwell._retry import Deadline
from stepwell._state import State, States
from stepwell._step_arguments import selected, step_change
from stepwell._tracker import GroupTracker
from stepwell._types import Inputs, Outputs, OutputSelection, Rows
from stepwell.errors import StepwellError
from stepwell.v1 import sessions_pb2

_CLOSE_AT_ONCE = 65_536


class GroupCore:
    """The operations of one group; a change of it is one frame."""

    def __init__(self, core: Core, tracker: GroupTracker) -> None:
        self._core = core
        self.tracker = tracker

    def step(self, inputs: Inputs, outputs: OutputSelection, deadline: Deadline) -> Flow[Outputs]:
        """Advances every member."""
        rows = len(self.tracker.ids) * self.tracker.batch_size
        change = step_change(inputs, rows, outputs=outputs)
        gathered = yield from self._apply(change, deadline)
        return selected(gathered.outputs, change)

    def reset_states(self, states: States | None, rows: Rows | None, deadline: Deadline) -> Flow[None]:
        """Sets the whole state of every member, or of some."""
        chosen = _inputs.check_rows(rows, len(self.tracker.ids))
        if chosen == ():
            return
        members = len(self.tracker.ids) if chosen is None else len(chosen)
        count = members * self.tracker.batch_size
        packed = yield from self._core.states(
            self.tracker.model, self.tracker.fingerprint, states, count, deadline
        )
        yield from self._apply(Change("reset", packed, rows=chosen or ()), deadline)

    def _apply(self, change: Change, deadline: Deadline) -> Flow[Gathered]:
        frame = self.tracker.begin(change)
        gathered = Gathered(len(frame), self.tracker.batch_size)
        yield from self._core.retrier.exchange(frame, deadline, gathered.add)
        self.tracker.settle(change, gathered)
        if gathered.failures:
            raise self._failed(change, gathered)
        return gathered

    def _failed(self, change: Change, gathered: Gathered) -> StepwellError:
        members = self.tracker.members(change).tolist()
        failures = {members[i]: error for i, error in sorted(gathered.failures.items())}
        # A copy: what is said of all members must not be read as the first member's own error.
        first, own = next(iter(failures.items()))
        error = copy.copy(own)
        error.message = (
            f"{len(failures)} of {len(members)} sessions failed, first: {own.message} "
            f"(session {self.tracker.ids[first]!r}, index {first})"
        )
        error.args = (error.message,)
        error.failures = failures
        error.outputs = selected(gathered.outputs, change) if gathered.outputs else None
        return error

    def get_state(self, deadline: Deadline) -> Flow[State]:
        """The states of all members, one after the other."""
        states = yield from each(self._core.get_state(one, deadline) for one in self.tracker.ids)
        return State(
            {name: np.concatenate([state[name] for state in states]) for name in states[0]},
            model=self.tracker.model,
            fingerprint=states[0].fingerprint,
            batch_size=len(states) * self.tracker.batch_size,
        )

    def refresh(self, deadline: Deadline) -> Flow[None]:
        """Takes over the server's revisions and positions."""
        self.tracker.refresh((yield from each(self._core.session(one, deadline) for one in self.tracker.ids)))

    def close(self, deadline: Deadline) -> Flow[None]:
        """Deletes all members; those that are gone already are passed over."""
        for start in range(0, len(self.tracker.ids), _CLOSE_AT_ONCE):
            request = sessions_pb2.CloseSessionsRequest(
                session_ids=self.tracker.ids[start : start + _CLOSE_AT_ONCE]
            )
            yield from self._core.retrier.call("CloseSessions", request, deadline, changes=True)
