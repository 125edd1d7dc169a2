"""Custom layers and models whose weights are shared, or are not restored; registered for loading."""

from __future__ import annotations

from typing import Any

import keras

_register = keras.saving.register_keras_serializable(package="sharing")


@_register
class TiedOutput(keras.Layer):
    """Scores each token by its own row of an embedding: holds the embedding's variable as its own."""

    def __init__(self, table: Any, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.table = table

    def build(self, shape: Any) -> None:
        self.kernel = self.table.embeddings

    def call(self, inputs: Any) -> Any:
        return keras.ops.matmul(inputs, keras.ops.transpose(self.kernel))


@_register
class TiedTokens(keras.Model):
    """A language model with tied embeddings."""

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.table = keras.layers.Embedding(11, 4)
        self.rnn = keras.layers.GRU(4, return_sequences=True)
        self.scores = TiedOutput(self.table)

    def build(self, shape: Any) -> None:
        self.table.build(shape)
        self.rnn.build((*shape, 4))
        self.scores.build((*shape, 4))
        super().build(shape)

    def call(self, tokens: Any) -> Any:
        return self.scores(self.rnn(self.table(tokens)))


@_register
class ForgetsItsHead(keras.Model):
    """A model whose build() leaves a layer to be built when it is first called."""

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.rnn = keras.layers.LSTM(4, return_sequences=True)
        self.head = keras.layers.Dense(2, name="the_head")

    def build(self, shape: Any) -> None:
        self.rnn.build(shape)
        self.built = True

    def call(self, inputs: Any) -> Any:
        return self.head(self.rnn(inputs))


@_register
class Scale(keras.Layer):
    """A layer of ``variables`` weights, the number that the class has when it is built."""

    variables = 1

    def build(self, shape: Any) -> None:
        self.scales = [self.add_weight(shape=(shape[-1],), name=f"scale_{i}") for i in range(self.variables)]

    def call(self, inputs: Any) -> Any:
        return inputs * sum(self.scales)
