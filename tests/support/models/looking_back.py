"""Custom layers that look back, or number their time steps, by functions of TensorFlow and `keras.ops`."""

from __future__ import annotations

from typing import Any

from stepwell_server.compile.graph.tensorflow_setup import keras
from support.models.odd_layers import Apply, kind

ops = keras.ops


def layer(kind: str, n: int = 1) -> Apply:
    """Return a layer of a kind, also of those that others registered."""
    return Apply(kind, n)


def _numbers(x: Any) -> Any:
    return ops.cast(ops.arange(ops.shape(x)[1]), "float32")[None, :, None]


@kind
def tiled_numbers(layer: Apply, x: Any) -> Any:
    """Numbers of time steps, repeated for each row, as features."""
    numbers = ops.tile(_numbers(x), (ops.shape(x)[0], 1, 1))
    return ops.concatenate([ops.sqrt(numbers), x * layer.weight, numbers / 16.0], -1)


@kind
def broadcast_numbers(layer: Apply, x: Any) -> Any:
    return x + layer.weight * ops.broadcast_to(_numbers(x), (*ops.shape(x)[:2], 1)) / 8.0


@kind
def numbers_times_ones(layer: Apply, x: Any) -> Any:
    ones = ops.ones_like(x[..., :1])
    return ops.concatenate([x, ops.minimum(ones * _numbers(x), 9.0)], -1)
