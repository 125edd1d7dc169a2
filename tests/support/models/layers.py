"""One model for each kind of layer that has a state. Keras is imported inside functions only.

`scripts/layer_table.py` writes the table in docs/explanation/models.md from them.
"""

from __future__ import annotations

import dataclasses
from typing import Any


@dataclasses.dataclass(frozen=True)
class Row:
    """A row of the table, and its model."""

    code: tuple[str, ...]
    """Layers, or expressions of ``x`` and ``ops``: each is applied to what the one before it gives."""
    keeps: str
    """What its state holds, in general."""
    features: tuple[int, ...] = (64,)
    """The shape of one row of the input at one time step."""


def _pad(steps: int, space: int = 0) -> str:
    if space:
        return f"ZeroPadding{space + 1}D((({steps}, 0){', (1, 1)' * space}))"
    return f"ZeroPadding1D(({steps}, 0))"


_WINDOW = "(kernel - 1) x dilation time steps of its input"
_POOL = "pool size - 1 time steps of its input"
ROWS = (
    Row(("Dense(64)",), "nothing"),
    Row(("LSTM(64)",), "`h` and `c`"),
    Row(("GRU(64)",), "`h`"),
    Row(("SimpleRNN(64)",), "`h`"),
    Row(("RNN([LSTMCell(64), GRUCell(32)])",), "the states of all cells"),
    Row(("ConvLSTM1D(4, 3, padding='same')",), "`h` and `c` at each place", (16, 4)),
    Row(("ConvLSTM2D(4, 3, padding='same')",), "`h` and `c` at each place", (4, 4, 4)),
    Row(("Conv1D(64, 3, padding='causal')",), _WINDOW),
    Row(("Conv1D(64, 3, padding='causal', dilation_rate=128)",), _WINDOW),
    Row(("Conv1D(64, 3, padding='causal', groups=8)",), _WINDOW),
    Row((_pad(4), "Conv1D(64, 3, dilation_rate=2)"), _WINDOW),
    Row((_pad(2), "DepthwiseConv1D(3)"), _WINDOW),
    Row((_pad(2), "SeparableConv1D(64, 3)"), _WINDOW),
    Row((_pad(2, 1), "Conv2D(4, 3)"), _WINDOW, (16, 4)),
    Row((_pad(2, 1), "DepthwiseConv2D(3)"), _WINDOW, (16, 4)),
    Row((_pad(2, 2), "Conv3D(4, 3)"), _WINDOW, (4, 4, 4)),
    Row((_pad(4), "AveragePooling1D(5, strides=1)"), _POOL),
    Row((_pad(4), "MaxPooling1D(5, strides=1)"), _POOL),
    Row((_pad(3), "Cropping1D((0, 3))"), "as many time steps as it shifts"),
    Row(("x - ops.pad(x[:, :-5], ((0, 0), (5, 0), (0, 0)))",), "time steps that lie between them"),
    Row(
        ("ops.pad(x[:, 1:] - x[:, :-1], ((0, 0), (1, 0), (0, 0)))",), "one time step, and where padding ends"
    ),
    Row(("x - x[:, :1]",), "the first time step, and whether it came"),
    Row(
        ("ops.concatenate([ops.repeat(x[:, :1], 2, 1), x], 1)", "Conv1D(64, 3)"),
        "the first time step, those of its window, and which of these came",
    ),
    Row(
        ("AveragePooling1D(5, strides=1, padding='same')", _pad(2), "Cropping1D((0, 2))"),
        "pool size - 1 time steps, and where the sequence begins",
    ),
    Row(
        (
            "ops.pad(x, ((0, 0), (3, 0), (0, 0)))",
            "ops.extract_sequences(ops.swapaxes(x, 1, 2), 4, 1)",
            "ops.moveaxis(x, 1, 3)",
        ),
        "length of a frame - 1 time steps",
    ),
    Row(
        ("Reshape((-1, 1))", "ZeroPadding1D((8, 0))", "Conv1D(8, 16, strides=8)", "Reshape((-1, 64))"),
        "the samples before this time step that its windows overlap",
    ),
    Row(
        ("Reshape((-1, 8))", "Conv1DTranspose(8, 4, strides=2)", "x[:, :-2:2]", "Reshape((-1, 64))"),
        "the elements before this time step that its windows overlap",
    ),
    Row(("ops.cumsum(x, 1)",), "the sum so far"),
    Row(("ops.cumprod(x, 1)",), "the product so far"),
    Row(
        ("ops.cumsum(x, 1) / ops.cumsum(ops.ones_like(x), 1)",), "the sum and the number of time steps so far"
    ),
)


def build(row: Row) -> Any:
    """Build a model with random weights. Keras numbers the names of its layers from the beginning."""
    from stepwell_server.compile.graph.tensorflow_setup import keras
    from support.models.zoo import randomize

    keras.backend.clear_session()
    x = y = keras.Input((None, *row.features), name="x")
    for code in row.code:
        made = eval(code, {**vars(keras.layers), "ops": keras.ops, "x": y})  # noqa: S307  the code above
        y = made(y) if isinstance(made, keras.layers.Layer) else made
    model = keras.Model(x, y)
    randomize(model)
    for weight in model.weights:
        weight.assign(weight * 0.25)  # So that 64 units are not chaotic, where rounding alone moves values.
    return model
