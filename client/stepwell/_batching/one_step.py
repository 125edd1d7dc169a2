"""The frame of one step. It costs a third of a `Frame`, whose columns are for many members. No I/O."""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

import numpy as np

from stepwell._base.metadata import sampled
from stepwell._base.wire import bytes_tag, fixed64, varint, varint_tag
from stepwell._batching.frames import FRAME_ID_TAG, STEP_TAG, Frame, Part, timeout_ms
from stepwell._batching.steps import Step
from stepwell._state.tensors import view_all
from stepwell._transport.retry import Deadline
from stepwell.v1 import sessions_pb2

_pb = sessions_pb2.StepFrame
_IDS = bytes_tag(_pb.SESSION_IDS_FIELD_NUMBER)
_REVISIONS = bytes_tag(_pb.EXPECTED_REVISIONS_FIELD_NUMBER)
_REQUEST_IDS = bytes_tag(_pb.REQUEST_IDS_FIELD_NUMBER)
_TIMEOUT_MS = varint_tag(_pb.TIMEOUT_MS_FIELD_NUMBER)
_BATCH_SIZES = bytes_tag(_pb.BATCH_SIZES_FIELD_NUMBER)
_TRACEPARENT = bytes_tag(_pb.TRACEPARENT_FIELD_NUMBER)
_FIRST: Final = np.zeros(1, np.intp)
_NONE = Part(_FIRST[:0], np.zeros(0, np.uint64), np.zeros(0, np.uint64), {}, {})


class OneStep:
    """The frame of one step, with the interface of `Frame` for a single round."""

    __slots__ = ("_frame", "_make", "_step", "round_over")

    def __init__(self, step: Step, make: Callable[[], Frame]) -> None:
        """`make` returns the frame with columns. It reads the replies that are not the plain answer to a step."""
        self._step = step
        self._make = make
        self._frame: Frame | None = None
        self.round_over = False

    def encode(self, frame_id: int, deadline: Deadline) -> bytes:
        """See `Frame.encode`."""
        step = self._step
        session_id, revision, rows = step.session_id.encode(), varint(step.expected), varint(step.rows)
        parts = step.change.fields(_pb)
        parts += (_IDS, varint(len(session_id)), session_id, _REVISIONS, varint(len(revision)), revision)
        parts += (_REQUEST_IDS, varint(8), fixed64(step.request_id), _BATCH_SIZES, varint(len(rows)), rows)
        parts += (_TIMEOUT_MS, varint(timeout_ms(deadline.remaining_s())))
        if step.trace:
            traceparent = sampled(step.trace).encode()
            parts += (_TRACEPARENT, varint(len(traceparent)), traceparent)
        body = b"".join(parts)
        return b"".join((FRAME_ID_TAG, varint(frame_id), STEP_TAG, varint(len(body)), body))

    def accept(self, response: sessions_pb2.StepStreamResponse) -> Part:
        """See `Frame.accept`."""
        revisions, positions = response.revisions, response.positions
        is_plain = self._frame is None and response.last and len(revisions) == len(positions) == 1
        if not is_plain or response.errors or not (response.all_members or response.members[:] == [0]):
            return self._accept_other(response)
        self.round_over = True
        return Part(
            _FIRST,
            np.array(revisions[:], np.uint64),
            np.array(positions[:], np.uint64),
            view_all(response.outputs),
            {},
            view_all(response.states),
            response.model_version,
        )

    def _accept_other(self, response: sessions_pb2.StepStreamResponse) -> Part:
        self._frame = self._frame or self._make()
        part = self._frame.accept(response)
        self.round_over = self._frame.round_over
        return part

    def fail_retryable(self) -> Part:
        """See `Frame.fail_retryable`."""
        return _NONE if self._frame is None else self._frame.fail_retryable()
