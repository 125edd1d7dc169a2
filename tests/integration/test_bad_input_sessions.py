"""Names of nothing, ids that are none, revisions of another time: refused, and nothing changes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from stepwell.v1 import models_pb2, sessions_pb2
from support import wire
from support.served import Served
from support.wire import tensor

X = [tensor(np.ones((1, 3), np.float32))]
RULE = "must be 1 to 256 printable characters without leading or trailing space; got "
pb = sessions_pb2

BAD_IDS = {
    "10,000 characters": ("x" * 10_000, "10000 characters, 'xxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxx'..."),
    "257 characters": ("ä" * 257, "257 characters"),
    "a line break": ("user\n42", r"'user\n42'"),
    "a NUL": ("user\0", r"'user\x00'"),
    "an escape": ("\x1b[31muser", r"'\x1b[31muser'"),
    "a delete": ("user\x7f", r"'user\x7f'"),
    "a turned text": ("user\u202e42", r"'user\u202e42'"),
    "space before": (" user", "' user'"),
    "space after": ("user ", "'user '"),
    "only space": (" ", "' '"),
    "a wide space after": ("user\u3000", r"'user\u3000'"),
}
GOOD_IDS = ["0", "00", "a", "x" * 256, "user 42", "Jürgen/42", "日本", "🙂", "%s{}\\", "s-0"]


def count(served: Served) -> int:
    return served.wire.sessions.ListSessions(pb.ListSessionsRequest(page_size=1), timeout=200).total


@pytest.mark.parametrize("name", BAD_IDS)
def test_what_is_no_id_opens_nothing(served: Served, name: str) -> None:
    bad, shown = BAD_IDS[name]
    with served.session("seq") as session_id, served.nothing_changes(session_id):
        before = count(served)
        opened = served.wire.refused("OpenSession", pb.OpenSessionRequest(model="seq", session_id=bad))
        opened.expect("INVALID_ARGUMENT", "INVALID_INPUT", "session_id " + RULE, shown)
        many = pb.OpenSessionsRequest(model="seq", session_ids=["fine", bad])
        served.wire.refused("OpenSessions", many).expect(
            "INVALID_ARGUMENT", "INVALID_INPUT", "session_ids " + RULE, shown
        )
        fork = pb.ForkSessionRequest(session_id=session_id, new_session_id=bad)
        served.wire.refused("ForkSession", fork).expect(
            "INVALID_ARGUMENT", "INVALID_INPUT", "new_session_id " + RULE, shown
        )
        assert count(served) == before


def test_no_id_among_several_opens_nothing(served: Served) -> None:
    with served.nothing_changes():
        request = pb.OpenSessionsRequest(model="seq", session_ids=["fine", ""])
        served.wire.refused("OpenSessions", request).expect(
            "INVALID_ARGUMENT", "INVALID_INPUT", "session_ids " + RULE, "''"
        )


@pytest.mark.parametrize("session_id", GOOD_IDS)
def test_what_is_an_id_is_taken_as_it_is(served: Served, session_id: str) -> None:
    assert served.wire.open("seq", session_id) == session_id
    assert served.wire.step(session_id, X).revision == 1
    assert served.wire.state(session_id).session.session_id == session_id
    served.wire.close(session_id)


CALLS_BY_ID: dict[str, Callable[[str], Any]] = {
    "Step": lambda one: pb.StepRequest(session_id=one, inputs=X),
    "ResetStates": lambda one: pb.ResetStatesRequest(session_id=one),
    "GetState": lambda one: pb.GetStateRequest(session_id=one),
    "GetSession": lambda one: pb.GetSessionRequest(session_id=one),
    "CloseSession": lambda one: pb.CloseSessionRequest(session_id=one),
    "ForkSession": lambda one: pb.ForkSessionRequest(session_id=one),
}


@pytest.mark.parametrize("rpc", CALLS_BY_ID)
@pytest.mark.parametrize(
    ("session_id", "shown"),
    [
        pytest.param("nobody", "'nobody'", id="unknown"),
        *[pytest.param(*BAD_IDS[name], id=name) for name in BAD_IDS],
    ],
)
def test_a_session_that_is_not_there(served: Served, rpc: str, session_id: str, shown: str) -> None:
    refused = served.wire.refused(rpc, CALLS_BY_ID[rpc](session_id))
    refused.expect(
        "NOT_FOUND", "SESSION_NOT_FOUND", "session_id must be that of an open session; got " + shown
    )
    assert refused.metadata["session_id"] == session_id[:256]


@pytest.mark.parametrize("rpc", CALLS_BY_ID)
def test_an_id_that_is_missing_is_the_callers_mistake(served: Served, rpc: str) -> None:
    """Left out or misspelt, it arrives as empty: no session has ended, and none is to be opened anew."""
    with served.nothing_changes():
        refused = served.wire.refused(rpc, CALLS_BY_ID[rpc](""))
        refused.expect("INVALID_ARGUMENT", "INVALID_INPUT", "session_id is missing; ")


def test_an_id_that_is_missing_closes_none(served: Served) -> None:
    with served.session("seq") as session_id, served.nothing_changes(session_id):
        request = pb.CloseSessionsRequest(session_ids=[session_id, ""])
        served.wire.refused("CloseSessions", request).expect(
            "INVALID_ARGUMENT", "INVALID_INPUT", "session_ids must be ids of sessions; one of them is missing"
        )


@pytest.mark.parametrize("rpc", CALLS_BY_ID)
def test_a_session_that_was_closed(served: Served, rpc: str) -> None:
    session_id = served.wire.open("seq")
    served.wire.close(session_id)
    with served.nothing_changes():
        refused = served.wire.refused(rpc, CALLS_BY_ID[rpc](session_id))
        refused.expect("NOT_FOUND", "SESSION_NOT_FOUND", session_id)


UNKNOWN = "model must be one of ['gru', 'last', 'masked', 'multi', 'seq', 'tokens']; got "


@pytest.mark.parametrize("model", ["nothing", "", "SEQ", "seq ", "x" * 10_000, "a\nb"])
@pytest.mark.parametrize(
    ("rpc", "make"),
    [
        ("OpenSession", lambda model: pb.OpenSessionRequest(model=model)),
        ("OpenSessions", lambda model: pb.OpenSessionsRequest(model=model, count=2)),
        ("GetModel", lambda model: models_pb2.GetModelRequest(name=model)),
        ("Predict", lambda model: models_pb2.PredictRequest(model=model, inputs=X)),
        ("ListSessions", lambda model: pb.ListSessionsRequest(model=model)),
    ],
)
def test_a_model_that_is_not_there(served: Served, rpc: str, make: Any, model: str) -> None:
    if rpc == "ListSessions" and not model:
        return  # of all models
    refused = served.wire.refused(rpc, make(model))
    refused.expect("NOT_FOUND", "MODEL_NOT_FOUND", UNKNOWN + repr(model)[:100])


OPENINGS: dict[str, tuple[Any, tuple[str, ...]]] = {
    "another fingerprint": (
        pb.OpenSessionRequest(model="seq", model_fingerprint="f00d"),
        (
            "FAILED_PRECONDITION",
            "MODEL_MISMATCH",
            "model_fingerprint must be that of model 'seq'",
            "got f00d",
        ),
    ),
    "more rows than there are": (
        pb.OpenSessionRequest(model="seq", batch_size=65_537),
        ("INVALID_ARGUMENT", "INVALID_INPUT", "batch_size must be 1 to resident_rows, 65536; got 65537"),
    ),
    "the most rows of all": (
        pb.OpenSessionRequest(model="seq", batch_size=2**32 - 1),
        ("INVALID_ARGUMENT", "INVALID_INPUT", "batch_size must be 1 to resident_rows, 65536; got 4294967295"),
    ),
    "no count": (
        pb.OpenSessionsRequest(model="seq"),
        ("INVALID_ARGUMENT", "INVALID_INPUT", "count must be 1 to 65536; got 0"),
    ),
    "too large a count": (
        pb.OpenSessionsRequest(model="seq", count=65_537),
        ("INVALID_ARGUMENT", "INVALID_INPUT", "count must be 1 to 65536; got 65537"),
    ),
    "another count than ids": (
        pb.OpenSessionsRequest(model="seq", count=3, session_ids=["fine", "good"]),
        ("INVALID_ARGUMENT", "INVALID_INPUT", "count must be 0 or the number of session_ids, 2; got 3"),
    ),
    "an id twice": (
        pb.OpenSessionsRequest(model="seq", session_ids=["fine", "good", "fine"]),
        ("INVALID_ARGUMENT", "INVALID_INPUT", "session_ids must be different from each other; got"),
    ),
    "an id in use among several": (
        pb.OpenSessionsRequest(model="seq", session_ids=["fine", "in use"]),
        ("ALREADY_EXISTS", "SESSION_EXISTS", "session_ids must be new; session 'in use' is open"),
    ),
    "an id in use that must be new": (
        pb.OpenSessionRequest(model="seq", session_id="in use", must_be_new=True, request_id=5),
        ("ALREADY_EXISTS", "SESSION_EXISTS", "session_id must be new; session 'in use' is open"),
    ),
    "an id in use with other rows": (
        pb.OpenSessionRequest(model="seq", session_id="in use", batch_size=2),
        ("ALREADY_EXISTS", "SESSION_EXISTS", "is open with model 'seq' and batch_size 1", "batch_size 2"),
    ),
    "an id in use with another model": (
        pb.OpenSessionRequest(model="gru", session_id="in use"),
        ("ALREADY_EXISTS", "SESSION_EXISTS", "is open with model 'seq' and batch_size 1; got model 'gru'"),
    ),
    "a fork onto itself": (
        pb.ForkSessionRequest(session_id="in use", new_session_id="in use"),
        ("ALREADY_EXISTS", "SESSION_EXISTS", "new_session_id must be new; session 'in use' is open"),
    ),
    "a fork of another revision": (
        pb.ForkSessionRequest(session_id="in use", expected_revision=2**40),
        (
            "ABORTED",
            "REVISION_CONFLICT",
            "expected_revision of session 'in use' must be its revision ",
        ),
    ),
    "a page that is too large": (
        pb.ListSessionsRequest(page_size=10_001),
        ("INVALID_ARGUMENT", "INVALID_INPUT", "page_size must be at most 10000; got 10001"),
    ),
    "too many to close": (
        pb.CloseSessionsRequest(session_ids=["nobody"] * 65_537),
        ("INVALID_ARGUMENT", "INVALID_INPUT", "session_ids must be at most 65536; got 65537"),
    ),
}


@pytest.mark.parametrize("name", OPENINGS)
def test_what_opens_nothing(served: Served, name: str) -> None:
    request, expected = OPENINGS[name]
    served.wire.open("seq", "in use")
    try:
        served.wire.step("in use", X)
        with served.nothing_changes("in use"):
            before = count(served)
            rpc = type(request).__name__.removesuffix("Request")
            served.wire.refused(rpc, request).expect(*expected)
            assert count(served) == before
    finally:
        served.wire.close("in use")


# The session is at revision 3; its last change had request id 33.
REVISIONS: dict[str, dict[str, Any]] = {
    "stale": {"expected_revision": 1, "request_id": 5},
    "stale, with the last request id": {"expected_revision": 1, "request_id": 33},
    "the last one with another request id": {"expected_revision": 2, "request_id": 34},
    "the last one with an older request id": {"expected_revision": 2, "request_id": 32},
    "the last one without a request id": {"expected_revision": 2},
    "of the future": {"expected_revision": 4, "request_id": 5},
    "of the future, with the last request id": {"expected_revision": 4, "request_id": 33},
    "of the end of days": {"expected_revision": 2**64 - 1, "request_id": 33},
    "the first": {"expected_revision": 0, "request_id": 5},
}


@pytest.mark.parametrize("change", ["Step", "ResetStates", "step frame", "reset frame"])
@pytest.mark.parametrize("name", REVISIONS)
def test_a_revision_of_another_time(served: Served, name: str, change: str) -> None:
    fields = REVISIONS[name]
    with served.session("seq", steps=0) as session_id:
        for revision in range(3):
            served.wire.step(session_id, X, expected_revision=revision, request_id=31 + revision)
        in_frame: dict[str, Any] = {
            "expected_revisions": [fields["expected_revision"]],
            "request_ids": [fields["request_id"]] if "request_id" in fields else [],
        }
        with served.nothing_changes(session_id):
            if change == "Step":
                refused = served.wire.refused(
                    change, pb.StepRequest(session_id=session_id, inputs=X, **fields)
                )
            elif change == "ResetStates":
                refused = served.wire.refused(change, pb.ResetStatesRequest(session_id=session_id, **fields))
            elif change == "step frame":
                refused = wire.of_members(
                    served.wire.exchange(wire.step_frame(1, [session_id], X, **in_frame)), 1
                )[0]
            else:
                refused = wire.of_members(
                    served.wire.exchange(wire.reset_frame(1, [session_id], **in_frame)), 1
                )[0]
            refused.expect(
                "ABORTED", "REVISION_CONFLICT", f"must be its revision 3; got {fields['expected_revision']}"
            )
            assert refused.metadata == {
                "session_id": session_id,
                "expected_revision": str(fields["expected_revision"]),
                "actual_revision": "3",
            }


def test_outputs_that_are_no_selection(served: Served) -> None:
    with served.session("seq") as session_id, served.nothing_changes(session_id):
        request = pb.StepRequest(session_id=session_id, inputs=X)
        request.outputs = 4  # type: ignore[assignment]
        served.wire.refused("Step", request).expect(
            "INVALID_ARGUMENT", "INVALID_INPUT", "outputs must be one of stepwell.v1.OutputSelection; got 4"
        )
