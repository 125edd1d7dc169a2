"""Makes constants of sizes that a graph computes from its number of rows, so that LiteRT plans memory before it runs.

Keras often computes a shape, such as that of a Flatten, although only the number of rows is open. LiteRT finds the size of
such a result in each run, and places all tensors behind it then: see `engine.executors.litert.places_tensors_late`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from tensorflow.core.framework import graph_pb2, node_def_pb2
from tensorflow.python.eager import wrap_function

from stepwell_server.compile.graph.tensorflow_setup import tf
from stepwell_server.compile.graph.transposed import spread

Sizes = list[int]
"""The dimensions of a tensor. A negative one is that number for each row: with -8 it has 8 elements for each."""
#: The input that holds the size of the result.
_PLACES = {
    "Reshape": 1,
    "Tile": 1,
    "BroadcastTo": 1,
    "Fill": 0,
    "Conv2DBackpropInput": 0,
    "Conv3DBackpropInputV2": 0,
}
#: And the one with the values.
_VALUES = {"Fill": 1, "Conv2DBackpropInput": 2}
#: The numbers of rows for which shapes are inferred.
_ROWS = (2, 3)
#: Types that LiteRT multiplies, and bool.
_SPREAD = (tf.float32, tf.int32, tf.int64, tf.bool)


def with_known_sizes(frozen: Any) -> Any:
    """Return a frozen function whose reshapes, fills and repetitions have constant sizes, where they have one row's size each."""
    graph = frozen.graph.as_graph_def()
    constants = {node.name for node in graph.node if node.op == "Const"}
    found = {
        node.name
        for node in graph.node
        if node.op in _PLACES and node.input[_PLACES[node.op]].split(":")[0] not in constants
    }
    made = {name: nodes for name, nodes in _made(frozen, graph, found) if nodes} if found else {}
    if not made:
        return frozen
    changed = graph_pb2.GraphDef(versions=graph.versions, library=graph.library)
    for node in graph.node:
        changed.node.extend(made.get(node.name, [node]))
    return wrap_function.function_from_graph_def(
        changed, [x.name for x in frozen.inputs], [x.name for x in frozen.outputs]
    )


def _made(frozen: Any, graph: Any, found: set[str]) -> Iterator[tuple[str, list[Any]]]:
    """Yield the operations of these names, each with the nodes that replace it; none: it stays."""
    try:
        each = [_with_rows(frozen, graph, rows) for rows in _ROWS]
    except ValueError:  # It works for other numbers of rows only.
        return
    for node in graph.node:
        if node.name not in found:
            continue
        ops = [known.get_operation_by_name(node.name) for known in each]
        after, at = _sizes([op.outputs[0] for op in ops]), _VALUES.get(node.op, 0)
        before = _sizes([op.inputs[at] for op in ops])
        if after is None or before is None or max(map(_open, (before, after))) > 1:
            continue
        rows = [None if size < 0 else size for size in before]
        value = (node.input[at], tf.TensorSpec(rows, ops[0].inputs[at].dtype))
        if node.op == "Reshape":
            yield node.name, _nodes(node, _reshaped(after), [value])
        elif node.op not in _VALUES or node.op == "Fill":
            yield node.name, _repeated(node, before, after, value, frozen)
        elif before[0] == after[0] < 0 and _is_ordinary(ops[0]):
            kernel = (node.input[1], tf.TensorSpec(ops[0].inputs[1].shape, ops[0].inputs[1].dtype))
            yield node.name, _nodes(node, _transposed(ops[0], after), [value, kernel])


def _with_rows(frozen: Any, graph: Any, rows: int) -> Any:
    """Return a graph with all shapes for this number of rows."""
    with tf.Graph().as_default() as known:
        given = {
            x.name: tf.compat.v1.placeholder(
                x.dtype, [rows if size is None else size for size in x.shape], "given"
            )
            for x in frozen.inputs
        }
        tf.graph_util.import_graph_def(graph, input_map=given, name="")
    return known


def _sizes(tensors: Sequence[Any]) -> Sizes | None:
    """Return the dimensions of a tensor from those at each number of rows; None if they are not of this kind."""
    shapes = [tensor.shape.as_list() if tensor.shape.rank is not None else [None] for tensor in tensors]
    found = Sizes()
    for few, many in zip(*shapes, strict=True):
        if not few or not many:
            return None
        each = (many - few) // (_ROWS[1] - _ROWS[0])
        if few != many and few != each * _ROWS[0]:
            return None
        found.append(few if few == many else -each)
    return found


