"""Checks changes and tensors against sessions and models.

A change is refused as a whole if its parts cannot be told apart (names, dtypes, shapes, lengths of lists). A row
that is not finite, or a wrong batch size, fails for its member only. Every error names the argument, the rule and
what came. Arrays are cast here to the program's dtypes.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable, Sequence, Sized
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from stepwell_server.core.exactly_once import ANY_REVISION
from stepwell_server.core.sessions import Handles, SessionTable, are_missing
from stepwell_server.core.slots import Rows
from stepwell_server.engine.api import Select
from stepwell_server.engine.change import Change
from stepwell_server.engine.state.model import Model
from stepwell_server.engine.types import U64, Array, Mask, Members, Tensors, is_float
from stepwell_server.engine.versions.registry import Models
from stepwell_server.errors import InvalidInput, MessageTooLarge, RevisionConflict, ServerError
from stepwell_server.program import Program, StateSpec, TensorSpec

MAX_MEMBERS = 65_536
#: Far above any session's batch size, and low enough that a change's sum cannot overflow.
MAX_BATCH_SIZE = 1 << 31
_ANY = np.uint64(ANY_REVISION)
_ONLY: Members = np.zeros(1, np.intp)
_ONLY.flags.writeable = False
_NO_MEMBERS: Members = np.zeros(0, np.intp)

Refusals = list[tuple[int, ServerError]]


class CheckedInputs(NamedTuple):
    """Inputs in the program's order and dtypes."""

    arrays: tuple[Array, ...]
    """Temporal inputs `(rows, T, ...)` if `steps > 1`, everything else `(rows, ...)`."""
    steps: int
    """T."""
    with_time: bool
    """Whether the caller gave a time axis; the reply then has one too."""


def check_inputs(program: Program, inputs: Tensors, rows: int, *, any_rows: bool = False) -> CheckedInputs:
    """Check and cast the inputs of `rows` rows. Whether they are finite is checked by `finite_rows`.

    Args:
        program: The program they are for.
        inputs: Tensors by name.
        rows: The required number of rows.
        any_rows: `rows` was derived from the inputs, and any other number is fine.

    Raises:
        InvalidInput: a name, dtype or shape does not fit.
    """
    by_name = _by_name("inputs", inputs, program.inputs)
    arrays: list[Array] = []
    times: list[int | None] = []
    for spec in program.inputs:
        array = _cast("input", spec.name, by_name[spec.name], spec.dtype)
        fits = array.shape == (rows, *spec.shape)
        if spec.temporal:
            times.append(None if fits else _time_steps(spec, array, rows, any_rows))
        elif not fits:
            raise _shape_error(spec.name, f"{(rows, *spec.shape)}", array)
        arrays.append(array)
    time = times[0] if times else None
    if len(times) > 1 and times.count(time) < len(times):
        raise _unlike_times(program, times)
    if time == 1:
        arrays = [
            array[:, 0] if spec.temporal else array
            for spec, array in zip(program.inputs, arrays, strict=True)
        ]
    return CheckedInputs(tuple(arrays), time or 1, time is not None)


def check_state(program: Program, state: Tensors, rows: int) -> tuple[Array, ...]:
    """Check and cast a whole state of `rows` rows, in the program's order.

    Raises:
        InvalidInput: a name, dtype or shape does not fit.
    """
    by_name = _by_name("state", state, program.state)
    return tuple(_check_state_tensor(spec, by_name[spec.name], rows) for spec in program.state)


def check_finite_state(program: Program, state: Tensors | None, rows: int) -> tuple[Array, ...] | None:
    """`check_state` for an optional state; refuses NaN and infinity."""
    if state is None:
        return None
    arrays = check_state(program, state, rows)
    require_finite("state", arrays, [spec.name for spec in program.state], state)
    return arrays


def finite_rows(arrays: Sequence[Array]) -> npt.NDArray[np.bool_] | None:
    """Which rows hold only finite numbers, `(rows,)`; None: all do."""
    bad: npt.NDArray[np.bool_] | None = None
    for array in arrays:
        if not is_float(array.dtype):
            continue
        finite = np.isfinite(array)
        if np.count_nonzero(finite) < finite.size:
            finite = finite.reshape(len(array), -1)
            bad = np.logical_or(~finite.all(axis=1), False if bad is None else bad)
    return None if bad is None else ~bad


