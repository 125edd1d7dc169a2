"""Page tokens stand for ids. What is none is in `test_refusals_sessions`."""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st

from stepwell_server.rpc.pages import from_token, to_token


@settings(max_examples=100, derandomize=True, deadline=None, database=None)
@given(st.text(min_size=1, max_size=256))
def test_a_token_gives_the_id_back(session_id: str) -> None:
    try:
        session_id.encode()
    except UnicodeEncodeError:
        return
    assert from_token(to_token(session_id)) == session_id


def test_no_token_is_the_first_page() -> None:
    assert from_token("") == ""
