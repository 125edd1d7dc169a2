"""The byte layout of a plain step on the stream, learnt from one message and recognised in others.

Clients of the same kind send messages that differ in few bytes: the frame id, the session id, the numbers,
the revision and the request id. Where those stand is found once, by walking the message as protobuf's wire
format says (protobuf.dev/programming-guides/encoding). Another message has the same layout if it has the
same length, the same bytes everywhere else, and its varying numbers are as long: then the same fields stand
at the same places, and a thousand messages are read with a few array operations.

Only the canonical form is learnt: known fields, each at most once, one session. Whatever is not goes
through protobuf's own parser.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence

import numpy as np
import numpy.typing as npt

from stepwell.v1 import sessions_pb2 as pb
from stepwell.v1 import tensors_pb2

U8 = npt.NDArray[np.uint8]
U64 = npt.NDArray[np.uint64]

_VARINT, _FIXED64, _LENGTH = 0, 1, 2
_LARGEST_MESSAGE = 16 * 1024
#: `batch_sizes` of one session of one row, packed.
_ONE_ROW = b"\x01"
_REQUEST = pb.StepStreamRequest.DESCRIPTOR.fields_by_name
_FRAME = pb.StepFrame.DESCRIPTOR.fields_by_name
_TENSOR = tensors_pb2.Tensor.DESCRIPTOR.fields_by_name


@dataclasses.dataclass(frozen=True, slots=True)
class Span:
    """A stretch of a message."""

    start: int
    stop: int


class _NotPlain(Exception):
    """The message has another form than the one that is learnt."""


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
        self._pieces = [(span, raw[span.start : span.stop]) for span in _runs(mask == 0xFF)]
        self._numbers = [span for span in (self.frame_id, self.expected, self.timeout) if span is not None]
        self._fixed = np.frombuffer(raw, np.uint8) & mask

    def fits(self, messages: U8) -> npt.NDArray[np.bool_]:
        """Which of messages of this length, `(n, length)`, have this layout: `(n,)`."""
        fits: npt.NDArray[np.bool_] = ((messages & self._mask) == self._fixed).all(axis=1)
        return fits

    def fits_one(self, raw: bytes) -> bool:
        """As `fits`, for one message of this length."""
        return all(raw[span.start : span.stop] == piece for span, piece in self._pieces) and all(
            _is_varint(raw, span) for span in self._numbers
        )

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


def _runs(mask: npt.NDArray[np.bool_]) -> list[Span]:
    """The stretches in which the mask is set."""
    edges = np.flatnonzero(np.diff(np.concatenate(([False], mask, [False])).astype(np.int8)))
    return [Span(int(start), int(stop)) for start, stop in zip(edges[::2], edges[1::2], strict=True)]


def learn(raw: bytes) -> Layout | None:
    """The layout of a message that protobuf's parser has taken; None if it is not a plain step."""
    if len(raw) > _LARGEST_MESSAGE:
        return None
    found = _Found()
    try:
        _walk_request(raw, found)
    except _NotPlain:
        return None
    return None if found.session_id is None else Layout(raw, found)


def _walk_request(raw: bytes, found: _Found) -> None:
    last = 0
    for number, wire, span in _fields(raw, 0, len(raw)):
        last = _ascending(last, number)
        if number == _REQUEST["frame_id"].number and wire == _VARINT:
            found.frame_id = span
        elif number == _REQUEST["step"].number and wire == _LENGTH:
            _walk_frame(raw, span, found)
        else:
            raise _NotPlain


def _walk_frame(raw: bytes, frame: Span, found: _Found) -> None:
    numbers = {name: field.number for name, field in _FRAME.items()}
    last = 0
    for number, wire, span in _fields(raw, frame.start, frame.stop):
        if number != numbers["inputs"]:
            last = _ascending(last, number)
        if number == numbers["session_ids"] and wire == _LENGTH:
            found.session_id = span
        elif number == numbers["inputs"] and wire == _LENGTH:
            _walk_tensor(raw, span, found)
        elif number == numbers["expected_revisions"] and wire == _LENGTH:
            found.expected = _only_varint(raw, span)
        elif number == numbers["request_ids"] and wire == _LENGTH and span.stop - span.start == 8:
            found.request_id = span
        elif number == numbers["timeout_ms"] and wire == _VARINT:
            found.timeout = span
        elif number == numbers["batch_sizes"] and raw[span.start : span.stop] == _ONE_ROW:
            pass  # the same for each plain step, so it is among the bytes that do not vary
        elif number != numbers["outputs"] or wire != _VARINT:
            raise _NotPlain


def _walk_tensor(raw: bytes, tensor: Span, found: _Found) -> None:
    last = 0
    data = Span(tensor.stop, tensor.stop)
    for number, wire, span in _fields(raw, tensor.start, tensor.stop):
        last = _ascending(last, number)
        if number == _TENSOR["data"].number and wire == _LENGTH:
            data = span
        elif number not in (_TENSOR["name"].number, _TENSOR["dtype"].number, _TENSOR["shape"].number):
            raise _NotPlain
    found.data.append(data)


def _ascending(last: int, number: int) -> int:
    if number <= last:
        raise _NotPlain
    return number


def _only_varint(raw: bytes, span: Span) -> Span:
    _, stop = _varint(raw, span.start, span.stop)
    if stop != span.stop:
        raise _NotPlain
    return span


def _fields(raw: bytes, start: int, stop: int) -> Iterator[tuple[int, int, Span]]:
    """Number, wire type and value of each field."""
    at = start
    while at < stop:
        tag, at = _varint(raw, at, stop)
        wire = tag & 7
        if wire == _VARINT:
            _, end = _varint(raw, at, stop)
        elif wire == _FIXED64:
            end = at + 8
        elif wire == _LENGTH:
            size, at = _varint(raw, at, stop)
            end = at + size
        else:
            raise _NotPlain
        if end > stop:
            raise _NotPlain
        yield tag >> 3, wire, Span(at, end)
        at = end


def _varint(raw: bytes, at: int, stop: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        if at >= stop or shift > 63:
            raise _NotPlain
        byte = raw[at]
        at += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value, at
        shift += 7


def _is_varint(raw: bytes, span: Span) -> bool:
    """Whether one number fills the span; the message may end right behind it."""
    last = span.stop - 1
    return raw[last] < 0x80 and all(byte & 0x80 for byte in raw[span.start : last])


def read_varint(raw: bytes, at: int) -> tuple[int, int]:
    """The number at a place, and where it ends.

    Raises:
        IndexError: the message ends first, or the number goes on for longer than any may.
    """
    byte = raw[at]
    if byte < 0x80:
        return byte, at + 1
    value = shift = 0
    while byte & 0x80:
        value |= (byte & 0x7F) << shift
        shift += 7
        at += 1
        if shift > 63:
            raise IndexError
        byte = raw[at]
    return value | byte << shift, at + 1


def encode_varint(value: int) -> bytes:
    """A number as protobuf writes it."""
    out = bytearray()
    while value > 0x7F:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    out.append(value)
    return bytes(out)


def join(messages: Sequence[bytes], length: int) -> U8:
    """Messages of one length as `(n, length)`."""
    return np.frombuffer(b"".join(messages), np.uint8).reshape(len(messages), length)
