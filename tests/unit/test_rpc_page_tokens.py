"""Page tokens stand for ids. Invalid ones are in `test_refusals_sessions`."""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st

from stepwell_server.rpc.page_tokens import from_token, to_token
from support.samples import examples


@settings(max_examples=examples(100))
@given(st.text(max_size=256), st.floats(allow_nan=False, allow_infinity=False))
def test_a_token_gives_the_id_and_the_number_back(session_id: str, number: float) -> None:
    try:
        session_id.encode()
    except UnicodeEncodeError:
        return
    assert from_token(to_token(session_id, number)) == (session_id, number)


def test_no_token_is_the_first_page() -> None:
    assert from_token("") == ("", 0.0)
