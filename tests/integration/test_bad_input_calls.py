"""One refusal of each call, over the wire and by each front: its status, reason, message and details; nothing changes.

Which rules there are, and what each says, is in the one table of refusals, `tests/unit/test_refusals*`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest

from stepwell.v1 import models_pb2
from stepwell.v1 import sessions_pb2 as pb
from support.peers import wire
from support.peers.wire import Refusal, tensor
from support.servers.served import VOCABULARY, Served, serve

X = [tensor(np.ones((2, 3), np.float32))]
#: What a status must not be broken by, and a message must show as it is.
ODD = "\x1b[31m\u202eJürgen %42\0 日本\n"


def nan() -> Any:
    array = np.ones((2, 3), np.float32)
    array[1, 1] = np.nan
    return tensor(array)


INPUT = ("INVALID_ARGUMENT", "INVALID_INPUT")
#: The request, and status, reason and words; it is given a session of two rows at revision 1. Another is "in use".
CALLS: dict[str, tuple[Callable[[str], Any], tuple[str, ...]]] = {
    "Step": (
        lambda one: pb.StepRequest(session_id=one, inputs=[nan()], request_id=1),
        (*INPUT, "input 'x' must hold finite numbers within float32's range; got nan at index [1, 1]"),
    ),
    "ResetStates": (
        lambda one: pb.ResetStatesRequest(session_id=one, rows=[0, 2]),
        (*INPUT, "rows must be within 0 to 1; got 2"),
    ),
    "GetState": (
        lambda _: pb.GetStateRequest(session_id=ODD),
        ("NOT_FOUND", "SESSION_NOT_FOUND", f"that of an open session; got {ODD!r}"),
    ),
    "GetSession": (
        lambda _: pb.GetSessionRequest(session_id="x" * 1_000),
        ("NOT_FOUND", "SESSION_NOT_FOUND", "that of an open session; got 1000 characters, 'xxx"),
    ),
    "CloseSession": (
        lambda _: pb.CloseSessionRequest(session_id=""),
        (*INPUT, "session_id must be that of an open session; got none"),
    ),
    "CloseSessions": (
        lambda one: pb.CloseSessionsRequest(session_ids=[one, ""]),
        (*INPUT, "session_ids must not be empty strings; got one"),
    ),
    "ForkSession": (
        lambda one: pb.ForkSessionRequest(session_id=one, expected_revision=2**64 - 1),
        ("ABORTED", "REVISION_CONFLICT", f"must be its revision 1; got {2**64 - 1}"),
    ),
    "GetStates": (
        lambda one: pb.GetStatesRequest(session_ids=[one, "in use", one]),
        (*INPUT, "session_ids must name each session once; '", "' came twice"),
    ),
    "ForkSessions": (
        lambda one: pb.ForkSessionsRequest(session_ids=[one, one], new_session_ids=["fine", "in use"]),
        ("ALREADY_EXISTS", "SESSION_EXISTS", "new_session_ids must be new; session 'in use' is open"),
    ),
    "OpenSession": (
        lambda _: pb.OpenSessionRequest(model="seq", model_fingerprint="f00d"),
        ("FAILED_PRECONDITION", "MODEL_MISMATCH", "model_fingerprint must be that of model 'seq'"),
    ),
    "OpenSessions": (
        lambda _: pb.OpenSessionsRequest(model="seq", session_ids=["fine", "in use"]),
        ("ALREADY_EXISTS", "SESSION_EXISTS", "session_ids must be new; session 'in use' is open"),
    ),
    "ListSessions": (
        lambda _: pb.ListSessionsRequest(page_size=10_001),
        (*INPUT, "page_size must be at most 10000; got 10001"),
    ),
    "CloseMatchingSessions": (
        lambda _: pb.CloseMatchingSessionsRequest(),
        (*INPUT, "all must be true without model, session_id_prefix and idle_longer"),
    ),
    "ExportSessions": (
        lambda session_id: pb.ExportSessionsRequest(session_ids=[session_id], model="seq"),
        (*INPUT, "session_ids must be empty with model"),
    ),
    "ImportSessions": (
        lambda _: pb.ImportSessionsRequest(sessions=[pb.ExportedSession(session_id="a")] * 2),
        (*INPUT, "sessions must not repeat an id; got one twice"),
    ),
    "GetModel": (
        lambda _: models_pb2.GetModelRequest(name="SEQ"),
        ("NOT_FOUND", "MODEL_NOT_FOUND", "model must be one of ['gru', 'last', ", "got 'SEQ'"),
    ),
    "Predict": (
        lambda _: models_pb2.PredictRequest(model="tokens", inputs=[tensor(np.array([1, VOCABULARY]))]),
        (*INPUT, "inputs must be ones that the model can run"),
    ),
    "ListSlowSessions": (
        lambda _: models_pb2.ListSlowSessionsRequest(limit=101),
        (*INPUT, "limit must be at most 100; got 101"),
    ),
    "UnloadModel": (
        lambda _: models_pb2.UnloadModelRequest(name="seq", version=1),
        (
            "FAILED_PRECONDITION",
            "MODEL_IN_USE",
            "version 1 of model 'seq' must have no sessions to be unloaded",
        ),
    ),
    "SetDefault": (
        lambda _: models_pb2.SetDefaultRequest(name="seq", version=2),
        (
            "NOT_FOUND",
            "MODEL_VERSION_NOT_FOUND",
            "version of model 'seq' must be one that is loaded, [1]; got 2",
        ),
    ),
    "SetLabel": (
        lambda _: models_pb2.SetLabelRequest(name="seq", label=ODD, version=1),
        (*INPUT, "label must be 1 to 64 letters, digits, _, - or ., not digits alone; got "),
    ),
}


@pytest.fixture(scope="module", params=["served", "python"])
def server(request: pytest.FixtureRequest) -> Iterator[Served]:
    """The server of the run, which has the native front where that was built, and one with the front in Python."""
    if request.param == "served":
        yield request.getfixturevalue("served")
    else:
        with serve("--front", "python") as python:
            yield python


def sessions(served: Served) -> int:
    return served.wire.sessions.ListSessions(pb.ListSessionsRequest(page_size=1), timeout=200).total


def test_every_call_that_takes_an_argument_is_in_the_table() -> None:
    services = (
        pb.DESCRIPTOR.services_by_name["SessionService"],
        models_pb2.DESCRIPTOR.services_by_name["ModelService"],
        models_pb2.DESCRIPTOR.services_by_name["ModelAdminService"],
    )
    names = {method.name for service in services for method in service.methods if method.input_type.fields}
    # streams: see below, and test_models_live
    assert names == {*CALLS, "StepStream", "LoadModel", "UploadModel"}


@pytest.mark.parametrize("name", CALLS)
def test_a_call(server: Served, name: str) -> None:
    make, expected = CALLS[name]
    in_use = server.wire.open("seq", "in use")
    with server.session("seq", 2) as session_id, server.nothing_changes(session_id, in_use):
        before = sessions(server)
        refused = server.wire.refused(name, make(session_id))
        refused.expect(*expected)
        if refused.reason == "REVISION_CONFLICT":
            assert refused.metadata == {
                "session_id": session_id,
                "expected_revision": str(2**64 - 1),
                "actual_revision": "1",
            }
        assert sessions(server) == before
    server.wire.close(in_use)


def test_frames(server: Served) -> None:
    """One of steps and one of resets that are refused, and one that is none, harm no other of their stream."""
    with server.session("seq", 2) as one, server.session("seq", 2) as other, server.nothing_changes(one):
        inputs = server.draw("seq", 2, 1)
        known = wire.data(server.predicted(other, inputs))
        answers = server.wire.exchange(
            wire.step_frame(1, [one, one], X),
            wire.reset_frame(2, [one], batch_sizes=[0]),
            pb.StepStreamRequest(frame_id=2**64 - 1),
            wire.step_frame(4, [other], wire.tensors(inputs)),
        )
        refusals = {
            answer.frame_id: wire.of_members([answer], 1)[0] for answer in answers if answer.frame_id != 4
        }
        assert refusals == {
            1: Refusal(*INPUT, f"session_ids must name each session once; {one!r} came twice"),
            2: Refusal(*INPUT, "batch_sizes must be 1 to 2147483648; got 0"),
            2**64 - 1: Refusal(*INPUT, "change must be step or reset; got neither"),
        }
        assert [wire.data(answer.outputs) for answer in answers if answer.frame_id == 4] == [known]


def test_members_of_a_frame(server: Served) -> None:
    """Each at fault in another way, and one that is not: it is stepped."""
    with server.session("seq") as stale, server.session("seq", 2) as wrong, server.session("seq", 2) as good:
        inputs = server.draw("seq", 6, 2)
        known = wire.data(server.predicted(good, {name: array[4:] for name, array in inputs.items()}))
        with server.nothing_changes(stale, wrong):
            frame = wire.step_frame(
                1,
                [stale, ODD, wrong, good],
                wire.tensors(inputs),
                batch_sizes=[1, 2, 1, 2],
                expected_revisions=[0, 0, 1, 1],
                request_ids=[5, 6, 7, 8],
            )
            answers = server.wire.exchange(frame)
        refusals = wire.of_members(answers, 4)
        refusals.pop(0).expect("ABORTED", "REVISION_CONFLICT", "must be its revision 1; got 0")
        refusals.pop(1).expect("NOT_FOUND", "SESSION_NOT_FOUND", f"got {ODD!r}")
        refusals.pop(2).expect(*INPUT, "batch_sizes must be the sessions' own;", "has 2, got 1")
        assert not refusals
        found = wire.rows_of(answers, [1, 2, 1, 2])
        assert {name: (array.shape, array.tobytes()) for name, array in found[3].items()} == known
