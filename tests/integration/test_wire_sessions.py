"""Sessions come, are shared, forked, listed, and go: as a client sees it."""

from __future__ import annotations

import numpy as np

import stepwell
from stepwell.v1 import sessions_pb2
from support.servers.served import Served

X = np.random.default_rng(5).standard_normal((1, 3, 3)).astype(np.float32)


def test_a_named_session_outlives_its_connection(served: Served) -> None:
    known, _ = served.client.predict("seq", np.concatenate([X, X], 1))
    with (
        stepwell.connect(served.address) as client,
        client.open_session("seq", session_id="user-42") as session,
    ):
        first, revision = session.step(X), session.revision
    with stepwell.connect(served.address) as client:
        session = client.open_session("seq", session_id="user-42")
        assert (session.revision, session.position) == (revision, 3)
        second = session.step(X)
        session.close()
    assert np.concatenate([np.asarray(first), np.asarray(second)], 1).tobytes() == np.asarray(known).tobytes()


def test_an_initial_state_is_not_used_when_a_session_is_resumed(served: Served) -> None:
    with served.session("seq") as session_id, served.nothing_changes(session_id):
        ones = {name: np.ones((1, 8)) for name in ("lstm/h", "lstm/c")}
        resumed = served.client.open_session("seq", session_id=session_id, state=ones)
        assert resumed.revision == 1


def test_a_state_is_a_value(served: Served) -> None:
    with served.client.open_session("multi") as one, served.client.open_session("multi") as other:
        inputs = served.draw("multi", 1, 4)
        one.step(inputs)
        state = one.get_state()
        other.reset_states(state)
        assert other.position == 0
        answers = [session.step(inputs) for session in (one, other)]
        assert all(isinstance(answer, dict) for answer in answers)
        first, second = (dict(answer) for answer in answers)
        assert {name: array.tobytes() for name, array in first.items()} == {
            name: array.tobytes() for name, array in second.items()
        }
        one.reset_states(list(state.values()))
        assert one.get_state() == state


def test_sessions_are_listed_in_the_order_of_their_ids_page_by_page(served: Served) -> None:
    ids = sorted([*(f"list-{i:03}" for i in range(25)), "list-", "list-Ä", "list-日本", "list-~"])
    served.client.open_sessions("gru", len(ids) - 1, session_ids=ids[1:])
    served.client.open_session("seq", session_id=ids[0])
    try:
        assert [info.session_id for info in served.client.sessions(prefix="list-")] == ids
        assert [info.session_id for info in served.client.sessions(model="gru", prefix="list-")] == ids[1:]
        assert served.client.sessions(model="last", prefix="list-") == []
        request = sessions_pb2.ListSessionsRequest(session_id_prefix="list-", page_size=7)
        seen: list[str] = []
        for length in (7, 7, 7, 7, 1):
            page = served.wire.sessions.ListSessions(request, timeout=200)
            assert (len(page.sessions), page.total) == (length, len(ids))
            seen += [session.session_id for session in page.sessions]
            assert bool(page.next_page_token) is (len(seen) < len(ids))
            request.page_token = page.next_page_token
        assert seen == ids
    finally:
        served.wire.close(*ids)
