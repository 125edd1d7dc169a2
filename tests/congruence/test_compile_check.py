"""The check of an artefact finds what it is there to find."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest

from support.models import zoo


@pytest.fixture(scope="module")
def traced() -> Any:
    from stepwell_server.compile.probe.probe import trace_and_probe

    return trace_and_probe(zoo.build("lstm_dense"))


def _step(traced: Any) -> Any:
    from stepwell_server.compile.probe.sequences import step_of_function

    return step_of_function(traced.plan, traced.function)


def test_a_wrong_output_is_found(traced: Any) -> None:
    from stepwell_server.compile.probe.check import CheckError, check_against_keras

    step = _step(traced)
    check_against_keras(traced, step)

    def wrong(inputs: Sequence[Any], states: Sequence[Any]) -> tuple[Any, Any]:
        outputs, after = step(inputs, states)
        return [outputs[0] * np.float32(1.001)], after

    with pytest.raises(CheckError, match="output 'y' differs from Keras"):
        check_against_keras(traced, wrong)


def test_a_difference_is_allowed_only_where_rounding_makes_one(keras: Any) -> None:
    """A chaotic cell makes a large difference of a rounding, but other differences are found before."""
    from stepwell_server.compile.probe.check import DiffersError, check_against_keras
    from stepwell_server.compile.probe.probe import trace_and_probe

    model = keras.Sequential([keras.Input((None, 3)), keras.layers.SimpleRNN(8, return_sequences=True)])
    rng = np.random.default_rng(5)
    for weight in model.weights:
        weight.assign(rng.normal(0, 1, weight.shape))
    traced = dataclasses.replace(trace_and_probe(model), observations=())
    step = _step(traced)

    def drifting(inputs: Sequence[Any], states: Sequence[Any]) -> tuple[Any, Any]:
        outputs, after = step(inputs, states)
        return [value * np.float32(1.001) for value in outputs], after

    assert 0 < check_against_keras(traced, step) < 1
    assert all("noise" in vars(sample) for sample in traced.evidence)
    with pytest.raises(DiffersError):
        check_against_keras(traced, drifting)


def test_a_state_that_is_not_carried_is_found(traced: Any) -> None:
    from stepwell_server.compile.probe.check import CheckError, check_against_keras

    step = _step(traced)
    with pytest.raises(CheckError):
        check_against_keras(traced, lambda inputs, states: (step(inputs, states)[0], states))


@pytest.mark.parametrize(
    "rows", [slice(None), slice(2, 3), slice(3, 4)], ids=["all", "undisturbed", "disturbed"]
)
def test_calls_of_a_model_that_differ_are_found(traced: Any, rows: slice) -> None:
    """The second call with the same inputs is made only if the disturbed one shows a difference."""
    from stepwell_server.compile.errors import ModelError
    from stepwell_server.compile.probe import evidence
    from stepwell_server.compile.probe.whole_call import WholeCall

    class Differing(WholeCall):
        calls = 0

        def __call__(self, inputs: Sequence[Any]) -> Any:
            self.calls += 1
            found: dict[str, Any] = {
                name: np.array(value) for name, value in super().__call__(inputs).items()
            }
            for value in found.values():
                value[rows] += np.float32(1e-6 * self.calls)
            return found

    same = WholeCall(traced.plan.interface)
    assert len(evidence.gather(traced.plan, traced.sampler, 40, same)) == 2
    with pytest.raises(
        ModelError, match="two calls of the model differ: output 'y' differs for the same inputs"
    ):
        evidence.gather(traced.plan, traced.sampler, 40, Differing(traced.plan.interface))
