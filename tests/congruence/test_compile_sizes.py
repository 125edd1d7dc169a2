"""Sizes that follow from the number of rows become constants, and results stay the same."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from support.samples import one_in


def rewritten(
    function: Callable[..., Any], *shapes: tuple[Any, ...], dtype: str = "float32"
) -> tuple[Any, Any]:
    """Return a function of tensors with these shapes as a graph of constants, before and after."""
    from tensorflow.python.framework.convert_to_constants import convert_variables_to_constants_v2

    from stepwell_server.compile.graph.tensorflow_setup import tf
    from stepwell_server.compile.program.sizes import with_known_sizes

    specs = [tf.TensorSpec(shape, dtype) for shape in shapes]
    frozen = convert_variables_to_constants_v2(tf.function(function).get_concrete_function(*specs))
    return frozen, with_known_sizes(frozen)


def kinds(function: Any) -> set[str]:
    return {op.type for op in function.graph.get_operations()}


def compared(before: Any, after: Any, *values: Any) -> None:
    from stepwell_server.compile.graph.tensorflow_setup import tf

    given = [tf.constant(value) for value in values]
    for one, two in zip(before(*given), after(*given), strict=True):
        assert one.shape == two.shape
        np.testing.assert_array_equal(one.numpy(), two.numpy())
        np.testing.assert_array_equal(np.signbit(one.numpy()), np.signbit(two.numpy()))


REPEATED: dict[str, Callable[[Any, Any], Any]] = {
    "flattened": lambda tf, x: tf.reshape(x, [tf.shape(x)[0], -1]),
    "rows and more in one dimension": lambda tf, x: tf.reshape(
        x, [tf.shape(x)[0] * tf.shape(x)[1], tf.shape(x)[2]]
    ),
    "filled": lambda tf, x: tf.fill([tf.shape(x)[0], 3], 2.5),
    "filled for more than a row": lambda tf, x: tf.fill([4, tf.shape(x)[0] * 2, 3], 2.5),
    "a constant for each row": lambda tf, x: tf.tile(
        tf.constant([[[1.0, -0.0], [np.inf, np.nan]]]), [tf.shape(x)[0], 1, 1]
    ),
    "a constant for each row twice": lambda tf, x: tf.tile([[1.0, -0.0]], [tf.shape(x)[0] * 3, 2]),
    "repeated": lambda tf, x: tf.tile(x, [1, tf.shape(x)[2], 1]),
    "broadcast": lambda tf, x: tf.broadcast_to(x[:, :1], tf.stack([tf.shape(x)[0], 5, 4])),
    "broadcast to each row": lambda tf, x: tf.broadcast_to([1.0, 2.0], tf.stack([tf.shape(x)[0], 5, 2])),
    "integers": lambda tf, x: tf.fill([tf.shape(x)[0], 2], 7),
    "long integers": lambda tf, x: tf.fill([tf.shape(x)[0], 2], np.int64(-7)),
    "true or false": lambda tf, x: tf.tile([[True, False]], [tf.shape(x)[0], 1]),
}


@pytest.mark.parametrize("name", REPEATED)
def test_sizes_of_repetitions_become_constants(name: str) -> None:
    from stepwell_server.compile.graph.tensorflow_setup import tf

    before, after = rewritten(lambda x: (REPEATED[name](tf, x), x + 1.0), (None, 3, 4))
    assert "Shape" in kinds(before)
    for op in after.graph.get_operations():
        place = {"Reshape": 1, "Tile": 1, "BroadcastTo": 1, "Fill": 0}.get(op.type)
        assert place is None or op.inputs[place].op.type == "Const", op
    for rows in (1, 2, 5, 64):
        x = np.random.default_rng(rows).standard_normal((rows, 3, 4)).astype(np.float32)
        x[0, 0], x[-1, -1] = np.nan, np.inf
        compared(before, after, x)


def test_rows_of_integers_will_do() -> None:
    from stepwell_server.compile.graph.tensorflow_setup import tf

    before, after = rewritten(lambda x: (tf.fill([tf.shape(x)[0], 3], 2.5), x), (None,), dtype="int32")
    assert "Fill" not in kinds(after)
    compared(before, after, np.array([-1, 0, -(2**31)], np.int32))


KEPT: dict[str, Callable[[Any, Any], Any]] = {
    "of values": lambda tf, x: tf.fill([tf.cast(x[0, 0, 0], tf.int32), 2], 1.0),
    "square": lambda tf, x: tf.fill([tf.shape(x)[0], tf.shape(x)[0]], 1.0),
    "rows beside a row": lambda tf, x: tf.fill([tf.shape(x)[0] + 1, 2], 1.0),
    "a constant several times": lambda tf, x: tf.tile([[1.0], [2.0]], [tf.shape(x)[0], 1]),
    "another type": lambda tf, x: tf.cast(
        tf.fill([tf.shape(x)[0], 2], tf.constant(1.0, tf.float64)), tf.float32
    ),
}


@pytest.mark.parametrize("name", KEPT)
def test_other_sizes_stay(name: str) -> None:
    from stepwell_server.compile.graph.tensorflow_setup import tf

    before, after = rewritten(lambda x: (KEPT[name](tf, x), x), (None, 3, 4))
    assert kinds(after) == kinds(before)
    compared(before, after, np.full((3, 3, 4), 2, np.float32))


SPREAD = [
    (kernel, stride, padding)
    for kernel, stride, padding in itertools.product((1, 2, 3, 5, 6), (1, 2, 3, 4), ("valid", "same"))
]


@pytest.mark.parametrize("case", one_in(9, SPREAD))
def test_transposed_convolutions_become_ordinary_ones(case: tuple[int, int, str]) -> None:
    """Over two axes with different windows and strides; where an element is infinite, in the same places of the result."""
    from stepwell_server.compile.graph.tensorflow_setup import keras, tf

    kernel, stride, padding = case
    other = SPREAD[(SPREAD.index(case) * 7 + 3) % len(SPREAD)][:2]
    layer = keras.layers.Conv2DTranspose(3, (kernel, other[0]), (stride, other[1]), padding)
    layer.build((None, 5, 4, 2))
    before, after = rewritten(lambda x: (layer(x),), (None, 5, 4, 2))
    assert "Conv2DBackpropInput" in kinds(before)
    assert "Conv2DBackpropInput" not in kinds(after)
    rng = np.random.default_rng(1)
    for rows in (1, 3):
        x = rng.standard_normal((rows, 5, 4, 2)).astype(np.float32)
        (one,), (two,) = before(tf.constant(x)), after(tf.constant(x))
        np.testing.assert_allclose(two, one, rtol=0, atol=1e-5)
        x[0, 2, 1, 0] = np.inf
        (one,), (two,) = before(tf.constant(x)), after(tf.constant(x))
        np.testing.assert_array_equal(np.isfinite(two), np.isfinite(one))
        np.testing.assert_array_equal(np.isnan(two), np.isnan(one))
