"""Steps of single sessions as values, and how several of them form a frame. No I/O.

Used by both clients: the async one collects the steps of many tasks (`_batching.coalesce`), the sync one those of
many threads (`_batching.sender`).
"""

from __future__ import annotations

import abc
import copy
import dataclasses
import math
import operator
import types
from collections.abc import Hashable, Iterable, Iterator, Mapping, Sequence
from typing import TypeAlias, TypeVar, cast

import numpy as np

from stepwell._base.metadata import Pairs, sampled
from stepwell._base.wire import bytes_tag, fixed64_field, varint, varint_tag
from stepwell._batching.frames import Change, Frame, Part, column
from stepwell._state.tensors import Array, Packed, unpack_all
from stepwell._transport.call import Call, Endpoint, check_length
from stepwell._transport.retry import Deadline
from stepwell.errors import StepwellError
from stepwell.v1 import sessions_pb2

_NO_STATES: Mapping[str, Array] = types.MappingProxyType({})
_NOTHING: Array = np.zeros(0)


Stepped: TypeAlias = tuple[int, int, int, tuple[str, ...], tuple[Array, ...], Mapping[str, Array]]
"""The answer to a step: the session's revision and position, the model's version (0: the server does not report it), the
names of the outputs and their arrays, and the requested states by name.

It is a bare tuple, since a named one costs four times as much and makes the garbage collector run more often.
"""


#: Steps with inputs up to this size share frames. Measured on two cores: 64 concurrent steps of 30 KiB each take half
#: as long in frames as in unary calls.
SHARED_BYTES = 64 * 1024
#: The inputs of a frame take at most this part of the message limit: outputs may be larger than inputs.
FRAME_SHARE = 4
_AT_S = operator.attrgetter("at_s")
_ID_TAG = bytes_tag(sessions_pb2.StepRequest.SESSION_ID_FIELD_NUMBER)
_REVISION_TAG = varint_tag(sessions_pb2.StepRequest.EXPECTED_REVISION_FIELD_NUMBER)
_REQUEST_ID = sessions_pb2.StepRequest.REQUEST_ID_FIELD_NUMBER
#: Approximate size of a member in a frame in bytes, without its inputs.
_MEMBER_BYTES = 64


@dataclasses.dataclass(slots=True, eq=False, repr=False)
class Step:
    """One step of one session, the same in every attempt. It never changes."""

    model: str
    session_id: str
    form: Change
    """The change, or all of it but the data."""
    rows: int
    expected: int
    """Revision that the session must have."""
    request_id: int
    deadline: Deadline
    data: bytes | None = None
    """Data of the only tensor of the change if `form` has none, because many steps share that; `SHARED_BYTES` at most."""
    trace: Pairs = ()
    """Metadata of its span."""
    to: Endpoint | None = None
    """The replica to ask; None: the client has one server."""
    is_alone: bool = False
    """Whether it must not share a frame."""

    @property
    def change(self) -> Change:
        """The change with its data."""
        return self.form if self.data is None else with_data(self.form, self.data)

    @property
    def sent(self) -> Change:
        """As in `PendingChange`: a step that asks for what its caller asks for is its own."""
        return self.change

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
        if self.data is not None:
            return not self.is_alone
        return not self.form.rows and not self.is_alone and self.input_bytes() <= SHARED_BYTES

    def input_bytes(self) -> int:
        """Size of its inputs, in bytes."""
        if self.data is not None:
            return len(self.data)
        size = 0
        for tensor in self.form.tensors:
            size += len(tensor.data)
        return size

    def kind(self) -> Hashable:
        """Properties that steps must have in common to share a frame."""
        _, tensors, outputs, _, mask, names, states, _ = self.form
        signature: tuple[Hashable, ...] = ()
        for name, dtype, shape, _ in tensors:
            signature += (name, dtype, shape[1:])
        reset = len(mask) // self.rows if mask else 0  # entries of the mask for each row
        return self.model, outputs, signature, reset, names, states


