"""One step of the classic recurrent cells in plain numpy: the oracle that tests compare everything with.

The formulas are those of the papers, with the names and the order of gates that Keras uses for its weights:

- LSTM: Hochreiter and Schmidhuber, "Long Short-Term Memory", Neural Computation 9(8), 1997, with the forget
  gate of Gers, Schmidhuber and Cummins, "Learning to Forget", Neural Computation 12(10), 2000. Gates i, f, c, o.
- GRU: Cho et al., "Learning Phrase Representations using RNN Encoder-Decoder", 2014 (arXiv 1406.1078v3;
  ``reset_after=False``), and v1 of the same, which resets after the product, as cuDNN does
  (``reset_after=True``). Gates z, r, h.

Everything is computed in the type of the arrays given: give float64 for an oracle.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[Any]


def sigmoid(x: Floats) -> Floats:
    """Return ``1 / (1 + exp(-x))``, without overflow."""
    result: Floats = 0.5 * (1.0 + np.tanh(0.5 * x))
    return result


def lstm_step(
    x: Floats, h: Floats, c: Floats, kernel: Floats, recurrent_kernel: Floats, bias: Floats | None = None
) -> tuple[Floats, Floats]:
    """Advance an LSTM (tanh and sigmoid) by one step.

    Args:
        x: input, ``(batch, features)``.
        h: hidden state, ``(batch, units)``; it is also the output.
        c: cell state, ``(batch, units)``.
        kernel: ``(features, 4 * units)``, gates in the order i, f, c, o.
        recurrent_kernel: ``(units, 4 * units)``.
        bias: ``(4 * units,)``, or None.

    Returns:
        The new ``(h, c)``.
    """
    z = x @ kernel + h @ recurrent_kernel
    if bias is not None:
        z = z + bias
    i, f, candidate, o = np.split(z, 4, axis=-1)
    after = sigmoid(f) * c + sigmoid(i) * np.tanh(candidate)
    return sigmoid(o) * np.tanh(after), after


def gru_step(
    x: Floats,
    h: Floats,
    kernel: Floats,
    recurrent_kernel: Floats,
    bias: Floats | None = None,
    *,
    reset_after: bool = True,
) -> Floats:
    """Advance a GRU (tanh and sigmoid) by one step.

    Args:
        x: input, ``(batch, features)``.
        h: state, ``(batch, units)``; it is also the output.
        kernel: ``(features, 3 * units)``, gates in the order z, r, h.
        recurrent_kernel: ``(units, 3 * units)``.
        bias: ``(2, 3 * units)`` (input's, recurrent) with ``reset_after``, else ``(3 * units,)``; or None.
        reset_after: the reset gate applies after the product with the recurrent kernel, not before.

    Returns:
        The new state.
    """
    units = h.shape[-1]
    of_input, of_state = np.zeros_like(kernel[0]), np.zeros_like(kernel[0])
    if bias is not None:
        of_input, of_state = (bias[0], bias[1]) if reset_after else (bias, of_state)
    xz, xr, xh = np.split(x @ kernel + of_input, 3, axis=-1)
    if reset_after:
        hz, hr, hh = np.split(h @ recurrent_kernel + of_state, 3, axis=-1)
        candidate = np.tanh(xh + sigmoid(xr + hr) * hh)
    else:
        hz, hr = np.split(h @ recurrent_kernel[:, : 2 * units], 2, axis=-1)
        candidate = np.tanh(xh + (sigmoid(xr + hr) * h) @ recurrent_kernel[:, 2 * units :])
    update = sigmoid(xz + hz)
    after: Floats = update * h + (1.0 - update) * candidate
    return after
