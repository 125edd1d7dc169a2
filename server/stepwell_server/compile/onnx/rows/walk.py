"""Follows the rows from the inputs of a graph to its outputs."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import onnx

from stepwell_server.compile.errors import quoted
from stepwell_server.compile.onnx.rows import rules_shapes
from stepwell_server.compile.onnx.rows.bits import is_even, is_exact, may_be_uneven
from stepwell_server.compile.onnx.rows.rules import RANDOM, RULES, SIZED
from stepwell_server.compile.onnx.rows.values import ROWS, LostError, Node, Size, Sizes, Value
from stepwell_server.engine.executors.base import ExecutionError
from stepwell_server.engine.executors.onnx_runtime import plain

#: The most elements of a constant whose values are computed: sizes, axes and conditions are small.
_MAX_ELEMENTS = 4096
_OLDEST = 7
"""The oldest opset with today's rules of broadcasting."""
_IR = 8
"""The version of the file format of a model of one operator."""
_ROWS_NAME = "rows"
_OWN_DOMAINS = frozenset(["", "ai.onnx"])


@dataclasses.dataclass(frozen=True)
class Lost:
    """A tensor in which rows could not be followed."""

    reason: str
    """A clause that names the operator."""


Known = Value | Lost


@dataclasses.dataclass(frozen=True)
class Followed:
    """What is known about the rows of a model."""

    outputs: Mapping[str, Known]
    uneven: str
    """An operator that gives a row other bits at some places of some batches (`bits`); empty: none is known."""


def follow(model: onnx.ModelProto, inputs: Mapping[str, Value]) -> Followed:
    """Return where the rows are in the outputs of a model without functions.

    Args:
        model: the model.
        inputs: its inputs, by name.
    """
    opset = max((each.version for each in model.opset_import if each.domain in _OWN_DOMAINS), default=0)
    walk = _Walk(opset)
    known: dict[str, Known] = dict(inputs)
    walk.graph(model.graph, known)
    outputs = {output.name: known[output.name] for output in model.graph.output if output.name in known}
    return Followed(outputs, walk.uneven)


