"""A change: a request to step or reset n sessions of one model, as columns, and the receiver of the answers.

A step or reset is a `Change` whatever the caller and the protocol. A step of one session is a change with one
member. Members are identified by their index. The caller sets the first fields; the others are set when the change
is checked against the sessions and the model.
"""

from __future__ import annotations

import asyncio
import dataclasses
import functools
import sys
from collections.abc import Callable, Collection, Hashable, Iterator, Mapping, Sequence
from types import MappingProxyType
from typing import TYPE_CHECKING, Protocol

import numpy as np
import numpy.typing as npt
from typing_extensions import override

from stepwell_server.core.callers import ANYBODY, Caller
from stepwell_server.core.exactly_once import (
    ANY_REVISION,
    Kind,
    digest_of_one,
    digests,
    mask_numbers,
    row_numbers,
    seed_of,
)
from stepwell_server.core.scheduler import Source, source_of
from stepwell_server.core.sessions import Handles
from stepwell_server.core.slots import Rows
from stepwell_server.engine.api import ChangeResult, Made, Select, Trace
from stepwell_server.engine.types import U64, Array, Mask, Members, Tensors
from stepwell_server.errors import DeadlineExceeded, ServerError, Unavailable
from stepwell_server.logs import Log

if TYPE_CHECKING:
    from stepwell_server.engine.state.model import Model

_log = Log("engine.replies")
#: A session that is changed concurrently is looked up again at most this often for one change or call.
MAX_TRIES = 8
#: Up to this many members with the same error get one each; more of them share one.
MAX_ERRORS = 32
_seed_of = functools.lru_cache(4096)(seed_of)
_NO_MEMBERS: Members = np.zeros(0, np.intp)
_FIRST: Members = np.zeros(1, np.intp)
_FIRST.flags.writeable = False
_ANY: U64 = np.array([ANY_REVISION], np.uint64)
_NONE: U64 = np.zeros(1, np.uint64)
#: The states of a reply if none were requested.
NO_STATES: Tensors = MappingProxyType({})


@dataclasses.dataclass(slots=True)
class Reply:
    """The answer to members that were applied, one after the other."""

    revisions: U64
    """After the change, `(m,)`."""
    positions: U64
    """After the change, `(m,)`."""
    outputs: Tensors
    """The members' rows, one member after the other: `(rows, T, ...)` or `(rows, ...)`."""
    states: Tensors
    """States of the rows that were requested, in the same form; empty if none were."""
    replayed: bool = False
    """Whether the members were applied before, and this is the remembered reply."""
    version: int = 0
    """The model version that ran them; for remembered replies, the sessions' version now. Set by `Change.succeed`."""


class Replies(Protocol):
    """Receives the answers to a change. Each member gets exactly one. Called on the event loop."""

    def applied(self, members: Members, reply: Reply) -> None:
        """Members, ascending indexes `(m,)`, were applied, now or earlier."""

    def failed(self, members: Members, error: ServerError) -> None:
        """Members failed; nothing changed for them."""

    def cancelled(self, members: Members) -> Members:
        """Those of the members whose callers no longer wait. If they are still queued, they are dropped."""


