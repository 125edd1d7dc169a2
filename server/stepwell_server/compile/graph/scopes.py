"""Names of layers in messages, and the layer that created an operation.

The layer follows from the operation's name, because Keras opens a scope with the layer's name.
"""

from __future__ import annotations

import re
from typing import Any

from stepwell_server.compile.errors import quoted
from stepwell_server.compile.graph.tensorflow_setup import keras
from stepwell_server.compile.graph.watch import all_operations


def layer_of(model: Any, operation: str) -> Any:
    """Return the innermost layer whose scope contains an operation, or None. TensorFlow numbers repeated scopes."""
    layers = {layer.name: layer for layer in all_operations(model)}
    for scope in reversed(operation.split("/")[:-1]):
        found = layers.get(scope) or layers.get(re.sub(r"_\d+$", "", scope))
        if found is not None:
            return found
    return None


def layer_in(model: Any, text: str) -> Any:
    """Return the layer that created the first operation in a TensorFlow error, or None."""
    found = (layer_of(model, name) for name in re.findall(r"[\w.]+(?:/[\w.]+)+", text))
    return next((layer for layer in found if layer is not None), None)


def named(model: Any, layer: Any) -> str:
    """Return the description of a layer, an operation or the model for a message."""
    if layer is None:
        return "the model"
    if layer is model:
        return f"the model's own call ({type(model).__name__})"
    what = "layer" if isinstance(layer, keras.Layer) else "operation"
    return f"the {what} {quoted(layer.name)} ({type(layer).__name__})"
