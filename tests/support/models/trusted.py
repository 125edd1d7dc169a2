"""A model that steps well although its graph does not prove it. Keras is imported inside the function only."""

from __future__ import annotations

from typing import Any

from support.models.zoo import randomize


def singular_values() -> Any:
    """Build an LSTM over singular values: an operation that the proof does not know."""
    from stepwell_server.compile.graph.tensorflow_setup import keras
    from support.models.custom_layers import SingularValues

    x = keras.Input((None, 4), name="x")
    lstm = keras.layers.LSTM(3, return_sequences=True, name="lstm")
    model = keras.Model(x, lstm(SingularValues(name="svd")(x)))
    randomize(model)
    return model
