"""Messages that have a learnt layout are read as protobuf reads them."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from google.protobuf.message import DecodeError
from hypothesis import given, settings
from hypothesis import strategies as st

from stepwell.v1 import sessions_pb2 as pb
from stepwell.v1 import tensors_pb2
from stepwell_server.rpc.layout import Layout, join
from stepwell_server.rpc.layout import learn_frame as learn
from stepwell_server.rpc.wire import Span, read_varint, varint

EXAMPLES = settings(max_examples=150, derandomize=True, deadline=None, database=None)
U64 = st.one_of(
    *(st.integers(1 << max(0, 7 * n - 7), min((1 << 7 * n) - 1, 2**64 - 1)) for n in range(1, 11))
)
TENSORS = st.lists(
    st.builds(
        lambda name, shape: tensors_pb2.Tensor(
            name=name, dtype=tensors_pb2.DATA_TYPE_FLOAT32, shape=shape, data=bytes(4 * int(np.prod(shape)))
        ),
        st.sampled_from(["", "x", "gain"]),
        st.lists(st.integers(1, 3), min_size=1, max_size=3),
    ),
    max_size=3,
)


@st.composite
def plain(draw: Any) -> bytes:
    step = pb.StepFrame(
        session_ids=[draw(st.text("ab\u00e9", min_size=1, max_size=60))], inputs=draw(TENSORS)
    )
    if draw(st.booleans()):
        step.expected_revisions.append(draw(U64))
    if draw(st.booleans()):
        step.request_ids.append(draw(U64))
    if draw(st.booleans()):
        step.batch_sizes.append(1)
    step.outputs = draw(st.integers(0, 3))
    step.timeout_ms = draw(st.one_of(st.just(0), st.integers(1, 2**32 - 1)))
    raw: bytes = pb.StepStreamRequest(
        frame_id=draw(st.one_of(st.just(0), U64)), step=step
    ).SerializeToString()
    return raw


def _bytes(raw: bytes, span: Span) -> bytes:
    return raw[span.start : span.stop]


def check(layout: Layout, raw: bytes) -> None:
    """What the layout reads is what protobuf reads."""
    message = pb.StepStreamRequest.FromString(raw)
    step, rows = message.step, join([raw], len(raw))
    assert [_bytes(raw, layout.session_id).decode()] == list(step.session_ids)
    assert [_bytes(raw, span) for span in layout.data] == [tensor.data for tensor in step.inputs]

    def number(span: Span | None) -> int:
        return 0 if span is None else int(Layout.numbers(rows, span)[0])

    assert number(layout.frame_id) == message.frame_id
    assert number(layout.timeout) & 0xFFFFFFFF == step.timeout_ms
    expected = [] if layout.expected is None else [number(layout.expected)]
    assert expected == list(step.expected_revisions)
    for span in (layout.frame_id, layout.expected, layout.timeout):
        if span is not None:
            value, stop = read_varint(raw, span.start)
            assert (value % 2**64, stop) == (number(span), span.stop)
    span = layout.request_id
    requests = [] if span is None else Layout.fixed64s(rows, span).tolist()
    assert requests == list(step.request_ids)


@EXAMPLES
@given(plain())
def test_what_is_learnt_is_what_protobuf_reads(raw: bytes) -> None:
    layout = learn(raw)
    assert layout is not None
    assert layout.fits_one(raw)
    check(layout, raw)


@EXAMPLES
@given(plain(), st.lists(st.tuples(st.integers(0), st.integers(0, 255)), min_size=1, max_size=4))
def test_a_changed_message_that_fits_is_read_as_protobuf_reads_it(
    raw: bytes, changes: list[tuple[int, int]]
) -> None:
    layout = learn(raw)
    assert layout is not None
    changed = bytearray(raw)
    for at, value in changes:
        changed[at % len(raw)] = value
    _check_if_it_fits(layout, bytes(changed))


def _check_if_it_fits(layout: Layout, other: bytes) -> None:
    fits = bool(layout.fits(join([other], len(other)))[0])
    assert layout.fits_one(other) == fits
    if not fits:
        return
    try:
        _bytes(other, layout.session_id).decode()
    except UnicodeDecodeError:  # the lane looks at the id before
        with pytest.raises(DecodeError):
            pb.StepStreamRequest.FromString(other)
        return
    check(layout, other)


def full(**fields: Any) -> pb.StepStreamRequest:
    tensor = tensors_pb2.Tensor(dtype=tensors_pb2.DATA_TYPE_FLOAT32, shape=[1, 2], data=bytes(8))
    step = {"session_ids": ["abc"], "inputs": [tensor], "expected_revisions": [300], "request_ids": [7]}
    return pb.StepStreamRequest(frame_id=300, step=pb.StepFrame(**{**step, **fields}))


@pytest.mark.parametrize(
    "fields", [{}, {"timeout_ms": 300, "batch_sizes": [1]}, {"request_ids": []}, {"expected_revisions": []}]
)
def test_every_byte_changed_in_every_way(fields: dict[str, Any]) -> None:
    raw = full(**fields).SerializeToString()
    layout = learn(raw)
    assert layout is not None
    others = [raw[:at] + bytes([value]) + raw[at + 1 :] for at in range(len(raw)) for value in range(256)]
    fitting = 0
    for other, fits in zip(others, layout.fits(join(others, len(raw))).tolist(), strict=True):
        assert layout.fits_one(other) == fits
        fitting += fits
        if fits:
            _check_if_it_fits(layout, other)
    assert 0 < fitting < len(others)


def test_a_number_that_goes_on_at_the_end_of_the_message_does_not_fit() -> None:
    raw = full(timeout_ms=300).SerializeToString()
    layout = learn(raw)
    assert layout is not None
    assert not layout.fits_one(raw[:-1] + b"\x82")


@pytest.mark.parametrize("last", [0, 1, 2, 0x7F])
def test_ten_bytes_hold_what_fits_into_a_number(last: int) -> None:
    number = b"\x85" + b"\x80" * 8 + bytes([last])
    for field in (b"\x1a\x0a" + number, b"\x30" + number):
        step = b"\x0a\x01a" + field
        raw = b"\x08" + number + b"\x12" + bytes([len(step)]) + step
        layout = learn(raw)
        assert layout is not None
        check(layout, raw)


def test_no_number_is_longer_than_ten_bytes() -> None:
    assert read_varint(varint(2**64 - 1), 0) == (2**64 - 1, 10)
    with pytest.raises(IndexError):
        read_varint(b"\x80" * 10 + b"\x01", 0)
    assert learn(b"\x08" + b"\x80" * 10 + b"\x01" + full().SerializeToString()[3:]) is None


_TENSOR = full().step.inputs[0]
_STEP = full().step.SerializeToString()


def _request(step: bytes, before: bytes = b"", after: bytes = b"") -> bytes:
    return before + b"\x12" + varint(len(step)) + step + after


@pytest.mark.parametrize(
    "raw",
    [
        b"",
        pb.StepStreamRequest(frame_id=1).SerializeToString(),
        full(session_ids=[]).SerializeToString(),
        full(session_ids=["a", "b"]).SerializeToString(),
        full(batch_sizes=[2]).SerializeToString(),
        full(expected_revisions=[1, 2]).SerializeToString(),
        full(request_ids=[1, 2]).SerializeToString(),
        pb.StepStreamRequest(reset=pb.ResetFrame(session_ids=["a"])).SerializeToString(),
        _request(_STEP, after=b"\x08\x01"),
        _request(_STEP, before=b"\x08\x01\x08\x02"),
        _request(_STEP) * 2,
        _request(_STEP, after=b"\x20\x01"),
        _request(_STEP + b"\x78\x01"),
        _request(_STEP + b"\x1a\x01\x05"),
        _request(b"\x18\x05" + _STEP),
        _request(b"\x0a\x01a\x18\x05"),
        _request(b"\x0a\x01a\x21" + bytes(8)),
        _request(b"\x0a\x01a\x12\x02\x28\x01"),
        _request(b"\x0a\x01a\x33\x34"),
        _request(_STEP)[:-1],
        full(inputs=[tensors_pb2.Tensor(data=bytes(17_000))]).SerializeToString(),
    ],
)
def test_what_is_not_plain_is_not_learnt(raw: bytes) -> None:
    assert learn(raw) is None
