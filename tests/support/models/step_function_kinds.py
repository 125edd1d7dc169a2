"""Step functions of each kind, and what a plain loop over ONNX Runtime computes with them."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx

from stepwell_server.engine.executors.onnx_runtime import plain
from support.models import step_functions

RNG = np.random.default_rng()
STEPS = 5


def reals(*shape: int) -> Any:
    return RNG.standard_normal(shape).astype(np.float32)


@dataclasses.dataclass(frozen=True)
class Kind:
    """A step function."""

    make: Callable[[], onnx.ModelProto]
    inputs: Mapping[str, Callable[[], Any]]
    """What draws an input of one row and one time step."""
    states: Mapping[str, str]
    initial: Mapping[str, Any]

    def loop(self, steps: list[dict[str, Any]], states: dict[str, Any] | None = None) -> list[dict[str, Any]]:
        """The outputs of a plain loop over ONNX Runtime; `states` are those before it, and become those after it."""
        run, found = plain(self.make().SerializeToString()), []
        states = dict(self.initial) if states is None else states
        for given in steps:
            made = run({**given, **states})
            states |= {name: made[after] for name, after in self.states.items()}
            found.append({name: made[name] for name in made if name not in self.states.values()})
        return found

    def drawn(self) -> list[dict[str, Any]]:
        return [{name: draw() for name, draw in self.inputs.items()} for _ in range(STEPS)]


H = np.zeros((1, 4), np.float32)
KINDS = {
    "plain": Kind(step_functions.cell, {"x": lambda: reals(1, 3)}, {"h": "hn"}, {"h": H}),
    "half": Kind(
        lambda: step_functions.cell(kind=step_functions.HALF),
        {"x": lambda: reals(1, 3).astype(np.float16)},
        {"h": "hn"},
        {"h": H.astype(np.float16)},
    ),
    "single": Kind(lambda: step_functions.cell(batch=1), {"x": lambda: reals(1, 3)}, {"h": "hn"}, {"h": H}),
    "tokens": Kind(
        step_functions.embedding,
        {"token": lambda: RNG.integers(0, 5, 1)},
        {"count": "count_out"},
        {"count": np.zeros((1, 1), np.int64)},
    ),
    "two": Kind(
        step_functions.two,
        {"a": lambda: reals(1, 2), "b": lambda: reals(1, 2)},
        {"past_a": "present_a", "past_b": "present_b"},
        {"past_a": np.zeros((1, 2), np.float32), "past_b": np.zeros((1, 2), np.float32)},
    ),
}


def saved(folder: Path) -> dict[str, Path]:
    """Write a file of each kind to a folder."""
    return {name: step_functions.saved(folder, name, kind.make) for name, kind in KINDS.items()}


def answer(made: Any) -> dict[str, Any]:
    """The outputs of a step, by name."""
    return dict(made) if isinstance(made, Mapping) else {"y": made}


def equal(found: Any, wanted: dict[str, Any]) -> None:
    found = answer(found)
    assert found.keys() == wanted.keys()
    for name, array in wanted.items():
        assert found[name].dtype == array.dtype
        np.testing.assert_array_equal(found[name], array)
