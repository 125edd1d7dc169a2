"""The operations of a group of sessions, without I/O."""

from __future__ import annotations

import copy
import functools
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from stepwell._base.flow import Flow, Pause
from stepwell._batching.frames import RETRYABLE, Change, Counts, Gathered, Indexes
from stepwell._batching.step_arguments import check_outputs, check_states, selected, step_change
from stepwell._core.core import MAX_IDS, Core
from stepwell._core.group_tracker import GroupTracker, MemberTracker, Move, as_index
from stepwell._core.locks import Some
from stepwell._state import arguments
from stepwell._state.arguments import pack_inputs
from stepwell._state.infos import (
    Inputs,
    Mask,
    ModelInfo,
    Outputs,
    OutputSelection,
    Rows,
    StateSelection,
    TimeSelection,
)
from stepwell._state.state import State, States
from stepwell._state.tensors import Array, Packed, as_array, dtype_of, unpack_all
from stepwell._state.trace import Trace, last_states, traced
from stepwell._tape import frames as tape
from stepwell._tape.recording import record_step, wanted_states
from stepwell._tape.reel import Reel
from stepwell._transport.retry import Deadline
from stepwell._transport.status import from_message
from stepwell.errors import (
    InternalError,
    InvalidInputError,
    ModelMismatchError,
    ReplyTooLargeError,
    StepwellError,
)
from stepwell.v1 import sessions_pb2

_SHOWN = 5
"""Members that a message names."""
#: Size of a member in a reply without its state, and of a reply without its members, in bytes.
_MEMBER_BYTES, _REPLY_BYTES = 48, 4096


class Members:
    """Some members of a group: all of a view, or those of a call."""

    def __init__(self, tracker: GroupTracker, indexes: Indexes) -> None:
        self._tracker = tracker
        self.indexes = indexes
        """Their indexes in the whole group, in their order."""

    def __len__(self) -> int:
        return len(self.indexes)

    @functools.cached_property
    def where(self) -> Some:
        """Their indexes, as a slice if possible."""
        return as_index(self.indexes)

    @functools.cached_property
    def ids(self) -> tuple[str, ...]:
        """Their ids."""
        if self.indexes is self._tracker.everyone:
            return self._tracker.ids
        return tuple([self._tracker.ids[i] for i in self.indexes.tolist()])

    @property
    def rows(self) -> int:
        """Number of rows of all of them."""
        return len(self) * self._tracker.batch_size


