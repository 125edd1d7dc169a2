"""Which sessions are kept as those with the slowest steps."""

from __future__ import annotations

import numpy as np

from stepwell_server.metrics.observer import SLOW_KEPT_S, SlowestSteps
from stepwell_server.rpc.services.models import MAX_SLOW_SESSIONS


def _names(slowest: SlowestSteps, now: float) -> list[str]:
    return [step.session_id for step in slowest.list(now)]


def test_the_slowest_step_of_each_session_is_kept_for_a_minute() -> None:
    slowest = SlowestSteps()
    for when, (session, seconds) in enumerate([("a", 0.1), ("b", 0.3), ("a", 0.2), ("a", 0.1), ("c", 0.25)]):
        slowest.note("m", session, seconds, float(when))
    assert [(step.session_id, step.seconds) for step in slowest.list(4.0)] == [
        ("b", 0.3),
        ("c", 0.25),
        ("a", 0.2),
    ]
    assert _names(slowest, 1.5 + SLOW_KEPT_S) == ["c", "a"]
    slowest.note("m", "b", 0.01, 10 + SLOW_KEPT_S)  # its slow one is forgotten
    assert _names(slowest, 10 + SLOW_KEPT_S) == ["b"]


def test_however_many_come_few_are_kept_and_they_are_the_slowest() -> None:
    slowest, rng = SlowestSteps(), np.random.default_rng(0)
    seconds = rng.permutation(10_000) / 1e4 + 0.001
    for number, took in enumerate(seconds.tolist()):
        slowest.note("m", f"s{number}", took, number * 1e-4)
    assert len(slowest._found) < 2 * MAX_SLOW_SESSIONS
    assert _names(slowest, 1.0)[:MAX_SLOW_SESSIONS] == [
        f"s{number}" for number in np.argsort(-seconds)[:MAX_SLOW_SESSIONS].tolist()
    ]
