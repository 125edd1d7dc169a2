"""When the client tries again, how long it waits, and what it says in the end. The clock is a fake."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest

from stepwell import errors
from stepwell._base.flow import Flow
from stepwell._core.retrier import Retrier
from stepwell._transport.connecting import ConnectError
from stepwell._transport.retry import Deadline, RetryPolicy
from stepwell.v1 import sessions_pb2
from support.clock import ManualClock
from support.sdk.scripted_calls import ScriptedCalls

Script = list[str | errors.StepwellError | None]


def largest(_low: float, high: float) -> float:
    return high


def drive(
    script: Script,
    limit_s: float = 10.0,
    *,
    changes: bool = True,
    draw: Callable[[float, float], float] = largest,
    attempt_s: float = 0.0,
) -> tuple[object, list[float], int]:
    """Runs a call whose attempts end as scripted; returns its result, the pauses and the attempts."""
    calls = ScriptedCalls(script, attempt_s)
    flow: Flow[object] = Retrier(RetryPolicy(draw=draw), 1024).call(
        "Step", sessions_pb2.StepRequest(), Deadline(limit_s, calls.clock), changes=changes
    )
    return calls.run(flow), calls.pauses, calls.attempts


def lost() -> errors.StepwellError:
    return errors.UnavailableError("socket closed", outcome="unknown")


def refused() -> errors.StepwellError:
    return errors.UnavailableError("stopping", outcome="not_applied", reason="UNAVAILABLE")


def test_first_attempt_succeeds() -> None:
    assert drive([None]) == ("reply", [], 1)


def test_backoff_doubles_up_to_its_cap() -> None:
    _, pauses, attempts = drive([lost()] * 8 + [None], 100.0)
    assert pauses == [0.05, 0.1, 0.2, 0.4, 0.8, 1.6, 2.0, 2.0]
    assert attempts == 9


def test_jitter_is_drawn_from_the_whole_interval() -> None:
    drawn: list[tuple[float, float]] = []

    def draw(low: float, high: float) -> float:
        drawn.append((low, high))
        return 0.0

    drive([lost(), lost(), None], draw=draw)
    assert drawn == [(0.0, 0.05), (0.0, 0.1)]


def test_overload_waits_for_the_servers_delay() -> None:
    overloaded = errors.OverloadedError("full", retry_after_s=3.0)
    _, pauses, _ = drive([overloaded, None])
    assert 3.0 <= pauses[0] <= 3.05


def test_overload_without_advice_backs_off() -> None:
    _, pauses, _ = drive([errors.OverloadedError("full"), None])
    assert pauses == [0.05]


@pytest.mark.parametrize("quota", ["models", "sessions"])
def test_a_quota_that_waiting_does_not_free_is_not_retried(quota: str) -> None:
    with pytest.raises(errors.OverloadedError, match="too many"):
        drive([errors.OverloadedError("too many", retry_after_s=0.1, quota=quota), None])


@pytest.mark.parametrize("quota", ["rows", "steps_per_second", "bytes_in_flight"])
def test_other_quotas_are_waited_for(quota: str) -> None:
    _, pauses, attempts = drive([errors.OverloadedError("too many", retry_after_s=0.1, quota=quota), None])
    assert (len(pauses), attempts) == (1, 2)


def starting() -> errors.StepwellError:
    return errors.UnavailableError("loading", outcome="not_applied", reason="STARTING")


@pytest.mark.parametrize(
    "error", [ConnectError("Connection refused"), starting()], ids=["refused", "starting"]
)
def test_a_server_that_is_down_is_tried_often_for_a_while(error: errors.StepwellError) -> None:
    """A server that restarts is back after a second or two; delays of two seconds would double the pause."""
    _, pauses, _ = drive([error] * 22 + [None], 100.0)
    assert (pauses[:4], max(pauses[:20])) == ([0.05, 0.1, 0.2, 0.25], 0.25)
    assert pauses[20:] == [2.0, 2.0], "not for ever: many clients may wait for it"


def test_overload_whose_delay_passes_the_limit_is_not_retried() -> None:
    with pytest.raises(errors.OverloadedError, match="full") as caught:
        drive([errors.OverloadedError("full", retry_after_s=20.0)])
    assert caught.value.retry_after_s == 20.0


@pytest.mark.parametrize(
    "error",
    [
        errors.InvalidInputError("no"),
        errors.RevisionConflictError("no"),
        errors.SessionNotFoundError("no"),
        errors.InternalError("no"),
        errors.DeadlineExceededError("no"),
        errors.StateCorruptError("no"),
        errors.ClosedError("no"),
    ],
    ids=lambda error: type(error).__name__,
)
def test_other_errors_are_final(error: errors.StepwellError) -> None:
    with pytest.raises(type(error), match="no"):
        drive([error])


def test_limit_covers_all_attempts_and_pauses() -> None:
    with pytest.raises(errors.UnavailableError) as caught:
        drive([lost()], 1.0, attempt_s=0.1)
    assert "time limit: 1 s" in caught.value.message
    assert "socket closed" in caught.value.message


def test_last_pause_does_not_pass_the_limit() -> None:
    pauses: list[float] = []

    def draw(_low: float, high: float) -> float:
        pauses.append(high)
        return high

    with pytest.raises(errors.UnavailableError):
        drive([lost()], 0.12, draw=draw)
    assert pauses == [0.05, 0.1]


LATE = errors.DeadlineExceededError("late", outcome="not_applied")


@pytest.mark.parametrize(
    ("script", "kind", "outcome", "changes"),
    [
        ([refused()], errors.UnavailableError, "not_applied", True),
        ([lost()], errors.UnavailableError, "unknown", True),
        ([lost(), refused()], errors.UnavailableError, "unknown", True),
        ([refused(), lost()], errors.UnavailableError, "unknown", True),
        (
            [lost(), errors.OverloadedError("full", retry_after_s=60.0)],
            errors.UnavailableError,
            "unknown",
            True,
        ),
        ([lost(), LATE], errors.DeadlineExceededError, "unknown", True),
        ([lost()], errors.UnavailableError, "not_applied", False),
    ],
    ids=["refused", "lost", "lost, refused", "refused, lost", "lost, overloaded", "lost, late", "a read"],
)
def test_outcome_over_all_attempts(
    script: Script, kind: type[errors.UnavailableError], outcome: str, changes: bool
) -> None:
    with pytest.raises(kind) as caught:
        drive(script, 1.0, changes=changes)
    assert caught.value.outcome == outcome
    assert (f"outcome: {outcome}" in caught.value.message) is ("outcome" in caught.value.message) is changes


def test_without_a_limit() -> None:
    result, pauses, _ = drive([lost()] * 50 + [None], math.inf)
    assert result == "reply"
    assert pauses[-1] == 2.0


def test_deadline_as_grpc_takes_it() -> None:
    clock = ManualClock()
    deadline = Deadline(1.0, clock.monotonic)
    clock.advance(3.0)
    assert deadline.grpc_timeout_s() == 0.0
    assert Deadline(math.inf, clock.monotonic).grpc_timeout_s() is None


def test_message_over_the_limit_is_never_sent() -> None:
    retrier = Retrier(RetryPolicy(), 1024)
    request = sessions_pb2.StepRequest(session_id="x" * 2000)
    with pytest.raises(errors.InvalidInputError, match="max_message_bytes = 1024"):
        next(retrier.call("Step", request, Deadline(1.0)))
