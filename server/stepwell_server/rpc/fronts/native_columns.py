"""What the native front hands over as columns, and how it is answered: between its tuples and `base`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from stepwell_server.core.callers import ANYBODY, Caller
from stepwell_server.engine.types import U64, Members
from stepwell_server.rpc.fronts.base import F64, Ended, InputColumn, OutputColumn, StepColumns
from stepwell_server.rpc.status import Status

if TYPE_CHECKING:
    from stepwell_front import BatchHandle

#: A status as the wire knows it: code, message, details, and whether the call may go elsewhere.
Said = tuple[int, str, bytes, bool]
_NOBODY: Members = np.zeros(0, np.intp)
_NO_TIMES: F64 = np.zeros(0)
_ANYBODY = [ANYBODY]


class Replies:
    """`base.ColumnReplies` of a batch that the wire has handed over."""

    def __init__(self, batch: BatchHandle) -> None:
        self._batch = batch

    def applied(
        self,
        members: Members | None,
        revisions: U64,
        positions: U64,
        outputs: Sequence[OutputColumn],
        *,
        replayed: bool,
        model_version: int,
    ) -> Ended:
        """See `base.ColumnReplies`."""
        some = None if members is None else members.astype(np.uint32).tobytes()
        columns = (revisions.tobytes(), positions.tobytes(), outputs)
        return _ended(*self._batch.applied(some, *columns, replayed, model_version))

    def failed(self, members: Members | None, status: Status, error: bytes) -> Ended:
        """See `base.ColumnReplies`."""
        some = None if members is None else members.astype(np.uint32).tobytes()
        return _ended(*self._batch.failed(some, said(status), error))

    def request(self, member: int) -> bytes:
        """See `base.ColumnReplies`."""
        return self._batch.request(member)

    def untraced(self) -> Sequence[int]:
        """See `base.ColumnReplies`."""
        return self._batch.untraced()

    def gone(self) -> Members:
        """See `base.ColumnReplies`."""
        gone = self._batch.gone()
        return np.array(gone, np.intp) if gone else _NOBODY


def columns_of(
    batch: BatchHandle,
    session_ids: list[str],
    callers: list[str],
    whos: list[Caller] | None,
    numbers: tuple[bytes, bytes, bytes, bytes, bytes],
    asked: tuple[int, list[str], bool, tuple[str, str] | None],
    tensors: list[tuple[str, int, list[int], bytes]],
) -> StepColumns:
    """A batch as `base.Steps` takes it. The arguments are those of the tuple of `python/front.rs`."""
    counts, sizes, expected, request_ids, deadlines = numbers
    select, output_names, says_sizes, model = asked
    return StepColumns(
        session_ids,
        callers,
        _ANYBODY if whos is None else whos,
        np.frombuffer(sizes, np.uint32),
        says_sizes,
        np.frombuffer(expected, np.uint64) if expected else None,
        np.frombuffer(request_ids, np.uint64) if request_ids else None,
        np.frombuffer(deadlines, np.float64),
        select,
        output_names,
        [InputColumn(*tensor) for tensor in tensors],
        np.frombuffer(counts, np.uint32),
        Replies(batch),
        model,
    )


def said(status: Status) -> Said:
    """A status as the wire takes it."""
    details = next((value for _, value in status.trailers), b"")
    return int(status.code), status.message, details, status.may_go_elsewhere


def _ended(calls: bytes, messages: bytes) -> Ended:
    return Ended(_times(calls), _times(messages))


def _times(raw: bytes) -> F64:
    return np.frombuffer(raw, np.float64) if raw else _NO_TIMES
