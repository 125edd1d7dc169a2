"""Rewrites divisions of whole numbers, of which one ends the process: the smallest number by -1 (a signal, SIGFPE)."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import onnx

from stepwell_server.compile.errors import ModelError, gist, quoted
from stepwell_server.compile.onnx.reading import inner_graphs

_KINDS = {onnx.TensorProto.INT32: np.int32, onnx.TensorProto.INT64: np.int64}
"""ONNX Runtime computes smaller ones as 32 bits, and checks for 0 itself."""
_WHERE = 9
"""The first opset with the operator Where."""


def guarded(model: onnx.ModelProto) -> onnx.ModelProto:
    """Return the model with the same results, and no division by -1 whose divisor is not constant.

    Raises:
        ModelError: its opset is too old for that.
    """
    if not any(node.op_type == "Div" for graph in _graphs(model) for node in graph.node):
        return model
    opset = max((each.version for each in model.opset_import if each.domain in {"", "ai.onnx"}), default=0)
    kinds, safe = _kinds(model)
    found = onnx.ModelProto()
    found.CopyFrom(model)
    for place, graph in reversed(
        [*enumerate(_graphs(found))]
    ):  # branches first: they are copied with their operator
        nodes: list[onnx.NodeProto] = []
        for node in graph.node:
            kind = next((kinds[name] for name in (*node.input, *node.output) if kinds.get(name)), 0)
            if node.op_type != "Div" or kind not in _KINDS or node.input[1] in safe:
                nodes.append(node)
                continue
            if opset < _WHERE:
                raise ModelError(
                    f"operator Div {quoted(node.name or node.output[0])}: whole numbers are divided by a constant, or from opset "
                    f"{_WHERE} on; its opset is {opset}. Export the model with a newer one"
                )
            nodes += _replacement(node, _KINDS[kind], f"stepwell/div_{place}_{len(nodes)}")
        del graph.node[:]
        graph.node.extend(nodes)
    return found


def _kinds(model: onnx.ModelProto) -> tuple[dict[str, int], set[str]]:
    """The types of tensors, and the constants by which any whole number can be divided."""
    try:
        typed = onnx.shape_inference.infer_shapes(model)
    except Exception as error:  # its errors have no common class
        raise ModelError(f"the types of its tensors cannot be inferred: {gist(error)}") from error
    kinds, safe = {}, set[str]()
    for graph in _graphs(typed):
        for info in (*graph.input, *graph.output, *graph.value_info):
            kinds[info.name] = info.type.tensor_type.elem_type
        for tensor in _constants(graph):
            kinds[tensor.name] = tensor.data_type
            if tensor.data_type in _KINDS and not np.any(onnx.numpy_helper.to_array(tensor) == -1):
                safe.add(tensor.name)
    return kinds, safe


def _graphs(model: onnx.ModelProto) -> list[onnx.GraphProto]:
    return [model.graph, *inner_graphs(model.graph)]


def _constants(graph: onnx.GraphProto) -> Iterator[onnx.TensorProto]:
    """Yield the constants of a graph under the names of their tensors."""
    yield from graph.initializer
    for node in graph.node:
        if node.op_type == "Constant":
            for attribute in node.attribute:
                if attribute.HasField("t"):
                    tensor = onnx.TensorProto()
                    tensor.CopyFrom(attribute.t)
                    tensor.name = node.output[0]
                    yield tensor


def _replacement(node: onnx.NodeProto, dtype: type, name: str) -> Iterator[onnx.NodeProto]:
    """Yield operators that negate where the divisor is -1, and divide by 1 there."""
    dividend, divisor = node.input
    for value in (-1, 1):
        tensor = onnx.numpy_helper.from_array(np.array(value, dtype), f"{name}/{value}")
        yield onnx.helper.make_node("Constant", [], [tensor.name], value=tensor)
    yield onnx.helper.make_node("Equal", [divisor, f"{name}/-1"], [f"{name}/is"])
    yield onnx.helper.make_node("Where", [f"{name}/is", f"{name}/1", divisor], [f"{name}/by"])
    yield onnx.helper.make_node("Div", [dividend, f"{name}/by"], [f"{name}/divided"], name=node.name)
    yield onnx.helper.make_node("Neg", [dividend], [f"{name}/negated"])
    yield onnx.helper.make_node("Where", [f"{name}/is", f"{name}/negated", f"{name}/divided"], node.output)
