"""Replies put together from bytes are those that protobuf writes."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from stepwell_server.engine.calls import StepReply
from stepwell_server.rpc.plain import CALL, FRAME, Kind
from stepwell_server.rpc.replyform import ReplyForm

NUMBERS = [0, 1, *(value for n in (7, 14, 21, 35, 63) for value in ((1 << n) - 1, 1 << n)), 2**64 - 1]


def rows(*shape: int, dtype: str = "float32") -> Any:
    return np.random.default_rng(len(shape)).integers(0, 2, (len(NUMBERS), *shape)).astype(dtype)


@pytest.mark.parametrize("kind", [FRAME, CALL], ids=["frame", "call"])
@pytest.mark.parametrize(
    "outputs",
    [
        {},
        {"y": rows(2)},
        {"y": rows(1, 2)},
        {"": rows()},
        {"y": rows(200, 3), "head": rows(dtype="int64"), "flag": rows(3, dtype="bool")},
        {"y": rows(3, 2).swapaxes(1, 2), "half": rows(1, 5, dtype="float16")},
    ],
    ids=range(6),
)
def test_a_reply_has_the_bytes_of_protobuf(kind: Kind, outputs: dict[str, Any]) -> None:
    form = ReplyForm(kind.response, kind.ends, {name: array[:1] for name, array in outputs.items()})
    revisions, positions = NUMBERS[::-1], NUMBERS[3:] + NUMBERS[:3]
    written = form.write(NUMBERS, revisions, positions, list(outputs.values()))
    assert len(written) == len(NUMBERS)
    for i, (frame_id, revision, position) in enumerate(zip(NUMBERS, revisions, positions, strict=True)):
        own = {name: array[i : i + 1] for name, array in outputs.items()}
        wanted = kind.reply(frame_id, StepReply(revision, position, own, replayed=False))
        assert written[i] == wanted
        assert form.write_one(frame_id, revision, position, list(own.values())) == wanted
