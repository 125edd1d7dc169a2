"""A change that is sent again is applied once and answered with the first answer, however it is sent."""

from __future__ import annotations

from typing import Any

import grpc
import numpy as np
import pytest

from stepwell.v1 import sessions_pb2
from support import secured
from support.peers import wire
from support.peers.wire import Wire, tensor
from support.servers.served import Served

pb = sessions_pb2
X = np.random.default_rng(3).standard_normal((1, 4, 3)).astype(np.float32)
SELECTIONS = [pb.OUTPUT_SELECTION_ALL, pb.OUTPUT_SELECTION_LAST, pb.OUTPUT_SELECTION_NONE]


@pytest.fixture(params=["served", "served_secured"])
def either(request: pytest.FixtureRequest) -> Served:
    """Also with TLS and tokens: a sample of what `make soak` does with all tests of the wire."""
    found: Served = request.getfixturevalue(request.param)
    return found


@pytest.mark.parametrize("x", [X[:, 0], X[:, :1], X], ids=["one step", "T = 1", "T = 4"])
@pytest.mark.parametrize("outputs", SELECTIONS)
@pytest.mark.parametrize("states", [pb.STATE_SELECTION_NONE, pb.STATE_SELECTION_ALL])
@pytest.mark.parametrize("model", ["seq", "last"])
def test_a_step_that_is_sent_again(either: Served, model: str, states: Any, outputs: Any, x: Any) -> None:
    request: dict[str, Any] = {
        "inputs": [tensor(x)],
        "expected_revision": 1,
        "request_id": 2**64 - 1,
        "outputs": outputs,
        "states": states,
    }
    with either.session(model) as session_id:
        first = either.wire.step(session_id, **request)
        state = either.wire.state(session_id)
        with Wire(either.address) as other:  # a retry may come by another connection
            for _ in range(3):
                again = other.step(session_id, **request)
                assert (first.replayed, again.replayed) == (False, True)
                again.replayed = False
                assert again.SerializeToString(deterministic=True) == first.SerializeToString(
                    deterministic=True
                )
        assert wire.data(either.wire.state(session_id).state) == wire.data(state.state)
        assert either.wire.session(session_id).revision == 2


def test_members_of_a_frame_that_is_sent_again(either: Served) -> None:
    """Some of them have had it, some have not: each is applied once."""
    ids = either.wire.open_many("seq", 5)
    x = either.draw("seq", 5, 2)["x"]
    fields: dict[str, Any] = {"expected_revisions": [0] * 5, "request_ids": [11, 12, 13, 14, 15]}
    known = [either.wire.predict("seq", [tensor(x[i : i + 1])]).outputs[0].data for i in range(5)]
    for i in (1, 4):
        one = either.wire.step(ids[i], [tensor(x[i : i + 1])], expected_revision=0, request_id=11 + i)
        assert one.outputs[0].data == known[i]
    for replayed in ({1, 4}, {0, 1, 2, 3, 4}):
        answers = either.wire.exchange(wire.step_frame(1, ids, [tensor(x)], **fields))
        assert not wire.of_members(answers, 5)
        assert {member for answer in answers for member in answer.replayed_members} == replayed
        assert [found["y"].tobytes() for _, found in sorted(wire.rows_of(answers, [1] * 5).items())] == known
        assert [one.revision for one in map(either.wire.session, ids)] == [1] * 5
    either.wire.close(*ids)


@pytest.mark.parametrize("steps", [0, 2_000])
def test_the_same_request_many_times_at_once(either: Served, steps: int) -> None:
    with either.session("seq") as session_id:
        request = pb.StepRequest(
            session_id=session_id,
            inputs=wire.tensors(either.draw("seq", 1, steps)),
            expected_revision=1,
            request_id=77,
        )
        calls = [either.wire.sessions.Step.future(request, timeout=200) for _ in range(20)]
        answers = [call.result() for call in calls]
        assert sorted(answer.replayed for answer in answers) == [False] + [True] * 19
        assert {(answer.revision, answer.outputs[0].data) for answer in answers} == {
            (2, answers[0].outputs[0].data)
        }


def test_a_closing_that_is_sent_again_leaves_what_was_opened_since(either: Served) -> None:
    raw = either.wire.sessions
    opening = pb.OpenSessionRequest(model="seq", session_id="user-42")
    closing = pb.CloseSessionRequest(session_id="user-42", request_id=30)
    first = raw.OpenSession(opening, timeout=200).session
    assert not raw.CloseSession(closing, timeout=200).replayed
    second = raw.OpenSession(opening, timeout=200).session
    either.wire.step("user-42", [tensor(X)])
    assert first.uid != second.uid
    assert raw.CloseSession(closing, timeout=200).replayed
    with pytest.raises(grpc.RpcError) as caught:
        raw.CloseSession(
            pb.CloseSessionRequest(session_id="user-42", request_id=31, uid=first.uid), timeout=200
        )
    assert caught.value.code() is grpc.StatusCode.NOT_FOUND
    assert (
        raw.CloseSessions(
            pb.CloseSessionsRequest(session_ids=["user-42"], uids=[first.uid]), timeout=200
        ).closed
        == 0
    )
    assert either.wire.session("user-42").revision == second.revision + 1
    many = pb.CloseSessionsRequest(session_ids=["user-42", "never"], request_id=32, uids=[second.uid])
    assert raw.CloseSessions(many, timeout=200).closed == 1
    raw.OpenSession(opening, timeout=200)
    assert raw.CloseSessions(many, timeout=200).closed == 1
    matching = pb.CloseMatchingSessionsRequest(session_id_prefix="user-42", request_id=32)
    raw.CloseMatchingSessions(matching, timeout=200)
    assert either.wire.session("user-42").uid != second.uid
    either.wire.close("user-42")


def test_the_secured_server_is_secured(served_secured: Served) -> None:
    """The harness does what its switch says: otherwise the sample here, and all that `make soak` does with it, is none."""
    address = served_secured.address

    def ask(channel: Any) -> object:
        return channel.unary_unary("/stepwell.v1.ModelService/ListModels")(b"", timeout=wire.TIMEOUT_S)

    plain = grpc.insecure_channel(secured.host_and_port(address))
    with plain, secured.channel(address, token=False) as nobody, secured.channel(address) as known:
        for channel, code in ((plain, "UNAVAILABLE"), (nobody, "UNAUTHENTICATED")):
            with pytest.raises(grpc.RpcError) as refused:
                ask(channel)
            assert refused.value.code().name == code
        assert ask(known)
