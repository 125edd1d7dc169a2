"""Custom layers that loop over time by `keras.ops.scan`, `tf.scan`, `tf.map_fn` and `tf.while_loop`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import tensorflow as tf

from stepwell_server.compile.graph.tensorflow_setup import keras
from support.models.looking_back import layer
from support.models.odd_layers import Apply, kind

ops = keras.ops
__all__ = ["layer"]
Body = Callable[[Any, Any, Any, Any, Any], Any]
"""Takes the number of the iteration, what it carries, the list that it writes, the one it reads, and its length."""


def _turned(x: Any) -> Any:
    return ops.swapaxes(x, 0, 1)


def _scanned(x: Any, body: Callable[[Any, Any], Any], first: Any = None) -> Any:
    first = ops.zeros_like(x[:, 0]) if first is None else first
    return _turned(ops.scan(body, first, _turned(x))[1])


@kind
def scan_of_maxima(layer: Apply, x: Any) -> Any:
    def body(before: Any, now: Any) -> Any:
        after = ops.maximum(before, now * layer.weight)
        return after, after - now

    return _scanned(x, body, 0.25 * ops.ones_like(x[:, 0]))


@kind
def scan_of_late(layer: Apply, x: Any) -> Any:
    """Behind a shift and in front of another one, less its first result."""
    late = ops.pad(x, ((0, 0), (2, 0), (0, 0)))[:, :-2]
    found = _scanned(late, lambda c, v: (0.9 * c + v, c * v + layer.weight))
    padded = ops.pad(found, ((0, 0), (3, 0), (0, 0)), constant_values=0.5)
    return ops.tanh(padded)[:, :-3] - found[:, :1]


@kind
def state_of_a_scan(layer: Apply, x: Any) -> Any:
    return ops.scan(lambda c, v: (0.9 * c + v, c), ops.zeros_like(x[:, 0]), _turned(x * layer.weight))[0]


@kind
def smoothed(layer: Apply, x: Any) -> Any:
    """The moving average of LEAF's PCEN, which begins with the first value."""
    found = tf.scan(
        lambda before, now: 0.1 * now + 0.9 * before,
        tf.transpose(x * layer.weight, (1, 0, 2)),
        initializer=tf.gather(x, 0, axis=1),
    )
    return x / (0.1 + ops.abs(tf.transpose(found, (1, 0, 2))))


@kind
def scan_from_the_first(layer: Apply, x: Any) -> Any:
    """Without an initial value, so the first element is not computed in the loop."""
    found = tf.scan(lambda before, now: ops.tanh(before + now * layer.weight), tf.transpose(x, (1, 0, 2)))
    return tf.transpose(found, (1, 0, 2))


@kind
def mapped_over_time(layer: Apply, x: Any) -> Any:
    found = tf.map_fn(
        lambda now: now * layer.weight + tf.reduce_sum(now, -1, True), tf.transpose(x, (1, 0, 2))
    )
    return tf.transpose(found, (1, 0, 2))


@kind
def loop_of_turned_elements(layer: Apply, x: Any) -> Any:
    """Elements of which the rows are the last axis, beside constants of which they are the first."""
    one = tf.transpose(x, (1, 2, 0))
    length = one.shape[0] or tf.shape(one)[0]
    read = tf.TensorArray(x.dtype, length, clear_after_read=False).unstack(one)
    start = (0, tf.TensorArray(x.dtype, length), tf.TensorArray(x.dtype, length))

    def body(i: Any, turned: Any, other: Any) -> Any:
        return (
            i + 1,
            turned.write(i, read.read(i) * tf.reshape(layer.weight, (-1, 1))),
            other.write(i, tf.ones_like(x[:, 0])),
        )

    found = tf.while_loop(lambda i, *_: i < length, body, start)
    return tf.transpose(found[1].stack(), (2, 0, 1)) + tf.transpose(found[2].stack(), (1, 0, 2))


@kind
def loop_with_two_states(layer: Apply, x: Any) -> Any:
    """Two sequences, two states, a value of each row, weights, and two results."""
    one = tf.transpose(x, (1, 0, 2))
    length = one.shape[0] or tf.shape(one)[0]
    reads = [tf.TensorArray(x.dtype, length).unstack(value) for value in (one, tf.tanh(one))]
    writes = [tf.TensorArray(x.dtype, length) for _ in range(2)]
    each, scale = tf.reduce_sum(x[:, 0], -1, keepdims=True), tf.range(1.0, x.shape[-1] + 1)

    def body(i: Any, high: Any, total: Any, first: Any, second: Any) -> Any:
        high = tf.maximum(high, reads[0].read(i))
        total = 0.5 * total + reads[1].read(i) * scale * layer.weight + each
        return i + 1, high, total, first.write(i, high * total), second.write(i, total + each)

    start = (0, tf.zeros_like(x[:, 0]), x[:, 0], *writes)
    found = tf.while_loop(lambda i, *_: i < length, body, start)
    return tf.transpose(found[3].stack() + found[4].stack(), (1, 0, 2))


