"""Divisions that LiteRT and its converter round in another way than TensorFlow.

The converter divides by a constant as a product with its rounded reciprocal, so that ``floor(-21 / 7)`` is -4. LiteRT's
FloorDiv rounds the exact quotient down, and TensorFlow the rounded one: ``2.1 // 0.7`` is 2 or 3 in float32.
"""

from __future__ import annotations

import collections
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
from tensorflow.core.framework import node_def_pb2, types_pb2

from stepwell_server.compile.causality.constants import BROADCAST, UNARY
from stepwell_server.compile.graph.tensorflow_setup import tf

_DIVISIONS = {"RealDiv", "Div"}
#: A small difference of their inputs may become a large one.
_STEPS = frozenset(
    [
        "Bucketize",
        "Cast",
        "Ceil",
        "Equal",
        "Floor",
        "FloorDiv",
        "FloorMod",
        "Greater",
        "GreaterEqual",
        "Less",
        "LessEqual",
        "Mod",
        "NotEqual",
        "Rint",
        "Round",
    ]
)
#: They pass on the values of quotients, or those of simple sums and products.
_PASSING = (UNARY | BROADCAST) | frozenset(
    [
        "ConcatV2",
        "ExpandDims",
        "GatherV2",
        "Pack",
        "Pad",
        "PadV2",
        "Reshape",
        "Slice",
        "Split",
        "SplitV",
        "Squeeze",
        "StridedSlice",
        "Tile",
        "Transpose",
        "Unpack",
    ]
)


def exact_quotients(graph: Any, outputs: frozenset[str]) -> Mapping[str, list[Any]]:
    """Return nodes that divide as TensorFlow does, by the name of the node of a frozen graph that they replace.

    Others stay: where no rounding decides what comes of a quotient, a product is as good, and faster.
    """
    consumers = collections.defaultdict[str, list[Any]](list)
    for node in graph.node:
        for source in _sources(node):
            consumers[source].append(node)
    data = _reached({node.name for node in graph.node if node.op == "Placeholder"}, consumers)
    nodes = {node.name: node for node in graph.node}
    found: dict[str, list[Any]] = {}
    for node in graph.node:
        if node.op not in _DIVISIONS | {"FloorDiv"} or node.attr["T"].type != types_pb2.DT_FLOAT:
            continue
        dividend, divisor = _sources(node)[:2]
        is_by_constant = dividend in data and divisor not in data and not _is_exact(nodes[divisor])
        if node.op == "FloorDiv" or (is_by_constant and _decides(node.name, consumers, outputs)):
            found[node.name] = list(_divided(node, is_by_constant=is_by_constant))
    return found


def _sources(node: Any) -> list[str]:
    return [value.split(":")[0] for value in node.input if not value.startswith("^")]


def _reached(names: set[str], consumers: Mapping[str, list[Any]]) -> set[str]:
    waiting, seen = list(names), set(names)
    while waiting:
        for node in consumers.get(waiting.pop(), ()):
            if node.name not in seen:
                seen.add(node.name)
                waiting.append(node.name)
    return seen


def _is_exact(node: Any) -> bool:
    """Whether the reciprocals of a constant are exact: it has powers of two only."""
    if node.op != "Const":
        return False
    fractions, _ = np.frexp(tf.make_ndarray(node.attr["value"].tensor))
    return bool(np.all(np.abs(fractions) == 0.5))


def _decides(name: str, consumers: Mapping[str, list[Any]], outputs: frozenset[str]) -> bool:
    """Whether a rounding of a value may become a large difference, or is returned, such as in a state."""
    waiting, seen = [name], {name}
    while waiting:
        current = waiting.pop()
        if current in outputs:
            return True
        for node in consumers.get(current, ()):
            if node.op in _STEPS:
                return True
            if node.op in _PASSING and node.name not in seen:
                seen.add(node.name)
                waiting.append(node.name)
    return False


def _divided(node: Any, *, is_by_constant: bool) -> Iterator[Any]:
    """Yield nodes for a division; the last one has its name.

    A constant becomes a sum with ``min(abs(dividend), 0)``, which is 0 and which the converter does not know to be that.
    """
    name, (dividend, divisor) = node.name, [value for value in node.input if not value.startswith("^")][:2]
    is_floored = node.op == "FloorDiv"

    def made(suffix: str, op: str, *inputs: str) -> Any:
        result = node_def_pb2.NodeDef(name=f"{name}{suffix}", op=op, input=inputs, device=node.device)
        result.attr["T"].CopyFrom(node.attr["T"])
        return result

    if is_by_constant:
        zero = node_def_pb2.NodeDef(name=f"{name}/zero", op="Const", device=node.device)
        zero.attr["dtype"].type = types_pb2.DT_FLOAT
        zero.attr["value"].tensor.CopyFrom(tf.make_tensor_proto(0.0, tf.float32))
        yield zero
        yield made("/size", "Abs", dividend)
        yield made("/none", "Minimum", f"{name}/size", f"{name}/zero")
        yield made("/divisor", "AddV2", divisor, f"{name}/none")
        divisor = f"{name}/divisor"
    yield made("/quotient" if is_floored else "", "RealDiv", dividend, divisor)
    if is_floored:
        yield made("", "Floor", f"{name}/quotient")
