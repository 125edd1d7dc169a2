"""Tracks sessions on the client: the revision, and the change that has no answer yet.

The rule after a failed change: the same call with the same arguments is the same change, with the same request id and
expected revision. The server applies it once, whether or not it applied the first attempt. A call with other
arguments is a new change at the same expected revision. If the server did apply the first change, it rejects the new
one with a revision conflict.
"""

from __future__ import annotations

import os
import random
import secrets
from typing import NamedTuple, TypeVar

import numpy as np

from stepwell._batching.frames import Change, Counts
from stepwell._batching.steps import Step, with_data
from stepwell._core.versions import reference
from stepwell._transport.retry import Deadline
from stepwell.errors import RevisionConflictError, StepwellError
from stepwell.v1 import sessions_pb2

S = TypeVar("S", bound=Step)

# Seeded by the operating system. To ask that for each id would take five times as long.
_random = random.Random()  # noqa: S311 (an id must be unique, but it is no secret)
_getrandbits = _random.getrandbits
os.register_at_fork(after_in_child=_random.seed)


def new_request_id() -> int:
    """Random and non-zero, 64 bits."""
    return _getrandbits(64) or 1


def new_request_ids(count: int) -> Counts:
    """Random and non-zero, 64 bits each, and each greater by 1 than the one before: (count,) uint64."""
    first = 1 + secrets.randbelow(2**64 - count)
    return np.arange(count, dtype=np.uint64) + np.uint64(first)


class PendingChange(NamedTuple):
    """A change without an answer."""

    change: Change
    """The call, as its caller made it."""
    sent: Change
    """The change as it was sent: a tape may ask for more states than the caller."""
    request_id: int


class SessionTracker:
    """Tracks one session."""

    __slots__ = (
        "_ahead",
        "_unknown",
        "batch_size",
        "fingerprint",
        "model",
        "model_version",
        "model_version_pinned",
        "pending",
        "position",
        "resumed",
        "revision",
        "session_id",
        "uid",
    )

    def __init__(self, session: sessions_pb2.Session, *, resumed: bool = False) -> None:
        self.session_id = session.session_id
        self.uid = session.uid
        """Distinguishes the session from others that get its id later; 0 if the server does not report it."""
        self.model = session.model
        self.fingerprint = session.model_fingerprint
        self.batch_size = session.batch_size
        self.revision = session.revision
        self.position = session.position
        self.model_version = session.model_version
        self.model_version_pinned = session.model_version_pinned
        self.resumed = resumed
        self.pending: PendingChange | Step | None = None
        """The change that has no answer yet."""
        self._unknown = False
        """Whether the outcome of the last change is unknown."""
        self._ahead = False
        """Whether the outcome of an earlier change is unknown, so that the server may be one revision ahead."""

    def begin(self, change: Change, states: str = "none") -> PendingChange | Step:
        """Begins a change; returns it ready to be sent.

        Args:
            change: The call. The same call again is sent as it was the first time.
            states: States to request if the call requests fewer.
        """
        pending = self.pending
        if pending is None or pending.change != change:
            sent = change if states == "none" else with_states(change, states)
            pending = self.pending = PendingChange(change, sent, new_request_id())
        self._ahead |= self._unknown
        self._unknown = True
        return pending

    def step(
        self, kind: type[S], form: Change, deadline: Deadline, states: str = "none", data: bytes | None = None
    ) -> S:
        """Begins a step; returns it ready to be sent.

        Args:
            kind: The class of the result, which has the constructor of a step.
            form: The change, or its form.
            deadline: The time limit of the call.
            states: States to request if the call requests fewer.
            data: The data of the change if it is a form.
        """
        rows = self.batch_size if data is not None else len(form.rows) or self.batch_size
        if states != "none" or self.pending is not None:
            begun = self.begin(with_data(form, data), states)
            sent, request_id = begun.sent, begun.request_id
            return kind(self.model, self.session_id, sent, rows, self.revision, request_id, deadline)
        request_id = _getrandbits(64) or 1  # as `new_request_id`, without a call
        step = self.pending = kind(
            self.model, self.session_id, form, rows, self.revision, request_id, deadline, data
        )
        self._ahead |= self._unknown
        self._unknown = True
        return step

    def failed(self, error: StepwellError) -> StepwellError:
        """Records that the change has failed. Returns the error to raise. Not called for a cancelled change."""
        self._unknown = is_unknown(error)
        return explained(error, ahead=self._ahead)

    @property
    def reference(self) -> str:
        """The model version that the session uses, as requests name it."""
        return reference(self.model, self.model_version)

    def applied(self, revision: int, position: int, version: int = 0) -> int:
        """Records that the change was applied by this version of the model; 0: the server does not report it.

        Returns the previous version of the session if it was another one, otherwise 0.
        """
        self.pending = None
        self._unknown = self._ahead = False
        self.revision = revision
        self.position = position
        previous = self.model_version
        if version in (0, previous):
            return 0
        self.model_version = version
        self.fingerprint = ""
        return previous

    def refresh(self, session: sessions_pb2.Session) -> int:
        """Updates to the server's values, and drops a change without an answer. Returns what `applied` returns."""
        previous = self.applied(session.revision, session.position, session.model_version)
        self.uid = session.uid
        self.fingerprint = session.model_fingerprint
        self.model_version_pinned = session.model_version_pinned
        return previous


def with_states(change: Change, states: str) -> Change:
    """A change that requests at least these states."""
    is_more = states == "all" or (states == "last" and change.states == "none")
    return change._replace(states=states) if is_more else change


def is_unknown(error: StepwellError) -> bool:
    """Whether a change that ended with this error may have been applied."""
    return getattr(error, "outcome", "not_applied") == "unknown"


def explained(error: StepwellError, *, ahead: bool) -> StepwellError:
    """The error to raise: a revision conflict is explained if an earlier change may be its cause."""
    if not ahead or not isinstance(error, RevisionConflictError):
        return error
    return RevisionConflictError(
        f"{error.message}; an earlier change of this handle ended without an answer and may have been "
        f"applied: call refresh() to adopt the server's revision",
        expected=error.expected,
        actual=error.actual,
        reason=error.reason,
    )
