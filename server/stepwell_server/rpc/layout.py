"""The byte layout of a plain step, learnt from one message and recognised in others.

Clients of the same kind send messages that differ in few bytes: the frame id, the session id, the numbers,
the revision and the request id. Where those stand is found once, by walking the message as protobuf's wire
format says. Another message has the same layout if it has the same length, the same bytes everywhere else,
and its varying numbers are as long: then the same fields stand at the same places, and a thousand messages
are read with a few array operations.

Only the canonical form is learnt: known fields, each at most once, one session. Whatever is not goes
through protobuf's own parser.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence

import numpy as np
import numpy.typing as npt

from stepwell.v1 import sessions_pb2 as pb
from stepwell.v1 import tensors_pb2
from stepwell_server.rpc.wire import FIXED64, LENGTH, VARINT, Malformed, Span, fields, walk_varint

U8 = npt.NDArray[np.uint8]
U64 = npt.NDArray[np.uint64]

_LARGEST_MESSAGE = 16 * 1024
_LARGEST_NUMBER = 2048
#: `batch_sizes` of one session of one row, packed.
_ONE_ROW = b"\x01"
_REQUEST = pb.StepStreamRequest.DESCRIPTOR.fields_by_name
_CALL = pb.StepRequest.DESCRIPTOR.fields_by_name
_FRAME = pb.StepFrame.DESCRIPTOR.fields_by_name
_TENSOR = tensors_pb2.Tensor.DESCRIPTOR.fields_by_name


@dataclasses.dataclass(slots=True)
class _Found:
    session_id: Span | None = None
    frame_id: Span | None = None
    expected: Span | None = None
    request_id: Span | None = None
    timeout: Span | None = None
    data: list[Span] = dataclasses.field(default_factory=list)


class Layout:
    """Where the varying fields of a plain step stand. Immutable."""

    def __init__(self, raw: bytes, found: _Found) -> None:
        assert found.session_id is not None
        self.length = len(raw)
        self.session_id = found.session_id
        self.frame_id = found.frame_id
        self.expected = found.expected
        self.request_id = found.request_id
        self.timeout = found.timeout
        self.data = tuple(found.data)
        mask = np.full(len(raw), 0xFF, np.uint8)
        for span in (self.session_id, self.request_id, *self.data):
            if span is not None:
                mask[span.start : span.stop] = 0
        for span in (self.frame_id, self.expected, self.timeout):
            if span is not None:
                mask[span.start : span.stop] = 0x80  # only whether the number goes on
        self._mask = mask
        self._fixed = np.frombuffer(raw, np.uint8) & mask
        self._mask_number = int.from_bytes(mask.tobytes(), "little")
        self._fixed_number = int.from_bytes(self._fixed.tobytes(), "little")

    def fits(self, messages: U8) -> npt.NDArray[np.bool_]:
        """Which of messages of this length, `(n, length)`, have this layout: `(n,)`."""
        fits: npt.NDArray[np.bool_] = ((messages & self._mask) == self._fixed).all(axis=1)
        return fits

    def fits_one(self, raw: bytes) -> bool:
        """As `fits`, for one message of this length."""
        if self.length > _LARGEST_NUMBER:
            return bool(self.fits(join([raw], self.length))[0])
        # as one long number: no call of numpy is as quick
        return int.from_bytes(raw, "little") & self._mask_number == self._fixed_number

    @staticmethod
    def numbers(messages: U8, span: Span) -> U64:
        """The varints that stand at `span` of each message, `(n,)`."""
        total = np.zeros(len(messages), np.uint64)
        for shift, index in enumerate(range(span.start, span.stop)):
            total |= (messages[:, index].astype(np.uint64) & np.uint64(0x7F)) << np.uint64(7 * shift)
        return total

    @staticmethod
    def fixed64s(messages: U8, span: Span) -> U64:
        """The fixed64 numbers that stand at `span` of each message, `(n,)`."""
        return np.ascontiguousarray(messages[:, span.start : span.stop]).view("<u8")[:, 0].astype(np.uint64)


def learn_frame(raw: bytes) -> Layout | None:
    """The layout of a message of a stream that protobuf's parser takes; None if it is not a plain step."""
    return _learn(raw, _walk_request)


