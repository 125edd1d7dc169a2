"""Layers in sentences: how each is called, and which one made an operation.

The second is read from the operation's name: Keras opens a scope that is named as the layer.
"""

from __future__ import annotations

import re
from typing import Any

from stepwell_server.compile.errors import quoted
from stepwell_server.compile.graph.tensorflow_setup import keras
from stepwell_server.compile.graph.watch import all_operations


def layer_of(model: Any, operation: str) -> Any:
    """Return the innermost layer in whose scope an operation is, or None. TensorFlow numbers scopes of one name."""
    layers = {layer.name: layer for layer in all_operations(model)}
    for scope in reversed(operation.split("/")[:-1]):
        found = layers.get(scope) or layers.get(re.sub(r"_\d+$", "", scope))
        if found is not None:
            return found
    return None


def layer_in(model: Any, text: str) -> Any:
    """Return the layer that made the first operation which an error of TensorFlow names, or None."""
    found = (layer_of(model, name) for name in re.findall(r"[\w.]+(?:/[\w.]+)+", text))
    return next((layer for layer in found if layer is not None), None)


def named(model: Any, layer: Any) -> str:
    """Return how a layer, an operation or the model itself is called in a sentence."""
    if layer is None:
        return "the model"
    if layer is model:
        return f"the model's own call ({type(model).__name__})"
    what = "layer" if isinstance(layer, keras.Layer) else "operation"
    return f"the {what} {quoted(layer.name)} ({type(layer).__name__})"
