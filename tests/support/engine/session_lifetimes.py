"""Shared by tests of the lives of sessions: a pass in flight, and the error of every call to a session that ended."""

from __future__ import annotations

from typing import Any

import pytest

from stepwell_server.errors import SessionGone
from support.engine.harness import Harness, x


async def pass_in_flight(at: Harness, *session_ids: str) -> Any:
    """A pass in flight with some sessions."""
    return await at.begin_pass(list(session_ids), x(len(session_ids)))


async def error_of_all_calls(at: Harness, session_id: str) -> str:
    """Require the same error of every call to a session that is not open, and return its class's name."""
    told = set()
    for call in (
        at.step(session_id, x(1)),
        at.state(session_id),
        at.engine.fork(session_id),
        at.engine.close_session(session_id),
        at.engine.close_session(session_id, request_id=99),
    ):
        with pytest.raises(SessionGone) as error:
            await call
        told.add((type(error.value).__name__, error.value.message, error.value.session_id))
    with pytest.raises(SessionGone) as error:
        await at.engine.session_info(session_id)
    told.add((type(error.value).__name__, error.value.message, error.value.session_id))
    ((kind, _message, named),) = told
    assert named == session_id
    return kind
