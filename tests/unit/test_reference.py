"""The oracle's formulas, checked by hand where the gates are wide open or shut."""

from __future__ import annotations

import numpy as np
import pytest

from support.checks.reference_cells import gru_step, lstm_step, sigmoid

#: A bias that opens a gate fully; its negative shuts it.
OPEN = 60.0


def _lstm(x: float, h: float, c: float, gates: tuple[float, float, float, float]) -> tuple[float, float]:
    """One unit whose gates i, f, candidate, o come from the bias alone."""
    kernel = recurrent = np.zeros((1, 4))
    after = lstm_step(np.array([[x]]), np.array([[h]]), np.array([[c]]), kernel, recurrent, np.array(gates))
    return float(after[0][0, 0]), float(after[1][0, 0])


def test_sigmoid() -> None:
    x = np.array([-1000.0, -2.0, 0.0, 3.0, 1000.0])
    np.testing.assert_allclose(
        sigmoid(x), [0.0, 1 / (1 + np.exp(2)), 0.5, 1 / (1 + np.exp(-3)), 1.0], rtol=1e-12
    )


def test_lstm_remembers_with_an_open_forget_gate() -> None:
    h, c = _lstm(0.3, 0.2, 0.7, (-OPEN, OPEN, 0.9, OPEN))
    assert c == pytest.approx(0.7)
    assert h == pytest.approx(np.tanh(0.7))


def test_lstm_writes_with_an_open_input_gate_and_forgets_with_a_shut_one() -> None:
    h, c = _lstm(0.3, 0.2, 0.7, (OPEN, -OPEN, 0.9, OPEN))
    assert c == pytest.approx(np.tanh(0.9))
    assert h == pytest.approx(np.tanh(np.tanh(0.9)))


def test_lstm_says_nothing_with_a_shut_output_gate() -> None:
    h, c = _lstm(0.3, 0.2, 0.7, (OPEN, OPEN, 0.9, -OPEN))
    assert c == pytest.approx(0.7 + np.tanh(0.9))
    assert h == pytest.approx(0.0)


def test_lstm_reads_input_and_state_through_their_kernels() -> None:
    rng = np.random.default_rng(1)
    x, h, c = rng.standard_normal((2, 3)), rng.standard_normal((2, 4)), rng.standard_normal((2, 4))
    kernel, recurrent = rng.standard_normal((3, 16)), rng.standard_normal((4, 16))
    bias = x[0] @ kernel + h[0] @ recurrent
    zero = np.zeros((1, 3)), np.zeros((1, 4))
    expected = lstm_step(zero[0], zero[1], c[:1], kernel, recurrent, bias)
    got = lstm_step(x, h, c, kernel, recurrent)
    np.testing.assert_allclose(got[0][:1], expected[0], rtol=1e-12)
    np.testing.assert_allclose(got[1][:1], expected[1], rtol=1e-12)


@pytest.mark.parametrize("reset_after", [True, False])
def test_gru_keeps_or_replaces_its_state(reset_after: bool) -> None:
    kernel = np.zeros((1, 3))
    recurrent = np.array([[0.0, 0.0, 2.0]])
    x, h = np.array([[1.0]]), np.array([[0.4]])

    def step(update: float, reset: float) -> float:
        bias = np.array([update, reset, 0.1])
        whole = np.stack([bias, np.zeros(3)]) if reset_after else bias
        return float(gru_step(x, h, kernel, recurrent, whole, reset_after=reset_after)[0, 0])

    assert step(OPEN, OPEN) == pytest.approx(0.4)
    assert step(-OPEN, OPEN) == pytest.approx(np.tanh(0.1 + 0.8))
    assert step(-OPEN, -OPEN) == pytest.approx(np.tanh(0.1))


def test_gru_without_bias_is_gru_with_zeros() -> None:
    rng = np.random.default_rng(2)
    x, h = rng.standard_normal((2, 3)), rng.standard_normal((2, 4))
    kernel, recurrent = rng.standard_normal((3, 12)), rng.standard_normal((4, 12))
    for reset_after, bias in ((True, np.zeros((2, 12))), (False, np.zeros(12))):
        one = gru_step(x, h, kernel, recurrent, reset_after=reset_after)
        np.testing.assert_array_equal(one, gru_step(x, h, kernel, recurrent, bias, reset_after=reset_after))
