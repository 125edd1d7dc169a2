"""Plain steps that a front hands over as columns, made into changes.

All that came at once is one change, whoever sent it. What cannot go together, because a session is not in the table
or something is refused, goes message by message, so that each gets the answer that it would get alone. So it is in
every protocol; what differs between them is a `Form`.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, TypeVar

import numpy as np

from stepwell_server.core import namespaces
from stepwell_server.core.callers import Caller
from stepwell_server.core.slots import Rows
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
"""Of a batch: its first session, and how many it has."""
_NOBODY: Members = np.zeros(0, np.intp)
_PIECE = 32
"""Messages that are submitted one by one in one turn of the event loop."""


class Form:
    """Plain steps in their protocol: here Stepwell's own, and each other one's is derived from it."""

    method, stream_method = "Step", "StepStream"
    """Of its unary calls, and of its streams."""

    def __init__(self, columns: StepColumns, clock: Clock, observer: RequestObserver) -> None:
        self.columns = columns
        self.members: Members = np.arange(len(columns.session_ids))
        """Those that are to be done."""
        self.left = self.members
        """Those of them that nobody has taken yet."""
        self.inputs: Tensors = {}
        self.traces: dict[int, CallTrace] = {}
        """Of messages that are traced, by their first members."""
        self._clock = clock
        self._observer = observer

    def prepare(self) -> None:
        """Read the tensors."""
        self.inputs = tensors.to_columns(self.columns.inputs)

    def change(self, members: Members | None) -> Change:
        """The change of some of the members; None: of the whole batch."""
        columns, inputs = self.columns, self.inputs
        expected, request_ids = columns.expected, columns.request_ids
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
            batch_sizes=sizes_of(columns, members) if columns.says_sizes else None,
            select=messages.to_select(columns.select),
            output_names=columns.output_names,
        )

    def decline(self, _members: Members) -> Members:
        """The engine does not take a message alone. Returns members that are done in another way, maybe others' too."""
        raise AssertionError("the engine refuses what it does not take, but steps that must continue")

    def applied(self, members: Members | None, reply: Reply) -> None:
        """Members were applied; None: all of the batch."""
        self._answer(members, reply, [_output(name, array) for name, array in reply.outputs.items()])

    def failed(self, members: Members | None, error: ServerError) -> None:
        """Members failed alike; None: all of the batch."""
        self._refuse(members, error, to_proto(error).SerializeToString())

    def traces_of(self, members: Members | None) -> Mapping[int, CallTrace]:
        """Those of some members, by their index among them; None: of all."""
        if members is None or not self.traces:
            return self.traces
        places = {member: place for place, member in enumerate(members.tolist())}
        return {places[first]: trace for first, trace in self.traces.items() if first in places}

    def _end_traces(self, members: Members | None, code: str, reason: str) -> None:
        """A message has its answer, as a trace shows it, when its first session has."""
        answered = list(self.traces) if members is None else self.traces.keys() & set(members.tolist())
        for first in answered:
            whose = self.columns.whos[first] if len(self.columns.whos) > 1 else self.columns.whos[0]
            session = namespaces.own(self.columns.session_ids[first])
            facts = {"session.id": session, "tenant": whose.tenant, "caller": whose.name}
            self.traces.pop(first).end(code, reason, facts)

    def _answer(self, members: Members | None, reply: Reply, outputs: Sequence[OutputColumn]) -> None:
        """Answer members that were applied, with these outputs."""
        if self.traces:
            self._end_traces(members, "OK", "")
        ended = self.columns.replies.applied(
            members,
            reply.revisions,
            reply.positions,
            outputs,
            replayed=reply.replayed,
            model_version=reply.version,
        )
        self._ended(ended, "OK")

    def _refuse(self, members: Members | None, error: ServerError, told: bytes) -> None:
        """Refuse calls by the error's status, and answer streams with `told`."""
        if self.traces:
            self._end_traces(members, code_of(error).name, error.reason)
        count = len(self.columns.session_ids) if members is None else len(members)
        self._observer.refused(error.reason, count, error.model)
        self._ended(self.columns.replies.failed(members, to_status(error), told), code_of(error).name)

    def _ended(self, ended: Ended, code: str) -> None:
        now = self._clock.monotonic()
        if len(ended.calls):
            self._observer.requests_done(self.method, code, now - ended.calls)
        if len(ended.messages):
            self._observer.messages_done(self.stream_method, now - ended.messages)


