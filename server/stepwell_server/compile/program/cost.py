"""The cost of one time step, counted in its graph: it is the same on every machine."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

from stepwell_server.compile.graph.tensorflow_setup import tf


def multiply_adds(inlined: Any) -> int:
    """Return the number of multiplications of one row, in products of matrices and convolutions.

    Args:
        inlined: one time step with its weights as constants: `convert.Frozen.inlined`. The body of a loop counts once.
    """
    with tf.Graph().as_default() as graph:
        # With one row all shapes are known, also of tensors that have rows and other axes in one dimension.
        row = {
            tensor.name: tf.compat.v1.placeholder(tensor.dtype, [1, *tensor.shape[1:]])
            for tensor in inlined.inputs
        }
        tf.graph_util.import_graph_def(inlined.graph.as_graph_def(), input_map=row, name="")
    return sum(_COUNTS[op.type](op) for op in graph.get_operations() if op.type in _COUNTS)


def _shape(tensor: Any) -> list[int]:
    """Return the dimensions; those that only a run knows count as one."""
    return [size or 1 for size in tensor.shape.as_list()]


def _size(tensor: Any) -> int:
    return math.prod(_shape(tensor))


def _product(op: Any) -> int:
    left = _shape(op.inputs[0])
    is_transposed = op.get_attr("transpose_a" if op.type == "MatMul" else "adj_x")
    return _size(op.outputs[0]) * left[-2 if is_transposed else -1]


def _convolution(op: Any) -> int:
    """Each output has one product for each element of the kernel that makes it."""
    return _size(op.outputs[0]) * math.prod(_shape(op.inputs[1])[:-1])


def _depthwise(op: Any) -> int:
    return _size(op.outputs[0]) * math.prod(_shape(op.inputs[1])[:2])


def _transposed_convolution(op: Any) -> int:
    """Each input has one product for each element of the kernel that it goes to."""
    return _size(op.inputs[2]) * math.prod(_shape(op.inputs[1])[:-1])


def _sum_of_products(op: Any) -> int:
    """Each combination of labels has one product; an ellipsis stands for the rest of the dimensions."""
    terms = op.get_attr("equation").decode().split("->")[0].split(",")
    sizes: dict[str, int] = {}
    for term, tensor in zip(terms, op.inputs, strict=True):
        shape = _shape(tensor)
        before, dots, behind = term.partition("...")
        end = len(shape) - len(behind)
        sizes |= dict(zip(before, shape, strict=False)) | dict(zip(behind, shape[end:], strict=True))
        if dots:
            sizes["..."] = max(sizes.get("...", 1), math.prod(shape[len(before) : end]))
    return math.prod(sizes.values())


_COUNTS: dict[str, Callable[[Any], int]] = {
    "BatchMatMulV2": _product,
    "Conv2D": _convolution,
    "Conv2DBackpropInput": _transposed_convolution,
    "Conv3D": _convolution,
    "Conv3DBackpropInputV2": _transposed_convolution,
    "DepthwiseConv2dNative": _depthwise,
    "Einsum": _sum_of_products,
    "MatMul": _product,
}
