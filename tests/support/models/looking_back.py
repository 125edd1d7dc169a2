"""Custom layers that look back, or number their time steps, by functions of TensorFlow and `keras.ops`."""

from __future__ import annotations

from typing import Any

import tensorflow as tf

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


@kind
def lag_from_the_first(layer: Apply, x: Any) -> Any:
    """Earlier than the first time step is the first one."""
    return x - layer.weight * ops.take(x, ops.maximum(ops.arange(ops.shape(x)[1]) - layer.n, 0), 1)


@kind
def frames_from_the_first(layer: Apply, x: Any) -> Any:
    places = ops.arange(ops.shape(x)[1])[:, None] + ops.arange(-layer.n, 1, 2)[None]
    return ops.max(ops.take(ops.tanh(x), ops.maximum(places, 0), 1), 2)


@kind
def mirrored(layer: Apply, x: Any) -> Any:
    padded = tf.pad(x * layer.weight, [[0, 0], [1, 0], [0, 0]], "SYMMETRIC")
    return padded[:, 1:] * padded[:, :-1]


@kind
def rolled(layer: Apply, x: Any) -> Any:
    """The last time steps come first, and are replaced."""
    later = ops.roll(x, layer.n, axis=1)
    return ops.concatenate([ops.zeros_like(later[:, : layer.n]), later[:, layer.n :]], 1)


@kind
def rolled_around(layer: Apply, x: Any) -> Any:
    return x - ops.roll(x, layer.n, axis=1)


@kind
def other_for_a_length(layer: Apply, x: Any) -> Any:
    return x * (2.0 if x.shape[1] == layer.n else 1.0)


@kind
def overlapping_frames(layer: Apply, x: Any) -> Any:
    """Frames that begin every ``n`` elements, and whose last part may be shorter than ``n``."""
    whole = tf.signal.overlap_and_add(x * layer.weight, layer.n)
    return tf.reshape(whole[:, : tf.shape(x)[1] * layer.n], (tf.shape(x)[0], -1, layer.n))
