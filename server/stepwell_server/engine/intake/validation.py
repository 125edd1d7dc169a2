"""From a frame as it came to a checked call: which sessions, whose rows, what is refused at once."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Sequence, Sized

import numpy as np

from stepwell_server.core.exactly_once import ANY_REVISION
from stepwell_server.core.sessions import SessionTable
from stepwell_server.core.slots import Rows
from stepwell_server.engine.api import Frame, Members, Tensors
from stepwell_server.engine.checks import (
    check_inputs,
    check_state,
    finite_rows,
    is_float,
    not_finite,
    require_finite,
)
from stepwell_server.engine.framecall import FrameCall
from stepwell_server.engine.sessions.directory import Directory
from stepwell_server.engine.state.model import ServedModel
from stepwell_server.errors import InvalidInput, RevisionConflict, ServerError
from stepwell_server.program import Program

MAX_MEMBERS = 65_536
#: Far above every session's, and low enough that the sum of a frame's cannot wrap.
MAX_BATCH_SIZE = 1 << 31


@dataclasses.dataclass(frozen=True, slots=True)
class Checked:
    """A frame that is not refused as a whole."""

    call: FrameCall
    members: Members
    """Members that may start."""
    errors: Sequence[tuple[int, ServerError]]
    """The others, each with what is wrong."""


class Frames:
    """Checks frames against the sessions and the model they name."""

    def __init__(self, table: SessionTable, directory: Directory) -> None:
        self._table = table
        self._directory = directory

    def check(self, frame: Frame) -> Checked:
        """Check a frame. Nothing is answered yet.

        Raises:
            ServerError: the frame as a whole is refused.
        """
        call = self._call(frame)
        if call.model < 0:
            return Checked(call, np.zeros(0, np.intp), self._missing(call))
        model = self._directory.model_of(int(call.handles[call.handles >= 0][0]))
        if frame.reset:
            self._check_reset(call, model)
        else:
            self._check_step(call, model)
        there = call.handles >= 0
        errors = [] if there.all() else self._missing(call)
        finite = self._finite(call)
        for member in [] if finite is None else np.flatnonzero(there & ~finite).tolist():
            errors.append((member, _not_finite_member(call, model.program, member)))
        good = there if finite is None else there & finite
        for member in np.flatnonzero(good & (self._table.batch_size[call.handles] != call.sizes)).tolist():
            errors.append((member, self._wrong_size(call, member)))
            good[member] = False
        if frame.expected is not None:
            for member in np.flatnonzero(good & (frame.expected == np.uint64(ANY_REVISION))).tolist():
                errors.append((member, self._no_such_revision(call, member)))
                good[member] = False
        return Checked(call, np.flatnonzero(good), errors)

    def _call(self, frame: Frame) -> FrameCall:
        ids = frame.session_ids
        if not 1 <= len(ids) <= MAX_MEMBERS:
            raise InvalidInput(f"session_ids must be 1 to {MAX_MEMBERS}; got {len(ids)}")
        if len(ids) > 1 and len(set(ids)) != len(ids):
            raise InvalidInput(f"session_ids must name each session once; {_repeated(ids)!r} came twice")
        _require_length("expected_revisions", frame.expected, len(ids))
        _require_length("request_ids", frame.request_ids, len(ids))
        _require_length("batch_sizes", frame.batch_sizes, len(ids))
        _require_sizes(frame.batch_sizes)
        handles = self._directory.find_all(ids)
        there = handles[handles >= 0]
        if not len(there):
            return FrameCall(frame, -1, handles, np.ones(len(ids), np.intp))
        models = self._table.model[there]
        if len(there) > 1 and np.any(models != models[0]):
            raise InvalidInput("session_ids must be sessions of one model; got sessions of several")
        return FrameCall(frame, int(models[0]), handles, self._sizes(frame, handles))

    def _sizes(self, frame: Frame, handles: Members) -> Rows:
        there = handles >= 0
        sizes = np.where(there, self._table.batch_size[handles], 0).astype(np.intp)
        said = frame.batch_sizes
        if said is not None:
            return said  # a member that says a wrong one is refused, but its rows are where it says
        missing = len(handles) - int(np.count_nonzero(there))
        if missing:
            sizes[~there] = _rows_of_missing(frame, sizes, missing)
        return sizes

    def _check_step(self, call: FrameCall, model: ServedModel) -> None:
        inputs = call.frame.inputs
        if inputs is None:
            raise InvalidInput("inputs must be given; got none")
        call.checked = check_inputs(model.program, inputs, call.row_count)
        call.byte_count = sum(array.nbytes for array in call.checked.arrays)

    def _check_reset(self, call: FrameCall, model: ServedModel) -> None:
        rows = call.frame.rows
        if rows is not None:
            _require_rows(rows, call)
        if call.frame.state is not None:
            count = call.row_count if rows is None else len(rows)
            call.state = check_state(model.program, call.frame.state, count)
            call.byte_count = sum(array.nbytes for array in call.state)
            if call.size == 1:
                require_finite("state", call.state, [spec.name for spec in model.program.state])

    def _missing(self, call: FrameCall) -> list[tuple[int, ServerError]]:
        ids = call.frame.session_ids
        return [(m, self._directory.why_not(ids[m])) for m in np.flatnonzero(call.handles < 0).tolist()]

    def _wrong_size(self, call: FrameCall, member: int) -> ServerError:
        own = int(self._table.batch_size[call.handles[member]])
        return InvalidInput(
            f"batch_sizes must be the sessions' own; session {call.frame.session_ids[member]!r} has {own},"
            f" got {call.sizes[member]}"
        )

    def _no_such_revision(self, call: FrameCall, member: int) -> ServerError:
        revision = int(self._table.revision[call.handles[member]])
        return RevisionConflict(call.frame.session_ids[member], ANY_REVISION, revision)

    @staticmethod
    def _finite(call: FrameCall) -> Members | None:
        """Which members hold only finite numbers, as a mask; None if all do."""
        arrays = call.state if call.frame.reset else call.checked and call.checked.arrays
        rows = finite_rows(arrays) if arrays else None
        if rows is None:
            return None
        return np.logical_and.reduceat(rows, call.starts)


def _require_length(name: str, values: Sized | None, count: int) -> None:
    if values is not None and len(values) != count:
        raise InvalidInput(f"{name} must be empty or one for each of {count} sessions; got {len(values)}")


def _require_sizes(sizes: Rows | None) -> None:
    if sizes is not None and not 1 <= sizes.min() <= sizes.max() <= MAX_BATCH_SIZE:
        wrong = sizes[(sizes < 1) | (sizes > MAX_BATCH_SIZE)]
        raise InvalidInput(f"batch_sizes must be 1 to {MAX_BATCH_SIZE}; got {wrong[0]}")


def _repeated(ids: Iterable[str]) -> str:
    seen: set[str] = set()
    for session_id in ids:
        if session_id in seen:
            return str(session_id)
        seen.add(session_id)
    raise AssertionError("only called with a repeated id")


def _rows_of_missing(frame: Frame, sizes: Rows, missing: int) -> int:
    """Rows of each session that is gone: they are in the tensors too, before and between the others'.

    Raises:
        InvalidInput: it is not certain whose rows are whose.
    """
    left = _rows_given(frame) - int(sizes.sum())
    if missing > 1 and left != missing:
        gone = [frame.session_ids[int(member)] for member in np.flatnonzero(sizes == 0)]
        raise InvalidInput(
            "batch_sizes must be given for a frame in which several sessions are gone:"
            f" it is not certain whose rows are whose without {gone[:3]}"
        )
    return max(1, left // missing)


def _rows_given(frame: Frame) -> int:
    tensors: Tensors = (frame.state if frame.reset else frame.inputs) or {}
    return next((len(array) for array in tensors.values() if array.ndim), len(frame.session_ids))


def _require_rows(rows: Sequence[int], call: FrameCall) -> None:
    if call.size > 1:
        raise InvalidInput(f"rows may be given for one session only; got {call.size} sessions")
    given = list(rows)
    batch_size = int(call.sizes[0])
    outside = [row for row in given if not 0 <= row < batch_size]
    if outside:
        raise InvalidInput(f"rows must be within 0 to {batch_size - 1}; got {outside[0]}")
    if len(set(given)) != len(given):
        raise InvalidInput(f"rows must name each row once; got {given}")


def _not_finite_member(call: FrameCall, program: Program, member: int) -> ServerError:
    low = call.starts[member]
    high = low + call.sizes[member]
    if call.frame.reset:
        what, arrays = "state", call.state or ()
        names = [spec.name for spec in program.state]
    else:
        what, arrays = "input", call.checked.arrays if call.checked else ()
        names = [spec.name for spec in program.inputs]
    for name, array in zip(names, arrays, strict=True):
        part = array[low:high]
        if is_float(part.dtype) and not np.isfinite(part).all():
            return not_finite(what, name, part)
    raise AssertionError("only called for members that are not finite")