def require_reply(program: Program, rows: int, steps: int, extra: int, limit: int) -> None:
    """Refuse a run without a session whose outputs, final state and `extra` bytes exceed `limit`.

    Raises:
        MessageTooLarge: they do.
    """
    size = output_bytes(program, rows, steps) + rows * program.state_row_bytes + extra
    if size > limit:
        raise _too_large("prediction", size, limit)


def require_finite(
    what: str, arrays: Sequence[Array], names: Sequence[str], given: Tensors | None = None
) -> None:
    """Refuse NaN and infinity anywhere in `arrays`, which were `given` before they were cast.

    Raises:
        InvalidInput: names the first invalid tensor and the first index in it.
    """
    for array, name in zip(arrays, names, strict=True):
        if is_float(array.dtype) and not np.isfinite(array).all():
            raise not_finite(what, name, array, _given(name, array, given))


def _given(name: str, cast: Array, given: Tensors | None) -> Array:
    """An array before the cast, in the cast array's shape, which lacks the time axis of a single step."""
    before = None if given is None else given.get(name, given.get(""))
    return cast if before is None else before.reshape(cast.shape)


def not_finite(what: str, name: str, array: Array, given: Array) -> InvalidInput:
    """The error for an array that holds NaN, infinity or a value too large for its dtype; `given`: before the cast."""
    where = tuple(int(i) for i in np.argwhere(~np.isfinite(array))[0])
    if np.isfinite(given[where]):
        return InvalidInput(
            f"{what} {name!r} must fit {array.dtype}; got {given[where]} at index {list(where)}"
        )
    return InvalidInput(
        f"{what} {name!r} must hold finite numbers within {array.dtype}'s range;"
        f" got {array[where]} at index {list(where)}"
    )


def require_lists(change: Change, handles: Handles) -> None:
    """Refuse a change whose lists do not match. A handle of -1: the session is not in the table.

    Raises:
        InvalidInput: too many sessions, a repeated session, or lists of different lengths.
    """
    ids = change.session_ids
    if len(ids) != 1:
        may_repeat = change.connections is not None
        require_sessions(ids, may_repeat=may_repeat or _are_distinct(handles))
    if change.expected is not None and len(change.expected) != len(ids):
        raise _wrong_length("expected_revisions", change.expected, ids)
    if change.request_ids is not None and len(change.request_ids) != len(ids):
        raise _wrong_length("request_ids", change.request_ids, ids)
    if change.batch_sizes is not None:
        if len(change.batch_sizes) != len(ids):
            raise _wrong_length("batch_sizes", change.batch_sizes, ids)
        _require_sizes(change.batch_sizes)


def _are_distinct(handles: Handles) -> bool:
    """Whether these are different sessions of the table. Comparing handles is faster than hashing ids."""
    if not len(handles):
        return False
    if handles[0] >= 0 and not np.count_nonzero(handles[1:] <= handles[:-1]):
        return True  # those of most groups ascend, which is the cheapest to see
    ordered = np.sort(handles)
    return not (np.count_nonzero(ordered < 0) or np.count_nonzero(ordered[1:] == ordered[:-1]))


def require_sessions(
    session_ids: Sequence[str], *, may_repeat: bool = False, limit: int = MAX_MEMBERS
) -> None:
    """Refuse a list of session ids that is empty, longer than `limit`, or has a repeated id.

    Raises:
        InvalidInput: it is.
    """
    if not 1 <= len(session_ids) <= limit:
        raise InvalidInput(f"session_ids must have 1 to {limit} entries; got {len(session_ids)}")
    if len(session_ids) > 1 and not may_repeat and len(set(session_ids)) != len(session_ids):
        raise InvalidInput(f"session_ids must name each session once; {_repeated(session_ids)!r} came twice")


