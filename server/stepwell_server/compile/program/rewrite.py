"""Changes to a frozen graph before its conversion, for operations that the converter does not handle well."""

from __future__ import annotations

from typing import Any

from tensorflow.core.framework import graph_pb2, node_def_pb2
from tensorflow.python.eager import wrap_function

from stepwell_server.compile.program.quotients import exact_quotients

#: A custom gradient, such as that of silu, prevents the converter from naming inputs and outputs. It is never needed.
_GRADIENT = "_gradient_op_type"


def rewritten(frozen: Any) -> Any:
    """Return a frozen function without custom gradients, with exact quotients and a softplus that does not overflow.

    LiteRT computes softplus as log(1 + exp(x)), which is infinite from 89 on. It is replaced by max(x, 0) + log(1 +
    exp(-|x|)), which is equal but does not overflow.

    A product whose first factor is a constant, such as how the nodes of a graph are joined, becomes a size that LiteRT does
    not read. The constant is put behind the data.
    """
    graph = frozen.graph.as_graph_def()
    products = _constant_products(frozen)
    functions = [node for function in graph.library.function for node in function.node_def]
    quotients = exact_quotients(graph, frozenset(x.op.name for x in frozen.outputs))
    if not (quotients or products) and not any(
        node.op == "Softplus" or _GRADIENT in node.attr for node in (*graph.node, *functions)
    ):
        return frozen
    for node in functions:
        node.attr.pop(_GRADIENT, None)
    changed = graph_pb2.GraphDef(versions=graph.versions, library=graph.library)
    for node in graph.node:
        node.attr.pop(_GRADIENT, None)
        if node.name in products:
            _swap(node)
        changed.node.extend(_softplus(node) if node.op == "Softplus" else quotients.get(node.name, [node]))
    return wrap_function.function_from_graph_def(
        changed, [x.name for x in frozen.inputs], [x.name for x in frozen.outputs]
    )


def _constant_products(frozen: Any) -> set[str]:
    """Return the names of products (Einsum) of a constant and of data, in this order."""
    data, found = set[str](), set[str]()
    for op in frozen.graph.get_operations():
        on_data = [value.op.name in data for value in op.inputs]
        if op.type == "Placeholder" or any(on_data):
            data.add(op.name)
        if op.type == "Einsum" and on_data == [False, True]:
            found.add(op.name)
    return found


def _swap(node: Any) -> None:
    first, second, *rest = node.input
    node.input[:] = [second, first, *rest]
    terms, arrow, result = node.attr["equation"].s.decode().partition("->")
    one, other = terms.split(",")
    node.attr["equation"].s = f"{other},{one}{arrow}{result}".encode()


def _softplus(node: Any) -> list[Any]:
    """Return nodes that compute a softplus; the last one has the original name."""
    name, kind = node.name, node.attr["T"]

    def made(suffix: str, op: str, *inputs: str) -> Any:
        result = node_def_pb2.NodeDef(name=f"{name}{suffix}", op=op, input=inputs, device=node.device)
        result.attr["T"].CopyFrom(kind)
        return result

    (source,) = [value for value in node.input if not value.startswith("^")]
    return [
        made("/positive", "Relu", source),
        made("/size", "Abs", source),
        made("/negative", "Neg", f"{name}/size"),
        made("/exp", "Exp", f"{name}/negative"),
        made("/log", "Log1p", f"{name}/exp"),
        made("", "AddV2", f"{name}/positive", f"{name}/log"),
    ]