class _Walk:
    def __init__(self, opset: int) -> None:
        self._opset = opset
        self.uneven = ""

    def graph(self, graph: onnx.GraphProto, known: dict[str, Known]) -> None:
        """Add what is known about each tensor of a graph."""
        for tensor in graph.initializer:
            known[tensor.name] = _of_tensor(tensor)
        for node in graph.node:
            results = self._node(node, known)
            known |= {name: value for name, value in zip(node.output, results, strict=False) if name}

    def _node(self, node: onnx.NodeProto, known: dict[str, Known]) -> Sequence[Known]:
        """Return what is known about the outputs of an operator."""
        given = [known.get(name, _nothing(name)) if name else None for name in node.input]
        lost = next((value for value in given if isinstance(value, Lost)), None)
        if lost is None:
            try:
                return self._results(node, [value for value in given if not isinstance(value, Lost)], known)
            except LostError as error:
                lost = Lost(f"{_named(node)}: {error}")
        inner = (each for graph in _graphs(node) for each in nodes_of(graph))
        for each in (node, *inner):
            if may_be_uneven(each.op_type):
                self.uneven = self.uneven or _named(each)
        return [lost] * len(node.output)

    def _results(
        self, node: onnx.NodeProto, values: Sequence[Value | None], known: dict[str, Known]
    ) -> Sequence[Known]:
        if node.domain not in _OWN_DOMAINS:
            raise LostError("rows are not followed through operators of this domain")
        if self._opset < _OLDEST:
            raise LostError(f"rows are not followed through operators of an opset before {_OLDEST}")
        if node.op_type == "If":
            return self._if(node, values[0], known)
        if any(True for _ in _graphs(node)):
            return self._with_graphs(node, values, known)
        if node.op_type in RANDOM:
            raise LostError("it draws random numbers")
        here = Node(node, values, self._opset)
        sized = [place for place, value in enumerate(values) if value is not None and value.is_sized]
        has_rows = any(value is not None and value.axis is not None for value in values)
        if node.op_type in {"Shape", "Size"}:
            return rules_shapes.shape(here) if node.op_type == "Shape" else rules_shapes.size(here)
        if sized and sized != [SIZED.get(node.op_type)]:
            if has_rows:
                raise LostError("its result depends on the number of rows")
            moved = rules_shapes.size_arithmetic(here)
            return moved or [Value(is_sized=True)] * len(node.output)
        if sized and node.op_type == "ConstantOfShape":
            results = rules_shapes.constant_of_shape(here)
        elif sized and not has_rows and node.op_type == "Reshape":
            raise LostError("the number of rows decides its shape in an unknown way")
        elif has_rows or sized:
            rule = RULES.get(node.op_type)
            if rule is None:
                raise LostError("rows are not followed through this operator")
            results = rule(here)
        else:
            return _constant(here)
        found = _inferred(here, results)
        if not is_even(here, found):
            self.uneven = self.uneven or _named(node)
        return found

    def _if(self, node: onnx.NodeProto, condition: Value | None, known: dict[str, Known]) -> Sequence[Known]:
        if condition is None or condition.axis is not None or condition.is_sized:
            raise LostError("a row, or the number of rows, decides for all rows")
        branches = {each.name: each.g for each in node.attribute if each.HasField("g")}
        if not branches.keys() >= {"then_branch", "else_branch"}:
            raise LostError("it lacks a branch")
        chosen = ["then_branch", "else_branch"]
        if condition.content is not None:
            chosen = [chosen[0] if bool(condition.content.reshape(-1)[0]) else chosen[1]]
        found = []
        for name in chosen:
            inner = dict(known)
            self.graph(branches[name], inner)
            found.append([inner.get(output.name, _nothing(output.name)) for output in branches[name].output])
        if len(found) == 1:
            return found[0]
        return [_either(one, two) for one, two in zip(*found, strict=True)]

    def _with_graphs(
        self, node: onnx.NodeProto, values: Sequence[Value | None], known: Mapping[str, Known]
    ) -> Sequence[Known]:
        """Operators with graphs, such as Loop: they must not meet rows at all."""
        for graph in _graphs(node):
            for each in nodes_of(graph):
                if each.op_type in RANDOM:
                    raise LostError("it draws random numbers")
                captured = [known[name] for name in each.input if name in known]
                lost = next((value for value in captured if isinstance(value, Lost)), None)
                if lost is not None:
                    return [lost] * len(node.output)
                values = [*values, *(value for value in captured if isinstance(value, Value))]
        if any(value is not None and (value.axis is not None or value.is_sized) for value in values):
            raise LostError("rows are not followed through this operator")
        return [Value()] * len(node.output)


def _nothing(name: str) -> Lost:
    return Lost(f"nothing is known of {quoted(name)}")


def nodes_of(graph: onnx.GraphProto) -> Iterator[onnx.NodeProto]:
    """Yield the operators of a graph and of the graphs in it."""
    for node in graph.node:
        yield node
        for inner in _graphs(node):
            yield from nodes_of(inner)


def _graphs(node: onnx.NodeProto) -> Iterator[onnx.GraphProto]:
    for attribute in node.attribute:
        if attribute.HasField("g"):
            yield attribute.g
        yield from attribute.graphs


def _named(node: onnx.NodeProto) -> str:
    name = node.name or (node.output[0] if node.output else "")
    kind = f"{node.domain}.{node.op_type}" if node.domain not in _OWN_DOMAINS else node.op_type
    return f"operator {kind} {quoted(name)}"


def _either(one: Known, two: Known) -> Known:
    """What is known of the result of one of two branches."""
    for lost in (one, two):
        if isinstance(lost, Lost):
            return lost
    assert isinstance(one, Value)
    assert isinstance(two, Value)
    if one.axis != two.axis or one.is_sized or two.is_sized:
        return Lost("the branches of an If have their rows on different axes")
    sizes: Sizes | None = None
    if one.sizes is not None and two.sizes is not None and len(one.sizes) == len(two.sizes):
        sizes = tuple(a if a == b else None for a, b in zip(one.sizes, two.sizes, strict=True))
    return Value(axis=one.axis, sizes=sizes, dtype=one.dtype)


# ----------------------------------------------------------------------------------------------------- constants, shapes


def _of_tensor(tensor: onnx.TensorProto) -> Value:
    sizes = tuple(tensor.dims)
    content = onnx.numpy_helper.to_array(tensor) if math.prod(sizes) <= _MAX_ELEMENTS else None
    return Value(sizes=sizes, content=content, dtype=tensor.data_type)