@dataclasses.dataclass(slots=True, eq=False)
class Change:
    """The same change to each of some sessions of one model.

    Give either `inputs` (a step) or `reset=True` (with `state` None for the model's initial state). Changes are
    compared by identity (`eq=False`).
    """

    session_ids: Sequence[str]
    replies: Replies
    inputs: Tensors | None = None
    """`(R, T, features...)` or `(R, features...)`, where R is the sum of the sessions' batch sizes."""
    reset: bool = False
    state: Tensors | None = None
    """For a reset: `(R, ...)` each; with `rows`, `(len(rows), ...)`."""
    rows: Sequence[int] | None = None
    """Reset or step only these rows; the change must have one session. R of a step is then their number."""
    position: int = 0
    """For a reset of all rows: the sessions' position afterwards."""
    reset_rows: Mask | None = None
    """For a step: rows that are reset to the initial state as part of the same change.

    Before its first time step, `(R,)`; or before each time step, `(R * T,)`, a row's time steps one after the
    other. Once checked: `(R, 1)` or `(R, T)`.
    """
    expected: U64 | None = None
    """Expected revisions, one per session; None: applied at any revision."""
    request_ids: U64 | None = None
    """One per session; 0 or None: no request id."""
    batch_sizes: Rows | None = None
    """Rows of each session as the caller knows them; None: not checked."""
    select: Select = Select.ALL
    output_names: Sequence[str] = ()
    """Outputs to return; empty: all of them."""
    states: Select = Select.NONE
    """For a step: the states to return, after every time step or after the last."""
    state_rows: Sequence[int] | None = None
    """For a change of one session: its rows whose states are returned, in this order; None: all."""
    state_members: Sequence[int] | None = None
    """Members whose states are returned, ascending; None: all."""
    deadline: float = float("inf")
    """On the clock's monotonic time. Members still waiting then are dropped unapplied."""
    continued_model: str = ""
    """For a step: its sessions must be of this model, must have been stepped since they began or were last reset,
    and must have as many rows as `batch_sizes`. `Engine.submit` returns the members that do not meet this. Empty:
    any sessions."""
    continued_versions: Collection[int] | None = None
    """The versions of `continued_model` that they must be on; None: any."""
    traces: Mapping[int, Trace] | None = None
    """The traces of members whose calls are traced; a call of many members is traced at its first. None: none is."""
    connection: Hashable = None
    """The connection that sent it: the scheduler alternates between connections. None: this change only."""
    caller: Caller = ANYBODY
    """The caller that sent it, as far as the server checks callers."""

    reply_limit: int = sys.maxsize
    """The most bytes its caller accepts at once: a step with a larger reply is refused as a whole."""
    reply_bytes: int = 0
    """Bytes of the reply besides the outputs; those are added when the change is checked."""

    # set when it has been checked

    model: Model = dataclasses.field(init=False)
    handles: Handles = dataclasses.field(init=False)
    """The handle of each member's session; -1: it does not exist."""
    births: U64 = dataclasses.field(init=False)
    """The birth of each member's session: unlike a handle, it is never reused."""
    sizes: Rows = dataclasses.field(init=False)
    """Rows of each member."""
    has_own_sizes: bool = False
    """Whether `batch_sizes` were found to be the sessions' own."""
    row_count: int = 0
    """The sum of `sizes`."""
    arrays: tuple[Array, ...] = ()
    """Inputs of a step, or the state to reset to, in the program's order and dtypes; empty: the initial state."""
    steps: int = 1
    """The number of time steps, T."""
    with_time: bool = False
    """Whether the inputs have a time axis; the reply then has one too."""
    advancing: Rows | None = dataclasses.field(init=False, default=None)
    """For a step of some rows: those rows; `sizes` counts only them."""
    batch_size: int = dataclasses.field(init=False, default=0)
    """For a step of some rows: all rows of the session."""
    state_index: Rows | None = dataclasses.field(init=False, default=None)
    """Rows of the tensors whose states are returned; None: all."""
    state_bytes: int = dataclasses.field(init=False, default=0)
    """Bytes of the states that are returned."""
    members: Members = dataclasses.field(init=False)
    """Members that may start; the others already have their answer."""
    find_again: Callable[[Change, Members, Callable[[Change, Members], None]], None] | None = None
    """Looks up members whose sessions have left the table: continues with those found, and answers the others."""
    on_end: Callable[[], None] | None = None
    """Called when every member has its answer."""
    left: int = dataclasses.field(init=False)
    """Members without an answer."""
    digests: U64 | None = None
    """Digests of each member's content, if any has a request id: see `content`. None: not computed yet."""
    tries: npt.NDArray[np.uint8] | None = None
    """How often each member's session was looked up again; None: never."""

    # set where it is made of several

    messages: Members | None = None
    """The number of each member's message, if several messages were combined. None: there is one message.

    A message that cannot be taken with the others is left out as a whole: `Engine.submit` returns its members.
    """
    connections: Sequence[Hashable] | None = None
    """One per member, instead of `connection`. A session may then appear more than once; its members are applied in
    order."""
    callers: Sequence[Caller] | None = None
    """One per member, instead of `caller`; None: all have the same."""
    deadlines: npt.NDArray[np.float64] | None = None
    """One per member; `deadline` is the earliest."""

    def __post_init__(self) -> None:
        self.left = len(self.session_ids)

    @property
    def size(self) -> int:
        """The number of members."""
        return len(self.session_ids)

    @property
    def model_name(self) -> str:
        """The model's name; empty before the change is checked."""
        model: Model | None = getattr(self, "model", None)
        return "" if model is None else model.name

    @property
    def byte_count(self) -> int:
        """Bytes of its inputs or states, and of the states made for its reply."""
        total = self.state_bytes
        for array in self.arrays:
            total += array.nbytes
        return total

    @property
    def may_skip_members(self) -> bool:
        """Whether `Engine.submit` may return members that must be submitted in another way."""
        return self.messages is not None or bool(self.continued_model)

    def whole_messages(self, members: Members) -> Members:
        """These members and all others of the same messages, ascending."""
        if self.messages is None:
            return np.arange(self.size)
        return np.flatnonzero(np.isin(self.messages, self.messages[members]))

    def with_followers(self, members: Members) -> Members:
        """`whole_messages`, or all members if a session appears twice: none may overtake another."""
        is_distinct = len(set(self.session_ids)) == self.size
        return self.whole_messages(members) if is_distinct else np.arange(self.size)

    def count_try(self, members: Members) -> Mask:
        """Count another lookup of members' sessions. True for those that have reached `MAX_TRIES`."""
        if self.tries is None:
            self.tries = np.zeros(self.size, np.uint8)
        is_over = self.tries[members] >= MAX_TRIES
        self.tries[members[~is_over]] += 1
        return is_over

    @property
    def starts(self) -> Rows:
        """Where each member's rows begin in the tensors."""
        starts: Rows = np.cumsum(self.sizes) - self.sizes
        return starts

    def rows_of(self, members: Members) -> Rows:
        """Indexes of the members' rows in the tensors."""
        if len(members) == self.size:
            return np.arange(self.row_count, dtype=np.intp)
        if bool((self.sizes == 1).all()):
            return members
        starts = self.starts
        spans = [np.arange(starts[m], starts[m] + self.sizes[m]) for m in members]
        return np.concatenate(spans) if spans else np.zeros(0, np.intp)

    def requests_of(self, members: Members) -> U64:
        """Request ids of members; 0: none."""
        return np.zeros(len(members), np.uint64) if self.request_ids is None else self.request_ids[members]

    def digests_of(self, members: Members) -> U64:
        """Digests of members' content; 0 where there is no request id. See `core.exactly_once`.

        They cover the checked content. So they are the same if the change is sent again in another form: members
        combined or split, tensors as bytes or as values.
        """
        if self.request_ids is None:
            return np.zeros(len(members), np.uint64)
        if self.digests is None:
            self.digests = _digests_of_reset(self) if self.reset else _digests_of_step(self)
        return self.digests[members]

    def expected_of(self, members: Members) -> U64 | None:
        """Revisions that members expect; None if none expects any."""
        return None if self.expected is None else self.expected[members]

    @property
    def keeps_states(self) -> bool:
        """Whether states are returned that exist nowhere else once the step is applied."""
        return self.states is Select.ALL and self.steps > 1

    def count_from_reset(self, positions: U64, members: Members) -> None:
        """Advance the members' positions for a step that resets rows; `positions` is updated in place.

        A position restarts at 0 at each time step before which all rows of the session are reset.
        """
        assert self.reset_rows is not None, "else there is nothing to look for"
        steps = np.uint64(self.steps)
        if self.advancing is not None and len(self.advancing) < self.batch_size:
            positions += steps
            return
        restarts = np.logical_and.reduceat(self.reset_rows, self.starts, axis=0)[members]
        last = restarts.shape[1] - 1 - np.argmax(restarts[:, ::-1], axis=1)
        positions[:] = np.where(restarts.any(axis=1), steps - last.astype(np.uint64), positions + steps)

    def state_rows_among(self, members: Members) -> Rows | None:
        """Indexes, among the members' rows, of those whose states are returned; None: all."""
        if self.state_index is None or len(members) == self.size:
            return self.state_index
        wanted = np.zeros(self.row_count, np.bool_)
        wanted[self.state_index] = True
        return np.flatnonzero(wanted[self.rows_of(members)])

    def own_sizes(self, members: Members) -> Rows:
        """All rows of the members' sessions."""
        return self.sizes[members] if self.advancing is None else np.array([self.batch_size], np.intp)

    def alike(self, members: Members) -> Sequence[Members]:
        """The members in groups that may share an error, which names a session.

        Members of different callers share none.
        """
        return [members] if self.connections is None else [members[at : at + 1] for at in range(len(members))]

    @property
    def only_source(self) -> Source | None:
        """The source of all members; None: there are several, or it would take a look at each to know."""
        if self.connections is None:
            return source_of(self.caller, self.connection if self.connection is not None else self)
        first = self.connections[0]
        is_one = self.callers is None and self.connections.count(first) == len(self.connections)
        return source_of(self.caller, first) if is_one else None

    @property
    def has_one_step_of_each(self) -> bool:
        """Whether each member comes from a connection of its own."""
        return self.connections is not None and len(set(self.connections)) == len(self.connections)

    def by_source(self, members: Members) -> Iterator[tuple[Source, Members]]:
        """The members of each source, for a change without an `only_source`."""
        assert self.connections is not None, "it has several"
        sources: dict[tuple[Caller, Hashable], list[int]] = {}
        callers = [self.caller] * self.size if self.callers is None else self.callers
        for member in members.tolist():
            sources.setdefault((callers[member], self.connections[member]), []).append(member)
        for (caller, connection), own in sources.items():
            yield source_of(caller, connection), np.array(own, np.intp)

    def drop(self, members: Members, now: float) -> Sequence[tuple[Members, ServerError]]:
        """The members that should not continue, and why. See `job.Owner`."""
        found: list[tuple[Members, ServerError]] = []
        if now >= self.deadline:
            if self.deadlines is None:
                return [(members, too_late())]
            late = self.deadlines[members] <= now
            if late.any():
                found.append((members[late], too_late()))
                members = members[~late]
        gone = self.replies.cancelled(members)
        if len(gone):
            found.append((gone, cancelled()))
        return found

    def fail(self, members: Members, error: ServerError) -> None:
        """Report that members failed and nothing changed for them. See `job.Owner`."""
        self._count(len(members))
        error.model = self.model_name
        try:
            self.replies.failed(members, error)
        except Exception as raised:
            self._undelivered(raised)

    def succeed(self, members: Members, reply: Reply) -> None:
        """Report that members were applied, now or earlier."""
        self._count(len(members))
        reply.version = self.model.version
        if self.output_names:
            outputs = reply.outputs
            reply.outputs = {name: outputs[name] for name in self.output_names if name in outputs}
        try:
            self.replies.applied(members, reply)
        except Exception as raised:
            self._undelivered(raised)

    def _undelivered(self, raised: Exception) -> None:
        # only this caller is affected: the others' answers and the claims must still be handled
        _log.defect("an answer could not be delivered", raised, sessions=len(self.session_ids))

    def _count(self, answered: int) -> None:
        self.left -= answered
        if self.left == 0 and self.on_end is not None:
            self.on_end()


