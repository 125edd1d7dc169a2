"""The reply to each session's last change, kept so that a retry gets the same bytes.

The outputs of the last time step are in the arena beside the state, and the state after it is the session's own.
Only outputs and states of several time steps, and outputs of some rows, are kept as separate arrays.
"""

from __future__ import annotations

import enum
import json
import math
import struct
from collections.abc import Hashable, Iterator, Mapping, Sequence
from typing import NamedTuple

import numpy as np

from stepwell_server.core.sessions import Handles, SessionTable
from stepwell_server.core.slots import Rows
from stepwell_server.engine.state.arena import Arena
from stepwell_server.engine.types import Array, Mask, Members, Tensors
from stepwell_server.program import Program, StateSpec, TensorSpec, dtype_of

#: The most bytes of one model's arrays in memory, if the store has them too.
MAX_ARRAY_BYTES = 256 << 20
#: Stands for an array that is not kept.
_EMPTY = struct.pack("<BI", 1, 0)
_EMPTY_BYTES = len(_EMPTY)
#: The size of the largest number of any dtype in the protocol.
_MAX_NUMBER_BYTES = 8
#: The first byte of a packed reply that describes its own tensors; no array has this many axes.
_FOREIGN = b"\xff"


class ReplyForm(enum.IntEnum):
    """How a reply's outputs are kept; the values of the session table's column `reply`."""

    EMPTY = 0
    """It has no outputs."""
    ROWS = 1
    """The arena's output rows."""
    ROWS_WITH_TIME = 2
    """The arena's output rows, temporal ones with a time axis of length 1."""
    ARRAYS = 3
    """Separate arrays."""


class ReplyArrays(NamedTuple):
    """The part of a reply that is kept as arrays."""

    outputs: Tensors
    """Empty unless the form is `ARRAYS`."""
    states: Tensors
    """The states after every time step, if they were requested; else empty."""
    are_foreign: bool = False
    """Whether they come from another version of the model, with other tensors."""

    @property
    def byte_count(self) -> int:
        """Bytes of the arrays."""
        return sum([array.nbytes for tensors in self[:2] for array in tensors.values()])

    def has_rows(self, count: int) -> bool:
        """Whether each array has this many rows."""
        return all(len(array) == count for tensors in self[:2] for array in tensors.values())

    @property
    def form(self) -> Hashable:
        """Replies of equal forms can be concatenated."""
        return tuple(
            [tuple([(name, a.shape[1:], a.dtype.str) for name, a in tensors.items()]) for tensors in self[:2]]
        )


