"""Frames: changes of many sessions as one message, and what their replies contain for each member. No I/O."""

from __future__ import annotations

import copy
import dataclasses
import functools
import math
from collections.abc import Mapping, Sequence
from typing import Any, Literal, NamedTuple, Protocol, TypeAlias

import numpy as np
import numpy.typing as npt

from stepwell import errors
from stepwell._base.wire import bytes_tag, varint, varint_tag
from stepwell._batching.sets import SessionSet, encoded_ids
from stepwell._state import tensors
from stepwell._state.tensors import Array, Packed, view_all
from stepwell._transport.call import check_length
from stepwell._transport.retry import Deadline
from stepwell._transport.status import from_message
from stepwell._transport.stream import MakeRequest
from stepwell.v1 import sessions_pb2

Indexes = npt.NDArray[np.intp]
Counts = npt.NDArray[np.uint64]
"""A number for each session of a group, (sessions,)."""
Kind: TypeAlias = tuple[tuple[str, str, np.dtype[Any], tuple[int, ...]], ...]
"""Of each array: "output" or "state", its name, its dtype, and its shape without the rows."""

_pb = sessions_pb2
SELECTIONS: Mapping[str, sessions_pb2.OutputSelection.ValueType] = {
    "all": _pb.OUTPUT_SELECTION_ALL,
    "last": _pb.OUTPUT_SELECTION_LAST,
    "none": _pb.OUTPUT_SELECTION_NONE,
}
STATES: Mapping[str, sessions_pb2.StateSelection.ValueType] = {
    "all": _pb.STATE_SELECTION_ALL,
    "last": _pb.STATE_SELECTION_LAST,
    "none": _pb.STATE_SELECTION_NONE,
}
FRAME_ID_TAG = varint_tag(_pb.StepStreamRequest.FRAME_ID_FIELD_NUMBER)
STEP_TAG = bytes_tag(_pb.StepStreamRequest.STEP_FIELD_NUMBER)
_RESET_TAG = bytes_tag(_pb.StepStreamRequest.RESET_FIELD_NUMBER)
RETRYABLE = (errors.OverloadedError, errors.UnavailableError)


StepKind: TypeAlias = type[sessions_pb2.StepRequest] | type[sessions_pb2.StepFrame]


class Change(NamedTuple):
    """A step or a reset as a value. Two are equal if they are the same on the wire."""

    kind: Literal["step", "reset"]
    tensors: tuple[Packed, ...]
    outputs: str = "all"
    """Time steps of the outputs to return: a key of `SELECTIONS`."""
    rows: tuple[int, ...] = ()
    """Rows of a session to change; empty for all. The tensors have only these rows."""
    reset: bytes = b""
    """Of a step, the rows that restart: a byte (0 or 1) for each row of the tensors, or for each row and time step,
    row-major; empty for none.
    """
    output_names: tuple[str, ...] = ()
    """Outputs to return; empty for all."""
    states: str = "none"
    """Time steps whose states to return: a key of `STATES`."""

    position: int = 0
    """Of a reset, the session's position afterwards."""

    def fields(self, kind: StepKind) -> list[bytes]:
        """The fields of a step's message that describe the change."""
        parts = tensors.fields(kind.INPUTS_FIELD_NUMBER, self.tensors)
        parts.append(_options(kind is _pb.StepFrame, self.outputs, self.output_names, self.states, self.rows))
        if self.reset:
            parts += (bytes_tag(kind.RESET_MASK_FIELD_NUMBER), varint(len(self.reset)), self.reset)
        return parts

    def some(self, rows: Indexes, count: int) -> Change:
        """The same change for some of its `count` rows."""
        reset = self.reset
        if reset:
            reset = np.frombuffer(reset, np.uint8).reshape(count, -1)[rows].tobytes()
        return self._replace(tensors=tuple([_take(tensor, rows) for tensor in self.tensors]), reset=reset)


