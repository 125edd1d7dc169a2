"""Page tokens are told from any other string."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from stepwell_server.errors import InvalidInput
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


@pytest.mark.parametrize(
    "token",
    [
        "junk",
        "page-03",
        "a",
        "ab",
        "é",
        "\0",
        "=",
        to_token("a") + "=",
        to_token("a")[:-1],
        to_token("b") + "A",
        "x" * 300,
    ],
)
def test_what_is_no_token_is_refused(token: str) -> None:
    with pytest.raises(InvalidInput, match="page_token must be the next_page_token of another page; got"):
        from_token(token)
