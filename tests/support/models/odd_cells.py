"""Cells and recurrent layers that do what no cell should, and one that is fine."""

from __future__ import annotations

from typing import Any

import keras

ops = keras.ops


@keras.saving.register_keras_serializable(package="zoo")
class OddCell(keras.Layer):
    """A cell that adds up its inputs, and does ``kind``."""

    def __init__(self, units: int, kind: str, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.units, self.kind = units, kind
        self.state_size = units
        self.seeds = keras.random.SeedGenerator(3)

    def build(self, shape: Any) -> None:
        self.count = self.add_weight(shape=(), name="count", trainable=False)

    def call(self, inputs: Any, states: Any) -> tuple[Any, list[Any]]:
        total = ops.tanh(0.5 * states[0] + inputs)
        rows = ops.cast(ops.arange(ops.shape(total)[0]), "float32")[:, None]
        if self.kind == "mean_over_rows":
            total -= ops.mean(total, 0, keepdims=True)
        elif self.kind == "number_of_the_row":
            total += rows
        elif self.kind == "state_of_rows":
            return total, [ops.broadcast_to(rows, ops.shape(total))]
        elif self.kind == "counting":
            self.count.assign(self.count + 1.0)
            total *= self.count
        elif self.kind == "growing":
            return total, [ops.concatenate([states[0], inputs], -1)]
        elif self.kind == "noisy":
            total += keras.random.normal(ops.shape(total), seed=self.seeds)
        return total, [total]

    def get_config(self) -> dict[str, Any]:
        return {**super().get_config(), "units": self.units, "kind": self.kind}


@keras.saving.register_keras_serializable(package="zoo")
class OwnLoop(keras.layers.RNN):
    """A layer with a loop of its own: it skips every second step."""

    def inner_loop(self, sequences: Any, initial_state: Any, mask: Any, training: Any = False) -> Any:
        return super().inner_loop(sequences * 0.5, initial_state, mask, training)


@keras.saving.register_keras_serializable(package="zoo")
class Reversing(keras.layers.RNN):
    """A layer that turns its sequence round before its loop."""

    def call(self, sequences: Any, initial_state: Any = None, mask: Any = None, training: Any = False) -> Any:
        return super().call(ops.flip(sequences, 1), initial_state, mask, training)


@keras.saving.register_keras_serializable(package="zoo")
class InTraining(keras.layers.Wrapper):
    """Calls its layer as in training, whatever its argument `training`."""

    def call(self, inputs: Any) -> Any:
        return self.layer(inputs, training=True)
