"""Turns steps that a front hands over as columns into changes.

All steps that arrive together become one change, whoever sent them. If that is impossible, because a session is not in the
table or something is refused, they are submitted message by message, so that each gets the answer that it would get alone.
This is the same for every protocol. The differences are in a `Wire` and, per batch, a `Content`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, TypeVar

import numpy as np

from stepwell_server.core import namespaces
from stepwell_server.core.callers import Caller
from stepwell_server.core.slots import Rows
from stepwell_server.engine.api import StepBatch
from stepwell_server.engine.change import Change, Reply, too_late
from stepwell_server.engine.types import Array, Members, Tensors
from stepwell_server.errors import ServerError
from stepwell_server.rpc import tensors
from stepwell_server.rpc.boundary import internal
from stepwell_server.rpc.fronts.base import Ended, OutputColumn, Rest, StepColumns
from stepwell_server.rpc.status import code_of, to_proto, to_status
from stepwell_server.rpc.steps import messages
from stepwell_server.rpc.steps.refusals import Refusals

if TYPE_CHECKING:
    from stepwell_server.clock import Clock
    from stepwell_server.engine.engine import Engine
    from stepwell_server.rpc.boundary import RequestObserver
    from stepwell_server.rpc.tracing import CallTrace, Tracer

_T = TypeVar("_T")
_Message = tuple[int, int]
"""A message of a batch: its first session, and its number of sessions."""
_NOBODY: Members = np.zeros(0, np.intp)
_PIECE = 32
"""Number of messages to submit one by one in one iteration of the event loop."""


@dataclasses.dataclass(slots=True)
class Content:
    """The content of a batch of steps, as its protocol has read it."""

    inputs: Tensors
    output_names: Sequence[str] = ()
    replied: Callable[[Tensors], Tensors] | None = None
    """Converts the outputs of members for the reply; None: send them unchanged."""
    model: str = ""
    """See `Change.continued_model`."""
    versions: Collection[int] | None = None
    """See `Change.continued_versions`."""
    alone: Members | None = None
    """Members that the protocol has to serve one by one; None: none."""
    count: Callable[[Members | None, Reply | None], None] | None = None
    """Counts answered members for the protocol's statistics. Without a reply, they failed."""


@dataclasses.dataclass(frozen=True, slots=True)
class Wire:
    """How steps of a protocol are read and answered. On the event loop."""

    method: str
    """Name of its unary method."""
    stream_method: str
    """Name of its streaming method."""
    read: Callable[[StepColumns], Content]
    refusals: Callable[
        [StepColumns, Members | None, ServerError], Iterable[tuple[Members | None, ServerError, bytes]]
    ]
    """Returns an error in the protocol's words, with its bytes for streams and the members that get it."""
    serve_alone: Callable[[Batch, int], None] | None = None
    """Serves a member that the engine does not accept as a continuing step."""


STEPWELL = Wire(
    "Step",
    "StepStream",
    lambda columns: Content(tensors.to_columns(columns.inputs), columns.output_names),
    lambda _columns, members, error: [(members, error, to_proto(error).SerializeToString())],
)


