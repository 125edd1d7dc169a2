"""Custom layers that look back, or number their time steps, by functions of TensorFlow and `keras.ops`."""

from __future__ import annotations

from typing import Any

import tensorflow as tf

from stepwell_server.compile.graph.tensorflow_setup import keras
from support.models.odd_layers import Apply, kind

ops = keras.ops


def layer(kind: str, n: int = 1, name: str | None = None) -> Apply:
    """Return a layer of a kind, also of those that others registered."""
    return Apply(kind, n, name=name or kind)


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
def numbers_on_a_stack(layer: Apply, x: Any) -> Any:
    """Beside the data, behind it and before the rows."""
    numbers = ops.broadcast_to(_numbers(x), ops.shape(x))
    mask = ops.cast(numbers % 3 > 1, "float32")
    found = ops.stack([x * layer.weight, numbers / 8.0, mask], -2)
    return ops.max(found, -2) + ops.min(ops.stack([mask, x], 0), 0)


@kind
def attention_to_the_last(layer: Apply, x: Any) -> Any:
    """What the refusal of attention to all time steps proposes."""
    n, steps = layer.n, ops.shape(x)[1]
    places = ops.arange(steps)[:, None] + ops.arange(n)
    last = ops.take(ops.pad(x, [[0, 0], [n - 1, 0], [0, 0]]), places, axis=1)
    scores = ops.where(places[None] >= n - 1, ops.einsum("btd,btnd->btn", x * layer.weight, last), -1e9)
    return ops.einsum("btn,btnd->btd", ops.softmax(scores), last)


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


def _time_first(x: Any) -> Any:
    return ops.transpose(x, (1, 0, *range(2, len(x.shape))))


@kind
def time_before_rows(layer: Apply, x: Any) -> Any:
    """Differences, padding after the first step, sums, the first value and numbers of time steps, as PyTorch lays them out."""
    y = _time_first(x * layer.weight)
    y = ops.pad(y[1:] - y[:-1] * 0.5, [[1, 0], [0, 0], [0, 0]])
    y = y + ops.cumsum(y, 0) / _time_first(_numbers(x) + 1.0) - y[:1]
    return _time_first(ops.concatenate([ops.ones_like(y[: layer.n]), y], 0)[: -layer.n])


@kind
def frames_before_rows(layer: Apply, x: Any) -> Any:
    y = ops.pad(_time_first(x), [[layer.n, 0], [0, 0], [0, 0]])
    places = ops.arange(ops.shape(x)[1])[:, None] + ops.arange(layer.n + 1)
    found = ops.take(y, places, axis=0) * ops.reshape(ops.arange(1.0, layer.n + 2), (1, -1, 1, 1))
    return ops.transpose(ops.max(found, 1), (1, 0, 2)) * layer.weight


@kind
def cumulative_norm(layer: Apply, x: Any) -> Any:
    """The cLN of Conv-TasNet: of all channels so far, with the roundings of its code in PyTorch."""
    channels, steps = x.shape[2], ops.shape(x)[1]
    total = ops.cumsum(ops.sum(x, 2), 1)
    squares = ops.cumsum(ops.sum(ops.square(x), 2), 1)
    count = ops.cast(ops.arange(channels, channels * (steps + 1), channels), "float32")[None]
    mean = total / count
    variance = (squares - 2 * mean * total) / count + ops.square(mean)
    return (x - mean[..., None]) / ops.sqrt(variance + 1e-3)[..., None] * (1.0 + layer.weight)


@kind
def cumulative_norm_of_values(layer: Apply, x: Any) -> Any:
    """The same over time and channels as one long series, of which each time step takes the last."""
    rows, steps, channels = ops.shape(x)[0], ops.shape(x)[1], x.shape[2]
    values = ops.reshape(x * (1.0 + layer.weight), (rows, steps * channels))
    count = ops.cast((ops.arange(steps) + 1) * channels, "float32")
    mean = ops.cumsum(values, 1)[:, channels - 1 :: channels] / count
    square = ops.cumsum(ops.square(values), 1)[:, channels - 1 :: channels] / count
    return (x - mean[..., None]) * ops.rsqrt(square - ops.square(mean) + 1e-3)[..., None]


@kind
def less_the_mean_so_far(layer: Apply, x: Any) -> Any:
    """Each element less all up to it, also those of its own time step."""
    count = ops.cast(ops.arange(ops.shape(x)[1]) + 1, "float32")
    return x - ops.cumsum(x, 1) / ops.broadcast_to(count[None, :, None], ops.shape(x))


@kind
def places_of_samples(layer: Apply, x: Any) -> Any:
    """Numbers of samples, and others of their places in a frame, beside samples that are two frames late."""
    rows, steps, each = ops.shape(x)[0], ops.shape(x)[1], x.shape[2]
    samples = ops.reshape(x + layer.weight, (rows, steps * each))
    late = ops.pad(samples[:, : -2 * each], [[0, 0], [2 * each, 0]], constant_values=0.5)
    number, places = ops.arange(steps * each), ops.tile(ops.arange(1.0, each + 1), [steps])
    late = late * places[None] * ops.cast(number % 7 + number // each, "float32")
    return ops.reshape(late, (rows, steps, each))


@kind
def rolled(layer: Apply, x: Any) -> Any:
    """The last time steps come first, and are replaced."""
    later = ops.roll(x, layer.n, axis=1)
    return ops.concatenate([ops.zeros_like(later[:, : layer.n]), later[:, layer.n :]], 1)


@kind
def rolled_where(layer: Apply, x: Any) -> Any:
    """The same by a choice between the sequence and zeros."""
    later = ops.roll(x * layer.weight, layer.n, axis=1)
    return ops.where(_numbers(x) < layer.n, 0.5 * x, later)


@kind
def rolled_unless(layer: Apply, x: Any) -> Any:
    """The same beside a constant, for more time steps than came from the end."""
    later = ops.tanh(ops.roll(x, layer.n, axis=1) + layer.weight)
    return ops.where(_numbers(x) > layer.n, later, 0.25)


@kind
def rolled_where_too_few(layer: Apply, x: Any) -> Any:
    return ops.where(_numbers(x) < layer.n - 1, 0.0, ops.roll(x * layer.weight, layer.n, axis=1))


@kind
def rolled_where_late(layer: Apply, x: Any) -> Any:
    return ops.where(_numbers(x) < layer.n, ops.roll(x * layer.weight, layer.n, axis=1), 0.0)


@kind
def rolled_where_large(layer: Apply, x: Any) -> Any:
    return ops.where(x > 0.0, 0.0, ops.roll(x * layer.weight, layer.n, axis=1))


@kind
def rolled_on_both_sides(layer: Apply, x: Any) -> Any:
    return (
        ops.where(_numbers(x) < layer.n, ops.roll(x, 1, axis=1), ops.roll(x, layer.n, axis=1)) * layer.weight
    )


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
