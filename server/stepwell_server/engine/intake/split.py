"""Splits a change whose members cannot be processed together, such as those on several versions of a model.

Each part is checked, charged, run and answered by itself; the sender of the change gets the answers of all parts.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np

from stepwell_server.core.slots import Rows
from stepwell_server.engine.api import Select
from stepwell_server.engine.change import Change, Replies, Reply
from stepwell_server.engine.intake.validation import require_state_members
from stepwell_server.engine.types import Mask, Members, Tensors
from stepwell_server.errors import InvalidInput, ServerError

#: Columns of a change with one entry per member.
_OF_MEMBERS = ("session_ids", "expected", "request_ids", "messages", "connections", "callers", "deadlines")


def split(change: Change, others: Members) -> tuple[Change, Change]:
    """A change without some of its members, and one with only these: see `part_of`."""
    return part_of(change, np.setdiff1d(np.arange(change.size), others)), part_of(change, others)


def part_of(change: Change, members: Members) -> Change:
    """A change with only some of the members.

    Args:
        change: Its `sizes` or `batch_sizes` are known, and it has no `rows`.
        members: Ascending indexes, `(m,)`. Of several messages, either all members or none.

    Raises:
        InvalidInput: the rows of its tensors do not match its sessions, or it names members that do not exist.
    """
    if change.batch_sizes is not None:
        change.sizes = change.batch_sizes
    change.row_count = int(change.sizes.sum())
    _require_rows(change)
    if change.state_members is not None:
        require_state_members(change, change.state_members)
    rows = change.rows_of(members)
    part = dataclasses.replace(
        change,
        replies=_Part(change.replies, members),
        inputs=_some(change.inputs, rows),
        state=_some(change.state, rows),
        reset_rows=_mask(change.reset_rows, rows, change.row_count),
        batch_sizes=change.sizes[members],
        reply_bytes=change.reply_bytes * len(members) // change.size,
        **{name: _picked(getattr(change, name), members) for name in _OF_MEMBERS},
    )
    if part.deadlines is not None:
        part.deadline = float(part.deadlines.min())
    if change.state_members is not None:
        wanted = np.flatnonzero(np.isin(members, change.state_members))
        part.state_members = wanted.tolist()
        if not len(wanted):
            part.state_members, part.states = None, Select.NONE
    places = {member: place for place, member in enumerate(members.tolist())}
    traces = {places[at]: trace for at, trace in (change.traces or {}).items() if at in places}
    part.traces = traces or None
    return part


def _require_rows(change: Change) -> None:
    rows = change.row_count
    for tensors, argument in ((change.inputs, "inputs"), (change.state, "state")):
        for name, array in (tensors or {}).items():
            if not array.ndim or len(array) != rows:
                came = list(array.shape)
                raise InvalidInput(
                    f"{argument} {name!r} must have {rows} rows, those of the {change.size} sessions; got shape {came}"
                )


def _picked(values: Any, members: Members) -> Any:
    if values is None or isinstance(values, np.ndarray):
        return None if values is None else values[members]
    return [values[member] for member in members.tolist()]


def _some(tensors: Tensors | None, rows: Rows) -> Tensors | None:
    return None if tensors is None else {name: array[rows] for name, array in tensors.items()}


def _mask(mask: Mask | None, rows: Rows, count: int) -> Mask | None:
    """Select entries of `count` rows: one each, or one for each time step. Other lengths are refused later."""
    if mask is None or not count or len(mask) % count:
        return mask
    some: Mask = mask.reshape(count, -1)[rows].reshape(-1)
    return some


class _Part:
    """Passes answers on with the members' indexes in the whole. `Replies`."""

    __slots__ = ("_members", "_whole")

    def __init__(self, whole: Replies, members: Members) -> None:
        self._whole = whole
        self._members = members

    def applied(self, members: Members, reply: Reply) -> None:
        self._whole.applied(self._members[members], reply)

    def failed(self, members: Members, error: ServerError) -> None:
        self._whole.failed(self._members[members], error)

    def cancelled(self, members: Members) -> Members:
        gone = self._whole.cancelled(self._members[members])
        return np.searchsorted(self._members, gone)