class Batch:
    """Steps that arrived together: the remaining ones, and the replies. Lives on the event loop."""

    def __init__(self, columns: StepColumns, wire: Wire, clock: Clock, observer: RequestObserver) -> None:
        self.columns = columns
        self.wire = wire
        self.left: Members = np.arange(len(columns.session_ids))
        """Members that are not submitted yet."""
        self.traces: dict[int, CallTrace] = {}
        """Traces of messages, by their first members."""
        self._content = Content({})
        self._clock = clock
        self._observer = observer

    def read(self) -> None:
        """Read the tensors, and serve those members alone that must be."""
        self._content = self.wire.read(self.columns)
        if self._content.alone is not None:
            self.serve_alone(self._content.alone)

    def change(self, members: Members | None) -> Change:
        """Return the change of some members; None: of the whole batch."""
        columns, content = self.columns, self._content
        inputs, expected, request_ids = content.inputs, columns.expected, columns.request_ids
        if members is not None:
            rows = _rows_of(columns, members)
            inputs = {name: array[rows] for name, array in inputs.items()}
            expected = None if expected is None else expected[members]
            request_ids = None if request_ids is None else request_ids[members]
        return Change(
            _some(columns.session_ids, members),
            _Replies(self, members),
            inputs=inputs,
            expected=expected,
            request_ids=request_ids,
            batch_sizes=sizes_of(columns, members) if columns.has_sizes or content.model else None,
            select=messages.to_select(columns.select),
            output_names=content.output_names,
            continued_model=content.model,
            continued_versions=content.versions,
        )

    def serve_alone(self, members: Members) -> Sequence[int]:
        """Serve members one by one, together with all remaining members of the same sessions. Returns all of them."""
        assert self.wire.serve_alone is not None, "the engine refuses all other steps that it does not accept"
        ids = self.columns.session_ids
        named = {ids[member] for member in members.tolist()}
        alone = [member for member in self.left.tolist() if ids[member] in named]
        self.left = np.setdiff1d(self.left, alone)
        for member in alone:
            self.wire.serve_alone(self, member)
        return alone

    def applied(self, members: Members | None, reply: Reply) -> None:
        """Members were applied; None: the whole batch."""
        content = self._content
        self.answer(
            members, reply, reply.outputs if content.replied is None else content.replied(reply.outputs)
        )
        if content.count is not None:
            content.count(members, reply)

    def failed(self, members: Members | None, error: ServerError) -> None:
        """Members failed with the same error; None: the whole batch."""
        if self._content.count is not None:
            self._content.count(members, None)
        for some, known, message in self.wire.refusals(self.columns, members, error):
            self.refuse(some, known, message)

    def traces_of(self, members: Members | None) -> Mapping[int, CallTrace]:
        """Return the traces of some members, by their index among these; None: of all."""
        if members is None or not self.traces:
            return self.traces
        places = {member: place for place, member in enumerate(members.tolist())}
        return {places[first]: trace for first, trace in self.traces.items() if first in places}

    def _end_traces(self, members: Members | None, code: str, reason: str) -> None:
        """End the traces of messages whose first session is answered."""
        answered = list(self.traces) if members is None else self.traces.keys() & set(members.tolist())
        for first in answered:
            who = self.columns.whos[first] if len(self.columns.whos) > 1 else self.columns.whos[0]
            session = namespaces.own(self.columns.session_ids[first])
            facts = {"session.id": session, "tenant": who.tenant, "caller": who.name}
            self.traces.pop(first).end(code, reason, facts)

    def answer(self, members: Members | None, reply: Reply, outputs: Tensors) -> None:
        """Answer applied members with these outputs."""
        if self.traces:
            self._end_traces(members, "OK", "")
        ended = self.columns.replies.applied(
            members,
            reply.revisions,
            reply.positions,
            [_output_column(name, array) for name, array in outputs.items()],
            replayed=reply.replayed,
            model_version=reply.version,
        )
        self._ended(ended, "OK")

    def refuse(self, members: Members | None, error: ServerError, message: bytes) -> None:
        """End calls with the error's status, and answer streams with `message`."""
        if self.traces:
            self._end_traces(members, code_of(error).name, error.reason)
        count = len(self.columns.session_ids) if members is None else len(members)
        self._observer.refused(error.reason, count, error.model)
        self._ended(self.columns.replies.failed(members, to_status(error), message), code_of(error).name)

    def _ended(self, ended: Ended, code: str) -> None:
        now = self._clock.monotonic()
        if len(ended.calls):
            self._observer.requests_done(self.wire.method, code, now - ended.calls)
        if len(ended.messages):
            self._observer.messages_done(self.wire.stream_method, now - ended.messages)