class GroupCore:
    """The operations of one group, or of some members of it. Each change is one frame."""

    def __init__(self, core: Core, tracker: GroupTracker, indexes: Indexes | None = None) -> None:
        """A view of the members at `indexes`; None: of all."""
        self._core = core
        self.tracker = tracker
        self.members = Members(tracker, tracker.everyone if indexes is None else indexes)

    # Which members.

    def place(self, index: int | np.integer[Any]) -> int:
        """Converts an index of this view to one of the whole group.

        Raises:
            IndexError: The view has no such member.
        """
        if isinstance(index, bool):
            raise _no_members(index)
        try:
            return int(self.members.indexes[index])
        except IndexError:
            count = len(self.members)
            raise IndexError(
                f"index must be from {-count} to {count - 1} in a group of {count} sessions; got {index!r}"
            ) from None

    def some(self, members: Rows | slice | None, name: str = "members") -> Members:
        """The members of this view that an argument selects; None: all."""
        if members is None:
            return self.members
        if isinstance(members, slice):
            return Members(self.tracker, self.members.indexes[members])
        chosen = check_members(members, len(self.members), name)
        return Members(self.tracker, self.members.indexes[chosen])

    def some_or_rows(self, members: Rows | None, rows: Rows | None) -> Members:
        """As `some`, where `rows` is another name of the same argument."""
        if members is not None and rows is not None:
            raise InvalidInputError("members and rows must not both be given: they mean the same")
        return self.some(rows, "rows") if members is None else self.some(members)

    def view(self, members: Rows | slice) -> GroupCore:
        """A view of some of this view's members."""
        if members is None:
            raise InvalidInputError(
                "members must be an index, a slice, a list of indexes or booleans; got None"
            )
        return GroupCore(self._core, self.tracker, self.some(members).indexes)

    def member(self, place: int) -> MemberTracker:
        """One member, tracked with its group."""
        return MemberTracker(self.tracker, place)

    def _name_of(self, member: int) -> str:
        return f"session {self.tracker.ids[member]!r}, index {self._index_of(member)}"

    def _index_of(self, member: int) -> int:
        """Converts an index of the whole group to one of this view."""
        return self._indexes[member]

    @functools.cached_property
    def _indexes(self) -> dict[int, int]:
        return {member: i for i, member in enumerate(self.members.indexes.tolist())}

    # Changes.

    def step_change(
        self,
        some: Members,
        inputs: Inputs,
        outputs: OutputSelection,
        time: TimeSelection,
        reset: Mask | None,
        states: StateSelection,
    ) -> Change:
        """Checks the arguments of a step of some members."""
        if not len(some):
            selection, names = check_outputs(outputs, time)
            return Change("step", _empty(inputs), selection, (), b"", names, check_states(states))
        return step_change(
            inputs,
            some.rows,
            outputs=outputs,
            time=time,
            reset=_by_row(reset, len(some), self.tracker.batch_size),
            states=states,
            count="members x batch_size",
        )

    def step(
        self, some: Members, change: Change, deadline: Deadline, reels: Sequence[Reel] = ()
    ) -> Flow[Outputs | Trace]:
        """Advances some members. The result is what the caller receives. `reels` record it."""
        info: ModelInfo | None = None
        if (
            reels
            or not len(some)
            or change.states == "all"
            # The same call may have been sent by a tape that wanted all states.
            or (change.states == "last" and self.tracker.is_pending)
        ):  # the model says which arrays of the reply have a time axis
            info = yield from self._info(deadline)
        if info is not None and not len(some):
            return _nothing(info, change)
        before = self.tracker.positions[some.indexes]
        wanted = wanted_states(reels) if reels else "none"
        gathered = yield from self._apply(some, change, deadline, wanted)
        if reels and info is not None:
            states = traced(gathered.states, info)
            rows = self._rows_of(some)
            record_step(reels, change, info, self._counts(some, before), gathered.outputs, states, rows)
        outputs = selected(gathered.outputs, change)
        if change.states == "none":
            return outputs
        states = traced(gathered.states, info)
        if change.states == "last":
            states = last_states(states)
        return Trace(outputs, states, None, None)

    def reset_states(
        self, some: Members, states: States | None, deadline: Deadline, reels: Sequence[Reel] = ()
    ) -> Flow[None]:
        """Sets the whole state of some members. `reels` record it."""
        if not len(some):
            return
        tracker = self.tracker
        reference = tracker.reference_of(some.indexes)
        first = tracker.ids[int(some.indexes[0])]
        packed = yield from self._core.states(
            reference, tracker.fingerprint, states, some.rows, deadline, first
        )
        before = tracker.positions[some.indexes]
        yield from self._apply(some, Change("reset", packed), deadline)
        for reel in reels:
            reel.mark("set" if packed else "reset", self._rows_of(some), self._counts(some, before))

    def _counts(self, some: Members, before: Counts) -> tape.Members:
        """Counts of some members after a change, as a tape of this view takes them."""
        tracker, where = self.tracker, some.indexes
        counts = (tracker.revisions[where], before, tracker.positions[where], tracker.model_versions[where])
        return tape.Members(self._places(some), *counts)

    def _places(self, some: Members) -> Indexes:
        """Indexes of some members in this view."""
        if some is self.members:
            return np.arange(len(some))
        return np.array([self._index_of(member) for member in some.indexes.tolist()], np.intp)

    def _rows_of(self, some: Members) -> Indexes | None:
        """Rows of some members among those of this view; None: all, in their order."""
        if some is self.members:
            return None
        size = self.tracker.batch_size
        rows: Indexes = (self._places(some)[:, None] * size + np.arange(size)).reshape(-1)
        return rows

    def _apply(
        self, some: Members, change: Change, deadline: Deadline, states: str = "none"
    ) -> Flow[Gathered]:
        frame = self.tracker.begin(change, some.indexes, states)
        gathered = Gathered(len(frame), self.tracker.batch_size)
        yield from self._core.exchange(frame, deadline, gathered.add)
        yield from self._moved(self.tracker.settle(some.indexes, gathered))
        if len(gathered.kinds) > 1:
            raise self._unlike(some, gathered)
        if gathered.failures:
            outputs = selected(gathered.outputs, change) if gathered.outputs else None
            raise self._failed(some, gathered.failures, outputs)
        return gathered

    def _moved(self, moves: Sequence[Move]) -> Flow[None]:
        for move in moves:
            ids = [self.tracker.ids[member] for member in move.members.tolist()]
            yield from self._core.versions.moved(self.tracker.model, ids, move.previous, move.version)

    def _unlike(self, some: Members, gathered: Gathered) -> ModelMismatchError:
        """The error of a step whose outputs cannot form one array."""
        kinds = []
        for kind, parts in gathered.kinds.items():
            places = np.sort(np.concatenate(parts))
            members = [self._index_of(member) for member in some.indexes[places].tolist()]
            version = int(gathered.model_versions[places[0]])
            arrays = [
                f"{what} {name!r} {dtype} ({', '.join(['rows', *map(str, shape)])})"
                for what, name, dtype, shape in kind
            ]
            of = f"version {version}" if version else "another version"
            kinds.append(f"{of} has {', '.join(arrays) or 'none'} (members {_listed(members)})")
        count = int(gathered.applied.sum())
        error = ModelMismatchError(
            "the members' outputs must have the same names, dtypes and shapes to form one array: of model "
            f"{self.tracker.model!r} {'; '.join(kinds)}. The step was applied to "
            f"{'all of them' if count == len(some) else f'{count} of the {len(some)} members'}, and its outputs are "
            "not returned; step the members of each version by themselves: see model_versions"
        )
        error.failures = {
            self._index_of(int(some.indexes[place])): failed
            for place, failed in sorted(gathered.failures.items())
        }
        return error

    def _failed(self, some: Members, failed: dict[int, StepwellError], outputs: Outputs) -> StepwellError:
        """The error to raise if some members failed; `failed` has their indexes among `some`."""
        members = [int(some.indexes[place]) for place in sorted(failed)]
        errors = [failed[place] for place in sorted(failed)]
        # A copy: the message about all members must not change the first member's own error.
        error = copy.copy(errors[0])
        error.message = f"{len(failed)} of {len(some)} sessions failed, first: {error.message} ({self._name_of(members[0])})"
        error.args = (error.message,)
        error.failures = dict(zip(map(self._index_of, members), errors, strict=True))
        error.outputs = outputs
        return error

    # Reads.

    def _info(self, deadline: Deadline) -> Flow[ModelInfo]:
        return (
            yield from self._core.known_model(
                self.tracker.reference_of(self.members.indexes),
                deadline,
                fingerprint=self.tracker.fingerprint,
                session_id=self.tracker.ids[int(self.members.indexes[0])],
            )
        )

    def get_states(self, some: Members, deadline: Deadline) -> Flow[State]:
        """The states of some members, one after the other."""
        info = yield from self._info(deadline)
        read = _States(some, self.tracker.batch_size, info)
        room = self._core.max_message_bytes - _REPLY_BYTES
        at_once = room // (self.tracker.batch_size * info.state_row_bytes + _MEMBER_BYTES)
        yield from self._read(some, read, max(1, min(at_once, MAX_IDS)), deadline)
        if read.failures:
            raise self._failed(some, read.failures, read.tensors)
        return State(
            read.tensors,
            model=self.tracker.model,
            fingerprint=read.fingerprint or info.fingerprint,
            batch_size=some.rows,
            structure=read.structure or "",
        )

    def refresh(self, deadline: Deadline) -> Flow[None]:
        """Adopts the server's revisions and positions."""
        some = self.members
        read = _States(some, self.tracker.batch_size, None)
        yield from self._read(some, read, MAX_IDS, deadline)
        there = read.was_read
        yield from self._moved(
            self.tracker.refresh(
                some.indexes[there], read.revisions[there], read.positions[there], read.versions[there]
            )
        )
        if read.failures:
            raise self._failed(some, read.failures, None)

    def _read(self, some: Members, read: _States, at_once: int, deadline: Deadline) -> Flow[None]:
        """Reads members, at most `at_once` per request. Retries those for which the server has no capacity."""
        attempts = self._core.retrier.attempts("GetStates", deadline)
        left: Indexes = np.arange(len(some))
        while True:
            for own in self._core.by_replica([some.ids[place] for place in left.tolist()]):
                at_once = yield from self._read_once(some, left[own], read, at_once, deadline)
            if not read.waiting:
                return
            left = np.array(sorted(read.waiting), np.intp)
            longest = max(read.waiting.values(), key=lambda each: getattr(each, "retry_after_s", 0.0))
            read.waiting.clear()
            try:
                yield Pause(attempts.failed(longest), attempts.made, longest)
                attempts.require_time()
            except StepwellError as final:
                read.failures.update({place: copy.copy(final) for place in left.tolist()})
                return

    def _read_once(
        self, some: Members, places: Indexes, read: _States, at_once: int, deadline: Deadline
    ) -> Flow[int]:
        """Reads the members at these places once each. Returns how many at once the server accepts."""
        start = 0
        while start < len(places):
            part = places[start : start + at_once]
            request = sessions_pb2.GetStatesRequest(
                session_ids=[some.ids[place] for place in part.tolist()], without_state=not read.has_state
            )
            try:
                reply = yield from self._core.retrier.call("GetStates", request, deadline)
            except InvalidInputError as error:
                # The server's limit is below this client's.
                is_too_large = isinstance(error, ReplyTooLargeError) or error.reason == "MESSAGE_TOO_LARGE"
                if not is_too_large or len(part) == 1:
                    raise
                at_once = (len(part) + 1) // 2
                continue
            read.add(part, reply)
            start += len(part)
        return at_once

    def fork(
        self, session_ids: Sequence[str] | None, max_idle_s: float | None, deadline: Deadline
    ) -> Flow[GroupTracker]:
        """Opens sessions with the states of the members."""
        return (
            yield from self._core.fork_sessions(
                self.members.ids,
                session_ids,
                deadline,
                is_pinned=self.tracker.is_pinned,
                max_idle_s=max_idle_s,
            )
        )

    def close(self, deadline: Deadline) -> Flow[None]:
        """Deletes all members. Skips those that no longer exist, and sessions that have their ids now."""
        ids, uids = self.members.ids, self.tracker.uids[self.members.indexes]
        yield from self._core.close_sessions(ids, deadline, uids)


