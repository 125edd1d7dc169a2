"""Whether a change fits the sessions and the model that it names; which members are refused at once.

A change is refused as a whole where nothing of it could be told apart (names, dtypes, shapes, lengths of lists);
a row that is not finite or a wrong batch size fails for its member alone.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence, Sized

import numpy as np

from stepwell_server.core.exactly_once import ANY_REVISION
from stepwell_server.core.sessions import Handles, SessionTable
from stepwell_server.core.slots import Rows
from stepwell_server.engine.change import Change
from stepwell_server.engine.checks import (
    check_inputs,
    check_state,
    finite_rows,
    is_float,
    not_finite,
    require_finite,
)
from stepwell_server.engine.models import Models
from stepwell_server.engine.state.model import Model
from stepwell_server.engine.types import U64, Mask, Members, Tensors
from stepwell_server.errors import InvalidInput, RevisionConflict, ServerError

MAX_MEMBERS = 65_536
#: Far above every session's, and low enough that the sum of a change's cannot wrap.
MAX_BATCH_SIZE = 1 << 31
_ANY = np.uint64(ANY_REVISION)
_ONLY: Members = np.zeros(1, np.intp)
_ONLY.flags.writeable = False

Refusals = list[tuple[int, ServerError]]


def require_lists(change: Change) -> None:
    """Refuse a change whose lists do not fit each other, before its sessions are looked for.

    Raises:
        InvalidInput: it names too many sessions, one of them twice, or numbers for others.
    """
    ids = change.session_ids
    if not 1 <= len(ids) <= MAX_MEMBERS:
        raise InvalidInput(f"session_ids must be 1 to {MAX_MEMBERS}; got {len(ids)}")
    if len(ids) > 1 and len(set(ids)) != len(ids):
        raise InvalidInput(f"session_ids must name each session once; {_repeated(ids)!r} came twice")
    _require_length("expected_revisions", change.expected, len(ids))
    _require_length("request_ids", change.request_ids, len(ids))
    _require_length("batch_sizes", change.batch_sizes, len(ids))
    _require_sizes(change.batch_sizes)


class Validation:
    """Checks changes, and fills in what is known of their sessions."""

    def __init__(self, table: SessionTable, models: Models) -> None:
        self._table = table
        self._models = models

    def check(self, change: Change, handles: Handles) -> Refusals:
        """Check a change some of whose sessions are there. Nothing is answered yet.

        Args:
            change: As it came; its own columns are set here.
            handles: Of its sessions, -1 for those that are not there.

        Returns:
            Members that are refused, beside those that are not there, and why.

        Raises:
            ServerError: the change as a whole is refused.
        """
        table = self._table
        there = handles >= 0
        all_there = len(handles) == 1 or bool(there.all())
        models = table.model[handles if all_there else handles[there]]
        if len(models) > 1 and np.any(models != models[0]):
            raise InvalidInput("session_ids must be sessions of one model; got sessions of several")
        change.model = self._models.by_index(int(models[0]))
        change.handles, change.births = handles, table.birth[handles]
        own = table.batch_size[handles].astype(np.intp)
        change.sizes = self._sizes(change, own, there, all_there=all_there)
        change.row_count = int(change.sizes[0]) if len(handles) == 1 else int(change.sizes.sum())
        if change.reset:
            _check_reset(change)
        else:
            _check_step(change)
        refused = self._refused(change, there, own)
        if refused:
            there = there.copy()
            there[[member for member, _ in refused]] = False
        if not all_there or refused:
            change.members = np.flatnonzero(there)
        else:
            change.members = _ONLY if len(handles) == 1 else np.arange(len(handles))
        return refused

    def _refused(self, change: Change, there: Mask, own: Rows) -> Refusals:
        """Members that are there and are refused; each for the first reason."""
        refused: dict[int, ServerError] = {}
        finite = _finite(change)
        if finite is not None:
            for member in np.flatnonzero(there & ~finite).tolist():
                refused[member] = _not_finite_member(change, member)
        if change.batch_sizes is not None and own.tobytes() != change.sizes.tobytes():
            for member in np.flatnonzero(there & (own != change.sizes)).tolist():
                refused.setdefault(member, _wrong_size(change, member, int(own[member])))
        if change.expected is not None and _largest(change.expected) == ANY_REVISION:
            for member in np.flatnonzero(there & (change.expected == _ANY)).tolist():
                revision = int(self._table.revision[change.handles[member]])
                conflict = RevisionConflict(change.session_ids[member], ANY_REVISION, revision)
                refused.setdefault(member, conflict)
        return list(refused.items())

    @staticmethod
    def _sizes(change: Change, own: Rows, there: Mask, *, all_there: bool) -> Rows:
        said = change.batch_sizes
        if said is not None:
            return said  # a member that says a wrong one is refused, but its rows are where it says
        if all_there:
            return own
        sizes = np.where(there, own, 0)
        sizes[~there] = _rows_of_missing(change, sizes, int(np.count_nonzero(~there)))
        return sizes


def _check_step(change: Change) -> None:
    if change.inputs is None:
        raise InvalidInput("inputs must be given; got none")
    program = change.model.program
    known = [spec.name for spec in program.outputs]
    for name in change.output_names:
        if name not in known:
            raise InvalidInput(f"output_names must be among {known}; got {name!r}")
    rows = change.row_count
    checked = check_inputs(program, change.inputs, rows)
    change.arrays, change.steps, change.with_time = checked.arrays, checked.steps, checked.with_time
    if len(set(change.output_names)) != len(change.output_names):
        raise InvalidInput(f"output_names must name each output once; got {list(change.output_names)}")
    if change.reset_rows is not None:
        if len(change.reset_rows) != rows:
            raise InvalidInput(
                f"reset_mask must be empty or one for each of {rows} rows; got {len(change.reset_rows)}"
            )
        if not change.reset_rows.any():
            change.reset_rows = None


def _check_reset(change: Change) -> None:
    rows, model = change.rows, change.model
    if rows is not None:
        _require_rows(rows, change)
    if change.state is not None:
        count = change.row_count if rows is None else len(rows)
        change.arrays = check_state(model.program, change.state, count)
        if change.size == 1:
            require_finite("state", change.arrays, [spec.name for spec in model.program.state])


def _wrong_size(change: Change, member: int, own: int) -> ServerError:
    return InvalidInput(
        f"batch_sizes must be the sessions' own; session {change.session_ids[member]!r} has {own},"
        f" got {change.sizes[member]}"
    )


def _finite(change: Change) -> Mask | None:
    """Which members hold only finite numbers, as a mask; None if all do."""
    rows = finite_rows(change.arrays) if change.arrays else None
    if rows is None:
        return None
    return np.logical_and.reduceat(rows, change.starts)


def _require_length(name: str, values: Sized | None, count: int) -> None:
    if values is not None and len(values) != count:
        raise InvalidInput(f"{name} must be empty or one for each of {count} sessions; got {len(values)}")


def _require_sizes(sizes: Rows | None) -> None:
    if sizes is not None and len(sizes) == 1 and 1 <= sizes[0] <= MAX_BATCH_SIZE:
        return
    if sizes is not None and not 1 <= sizes.min() <= sizes.max() <= MAX_BATCH_SIZE:
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
    """Rows of each session that is gone: they are in the tensors too, before and between the others'.

    Raises:
        InvalidInput: it is not certain whose rows are whose.
    """
    left = _rows_given(change) - int(sizes.sum())
    if missing > 1 and left != missing:
        gone = [change.session_ids[int(member)] for member in np.flatnonzero(sizes == 0)]
        raise InvalidInput(
            "batch_sizes must be given for a frame in which several sessions are gone:"
            f" it is not certain whose rows are whose without {gone[:3]}"
        )
    return max(1, left // missing)


def _rows_given(change: Change) -> int:
    tensors: Tensors = (change.state if change.reset else change.inputs) or {}
    return next((len(array) for array in tensors.values() if array.ndim), len(change.session_ids))


def _require_rows(rows: Sequence[int], change: Change) -> None:
    if change.size > 1:
        raise InvalidInput(f"rows may be given for one session only; got {change.size} sessions")
    given = list(rows)
    batch_size = int(change.sizes[0])
    outside = [row for row in given if not 0 <= row < batch_size]
    if outside:
        raise InvalidInput(f"rows must be within 0 to {batch_size - 1}; got {outside[0]}")
    if len(set(given)) != len(given):
        raise InvalidInput(f"rows must name each row once; got {given}")


def _not_finite_member(change: Change, member: int) -> ServerError:
    low = int(change.starts[member])
    high = low + int(change.sizes[member])
    model: Model = change.model
    specs = model.program.state if change.reset else model.program.inputs
    names = [spec.name for spec in specs]
    for name, array in zip(names, change.arrays, strict=True):
        part = array[low:high]
        if is_float(part.dtype) and not np.isfinite(part).all():
            return not_finite("state" if change.reset else "input", name, part)
    raise AssertionError("only called for members that are not finite")
