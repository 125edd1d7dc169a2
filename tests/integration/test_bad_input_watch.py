"""The watch of `support.servers.served` itself: it must notice what it is there to notice."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest

from support.peers import wire
from support.peers.wire import tensor
from support.servers.served import Served

X = [tensor(np.ones((2, 3), np.float32))]
CHANGES: dict[str, Callable[[Served, str], object]] = {
    "a step": lambda served, one: served.wire.step(one, X),
    "a frame": lambda served, one: served.wire.exchange(wire.step_frame(1, [one], X)),
    "a reset": lambda served, one: served.wire.reset(one),
    "a reset of a row": lambda served, one: served.wire.reset(one, rows=[1]),
    "a reset to the state it has": lambda served, one: served.wire.reset(
        one, state=served.wire.state(one).state
    ),
}


@pytest.mark.parametrize("name", CHANGES)
def test_a_change_is_noticed(served: Served, name: str) -> None:
    with (
        served.session("seq", 2) as session_id,
        pytest.raises(AssertionError),
        served.nothing_changes(session_id),
    ):
        CHANGES[name](served, session_id)


def test_a_session_that_is_gone_is_noticed(served: Served) -> None:
    session_id = served.wire.open("seq")
    refused = wire.refusal(lambda: _closed(served, session_id))
    refused.expect("NOT_FOUND", "SESSION_NOT_FOUND", session_id)


def _closed(served: Served, session_id: str) -> None:
    with served.nothing_changes(session_id):
        served.wire.close(session_id)


def test_nothing_is_noticed_where_nothing_changes(served: Served) -> None:
    with served.session("seq") as session_id, served.nothing_changes(session_id):
        served.wire.state(session_id)
        served.wire.session(session_id)
