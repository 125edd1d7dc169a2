"""A model is not refused for its rounding, however large that grows; one that truly differs a little is."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from stepwell_server.compile.probe import evidence
from stepwell_server.compile.probe.sequences import run, step_of_function, tolerance
from support.models import zoo
from support.models.programs import compile_model
from support.samples import ALL, one_in


def _frames(seed: int, last: str) -> Any:
    """Frames through a stack whose values grow until they overflow, some of them within twenty time steps."""
    from stepwell_server.compile.graph.tensorflow_setup import keras

    model = zoo.frames(keras)
    model.layers[-1].layer.activation = keras.activations.get(last)
    rng = np.random.default_rng(seed)
    for weight in model.weights:
        value = rng.normal(0, 0.35, weight.shape)
        weight.assign(np.abs(value) if "variance" in weight.path else value)
    return model


_FRAMES = [(seed, last) for seed in (1, 3, 4, 5, 7) for last in ("sigmoid", "linear")]
"""Weights and the last activation; the first and the last of them outside soaks."""


@pytest.mark.slow
@pytest.mark.parametrize(("seed", "last"), _FRAMES if ALL else [_FRAMES[0], _FRAMES[-1]])
def test_frames_that_grow_without_bound_are_served_and_equal(seed: int, last: str, tmp_path: Path) -> None:
    _frames(seed, last).save(tmp_path / "model.keras")
    program = compile_model(tmp_path / "model.keras")
    assert program.executor == "litert", program.executor_reason
    assert not program.proof.unproven


class _Traced:
    """A model of `_MODELS`, traced, and evidence of what Keras computes."""

    def __init__(self, name: str) -> None:
        from stepwell_server.compile.probe.probe import trace_and_probe

        build, self.by, self.after = _MODELS[name]
        self.model = build()
        self.traced = trace_and_probe(self.model)
        self.step = step_of_function(self.traced.plan, self.traced.function)

    def worst(self, change: Callable[[Any], Any] = lambda step: step) -> Any:
        """Return how far stepping is from Keras, with a change of the step for each sample."""
        plan = self.traced.plan
        found = [
            evidence.compare(
                plan,
                sample,
                run(plan, change(self.step), sample.inputs, sample.steps),
                tolerance(self.model),
            )
            for sample in self.traced.evidence
        ]
        differences = [difference for comparison in found for difference in comparison.outputs]
        return max(differences, key=lambda difference: difference.share)


def _drifting(by: float, after: int) -> Callable[[Any], Any]:
    """Return a change of a step: its outputs are larger from some time step on."""

    def change(step: Any) -> Any:
        calls = 0

        def other(inputs: Sequence[Any], states: Sequence[Any]) -> Any:
            nonlocal calls
            calls += 1
            outputs, after_step = step(inputs, states)
            return [value * (1 + by * (calls > after)) for value in outputs], after_step

        return other

    return change


#: A difference that is to be found: some times what rounding makes of the values of each.
_MODELS: dict[str, tuple[Callable[[], Any], float, int]] = {
    "lstm_dense": (lambda: zoo.build("lstm_dense"), 1e-4, 400),
    "frames": (lambda: _frames(3, "linear"), 1e-3, 8),
    "mixed_float16": (lambda: zoo.build("mixed_float16"), 0.05, 400),
    "mixed_bfloat16": (lambda: zoo.build("mixed_bfloat16"), 0.25, 400),
}


@pytest.fixture(scope="module", params=one_in(len(_MODELS), list(_MODELS)))
def traced(request: pytest.FixtureRequest) -> _Traced:
    return _Traced(request.param)


def test_correct_stepping_is_within_rounding(traced: _Traced) -> None:
    found = traced.worst()
    assert found.is_allowed, found
    assert found.skipped < 0.7


def test_a_small_change_from_some_time_step_on_is_found(traced: _Traced) -> None:
    found = traced.worst(_drifting(traced.by, traced.after))
    assert not found.is_allowed
    assert found.time >= traced.after


def test_a_small_change_of_one_weight_is_found(traced: _Traced) -> None:
    kernel = traced.model.trainable_weights[0]
    before = np.array(kernel)
    kernel.assign(before * (1 + 2 * traced.by))
    try:
        assert not traced.worst().is_allowed
    finally:
        kernel.assign(before)