class Validation:
    """Checks changes, and fills in facts about their sessions."""

    def __init__(self, table: SessionTable, models: Models) -> None:
        self._table = table
        self._models = models

    def mismatched(self, change: Change, handles: Handles) -> Members:
        """Members of several messages that cannot be taken with the others, or steps that do not continue.

        Their sessions have other rows than the message says, or do not continue as `continued_model` demands. All
        of them are in the table.
        """
        table, given_sizes = self._table, change.batch_sizes
        own = table.batch_size[handles]
        if not change.continued_model:
            if given_sizes is None:
                return _NO_MEMBERS
            differs = own != given_sizes
            change.has_own_sizes = not np.count_nonzero(differs)
            return _NO_MEMBERS if change.has_own_sizes else np.flatnonzero(differs)
        model = self._models.find(change.continued_model)
        indexes = [] if model is None else [each.index for each in model.among(change.continued_versions)]
        if len(handles) == 1:  # a comparison of arrays would cost as much
            handle = handles[0]
            fits_all = table.position[handle] > 0 and table.model[handle] in indexes
            return _NO_MEMBERS if fits_all and given_sizes is not None and given_sizes[0] == own[0] else _ONLY
        fits: Mask = table.position[handles] > 0
        models = table.model[handles]
        fits &= models == indexes[0] if len(indexes) == 1 else np.isin(models, indexes)
        fits &= own == given_sizes
        return _NO_MEMBERS if fits.all() else np.flatnonzero(~fits)

    def look(self, change: Change, handles: Handles) -> Members:
        """Set the columns that depend on a change's sessions. A handle of -1: the session does not exist.

        Returns:
            Members on other versions than the first existing one, or of other models if several messages were
            combined.
            They must be processed separately.

        Raises:
            InvalidInput: the sessions are of several models, or rows cannot be assigned to sessions.
        """
        table = self._table
        change.handles, change.births = handles, table.birth[handles]
        if len(handles) == 1:  # half of the numpy calls below would only show that it exists
            own = table.batch_size[handles].astype(np.intp)
            change.model = self._models.by_index[int(table.model[handles[0]])]
            change.sizes = own if change.batch_sizes is None else change.batch_sizes
            change.row_count, change.members = int(change.sizes[0]), _ONLY
            if change.rows is not None:
                _take_rows(change, change.rows)
            return _NO_MEMBERS
        all_there = not are_missing(handles)
        there: Mask | None = None if all_there else handles >= 0
        models = table.model[handles if there is None else handles[there]]
        is_other = models != models[0]
        are_others = np.count_nonzero(is_other)
        if are_others and change.messages is None:
            names = {self._models.by_index[index].name for index in np.unique(models).tolist()}
            if len(names) > 1:
                raise InvalidInput("session_ids must be sessions of one model; got sessions of several")
        change.sizes = self._sizes(change, handles, there)
        if are_others:
            others: Members = np.flatnonzero(is_other if there is None else there)
            return others if there is None else others[is_other]
        change.model = self._models.by_index[int(models[0])]
        change.row_count = int(np.add.reduce(change.sizes))
        change.members = np.arange(len(handles)) if there is None else np.flatnonzero(there)
        if change.rows is not None:
            raise InvalidInput(f"rows must come with a single session; got {change.size} sessions")
        return _NO_MEMBERS

    def check(self, change: Change) -> tuple[Refusals, bool]:
        """Check a change after `look`, and set its remaining columns. It answers no member.

        Returns:
            Refused members with the first reason for each, without those whose session does not exist. And whether
            one
            is refused because of its session's data in the table.

        Raises:
            ServerError: the change as a whole is refused.
        """
        if change.reset:
            _check_reset(change)
        else:
            _check_step(change)
        refused: dict[int, ServerError] = {}
        finite, members = _finite(change), change.members
        if finite is not None:
            for member in members[~finite[members]].tolist():
                refused[member] = _not_finite_member(change, member)
        not_finite_count = len(refused)
        if change.batch_sizes is not None and not change.has_own_sizes:
            own = self._table.batch_size[change.handles].astype(np.intp)
            if own.tobytes() != change.sizes.tobytes():
                for member in members[own[members] != change.sizes[members]].tolist():
                    refused.setdefault(member, _wrong_size(change, member, int(own[member])))
        if change.expected is not None and _largest(change.expected) == ANY_REVISION:
            for member in members[change.expected[members] == _ANY].tolist():
                revision = int(self._table.revision[change.handles[member]])
                conflict = RevisionConflict(change.session_ids[member], ANY_REVISION, revision)
                refused.setdefault(member, conflict)
        if refused:
            change.members = members[~np.isin(members, list(refused))]
        return list(refused.items()), len(refused) > not_finite_count

    def _sizes(self, change: Change, handles: Handles, there: Mask | None) -> Rows:
        given_sizes = change.batch_sizes
        if given_sizes is not None:
            return given_sizes  # a member with a wrong size is refused, but its rows are where it says
        own: Rows = self._table.batch_size[handles].astype(np.intp)
        if there is None:
            return own
        sizes = np.where(there, own, 0)
        sizes[~there] = _rows_of_missing(change, sizes, int(np.count_nonzero(~there)))
        return sizes


