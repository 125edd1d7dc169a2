"""Who waits for a session is served in the order of coming."""

from __future__ import annotations

import numpy as np

from stepwell_server.core.claims import Claims
from stepwell_server.core.sessions import SessionTable


def table_of(count: int) -> SessionTable:
    table = SessionTable()
    names = [f"s{i}" for i in range(count)]
    table.add(names, rows=np.arange(count, dtype=np.intp), model=0, batch_size=1, used=0.0, created=0.0)
    return table


def handles(*values: int) -> np.ndarray:
    return np.array(values, np.intp)


def test_a_line_is_served_one_by_one_in_its_order() -> None:
    table = table_of(2)
    claims: Claims[str] = Claims(table)
    claims.claim(handles(0, 1))
    for item in ("first", "second"):
        claims.wait(0, item)
    assert claims.waiting(0) == 2
    assert claims.release(handles(0, 1)) == [(0, "first")]
    assert not table.claimed[:2].any(), "an item whose turn it is holds no claim yet"
    claims.claim(handles(0))
    assert claims.release(handles(0)) == [(0, "second")]
    assert claims.release(handles(0)) == []
    assert claims.waiting(0) == 0


def test_only_the_lines_of_released_sessions_move() -> None:
    # more sessions released than lines, and the other way round: two ways through the code
    for released in ((0, 1, 2, 3), (2,)):
        claims: Claims[str] = Claims(table_of(6))
        claims.claim(handles(0, 1, 2, 3, 4, 5))
        for handle in (2, 4, 5):
            claims.wait(handle, f"for {handle}")
        assert claims.release(handles(*released)) == [(2, "for 2")]
        assert [claims.waiting(handle) for handle in (2, 4, 5)] == [0, 1, 1]


def test_a_dropped_line_is_handed_over_once() -> None:
    claims: Claims[str] = Claims(table_of(1))
    claims.claim(handles(0))
    claims.wait(0, "a")
    claims.wait(0, "b")
    assert list(claims.drop_queue(0)) == ["a", "b"]
    assert list(claims.drop_queue(0)) == []
    assert claims.release(handles(0)) == []
