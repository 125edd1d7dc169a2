"""Plain steps that a front hands over as columns, made into changes.

All that came at once is one change, whoever sent it. What cannot go together, because a session is not in the table
or something is refused, goes message by message, so that each gets the answer that it would get alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from stepwell_server.core.slots import Rows
from stepwell_server.engine.change import Change, MustPart
from stepwell_server.engine.types import U64, Array, Members, Tensors
from stepwell_server.errors import Overloaded, RequestTooLarge, ServerError
from stepwell_server.rpc import convert
from stepwell_server.rpc.boundary import internal
from stepwell_server.rpc.fronts.base import F64, OutputColumn, StepColumns
from stepwell_server.rpc.status import Status, code_of, to_proto, to_status
from stepwell_server.rpc.steps import messages

if TYPE_CHECKING:
    from stepwell_server.clock import Clock
    from stepwell_server.engine.engine import Engine
    from stepwell_server.rpc.boundary import RequestObserver

_Message = tuple[int, int]
"""Of a batch: its first session, and how many it has."""
_RETRY_AFTER_S = 0.2
_NOBODY: Members = np.zeros(0, np.intp)


class ColumnSteps:
    """Submits what comes as columns. `base.Steps`."""

    def __init__(
        self, engine: Engine, clock: Clock, max_message_bytes: int, observer: RequestObserver
    ) -> None:
        self._engine = engine
        self._clock = clock
        self._max_message_bytes = max_message_bytes
        self._observer = observer

    def hold(self) -> None:
        """See `base.Steps`."""
        self._engine.hold_turns()

    def go(self) -> None:
        """See `base.Steps`."""
        self._engine.take_turns()

    def take(self, columns: StepColumns) -> None:
        """See `base.Steps`."""
        try:
            self._submit(columns)
        except Exception as error:  # a defect: no caller may wait for ever
            known = internal(error, method="Step")
            columns.replies.failed(None, to_status(known), to_proto(known).SerializeToString())

    def _submit(self, columns: StepColumns) -> None:
        inputs = convert.to_columns(columns.inputs)
        if len(columns.counts) == 1:
            apart: Sequence[_Message] = [(0, len(columns.session_ids))]
        elif _names_one_twice(columns):
            apart = _messages(columns)
        else:
            apart = self._submit_together(columns, inputs)
        for first, count in apart:
            members = None if count == len(columns.session_ids) else np.arange(first, first + count)
            change = self._change(columns, inputs, members)
            change.caller, change.deadline = columns.callers[first], float(columns.deadlines[first])
            try:
                self._engine.submit(change)
            except ServerError as error:
                change.replies.failed(np.arange(count), error)

    def _submit_together(self, columns: StepColumns, inputs: Tensors) -> Sequence[_Message]:
        """Submit as one change what can be one; the messages that cannot."""
        members: Members | None = None
        apart: list[_Message] = []
        while members is None or len(members):
            change = self._change(columns, inputs, members)
            change.callers = _some(columns.callers, members)
            change.deadlines = columns.deadlines if members is None else columns.deadlines[members]
            change.deadline = float(np.minimum.reduce(change.deadlines))
            if change.batch_sizes is None:
                change.batch_sizes = _sizes(columns, members)  # whose rows are whose
            try:
                self._engine.submit(change)
                break
            except MustPart as part:
                if len(set(columns.session_ids)) < len(columns.session_ids):
                    return _messages(columns)  # the others must not overtake them
                out = part.members if members is None else members[part.members]
                apart += _messages_of(columns, out)
                members = _without(columns, apart)
            except ServerError:
                return _messages(columns)
        return sorted(apart)

    def too_large(self, size: int) -> Status:
        """See `base.Steps`."""
        error = RequestTooLarge(
            "the request must fit the size limits of both sides (max_message_bytes);"
            f" got a message larger than max: {size} vs. {self._max_message_bytes} bytes"
        )
        self._observer.refused(error.reason, 1)
        return to_status(error)

    def overloaded(self) -> Status:
        """See `base.Steps`."""
        return to_status(
            Overloaded(
                "requests and replies under way must fit into the server's memory; this call holds many of their bytes",
                retry_after_s=_RETRY_AFTER_S,
            )
        )

    def duplicate(self, frame_id: int) -> bytes:
        """See `base.Steps`."""
        error = messages.same_frame_id(frame_id)
        self._observer.refused(error.reason, 1)
        return messages.failed_part(frame_id, None, error, last=True)

    def _change(self, columns: StepColumns, inputs: Tensors, members: Members | None) -> Change:
        """The change of some members of a batch; None: of all."""
        expected, request_ids = columns.expected, columns.request_ids
        if members is not None:
            rows = _rows_of(columns, members)
            inputs = {name: array[rows] for name, array in inputs.items()}
            expected = None if expected is None else expected[members]
            request_ids = None if request_ids is None else request_ids[members]
        change = Change(
            _some(columns.session_ids, members),
            _Replies(columns, members, self._clock, self._observer),
            inputs=inputs,
            expected=expected,
            request_ids=request_ids,
            batch_sizes=_sizes(columns, members) if columns.says_sizes else None,
            select=convert.to_select(columns.select),
            output_names=columns.output_names,
        )
        messages.limit_reply(change, self._max_message_bytes)
        return change


def _some(values: list[str], members: Members | None) -> list[str]:
    return values if members is None else [values[member] for member in members.tolist()]


def _sizes(columns: StepColumns, members: Members | None) -> Rows:
    sizes = columns.sizes if members is None else columns.sizes[members]
    return sizes.astype(np.intp)


def _rows_of(columns: StepColumns, members: Members) -> Members:
    """Indexes of the members' rows in the tensors."""
    sizes = columns.sizes.astype(np.intp)
    if len(members) == 1:
        start = int(sizes[: members[0]].sum())
        return np.arange(start, start + sizes[members[0]])
    mask = np.zeros(len(sizes), np.bool_)
    mask[members] = True
    return np.flatnonzero(np.repeat(mask, sizes))