class _States:
    """States of members, assembled from the replies."""

    def __init__(self, some: Members, rows: int, info: ModelInfo | None) -> None:
        """`rows`: rows per member; `info`: None to read only revisions and positions."""
        count = len(some)
        self._rows = rows
        self.has_state = info is not None
        self.tensors: dict[str, Array] = {}
        for spec in info.state if info is not None else ():
            self.tensors[spec.name] = np.zeros((count * rows, *spec.shape), dtype_of(spec.dtype))
        self.fingerprint = ""
        self.structure: str | None = None
        self.revisions: Counts = np.zeros(count, np.uint64)
        self.positions: Counts = np.zeros(count, np.uint64)
        self.versions: Counts = np.zeros(count, np.uint64)
        self.was_read = np.zeros(count, np.bool_)
        self.failures: dict[int, StepwellError] = {}
        self.waiting: dict[int, StepwellError] = {}
        """Members that another attempt may read."""

    def add(self, places: Indexes, reply: sessions_pb2.GetStatesResponse) -> None:
        """Adds the answer for the members at these places."""
        members = np.fromiter(reply.members, np.intp, len(reply.members))
        read = places if reply.all_members else places[members]
        if not len(read) == len(reply.batch_sizes) == len(reply.revisions) == len(reply.positions):
            raise InternalError("the server sent states of other sessions than requested")
        sizes = np.fromiter(reply.batch_sizes, np.intp, len(read))
        fits = sizes == self._rows
        for place, size in zip(read[~fits].tolist(), sizes[~fits].tolist(), strict=True):
            self.failures[place] = InvalidInputError(
                f"a session of the group must have its batch_size, {self._rows}; another one with {size} was "
                "opened with this id"
            )
        self.fingerprint = self.fingerprint or reply.model_fingerprint
        if len(read):
            is_first = self.structure in (None, reply.model_structure)
            self.structure = reply.model_structure if is_first else ""  # of several versions
        self.revisions[read] = np.fromiter(reply.revisions, np.uint64, len(read))
        self.positions[read] = np.fromiter(reply.positions, np.uint64, len(read))
        self.versions[read] = reply.model_version
        self.was_read[read] = fits
        where, rows = as_index(read[fits]), np.repeat(fits, sizes)
        for name, array in unpack_all(reply.state).items():
            whole = self.tensors.get(name)
            if whole is None or whole.shape[1:] != array.shape[1:]:
                raise InternalError(f"the server sent state {name!r}, which is not one that it described")
            own = array if fits.all() else array[rows]
            shape = (-1, self._rows, *whole.shape[1:])
            whole.reshape(shape)[where] = own.reshape(shape)
        for entry in reply.errors:
            error = from_message(entry.error)
            into = self.waiting if isinstance(error, RETRYABLE) else self.failures
            # One exception object per member: raising an exception changes it.
            into.update({int(places[member]): copy.copy(error) for member in entry.members})