class ColumnSteps(Refusals):
    """Submits steps that arrive as columns. Implements `base.Steps`."""

    def __init__(
        self,
        engine: Engine,
        clock: Clock,
        max_message_bytes: int,
        observer: RequestObserver,
        requests: Wire,
        tracer: Tracer | None = None,
    ) -> None:
        super().__init__(max_message_bytes, observer)
        self._engine = engine
        self._clock = clock
        self._tracer = tracer
        self.traces = tracer is not None
        self._room = messages.room_for_outputs(0, max_message_bytes)
        """Bytes of a reply without its members."""
        self._requests = requests
        """The wire of Triton's requests."""
        self.go, self.add_part, self.settle = engine.take_turns, engine.add_part, engine.settle

    def run(self, batch: StepBatch, columns: Callable[[], StepColumns]) -> bool:
        """See `base.Steps`."""
        if self._tracer is not None:
            return False

        def fail(error: ServerError) -> None:
            Batch(columns(), STEPWELL, self._clock, self._observer).failed(None, error)

        return self._engine.run_batch(batch, self._room - batch.size * messages.MEMBER_BYTES, fail)

    def take(self, columns: StepColumns) -> Rest | None:
        """See `base.Steps`."""
        wire = STEPWELL if columns.model is None else self._requests
        batch = Batch(columns, wire, self._clock, self._observer)
        if self._tracer is not None:
            firsts = np.cumsum(columns.counts) - columns.counts
            traced = self._tracer.of_messages(wire.method, len(firsts))
            untraced = columns.replies.untraced() if traced else ()
            batch.traces = {int(firsts[n]): trace for n, trace in traced.items() if n not in untraced}
        pieces = self._submit(batch)

        def run_rest() -> bool:
            try:
                return next(pieces, None) is not None
            except Exception as error:  # a bug: no caller may wait for ever, or get two answers
                if len(batch.left):
                    batch.failed(batch.left, internal(error, method=wire.method))
                return False

        return run_rest if run_rest() else None

    def _submit(self, batch: Batch) -> Iterator[bool]:
        """Submit all steps, with a pause after each piece of messages that are submitted one by one."""
        batch.read()
        self._end_late(batch)
        columns = batch.columns
        if len(columns.counts) > 1 and len(batch.left) and not _names_one_twice(columns):
            self._submit_together(batch)
        out: set[int] = set()
        is_one = len(columns.counts) == 1
        for number, (first, count) in enumerate(_messages_of(columns, batch.left), 1):
            if number % _PIECE == 0:
                yield True
            if first in out:
                continue
            members = batch.left if is_one else np.arange(first, first + count)
            change = self._change(batch, members)
            change.connection, change.caller = columns.callers[first], who_of(columns, first)
            change.deadline = float(columns.deadlines[first])
            try:
                if len(self._engine.submit(change)):
                    out.update(batch.serve_alone(members))
            except ServerError as error:
                change.replies.failed(np.arange(count), error)
            batch.left = _NOBODY if is_one else batch.left[batch.left >= first + count]

    def _end_late(self, batch: Batch) -> None:
        """End members whose deadline has passed, all together: one by one, a flood of them would delay others."""
        deadlines, now = batch.columns.deadlines, self._clock.monotonic()
        if (deadlines[0] if len(deadlines) == 1 else np.minimum.reduce(deadlines)) > now:
            return
        late = batch.left[deadlines[batch.left] <= now]
        if len(late):
            batch.left = np.setdiff1d(batch.left, late)
            batch.failed(late, too_late())

    def _submit_together(self, batch: Batch) -> None:
        """Submit all messages as one change, except those that must be submitted alone."""
        columns, members = batch.columns, batch.left
        is_whole = len(members) == len(columns.session_ids)
        change = self._change(batch, members)
        change.messages = _numbers_of_messages(columns)[members]
        change.connections = columns.callers if is_whole else _some(columns.callers, members)
        if len(columns.whos) == 1:
            (change.caller,) = columns.whos
        else:
            change.callers = columns.whos if is_whole else _some(columns.whos, members)
        change.deadlines = columns.deadlines if is_whole else columns.deadlines[members]
        change.deadline = float(np.minimum.reduce(change.deadlines))
        if change.batch_sizes is None:
            change.batch_sizes = sizes_of(columns, members)  # assigns the rows to the sessions
        try:
            left = self._engine.submit(change)
        except ServerError:
            return  # each message gets its own answer
        batch.left = members[left] if len(left) else _NOBODY

    def _change(self, batch: Batch, members: Members) -> Change:
        some = None if len(members) == len(batch.columns.session_ids) else members
        change = batch.change(some)
        if batch.traces:
            change.traces = batch.traces_of(some)
        messages.limit_reply(change, self._max_message_bytes)
        return change


