"""Convolutions and pooling with their channels before the other axes, traced as if these came last."""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Callable, Iterator
from typing import Any

from tensorflow.python.ops import gen_nn_ops

from stepwell_server.compile.graph.patch import attribute
from stepwell_server.compile.graph.tensorflow_setup import tf

#: Functions that create operations, each with the argument that has channels.
_CREATORS = {
    "avg_pool": "value",
    "avg_pool3d": "input",
    "bias_add": "value",
    "conv2d": "input",
    "conv2d_backprop_input": "out_backprop",
    "conv3d": "input",
    "conv3d_backprop_input_v2": "out_backprop",
    "depthwise_conv2d_native": "input",
    "max_pool": "input",
    "max_pool3d": "input",
}
_SIZES = ("dilations", "ksize", "strides")


@contextlib.contextmanager
def channels_last() -> Iterator[None]:
    """Transpose what has its channels first around such an operation: the result is the same, in the same order."""
    with contextlib.ExitStack() as stack:
        for name, given in _CREATORS.items():
            made = _transposed(getattr(gen_nn_ops, name), given)
            stack.enter_context(attribute(gen_nn_ops, name, made))
        yield


def _transposed(create: Callable[..., Any], given: str) -> Callable[..., Any]:
    signature = inspect.signature(create)

    def created(*args: Any, **options: Any) -> Any:
        bound = signature.bind(*args, **options)
        bound.apply_defaults()
        found, rank = bound.arguments, len(bound.arguments[given].shape)
        if not (found["data_format"] or "").startswith("NC") or rank < 3:
            return create(*args, **options)
        order = [0, *range(2, rank), 1]
        found[given] = tf.transpose(found[given], order)
        found["data_format"] = "NHWC" if rank < 5 or given == "value" else "NDHWC"
        for name in _SIZES:
            if found.get(name):
                found[name] = [found[name][place] for place in order]
        if found.get("explicit_paddings"):
            paddings = found["explicit_paddings"]
            found["explicit_paddings"] = [paddings[2 * place + i] for place in order for i in (0, 1)]
        if "input_sizes" in found:
            found["input_sizes"] = tf.gather(found["input_sizes"], order)
        return tf.transpose(create(*bound.args, **bound.kwargs), [0, rank - 1, *range(1, rank - 1)])

    return created