def _check_step(change: Change) -> None:
    if change.inputs is None:
        raise InvalidInput("inputs must be given; got none")
    program, rows = change.model.program, change.row_count
    checked = check_inputs(program, change.inputs, rows)
    change.arrays, change.steps, change.with_time = checked.arrays, checked.steps, checked.with_time
    if change.output_names:
        _require_outputs(program, change.output_names)
    has_tensors = change.select is not Select.NONE
    if has_tensors:
        change.reply_bytes += output_bytes(program, rows, change.steps if change.select is Select.ALL else 1)
    if change.states is not Select.NONE:
        has_tensors = True
        _choose_states(change)
        change.reply_bytes += change.state_bytes
    if has_tensors and change.reply_bytes > change.reply_limit:
        has_states = change.states is not Select.NONE
        raise _too_large("step", change.reply_bytes, change.reply_limit, has_states=has_states)
    if change.reset_rows is not None:
        change.reset_rows = check_reset(change.reset_rows, rows, change.steps)


def _choose_states(change: Change) -> None:
    """Determine the rows whose states are returned, and their bytes."""
    rows = change.row_count
    if change.state_members is not None:
        change.state_index = change.rows_of(require_state_members(change, change.state_members))
    elif change.state_rows is not None:
        change.state_index = _state_index(change, list(change.state_rows))
    count = rows if change.state_index is None else len(change.state_index)
    steps = change.steps if change.states is Select.ALL else 1
    change.state_bytes = count * steps * change.model.program.state_row_bytes


def require_state_members(change: Change, asked: Sequence[int]) -> Members:
    """The members whose states a change requests.

    Raises:
        InvalidInput: they do not exist, or are not ascending.
    """
    members = np.array(asked, np.int64)
    if (members[1:] <= members[:-1]).any() or not 0 <= members[0] <= members[-1] < change.size:
        raise InvalidInput(
            f"state_members must be ascending indexes of the {change.size} sessions; got {members.tolist()[:20]}"
        )
    return members.astype(np.intp)


def _state_index(change: Change, given: list[int]) -> Rows:
    if change.advancing is None:
        _require_rows("state_rows", given, change.row_count)
        return np.array(given, np.intp)
    known = change.advancing.tolist()
    _require_rows("state_rows", given, change.batch_size)
    outside = [row for row in given if row not in known]
    if outside:
        raise InvalidInput(f"state_rows must be among rows, {known[:20]}; got {outside[0]}")
    return np.array([known.index(row) for row in given], np.intp)


def check_reset(mask: Mask | None, rows: int, steps: int) -> Mask | None:
    """Rows to reset before the first time step, `(rows, 1)`, or before each of them, `(rows, steps)`; None: none.

    Args:
        mask: `(rows,)` or `(rows * steps,)`, a row's time steps one after the other.
        rows: Rows of the inputs.
        steps: T.

    Raises:
        InvalidInput: the mask has another length.
    """
    if mask is None:
        return None
    if mask.size not in {rows, rows * steps}:
        each = f" or one for each of {rows} rows and {steps} time steps" if steps > 1 else ""
        raise InvalidInput(f"reset_mask must be empty or one for each of {rows} rows{each}; got {mask.size}")
    return mask.reshape(rows, -1) if mask.any() else None


def _require_outputs(program: Program, names: Sequence[str]) -> None:
    known = [spec.name for spec in program.outputs]
    for name in names:
        if name not in known:
            raise InvalidInput(f"output_names must be among {known}; got {name!r}")
    if len(set(names)) != len(names):
        raise InvalidInput(f"output_names must name each output once; got {list(names)}")