def learn_call(raw: bytes) -> Layout | None:
    """As `learn_frame`, of the request of a unary Step."""
    return _learn(raw, _walk_call)


def _learn(raw: bytes, walk: Callable[[bytes, _Found], None]) -> Layout | None:
    if len(raw) > _LARGEST_MESSAGE:
        return None
    found = _Found()
    try:
        walk(raw, found)
    except Malformed:
        return None
    return None if found.session_id is None else Layout(raw, found)


def _walk_call(raw: bytes, found: _Found) -> None:
    numbers = {name: field.number for name, field in _CALL.items()}
    last = 0
    for number, wire, span in fields(raw, 0, len(raw)):
        if number != numbers["inputs"]:
            last = _ascending(last, number)
        if number == numbers["session_id"] and wire == LENGTH:
            found.session_id = span
        elif number == numbers["inputs"] and wire == LENGTH:
            _walk_tensor(raw, span, found)
        elif number == numbers["expected_revision"] and wire == VARINT:
            found.expected = span
        elif number == numbers["request_id"] and wire == FIXED64:
            found.request_id = span
        elif number != numbers["outputs"] or wire != VARINT:
            raise Malformed


def _walk_request(raw: bytes, found: _Found) -> None:
    last = 0
    for number, wire, span in fields(raw, 0, len(raw)):
        last = _ascending(last, number)
        if number == _REQUEST["frame_id"].number and wire == VARINT:
            found.frame_id = span
        elif number == _REQUEST["step"].number and wire == LENGTH:
            _walk_frame(raw, span, found)
        else:
            raise Malformed


def _walk_frame(raw: bytes, frame: Span, found: _Found) -> None:
    numbers = {name: field.number for name, field in _FRAME.items()}
    last = 0
    for number, wire, span in fields(raw, frame.start, frame.stop):
        if number != numbers["inputs"]:
            last = _ascending(last, number)
        if number == numbers["session_ids"] and wire == LENGTH:
            found.session_id = span
        elif number == numbers["inputs"] and wire == LENGTH:
            _walk_tensor(raw, span, found)
        elif number == numbers["expected_revisions"] and wire == LENGTH:
            found.expected = _only_varint(raw, span)
        elif number == numbers["request_ids"] and wire == LENGTH and span.stop - span.start == 8:
            found.request_id = span
        elif number == numbers["timeout_ms"] and wire == VARINT:
            found.timeout = span
        elif number == numbers["batch_sizes"] and raw[span.start : span.stop] == _ONE_ROW:
            pass  # the same for each plain step, so it is among the bytes that do not vary
        elif number != numbers["outputs"] or wire != VARINT:
            raise Malformed


def _walk_tensor(raw: bytes, tensor: Span, found: _Found) -> None:
    last = 0
    data = Span(tensor.stop, tensor.stop)
    for number, wire, span in fields(raw, tensor.start, tensor.stop):
        last = _ascending(last, number)
        if number == _TENSOR["data"].number and wire == LENGTH:
            data = span
        elif number not in (_TENSOR["name"].number, _TENSOR["dtype"].number, _TENSOR["shape"].number):
            raise Malformed
    found.data.append(data)


def _ascending(last: int, number: int) -> int:
    if number <= last:
        raise Malformed
    return number


def _only_varint(raw: bytes, span: Span) -> Span:
    _, stop = walk_varint(raw, span.start, span.stop)
    if stop != span.stop:
        raise Malformed
    return span


def join(messages: Sequence[bytes], length: int) -> U8:
    """Messages of one length as `(n, length)`."""
    return np.frombuffer(b"".join(messages), np.uint8).reshape(len(messages), length)