def looped(name: str, body: Body, runs: Callable[[Any, Any, Any], Any] | None = None) -> None:
    """Register a layer with a loop of this body, which runs while ``runs`` of its number, state and length."""

    def call(_layer: Apply, x: Any) -> Any:
        one = tf.transpose(x, (1, 0, 2))
        length = one.shape[0] or tf.shape(one)[0]
        read = tf.TensorArray(x.dtype, length, clear_after_read=False).unstack(one)
        written = tf.TensorArray(x.dtype, length, clear_after_read=False, element_shape=one.shape[1:])
        found = tf.while_loop(
            lambda i, state, _: i < length if runs is None else runs(i, state, length),
            lambda i, state, write: body(i, state, write, read, length),
            (0, tf.zeros_like(x[:, 0]), written),
        )
        return tf.transpose(found[2].stack(), (1, 0, 2))

    call.__name__ = name
    kind(call)


_Condition = Callable[[Any, Any, Any], Any]
#: Each differs by one detail from a loop that is served; `causal.REFUSED_LOOPS` has the reasons.
_BODIES: dict[str, Body | tuple[Body, _Condition]] = {
    "loop_ahead": lambda i, c, w, r, n: (i + 1, c + r.read(tf.minimum(i + 1, n - 1)), w.write(i, c)),
    "loop_of_the_last": lambda i, c, w, r, n: (i + 1, c + r.read(i) * r.read(n - 1), w.write(i, c)),
    "loop_of_the_second": lambda i, c, w, r, n: (i + 1, c + r.read(i) * r.read(1), w.write(i, c)),
    "loop_written_backwards": lambda i, c, w, r, n: (i + 1, c + r.read(i), w.write(n - 1 - i, c)),
    "loop_read_backwards": lambda i, c, w, r, n: (i + 1, c + r.read(n - 1 - i), w.write(i, c)),
    "loop_by_two": lambda i, c, w, r, n: (i + 2, c + r.read(i), w.write(i, c)),
    "loop_over_half": (
        lambda i, c, w, r, n: (i + 1, c + r.read(i), w.write(i, c)),
        lambda i, c, n: i < n // 2,
    ),
    "loop_until_70000": (
        lambda i, c, w, r, n: (i + 1, c + r.read(i), w.write(i, c)),
        lambda i, c, n: tf.logical_and(i < n, i < 70000),
    ),
    "loop_until_20000000": (
        lambda i, c, w, r, n: (i + 1, c + r.read(i), w.write(i, c)),
        lambda i, c, n: tf.logical_and(i < n, i < 20_000_000),
    ),
    "loop_until_a_sum": (
        lambda i, c, w, r, n: (i + 1, c + r.read(i), w.write(i, c)),
        lambda i, c, n: tf.logical_and(i < n, tf.reduce_all(c < 1e9)),
    ),
    "loop_of_numbers": lambda i, c, w, r, n: (i + 1, c + r.read(i) * tf.cast(i, c.dtype), w.write(i, c)),
    "loop_of_its_length": lambda i, c, w, r, n: (i + 1, c + r.read(i) / tf.cast(n, c.dtype), w.write(i, c)),
    "loop_of_short_lengths": lambda i, c, w, r, n: (
        i + 1,
        c + tf.where(tf.sin(1e3 * r.read(i)) > 0.999999, tf.cast(tf.minimum(n, 3), c.dtype), 3.0),
        w.write(i, c),
    ),
    "loop_of_long_lengths": lambda i, c, w, r, n: (
        i + 1,
        c + tf.where(tf.sin(1e3 * r.read(i)) > 0.999999, tf.cast(min(n, 400), c.dtype), 3.0),
        w.write(i, c),
    ),
    "loop_of_other_rows": lambda i, c, w, r, n: (
        i + 1,
        c + tf.reduce_mean(r.read(i), 0, True),
        w.write(i, c),
    ),
    "loop_of_what_it_wrote": lambda i, c, w, r, n: (i + 1, c + r.read(i), w.write(i, c + w.read(0))),
}
for _name, _given in _BODIES.items():
    looped(_name, *(_given if isinstance(_given, tuple) else (_given,)))


@kind
def scan_of_long_lengths(layer: Apply, x: Any) -> Any:
    """An iteration may use a number that only sequences of fewer than 400 time steps change."""
    length = tf.minimum(tf.shape(x)[1], 400)

    def body(before: Any, now: Any) -> Any:
        is_rare = tf.sin(1e3 * now) > 0.999999
        return 0.5 * before + now, now * tf.where(is_rare, tf.cast(length, x.dtype), layer.weight)

    return _scanned(x, body)


@kind
def scan_of_all(layer: Apply, x: Any) -> Any:
    """An iteration uses the whole sequence."""
    return _scanned(x, lambda c, v: (0.9 * c + v, c + layer.weight * ops.mean(x, 1)))


@kind
def scan_from_the_end(layer: Apply, x: Any) -> Any:
    return _scanned(x, lambda c, v: (0.9 * c + v * layer.weight, c), x[:, -1])


@kind
def scan_backwards(layer: Apply, x: Any) -> Any:
    found = tf.scan(lambda a, v: 0.5 * a + v * layer.weight, tf.transpose(x, (1, 0, 2)), reverse=True)
    return tf.transpose(found, (1, 0, 2))
