"""Frames: changes of many sessions as messages, and what their replies say of each member. No I/O."""

from __future__ import annotations

import copy
import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Literal

import numpy as np
import numpy.typing as npt

from stepwell import errors
from stepwell._retry import Deadline
from stepwell._status import from_message
from stepwell._tensors import Array, Packed, to_messages, unpack_all
from stepwell.v1 import sessions_pb2

Indexes = npt.NDArray[np.intp]
Counts = npt.NDArray[np.uint64]

_pb = sessions_pb2
SELECTIONS: Mapping[str, sessions_pb2.OutputSelection.ValueType] = {
    "all": _pb.OUTPUT_SELECTION_ALL,
    "last": _pb.OUTPUT_SELECTION_LAST,
    "none": _pb.OUTPUT_SELECTION_NONE,
}
_RETRYABLE = (errors.OverloadedError, errors.UnavailableError)


@dataclasses.dataclass(frozen=True, slots=True)
class Change:
    """A step or a reset as a value: two are equal if they are the same on the wire."""

    kind: Literal["step", "reset"]
    tensors: tuple[Packed, ...]
    outputs: str = "all"
    rows: tuple[int, ...] = ()
    """Rows of a session, or members of a group, that a reset concerns; empty for all."""


@dataclasses.dataclass(frozen=True, slots=True)
class Part:
    """Members of a frame that were settled together."""

    applied: Indexes
    revisions: Counts
    positions: Counts
    outputs: dict[str, Array]
    """Rows of the applied members one after the other."""
    failures: Mapping[int, errors.StepwellError]


class Frame:
    """A change of many sessions. It may take several rounds; each sends the members that are unsettled."""

    def __init__(
        self, change: Change, ids: Sequence[str], rows: Indexes, expected: Counts, request_ids: Counts
    ) -> None:
        """A frame before its first round.

        Args:
            change: Its tensors hold the members' rows one after the other.
            ids: The sessions.
            rows: Rows of each member.
            expected: Revision each must have.
            request_ids: Random and non-zero, one each, the same in every round.
        """
        self._change = change
        self._ids = ids
        self._rows = rows
        self._expected = expected
        self._request_ids = request_ids
        self._open = np.ones(len(ids), np.bool_)
        self._sent: Indexes = np.arange(len(ids))
        self._waiting: dict[int, errors.StepwellError] = {}
        self.round_over = False
        """The last part of this round's reply was received."""

    def again(self) -> Frame:
        """The same frame before its first round: same members, same request ids."""
        return Frame(self._change, self._ids, self._rows, self._expected, self._request_ids)

    def __len__(self) -> int:
        return len(self._ids)

    def request(self, frame_id: int, deadline: Deadline) -> sessions_pb2.StepStreamRequest:
        """Begins a round: the message with all members that are still unsettled."""
        self._sent = np.flatnonzero(self._open)
        self._waiting = {}
        self.round_over = False
        message = _pb.StepStreamRequest(frame_id=frame_id)
        if self._change.kind == "step":
            frame = message.step
            frame.inputs.extend(to_messages(self._tensors()))
            frame.outputs = SELECTIONS[self._change.outputs]
            self._fill(frame, deadline)
        else:
            message.reset.state.extend(to_messages(self._tensors()))
            self._fill(message.reset, deadline)
        return message

    def _fill(self, frame: sessions_pb2.StepFrame | sessions_pb2.ResetFrame, deadline: Deadline) -> None:
        everyone = len(self._sent) == len(self._ids)
        frame.session_ids.extend(self._ids if everyone else [self._ids[i] for i in self._sent])
        frame.expected_revisions.extend(self._expected[self._sent].tolist())
        frame.request_ids.extend(self._request_ids[self._sent].tolist())
        # As this side knows them, so that a member that is gone, or replaced, cannot shift the others' rows.
        frame.batch_sizes.extend(self._rows[self._sent].tolist())
        frame.timeout_ms = _timeout_ms(deadline.remaining_s())

    def _tensors(self) -> tuple[Packed, ...]:
        if len(self._sent) == len(self._ids):
            return self._change.tensors
        rows = np.flatnonzero(np.repeat(self._open, self._rows))
        return tuple(_take(tensor, rows) for tensor in self._change.tensors)

    def accept(self, response: sessions_pb2.StepStreamResponse) -> Part:
        """Handles one part of the reply.

        Raises:
            InternalError: The part contradicts the frame.
        """
        applied = self._sent if response.all_members else self._members(response.members)
        revisions, positions = _counts(response.revisions), _counts(response.positions)
        if not len(applied) == len(revisions) == len(positions):
            raise errors.InternalError(
                f"the server sent a part with {len(applied)} members, {len(revisions)} revisions and "
                f"{len(positions)} positions"
            )
        self._open[applied] = False
        failures = self._failures(response)
        if response.last:
            self.round_over = True
            self._expect_all(failures)
        return Part(applied, revisions, positions, unpack_all(response.outputs), failures)

    def _members(self, members: Sequence[int]) -> Indexes:
        indexes = np.fromiter(members, np.intp, len(members))
        if len(indexes) and not 0 <= indexes.min() <= indexes.max() < len(self._sent):
            raise errors.InternalError(f"the server answered members outside of a frame of {len(self._sent)}")
        return self._sent[indexes]

    def _failures(self, response: sessions_pb2.StepStreamResponse) -> dict[int, errors.StepwellError]:
        failures: dict[int, errors.StepwellError] = {}
        for entry in response.errors:
            error = from_message(entry.error)
            # One exception object per member: raising an exception changes it.
            for i in (self._members(entry.members) if entry.members else self._sent).tolist():
                into = self._waiting if isinstance(error, _RETRYABLE) else failures
                into[i] = copy.copy(error)
        self._open[list(failures)] = False
        return failures

    def _expect_all(self, failures: dict[int, errors.StepwellError]) -> None:
        for i in np.flatnonzero(self._open).tolist():
            if i not in self._waiting:
                failures[i] = errors.InternalError(f"the server left session {self._ids[i]!r} unanswered")
                self._open[i] = False

    def unsettled_error(self) -> errors.StepwellError | None:
        """After a round: the error that asks for the longest wait, or None if all are settled."""
        waiting = list(self._waiting.values())
        return max(waiting, key=lambda error: getattr(error, "retry_after_s", 0.0), default=None)

    def fail_retryable(self) -> Part:
        """After a round: settles the members that could be retried as failed, each with its own error."""
        open_ = np.flatnonzero(self._open)
        self._open[:] = False
        none = np.zeros(0, np.uint64)
        return Part(open_[:0], none, none, {}, {i: self._waiting[i] for i in open_.tolist()})

    def give_up(self, error: errors.StepwellError) -> Part:
        """Settles the remaining members as failed."""
        left = np.flatnonzero(self._open)
        self._open[:] = False
        none = np.zeros(0, np.uint64)
        return Part(left[:0], none, none, {}, {i: copy.copy(error) for i in left.tolist()})