def with_data(form: Change, data: bytes | None) -> Change:
    """The change of which `form` is all but the data of its only tensor, or all of it if that is None."""
    if data is None:
        return form
    [tensor] = form.tensors
    return form._replace(tensors=(tensor._replace(data=data),))


def read(response: sessions_pb2.StepResponse) -> Stepped:
    """The result of a step that was a unary call."""
    outputs, states = unpack_all(response.outputs), response.states
    return (
        response.revision,
        response.position,
        response.model_version,
        tuple(outputs),
        tuple(outputs.values()),
        unpack_all(states) if states else _NO_STATES,
    )


def stepped_of(
    revision: int,
    position: int,
    outputs: Mapping[str, Array],
    states: Mapping[str, Array] = _NO_STATES,
    version: int = 0,
) -> Stepped:
    """An answer whose outputs are given by name."""
    return revision, position, version, tuple(outputs), tuple(outputs.values()), states


facts = operator.attrgetter(*[field.name for field in dataclasses.fields(Step)])
"""The arguments of a step's constructor."""


class Member(Step, abc.ABC):
    """One attempt of a step, for which its caller waits.

    It is the step itself, because the garbage collector would visit a second object, too.
    """

    __slots__ = ()

    @abc.abstractmethod
    def settle(self, stepped: Stepped) -> None:
        """The step was applied. Does nothing if it already has an answer, or its caller no longer waits."""

    @abc.abstractmethod
    def fail(self, error: BaseException) -> None:
        """The step failed. Does nothing if it already has an answer, or its caller no longer waits."""


M = TypeVar("M", bound=Member)


def in_frames(
    members: Sequence[M], max_bytes: int, max_members: Mapping[Hashable, int] | None = None
) -> Iterator[Sequence[M]]:
    """Yields members frame by frame.

    Args:
        members: Those that wait to be sent, in their order.
        max_bytes: Largest size of the inputs of a frame, unless it has a single member.
        max_members: Largest number of members of a frame, by the kind of their step; no limit for other kinds.
    """
    if len(members) == 1:
        yield members
        return
    for kind, own in _grouped(members):
        count = max_members.get(kind, len(own)) if max_members else len(own)
        if len(own) <= count and len(own) * (_largest(own) + _MEMBER_BYTES) <= max_bytes:
            yield own
            continue
        begin, size = 0, 0
        for i, member in enumerate(own):
            more = member.input_bytes() + _MEMBER_BYTES
            if i > begin and (size + more > max_bytes or i - begin >= count):
                yield own[begin:i]
                begin, size = i, 0
            size += more
        yield own[begin:]


def _grouped(members: Sequence[M]) -> Iterable[tuple[Hashable, Sequence[M]]]:
    """Members of the same kind and of similar time limits, because a frame has only one, with their kind.

    A frame may name a session only once: a second handle's step of the same session needs another frame.
    """
    if not members:
        return []
    count, kind = len(members), members[0].kind()
    models, forms = [member.model for member in members], [member.form for member in members]
    is_one_form = forms.count(forms[0]) == count and models.count(models[0]) == count
    kinds = [kind] * count if is_one_form else [member.kind() for member in members]
    if kinds.count(kind) == count == len({member.session_id for member in members}):
        deadlines = {member.deadline for member in members}
        first, last = earliest(deadlines), latest(deadlines)
        if last.at_s == first.at_s or last.remaining_s() < 2 * first.remaining_s():
            return [(kind, members)]
    groups: dict[tuple[Hashable, float, int], dict[str, M]] = {}
    for member, kind in zip(members, kinds, strict=True):
        limit, nth = _roughly(member.deadline.remaining_s()), 0
        while (group := groups.get((kind, limit, nth))) is not None and member.session_id in group:
            nth += 1
        if group is None:
            group = groups[kind, limit, nth] = {}
        group[member.session_id] = member
    return [(kind, list(group.values())) for (kind, _, _), group in groups.items()]