def _constant(node: Node) -> Sequence[Value]:
    """Return the outputs of an operator whose inputs are the same for all rows."""
    if node.kind == "Constant":
        tensor = node.attribute("value")
        if tensor is not None:
            return [_of_tensor(tensor)]
    results = _inferred(node, [Value()] * len(node.proto.output))
    if any(value is not None and value.content is None for value in node.values):
        return results
    sizes = [_count(value) for value in results]
    if any(size is None or size > _MAX_ELEMENTS for size in sizes) or not is_exact(node, results):
        return results
    given = {
        name: value.content
        for name, value in zip(node.proto.input, node.values, strict=True)
        if name and value is not None and value.content is not None
    }
    try:
        # By the kernel that runs it later: the reference in the package onnx rounds some results otherwise.
        found = plain(_as_model(node).SerializeToString())(given)
    except (ExecutionError, ValueError):  # an operator or arguments that it refuses
        return results
    return [
        dataclasses.replace(value, content=found[name], sizes=found[name].shape) if name else value
        for name, value in zip(node.proto.output, results, strict=False)
    ]


def _as_model(node: Node) -> onnx.ModelProto:
    proto = node.proto
    inputs = [
        onnx.helper.make_tensor_value_info(name, value.dtype, list(value.content.shape))
        for name, value in dict(zip(proto.input, node.values, strict=True)).items()
        if value is not None and value.content is not None
    ]
    outputs = [onnx.helper.make_empty_tensor_value_info(name) for name in proto.output if name]
    graph = onnx.helper.make_graph([proto], "constant", inputs, outputs)
    imports = [onnx.helper.make_opsetid("", node.opset)]
    return onnx.helper.make_model(graph, opset_imports=imports, ir_version=_IR)


def _count(value: Value) -> int | None:
    if value.sizes is None or not all(isinstance(size, int) for size in value.sizes):
        return None
    return math.prod(size for size in value.sizes if isinstance(size, int))


def _inferred(node: Node, results: Sequence[Value]) -> list[Value]:
    """Add the shapes and types that ONNX infers to outputs whose rows are known."""
    types = _types(node)
    found = []
    for name, value in zip(node.proto.output, results, strict=False):
        kind = types.get(name)
        sizes, dtype = (None, 0) if kind is None else (_sizes(kind), kind.tensor_type.elem_type)
        if value.sizes is not None:
            sizes = value.sizes
        if value.axis is not None:
            if sizes is None or not 0 <= value.axis < len(sizes):
                raise LostError("the number of axes of its result is unknown")
            sizes = (*sizes[: value.axis], ROWS, *sizes[value.axis + 1 :])
        found.append(dataclasses.replace(value, sizes=sizes, dtype=dtype))
    return found


def _types(node: Node) -> Mapping[str, onnx.TypeProto]:
    given = {
        name: value for name, value in zip(node.proto.input, node.values, strict=False) if value is not None
    }
    if any(not value.dtype or value.sizes is None for value in given.values()):
        return {}
    data = {
        name: onnx.numpy_helper.from_array(np.ascontiguousarray(value.content), name)
        for name, value in given.items()
        if value.content is not None and value.content.dtype != object
    }
    try:
        found: dict[str, onnx.TypeProto] = onnx.shape_inference.infer_node_outputs(
            onnx.defs.get_schema(node.kind, node.opset, ""),
            node.proto,
            {name: _type(value) for name, value in given.items()},
            data,
            opset_imports=_opset_imports(node.opset),
        )
    except Exception:  # an unknown operator, or shapes that do not fit: the runtime refuses the latter
        return {}
    return found


@functools.cache
def _opset_imports(opset: int) -> list[Any]:
    return [onnx.helper.make_opsetid("", opset)]


def _type(value: Value) -> onnx.TypeProto:
    sizes = [_ROWS_NAME if size is ROWS else size for size in value.sizes or ()]
    return onnx.helper.make_tensor_type_proto(value.dtype, sizes)


def _sizes(kind: onnx.TypeProto) -> Sizes | None:
    if not kind.tensor_type.HasField("shape"):
        return None
    sizes: list[Size] = [
        dim.dim_value if dim.HasField("dim_value") else None for dim in kind.tensor_type.shape.dim
    ]
    return tuple(sizes)
