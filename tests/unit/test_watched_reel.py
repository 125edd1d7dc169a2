"""Tapes of watches: what events become time steps, and what becomes a gap."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from stepwell import SessionNotFoundError
from stepwell._core.tracker import SessionTracker
from stepwell._tape.tape import Tape
from stepwell._watch.events import SessionEvent
from stepwell._watch.record import WatchedReel
from stepwell.v1 import errors_pb2, sessions_pb2, tensors_pb2, watch_pb2

KINDS = {
    "present": watch_pb2.SESSION_EVENT_KIND_PRESENT,
    "step": watch_pb2.SESSION_EVENT_KIND_STEP,
    "reset": watch_pb2.SESSION_EVENT_KIND_RESET,
    "ended": watch_pb2.SESSION_EVENT_KIND_ENDED,
}


def tensor(name: str, *values: float) -> tensors_pb2.Tensor:
    data = np.array([values], np.float32)
    return tensors_pb2.Tensor(
        name=name, dtype=tensors_pb2.DATA_TYPE_FLOAT32, shape=data.shape, data=data.tobytes()
    )


def event(kind: str, revision: int, position: int, **fields: Any) -> SessionEvent:
    """An event whose input and output are the revision, and whose state is the position."""
    if kind == "step":
        fields = {
            "inputs": [tensor("x", revision)],
            "outputs": [tensor("y", revision)],
            "time_steps": 1,
        } | fields
    return SessionEvent._from_message(
        watch_pb2.SessionEvent(
            session_id="a", kind=KINDS[kind], revision=revision, position=position,
            states=[] if kind == "ended" else [tensor("h", position)], model_version=1, **fields,
        )
    )  # fmt: skip


def begun(revision: int = 0, position: int = 0) -> tuple[WatchedReel, Tape]:
    session = sessions_pb2.Session(session_id="a", model="m", model_fingerprint="f", batch_size=1)
    reel = WatchedReel(SessionTracker(session), True, None)
    return reel, reel.begin(event("present", revision, position))


def marks(tape: Tape) -> list[tuple[int, str]]:
    return [(mark.index, mark.kind) for mark in tape.marks]


def values(tape: Tape) -> list[float]:
    found: list[float] = tape.inputs["x"].ravel().tolist()
    return found


def test_steps_that_follow_each_other_have_no_marks() -> None:
    reel, tape = begun(3, 2)
    for revision in (4, 5):
        reel.take(event("step", revision, revision - 1))
    reel.end(is_complete=True)
    assert (values(tape), marks(tape)) == ([4, 5], [])
    assert tape.revisions.ravel().tolist() == [4, 5]
    assert tape.positions.ravel().tolist() == [3, 4]
    assert tape.states["h"].ravel().tolist() == [3, 4]


def test_a_step_after_missed_ones_follows_a_gap() -> None:
    reel, tape = begun()
    reel.take(event("step", 1, 1))
    reel.take(event("step", 4, 4, dropped_revisions=2))
    reel.take(event("step", 5, 5))
    reel.end(is_complete=True)
    assert (values(tape), marks(tape)) == ([1, 4, 5], [(1, "gap")])


def test_a_session_as_it_is_marks_a_gap_only_if_it_has_changed() -> None:
    reel, tape = begun()
    reel.take(event("step", 1, 1))
    reel.take(event("present", 1, 1))
    reel.take(event("step", 2, 2))
    assert marks(tape) == []
    reel.take(event("present", 9, 5, from_store=True))
    reel.take(event("step", 10, 6))
    reel.end(is_complete=True)
    assert (values(tape), marks(tape)) == ([1, 2, 10], [(2, "gap")])


def test_resets_are_marked_and_steps_continue() -> None:
    reel, tape = begun()
    reel.take(event("step", 1, 1))
    reel.take(event("reset", 2, 0))
    reel.take(event("step", 3, 1))
    reel.take(event("step", 4, 1))  # it restarted within the step
    reel.end(is_complete=True)
    assert values(tape) == [1, 3, 4]
    assert marks(tape) == [(1, "reset"), (2, "reset")]


def test_a_reset_by_a_new_version_is_marked_once_whether_it_was_seen_or_not() -> None:
    for is_seen in (True, False):
        reel, tape = begun()
        reel.take(event("step", 1, 1))
        if is_seen:
            reel.take(event("present", 1, 0))
        reel.take(event("step", 2, 1))
        reel.end(is_complete=True)
        assert (tape.positions.ravel().tolist(), marks(tape)) == ([1, 1], [(1, "reset")])


def test_the_end_of_a_session_stops_the_tape_and_says_why() -> None:
    reel, tape = begun()
    reel.take(event("step", 1, 1))
    error = errors_pb2.Error(code=5, reason="SESSION_NOT_FOUND", message="session 'a' was closed")
    reel.take(event("ended", 1, 0, error=error))
    assert values(tape) == [1]
    assert "session 'a' was closed" in tape.stopped
    fresh = WatchedReel(SessionTracker(sessions_pb2.Session(session_id="a", batch_size=1)), False, None)
    with pytest.raises(SessionNotFoundError):
        fresh.begin(event("ended", 0, 0, error=error))


def test_a_tape_that_lacks_the_last_change_says_so() -> None:
    reel, tape = begun()
    reel._tracker.revision = 2
    reel.take(event("step", 1, 1))
    assert not reel.has_all()
    reel.end(is_complete=False)
    assert (
        tape.stopped
        == "recording stopped after time step 1: revision 2 was not reported within the time limit"
    )