class ReplyMemory:
    """The last reply of each of one model's sessions."""

    def __init__(self, program: Program, table: SessionTable, arena: Arena) -> None:
        self._program = program
        self._table = table
        self._arena = arena
        self.series: dict[int, ReplyArrays] = {}
        """Separate arrays by session, most recent last."""
        self._bytes = 0

    def remember(self, handles: Handles, arrays: Mapping[int, ReplyArrays]) -> None:
        """Keep replies with arrays, or replace earlier ones; otherwise the table's column is enough.

        The outputs of the last time step are in the arena already. `arrays` are by the session's place.
        """
        if self.series:
            for handle in handles.tolist():
                self.forget(handle)
        for place, own in arrays.items():
            self._put(int(handles[place]), own)

    def forget(self, handle: int) -> None:
        """The session has ended, or is only in the store."""
        gone = self.series.pop(handle, None)
        if gone is not None:
            self._bytes -= gone.byte_count

    def _put(self, handle: int, arrays: ReplyArrays) -> None:
        self.forget(handle)
        self.series[handle] = arrays
        self._bytes += arrays.byte_count

    @property
    def is_over_limit(self) -> bool:
        """Whether the arrays exceed their memory limit."""
        return self._bytes > MAX_ARRAY_BYTES

    def oldest(self) -> Iterator[int]:
        """Sessions whose arrays exceed the limit, oldest first."""
        excess = self._bytes - MAX_ARRAY_BYTES
        for handle, arrays in self.series.items():
            if excess <= 0:
                return
            excess -= arrays.byte_count
            yield handle

    def recall_many(self, handles: Handles) -> Iterator[tuple[Members, Tensors, Tensors]]:
        """Remembered outputs, and states after every time step, of sessions.

        Yields the places of sessions whose replies have one form, with their tensors one after the other.
        """
        kinds, own = self._table.reply[handles], self._have_arrays(handles)
        for kind in (ReplyForm.EMPTY, ReplyForm.ROWS, ReplyForm.ROWS_WITH_TIME):
            places = np.flatnonzero((kinds == kind) & ~own)
            if len(places):
                yield places, self._of_rows(kind, handles[places]), {}
        sizes = self._table.batch_size[handles]
        alike: dict[Hashable, list[int]] = {}
        for place in np.flatnonzero(own).tolist():
            arrays = self.series[int(handles[place])]
            # a reply with another number of rows is yielded alone: it must not shift the others' rows
            form = int(kinds[place]), arrays.form, -1 if arrays.has_rows(int(sizes[place])) else place
            alike.setdefault(form, []).append(place)
        for some in alike.values():
            found = [self.series[int(handle)] for handle in handles[some].tolist()]
            kind = ReplyForm(kinds[some[0]])
            outputs = _concatenated([arrays.outputs for arrays in found])
            if kind is not ReplyForm.ARRAYS:
                outputs = self._of_rows(kind, handles[some])
            yield np.array(some, np.intp), outputs, _concatenated([arrays.states for arrays in found])

    def _have_arrays(self, handles: Handles) -> Mask:
        if not self.series:
            return np.zeros(len(handles), np.bool_)
        return np.fromiter(map(self.series.__contains__, handles.tolist()), np.bool_, len(handles))

    def _of_rows(self, kept: ReplyForm, handles: Handles) -> Tensors:
        if kept is ReplyForm.EMPTY:
            return {}
        rows: Rows = self._table.rows_of(handles)
        return {
            spec.name: array[rows][:, None]
            if kept is ReplyForm.ROWS_WITH_TIME and spec.temporal
            else array[rows]
            for spec, array in zip(self._program.outputs, self._arena.outputs, strict=True)
        }

    def arrays(self, handles: Handles) -> dict[int, ReplyArrays]:
        """The arrays of sessions' replies, by place."""
        places = np.flatnonzero(self._have_arrays(handles)).tolist()
        return {place: self.series[int(handles[place])] for place in places}

    def pack(self, arrays: ReplyArrays) -> bytes:
        """Pack a reply's arrays: shape and data of each output and then of each state, in the program's order.

        Outputs that are not kept have the shape (0,). States that are not kept are left out: older servers wrote
        none, and servers that know none can still read the outputs.
        """
        if arrays.are_foreign:
            return pack_foreign(arrays)
        parts = [_packed(arrays.outputs.get(spec.name)) for spec in self._program.outputs]
        if arrays.states:
            parts += [_packed(arrays.states[spec.name]) for spec in self._program.state]
        return b"".join(parts)

    def packed_bytes(self, arrays: ReplyArrays) -> int:
        """The size of the packed arrays."""
        if arrays.are_foreign:
            return len(pack_foreign(arrays))
        specs: list[tuple[Tensors, TensorSpec | StateSpec]] = [
            (arrays.outputs, s) for s in self._program.outputs
        ]
        if arrays.states:
            specs += [(arrays.states, s) for s in self._program.state]
        found = [tensors.get(spec.name) for tensors, spec in specs]
        return sum(_EMPTY_BYTES if a is None else 1 + 4 * a.ndim + a.nbytes for a in found)

    def restore(self, handle: int, packed: bytes) -> None:
        """Keep a packed reply of a session."""
        self._put(handle, self.unpacked(packed))

    def unpacked(self, packed: bytes) -> ReplyArrays:
        """Unpack a reply.

        Raises:
            ValueError: the bytes are not a packed reply.
        """
        return unpack_reply(packed, self._program.outputs, self._program.state)


def unpack_reply(packed: bytes, outputs: Sequence[TensorSpec], states: Sequence[StateSpec]) -> ReplyArrays:
    """Unpack a reply of a session on a version with these tensors.

    Raises:
        ValueError: the bytes are not a packed reply.
    """
    try:
        if packed[:1] == _FOREIGN:
            return _unpack_foreign(packed)
        kept, at = _unpacked(packed, outputs, 0)
        after, at = _unpacked(packed, states, at) if at < len(packed) else ({}, at)
    except (struct.error, IndexError, KeyError, TypeError, OverflowError, RecursionError) as error:
        raise ValueError(f"a reply must be as it was packed: {error}") from error
    if at != len(packed):
        raise ValueError(f"a reply must have {at} bytes; it has {len(packed)}")
    return ReplyArrays(kept, after)


