"""Plain steps that a front hands over as columns, made into changes.

All that came at once is one change, whoever sent it. What cannot go together, because a session is not in the table
or something is refused, goes message by message, so that each gets the answer that it would get alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from stepwell_server.engine.change import Change, MustPart
from stepwell_server.engine.types import U64, Array, Members, Tensors
from stepwell_server.errors import Overloaded, RequestTooLarge, ServerError
from stepwell_server.rpc import convert
from stepwell_server.rpc.boundary import internal
from stepwell_server.rpc.fronts.base import OutputColumn, StepColumns
from stepwell_server.rpc.status import Status, code_of, to_proto, to_status
from stepwell_server.rpc.steps import messages

if TYPE_CHECKING:
    from stepwell_server.clock import Clock
    from stepwell_server.engine.engine import Engine
    from stepwell_server.rpc.boundary import RequestObserver

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

    def take(self, columns: StepColumns) -> None:
        """See `base.Steps`."""
        try:
            self._submit(columns)
        except Exception as error:  # a defect: no caller may wait for ever
            known = internal(error, method="Step")
            columns.replies.failed(None, to_status(known), to_proto(known).SerializeToString())

    def _submit(self, columns: StepColumns) -> None:
        inputs = convert.to_columns(columns.inputs)
        if len(columns.entries) > 1 and not _names_one_twice(columns):
            change = self._change(columns, inputs, 0, len(columns.session_ids))
            change.callers, change.deadlines = columns.callers, columns.deadlines
            change.batch_sizes = columns.sizes.astype(np.intp)  # whose rows are whose
            try:
                self._engine.submit(change)
                return
            except (MustPart, ServerError):
                pass
        start = 0
        for first, count, _ in columns.entries:
            end = start + int(columns.sizes[first : first + count].sum())
            own = {name: array[start:end] for name, array in inputs.items()}
            start = end
            change = self._change(columns, own, first, count)
            change.caller, change.deadline = columns.callers[first], float(columns.deadlines[first])
            try:
                self._engine.submit(change)
            except ServerError as error:
                change.replies.failed(np.arange(count), error)

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

    def _change(self, columns: StepColumns, inputs: Tensors, first: int, count: int) -> Change:
        part = slice(first, first + count)
        is_whole = count == len(columns.session_ids)
        change = Change(
            columns.session_ids if is_whole else columns.session_ids[part],
            _Replies(columns, first, count, self._clock, self._observer),
            inputs=inputs,
            expected=None if columns.expected is None else columns.expected[part],
            request_ids=None if columns.request_ids is None else columns.request_ids[part],
            batch_sizes=columns.sizes[part].astype(np.intp) if columns.says_sizes else None,
            select=convert.to_select(columns.select),
            output_names=columns.output_names,
        )
        messages.limit_reply(change, self._max_message_bytes)
        return change


def _names_one_twice(columns: StepColumns) -> bool:
    """Whether one message may name a session twice, which is refused: it is not so if all differ."""
    ids = columns.session_ids
    return len(columns.entries) < len(ids) and len(set(ids)) < len(ids)


class _Replies:
    """Answers some neighbours of a batch. `Replies`."""

    __slots__ = ("_clock", "_columns", "_count", "_first", "_observer")

    def __init__(
        self, columns: StepColumns, first: int, count: int, clock: Clock, observer: RequestObserver
    ) -> None:
        self._columns = columns
        self._first = first
        self._count = count
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
        return members[np.isin(members, gone - self._first)] if len(gone) else _NOBODY

    def _members(self, members: Members) -> Members | None:
        """As the front counts them; None: all."""
        if len(members) == len(self._columns.session_ids):
            return None
        return members + self._first if self._first else members

    def _ended(self, began: Sequence[float], code: str) -> None:
        if began:
            self._observer.requests_done("Step", code, self._clock.monotonic() - np.array(began))


def _output(name: str, array: Array) -> OutputColumn:
    number, data = convert.to_bytes(array)
    return OutputColumn(name, number, array.shape[1:], data)