class ColumnSteps(Refusals):
    """Submits what comes as columns. `base.Steps`."""

    def __init__(
        self,
        engine: Engine,
        clock: Clock,
        max_message_bytes: int,
        observer: RequestObserver,
        form_of_requests: Callable[[StepColumns], Form],
        tracer: Tracer | None = None,
    ) -> None:
        super().__init__(max_message_bytes, observer)
        self._engine = engine
        self._clock = clock
        self._tracer = tracer
        self.traces = tracer is not None
        self._form_of_requests = form_of_requests
        """The form of Triton's requests."""
        self.go, self.add_part = engine.take_turns, engine.add_part

    def take(self, columns: StepColumns) -> Rest | None:
        """See `base.Steps`."""
        if columns.model is None:
            form = Form(columns, self._clock, self._observer)
        else:
            form = self._form_of_requests(columns)
        if self._tracer is not None:
            firsts = np.cumsum(columns.counts) - columns.counts
            traced = self._tracer.of_messages(form.method, len(firsts))
            untraced = columns.replies.untraced() if traced else ()
            form.traces = {int(firsts[n]): trace for n, trace in traced.items() if n not in untraced}
        pieces = self._submit(form)

        def go_on() -> bool:
            try:
                return next(pieces, None) is not None
            except Exception as error:  # a defect: no caller may wait for ever, or be answered twice
                left = np.intersect1d(form.left, form.members)
                if len(left):
                    form.failed(left, internal(error, method=form.method))
                return False

        return go_on if go_on() else None

    def _submit(self, form: Form) -> Iterator[bool]:
        """Submit all, with a pause after each piece of what must be submitted one by one."""
        form.prepare()
        form.left = form.members
        self._end_late(form)
        columns = form.columns
        if len(columns.counts) > 1 and len(form.left) and not _names_one_twice(columns):
            self._submit_together(form)
        out: set[int] = set()
        is_one = len(columns.counts) == 1
        for number, (first, count) in enumerate(_messages_of(columns, form.left), 1):
            if number % _PIECE == 0:
                yield True
            if first in out:
                continue
            members = form.left if is_one else np.arange(first, first + count)
            change = self._change(form, members)
            change.caller, change.who = columns.callers[first], who_of(columns, first)
            change.deadline = float(columns.deadlines[first])
            try:
                if len(self._engine.submit(change)):
                    out.update(form.decline(members).tolist())
            except ServerError as error:
                change.replies.failed(np.arange(count), error)
            form.left = _NOBODY if is_one else form.left[form.left >= first + count]

    def _end_late(self, form: Form) -> None:
        """End the members whose time is over, all at once: one by one a flood of them would hold up others."""
        deadlines, now = form.columns.deadlines, self._clock.monotonic()
        if np.minimum.reduce(deadlines) > now:
            return
        late = form.members[deadlines[form.members] <= now]
        if len(late):
            form.members = form.left = np.setdiff1d(form.members, late)
            form.failed(late, too_late())

    def _submit_together(self, form: Form) -> None:
        """Submit all messages as one change; those that must be submitted alone are left."""
        columns, members = form.columns, form.members
        is_whole = len(members) == len(columns.session_ids)
        change = self._change(form, members)
        change.messages = np.repeat(np.arange(len(columns.counts)), columns.counts)[members]
        change.callers = columns.callers if is_whole else _some(columns.callers, members)
        if len(columns.whos) == 1:
            (change.who,) = columns.whos
        else:
            change.whos = columns.whos if is_whole else _some(columns.whos, members)
        change.deadlines = columns.deadlines if is_whole else columns.deadlines[members]
        change.deadline = float(np.minimum.reduce(change.deadlines))
        if change.batch_sizes is None:
            change.batch_sizes = sizes_of(columns, members)  # whose rows are whose
        with contextlib.suppress(ServerError):  # each gets its own answer
            form.left = members[self._engine.submit(change)]

    def _change(self, form: Form, members: Members) -> Change:
        some = None if len(members) == len(form.columns.session_ids) else members
        change = form.change(some)
        if form.traces:
            change.traces = form.traces_of(some)
        messages.limit_reply(change, self._max_message_bytes)
        return change


def _some(values: Sequence[_T], members: Members | None) -> Sequence[_T]:
    return values if members is None else [values[member] for member in members.tolist()]


def who_of(columns: StepColumns, member: int) -> Caller:
    """Who asks for a member."""
    return columns.whos[member if len(columns.whos) > 1 else 0]


def sizes_of(columns: StepColumns, members: Members | None) -> Rows:
    """Rows of some members of a batch; None: of all."""
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


def _messages_of(columns: StepColumns, members: Members) -> list[_Message]:
    """The messages that have some of the members."""
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
    """Whether one message may name a session twice, which is refused: it is not so if all differ."""
    ids = columns.session_ids
    return len(columns.counts) < len(ids) and len(set(ids)) < len(ids)


class _Replies:
    """Answers some members of a batch. `Replies`."""

    __slots__ = ("_form", "_index")

    def __init__(self, form: Form, index: Members | None) -> None:
        self._form = form
        self._index = index
        """Of its members in the batch; None: they are all of it."""

    def applied(self, members: Members, reply: Reply) -> None:
        self._form.applied(self._members(members), reply)

    def failed(self, members: Members, error: ServerError) -> None:
        self._form.failed(self._members(members), error)

    def cancelled(self, members: Members) -> Members:
        gone = self._form.columns.replies.gone()
        if not len(gone):
            return _NOBODY
        return members[np.isin(members if self._index is None else self._index[members], gone)]

    def _members(self, members: Members) -> Members | None:
        """As the front counts them; None: all."""
        if self._index is not None:
            return self._index[members]
        return None if len(members) == len(self._form.columns.session_ids) else members


def _output(name: str, array: Array) -> OutputColumn:
    number, data = tensors.to_bytes(array)
    return OutputColumn(name, number, array.shape[1:], data)