@functools.lru_cache(maxsize=256)
def _options(
    is_frame: bool, outputs: str, names: tuple[str, ...], states: str, rows: tuple[int, ...]
) -> bytes:
    """The encoded options of a step; a stream of steps uses the same ones."""
    kind: StepKind = _pb.StepFrame if is_frame else _pb.StepRequest
    message = kind(outputs=SELECTIONS[outputs], output_names=names)
    if states != "none":
        message.states = STATES[states]
    if isinstance(message, _pb.StepRequest):  # a frame has no steps of some rows
        message.rows.extend(rows)
    return message.SerializeToString()


@dataclasses.dataclass(frozen=True, slots=True)
class Part:
    """Members of a frame that were answered together."""

    applied: Indexes
    revisions: Counts
    positions: Counts
    outputs: dict[str, Array]
    """Rows of the applied members, one after the other; copy them before you return them."""
    failures: Mapping[int, errors.StepwellError]
    states: dict[str, Array] = dataclasses.field(default_factory=dict)
    """Like `outputs`, for the requested states."""
    model_version: int = 0
    """Version of the model that produced them; 0 if the server does not report it."""


class Frame:
    """A change of many sessions as one message. It may be sent again for members without an answer."""

    def __init__(
        self,
        change: Change,
        ids: Sequence[str],
        rows: Indexes,
        expected: Counts,
        request_ids: Counts,
        named: SessionSet | None = None,
    ) -> None:
        """A frame that has not been sent yet.

        Args:
            change: Its tensors hold the members' rows one after the other.
            ids: The sessions.
            rows: Rows of each member.
            expected: Revision that each must have.
            request_ids: Random and non-zero, one each, the same in every round.
            named: The sessions, if they are often changed together.
        """
        self._change = change
        self.ids = ids
        self._rows = rows
        self._expected = expected
        self._request_ids = request_ids
        self.named = named
        self._open = np.ones(len(ids), np.bool_)
        self._all: Indexes = np.arange(len(ids))
        self._waiting: dict[int, errors.StepwellError] = {}
        self.traceparent = ""
        """The span of the frame, if its trace is recorded."""
        self.round_over = False
        """Whether the last part of this round's reply has arrived."""

    def __len__(self) -> int:
        return len(self.ids)

    def part(self, members: Indexes, named: SessionSet | None) -> Frame:
        """The frame of some members, ascending; `named` as in the constructor."""
        is_own = np.zeros(len(self), np.bool_)
        is_own[members] = True
        own = Frame(
            self._change.some(np.flatnonzero(np.repeat(is_own, self._rows)), int(self._rows.sum())),
            [self.ids[i] for i in members.tolist()] if named is None else named.ids,
            self._rows[members],
            self._expected[members],
            self._request_ids[members],
            named,
        )
        own.traceparent = self.traceparent
        return own

    def encode(self, frame_id: int, deadline: Deadline) -> bytes:
        """Begins a round: encodes the message with all members.

        Args:
            frame_id: Its number on the stream.
            deadline: The server drops members that still wait at that time.
        """
        self._waiting = {}
        self.round_over = False
        change = self._change
        if change.kind == "step":
            kind, parts = STEP_TAG, change.fields(_pb.StepFrame)
            parts += self._numbers(_pb.StepFrame(), deadline)
        else:
            kind, parts = _RESET_TAG, tensors.fields(_pb.ResetFrame.STATE_FIELD_NUMBER, change.tensors)
            parts += self._numbers(_pb.ResetFrame(), deadline)
        parts.append(encoded_ids(self.ids) if self.named is None else self.named.encoded())
        size = sum([len(part) for part in parts])
        return b"".join((FRAME_ID_TAG, varint(frame_id), kind, varint(size), *parts))

    def _numbers(
        self, frame: sessions_pb2.StepFrame | sessions_pb2.ResetFrame, deadline: Deadline
    ) -> list[bytes]:
        """The encoded fields of both kinds of frames, all but the ids. Fills in an empty message."""
        frame.timeout_ms = timeout_ms(deadline.remaining_s())
        if self.traceparent:
            frame.traceparent = self.traceparent
        rows, expected, request_ids = self._rows, self._expected, self._request_ids
        # The batch sizes that the client knows, so that a closed or replaced member cannot shift the others' rows.
        if _are_alike(rows):
            frame.batch_size = int(rows[0])
        else:
            frame.batch_sizes.extend(rows.tolist())
        if _are_alike(expected):
            frame.expected_revision = int(expected[0])
        else:
            frame.expected_revisions.extend(expected.tolist())
        if len(request_ids) > 1 and (np.diff(request_ids) == 1).all():
            frame.request_id_base = int(request_ids[0])
            return [frame.SerializeToString()]
        # Packed numbers of eight bytes are the array's bytes, and protobuf would take each for itself.
        packed = request_ids.astype("<u8", copy=False).tobytes()
        return [
            frame.SerializeToString(),
            bytes_tag(frame.REQUEST_IDS_FIELD_NUMBER),
            varint(len(packed)),
            packed,
        ]

    def accept(self, response: sessions_pb2.StepStreamResponse) -> Part:
        """Handles one part of the reply.

        Raises:
            InternalError: The part contradicts the frame.
        """
        applied = self._applied(response)
        count = len(applied)
        has = response.HasField
        revisions = _same(response.revision, count) if has("revision") else _counts(response.revisions)
        positions = _same(response.position, count) if has("position") else _counts(response.positions)
        if not len(applied) == len(revisions) == len(positions):
            raise errors.InternalError(
                f"the server sent a part with {len(applied)} members, {len(revisions)} revisions and "
                f"{len(positions)} positions"
            )
        self._open[_slice(applied)] = False
        failures = self._failures(response) if response.errors else {}
        if response.last:
            self.round_over = True
            self._expect_all(failures)
        return Part(
            applied,
            revisions,
            positions,
            view_all(response.outputs),
            failures,
            view_all(response.states),
            response.model_version,
        )

    def _applied(self, response: sessions_pb2.StepStreamResponse) -> Indexes:
        if response.all_members:
            return self._all
        if not response.member_count:
            return self._members(response.members)
        first, past = response.first_member, response.first_member + response.member_count
        if past > len(self):
            raise self._outside()
        return self._all[first:past]

    def _outside(self) -> errors.InternalError:
        return errors.InternalError(f"the server answered members outside of a frame of {len(self)}")

    def _members(self, members: Sequence[int]) -> Indexes:
        indexes = np.fromiter(members, np.intp, len(members))
        if len(indexes) and not 0 <= indexes.min() <= indexes.max() < len(self):
            raise self._outside()
        return indexes

    def _failures(self, response: sessions_pb2.StepStreamResponse) -> dict[int, errors.StepwellError]:
        failures: dict[int, errors.StepwellError] = {}
        for entry in response.errors:
            error = from_message(entry.error)
            # One exception object per member: raising an exception changes it.
            for i in (self._members(entry.members) if entry.members else self._all).tolist():
                into = self._waiting if isinstance(error, RETRYABLE) else failures
                into[i] = copy.copy(error)
        self._open[list(failures)] = False
        return failures

    def _expect_all(self, failures: dict[int, errors.StepwellError]) -> None:
        for i in np.flatnonzero(self._open).tolist():
            if i not in self._waiting:
                failures[i] = errors.InternalError(f"the server left session {self.ids[i]!r} unanswered")
                self._open[i] = False

    def unsettled(self) -> list[tuple[errors.StepwellError, Indexes]]:
        """After a round, groups the members that may be retried.

        One group are those that another replica may take, the other those that must wait. Each group has the error
        that asks for the longest wait.
        """
        found = []
        for is_elsewhere in (True, False):
            own = {
                i: error
                for i, error in self._waiting.items()
                if isinstance(error, errors.UnavailableError) is is_elsewhere
            }
            if own:
                longest = max(own.values(), key=lambda error: getattr(error, "retry_after_s", 0.0))
                found.append((longest, np.array(sorted(own), np.intp)))
        return found

    def open_members(self) -> Indexes:
        """Members without a final answer."""
        return np.flatnonzero(self._open)

    def fail_retryable(self) -> Part:
        """After a round: fails the members that could be retried, each with its own error."""
        open_ = np.flatnonzero(self._open)
        self._open[:] = False
        none = np.zeros(0, np.uint64)
        return Part(open_[:0], none, none, {}, {i: self._waiting[i] for i in open_.tolist()})


