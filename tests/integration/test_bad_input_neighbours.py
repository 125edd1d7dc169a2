"""A member whose input spoils a pass of the real model, beside fifty whose input does not: only that one fails.

Which members may fail together, in frames and calls of their own, is in `tests/unit/test_engine_passes.py`.
"""

from __future__ import annotations

import numpy as np
import pytest

from stepwell.v1 import sessions_pb2 as pb
from support.peers import wire
from support.peers.wire import TIMEOUT_S, Array
from support.servers.served import VOCABULARY, Served

COUNT = 51


def spoil(model: str, inputs: dict[str, Array], value: float, member: int) -> None:
    array = inputs["token" if model == "multi" else next(iter(inputs))]
    array[member].flat[-1:] = value
    if array.ndim == 1:
        array[member] = value


BAD = [
    pytest.param("tokens", VOCABULARY, f" to {VOCABULARY}; it failed with", id="token too large"),
    pytest.param("tokens", 2**31 - 1, f" to {2**31 - 1}; it failed with", id="token far too large"),
    pytest.param("tokens", -VOCABULARY - 1, f" holds {-VOCABULARY - 1} to ", id="negative token"),
    pytest.param("multi", VOCABULARY, "input 'token' holds ", id="one input of three"),
    pytest.param("seq", np.nan, "input 'x' must hold finite numbers", id="NaN"),
    pytest.param("seq", np.inf, "input 'x' must hold finite numbers", id="infinity"),
]


@pytest.mark.parametrize("member", [0, 17, COUNT - 1])
@pytest.mark.parametrize("steps", [0, 3])
@pytest.mark.parametrize(("model", "value", "words"), BAD)
def test_in_one_frame(served: Served, model: str, value: float, words: str, steps: int, member: int) -> None:
    ids = served.wire.open_many(model, COUNT)
    past = served.wire.exchange(wire.step_frame(1, ids, wire.tensors(served.draw(model, COUNT, 2))))
    assert not wire.of_members(past, COUNT)
    victim = served.wire.state(ids[member])
    inputs = served.draw(model, COUNT, steps)
    spoil(model, inputs, value, member)
    others = [session_id for session_id in ids if session_id != ids[member]]
    states = served.wire.sessions.GetStates(pb.GetStatesRequest(session_ids=others), timeout=TIMEOUT_S).state
    good = {name: np.delete(array, member, axis=0) for name, array in inputs.items()}
    predicted = wire.arrays(served.wire.predict(model, wire.tensors(good), states).outputs)
    known = {
        i: {name: array[place : place + 1] for name, array in predicted.items()}
        for place, i in enumerate(i for i in range(COUNT) if i != member)
    }
    answers = served.wire.exchange(wire.step_frame(1, ids, wire.tensors(inputs)))
    ((refused_member, refused),) = wire.of_members(answers, COUNT).items()
    assert refused_member == member
    refused.expect("INVALID_ARGUMENT", "INVALID_INPUT", words)
    assert "Node number" not in refused.message
    assert "inputs must be ones that the model can run" in refused.message or "finite" in words
    found = wire.rows_of(answers, [1] * COUNT)
    assert found.keys() == known.keys()
    for i, row in found.items():
        assert wire.data(wire.tensors(row)) == wire.data(wire.tensors(known[i]))
    read = pb.GetStatesRequest(session_ids=ids, without_state=True)
    revisions = served.wire.sessions.GetStates(read, timeout=TIMEOUT_S).revisions
    assert revisions == [1 if i == member else 2 for i in range(COUNT)]
    after = served.wire.state(ids[member])
    assert wire.data(after.state) == wire.data(victim.state)
    assert after.session.position == 2
    served.wire.close(*ids)