class Awaited(Replies):
    """Receives the answer to a change of one session for a waiting task. `Replies`."""

    def __init__(self) -> None:
        self._answer: asyncio.Future[ChangeResult | ServerError] = asyncio.get_running_loop().create_future()

    async def get(self) -> ChangeResult:
        """Wait for the answer. Cancelling the waiting task cancels the change.

        Raises:
            ServerError: the change failed; nothing changed.
        """
        answer = await self._answer
        if isinstance(answer, ServerError):
            raise answer
        return answer

    @override
    def applied(self, _members: Members, reply: Reply) -> None:
        if not self._answer.done():
            self._answer.set_result(
                ChangeResult(
                    int(reply.revisions[0]),
                    int(reply.positions[0]),
                    reply.outputs,
                    reply.replayed,
                    reply.states,
                    reply.version,
                )
            )

    @override
    def failed(self, _members: Members, error: ServerError) -> None:
        if not self._answer.done():
            self._answer.set_result(error)

    @override
    def cancelled(self, members: Members) -> Members:
        return members if self._answer.cancelled() else _NO_MEMBERS


class _JoinedReplies:
    """Passes the answers on to the single-session changes that were combined. `Replies`."""

    def __init__(self, parts: Sequence[Change]) -> None:
        self._parts = parts

    def applied(self, members: Members, reply: Reply) -> None:
        states = reply.states
        for at, member in enumerate(members.tolist()):
            here = slice(at, at + 1)
            own = {name: array[here] for name, array in reply.outputs.items()}
            after = {name: array[here] for name, array in states.items()} if states else states
            own_reply = Reply(reply.revisions[here], reply.positions[here], own, after, reply.replayed)
            self._parts[member].succeed(_FIRST, own_reply)

    def failed(self, members: Members, error: ServerError) -> None:
        for member in members.tolist():
            self._parts[member].fail(_FIRST, error)

    def cancelled(self, members: Members) -> Members:
        parts = self._parts
        gone = [member for member in members.tolist() if len(parts[member].replies.cancelled(_FIRST))]
        return np.array(gone, np.intp) if gone else _NO_MEMBERS