def _open(sizes: Sizes) -> int:
    return sum(size < 0 for size in sizes)


def _shape(sizes: Sizes) -> list[int]:
    return [-1 if size < 0 else size for size in sizes]


def _reshaped(after: Sizes) -> Callable[[Any], Any]:
    return lambda value: tf.reshape(value, _shape(after))


def _is_ordinary(op: Any) -> bool:
    return op.get_attr("data_format") == b"NHWC" and set(op.get_attr("dilations")) == {1}


def _transposed(op: Any, after: Sizes) -> Callable[[Any, Any], Any]:
    """Return a function of value and kernel that computes a transposed convolution."""
    strides = op.get_attr("strides")[1:-1]

    def made(value: Any, kernel: Any) -> Any:
        paddings, firsts = [[0, 0]], [0]
        for size, window, stride in zip(after[1:-1], kernel.shape[:-2], strides, strict=True):
            reach = -(-window // stride) - 1
            paddings.append([reach, reach])
            ahead = max((-(-size // stride) - 1) * stride + window - size, 0)
            firsts.append(ahead // 2 if op.get_attr("padding") == b"SAME" else 0)
        if any(map(any, paddings)):
            value = tf.pad(value, [*paddings, [0, 0]])
        result = spread(value, kernel, strides)
        ends = zip(firsts[1:], after[1:-1], result.shape[1:-1], strict=True)
        missing = [[0, max(first + size - have, 0)] for first, size, have in ends]
        if any(map(any, missing)):
            result = tf.pad(result, [[0, 0], *missing, [0, 0]])
        return tf.slice(result, [*firsts, 0], [-1, *after[1:-1], -1])

    return made


def _repeated(node: Any, before: Sizes, after: Sizes, value: tuple[str, Any], frozen: Any) -> list[Any]:
    """Return nodes that repeat a value; with all rows, if it has one, by a product with ones."""
    before = [1] * (len(after) - len(before)) + before
    times = [many // few for few, many in zip(before, after, strict=True)]
    if any(
        few * count != many or (count < 0 and few != 1)
        for few, count, many in zip(before, times, after, strict=True)
    ):
        return []

    def repeated(value: Any) -> Any:
        return tf.tile(tf.reshape(value, _shape(before)), [max(count, 1) for count in times])

    if not _open(times):
        return _nodes(node, repeated, [value])
    source = min(
        (x for x in frozen.inputs if x.shape.rank and x.shape[0] is None and 0 not in x.shape),
        key=lambda x: (x.dtype != tf.float32, math.prod(x.shape[1:])),
        default=None,
    )
    if source is None or value[1].dtype not in _SPREAD:
        return []
    each = -min(times)

    def with_rows(value: Any, source: Any) -> Any:
        first = tf.reshape(source, [-1, math.prod(source.shape[1:])])[:, :1]
        # true for each number, also for NaN
        is_row = tf.not_equal(tf.abs(tf.cast(first, tf.float32)), -1.0)
        is_row = tf.reshape(tf.tile(is_row, [1, each]), [-1 if count < 0 else 1 for count in times])
        if value.dtype == tf.bool:
            return repeated(value) & is_row
        return repeated(value) * tf.cast(is_row, value.dtype)

    given = (source.op.name, tf.TensorSpec(source.shape, source.dtype))
    return _nodes(node, with_rows, [value, given])


def _nodes(node: Any, make: Callable[..., Any], given: Sequence[tuple[str, Any]]) -> list[Any]:
    """Return the nodes of a function, the last of which replaces ``node``; ``given`` are its inputs."""
    made = tf.function(make, autograph=False).get_concrete_function(*(spec for _, spec in given))
    names = {x.op.name: name for x, (name, _) in zip(made.inputs, given, strict=True)}
    result, found = made.outputs[0].op.name, list[Any]()

    def named(name: str) -> str:
        return names.get(name) or (node.name if name == result else f"{node.name}/sized/{name}")

    for inner in made.graph.as_graph_def().node:
        if inner.name not in names:
            copy = node_def_pb2.NodeDef()
            copy.CopyFrom(inner)
            copy.name = named(inner.name)
            copy.input[:] = [
                ":".join([named(part[0]), *part[1:]]) for part in (x.split(":") for x in inner.input)
            ]
            found.append(copy)
    return found
