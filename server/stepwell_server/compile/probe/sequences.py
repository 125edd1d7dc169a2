"""Runs a sequence through a function of one time step, and compares it with one call of the whole model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from stepwell_server.compile.graph.plan import Plan
from stepwell_server.compile.graph.tensorflow_setup import tf
from stepwell_server.engine.executors.step_function import Step, initial_rows
from stepwell_server.program import TensorSpec

Array = npt.NDArray[np.generic]
#: One rounding of each type, relative to a value.
ROUNDINGS = {"bfloat16": 2.0**-8, "float16": 2.0**-10, "float32": 2.0**-23, "float64": 2.0**-52}


def step_of_function(plan: Plan, function: Any) -> Step:
    """Return the traced function as a function of arrays, with whole states."""

    def step(inputs: Sequence[Array], states: Sequence[Array]) -> tuple[list[Array], list[Array]]:
        named = {f"in_{i}": tf.constant(value) for i, value in enumerate(inputs)}
        named |= {
            f"state_{i}": tf.constant(value[:, :: spec.gap] if spec.gap else value)
            for i, (spec, value) in enumerate(zip(plan.state, states, strict=True))
        }
        results = function(**named)
        after = [results[f"next_{i}"].numpy() for i in range(len(plan.state))]
        return (
            [results[f"out_{i}"].numpy() for i in range(len(plan.outputs))],
            [
                np.concatenate([before[:, 1:], value[:, None]], 1) if spec.gap else value
                for spec, before, value in zip(plan.state, states, after, strict=True)
            ],
        )

    return step


class Steppable(Protocol):
    """The information needed for stepping: a `Plan` or a `Program`."""

    @property
    def inputs(self) -> tuple[TensorSpec, ...]:
        """Its inputs."""

    @property
    def outputs(self) -> tuple[TensorSpec, ...]:
        """Its outputs."""

    @property
    def initial(self) -> tuple[Array, ...]:
        """The initial value of one row of each state."""


def at(plan: Steppable, inputs: Sequence[Array], time: int) -> list[Array]:
    """Return the inputs of one time step of a sequence."""
    return [
        np.ascontiguousarray(value[:, time]) if spec.temporal else value
        for spec, value in zip(plan.inputs, inputs, strict=True)
    ]


def run(plan: Steppable, step: Step, inputs: Sequence[Array], steps: int) -> dict[str, Array]:
    """Step through a sequence; return the outputs by name, in the shape of one call over the sequence."""
    states: Sequence[Array] = initial_rows(plan.initial, len(inputs[0]))
    seen: list[Sequence[Array]] = []
    for time in range(steps):
        outputs, states = step(at(plan, inputs, time), states)
        seen.append(outputs)
    return {
        spec.name: np.stack([outputs[i] for outputs in seen], 1) if spec.temporal else seen[-1][i]
        for i, spec in enumerate(plan.outputs)
    }


def rounding(model: Any) -> float:
    """Return one rounding of the coarsest type in which a layer computes, relative to a value."""
    types = {layer.compute_dtype for layer in model._flatten_layers()}
    return max(
        (ROUNDINGS[name] for name in types & ROUNDINGS.keys() - {"float64"}), default=ROUNDINGS["float32"]
    )


def added_roundings(model: Any) -> int:
    """Return how many roundings are added to each value of Keras's call, to measure the effect of rounding.

    Stepping rounds at other places than one call over the sequence, some tens of times per time step. Half-precision
    types round alike in both, and some tens of their roundings are as large as the values.
    """
    return 64 if rounding(model) < 2.0**-16 else 4


def tolerance(model: Any) -> float:
    """Return the difference that rounding may cause, relative to an output's largest value.

    It is one rounding of the coarsest type in which a layer computes, times 256, which is what a sum of thousands of
    terms over some steps can accumulate (its square root). Half-precision types round intermediate results alike in
    both computations, so for them 16 suffices; 256 would allow everything.
    """
    one = rounding(model)
    return (256 if one < 2.0**-16 else 16) * one


def difference(one: Array, two: Array) -> float:
    """Return the largest difference, relative to the largest value (at least 0.1): see `tolerance`.

    It is infinite if only one value is finite, or if two infinities differ.
    """
    if one.shape != two.shape:
        return float("inf")
    if not one.size:
        return 0.0
    first, second = one.astype(np.float64), two.astype(np.float64)
    finite = np.isfinite(first) & np.isfinite(second)
    if not np.array_equal(first[~finite], second[~finite], equal_nan=True):
        return float("inf")
    first, second = np.where(finite, first, 0), np.where(finite, second, 0)
    return float(np.max(np.abs(first - second)) / max(np.max(np.abs(first)), 0.1))


def worst(whole: Mapping[str, Array], stepped: Mapping[str, Array]) -> tuple[str, float]:
    """Return the output with the largest relative difference, and that difference."""
    return max(((name, difference(whole[name], stepped[name])) for name in whole), key=lambda item: item[1])
