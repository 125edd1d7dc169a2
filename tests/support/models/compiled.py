"""A zoo model and its program, and Keras itself on the same inputs."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any

import numpy as np

from stepwell_server.engine.executors import load_executor
from stepwell_server.engine.executors.base import Executor
from stepwell_server.program import Program
from support.models import causal, programs, zoo

#: The value that each masked model reads as "no data".
_MASK_VALUES = {"masking": -1.0, "mask_with_zero_output": 0.0, "mask_over_stacked_cells": 0.0}


@dataclasses.dataclass(frozen=True)
class Compiled:
    """A zoo model and its program."""

    name: str
    model: Any
    program: Program

    @property
    def shape(self) -> tuple[int, int]:
        """Rows and time steps that Keras itself accepts."""
        inputs = getattr(self.model, "inputs", None)
        fixed = inputs[0].shape if inputs else (None, None)
        timed = len(fixed) > 1 and self.program.inputs[0].temporal
        return fixed[0] or 3, (fixed[1] if timed else None) or 6

    def draw(self, seed: int, rows: int, steps: int) -> list[Any]:
        """Return random inputs; some time steps are masked where the model masks."""
        arrays = zoo.random_inputs(self.program.inputs, rows, steps, seed)
        if self.name in _MASK_VALUES:
            masked = np.random.default_rng(seed + 1).random((rows, steps)) < 0.4
            arrays[0][masked] = _MASK_VALUES[self.name]
        return arrays

    def keras(self, inputs: Sequence[Any]) -> dict[str, Any]:
        """Call the Keras model, from fresh states, on whole sequences."""
        import keras

        for layer in self.model._flatten_layers():
            if isinstance(layer, keras.layers.RNN):
                layer.reset_state()
        names = [spec.name for spec in self.program.inputs]
        named = dict(zip(names, inputs, strict=True))
        if self.name == "subclassed_two_arguments":
            result = self.model(**named)
        elif isinstance(getattr(self.model, "input", None), dict):
            result = self.model(named)
        else:
            result = self.model(inputs if len(inputs) > 1 else inputs[0])
        flat = [np.array(value) for value in keras.tree.flatten(result)]
        return dict(zip([spec.name for spec in self.program.outputs], flat, strict=True))

    def stepped(self, inputs: Sequence[Any], steps: int, executor: Executor | None = None) -> dict[str, Any]:
        """Step an executor, by default a new one, through the same sequences, from the initial state."""
        executor, rows = executor or load_executor(self.program), len(inputs[0])
        executor.bind(rows)
        for i, value in enumerate(self.program.initial):
            executor.states()[i][...] = value
        seen: list[list[Any]] = []
        for time in range(steps):
            if time:
                executor.carry()
            for i, spec in enumerate(self.program.inputs):
                executor.inputs()[i][...] = inputs[i][:, time] if spec.temporal else inputs[i]
            executor.invoke()
            seen.append([np.array(value) for value in executor.outputs()])
        return {
            spec.name: np.stack([outputs[i] for outputs in seen], 1) if spec.temporal else seen[-1][i]
            for i, spec in enumerate(self.program.outputs)
        }


@functools.cache
def zoo_model(name: str) -> Compiled:
    """The zoo model ``name``, compiled once per test run. A test that changes the Keras model builds its own."""
    return Compiled(name, zoo.build(name), programs.program(name))


@functools.cache
def causal_model(name: str) -> Compiled:
    """The same for a model of `support.models.causal`; operations without a name are named as in a model built first."""
    from stepwell_server.compile.graph.tensorflow_setup import keras

    def build() -> Any:
        keras.backend.clear_session()
        return causal.build(name)

    return Compiled(name, build(), programs.program(f"causal-{name}", build, kept=programs.kept_folder()))
