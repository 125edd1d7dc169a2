"""The article's two systems, rebuilt in Keras 3 so that its printed numbers come out.

Two things changed since the TensorFlow 2.0 alpha in which the article was written. The initialisers draw other
numbers, so the kernels are drawn here as they were drawn then. And ``hard_sigmoid``, the recurrent
activation of that time, was ``clip(0.2 x + 0.5, 0, 1)``, where Keras 3 has ``clip(x / 6 + 0.5, 0, 1)``.
Either the old function is registered (`HardSigmoid.REGISTERED`; whoever loads the model must import this
module first), or the gates' weights are scaled by 1.2, which undoes the difference with stock Keras
(`HardSigmoid.SCALED`).
"""

from __future__ import annotations

import enum
import math
from typing import Any

import numpy as np
import numpy.typing as npt

# Not from Keras: it makes TensorFlow compute on one thread before anything does.
from stepwell_server.compile.graph.tensorflow_setup import keras, tf

Floats = npt.NDArray[np.float32]

INPUT_DIM = 3
OUTPUT_DIM = 3
TIMESTEPS = 2
BATCH_SIZE = 10
NODES = 10

#: mean(out) as the article prints it, to ten digits: two calls, a reset to zeros, a reset to ones.
FIRST = -0.0116448710
SECOND = -0.0153502645
AFTER_ZEROS = FIRST
AFTER_ONES = -0.2175499797


class HardSigmoid(enum.Enum):
    """How the model gets the hard sigmoid of TensorFlow 2.0."""

    REGISTERED = "registered"
    SCALED = "scaled"


@keras.saving.register_keras_serializable(package="stepwell_seed")
def tf2_hard_sigmoid(x: Any) -> Any:
    """The recurrent activation of TensorFlow 2.0: ``clip(0.2 x + 0.5, 0, 1)``."""
    return keras.ops.clip(0.2 * x + 0.5, 0.0, 1.0)


def article_input(batch_size: int = BATCH_SIZE) -> Floats:
    """The article's batch: ``(batch_size, 2, 3)``, drawn after ``np.random.seed(42)``."""
    random = np.random.RandomState(42)
    return random.rand(batch_size, TIMESTEPS, INPUT_DIM).astype(np.float32)


def article_weights() -> list[Floats]:
    """Kernel, recurrent kernel, bias, dense kernel, dense bias, as TensorFlow 2.0 drew them."""
    tf.random.set_seed(42)
    kernel = _glorot_uniform(INPUT_DIM, 4 * NODES)
    recurrent_kernel = _glorot_uniform(NODES, 4 * NODES)
    dense_kernel = _glorot_uniform(NODES, OUTPUT_DIM)
    bias = np.zeros(4 * NODES, np.float32)
    bias[NODES : 2 * NODES] = 1.0  # the forget gate's, as `unit_forget_bias` sets it
    return [kernel, recurrent_kernel, bias, dense_kernel, np.zeros(OUTPUT_DIM, np.float32)]


def stateful_model(hard_sigmoid: HardSigmoid = HardSigmoid.SCALED) -> keras.Model:
    """The article's first system: ``RNN(LSTMCell)``, stateful, batch size 10; outputs h, c, out."""
    inputs = keras.Input(batch_shape=(BATCH_SIZE, TIMESTEPS, INPUT_DIM))
    sequence, hidden_state, cell_state = _rnn(hard_sigmoid, stateful=True)(inputs)
    outputs = keras.layers.Dense(OUTPUT_DIM, name="out")(sequence)
    return _with_weights(keras.Model(inputs, [hidden_state, cell_state, outputs]), hard_sigmoid)


def stateless_model(hard_sigmoid: HardSigmoid = HardSigmoid.SCALED) -> keras.Model:
    """The article's second system: the same weights, not stateful, any batch size; outputs out, h, c."""
    inputs = keras.Input((TIMESTEPS, INPUT_DIM))
    sequence, hidden_state, cell_state = _rnn(hard_sigmoid, stateful=False)(inputs)
    outputs = keras.layers.Dense(OUTPUT_DIM, name="out")(sequence)
    return _with_weights(keras.Model(inputs, [outputs, hidden_state, cell_state]), hard_sigmoid)


def _glorot_uniform(fan_in: int, fan_out: int) -> Floats:
    limit = math.sqrt(6 / (fan_in + fan_out))
    drawn: Floats = tf.random.uniform((fan_in, fan_out), -limit, limit).numpy()
    return drawn


def _rnn(hard_sigmoid: HardSigmoid, *, stateful: bool) -> keras.layers.RNN:
    registered = hard_sigmoid is HardSigmoid.REGISTERED
    cell = keras.layers.LSTMCell(
        NODES, recurrent_activation=tf2_hard_sigmoid if registered else "hard_sigmoid", name="lstm_cell"
    )
    return keras.layers.RNN(cell, return_state=True, return_sequences=True, stateful=stateful, name="lstm")


def _with_weights(model: keras.Model, hard_sigmoid: HardSigmoid) -> keras.Model:
    weights = article_weights()
    if hard_sigmoid is HardSigmoid.SCALED:
        # 0.2 x = (1.2 x) / 6; the candidate (third block of columns) has tanh and stays as it is.
        scale = np.repeat(np.array([1.2, 1.2, 1.0, 1.2], np.float32), NODES)
        weights[:3] = [weight * scale for weight in weights[:3]]
    for variable, weight in zip(model.trainable_variables, weights, strict=True):
        variable.assign(weight)
    return model
