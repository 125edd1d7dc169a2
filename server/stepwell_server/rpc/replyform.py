"""Replies to plain steps, put together from bytes: messages of a stream, and replies of unary calls.

A reply is the same bytes as protobuf would write, but for the frame id, the revision, the position and the
elements of the outputs. What does not change is made once, by protobuf.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import numpy as np

from stepwell.v1 import sessions_pb2 as pb
from stepwell_server.engine.calls import Array
from stepwell_server.rpc import convert
from stepwell_server.rpc.wire import varint

_ALL_MEMBERS = pb.StepStreamResponse(all_members=True).SerializeToString()
_LAST = pb.StepStreamResponse(last=True).SerializeToString()
_REVISIONS, _POSITIONS = (
    bytes([pb.StepStreamResponse.DESCRIPTOR.fields_by_name[name].number << 3 | 2])
    for name in ("revisions", "positions")
)
_FRAME_ID = bytes([pb.StepStreamResponse.DESCRIPTOR.fields_by_name["frame_id"].number << 3])
_REVISION, _POSITION = (
    bytes([pb.StepResponse.DESCRIPTOR.fields_by_name[name].number << 3]) for name in ("revision", "position")
)

#: What stands before and behind the outputs, made of frame id, revision and position.
Ends = Callable[[int, int, int], tuple[bytes, bytes]]


def frame_ends(frame_id: int, revision: int, position: int) -> tuple[bytes, bytes]:
    """Those of a message of a stream: the last part, for all members, of a frame of one session."""
    rev, pos = varint(revision), varint(position)
    # a packed field of one number: the length of a varint is itself one byte
    numbers = (_REVISIONS, varint(len(rev)), rev, _POSITIONS, varint(len(pos)), pos)
    before = b"".join((_ALL_MEMBERS, *numbers))
    return (b"".join((_FRAME_ID, varint(frame_id), before)) if frame_id else before), _LAST


def call_ends(_frame_id: int, revision: int, position: int) -> tuple[bytes, bytes]:
    """Those of the reply to a unary Step."""
    behind = _REVISION + varint(revision) if revision else b""  # protobuf leaves out what is 0
    return b"", (behind + _POSITION + varint(position) if position else behind)


class ReplyForm:
    """Replies with outputs of the same names, dtypes and shapes. Immutable."""

    def __init__(
        self,
        response: type[pb.StepStreamResponse | pb.StepResponse],
        ends: Ends,
        outputs: Mapping[str, Array],
    ) -> None:
        """Take the outputs of one row, `(1, ...)` each, as an example."""
        self._ends = ends
        self._before: list[bytes] = []
        for name, array in outputs.items():
            whole = response()
            convert.add_tensors(whole.outputs, {name: array})
            raw = whole.SerializeToString()
            # the elements are the last field of the last message
            self._before.append(raw[: len(raw) - array.nbytes])
        self.sizes = [array.nbytes for array in outputs.values()]

    def write(
        self,
        frame_ids: Sequence[int],
        revisions: Sequence[int],
        positions: Sequence[int],
        columns: Sequence[Array],
    ) -> list[bytes]:
        """One reply for each of n steps; `columns` are the outputs, `(n, ...)` each."""
        elements = [_cut(column, size) for column, size in zip(columns, self.sizes, strict=True)]
        ends = map(self._ends, frame_ids, revisions, positions)
        if len(elements) == 1:
            before = self._before[0]
            return [
                b"".join((head, before, data, tail))
                for (head, tail), data in zip(ends, elements[0], strict=True)
            ]
        bodies = _interleave(self._before, elements, len(frame_ids))
        return [b"".join((head, body, tail)) for (head, tail), body in zip(ends, bodies, strict=True)]

    def write_one(self, frame_id: int, revision: int, position: int, columns: Sequence[Array]) -> bytes:
        """As `write`, for one step."""
        head, tail = self._ends(frame_id, revision, position)
        parts = [head]
        for before, column in zip(self._before, columns, strict=True):
            parts.append(before)
            parts.append(column.tobytes())
        parts.append(tail)
        return b"".join(parts)


def _cut(column: Array, size: int) -> list[bytes]:
    raw = np.ascontiguousarray(column).tobytes()
    return [raw[at : at + size] for at in range(0, len(raw), size)]


def _interleave(before: Sequence[bytes], elements: Sequence[Sequence[bytes]], count: int) -> list[bytes]:
    return [
        b"".join(part for head, data in zip(before, elements, strict=True) for part in (head, data[i]))
        for i in range(count)
    ]
