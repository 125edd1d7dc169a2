"""Sets of sessions on a stream: declared once, named by a number, bounded, and only those of their stream."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest

from stepwell.v1 import sessions_pb2 as pb
from stepwell_server.rpc.steps import sets as sets_module
from stepwell_server.rpc.steps.sets import SetRoom
from support.streams import Streams, message, parsed, streams

IDS = ("a", "b", "c")
ONE = np.ones((3, 2), np.float32)


def of_set(frame_id: int, number: int, *session_ids: str, x: Any = ONE, **fields: Any) -> bytes:
    return message(frame_id, *session_ids, x=x, session_set=number, **fields)


def reset(frame_id: int, **fields: Any) -> bytes:
    raw: bytes = pb.StepStreamRequest(frame_id=frame_id, reset=pb.ResetFrame(**fields)).SerializeToString()
    return raw


def forget(*numbers: int, raw: bytes) -> bytes:
    request = pb.StepStreamRequest.FromString(raw)
    request.forget_sets.extend(numbers)
    changed: bytes = request.SerializeToString()
    return changed


async def answers(at: Streams, *frames: bytes) -> list[pb.StepStreamResponse]:
    at.send(*frames)
    return parsed(await at.done())


def why(reply: pb.StepStreamResponse) -> tuple[str, str]:
    (error,) = reply.errors
    assert not error.members
    return error.error.reason, error.error.message


def failures(parts: Sequence[pb.StepStreamResponse]) -> dict[int, str]:
    errors = [error for part in parts for error in part.errors]
    return {member: error.error.reason for error in errors for member in error.members}


async def test_frames_of_a_set_are_those_of_its_sessions() -> None:
    async with streams() as at:
        await at.at.open(*IDS)
        declared, second, third, fourth = await answers(
            at,
            message(1, *IDS, x=ONE, declare_set=4, batch_sizes=[1, 1, 1]),
            of_set(2, 4, expected_revision=1, request_id_base=2**64 - 3),
            reset(3, session_set=4, expected_revision=2, request_id_base=7),
            message(4, "b", x=ONE[:1]),
        )
        (fifth,) = await answers(at, of_set(5, 4, expected_revisions=[3, 4, 3]))
        for reply in (declared, second, third, fifth):
            assert reply.all_members
            assert not reply.members
            assert not reply.errors
        assert [reply.declared_set for reply in (declared, second, third, fifth)] == [4, 0, 0, 0]
        assert (declared.revision, second.revision, third.revision) == (1, 2, 3)
        assert (declared.position, second.position, third.position) == (1, 2, 0)
        assert not second.revisions
        assert not second.positions
        assert third.HasField("position")
        # one of them has another revision by now; who names no set is answered as ever
        assert (list(fifth.revisions), list(fifth.positions)) == ([4, 5, 4], [1, 2, 1])
        assert not fifth.HasField("revision")
        assert (list(fourth.revisions), fourth.HasField("revision")) == ([4], False)
        assert list(at.context.sets) == [4]
        again = await answers(at, of_set(6, 4, expected_revision=3, request_id_base=9))
        assert failures(again) == dict.fromkeys(range(3), "REVISION_CONFLICT")


async def test_a_set_holds_ids_and_not_sessions() -> None:
    async with streams() as at:
        await at.at.open("a", "b")
        failed, applied = await answers(at, message(1, *IDS, x=ONE, declare_set=1))
        assert failed.declared_set == applied.declared_set == 1
        assert (applied.first_member, applied.member_count, list(applied.members)) == (0, 2, [])
        await at.at.engine.close_session("a")
        await at.at.open("c")
        gone, applied = await answers(at, of_set(2, 1))
        assert (list(gone.errors[0].members), gone.errors[0].error.reason) == ([0], "SESSION_NOT_FOUND")
        assert (applied.first_member, applied.member_count) == (1, 2)
        assert list(applied.revisions) == [2, 1]
        await at.at.engine.close_session("b")
        parts = await answers(at, of_set(3, 1))
        assert failures(parts) == dict.fromkeys([0, 1], "SESSION_NOT_FOUND")
        await at.at.open("a")
        gone, applied = await answers(at, of_set(4, 1))
        assert list(applied.members) == [0, 2], "members that do not follow one another are listed"
        assert applied.member_count == 0


async def test_all_gone_declares_a_set_too() -> None:
    async with streams() as at:
        gone = await answers(at, message(1, *IDS, x=ONE, declare_set=1))
        assert failures(gone) == dict.fromkeys(range(3), "SESSION_NOT_FOUND")
        assert {part.declared_set for part in gone} == {1}
        await at.at.open(*IDS)
        (reply,) = await answers(at, of_set(2, 1))
        assert reply.revision == 1


REFUSED: dict[str, tuple[bytes, str]] = {
    "ids beside a set": (
        of_set(9, 1, "a"),
        "session_ids must be left out where session_set is given; got 1 of them",
    ),
    "sizes beside a set": (
        of_set(9, 1, batch_sizes=[1, 1, 1]),
        "batch_sizes must be left out where session_set is given; got 3 of them",
    ),
    "a set for a set": (
        of_set(9, 1, declare_set=8),
        "declare_set must be left out where session_set is given; got 8",
    ),
    "revisions twice": (
        of_set(9, 1, expected_revision=0, expected_revisions=[1, 1, 1]),
        "expected_revisions must be left out where expected_revision is given; got 3 of them",
    ),
    "request ids twice": (
        of_set(9, 1, request_id_base=1, request_ids=[1, 2, 3]),
        "request_ids must be left out where request_id_base is given; got 3 of them",
    ),
    "request ids too large": (
        of_set(9, 1, request_id_base=2**64 - 2),
        f"request_id_base must be at most 2**64 - 3, so that 3 sessions have one each; got {2**64 - 2}",
    ),
    "revisions of others": (
        of_set(9, 1, expected_revisions=[1]),
        "expected_revisions must be empty or one per session (3); got 1",
    ),
    "a number again": (
        message(9, "a", declare_set=1),
        "declare_set must be greater than that of every set declared before (1); got 1",
    ),
    "a session twice": (
        message(9, "a", "a", declare_set=2),
        "session_ids must name each session once; 'a' came twice",
    ),
    "a reset of a set and ids": (
        reset(9, session_set=1, session_ids=["a"]),
        "session_ids must be left out where session_set is given; got 1 of them",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
async def test_what_contradicts_itself_is_refused_and_changes_nothing(case: str) -> None:
    raw, message_ = REFUSED[case]
    async with streams() as at:
        await at.at.open(*IDS)
        _, refused, good = await answers(
            at, message(1, *IDS, x=ONE, declare_set=1), raw, of_set(10, 1, expected_revision=1)
        )
        assert why(refused) == ("INVALID_INPUT", message_)
        assert refused.declared_set == 0
        assert good.revision == 2
        assert list(at.context.sets) == [1]


async def test_a_set_that_is_not_known_fails_the_frame_alone() -> None:
    async with streams() as at:
        await at.at.open(*IDS)
        replies = await answers(
            at,
            of_set(1, 5),
            message(2, *IDS, x=ONE, declare_set=5),
            of_set(3, 5),
            forget(5, 77, raw=of_set(4, 5)),
            message(5, *IDS, x=ONE, declare_set=6),
            forget(6, raw=pb.StepStreamRequest(frame_id=6).SerializeToString()),
            of_set(7, 6),
        )
        assert [reply.revision for reply in replies] == [0, 1, 2, 0, 3, 0, 0]
        for reply in (replies[0], replies[3], replies[6]):
            reason, message_ = why(reply)
            assert reason == "SESSION_SET_UNKNOWN"
            assert "session_set must be that of a set which this stream knows" in message_
        assert (replies[5].last, list(replies[5].errors), replies[5].all_members) == (True, [], False)
        assert at.context.sets == {}


async def test_a_stream_has_so_many_sets(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sets_module, "MAX_SETS", 2)
    async with streams() as at:
        await at.at.open(*IDS)
        replies = await answers(
            at,
            *(message(number, *IDS, x=ONE, declare_set=number) for number in (1, 2, 3)),
            of_set(4, 3),
            forget(1, raw=message(5, *IDS, x=ONE, declare_set=5)),
        )
        assert [reply.declared_set for reply in replies] == [1, 2, 0, 0, 5]
        assert why(replies[3])[0] == "SESSION_SET_UNKNOWN"
        assert [reply.revision for reply in replies] == [1, 2, 3, 0, 4], "what declares is done all the same"


async def test_sets_take_so_many_bytes_of_the_server(monkeypatch: pytest.MonkeyPatch) -> None:
    """Those of all streams; they come back when a set is forgotten and when its stream ends."""
    room = SetRoom(limit=1200)
    async with streams(room=room) as at, streams(room=room) as other:
        for one in (at, other):
            await one.at.open(*IDS)
        declaring = [message(number, *IDS, x=ONE, declare_set=number) for number in range(1, 5)]
        assert [reply.declared_set for reply in await answers(at, *declaring[:2])] == [1, 2]
        assert [reply.declared_set for reply in await answers(other, *declaring[:2])] == [1, 0]
        assert room.bytes <= room.limit
        (reply,) = await answers(at, forget(1, raw=declaring[2]))
        assert reply.declared_set == 3
        at.context.half_close()
        await at.turns()
        assert at.stream.is_over
        assert [reply.declared_set for reply in await answers(other, *declaring[2:])] == [3, 4]
        room.limit = 1 << 30
        monkeypatch.setattr(sets_module, "STREAM_BYTES", room.bytes)
        (reply,) = await answers(other, message(9, *IDS, x=ONE, declare_set=9))
        assert reply.declared_set == 0
    assert room.bytes == 0