def _largest(members: Sequence[Member]) -> int:
    """Size of the inputs of the largest of some members of the same kind, in bytes."""
    first = members[0]
    return first.input_bytes() // first.rows * max([member.rows for member in members])


def earliest(deadlines: Iterable[Deadline]) -> Deadline:
    """The deadline that passes first."""
    return min(deadlines, key=_AT_S)


def latest(deadlines: Iterable[Deadline]) -> Deadline:
    """The deadline that passes last."""
    return max(deadlines, key=_AT_S)


def _roughly(remaining_s: float) -> float:
    """Equal for time limits that may share a frame, each less than twice the other. Callers keep their own limits."""
    return math.frexp(remaining_s)[1] if math.isfinite(remaining_s) else remaining_s


def framed(members: Sequence[Member]) -> Frame:
    """The frame of members of one kind."""
    rows = [member.rows for member in members]
    frame = Frame(
        _change_of(members, sum(rows)),
        [member.session_id for member in members],
        column(rows, np.intp),
        column([member.expected for member in members], np.uint64),
        column([member.request_id for member in members], np.uint64),
    )
    traces = [member.trace for member in members]
    if any(traces):  # a frame is of one trace: that of the first of its steps that has one
        frame.traceparent = next((parent for trace in traces if trace and (parent := sampled(trace))), "")
    return frame


def _change_of(members: Sequence[Member], rows: int) -> Change:
    """The change of a frame of members, which has this number of rows."""
    form = members[0].form
    if len(members) == 1:
        return members[0].change
    data = [member.data for member in members]
    if None not in data:  # steps of one kind: their forms differ only in the number of rows
        [tensor] = form.tensors
        joined = b"".join(cast("Sequence[bytes]", data))
        return form._replace(tensors=(tensor._replace(shape=(rows, *tensor.shape[1:]), data=joined),))
    changes = [member.change for member in members]
    reset = b"".join([each.reset for each in changes])
    return form._replace(tensors=_joined(changes, rows), reset=reset)


def _joined(changes: Sequence[Change], rows: int) -> tuple[Packed, ...]:
    joined = []
    for tensors in zip(*[change.tensors for change in changes], strict=True):
        first = tensors[0]
        data = b"".join([tensor.data for tensor in tensors])
        joined.append(first._replace(shape=(rows, *first.shape[1:]), data=data))
    return tuple(joined)


def answer(members: Sequence[Member], part: Part) -> None:
    """Gives the members of a frame their part of a reply.

    They get copies: if a caller keeps its outputs, those of the other members must not stay in memory.
    """
    outputs, states, version, start = part.outputs, part.states, part.model_version, 0
    columns = part.applied.tolist(), part.revisions.tolist(), part.positions.tolist()
    names = tuple(outputs)
    array = outputs[names[0]] if len(names) == 1 and not states else _NOTHING
    if len(array) == len(part.applied):  # one output, of one row each
        rows = array.reshape(len(array), 1, *array.shape[1:])
        for i, revision, position, row in zip(*columns, map(np.ndarray.copy, rows), strict=True):
            members[i].settle((revision, position, version, names, (row,), _NO_STATES))
    else:
        for i, revision, position in zip(*columns, strict=True):
            end = start + members[i].rows
            own = _rows_of(outputs, start, end)
            own_states = _rows_of(states, start, end) if states else _NO_STATES
            members[i].settle(stepped_of(revision, position, own, own_states, version))
            start = end
    for i, error in part.failures.items():
        members[i].fail(error)


def _rows_of(arrays: Mapping[str, Array], start: int, end: int) -> dict[str, Array]:
    own = {}
    for name, array in arrays.items():
        own[name] = array[start:end].copy()
    return own


def abandon(members: Sequence[Member], error: BaseException) -> None:
    """Fails every member that has no answer yet."""
    for member in members:
        # One exception object per caller: raising an exception changes it.
        member.fail(copy.copy(error) if isinstance(error, StepwellError) else error)