def _messages(columns: StepColumns) -> list[_Message]:
    ends = np.cumsum(columns.counts).tolist()
    return [(end - count, count) for end, count in zip(ends, columns.counts.tolist(), strict=True)]


def _messages_of(columns: StepColumns, members: Members) -> list[_Message]:
    """The messages that have some of the members."""
    messages = _messages(columns)
    firsts = [first for first, _ in messages]
    places = np.unique(np.searchsorted(firsts, members, side="right") - 1)
    return [messages[place] for place in places.tolist()]


def _without(columns: StepColumns, messages: Sequence[_Message]) -> Members:
    """The members of all other messages."""
    left = np.ones(len(columns.session_ids), np.bool_)
    for first, count in messages:
        left[first : first + count] = False
    return np.flatnonzero(left)


def _names_one_twice(columns: StepColumns) -> bool:
    """Whether one message may name a session twice, which is refused: it is not so if all differ."""
    ids = columns.session_ids
    return len(columns.counts) < len(ids) and len(set(ids)) < len(ids)


class _Replies:
    """Answers some members of a batch. `Replies`."""

    __slots__ = ("_clock", "_columns", "_index", "_observer")

    def __init__(
        self, columns: StepColumns, index: Members | None, clock: Clock, observer: RequestObserver
    ) -> None:
        self._columns = columns
        self._index = index
        """Of its members in the batch; None: they are all of it."""
        self._clock = clock
        self._observer = observer

    def applied(
        self, members: Members, revisions: U64, positions: U64, outputs: Tensors, *, replayed: bool
    ) -> None:
        """See `Replies`."""
        columns = [_output(name, array) for name, array in outputs.items()]
        began = self._columns.replies.applied(
            self._members(members), revisions, positions, columns, replayed=replayed
        )
        self._ended(began, "OK")

    def failed(self, members: Members, error: ServerError) -> None:
        """See `Replies`."""
        self._observer.refused(error.reason, len(members))
        body = to_proto(error).SerializeToString()
        began = self._columns.replies.failed(self._members(members), to_status(error), body)
        self._ended(began, code_of(error).name)

    def cancelled(self, members: Members) -> Members:
        """See `Replies`."""
        gone = self._columns.replies.gone()
        if not len(gone):
            return _NOBODY
        return members[np.isin(members if self._index is None else self._index[members], gone)]

    def _members(self, members: Members) -> Members | None:
        """As the front counts them; None: all."""
        if self._index is not None:
            return self._index[members]
        return None if len(members) == len(self._columns.session_ids) else members

    def _ended(self, began: F64, code: str) -> None:
        if len(began):
            self._observer.requests_done("Step", code, self._clock.monotonic() - began)


def _output(name: str, array: Array) -> OutputColumn:
    number, data = convert.to_bytes(array)
    return OutputColumn(name, number, array.shape[1:], data)
