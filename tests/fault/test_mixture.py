"""A short mixture of calls on each front, judged by a replay; `make soak` plays long ones.

And the judge itself: it finds planted defects.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest

from fault.soak_mixture import play
from stepwell.v1 import models_pb2
from support.checks.mixture_replay import Change, Model, Replay, Session, Values, Wrong
from support.peers import wire
from support.peers.wire import tensors
from support.servers.both_fronts import needs_native

SECONDS = 2.0
MODELS = ["tokens", "multi"]
_rng = np.random.default_rng(3)


@pytest.mark.slow
@pytest.mark.parametrize("front", [pytest.param("native", marks=needs_native), "python"])
def test_a_mixture_of_calls_is_answered_as_its_replay(front: str) -> None:
    (mixture,) = play(5, SECONDS, extra=["--front", front], models=MODELS)
    assert not mixture.wrong
    assert mixture.counts["replayed changes"] > 0
    assert mixture.counts["checked reads"] > 0


# --- the judge ---


async def initial(_model: str, rows: int) -> Values:
    return {"h": np.zeros((rows, 2), np.float32)}


async def predict(request: models_pb2.PredictRequest) -> models_pb2.PredictResponse:
    """A model whose state is the sum of its inputs, and its output twice that."""
    state = wire.arrays(request.state)["h"] + wire.arrays(request.inputs)["x"]
    return models_pb2.PredictResponse(outputs=tensors({"y": 2 * state}), state=tensors({"h": state}))


def recorded() -> list[Session]:
    """Two sessions with the right answers to three steps each, and a state that was read."""
    found = []
    for name in "ab":
        session = Session(name, "m", 1, is_exclusive=True, begins={0: None}, positions={0: 0})
        state = np.zeros((1, 2), np.float32)
        for revision in (1, 2, 3):
            x = _rng.standard_normal((1, 2)).astype(np.float32)
            state = state + x
            session.applied(
                revision, Change({"x": x}, outputs={"y": 2 * state}, version=1, position=revision)
            )
        session.read(3, {"h": state})
        found.append(session)
    return found


def swap(sessions: list[Session]) -> None:
    one, two = (session.changes[2] for session in sessions)
    one.outputs, two.outputs = two.outputs, one.outputs


def lose(sessions: list[Session]) -> None:
    del sessions[0].changes[2]


def apply_twice(sessions: list[Session]) -> None:
    sessions[0].reads[3] = {"h": sessions[0].reads[3]["h"] + sessions[0].changes[3].inputs["x"]}  # type: ignore[index]


def misplace(sessions: list[Session]) -> None:
    sessions[1].changes[3].position = 4


async def judged(sessions: list[Session]) -> list[str]:
    replay = Replay(sessions, {"m": Model("m", [], [], [])}, predict, initial)
    await replay.run()
    return replay.wrong


async def test_right_answers_are_judged_so() -> None:
    assert await judged(recorded()) == []


@pytest.mark.parametrize(
    ("defect", "message"),
    [
        (swap, "the outputs of m@1 differ"),
        (lose, "1 changes follow revisions that nobody made: [('a', 3)]"),
        (apply_twice, "('a', 3): the state differ"),
        (misplace, "('b', 3): its position is 4 instead of 3"),
    ],
)
async def test_a_wrong_answer_is_found(defect: Callable[[list[Session]], None], message: str) -> None:
    sessions = recorded()
    defect(sessions)
    found = await judged(sessions)
    assert found
    assert all(message in one for one in found), found


def test_a_revision_of_two_changes_is_found() -> None:
    session = recorded()[0]
    with pytest.raises(Wrong, match="revision 2 came from two changes"):
        session.applied(2, Change(None))