class Encodable(Protocol):
    """A frame that encodes its next round."""

    def encode(self, frame_id: int, deadline: Deadline) -> bytes:
        """See `Frame.encode`."""


def maker(frame: Encodable, deadline: Deadline, max_message_bytes: int) -> MakeRequest:
    """Returns a function that builds the encoded message of a frame's next round.

    It raises an `InvalidInputError` if the message exceeds the limit.
    """

    def make(frame_id: int) -> bytes:
        message = frame.encode(frame_id, deadline)
        check_length("a frame", len(message), max_message_bytes)
        return message

    return make


def column(numbers: Sequence[int], dtype: npt.DTypeLike) -> npt.NDArray[Any]:
    """Numbers of the members of a frame as an array."""
    if numbers.count(numbers[0]) == len(numbers):
        return np.full(len(numbers), numbers[0], dtype)
    return np.fromiter(numbers, dtype, len(numbers))  # in a third of the time of `np.array`


def _are_alike(numbers: npt.NDArray[Any]) -> bool:
    return len(numbers) > 1 and bool((numbers == numbers[0]).all())


class Gathered:
    """The reply to a frame whose members have the same number of rows, assembled from its parts."""

    def __init__(self, members: int, rows: int) -> None:
        self.applied = np.zeros(members, np.bool_)
        self.revisions = np.zeros(members, np.uint64)
        self.positions = np.zeros(members, np.uint64)
        self.outputs: dict[str, Array] = {}
        self.states: dict[str, Array] = {}
        self.model_versions = np.zeros(members, np.uint64)
        self.failures: dict[int, errors.StepwellError] = {}
        self.kinds: dict[Kind, list[Indexes]] = {}
        """Members by the names, dtypes and shapes of their outputs and states. Members of several kinds cannot form one
        array; the arrays are then those of the first kind.
        """
        self._rows = rows

    def add(self, part: Part) -> None:
        """Adds one part."""
        members = _slice(part.applied)
        self.applied[members] = True
        self.revisions[members] = part.revisions
        self.positions[members] = part.positions
        self.model_versions[members] = part.model_version
        self.failures.update(part.failures)
        if len(part.applied) and self._is_alike(part):
            self._put(self.outputs, part.outputs, members, len(part.applied))
            self._put(self.states, part.states, members, len(part.applied))

    def _is_alike(self, part: Part) -> bool:
        """Whether its arrays have the same names, dtypes and shapes as the earlier ones."""
        kind = tuple(
            [
                (what, name, array.dtype, array.shape[1:])
                for what, arrays in (("output", part.outputs), ("state", part.states))
                for name, array in arrays.items()
            ]
        )
        self.kinds.setdefault(kind, []).append(part.applied)
        return next(iter(self.kinds)) == kind

    def _put(
        self, into: dict[str, Array], arrays: Mapping[str, Array], members: Indexes | slice, count: int
    ) -> None:
        for name, array in arrays.items():
            shape = (len(self.applied), self._rows, *array.shape[1:])
            whole = into.get(name)
            if whole is None:
                whole = into[name] = np.zeros((shape[0] * shape[1], *shape[2:]), array.dtype)
            whole.reshape(shape)[members] = array.reshape((count, *shape[1:]))


def _take(tensor: Packed, rows: Indexes) -> Packed:
    table = np.frombuffer(tensor.data, np.uint8).reshape(tensor.shape[0], -1)
    return tensor._replace(shape=(len(rows), *tensor.shape[1:]), data=table[rows].tobytes())


def _slice(members: Indexes) -> Indexes | slice:
    """Ascending members as a slice, which is cheaper, if they are consecutive."""
    if len(members) and members[-1] - members[0] == len(members) - 1:
        return slice(int(members[0]), int(members[-1]) + 1)
    return members


def _same(number: int, count: int) -> Counts:
    return np.full(count, number, np.uint64)


def _counts(numbers: Sequence[int]) -> Counts:
    return np.fromiter(numbers, np.uint64, len(numbers))


def timeout_ms(remaining_s: float) -> int:
    """A time limit as a frame has it."""
    if math.isinf(remaining_s):
        return 0
    return min(max(1, math.ceil(remaining_s * 1000)), 2**32 - 1)
