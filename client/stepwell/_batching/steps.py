"""Steps of single sessions as values, and how several of them form a frame. No I/O.

Used by both clients: the async one collects the steps of many tasks (`_batching.coalesce`), the sync one those of
many threads (`_batching.sender`).
"""

from __future__ import annotations

import copy
import math
import types
from collections.abc import Hashable, Iterator, Mapping, Sequence
from typing import Any, Generic, NamedTuple, Protocol, TypeVar

import numpy as np

from stepwell._base.metadata import Pairs, sampled
from stepwell._base.wire import bytes_tag, fixed64_field, varint, varint_tag
from stepwell._batching.frames import Change, Frame, Part
from stepwell._state.tensors import Array, unpack_all
from stepwell._transport.call import Call, Endpoint, check_length
from stepwell._transport.retry import Deadline
from stepwell.errors import StepwellError
from stepwell.v1 import sessions_pb2

_NO_STATES: Mapping[str, Array] = types.MappingProxyType({})


class Stepped(NamedTuple):
    """The answer to a step."""

    revision: int
    """Revision after the step."""
    position: int
    """Position after the step."""
    outputs: dict[str, Array]
    """Outputs by name."""
    states: Mapping[str, Array] = _NO_STATES
    """States by name, if requested."""
    model_version: int = 0
    """Version of the model that ran the step; 0 if the server does not report it."""


#: Steps with inputs up to this size share frames. Measured on two cores: 64 concurrent steps of 30 KiB each take half
#: as long in frames as in unary calls.
SHARED_BYTES = 64 * 1024
#: The inputs of a frame take at most this part of the message limit: outputs may be larger than inputs.
FRAME_SHARE = 4
_ID_TAG = bytes_tag(sessions_pb2.StepRequest.SESSION_ID_FIELD_NUMBER)
_REVISION_TAG = varint_tag(sessions_pb2.StepRequest.EXPECTED_REVISION_FIELD_NUMBER)
_REQUEST_ID = sessions_pb2.StepRequest.REQUEST_ID_FIELD_NUMBER
#: Approximate size of a member in a frame in bytes, without its inputs.
_MEMBER_BYTES = 64


class Step(NamedTuple):
    """One step of one session, the same in every attempt."""

    model: str
    session_id: str
    change: Change
    rows: int
    expected: int
    """Revision that the session must have."""
    request_id: int
    deadline: Deadline
    trace: Pairs = ()
    """Metadata of its span."""
    to: Endpoint | None = None
    """The replica to ask; None: the client has one server."""
    is_alone: bool = False
    """Whether it must not share a frame."""

    def call(self, max_message_bytes: int) -> Call:
        """One attempt as a unary call.

        Raises:
            InvalidInputError: The message exceeds the limit.
        """
        session_id = self.session_id.encode()
        parts = self.change.fields(sessions_pb2.StepRequest)
        parts += (_ID_TAG, varint(len(session_id)), session_id, _REVISION_TAG, varint(self.expected))
        parts.append(fixed64_field(_REQUEST_ID, self.request_id))
        request = b"".join(parts)
        if len(request) > max_message_bytes:
            check_length("Step", len(request), max_message_bytes)
        return Call("Step", request, self.deadline.grpc_timeout_s(), self.trace, None, self.to)

    def may_share(self) -> bool:
        """Whether it may share a frame with others. A large step, or a step of some rows, may not."""
        return not self.change.rows and not self.is_alone and self.input_bytes() <= SHARED_BYTES

    def input_bytes(self) -> int:
        """Size of its inputs, in bytes."""
        size = 0
        for tensor in self.change.tensors:
            size += len(tensor.data)
        return size

    def kind(self) -> Hashable:
        """Properties that steps must have in common to share a frame."""
        change = self.change
        signature: tuple[Hashable, ...] = ()
        for tensor in change.tensors:
            signature += (tensor.name, tensor.dtype, tensor.shape[1:])
        reset = len(change.reset) // self.rows  # entries of the mask for each row
        return self.model, change.outputs, signature, reset, change.output_names, change.states


def read(response: sessions_pb2.StepResponse) -> Stepped:
    """The result of a step that was a unary call."""
    states = response.states
    return Stepped(
        response.revision,
        response.position,
        unpack_all(response.outputs),
        unpack_all(states) if states else _NO_STATES,
        response.model_version,
    )


