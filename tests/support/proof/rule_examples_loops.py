"""Examples for TensorFlow's own loops and the lists that they fill: see `rule_examples`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import tensorflow as tf

Example = Callable[[Any], Any]
raw = tf.raw_ops
_SCALE: Any = tf.Variable([0.5, 1.0, 1.5, 2.0])


def _listed(x: Any, axis: int) -> Any:
    """Return a list of what ``x`` has along an axis."""
    first = tf.transpose(x, (axis, *(i for i in range(3) if i != axis)))
    return raw.TensorListFromTensor(tensor=first, element_shape=[*first.shape[1:]])


def _taken(items: Any, place: int, shape: Any) -> Any:
    return raw.TensorListGetItem(
        input_handle=items, index=place, element_shape=[*shape], element_dtype=tf.float32
    )


def _stacked(items: Any, shape: Any, count: int) -> Any:
    return raw.TensorListStack(
        input_handle=items, element_shape=[*shape], element_dtype=tf.float32, num_elements=count
    )


def _filled(*values: Any) -> Any:
    """Return a list of some tensors of one shape, and that shape."""
    shape = values[0].shape
    items = raw.TensorListReserve(element_shape=[*shape], num_elements=len(values), element_dtype=tf.float32)
    for i, value in enumerate(values):
        items = raw.TensorListSetItem(input_handle=items, index=i, item=value)
    return _stacked(items, shape, len(values))


def _by_time(x: Any) -> Any:
    """Another constant for each time step."""
    return tf.ones(x.shape) * tf.range(float(x.shape[1]))[:, None]


EXAMPLES: dict[str, list[Example]] = {
    "TensorListFromTensor": [lambda x: _stacked(_listed(x, 2), x.shape[:2], 4)],
    "TensorListGetItem": [lambda x: _taken(_listed(x, 2), 3, x.shape[:2])],
    "TensorListSetItem": [
        lambda x: _filled(x, x * 2.0),
        lambda x: _filled(x, tf.ones(x.shape)),
        lambda x: _filled(tf.ones(x.shape), x),
    ],
    "TensorListStack": [lambda x: _filled(x, x + 1.0, x)],
    "StatelessWhile": [
        lambda x: tf.while_loop(lambda i, y: i < 3, lambda i, y: (i + 1, tf.sin(y) + x), (0, x))[1],
        lambda x: tf.while_loop(
            lambda i, y: i < 4, lambda i, y: (i + 1, y + tf.gather(x, i, axis=2)), (1, x[:, :, 0])
        )[1],
        lambda x: tf.map_fn(lambda one: one * 2.0, tf.transpose(x, (2, 0, 1))),
        lambda x: tf.scan(lambda total, now: total + now, tf.transpose(x, (2, 0, 1))),
    ],
    "While": [lambda x: tf.while_loop(lambda i, y: i < 3, lambda i, y: (i + 1, y * _SCALE), (0, x))[1]],
}
REFUSED: dict[str, list[Example]] = {
    "TensorListFromTensor": [
        lambda x: _stacked(_listed(x, 1), (x.shape[0], 4), x.shape[1]),
        lambda x: _stacked(_listed(x, 0), (x.shape[1], 4), x.shape[0]),
    ],
    "TensorListGetItem": [
        lambda x: _taken(_listed(x, 2), x.shape[1] % 4, x.shape[:2]),
        lambda x: _taken(_listed(x, 1), 2, (x.shape[0], 4)),
    ],
    "TensorListSetItem": [
        lambda x: _filled(x, _by_time(x)),
        lambda x: _filled(_by_time(x), x),
    ],
    "TensorListStack": [lambda x: _filled(*[x] * x.shape[1])],
    "StatelessWhile": [
        lambda x: tf.while_loop(lambda i, y: i < x.shape[1], lambda i, y: (i + 1, tf.sin(y)), (0, x))[1],
        lambda x: tf.while_loop(lambda i, y: i < 3, lambda i, y: (i + 1, tf.roll(y, 1, 1)), (0, x))[1],
        lambda x: tf.while_loop(lambda i, y: i < 3, lambda i, y: (i + 1, y + x[:, i, None]), (0, x))[1],
        lambda x: tf.while_loop(lambda i, y: i < 3, lambda i, y: (i + 1, y + _by_time(x)), (0, x))[1],
        lambda x: tf.while_loop(lambda y: tf.reduce_max(y) > 0.1, lambda y: (y * 0.5,), (x,))[0],
        lambda x: tf.while_loop(lambda i, y: i < 2000, lambda i, y: (i + 1, y * 0.5), (0, x))[1],
        lambda x: tf.map_fn(lambda one: one * 2.0, tf.transpose(x, (1, 0, 2))),
        lambda x: tf.scan(lambda total, now: total + now, tf.transpose(x, (1, 0, 2))),
        lambda x: tf.map_fn(lambda one: one * 2.0, x),
    ],
    "While": [
        lambda x: tf.while_loop(lambda i, y: i < x.shape[1], lambda i, y: (i + 1, y * _SCALE), (0, x))[1]
    ],
}
