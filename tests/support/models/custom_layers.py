"""Custom layers of the model zoo, registered for loading: the module that a user names with ``--import MODULE``."""

from __future__ import annotations

from typing import Any

import keras
import tensorflow as tf

_register = keras.saving.register_keras_serializable(package="zoo")


class _Cell(keras.Layer):
    """A cell whose state and output have `units` numbers."""

    def __init__(self, units: int, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.units = self.output_size = units
        self.state_size: int | list[int] = units

    def get_config(self) -> dict[str, Any]:
        return {**super().get_config(), "units": self.units}


@_register
class Accumulator(_Cell):
    """A cell that sums its inputs: no weights, the state is the sum."""

    def call(self, inputs: Any, states: Any) -> tuple[Any, list[Any]]:
        total = states[0] + keras.ops.cast(inputs, states[0].dtype)
        return total, [total]


@_register
class LearnedStart(_Cell):
    """A cell whose initial state is a weight."""

    def build(self, shape: Any) -> None:
        self.kernel = self.add_weight(shape=(shape[-1], self.units), name="kernel")
        self.start = self.add_weight(shape=(self.units,), name="start")

    def get_initial_state(self, batch_size: Any = None) -> list[Any]:
        return [keras.ops.tile(self.start[None], (batch_size, 1))]

    def call(self, inputs: Any, states: Any) -> tuple[Any, list[Any]]:
        after = keras.ops.tanh(keras.ops.matmul(inputs, self.kernel) + 0.7 * states[0])
        return after, [after]


@_register
class Swapper(_Cell):
    """A cell that only moves tensors: the output is the older of two remembered inputs."""

    def __init__(self, units: int, **kwargs: Any) -> None:
        super().__init__(units, **kwargs)
        self.state_size = [units, units]

    def call(self, inputs: Any, states: Any) -> tuple[Any, list[Any]]:
        return states[1], [inputs, states[0]]


@_register
class BetaCell(_Cell):
    """A cell with an operation that LiteRT does not have (the incomplete beta function)."""

    def build(self, shape: Any) -> None:
        self.kernel = self.add_weight(shape=(shape[-1], self.units), name="kernel")

    def call(self, inputs: Any, states: Any) -> tuple[Any, list[Any]]:
        mixed = keras.ops.sigmoid(keras.ops.matmul(inputs, self.kernel) + states[0])
        after = tf.math.betainc(2.0 * tf.ones_like(mixed), 3.0 * tf.ones_like(mixed), mixed)
        return after, [after]


@_register
class HoltWinters(_Cell):
    """Exponential smoothing with a level, a trend and seasons: its sums have three values."""

    def __init__(self, units: int, **kwargs: Any) -> None:
        super().__init__(units, **kwargs)
        self.state_size = [1, 1, units]
        self.output_size = 1

    def build(self, shape: Any) -> None:
        self.kernel = self.add_weight(shape=(3,), name="kernel")

    def call(self, inputs: Any, states: Any) -> tuple[Any, list[Any]]:
        one, two, three = (keras.ops.sigmoid(self.kernel[i]) for i in range(3))
        level, trend, seasons = states
        season, following = seasons[:, :1], seasons[:, 1:]
        now = one * (inputs - season) + (1 - one) * (level + trend)
        rising = two * (now - level) + (1 - two) * trend
        season = three * (inputs - now) + (1 - three) * season
        return now + rising + following[:, :1], [now, rising, keras.ops.concatenate([following, season], 1)]


@_register
class WholeQuotients(keras.Layer):
    """Divides by constants; LiteRT does not have one of its operations (the logarithm of the gamma function)."""

    def call(self, inputs: Any) -> Any:
        quotients = tf.floor(inputs / tf.range(1.0, 9.0))
        return quotients + 0.0 * tf.math.lgamma(1.0 + tf.abs(inputs))

    def compute_output_shape(self, shape: Any) -> Any:
        return (*shape[:-1], 8)


@_register
class SingularValues(keras.Layer):
    """A layer with an operation that the proof does not know; it does treat every time step by itself."""

    def call(self, inputs: Any) -> Any:
        squares = keras.ops.reshape(inputs, (-1, inputs.shape[1], 2, 2)) if inputs.shape[1] else inputs
        return tf.linalg.svd(squares, compute_uv=False)

    def compute_output_shape(self, shape: Any) -> Any:
        return (*shape[:-1], 2)


@_register
class StartSteps(keras.Layer):
    """Puts learned time steps in front of the sequence."""

    def __init__(self, count: int, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.count = count

    def build(self, shape: Any) -> None:
        self.start = self.add_weight(shape=(1, self.count, shape[-1]), name="start")

    def call(self, inputs: Any) -> Any:
        start = keras.ops.repeat(self.start, keras.ops.shape(inputs)[0], axis=0)
        return keras.ops.concatenate([start, inputs], axis=1)

    def get_config(self) -> dict[str, Any]:
        return {**super().get_config(), "count": self.count}


@_register
class Subclassed(keras.Model):
    """A subclassed model with two recurrent layers and a dictionary of outputs."""

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.first = keras.layers.LSTM(6, return_sequences=True, name="first")
        self.second = keras.layers.GRU(5, return_sequences=True, name="second")
        self.head = keras.layers.Dense(2)

    def call(self, inputs: Any, training: Any = None) -> dict[str, Any]:
        hidden = self.first(inputs, training=training)
        second = self.second(hidden, training=training)
        return {"y": self.head(second), "last": second[:, -1]}


@_register
class SubclassedTokens(keras.Model):
    """A subclassed model over tokens, without a ``training`` argument, with a tuple of outputs."""

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.table = keras.layers.Embedding(11, 4)
        self.rnn = keras.layers.SimpleRNN(5, return_sequences=True)

    def call(self, tokens: Any) -> tuple[Any, Any]:
        hidden = self.rnn(self.table(tokens))
        return hidden, hidden * 2.0


@_register
class SubclassedTwoArguments(keras.Model):
    """A subclassed model called with two arguments, one of them without time."""

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.rnn = keras.layers.LSTM(4)
        self.mix = keras.layers.Dense(4)

    def build(self, series_shape: Any, profile_shape: Any) -> None:
        # Keras restores a model of several arguments only if it can build it from their shapes.
        self.rnn.build(series_shape)
        self.mix.build(profile_shape)

    def call(self, series: Any, profile: Any) -> Any:
        return self.rnn(series) + self.mix(profile)


@_register
class Block(keras.Layer):
    """A layer with a recurrent layer inside."""

    def __init__(self, units: int, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.units = units
        self.rnn = keras.layers.GRU(units, return_sequences=True, name="rnn")
        self.norm = keras.layers.LayerNormalization()

    def build(self, shape: Any) -> None:
        self.rnn.build(shape)
        self.norm.build((*shape[:-1], self.units))

    def call(self, inputs: Any) -> Any:
        return self.norm(self.rnn(inputs))

    def get_config(self) -> dict[str, Any]:
        return {**super().get_config(), "units": self.units}


@_register
class NeverBuilt(keras.Model):
    """As `SubclassedTwoArguments`, but Keras cannot build it while loading: its weights are lost."""

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.rnn = keras.layers.LSTM(4)
        self.mix = keras.layers.Dense(4)

    def call(self, series: Any, profile: Any) -> Any:
        return self.rnn(series) + self.mix(profile)


@_register
class MeanOverTime(keras.Model):
    """A subclassed model that mixes time steps in its own call."""

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.rnn = keras.layers.LSTM(4, return_sequences=True)
        self.mix = keras.layers.Dense(4)

    def call(self, inputs: Any) -> Any:
        hidden = self.rnn(inputs)
        return self.mix(hidden) + keras.ops.mean(hidden, axis=1, keepdims=True)