def check_members(members: Rows, count: int, name: str) -> Indexes:
    """Returns the indexes of some of `count` members, given as indexes without repetition or as booleans, one each."""
    if isinstance(members, np.ndarray) and members.ndim == 1:
        array: npt.NDArray[np.generic] = members
        if array.dtype == np.bool_ and len(array) == count:
            return np.flatnonzero(array)
        if np.issubdtype(array.dtype, np.integer) and len(array):
            indexes: Indexes = array.astype(np.intp)
            seen = np.zeros(count, np.bool_)
            if indexes.min() >= 0 and indexes.max() < count:
                seen[indexes] = True
                if np.count_nonzero(seen) == len(indexes):
                    return indexes
    return np.array(arguments.check_rows(members, count, name) or (), np.intp)  # this says what is wrong


def _listed(members: Sequence[int]) -> str:
    shown = ", ".join(map(str, members[:_SHOWN]))
    return shown if len(members) <= _SHOWN else f"{shown} and {len(members) - _SHOWN} more"


def _no_members(index: object) -> InvalidInputError:
    return InvalidInputError(
        f"members must be an index, a slice, or a list of indexes or booleans; got {index!r}"
    )


def _empty(inputs: Inputs) -> tuple[Packed, ...]:
    """The inputs of a step of no members, of which only the shapes matter."""
    by_name = inputs if isinstance(inputs, Mapping) else {"": inputs}
    if not by_name:
        return pack_inputs(inputs)  # this says what is wrong
    packed = []
    for name, value in by_name.items():
        what = f"input {name!r}" if name else "the input"
        shape = as_array(what, value).shape
        if shape[:1] != (0,):
            raise InvalidInputError(
                f"{what} must have 0 rows because members selects none; got shape {shape}"
            )
        packed.append(Packed(name, 0, shape, b""))
    return tuple(packed)


