"""The model zoo: small Keras models with random, non-trivial weights. Keras is imported inside functions only."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

BUILDERS: dict[str, Callable[[], Any]] = {}
"""Every model that Stepwell must serve, by name."""


def _zoo(build: Callable[[], Any]) -> Callable[[], Any]:
    BUILDERS[build.__name__] = build
    return build


def build(name: str, seed: int = 0) -> Any:
    """Build the model ``name`` with random weights and biases drawn from ``seed``."""
    model = BUILDERS[name]()
    randomize(model, seed)
    return model


def randomize(model: Any, seed: int = 0) -> None:
    """Give every weight a random value: zero biases and unit variances would hide mistakes."""
    rng = np.random.default_rng(seed)
    for weight in model.weights:
        value = rng.standard_normal(weight.shape) * 0.3
        if "variance" in weight.path:
            value = np.abs(value) + 0.5
        weight.assign(value.astype("float32"))


@_zoo
def lstm_dense() -> Any:
    import keras

    x = keras.Input((None, 3), name="x")
    y = keras.layers.LSTM(8, return_sequences=True, name="lstm")(x)
    return keras.Model(x, keras.layers.Dense(2, name="y")(y))
