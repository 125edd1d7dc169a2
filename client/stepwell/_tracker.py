"""What this side knows of a session or a group: its revision, and the change whose answer is missing.

The rule for a change that ended with an error: made again with the same arguments it is the same change
(the same request id at the same expected revision), so the server applies it once, whether or not the
first attempt got through. A change with other arguments is a new one at the same expected revision; if
the first did get through, the server refuses it with a revision conflict.
"""

from __future__ import annotations

import secrets
from collections.abc import Sequence

import numpy as np

from stepwell._frames import Change, Counts, Frame, Gathered, Indexes
from stepwell._retry import Deadline
from stepwell._steps import Step
from stepwell.errors import RevisionConflictError, StepwellError
from stepwell.v1 import sessions_pb2


def new_request_id() -> int:
    """Random and non-zero, 64 bits."""
    return secrets.randbits(64) or 1


def new_request_ids(count: int) -> Counts:
    """Many of them."""
    ids = np.frombuffer(bytearray(secrets.token_bytes(8 * count)), np.uint64)
    ids[ids == 0] = 1
    return ids


class SessionTracker:
    """What this side knows of one session."""

    __slots__ = (
        "_in_doubt",
        "_open",
        "_pending",
        "batch_size",
        "fingerprint",
        "model",
        "position",
        "resumed",
        "revision",
        "session_id",
    )

    def __init__(self, session: sessions_pb2.Session, *, resumed: bool = False) -> None:
        self.session_id = session.session_id
        self.model = session.model
        self.fingerprint = session.model_fingerprint
        self.batch_size = session.batch_size
        self.revision = session.revision
        self.position = session.position
        self.resumed = resumed
        self._pending: tuple[Change, int] | None = None
        self._open = False
        """The last change was begun, and nothing has settled what became of it."""
        self._in_doubt = False
        """So it was for some earlier change: the server may be one revision ahead because of it."""

    def begin(self, change: Change) -> int:
        """The request id to send a change with."""
        if self._pending is None or self._pending[0] != change:
            self._pending = (change, new_request_id())
        self._in_doubt |= self._open
        self._open = True
        return self._pending[1]

    def step(self, change: Change, deadline: Deadline) -> Step:
        """Begins a step."""
        return Step(
            self.model, self.session_id, change, self.batch_size, self.revision, self.begin(change), deadline
        )

    def failed(self, error: StepwellError) -> StepwellError:
        """The change has failed; the result is what to raise. Not called for a change that was cancelled."""
        self._open = is_unknown(error)
        return _told(error, in_doubt=self._in_doubt)

    def applied(self, revision: int, position: int) -> None:
        """The change is answered."""
        self._pending = None
        self._open = self._in_doubt = False
        self.revision = revision
        self.position = position

    def refresh(self, session: sessions_pb2.Session) -> None:
        """Takes over what the server says."""
        self.fingerprint = session.model_fingerprint
        self.applied(session.revision, session.position)


def is_unknown(error: StepwellError) -> bool:
    """Whether a change that ended with this error may have been applied all the same."""
    return getattr(error, "outcome", "not_applied") == "unknown"


def _told(error: StepwellError, *, in_doubt: bool) -> StepwellError:
    """The error of a change as its caller gets it, if an earlier one may have been applied."""
    if not in_doubt or not isinstance(error, RevisionConflictError):
        return error
    return RevisionConflictError(
        f"{error.message}; an earlier change of this handle ended without an answer and may have been "
        f"applied: refresh() takes over the server's revision, and the handle goes on from there",
        expected=error.expected,
        actual=error.actual,
        reason=error.reason,
    )


class GroupTracker:
    """What this side knows of many sessions of one model and batch size."""

    def __init__(
        self,
        model: str,
        fingerprint: str,
        batch_size: int,
        ids: Sequence[str],
        revisions: Sequence[int] = (),
    ) -> None:
        self.model = model
        self.fingerprint = fingerprint
        self.batch_size = batch_size
        self.ids = tuple(ids)
        self.revisions = np.array(revisions or [0] * len(ids), np.uint64)
        self.positions = np.zeros(len(ids), np.uint64)
        self._pending: tuple[Change, Frame] | None = None
        self._all: Indexes = np.arange(len(ids))
        # As in `SessionTracker`, for each member.
        self._open = np.zeros(len(ids), np.bool_)
        self._in_doubt = np.zeros(len(ids), np.bool_)

    def members(self, change: Change) -> Indexes:
        """The members a change concerns."""
        return np.array(change.rows, np.intp) if change.rows else self._all

    def begin(self, change: Change) -> Frame:
        """The frame to send a change as. The same change again is a frame with the same request ids."""
        members = self.members(change)
        self._in_doubt[members] |= self._open[members]
        self._open[members] = True
        if self._pending is not None and self._pending[0] == change:
            frame = self._pending[1].again()
        else:
            frame = self._frame(change, members)
        self._pending = (change, frame)
        return frame

    def _frame(self, change: Change, members: Indexes) -> Frame:
        whole = len(members) == len(self.ids) and not change.rows
        ids = self.ids if whole else [self.ids[i] for i in members.tolist()]
        rows = np.full(len(members), self.batch_size, np.intp)
        return Frame(change, ids, rows, self.revisions[members], new_request_ids(len(members)))

    def settle(self, change: Change, gathered: Gathered) -> None:
        """Takes over what was applied; what failed stays pending, with the errors to raise."""
        concerned = self.members(change)
        members = concerned[gathered.applied]
        self.revisions[members] = gathered.revisions[gathered.applied]
        self.positions[members] = gathered.positions[gathered.applied]
        self._open[members] = self._in_doubt[members] = False
        for i, error in gathered.failures.items():
            self._open[concerned[i]] = is_unknown(error)
            gathered.failures[i] = _told(error, in_doubt=bool(self._in_doubt[concerned[i]]))
        if not gathered.failures:
            self._pending = None

    def refresh(self, sessions: Sequence[sessions_pb2.Session]) -> None:
        """Takes over what the server says."""
        self._pending = None
        self._open[:] = self._in_doubt[:] = False
        self.revisions[:] = [session.revision for session in sessions]
        self.positions[:] = [session.position for session in sessions]
