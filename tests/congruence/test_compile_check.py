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
