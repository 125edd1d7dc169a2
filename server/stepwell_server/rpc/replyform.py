"""Replies to plain steps, put together from bytes.

A reply is the same bytes as protobuf would write, but for the frame id, the revision, the position and the
elements of the outputs. What does not change is made once, by protobuf.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from stepwell.v1 import sessions_pb2 as pb
from stepwell_server.engine.calls import Array
from stepwell_server.rpc import convert
from stepwell_server.rpc.layout import encode_varint

_SMALL = tuple(encode_varint(value) for value in range(1 << 14))
_ALL_MEMBERS = pb.StepStreamResponse(all_members=True).SerializeToString()
_LAST = pb.StepStreamResponse(last=True).SerializeToString()
# A packed field of one number: tag and length before it. The length of a varint is itself one byte.
_REVISIONS, _POSITIONS = (
    bytes([pb.StepStreamResponse.DESCRIPTOR.fields_by_name[name].number << 3 | 2])
    for name in ("revisions", "positions")
)
_FRAME_ID = bytes([pb.StepStreamResponse.DESCRIPTOR.fields_by_name["frame_id"].number << 3])


class ReplyForm:
    """Replies with outputs of the same names, dtypes and shapes. Immutable."""

    def __init__(self, outputs: Mapping[str, Array]) -> None:
        """Take the outputs of one row, `(1, ...)` each, as an example."""
        self._before: list[bytes] = []
        for name, array in outputs.items():
            whole = pb.StepStreamResponse()
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
        if len(elements) == 1:
            before = self._before[0]
            return [
                b"".join((*_head(frame, revision, position), before, data, _LAST))
                for frame, revision, position, data in zip(
                    frame_ids, revisions, positions, elements[0], strict=True
                )
            ]
        bodies = _interleave(self._before, elements, len(frame_ids))
        return [
            b"".join((*_head(frame, revision, position), body, _LAST))
            for frame, revision, position, body in zip(frame_ids, revisions, positions, bodies, strict=True)
        ]

    def write_one(self, frame_id: int, revision: int, position: int, columns: Sequence[Array]) -> bytes:
        """As `write`, for one step."""
        parts = list(_head(frame_id, revision, position))
        for before, column in zip(self._before, columns, strict=True):
            parts.append(before)
            parts.append(column.tobytes())
        parts.append(_LAST)
        return b"".join(parts)


def _head(frame_id: int, revision: int, position: int) -> tuple[bytes, ...]:
    rev, pos = varint(revision), varint(position)
    parts = (_ALL_MEMBERS, _REVISIONS, _SMALL[len(rev)], rev, _POSITIONS, _SMALL[len(pos)], pos)
    return (_FRAME_ID, varint(frame_id), *parts) if frame_id else parts


def varint(value: int) -> bytes:
    """A number as protobuf writes it."""
    return _SMALL[value] if value < len(_SMALL) else encode_varint(value)


def _cut(column: Array, size: int) -> list[bytes]:
    raw = np.ascontiguousarray(column).tobytes()
    return [raw[at : at + size] for at in range(0, len(raw), size)]


def _interleave(before: Sequence[bytes], elements: Sequence[Sequence[bytes]], count: int) -> list[bytes]:
    return [
        b"".join(part for head, data in zip(before, elements, strict=True) for part in (head, data[i]))
        for i in range(count)
    ]