class SimpleOrigin:
    """Says how members of a change were made: one that resets, or that steps one row of each for one time step.

    `api.Origin`. The places are those of the members.
    """

    __slots__ = ("_change", "_members")

    def __init__(self, change: Change, members: Members) -> None:
        self._change = change
        self._members = members

    def made(self, place: int) -> Made:
        """How the member at this place was made."""
        change, row = self._change, int(self._members[place])
        if change.reset:
            return Made(0, change.rows or (), ())
        return Made(1, (), [array[row : row + 1] for array in change.arrays])


def may_join(change: Change) -> bool:
    """Whether a checked change may be combined with similar ones: a step of one row and one time step."""
    return (
        not change.reset
        and len(change.session_ids) == 1
        and change.steps == 1
        and change.sizes[0] == 1
        and change.advancing is None
        and change.state_rows is None
    )


def kind_of(change: Change) -> Hashable:
    """Changes with equal kinds can be combined into one."""
    names = tuple(change.output_names)
    return change.select, change.with_time, change.reset_rows is None, names, change.states


def joined(parts: Sequence[Change]) -> Change:
    """Combine changes of one kind, each of which `may_join`, into one change of many members, in their order."""
    if len(parts) == 1:
        return parts[0]
    first = parts[0]
    whole = Change(
        [part.session_ids[0] for part in parts],
        _JoinedReplies(parts),
        select=first.select,
        output_names=first.output_names,
        states=first.states,
        connections=[part if part.connection is None else part.connection for part in parts],
        caller=first.caller,
    )
    if any(part.caller is not first.caller for part in parts):
        whole.callers = [part.caller for part in parts]
    if any(part.traces for part in parts):
        whole.traces = {at: each for at, part in enumerate(parts) for each in (part.traces or {}).values()}
    whole.model, whole.find_again = first.model, first.find_again
    whole.handles = np.concatenate([part.handles for part in parts])
    whole.births = np.concatenate([part.births for part in parts])
    whole.sizes = np.ones(len(parts), np.intp)
    whole.row_count = len(parts)
    whole.arrays = tuple(np.concatenate(column) for column in zip(*(p.arrays for p in parts), strict=True))
    whole.with_time = first.with_time
    if any(part.expected is not None for part in parts):
        whole.expected = np.concatenate([_ANY if part.expected is None else part.expected for part in parts])
    if any(part.request_ids is not None for part in parts):
        requests = [_NONE if part.request_ids is None else part.request_ids for part in parts]
        whole.request_ids = np.concatenate(requests)
    if first.reset_rows is not None:
        whole.reset_rows = np.concatenate([p.reset_rows for p in parts if p.reset_rows is not None])
    whole.deadlines = np.array([part.deadline for part in parts])
    whole.deadline = float(whole.deadlines.min())
    whole.members = np.arange(len(parts), dtype=np.intp)
    return whole