class Member(Protocol):
    """A step and its caller."""

    @property
    def step(self) -> Step:
        """The step."""

    def settle(self, stepped: Stepped) -> None:
        """The step was applied. Does nothing if it already has an answer, or its caller no longer waits."""

    def fail(self, error: BaseException) -> None:
        """The step failed. Does nothing if it already has an answer, or its caller no longer waits."""


M = TypeVar("M", bound=Member)


class Gathering(Generic[M]):
    """Members, grouped by the frame that they can share."""

    def __init__(self) -> None:
        self._groups: dict[tuple[Hashable, float, int], dict[str, M]] = {}

    def __bool__(self) -> bool:
        return bool(self._groups)

    def add(self, member: M) -> None:
        """Adds a member to its group: same kind, and a similar time limit, because a frame has only one."""
        limit = _roughly(member.step.deadline.remaining_s())
        # A frame may name a session only once: a second handle's step of the same session needs another frame.
        nth, kind, session_id = 0, member.step.kind(), member.step.session_id
        while (group := self._groups.get((kind, limit, nth))) is not None and session_id in group:
            nth += 1
        if group is None:
            group = self._groups[kind, limit, nth] = {}
        group[session_id] = member

    def frames(self, max_bytes: int, max_members: Mapping[Hashable, int] | None = None) -> Iterator[list[M]]:
        """Yields the members frame by frame.

        Args:
            max_bytes: Largest size of the inputs of a frame, unless it has a single member.
            max_members: Largest number of members of a frame, by the kind of their step; no limit for other kinds.
        """
        for (kind, _, _), group in self._groups.items():
            members = list(group.values())
            count = max_members.get(kind, len(members)) if max_members else len(members)
            begin, size = 0, 0
            for i, member in enumerate(members):
                own = member.step.input_bytes() + _MEMBER_BYTES
                if i > begin and (size + own > max_bytes or i - begin >= count):
                    yield members[begin:i]
                    begin, size = i, 0
                size += own
            yield members[begin:]


def _roughly(remaining_s: float) -> float:
    """Equal for time limits that may share a frame, each less than twice the other. Callers keep their own limits."""
    return math.frexp(remaining_s)[1] if math.isfinite(remaining_s) else remaining_s


def framed(members: Sequence[Member]) -> Frame:
    """The frame of members of one kind."""
    steps = [member.step for member in members]
    change = steps[0].change
    if len(steps) > 1:
        changes = [step.change for step in steps]
        reset = b"".join([each.reset for each in changes])
        change = change._replace(tensors=_joined(changes), reset=reset)
    frame = Frame(
        change,
        [step.session_id for step in steps],
        np.array([step.rows for step in steps], np.intp),
        np.array([step.expected for step in steps], np.uint64),
        np.array([step.request_id for step in steps], np.uint64),
    )
    # A frame is of one trace: that of the first of its steps that has one.
    frame.traceparent = next((parent for step in steps if step.trace and (parent := sampled(step.trace))), "")
    return frame


def _joined(changes: Sequence[Change]) -> tuple[Any, ...]:
    joined = []
    for i, first in enumerate(changes[0].tensors):
        tensors = [change.tensors[i] for change in changes]
        rows = sum([tensor.shape[0] for tensor in tensors])
        data = b"".join([tensor.data for tensor in tensors])
        joined.append(first._replace(shape=(rows, *first.shape[1:]), data=data))
    return tuple(joined)


def answer(members: Sequence[Member], part: Part) -> None:
    """Gives the members of a frame their part of a reply."""
    start = 0
    settled = zip(part.applied.tolist(), part.revisions.tolist(), part.positions.tolist(), strict=True)
    outputs, states, version = part.outputs, part.states, part.model_version
    for i, revision, position in settled:
        member = members[i]
        end = start + member.step.rows
        own = _rows_of(outputs, start, end)
        own_states = _rows_of(states, start, end) if states else _NO_STATES
        member.settle(Stepped(revision, position, own, own_states, version))
        start = end
    for i, error in part.failures.items():
        members[i].fail(error)


def _rows_of(arrays: Mapping[str, Array], start: int, end: int) -> dict[str, Array]:
    """Copies: if a caller keeps its outputs, those of the other members must not stay in memory."""
    own = {}
    for name, array in arrays.items():
        own[name] = array[start:end].copy()
    return own


def abandon(members: Sequence[Member], error: BaseException) -> None:
    """Fails every member that has no answer yet."""
    for member in members:
        # One exception object per caller: raising an exception changes it.
        member.fail(copy.copy(error) if isinstance(error, StepwellError) else error)