def _check_reset(change: Change) -> None:
    rows, model = change.rows, change.model
    if change.state is not None:
        count = change.row_count if rows is None else len(rows)
        change.arrays = check_state(model.program, change.state, count)
        if change.size == 1:
            require_finite("state", change.arrays, [spec.name for spec in model.program.state], change.state)


def _wrong_size(change: Change, member: int, own: int) -> ServerError:
    return InvalidInput(
        f"batch_sizes must be the sessions' own; session {change.session_ids[member]!r} has {own},"
        f" got {change.sizes[member]}"
    )


def _finite(change: Change) -> Mask | None:
    """Which members hold only finite numbers, as a mask; None: all do."""
    rows = finite_rows(change.arrays) if change.arrays else None
    if rows is None:
        return None
    return np.logical_and.reduceat(rows, change.starts)


def _wrong_length(name: str, values: Sized, ids: Sized) -> InvalidInput:
    return InvalidInput(f"{name} must be empty or one for each of {len(ids)} sessions; got {len(values)}")


def _require_sizes(sizes: Rows) -> None:
    if not 1 <= np.minimum.reduce(sizes) <= np.maximum.reduce(sizes) <= MAX_BATCH_SIZE:
        wrong = sizes[(sizes < 1) | (sizes > MAX_BATCH_SIZE)]
        raise InvalidInput(f"batch_sizes must be 1 to {MAX_BATCH_SIZE}; got {wrong[0]}")


def _largest(numbers: U64) -> int:
    return int(numbers[0] if len(numbers) == 1 else numbers.max())


def _repeated(ids: Iterable[str]) -> str:
    seen: set[str] = set()
    for session_id in ids:
        if session_id in seen:
            return str(session_id)
        seen.add(session_id)
    raise AssertionError("only called with a repeated id")


