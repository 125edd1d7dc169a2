"""Which sessions are kept as those with the slowest steps."""

from __future__ import annotations

import numpy as np

from stepwell_server.rpc.slowest import KEPT_S, MOST, Slowest


def _names(slowest: Slowest, now: float) -> list[str]:
    return [step.session_id for step in slowest.list(now)]


def test_the_slowest_step_of_each_session_is_kept_for_a_minute() -> None:
    slowest = Slowest()
    for when, (session, seconds) in enumerate([("a", 0.1), ("b", 0.3), ("a", 0.2), ("a", 0.1), ("c", 0.25)]):
        slowest.note("m", session, seconds, float(when))
    assert [(step.session_id, step.seconds) for step in slowest.list(4.0)] == [
        ("b", 0.3),
        ("c", 0.25),
        ("a", 0.2),
    ]
    assert _names(slowest, 1.5 + KEPT_S) == ["c", "a"]
    slowest.note("m", "b", 0.01, 10 + KEPT_S)  # its slow one is forgotten
    assert _names(slowest, 10 + KEPT_S) == ["b"]


def test_however_many_come_few_are_kept_and_they_are_the_slowest() -> None:
    slowest, rng = Slowest(), np.random.default_rng(0)
    seconds = rng.permutation(10_000) / 1e4 + 0.001
    for number, took in enumerate(seconds.tolist()):
        slowest.note("m", f"s{number}", took, number * 1e-4)
    assert len(slowest._found) < 2 * MOST
    wanted = [f"s{number}" for number in np.argsort(-seconds)[:MOST].tolist()]
    assert _names(slowest, 1.0)[:MOST] == wanted
