"""Plain steps: one row each, one time step, of sessions of one model, with the model's own dtypes and shapes.

However they came (unary calls, messages of many streams), they are checked and admitted together here.
Those that turn out not to be plain after all go back to their receiver, which sends them the general
way, where every rule and every message is.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Protocol

import numpy as np
import numpy.typing as npt

from stepwell_server.core.sessions import Handles, SessionTable
from stepwell_server.engine.api import Array, Members, Select
from stepwell_server.engine.call import U64, Call
from stepwell_server.engine.checks import CheckedInputs, finite_rows
from stepwell_server.engine.framecall import cancelled, too_late
from stepwell_server.engine.intake.admission import Admission
from stepwell_server.engine.state.model import ServedModel
from stepwell_server.errors import ServerError


class Receiver(Protocol):
    """Who gets the answers to some plain steps; they are named by their index."""

    def settle(
        self,
        members: Members,
        revisions: U64,
        positions: U64,
        outputs: Mapping[str, Array],
        *,
        replayed: bool,
    ) -> None:
        """Steps were applied, now or before; `outputs` are their rows one after the other."""

    def fail(self, members: Members, error: ServerError) -> None:
        """Steps failed; nothing changed for them."""

    def cancelled(self, members: Members) -> Sequence[int]:
        """Those of the members whose callers do not want them any more."""

    def send_alone(self, members: Members) -> None:
        """Steps are not plain: the receiver sends each by itself, in their order."""


@dataclasses.dataclass(slots=True)
class PlainSteps:
    """Some plain steps, as columns."""

    session_ids: Sequence[str]
    handles: Handles
    """Where the sessions were when the steps came."""
    arrays: tuple[Array, ...]
    """In the program's order, `(n, ...)` each."""
    with_time: bool
    """They came with a time axis (of length 1)."""
    select: Select
    receiver: Receiver
    expected: U64 | None = None
    """`ANY_REVISION` for none; None: none of them expects any."""
    requests: U64 | None = None
    deadlines: npt.NDArray[np.float64] | None = None
    """On the clock's monotonic time; None: none has one."""


class PlainIntake:
    """Admits plain steps of one model."""

    def __init__(self, table: SessionTable, admission: Admission, model: ServedModel) -> None:
        self._table = table
        self._admission = admission
        self._model = model

    def admit(self, steps: PlainSteps) -> None:
        """Take steps into the model's line. A session may be among them more than once."""
        handles = steps.handles
        good = self._good(steps)
        finite = finite_rows(steps.arrays)
        if finite is not None:
            good &= finite
        members = np.flatnonzero(good)
        if len(members) != len(handles):
            steps.receiver.send_alone(np.flatnonzero(~good))
        if len(members):
            bundle = Bundle(steps, self._model.index, source=self)
            bundle.left = len(members)
            self._admission.admit(bundle, members)

    def _good(self, steps: PlainSteps) -> npt.NDArray[np.bool_]:
        # a session may have been closed since, and its handle given to another
        alive = self._table.are(steps.handles, steps.session_ids)
        good: npt.NDArray[np.bool_] = alive & (self._table.batch_size[steps.handles] == 1)
        return good


class Bundle(Call):
    """Plain steps on their way through the engine as one call; each has its own caller and deadline."""

    def __init__(self, steps: PlainSteps, model: int, source: PlainIntake) -> None:
        sizes = np.ones(len(steps.handles), np.intp)
        super().__init__(model, steps.handles, sizes, select=steps.select, source=source)
        self.may_repeat = True
        self.checked = CheckedInputs(steps.arrays, 1, steps.with_time)
        self.byte_count = sum(array.nbytes for array in steps.arrays)
        self.expected = steps.expected
        self.requests = steps.requests
        self._deadlines = steps.deadlines
        self._receiver = steps.receiver

    def drop(self, members: Members, now: float) -> Sequence[tuple[Members, ServerError]]:
        """See `Call`."""
        found: list[tuple[Members, ServerError]] = []
        if self._deadlines is not None:
            late = self._deadlines[members] <= now
            if late.any():
                found.append((members[late], too_late()))
                members = members[~late]
        gone = self._receiver.cancelled(members)
        if gone:
            found.append((np.array(gone, np.intp), cancelled()))
        return found

    def fail(self, members: Members, error: ServerError) -> None:
        """See `Call`."""
        self.count(len(members))
        self._receiver.fail(members, error)

    def succeed(
        self,
        members: Members,
        revisions: U64,
        positions: U64,
        outputs: Mapping[str, Array],
        *,
        replayed: bool = False,
    ) -> None:
        """See `Call`."""
        self.count(len(members))
        self._receiver.settle(members, revisions, positions, outputs, replayed=replayed)