def _rows_of_missing(change: Change, sizes: Rows, missing: int) -> int:
    """Rows of each session, including missing ones, whose rows are in the tensors too.

    Raises:
        InvalidInput: rows cannot be assigned to sessions.
    """
    left = _rows_given(change) - int(sizes.sum())
    if missing > 1 and left != missing:
        gone = [change.session_ids[int(member)] for member in np.flatnonzero(sizes == 0)]
        raise InvalidInput(
            "batch_sizes must be given for a frame with several missing sessions:"
            f" rows cannot be assigned to sessions without {gone[:3]}"
        )
    return max(1, left // missing)


def _rows_given(change: Change) -> int:
    tensors: Tensors = (change.state if change.reset else change.inputs) or {}
    return next((len(array) for array in tensors.values() if array.ndim), len(change.session_ids))


def _take_rows(change: Change, rows: Sequence[int]) -> None:
    """Restrict a change of one session to these rows; for a step they become the change's rows."""
    batch_size = change.row_count
    _require_rows("rows", rows, batch_size)
    if not change.reset and list(rows) != list(range(batch_size)):
        change.advancing, change.batch_size = np.array(rows, np.intp), batch_size
        change.sizes, change.row_count = np.array([len(rows)], np.intp), len(rows)


def _require_rows(name: str, given: Sequence[int], batch_size: int) -> None:
    outside = [row for row in given if not 0 <= row < batch_size]
    if outside:
        raise InvalidInput(f"{name} must be within 0 to {batch_size - 1}; got {outside[0]}")
    if len(set(given)) != len(given):
        raise InvalidInput(f"{name} must name each row once; got {list(given)[:20]}")


def _not_finite_member(change: Change, member: int) -> ServerError:
    low = int(change.starts[member])
    high = low + int(change.sizes[member])
    model: Model = change.model
    specs = model.program.state if change.reset else model.program.inputs
    names = [spec.name for spec in specs]
    for name, array in zip(names, change.arrays, strict=True):
        part = array[low:high]
        if is_float(part.dtype) and not np.isfinite(part).all():
            given = _given(name, array, change.state if change.reset else change.inputs)[low:high]
            return not_finite("state" if change.reset else "input", name, part, given)
    raise AssertionError("only called for members that are not finite")


def output_bytes(program: Program, rows: int, steps: int) -> int:
    """The bytes of a reply's outputs."""
    each_step, once = program.output_bytes
    return rows * (each_step * steps + once)


def _too_large(what: str, size: int, limit: int, *, has_states: bool = False) -> MessageTooLarge:
    return MessageTooLarge(
        f"the reply to the {what} must be at most {limit} bytes; it would be about {size}: "
        "ask for fewer time steps at once, or for outputs LAST or NONE"
        + (", or for the states of fewer rows, or LAST" if has_states else ""),
        limit_bytes=str(limit),
        reply_bytes=str(size),
    )


def _by_name(what: str, given: Tensors, specs: Sequence[TensorSpec | StateSpec]) -> Tensors:
    if len(specs) == 1 == len(given):
        array = given.get(specs[0].name, given.get(""))
        if array is not None:
            return {specs[0].name: array}
    elif len(given) == len(specs) and all(spec.name in given for spec in specs):
        return given
    names = [spec.name for spec in specs]
    missing = [name for name in names if name not in given]
    extra = [name for name in given if name not in names]
    raise InvalidInput(
        f"{what} must name each of {names} once; got {sorted(given)} (missing {missing}, unknown {extra})"
    )


def _cast(what: str, name: str, array: Array, dtype: str) -> Array:
    wanted = _dtype(dtype)
    if array.dtype == wanted:
        return array
    if not _may_cast(array.dtype, wanted):
        raise InvalidInput(f"{what} {name!r} must have a dtype that fits {wanted}; got {array.dtype}")
    if wanted.kind in "iub" and array.size:
        _require_range(what, name, array, wanted)
    with np.errstate(over="ignore"):  # becomes infinity, which is refused as such
        return array.astype(wanted)


@functools.cache
def _dtype(name: str) -> np.dtype[np.generic]:
    return np.dtype(name)


def _may_cast(given: np.dtype[np.generic], wanted: np.dtype[np.generic]) -> bool:
    if is_float(wanted):
        return is_float(given) or given.kind in "iu"
    if wanted.kind in "iu":
        return given.kind in "iu"
    return False


def _require_range(what: str, name: str, array: Array, wanted: np.dtype[np.generic]) -> None:
    limits = np.iinfo(wanted)  # type: ignore[type-var]
    low, high = int(array.min()), int(array.max())
    if low < limits.min or high > limits.max:
        value = low if low < limits.min else high
        raise InvalidInput(
            f"{what} {name!r} must hold values within {wanted}'s range,"
            f" {limits.min} to {limits.max}; got {value}"
        )


def _time_steps(spec: TensorSpec, array: Array, rows: int, any_rows: bool) -> int:
    if array.ndim == len(spec.shape) + 2 and array.shape[0] == rows and array.shape[2:] == spec.shape:
        if array.shape[1] == 0:
            raise InvalidInput(f"input {spec.name!r} must have at least one time step; got T = 0")
        return int(array.shape[1])
    features = "".join(f", {size}" for size in spec.shape)
    one = f"({rows}{features})" if spec.shape else f"({rows},)"
    # One row without its batch axis, of one time step or of several.
    bare = array.ndim and (array.shape == spec.shape or array.shape[1:] == spec.shape)
    bare = bare and (rows == 1 or any_rows)
    raise _shape_error(spec.name, f"{one} or ({rows}, T{features})", array, "x[None]" if bare else "")


def _shape_error(name: str, wanted: str, array: Array, instead: str = "") -> InvalidInput:
    hint = f": did you mean {instead}?" if instead else ""
    return InvalidInput(f"input {name!r} must have shape {wanted}; got {array.shape}{hint}")


def _unlike_times(program: Program, times: Sequence[int | None]) -> InvalidInput:
    names = [spec.name for spec in program.inputs if spec.temporal]
    listed = ", ".join(
        f"{name!r}: {'none' if time is None else time}" for name, time in zip(names, times, strict=True)
    )
    return InvalidInput(f"inputs must have the same number of time steps; got {listed}")


def _check_state_tensor(spec: StateSpec, given: Array, rows: int) -> Array:
    array = _cast("state", spec.name, given, spec.dtype)
    if array.shape != (rows, *spec.shape):
        raise InvalidInput(f"state {spec.name!r} must have shape {(rows, *spec.shape)}; got {array.shape}")
    return array