def _digests_of_reset(change: Change) -> U64:
    prefix = change.model.digest_prefixes[Kind.RESET]
    rows, arrays = change.rows, change.arrays
    seed = _seed_of(None if rows is None else tuple(rows), change.position, bool(arrays))
    if not arrays:
        return digests(prefix, seed, np.zeros(change.size, np.uint64))
    count = change.row_count if rows is None else len(rows)
    sizes = change.sizes if rows is None else np.array([count], np.intp)
    return digests(prefix, seed, row_numbers(arrays, count), sizes)


def _digests_of_step(change: Change) -> U64:
    prefix, seed = change.model.digest_prefixes[Kind.STEP], _step_seed(change, change.states)
    if change.row_count == 1 and change.reset_rows is None and change.state_members is None:
        return np.array([digest_of_one(prefix, seed, change.arrays)], np.uint64)
    rows = row_numbers(change.arrays, change.row_count)
    if change.reset_rows is not None:
        rows += mask_numbers(change.reset_rows)
    if change.state_members is None:
        return digests(prefix, seed, rows, change.sizes)
    seeds = np.full(change.size, _step_seed(change, Select.NONE))
    seeds[np.array(change.state_members, np.intp)] = seed
    return digests(prefix, seeds, rows, change.sizes)


def _step_seed(change: Change, states: Select) -> np.uint64:
    names, advancing, state_rows = change.output_names, change.advancing, change.state_rows
    rows = None
    if advancing is not None and advancing.tolist() != list(range(change.batch_size)):
        rows = tuple(advancing.tolist())
    return _seed_of(
        change.select,
        change.with_time,
        change.steps,
        tuple(sorted(set(names))) if names else (),
        rows,
        states,
        None if state_rows is None or states is Select.NONE else tuple(state_rows),
    )


def seed_of_single(select: Select, with_time: bool) -> int:
    """The seed of the digests of single time steps of all rows, without states."""
    return int(_seed_of(select, with_time, 1, (), None, Select.NONE, None))


def shared_error(error: ServerError, count: int) -> ServerError:
    """An error shared by `count` members; it names the first of them."""
    if count > 1:
        error.message = f"{error.message} (and so for {count - 1} others of the session_ids)"
    return error


def changed_elsewhere(session_id: str) -> Unavailable:
    """The error for a call that found its session changed concurrently too often."""
    return Unavailable(
        f"session {session_id!r} was changed by other calls {MAX_TRIES} times while this one waited; it was not applied"
    )


def cancelled() -> ServerError:
    """The error for a request that its caller cancelled in time."""
    return Unavailable("the request was cancelled by its caller; it was not applied")


def too_late() -> ServerError:
    """The error for a request whose deadline passed while it waited."""
    return DeadlineExceeded("the request's deadline passed while it waited; it was not applied")
