"""A member whose input spoils a pass, beside fifty whose input does not: only that one fails."""

from __future__ import annotations

import numpy as np
import pytest

from stepwell.v1 import sessions_pb2
from support.peers import wire
from support.peers.wire import Array, Refusal
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


class Crowd:
    """Sessions of one model, one of them with bad input, and what the others must answer."""

    def __init__(self, served: Served, model: str, steps: int, value: float, member: int) -> None:
        self.served = served
        self.member = member
        self.ids = served.wire.open_many(model, COUNT)
        past = served.draw(model, COUNT, 2)
        assert not any(
            a.errors for a in served.wire.exchange(wire.step_frame(1, self.ids, wire.tensors(past)))
        )
        self.states = [served.wire.state(session_id) for session_id in self.ids]
        self.inputs = served.draw(model, COUNT, steps)
        spoil(model, self.inputs, value, member)
        self.known = {
            i: wire.data(served.predicted(self.ids[i], self.row(i))) for i in range(COUNT) if i != member
        }

    def row(self, i: int) -> dict[str, Array]:
        return {name: array[i : i + 1] for name, array in self.inputs.items()}

    def check(self, refused: Refusal, words: str, outputs: dict[int, object]) -> None:
        refused.expect("INVALID_ARGUMENT", "INVALID_INPUT", words)
        assert "Node number" not in refused.message
        assert "inputs must be ones that the model can run" in refused.message or "finite" in words
        assert outputs == self.known
        revisions = [self.served.wire.session(session_id).revision for session_id in self.ids]
        assert revisions == [1 if i == self.member else 2 for i in range(COUNT)]
        victim = self.served.wire.state(self.ids[self.member])
        assert wire.data(victim.state) == wire.data(self.states[self.member].state)
        assert victim.session.position == 2
        self.served.wire.close(*self.ids)


@pytest.mark.parametrize("member", [0, 17, COUNT - 1])
@pytest.mark.parametrize("steps", [0, 3])
@pytest.mark.parametrize(("model", "value", "words"), BAD)
def test_in_one_frame(served: Served, model: str, value: float, words: str, steps: int, member: int) -> None:
    crowd = Crowd(served, model, steps, value, member)
    answers = served.wire.exchange(wire.step_frame(1, crowd.ids, wire.tensors(crowd.inputs)))
    refusals = wire.of_members(answers, COUNT)
    assert list(refusals) == [member]
    outputs: dict[int, object] = {
        i: {name: (array.shape, array.tobytes()) for name, array in found.items()}
        for i, found in wire.rows_of(answers, [1] * COUNT).items()
    }
    crowd.check(refusals[member], words, outputs)


@pytest.mark.parametrize(("model", "value", "words"), BAD)
def test_in_calls_of_their_own_at_once(served: Served, model: str, value: float, words: str) -> None:
    crowd = Crowd(served, model, 2, value, 30)
    calls = [
        served.wire.sessions.Step.future(
            sessions_pb2.StepRequest(session_id=crowd.ids[i], inputs=wire.tensors(crowd.row(i))),
            timeout=wire.TIMEOUT_S,
        )
        for i in range(COUNT)
    ]
    refused = wire.refusal(calls[30].result)
    outputs: dict[int, object] = {
        i: wire.data(call.result().outputs) for i, call in enumerate(calls) if i != 30
    }
    crowd.check(refused, words, outputs)


def test_several_bad_ones_at_once(served: Served) -> None:
    """Every third is bad, in several ways; the batch sizes differ."""
    sizes = [1, 2, 3] * 6
    ids = [served.wire.open("tokens", batch_size=size) for size in sizes]
    inputs = served.draw("tokens", sum(sizes), 3)
    (name,) = inputs
    starts = np.cumsum([0, *sizes])
    bad = list(range(2, len(ids), 3))
    for nth, i in enumerate(bad):
        inputs[name][starts[i] + nth % 3, nth % 3] = [VOCABULARY, -VOCABULARY - 1][nth % 2]
    good = [i for i in range(len(ids)) if i not in bad]
    rows = {i: {name: inputs[name][starts[i] : starts[i + 1]]} for i in good}
    known = {i: wire.arrays(served.predicted(ids[i], rows[i])) for i in good}
    with served.nothing_changes(*[ids[i] for i in bad]):
        answers = served.wire.exchange(wire.step_frame(5, ids, wire.tensors(inputs)))
    assert sorted(wire.of_members(answers, len(ids))) == bad
    found = wire.rows_of(answers, sizes)
    assert sorted(found) == good
    for i in good:
        assert {k: v.tobytes() for k, v in found[i].items()} == {k: v.tobytes() for k, v in known[i].items()}
    served.wire.close(*ids)
