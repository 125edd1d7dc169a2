"""What is learnt of messages is bounded, and forgotten in time."""

from __future__ import annotations

import numpy as np
import pytest

from stepwell_server.rpc import plain
from stepwell_server.rpc.plain import CALL, FRAME, Layouts
from support.fake_executor import PLAIN
from support.lane import message, request


def test_layouts_are_learnt_again_when_the_table_was_full(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plain, "_MOST_KEYS", 8)
    layouts = Layouts(CALL, PLAIN)
    for length in range(1, 30):
        raw = request("x" * length)
        key = (len(raw), 2, 2 + length)
        first = layouts.of(key, raw)
        assert first is not None
        assert layouts.of(key, raw) is first
        assert len(layouts._known) <= 8
        assert len(layouts._unknown) <= 8


def test_a_key_that_was_of_no_use_is_looked_at_again_now_and_then() -> None:
    layouts = Layouts(FRAME, PLAIN)
    double, plain_one = message(1, "a", x=np.ones((1, 2), np.float64)), message(1, "a")
    key = (1, 2, 3)
    for _ in range(200):
        assert layouts.of(key, double) is None
    tries = 0
    while layouts.of(key, plain_one) is None:
        tries += 1
        assert tries < 100
    assert tries > 10
