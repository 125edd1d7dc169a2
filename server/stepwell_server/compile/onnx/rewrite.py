"""Rewrites a graph so that a program can run it: rows first, tensors named by signature keys, nothing else to know.

Constants become weights. A context becomes a state: it is joined with the input, and cut off for the next step.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

import numpy as np
import onnx

from stepwell_server.compile.onnx.interface import Interface, inputs_of

_KEY = re.compile(r"(in|state|out|next)_\d+(/.*)?|stepwell/.*")
_ROWS = "rows"
#: The first opset in which Slice takes its arguments as inputs.
_SLICE_INPUTS = 10
#: The first version of the file format in which weights need not be inputs too.
_MIN_IR = 4


def with_shapes(model: onnx.ModelProto, interface: Interface) -> onnx.ModelProto:
    """Return the model with the shapes of its inputs, and constants as weights; nothing else is declared."""
    found = onnx.ModelProto()
    found.CopyFrom(model)
    graph = found.graph
    infos = inputs_of(graph)
    del graph.input[:], graph.value_info[:], found.training_info[:]
    graph.doc_string = found.doc_string = ""
    del found.metadata_props[:]
    rows = 1 if interface.is_single else _ROWS
    for each in (*interface.inputs, *interface.states):
        sizes = [*each.shape[: each.axis], rows, *each.shape[each.axis :]]
        kind = infos[each.tensor].type.tensor_type.elem_type
        graph.input.append(onnx.helper.make_tensor_value_info(each.tensor, kind, sizes))
    for name, array in interface.constants.items():
        graph.initializer.append(onnx.numpy_helper.from_array(array, name))
    for output in graph.output:
        output.type.tensor_type.ClearField("shape")
    found.ir_version = max(found.ir_version, _MIN_IR)
    return found


def rewritten(
    model: onnx.ModelProto,
    interface: Interface,
    output_axes: Mapping[str, int],
    shapes: Mapping[str, Sequence[int]],
) -> onnx.ModelProto:
    """Return the model of a program.

    Args:
        model: the result of `with_shapes`.
        interface: its tensors.
        output_axes: the axis of the rows of each output.
        shapes: the shape of one row of each output.
    """
    found = onnx.ModelProto()
    found.CopyFrom(model)
    graph = found.graph
    _rename(graph, {name: f"model/{name}" for name in _names(graph) if _KEY.fullmatch(name)})
    kinds = {each.name: each.type.tensor_type.elem_type for each in (*model.graph.input, *model.graph.output)}
    rows = 1 if interface.is_single else _ROWS
    before: list[onnx.NodeProto] = []
    after: list[onnx.NodeProto] = []
    del graph.input[:], graph.output[:]

    def take(key: str, tensor: str, shape: Sequence[int], kind: int, axis: int) -> None:
        graph.input.append(onnx.helper.make_tensor_value_info(key, kind, [rows, *shape]))
        before.append(_moved(key, tensor, 0, axis, len(shape) + 1))

    def make(key: str, tensor: str, shape: Sequence[int], kind: int, axis: int) -> None:
        graph.output.append(onnx.helper.make_tensor_value_info(key, kind, [rows, *shape]))
        after.append(_moved(tensor, key, axis, 0, len(shape) + 1))

    def own(name: str) -> str:
        return f"model/{name}" if _KEY.fullmatch(name) else name

    place = len(interface.states)
    for i, each in enumerate(interface.inputs):
        kind = kinds[each.tensor]
        if not each.context:
            take(f"in_{i}", own(each.tensor), each.shape, kind, each.axis)
            continue
        context = (*each.shape[:-1], each.context)
        whole = f"stepwell/whole_{i}"
        before += [
            onnx.helper.make_node("Concat", [f"state_{place}", f"in_{i}"], [whole], axis=len(each.shape)),
            _moved(whole, own(each.tensor), 0, each.axis, len(each.shape) + 1),
        ]
        graph.input.append(onnx.helper.make_tensor_value_info(f"in_{i}", kind, [rows, *each.fresh]))
        graph.input.append(onnx.helper.make_tensor_value_info(f"state_{place}", kind, [rows, *context]))
        graph.output.append(onnx.helper.make_tensor_value_info(f"next_{place}", kind, [rows, *context]))
        cut = {"starts": each.fresh[-1] - each.context, "ends": each.fresh[-1], "axes": len(each.shape)}
        after.append(_slice(found, f"in_{i}", f"next_{place}", cut))
        place += 1
    for i, each in enumerate(interface.states):
        kind = kinds[each.tensor]
        take(f"state_{i}", own(each.tensor), each.shape, kind, each.axis)
        make(f"next_{i}", own(each.after), each.shape, kind, output_axes[each.after])
    for i, name in enumerate(interface.outputs):
        make(f"out_{i}", own(name), shapes[name], kinds[name], output_axes[name])
    nodes = [*before, *graph.node, *after]
    del graph.node[:]
    graph.node.extend(nodes)
    graph.name = "step"
    return found


def _slice(model: onnx.ModelProto, source: str, target: str, cut: Mapping[str, int]) -> onnx.NodeProto:
    """An operator that cuts one axis."""
    if all(each.version < _SLICE_INPUTS for each in model.opset_import if each.domain in {"", "ai.onnx"}):
        return onnx.helper.make_node(
            "Slice", [source], [target], **{name: [value] for name, value in cut.items()}
        )
    names = [f"{target}/{name}" for name in cut]
    for name, value in zip(names, cut.values(), strict=True):
        model.graph.initializer.append(onnx.numpy_helper.from_array(np.array([value], np.int64), name))
    return onnx.helper.make_node("Slice", [source, *names], [target])


def _moved(source: str, target: str, axis: int, to: int, rank: int) -> onnx.NodeProto:
    """An operator that moves the axis of the rows."""
    if axis == to:
        return onnx.helper.make_node("Identity", [source], [target])
    order = [each for each in range(rank) if each != axis]
    order.insert(to, axis)
    return onnx.helper.make_node("Transpose", [source], [target], perm=order)


def _names(graph: onnx.GraphProto) -> set[str]:
    found = {each.name for each in (*graph.input, *graph.output, *graph.initializer)}
    for node in graph.node:
        found |= {*node.input, *node.output}
        for attribute in node.attribute:
            for inner in [*([attribute.g] if attribute.HasField("g") else []), *attribute.graphs]:
                found |= _names(inner)
    return found


def _rename(graph: onnx.GraphProto, names: Mapping[str, str]) -> None:
    """Rename tensors of a graph and of the graphs in it."""
    if not names:
        return
    for each in (*graph.input, *graph.output, *graph.initializer):
        each.name = names.get(each.name, each.name)
    for node in graph.node:
        node.input[:] = [names.get(name, name) for name in node.input]
        node.output[:] = [names.get(name, name) for name in node.output]
        for attribute in node.attribute:
            for inner in [*([attribute.g] if attribute.HasField("g") else []), *attribute.graphs]:
                _rename(inner, names)