class Gathered:
    """The reply to a frame whose members have the same number of rows, assembled from its parts."""

    def __init__(self, members: int, rows: int) -> None:
        self.applied = np.zeros(members, np.bool_)
        self.revisions = np.zeros(members, np.uint64)
        self.positions = np.zeros(members, np.uint64)
        self.outputs: dict[str, Array] = {}
        self.failures: dict[int, errors.StepwellError] = {}
        self._rows = rows

    def add(self, part: Part) -> None:
        """Adds one part."""
        self.applied[part.applied] = True
        self.revisions[part.applied] = part.revisions
        self.positions[part.applied] = part.positions
        self.failures.update(part.failures)
        if len(part.applied) == len(self.applied):
            self.outputs = part.outputs
            return
        for name, array in part.outputs.items():
            self._scatter(name, array, part.applied)

    def _scatter(self, name: str, array: Array, members: Indexes) -> None:
        shape = (len(self.applied), self._rows, *array.shape[1:])
        whole = self.outputs.setdefault(name, np.zeros((shape[0] * shape[1], *shape[2:]), array.dtype))
        whole.reshape(shape)[members] = array.reshape((len(members), *shape[1:]))


def _take(tensor: Packed, rows: Indexes) -> Packed:
    table = np.frombuffer(tensor.data, np.uint8).reshape(tensor.shape[0], -1)
    return tensor._replace(shape=(len(rows), *tensor.shape[1:]), data=table[rows].tobytes())


def _counts(numbers: Sequence[int]) -> Counts:
    return np.fromiter(numbers, np.uint64, len(numbers))


def _timeout_ms(remaining_s: float) -> int:
    if math.isinf(remaining_s):
        return 0
    return min(max(1, math.ceil(remaining_s * 1000)), 2**32 - 1)