def check_reply(
    kind: int, batch_size: int, packed: bytes, outputs: Sequence[TensorSpec], states: Sequence[StateSpec]
) -> None:
    """Check a record's reply, since replies are concatenated and a record may be forged.

    Args:
        kind: How the outputs are kept, according to the record.
        batch_size: Of the session.
        packed: The record's packed arrays; empty: none.
        outputs: Output specs of the version whose rows the record has.
        states: State specs of that version.

    Raises:
        ValueError: no session of that version can have this reply.
    """
    if kind not in {each.value for each in ReplyForm}:
        raise ValueError(f"the kind of its reply must be 0 to {max(ReplyForm)}; got {kind}")
    if kind == ReplyForm.ARRAYS and not packed:
        raise ValueError("a reply of arrays must have some; it has none")
    if not packed:
        return
    arrays = unpack_reply(packed, outputs, states)
    for what, tensors, specs in (("output", arrays.outputs, outputs), ("state", arrays.states, states)):
        shapes = {spec.name: spec.shape for spec in specs}
        for name, array in tensors.items():
            # for a version with other tensors, nothing else can be checked here
            fits = arrays.are_foreign or shapes[name] in (array.shape[1:], array.shape[2:])
            if not (fits and array.ndim and 1 <= len(array) <= batch_size):
                raise ValueError(
                    f"{what} {name!r} of its reply must have 1 to {batch_size} rows of that version's shape;"
                    f" its shape is {list(array.shape)}"
                )


def pack_foreign(arrays: ReplyArrays) -> bytes:
    """`ReplyMemory.pack` with a description of the tensors, for a version with other ones."""
    described = [[[name, a.dtype.name, a.shape] for name, a in tensors.items()] for tensors in arrays[:2]]
    head = json.dumps(described).encode()
    parts = [a.tobytes() for tensors in arrays[:2] for a in tensors.values()]
    return b"".join([_FOREIGN, struct.pack("<I", len(head)), head, *parts])


def _unpack_foreign(packed: bytes) -> ReplyArrays:
    (size,) = struct.unpack_from("<I", packed, 1)
    at, found = 5 + size, list[dict[str, Array]]()
    for described in json.loads(packed[5:at]):
        tensors: dict[str, Array] = {}
        for name, dtype, shape in described:
            if not isinstance(name, str) or not all(type(size) is int and size >= 0 for size in shape):
                raise ValueError("tensors of a reply must have a name, and sizes of at least 0")
            kind = dtype_of(dtype) if isinstance(dtype, str) else None
            if kind is None or kind.name != dtype or kind.itemsize > _MAX_NUMBER_BYTES or kind.hasobject:
                raise ValueError(
                    f"the dtype of a tensor of a reply must be that of numbers; it is {dtype!r:.40}"
                )
            tensors[name] = np.frombuffer(packed, kind, math.prod(shape), at).reshape(shape)
            at += tensors[name].nbytes
        found.append(tensors)
    outputs, states = found
    if at != len(packed):
        raise ValueError(f"a reply must have {at} bytes; it has {len(packed)}")
    return ReplyArrays(outputs, states, are_foreign=True)


def named_states(specs: Sequence[StateSpec], arrays: Sequence[Array], with_time: bool) -> Tensors:
    """States by name; `with_time` adds a time axis of length 1."""
    return {
        spec.name: array[:, None] if with_time else array for spec, array in zip(specs, arrays, strict=True)
    }


def _concatenated(parts: Sequence[Tensors]) -> Tensors:
    return {name: np.concatenate([tensors[name] for tensors in parts]) for name in parts[0]}


def _packed(array: Array | None) -> bytes:
    if array is None:
        return _EMPTY
    return struct.pack(f"<B{array.ndim}I", array.ndim, *array.shape) + array.tobytes()


def _unpacked(
    packed: bytes, specs: Sequence[TensorSpec] | Sequence[StateSpec], at: int
) -> tuple[dict[str, Array], int]:
    """Arrays that begin at `at`, without those that are not kept; and the end."""
    found: dict[str, Array] = {}
    for spec in specs:
        shape = struct.unpack_from(f"<{packed[at]}I", packed, at + 1)
        at += 1 + 4 * len(shape)
        count = math.prod(shape)
        if count or len(shape) != 1:
            found[spec.name] = np.frombuffer(packed, spec.dtype, count, at).reshape(shape)
            at += count * found[spec.name].itemsize
    return found, at