def _some(values: Sequence[_T], members: Members | None) -> Sequence[_T]:
    return values if members is None else [values[member] for member in members.tolist()]


def _numbers_of_messages(columns: StepColumns) -> Members:
    """Return the number of each member's message."""
    count = len(columns.counts)
    if count == len(columns.session_ids):
        return np.arange(count)
    return np.repeat(np.arange(count), columns.counts)


def who_of(columns: StepColumns, member: int) -> Caller:
    """Return the caller of a member."""
    return columns.whos[member if len(columns.whos) > 1 else 0]


def sizes_of(columns: StepColumns, members: Members | None) -> Rows:
    """Return the number of rows of some members; None: of all."""
    sizes = columns.sizes if members is None else columns.sizes[members]
    return sizes.astype(np.intp)


def _rows_of(columns: StepColumns, members: Members) -> Members:
    """Return the indexes of the members' rows in the tensors."""
    sizes = columns.sizes.astype(np.intp)
    if len(members) == 1:
        start = int(sizes[: members[0]].sum())
        return np.arange(start, start + sizes[members[0]])
    mask = np.zeros(len(sizes), np.bool_)
    mask[members] = True
    return np.flatnonzero(np.repeat(mask, sizes))


def _messages_of(columns: StepColumns, members: Members) -> list[_Message]:
    """Return the messages that contain the members."""
    if not len(members):
        return []
    if len(columns.counts) == 1:
        return [(0, len(columns.session_ids))]
    ends = np.cumsum(columns.counts)
    places = np.unique(np.searchsorted(ends, members, side="right"))
    counts = columns.counts[places]
    firsts = ends[places] - counts
    return list(zip(firsts.tolist(), counts.tolist(), strict=True))


def _names_one_twice(columns: StepColumns) -> bool:
    """Whether a message may contain a session twice, which is refused."""
    ids = columns.session_ids
    return len(columns.counts) < len(ids) and len(set(ids)) < len(ids)


class _Replies:
    """Answers some members of a batch. Implements `Replies`."""

    __slots__ = ("_batch", "_index")

    def __init__(self, batch: Batch, index: Members | None) -> None:
        self._batch = batch
        self._index = index
        """Indexes of its members in the batch; None: the whole batch."""

    def applied(self, members: Members, reply: Reply) -> None:
        self._batch.applied(self._members(members), reply)

    def failed(self, members: Members, error: ServerError) -> None:
        self._batch.failed(self._members(members), error)

    def cancelled(self, members: Members) -> Members:
        gone = self._batch.columns.replies.gone()
        if not len(gone):
            return _NOBODY
        return members[np.isin(members if self._index is None else self._index[members], gone)]

    def _members(self, members: Members) -> Members | None:
        """Return the indexes of members in the batch; None: all."""
        if self._index is not None:
            return self._index[members]
        return None if len(members) == len(self._batch.columns.session_ids) else members


def _output_column(name: str, array: Array) -> OutputColumn:
    number, data = tensors.to_bytes(array)
    return OutputColumn(name, number, array.shape[1:], data)
