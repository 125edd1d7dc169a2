"""The numpy oracle, the compiled program and Keras agree."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from support.checks.reference_cells import gru_step, lstm_step
from support.models.compiled import zoo_model

ROWS, STEPS = 4, 9


def _weights(layer: Any) -> list[Any]:
    return [np.array(weight, np.float64) for weight in layer.weights]


def test_lstm() -> None:
    compiled = zoo_model("lstm_dense")
    kernel, recurrent, bias = _weights(compiled.model.get_layer("lstm"))
    dense, offset = _weights(compiled.model.get_layer("y"))
    (x,) = compiled.draw(1, ROWS, STEPS)
    h, c = np.zeros((ROWS, 8)), np.zeros((ROWS, 8))
    expected = []
    for time in range(STEPS):
        h, c = lstm_step(x[:, time].astype(np.float64), h, c, kernel, recurrent, bias)
        expected.append(h @ dense + offset)
    np.testing.assert_allclose(compiled.stepped([x], STEPS)["y"], np.stack(expected, 1), atol=1e-6)
    np.testing.assert_allclose(compiled.keras([x])["y"], np.stack(expected, 1), atol=1e-6)


@pytest.mark.parametrize(("name", "reset_after"), [("gru_reset_after", True), ("gru_reset_before", False)])
def test_gru(name: str, reset_after: bool) -> None:
    compiled = zoo_model(name)
    weights = _weights(compiled.model.get_layer("gru"))
    (x,) = compiled.draw(1, ROWS, STEPS)
    h = np.zeros((ROWS, 5))
    expected = []
    for time in range(STEPS):
        h = gru_step(x[:, time].astype(np.float64), h, *weights, reset_after=reset_after)
        expected.append(h)
    np.testing.assert_allclose(compiled.stepped([x], STEPS)["gru"], np.stack(expected, 1), atol=1e-6)
