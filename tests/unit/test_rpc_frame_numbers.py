"""One number for all sessions of a frame, in requests and answers."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from stepwell.v1 import sessions_pb2 as pb
from support.rpc.streams import Streams, message, parsed, streams

IDS = ("a", "b", "c")
ONE = np.ones((3, 2), np.float32)


def frame(frame_id: int, *session_ids: str, **fields: Any) -> bytes:
    return message(frame_id, *(session_ids or IDS), x=ONE, **fields)


def reset(frame_id: int, **fields: Any) -> bytes:
    body = pb.ResetFrame(session_ids=IDS, **fields)
    raw: bytes = pb.StepStreamRequest(frame_id=frame_id, reset=body).SerializeToString()
    return raw


async def answers(at: Streams, *frames: bytes) -> list[pb.StepStreamResponse]:
    at.send(*frames)
    return parsed(await at.done())


async def test_a_frame_with_one_number_for_all_is_answered_with_one_for_all() -> None:
    async with streams() as at:
        await at.at.open(*IDS)
        first, second, third, fourth = await answers(
            at,
            frame(1, expected_revision=0, batch_size=1),
            frame(2, expected_revision=1, request_id_base=2**64 - 3),
            reset(3, expected_revision=2, request_id_base=7),
            message(4, "b", x=ONE[:1]),
        )
        (fifth,) = await answers(at, frame(5, expected_revisions=[3, 4, 3], request_id_base=20))
        for reply in (first, second, third, fifth):
            assert reply.all_members
            assert not reply.members
            assert not reply.errors
        assert (first.revision, second.revision, third.revision) == (1, 2, 3)
        assert (first.position, second.position, third.position) == (1, 2, 0)
        assert not second.revisions
        assert not second.positions
        assert third.HasField("position")
        assert (list(fifth.revisions), list(fifth.positions)) == ([4, 5, 4], [1, 2, 1]), "they differ"
        assert not fifth.HasField("revision")
        assert (list(fourth.revisions), fourth.HasField("revision")) == ([4], False), "it has no such number"
        again = await answers(at, frame(6, expected_revision=3, request_id_base=9))
        failed = {member for part in again for error in part.errors for member in error.members or range(3)}
        assert failed == {0, 1, 2}
        (repeated,) = await answers(at, frame(7, expected_revisions=[3, 4, 3], request_id_base=20))
        assert list(repeated.replayed_members) == [0, 1, 2], (
            "each request id is greater by 1 than the one before"
        )


async def test_consecutive_members_are_sent_as_a_range() -> None:
    async with streams() as at:
        await at.at.open("a", "b")
        failed, applied = await answers(at, frame(1, expected_revision=0))
        assert list(failed.errors[0].members) == [2]
        assert (applied.first_member, applied.member_count, list(applied.members)) == (0, 2, [])
        await at.at.engine.close_session("b")
        await at.at.open("c")
        _, applied = await answers(at, frame(2, request_id_base=5))
        assert list(applied.members) == [0, 2], "members that do not follow one another are listed"
        assert applied.member_count == 0


REFUSED: dict[str, tuple[bytes, str]] = {
    "revisions twice": (
        frame(9, expected_revision=0, expected_revisions=[1, 1, 1]),
        "expected_revisions must be left out with expected_revision; got 3 of them",
    ),
    "sizes twice": (
        frame(9, batch_size=1, batch_sizes=[1, 1, 1]),
        "batch_sizes must be left out with batch_size; got 3 of them",
    ),
    "sizes twice for a reset": (
        reset(9, batch_size=1, batch_sizes=[1, 1, 1]),
        "batch_sizes must be left out with batch_size; got 3 of them",
    ),
    "request ids twice": (
        frame(9, request_id_base=1, request_ids=[1, 2, 3]),
        "request_ids must be left out with request_id_base; got 3 of them",
    ),
    "request ids too large": (
        frame(9, request_id_base=2**64 - 2),
        f"request_id_base must be at most 2**64 - 3, to give 3 sessions an id each; got {2**64 - 2}",
    ),
    "revisions of others": (
        frame(9, expected_revisions=[1]),
        "expected_revisions must be empty or have one entry per session (3); got 1",
    ),
    "revisions twice for a reset": (
        reset(9, expected_revision=0, expected_revisions=[1, 1, 1]),
        "expected_revisions must be left out with expected_revision; got 3 of them",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
async def test_contradictory_frames_are_refused_and_change_nothing(case: str) -> None:
    raw, message_ = REFUSED[case]
    async with streams() as at:
        await at.at.open(*IDS)
        _, refused, good = await answers(
            at, frame(1, expected_revision=0), raw, frame(10, expected_revision=1)
        )
        (error,) = refused.errors
        assert not error.members
        assert (error.error.reason, error.error.message) == ("INVALID_INPUT", message_)
        assert good.revision == 2
