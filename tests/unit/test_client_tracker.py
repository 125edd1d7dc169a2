"""The rule for a change whose answer is missing: the same again is the same change, another is another."""

from __future__ import annotations

import random
import subprocess
import sys

import numpy as np

from stepwell._batching.frames import Change
from stepwell._batching.steps import Step
from stepwell._core.tracker import SessionTracker, new_request_id, new_request_ids
from stepwell._state.arguments import pack_inputs
from stepwell._transport.retry import Deadline
from stepwell.errors import RevisionConflictError, UnavailableError
from stepwell.v1 import sessions_pb2


def session() -> SessionTracker:
    return SessionTracker(sessions_pb2.Session(session_id="s", batch_size=1, revision=4))


def change(value: float, outputs: str = "all", dtype: str = "float32") -> Change:
    return Change("step", pack_inputs(np.full((1, 2), value, dtype), 1), outputs)


def test_same_change_keeps_its_request_id() -> None:
    tracker = session()
    first = tracker.begin(change(1))
    assert first.request_id != 0
    assert tracker.begin(change(1)) == first


def test_nan_is_the_same_as_itself() -> None:
    tracker = session()
    assert tracker.begin(change(np.nan)) == tracker.begin(change(np.nan))


def test_other_changes_get_another() -> None:
    tracker = session()
    ids = {tracker.begin(c) for c in (change(1), change(2), change(1, "last"), change(1, dtype="float64"))}
    reset = Change("reset", (), rows=(0,))
    ids |= {tracker.begin(reset), tracker.begin(Change("reset", ()))}
    assert len(ids) == 6


def test_an_answer_ends_the_change() -> None:
    tracker = session()
    first = tracker.begin(change(1))
    tracker.applied(5, 7)
    assert (tracker.revision, tracker.position) == (5, 7)
    assert tracker.begin(change(1)) != first


def test_refresh_drops_the_change() -> None:
    tracker = session()
    first = tracker.begin(change(1))
    tracker.refresh(sessions_pb2.Session(session_id="s", revision=9, position=3))
    assert (tracker.revision, tracker.position) == (9, 3)
    assert tracker.begin(change(1)) != first


def conflict() -> RevisionConflictError:
    return RevisionConflictError("revision is 5", expected=4, actual=5, reason="REVISION_CONFLICT")


def test_a_conflict_with_oneself_says_so() -> None:
    tracker = session()
    tracker.begin(change(1))  # cancelled: nobody says what became of it
    tracker.begin(change(2))
    told = tracker.failed(conflict())
    assert isinstance(told, RevisionConflictError)
    assert told.message.startswith("revision is 5; an earlier change of this handle")
    assert "refresh()" in str(told)
    assert (told.expected, told.actual, told.reason) == (4, 5, "REVISION_CONFLICT")
    # It stays so until the tracker is right again.
    tracker.begin(change(3))
    assert "refresh()" in str(tracker.failed(conflict()))
    tracker.refresh(sessions_pb2.Session(session_id="s", revision=5))
    tracker.begin(change(3))
    assert str(tracker.failed(conflict())) == "revision is 5"


def test_a_conflict_with_others_does_not() -> None:
    tracker = session()
    tracker.begin(change(1))
    assert str(tracker.failed(conflict())) == "revision is 5"
    tracker.begin(change(2))
    tracker.failed(UnavailableError("full", outcome="not_applied"))
    tracker.begin(change(3))
    assert str(tracker.failed(conflict())) == "revision is 5"


def test_a_change_of_unknown_outcome_is_in_doubt() -> None:
    tracker = session()
    tracker.begin(change(1))
    tracker.failed(UnavailableError("lost", outcome="unknown"))
    tracker.begin(change(2))
    assert "may have been applied" in str(tracker.failed(conflict()))


def test_changed_arrays_are_not_mistaken_for_the_old_ones() -> None:
    tracker = session()
    x = np.zeros((1, 2))
    first = tracker.begin(Change("step", pack_inputs(x, 1)))
    x += 1
    assert tracker.begin(Change("step", pack_inputs(x, 1))) != first


def test_a_program_that_seeds_its_random_numbers_gets_other_ids_each_time() -> None:
    ids = set()
    for _ in range(3):
        random.seed(7)
        ids.add(new_request_id())
    assert len(ids) == 3


def test_a_forked_process_makes_other_ids_than_its_parent() -> None:
    program = (
        "import os, sys\n"
        "from stepwell._core.tracker import new_request_id\n"
        "child = os.fork()\n"
        "sys.stdout.write(f'{new_request_id()}\\n')\n"
        "sys.stdout.flush()\n"
        "if child: os.waitpid(child, 0)\n"
    )
    output = subprocess.run([sys.executable, "-c", program], stdout=subprocess.PIPE, check=True, timeout=250)
    assert len(set(output.stdout.split())) == 2


def test_a_step_of_a_form_is_the_same_change_as_a_whole_one() -> None:
    """A step that was made without its data as a part of the change is pending like others."""
    whole = change(1)
    form = whole._replace(tensors=(whole.tensors[0]._replace(data=b""),))
    deadline, data = Deadline(1.0), whole.tensors[0].data
    tracker = session()
    first = tracker.step(Step, form, deadline, data=data)
    assert first.change == whole
    for same in (
        tracker.step(Step, form, deadline, data=data),
        tracker.step(Step, whole, deadline),
        tracker.begin(whole),
    ):
        assert (same.request_id, same.change) == (first.request_id, whole)
    assert tracker.step(Step, form, deadline, data=data[::-1]).request_id != first.request_id


def test_request_ids_are_not_zero_and_differ() -> None:
    ids = new_request_ids(1000)
    assert len(set(ids.tolist())) == 1000
    assert ids.all()