def _by_row(reset: Mask | None, members: int, rows: int) -> Mask | None:
    """Expands a mask of members to a mask of rows; a mask of rows stays unchanged."""
    if reset is None or rows == 1:
        return reset
    try:
        mask = np.asarray(reset)
    except (TypeError, ValueError):
        return reset  # `step_change` says what is wrong
    return np.repeat(mask, rows, axis=0) if mask.ndim and len(mask) == members else mask


def _nothing(info: ModelInfo, change: Change) -> Outputs | Trace:
    """The result of a step of no members: arrays without rows."""
    temporal = {spec.name: len(spec.shape) for spec in info.inputs if spec.temporal}
    first = next((t for t in change.tensors if t.name in temporal), change.tensors[0])
    rank = temporal.get(first.name, next(iter(temporal.values()), 0))
    times = first.shape[1:2] if len(first.shape) == rank + 2 else ()
    arrays = {
        spec.name: np.zeros(
            (0, *(times if spec.temporal and change.outputs == "all" else ()), *spec.shape),
            dtype_of(spec.dtype),
        )
        for spec in info.outputs
        if not change.output_names or spec.name in change.output_names
    }
    outputs = selected(arrays, change)
    if change.states == "none":
        return outputs
    kept = times if change.states == "all" else ()
    states = {spec.name: np.zeros((0, *kept, *spec.shape), dtype_of(spec.dtype)) for spec in info.state}
    return Trace(outputs, traced(states, info), None, None)
